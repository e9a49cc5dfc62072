"""The tuning methods: counts against PEFT and published numbers, what is frozen, and what a wrong option is told."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

from lab.errors import LabError
from lab.methods import (
    ADDED,
    ALL_LINEAR,
    METHODS,
    apply_method,
    closed_form,
    count_parameters,
    lora_parameters,
    method,
    quantisation,
)
from lab.models import shapes
from tests.methods.away import FAMILIES

SMALL = json.loads(shapes()["llama-6m"].read_text())


def small(**changes: Any) -> Any:
    """`llama-6m` with random weights."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(LlamaConfig(**{**SMALL, **changes}))


def llama(hidden: int, inner: int, layers: int, heads: int, key_value_heads: int, head: int) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        head_dim=head,
        vocab_size=64,
    )


def train_once(model: Any) -> None:
    tokens = torch.randint(0, SMALL["vocab_size"], (2, 8), generator=torch.Generator().manual_seed(0))
    model(input_ids=tokens, labels=tokens).loss.backward()


def model_types(configurations: Iterable[Path]) -> set[str]:
    return {json.loads(path.read_text(encoding="utf-8"))["model_type"] for path in configurations}


def test_the_lab_s_own_methods_are_tried_on_every_family_that_is_bundled(tmp_path: Path) -> None:
    assert set(FAMILIES) == model_types(shapes().values())
    new = tmp_path / "new.json"
    new.write_text(json.dumps({**SMALL, "model_type": "olmo2"}), encoding="utf-8")
    assert model_types([*shapes().values(), new]) - set(FAMILIES) == {"olmo2"}


# Counts ---------------------------------------------------------------------------------------------------------

QV = ("q_proj", "v_proj")

# Counts known from elsewhere, as totals of what is trained; and below them counts written out for the lab's own methods.
# The modules themselves are counted for each, on the meta device.
PUBLISHED: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "Llama-7B LoRA": ("llama-2-7b", "lora", {"rank": 8, "targets": QV}, 4_194_304),
    "Llama-3.2-3B LoRA": ("llama-3.2-3b", "lora", {"rank": 32, "targets": QV}, 9_175_040),
    "Llama-3.2-3B DoRA": ("llama-3.2-3b", "dora", {"rank": 32, "targets": QV}, 9_289_728),
    "Llama-3.2-3B IA3": ("llama-3.2-3b", "ia3", {}, 286_720),
    "Llama-3.2-3B prompt tuning": ("llama-3.2-3b", "prompt", {"virtual_tokens": 200}, 614_400),
    "Llama-3.2-3B prefix tuning": ("llama-3.2-3b", "prefix", {"virtual_tokens": 200}, 11_468_800),
    "Llama-3.2-3B P-Tuning": ("llama-3.2-3b", "ptuning", {"virtual_tokens": 20, "encoder": "mlp"}, 28_382_208),
    "SmolLM2-135M LoRA rank 8": ("smollm2-135m", "lora", {"rank": 8}, 2_442_240),
    "SmolLM2-135M LoRA rank 16": ("smollm2-135m", "lora", {"rank": 16}, 4_884_480),
    "SmolLM2-135M DoRA rank 8": ("smollm2-135m", "dora", {"rank": 8}, 2_597_760),
    # Sides sqrt((3072 + 3072) 8) = 221.7 and sqrt((3072 + 1024) 8) = 181.02, in 28 layers; even where pairs are turned.
    "MoRA operator 1": ("llama-3.2-3b", "mora", {"operator": 1, "targets": QV}, 28 * (222**2 + 181**2)),
    "MoRA operator 6": ("llama-3.2-3b", "mora", {"operator": 6, "targets": QV}, 28 * (222**2 + 180**2)),
    # Down to 3072 / 16 = 192 and up again, with biases.
    "Pfeiffer adapters": ("llama-3.2-3b", "adapter", {}, 28 * (3072 * 192 + 192 + 192 * 3072 + 3072)),
    "Houlsby adapters": ("llama-3.2-3b", "adapter", {"placement": "houlsby"}, 2 * 28 * (2 * 3072 * 192 + 192 + 3072)),
}
LESS_STORED = {"Llama-3.2-3B P-Tuning": 61_440}
"""Where a file holds fewer than are trained."""


@pytest.mark.parametrize("case", PUBLISHED)
def test_the_closed_form_gives_the_published_counts_and_those_of_the_modules(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # PEFT copies virtual tokens to the processor to save them, and there is nothing to copy on the meta device.
    monkeypatch.setattr(torch.Tensor, "cpu", lambda tensor: tensor)
    shape, name, options, count = PUBLISHED[case]
    config = AutoConfig.for_model(**json.loads(shapes()[shape].read_text()))
    assert closed_form(config, name, options) == count
    with torch.device("meta"):
        model = apply_method(AutoModelForCausalLM.from_config(config), name, options)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == count
    counts = count_parameters(model)
    assert (counts["trainable"], counts["stored"]) == (count, LESS_STORED.get(case, count))
    assert counts["base"] == counts["total"] - count


@settings(max_examples=12, deadline=None)
@given(
    rank=st.integers(1, 64),
    targets=st.lists(st.sampled_from(ALL_LINEAR), min_size=1, unique=True).map(tuple),
    groups=st.sampled_from([(4, 1), (4, 2), (4, 4)]),
    head=st.sampled_from([8, 16]),
    layers=st.integers(1, 3),
)
def test_the_closed_form_equals_peft_s_count_on_any_shape(
    rank: int, targets: tuple[str, ...], groups: tuple[int, int], head: int, layers: int
) -> None:
    config = llama(32, 56, layers, *groups, head)
    model = apply_method(AutoModelForCausalLM.from_config(config), "lora", {"rank": rank, "targets": targets})
    counts = count_parameters(model)
    assert counts["trainable"] == counts["stored"] == lora_parameters(config, rank, targets)
    assert counts["total"] == counts["base"] + counts["trainable"]


OTHERS: list[tuple[str, dict[str, Any]]] = [
    ("lora", {"targets": ["q_proj", "lm_head"]}),
    ("dora", {}),
    ("dora", {"rank": 3, "targets": ["v_proj", "down_proj"]}),
    ("ia3", {}),
    ("ia3", {"targets": ["k_proj", "up_proj"], "feedforward": ["up_proj"]}),
    ("prompt", {"virtual_tokens": 5}),
    ("prefix", {}),
    ("prefix", {"projection": True}),
    ("prefix", {"projection": True, "encoder_hidden_size": 48}),
    ("ptuning", {}),
    ("ptuning", {"encoder_hidden_size": 48}),
    ("ptuning", {"encoder": "lstm"}),
    ("ptuning", {"encoder": "lstm", "encoder_hidden_size": 48}),
]


@pytest.mark.parametrize(("name", "options"), OTHERS, ids=lambda value: str(value))
def test_the_closed_form_of_every_method_equals_peft_s_count(name: str, options: dict[str, Any]) -> None:
    for groups in ((4, 2), (4, 4)):
        base = AutoModelForCausalLM.from_config(llama(32, 56, 2, *groups, 16))
        size = sum(p.numel() for p in base.parameters())
        counts = count_parameters(apply_method(base, name, options))
        assert counts["trainable"] == closed_form(base.config, name, options)
        assert (counts["base"], counts["total"]) == (size, size + counts["trainable"])


@pytest.mark.parametrize(("name", "options"), OTHERS[1:], ids=lambda value: str(value))
def test_every_method_trains_what_it_adds_and_nothing_else(name: str, options: dict[str, Any]) -> None:
    model = apply_method(small(), name, options)
    train_once(model)
    held = {name for name, p in model.named_parameters() if p.grad is not None}
    assert held == {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(any(mark in name for mark in ADDED) for name in held)


def test_what_an_encoder_makes_is_stored_and_not_the_encoder() -> None:
    counts = count_parameters(apply_method(small(), "ptuning", {"virtual_tokens": 5}))
    assert counts["stored"] == 5 * SMALL["hidden_size"] < counts["trainable"]


def test_qlora_wants_a_base_in_four_bits() -> None:
    assert [quantisation("qlora", {"double_quantisation": twice}) for twice in (False, True)] == ["nf4", "nf4-double"]
    assert quantisation("lora", {}) is None


def test_counts_of_llama_6m_by_both_methods() -> None:
    base = sum(p.numel() for p in small().parameters())
    full = count_parameters(apply_method(small(), "full", {}))
    assert full == {"total": base, "base": base, "trainable": base, "stored": base}
    lora = apply_method(small(), "lora", {"rank": 4})
    added = closed_form(lora.config, "lora", {"rank": 4})
    assert added is not None
    assert count_parameters(lora) == {"total": base + added, "base": base, "trainable": added, "stored": added}
    assert closed_form(lora.config, "full", {}) is None


def test_a_tied_head_is_counted_once() -> None:
    tied, untied = (count_parameters(small(tie_word_embeddings=tie))["total"] for tie in (True, False))
    assert untied - tied == SMALL["vocab_size"] * SMALL["hidden_size"]


# Training -------------------------------------------------------------------------------------------------------


def test_frozen_parameters_hold_no_gradient_after_a_backward() -> None:
    model = apply_method(small(), "lora", {})
    train_once(model)
    held = {name for name, p in model.named_parameters() if p.grad is not None}
    assert held == {name for name, p in model.named_parameters() if "lora_" in name}
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_full_fine_tuning_gives_every_parameter_a_gradient_even_after_freezing() -> None:
    model = apply_method(small().requires_grad_(False), "full", {})
    train_once(model)
    assert all(p.grad is not None for p in model.parameters())


def test_a_fresh_adapter_changes_nothing() -> None:
    tokens = torch.arange(12).reshape(1, 12)
    plain, adapted = small().eval(), apply_method(small(), "lora", {}).eval()
    with torch.no_grad():
        assert torch.equal(plain(input_ids=tokens).logits, adapted(input_ids=tokens).logits)


# Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("lroa", {}, "unknown method 'lroa'. Did you mean 'lora'? Known: " + ", ".join(sorted(METHODS)) + "."),
        ("lora", {"rnak": 8}, "method lora: rnak is not a known key. Did you mean 'rank'?"),
        ("full", {"rank": 8}, "method full: rank is not a known key. Known: none."),
        ("lora", {"rank": 0}, "method lora: rank is 0; it must be at least 1. Raise it."),
        ("lora", {"rank": "eight"}, "method lora: rank is 'eight'; it must be a valid integer"),
        ("lora", {"dropout": 1.5}, "method lora: dropout is 1.5; it must be less than 1. Correct it."),
        ("lora", {"targets": []}, "method lora: targets is []; it must have at least 1 entry. Add one."),
        ("lora", {"targets": ["query"]}, "unknown target module 'query'. Known: down_proj, gate_proj, k_proj, lm_head"),
        ("lora", {"targets": ["q_prj"]}, "unknown target module 'q_prj'. Did you mean 'q_proj'?"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_is_known(name: str, options: dict[str, Any], said: str) -> None:
    with torch.device("meta"):
        model = small()
    with pytest.raises(LabError) as caught:
        apply_method(model, name, options)
    assert str(caught.value).startswith(said)
    assert "\n" not in str(caught.value)


def test_options_that_are_not_given_are_those_of_the_method() -> None:
    options = method("lora").options()
    assert options.model_dump() == {"rank": 8, "alpha": 16, "dropout": 0.0, "targets": ALL_LINEAR}
