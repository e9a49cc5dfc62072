"""Bottleneck adapters, on every decoder family that the lab bundles, against a reference in hooks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import BertConfig, BertModel

from lab.errors import LabError
from lab.methods import AdapterOptions, apply_method, closed_form, count_parameters
from lab.methods.adapter import ACTIVATIONS, PLACES, BottleneckLayer, apply
from tests.methods.away import FAMILIES, TOKENS, base, drawn, logits


def adapter(family: str = "llama", **options: Any) -> Any:
    return apply_method(base(family), "adapter", {"reduction_factor": 8, **options})


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("placement", PLACES)
def test_it_begins_as_the_base_trains_itself_alone_and_counts_as_the_closed_form_says(
    family: str, placement: str
) -> None:
    model = adapter(family, placement=placement)
    torch.testing.assert_close(logits(model), logits(base(family)), rtol=0, atol=0)
    own = {name: p for name, p in model.named_parameters() if "bottleneck_" in name}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == set(own)
    counts = count_parameters(model)
    formula = closed_form(model.config, "adapter", {"reduction_factor": 8, "placement": placement})
    assert counts["trainable"] == counts["stored"] == sum(p.numel() for p in own.values()) == formula
    assert counts["base"] == sum(p.numel() for p in base(family).parameters())
    drawn(model).train()(TOKENS, labels=TOKENS).loss.backward()
    assert all(p.grad is not None and p.grad.any() for p in own.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("placement", PLACES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_the_output_is_that_of_hooks_on_the_base(family: str, placement: str, activation: str) -> None:
    model = drawn(adapter(family, placement=placement, activation=activation))
    layers = {name: m for name, m in model.get_base_model().named_modules() if isinstance(m, BottleneckLayer)}
    assert len(layers) == 2 * (2 if placement == "houlsby" else 1)
    plain = base(family)

    def hook(adapted: BottleneckLayer) -> Any:
        def add(_: Any, args: Any, kwargs: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            seen = (args[0] if args else kwargs["hidden_states"]) if placement == "parallel" else hidden
            down: Any = adapted.bottleneck_down["default"]
            up: Any = adapted.bottleneck_up["default"]
            narrow = ACTIVATIONS[activation](seen @ down.weight.T + down.bias)
            hidden = hidden + narrow @ up.weight.T + up.bias
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return add

    for name, adapted in layers.items():
        plain.get_submodule(name).register_forward_hook(hook(adapted), with_kwargs=True)
    torch.testing.assert_close(logits(model), logits(plain))


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_saved_and_loaded_switched_off_and_unloaded(family: str, tmp_path: Path) -> None:
    model = drawn(adapter(family, placement="houlsby"))
    made = logits(model)
    assert not torch.allclose(made, logits(base(family)), atol=1e-3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(family), tmp_path).eval()), made)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base(family)))
    with pytest.raises(LabError, match=r"merge: a bottleneck adapter has a nonlinearity.*or train LoRA\."):
        model.merge_and_unload()
    torch.testing.assert_close(logits(model.unload()), logits(base(family)))


@pytest.mark.parametrize("family", FAMILIES)
def test_switched_adapters_give_what_models_of_their_own_give(family: str, tmp_path: Path) -> None:
    first, second = drawn(adapter(family), seed=1), drawn(adapter(family, reduction_factor=4), seed=2)
    expected = [logits(first), logits(second)]
    second.save_pretrained(tmp_path)
    first.load_adapter(tmp_path, "second")
    first.eval()
    for name, made in (("default", expected[0]), ("second", expected[1]), ("default", expected[0])):
        first.set_adapter(name)
        torch.testing.assert_close(logits(first), made)


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_it_generates_with_a_cache_what_it_generates_without(family: str) -> None:
    model = drawn(adapter(family, placement="houlsby"))
    asked = {"max_new_tokens": 6, "do_sample": False, "attention_mask": torch.ones_like(TOKENS)}
    assert torch.equal(
        model.generate(TOKENS, use_cache=True, **asked), model.generate(TOKENS, use_cache=False, **asked)
    )


@pytest.mark.parametrize("placement", PLACES)
def test_checkpointing_gives_the_same_gradients(placement: str) -> None:
    found = []
    for checkpointing in (False, True):
        model = drawn(adapter(placement=placement)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(TOKENS, labels=TOKENS, use_cache=False).loss.backward()
        found.append([p.grad for p in model.parameters() if p.requires_grad])
    for plain, replayed in zip(*found, strict=True):
        torch.testing.assert_close(plain, replayed)


def test_a_base_in_half_precision_keeps_its_adapters_in_fp32() -> None:
    model = apply_method(base(dtype=torch.bfloat16), "adapter", {})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(TOKENS, labels=TOKENS).logits.dtype == torch.bfloat16


def test_a_model_without_known_sublayers_and_wrong_options_are_named() -> None:
    with pytest.raises(LabError, match=r"BertModel has no sublayer called self_attn, attn, mlp\."):
        apply(BertModel(BertConfig(num_hidden_layers=1)), AdapterOptions(placement="houlsby"))
    with pytest.raises(LabError, match="placement"):
        apply_method(base(), "adapter", {"placement": "between"})
    with pytest.raises(LabError, match="rank"):
        apply_method(base(), "adapter", {"rank": 8})
