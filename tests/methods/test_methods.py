"""The tuning methods: counts against PEFT and published numbers, what is frozen, and what a wrong option is told."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig

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


# Counts ---------------------------------------------------------------------------------------------------------

# Counts known from elsewhere, as totals: LoRA on queries and values of a Llama of 7B and of 3B parameters (4.2M and
# 9.2M), and on all linear layers of SmolLM2-135M. PEFT is asked for each of them below, on the meta device.
PUBLISHED = [
    (llama(4096, 11008, 32, 32, 32, 128), 8, ("q_proj", "v_proj"), 4_194_304),
    (llama(3072, 8192, 28, 24, 8, 128), 32, ("q_proj", "v_proj"), 9_175_040),
    (llama(576, 1536, 30, 9, 3, 64), 8, ALL_LINEAR, 2_442_240),
    (llama(576, 1536, 30, 9, 3, 64), 16, ALL_LINEAR, 4_884_480),
]
IDS = ["Llama-7B", "Llama-3.2-3B", "SmolLM2-135M rank 8", "SmolLM2-135M rank 16"]


@pytest.mark.parametrize(("config", "rank", "targets", "count"), PUBLISHED, ids=IDS)
def test_the_closed_form_gives_the_published_counts_and_those_of_peft(
    config: LlamaConfig, rank: int, targets: tuple[str, ...], count: int
) -> None:
    options = {"rank": rank, "targets": targets}
    assert closed_form(config, "lora", options) == lora_parameters(config, rank, targets) == count
    with torch.device("meta"):
        model = apply_method(AutoModelForCausalLM.from_config(config), "lora", options)
    assert count_parameters(model)["trainable"] == count


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
