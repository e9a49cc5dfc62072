"""Gradient checkpointing on small models: equal gradients, what is kept and counted, and faults that must be seen."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lab import checkpointing
from lab.checkpointing import WAYS, _batch, _build, _difference, _Pass, checkpointed
from lab.errors import LabError
from lab.runners import Outcome, execute
from lab.specs import Checkpointing
from lab.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**changes: Any) -> Checkpointing:
    return Checkpointing.model_validate({"model": "llama-6m", "layers": 2, "batch": 2, "length": 16, **changes})


def traded(**changes: Any) -> Outcome:
    return execute(settings(**changes), Workspace(Path("nowhere"), "smoke"))


LORA = {"method": "lora", "method_options": {"dropout": 0.3}}


@pytest.mark.parametrize("method", [{}, LORA], ids=["full", "lora"])
def test_gradients_are_equal_to_the_bit_under_dropout_unless_the_random_state_is_lost(method: dict[str, Any]) -> None:
    found = traded(attention_dropout=0.3, **method).figures
    assert found["difference_non_reentrant"] == found["difference_reentrant"] == 0
    assert found["difference_unpreserved"] > 0.01


def test_without_dropout_there_is_no_random_state_to_lose() -> None:
    assert traded().figures["difference_unpreserved"] == 0


def test_a_replay_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    replay = checkpointing.checkpointed

    def careless(model: Any, options: Mapping[str, bool] | None) -> Any:
        if options:  # the weights of a checkpointed layer are not those of the reference
            with torch.no_grad():
                model.model.layers[1].mlp.down_proj.weight[0, 0] += 0.1
        return replay(model, options)

    monkeypatch.setattr(checkpointing, "checkpointed", careless)
    assert traded().figures["difference_non_reentrant"] > 1e-4


def test_the_difference_is_the_largest_of_any_element_over_the_largest_of_the_reference() -> None:
    reference = [torch.tensor([1.0, -4.0]), torch.tensor([[0.5]])]
    found = [torch.tensor([1.0, -4.0]), torch.tensor([[0.7]])]
    assert _difference(reference, found) == pytest.approx(0.05)
    assert _difference(reference, reference) == 0


def test_a_reentrant_checkpoint_over_a_frozen_embedding_needs_the_hook() -> None:
    """Without it torch finds no input that asks for a gradient, and what is trained gets none."""
    chosen = settings(method="lora")
    model = _build(chosen)
    batch = _batch(chosen, model)
    reference = _Pass.of(model, batch, None, 0)
    assert _difference(reference.gradients, _Pass.of(model, batch, WAYS["reentrant"], 0).gradients) == 0
    model.get_base_model().enable_input_require_grads = lambda: None
    with pytest.raises(RuntimeError, match="does not require grad"):
        _Pass.of(model, batch, WAYS["reentrant"], 0)


def test_checkpointing_ends_with_its_block() -> None:
    model = _build(settings())
    embedding = model.get_input_embeddings()
    for options in (WAYS["non_reentrant"], WAYS["reentrant"]):
        with checkpointed(model, options):
            assert model.is_gradient_checkpointing
            assert embedding._forward_hooks
        assert not model.is_gradient_checkpointing
        assert not embedding._forward_hooks  # one that stays would cost the passes without checkpointing
    with checkpointed(model, None):
        assert not model.is_gradient_checkpointing


def test_every_parameter_that_is_trained_has_a_gradient_to_compare() -> None:
    """LoRA's B starts at zero, and as long as it is, A has none."""
    chosen = settings(**LORA)
    model = _build(chosen)
    gradients = _Pass.of(model, _batch(chosen, model), None, 0).gradients
    assert len(gradients) == 2 * 7 * 2
    assert all(bool(gradient.any()) for gradient in gradients)


def products() -> tuple[int, int]:
    """Operations of the products with weights in one layer, and with the head, for the batch of `settings`."""
    layer = 2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 688
    return 2 * 2 * 16 * layer, 2 * 2 * 16 * 256 * 2048


def test_the_replay_counts_as_one_forward_pass_of_the_layers_but_for_what_no_gradient_needs() -> None:
    """torch stops a replay after the last tensor that backward reads: the output of the last product is none."""
    layer, head = products()
    last = 2 * 2 * 16 * 256 * 688
    attention = 2 * 2 * 2 * 16 * 16 * 256  # scores and values, of 2 rows of 16 tokens and 8 heads of 32
    found = traded(layers=3).figures
    # A backward pass multiplies twice for each product; that of attention makes the scores anew: 5 products for 2.
    assert found["without_flops"] == pytest.approx(3 * (3 * layer + head + 3.5 / 3 * 3 * attention), rel=1e-6)
    assert found["with_flops"] - found["without_flops"] == pytest.approx(3 * (layer - last + attention), rel=1e-6)


def test_a_checkpoint_keeps_one_hidden_state_of_a_layer() -> None:
    one, two, three = (traded(layers=layers).figures for layers in (1, 2, 3))
    assert one["hidden_bytes"] == 2 * 16 * 256 * 4
    assert [found["layers"] for found in (one, two, three)] == [1, 2, 3]
    for small, large in ((one, two), (two, three)):
        assert large["with_kept_bytes"] - small["with_kept_bytes"] == one["hidden_bytes"]
        assert large["without_kept_bytes"] - small["without_kept_bytes"] > 10 * one["hidden_bytes"]


def test_passes_are_timed_in_turn_and_the_first_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def seconds(_: Any, model: Any, batch: Mapping[str, Tensor]) -> float:
        seen.append(model.is_gradient_checkpointing)
        return 3.0 if seen[-1] else 2.0

    monkeypatch.setattr(checkpointing, "_seconds", seconds)
    outcome = traded(rounds=3)
    assert seen == [False, True, True, False, False, True]
    assert outcome.figures["ratio"] == 1.5
    assert (outcome.figures["without_seconds"], outcome.figures["with_seconds"]) == (2.0, 3.0)
    assert outcome.series == {"without_seconds": [2.0] * 3, "with_seconds": [3.0] * 3}


def test_a_pass_takes_time_and_leaves_no_gradient() -> None:
    chosen = settings()
    model = _build(chosen)
    assert checkpointing._seconds(chosen, model, _batch(chosen, model)) > 0
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_same_settings_give_the_same_numbers_and_another_seed_gives_others() -> None:
    first, again, other = (traded(attention_dropout=0.3, seed=seed).figures for seed in (1, 1, 2))
    assert first == again
    assert first["difference_unpreserved"] != other["difference_unpreserved"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": "smol"}, r"checkpointing: model 'smol' is prepared, .* Choose a bundled shape"),
        ({"model": "llama-7m"}, r"unknown model 'llama-7m'\. Did you mean"),
        ({"method": "qlora"}, r"checkpointing: a base in nf4 is not built here\. Choose method full or lora"),
        ({"quantisation": "int8"}, r"checkpointing: a base in int8 is not built here"),
    ],
)
def test_what_cannot_be_built_says_so(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said):
        traded(**changes)
