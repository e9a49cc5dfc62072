"""MoRA: each operator against a reference in plain loops, merging, and what PEFT does with a method of its own."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lab.errors import LabError
from lab.methods import MoraOptions, apply_method, closed_form, count_parameters
from lab.methods.mora import OPERATORS, MoraConfig, MoraLayer
from lab.methods.sizes import mora_side
from tests.methods.away import FAMILIES, TOKENS, base, drawn, logits

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
TARGETS: dict[str, tuple[str, ...]] = {
    "phi": ("q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"),
    "phi3": ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"),
    "qwen3_moe": ATTENTION,
    "mixtral": ATTENTION,
    "gpt2": ("c_attn", "c_fc"),
    "gpt_bigcode": ("c_attn", "c_fc"),
}
"""Where a family has no linear layers of the names that are the default: other names, or experts in one tensor."""


def mora(family: str = "llama", **options: Any) -> Any:
    targets = {"targets": TARGETS[family]} if family in TARGETS else {}
    return apply_method(base(family), "mora", {"rank": 3} | targets | options)


def layer(inputs: int, outputs: int, rank: int, operator: int, dtype: torch.dtype = torch.float64) -> MoraLayer:
    torch.manual_seed(0)
    made = MoraLayer(nn.Linear(inputs, outputs), "default", MoraConfig(r=rank, operator=operator)).to(dtype)
    nn.init.normal_(made.mora_matrix["default"])
    return made


# The operators --------------------------------------------------------------------------------------------------


def reference(operator: int, matrix: Tensor, x: list[float], outputs: int) -> Tensor:
    """The paper's update of one input, number by number."""
    n, count = len(matrix), len(x)
    groups = -(-count // n)
    full = [x[place % count] for place in range(groups * n)]

    def neighbours(length: int) -> list[int]:
        """The group of each of so many places: the first groups are one longer."""
        longer, least = length % n, length // n
        return [g for g in range(n) for _ in range(least + (g < longer))]

    if operator == 6:
        wide: list[float] = []
        for group in range(groups):
            part, turned = full[group * n : (group + 1) * n], [0.0] * n
            for i in range(n // 2):
                angle = torch.tensor(group * 10_000.0 ** (-2 * i / n), dtype=torch.float64)
                a, b = part[i], part[i + n // 2]
                turned[i] = float(a * angle.cos() - b * angle.sin())
                turned[i + n // 2] = float(b * angle.cos() + a * angle.sin())
            wide += (matrix @ torch.tensor(turned, dtype=torch.float64)).tolist()
        return torch.tensor([wide[place % len(wide)] for place in range(outputs)], dtype=torch.float64)
    short = torch.zeros(n, dtype=torch.float64)
    if operator in (1, 4):
        for place, value in enumerate(full):
            short[place % n] += value
    else:
        for place, group in enumerate(neighbours(count)):
            short[group] += x[place]
    made = matrix @ short
    if operator in (1, 3):
        return torch.stack([made[place % n] for place in range(outputs)])
    return torch.stack([made[group] for group in neighbours(outputs)])


@settings(max_examples=60, deadline=None)
@given(
    operator=st.sampled_from(sorted(OPERATORS)),
    inputs=st.integers(1, 40),
    outputs=st.integers(1, 40),
    rank=st.integers(1, 12),
)
def test_every_operator_is_the_paper_s_and_merges(operator: int, inputs: int, outputs: int, rank: int) -> None:
    made = layer(inputs, outputs, rank, operator)
    x = torch.randn(2, 3, inputs, dtype=torch.float64)
    update = made.update("default", x)
    expected = [reference(operator, made.mora_matrix["default"].detach(), row, outputs) for row in x[0].tolist()]
    # The turning angles are made in fp32, as those of the model's own rotary embeddings.
    torch.testing.assert_close(update[0], torch.stack(expected), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x @ made.get_delta_weight("default").T, update)
    before, weight = made(x), made.get_base_weight().clone()
    made.merge()
    torch.testing.assert_close(made(x), before)
    made.unmerge()
    torch.testing.assert_close(made.get_base_weight(), weight)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=str)
def test_a_merged_layer_gives_the_same_up_to_rounding(operator: int, dtype: torch.dtype, rounding: float) -> None:
    made = layer(48, 32, 4, operator, dtype)
    x = torch.randn(4, 48).to(dtype)
    before = made(x).detach().float()
    made.merge(safe_merge=True)
    assert made.base_layer.weight.dtype == dtype
    assert (made(x).detach().float() - before).norm() < rounding * before.norm()


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_the_weight_changes_by_a_rank_far_above_that_of_lora(operator: int) -> None:
    rank = 4
    made = layer(64, 64, rank, operator)
    singular = torch.linalg.svdvals(made.get_delta_weight("default"))
    found = int((singular > 1e-9 * singular[0]).sum())
    assert found == mora_side(64, 64, rank, operator) if operator != 6 else found > mora_side(64, 64, rank, operator)
    assert found >= 5 * rank


def test_the_matrix_has_the_parameters_of_lora_but_for_the_rounding_of_its_mora_side() -> None:
    for inputs, outputs, rank in ((4096, 4096, 8), (4096, 11008, 16), (576, 1536, 8)):
        for operator in OPERATORS:
            width, budget = mora_side(inputs, outputs, rank, operator), rank * (inputs + outputs)
            assert abs(width**2 - budget) <= (2 if operator == 6 else 1) * (2 * width + 1)


# In a model -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_it_begins_as_the_base_trains_its_matrices_alone_and_counts_as_the_closed_form_says(operator: int) -> None:
    model = mora(operator=operator)
    assert torch.equal(logits(model), logits(base()))
    model(TOKENS, labels=TOKENS).loss.backward()
    moved = {name for name, p in model.named_parameters() if p.grad is not None}
    assert moved == {name for name, _ in model.named_parameters() if "mora_" in name}
    counts, squares = count_parameters(model), [p.numel() for n, p in model.named_parameters() if "mora_" in n]
    formula = closed_form(model.config, "mora", {"rank": 3, "operator": operator})
    assert counts["trainable"] == counts["stored"] == sum(squares) == formula
    assert counts["base"] == sum(p.numel() for p in base().parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_saved_and_loaded_switched_off_and_merged(family: str, tmp_path: Path) -> None:
    model = drawn(mora(family))
    made = logits(model)
    assert not torch.allclose(made, logits(base(family)), atol=1e-3)
    model.save_pretrained(tmp_path)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base(family), tmp_path).eval()), made)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(base(family)))
    torch.testing.assert_close(logits(model.merge_and_unload()), made, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("operator", sorted(OPERATORS))
def test_every_operator_merges_into_weights_that_stand_the_other_way_round(operator: int) -> None:
    """GPT-2's layers hold `(inputs, outputs)`; those that are square would take an update that stands wrong, too."""
    targets = ("c_attn", "c_proj", "c_fc")
    model = drawn(mora("gpt2", operator=operator, targets=targets))
    layers = [m for m in model.modules() if isinstance(m, MoraLayer)]
    assert all(isinstance(m.get_base_layer(), Conv1D) for m in layers)
    square = [m for m in layers if m.in_features == m.out_features]
    assert {(m.in_features, m.out_features) for m in layers} == {(32, 96), (32, 32), (32, 128), (128, 32)}
    made = logits(model)
    assert not torch.allclose(made, logits(base("gpt2")), atol=1e-3)
    turned = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(turned), made, rtol=1e-4, atol=1e-4)
    names = [name for name, m in model.get_base_model().named_modules() if m in square]
    for name in names:  # the fault: each square update as it stands in a linear layer
        delta = model.get_base_model().get_submodule(name).get_delta_weight("default").detach()
        turned.get_submodule(name).weight.data += delta - delta.T
    assert not torch.allclose(logits(turned), made, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_switched_adapters_give_what_models_of_their_own_give(family: str, tmp_path: Path) -> None:
    first, second = drawn(mora(family), seed=1), drawn(mora(family, operator=1), seed=2)
    expected = [logits(first), logits(second)]
    second.save_pretrained(tmp_path)
    first.load_adapter(tmp_path, "second")
    first.eval()
    torch.testing.assert_close(logits(first), expected[0])
    first.set_adapter("second")
    torch.testing.assert_close(logits(first), expected[1])
    first.set_adapter("default")
    torch.testing.assert_close(logits(first), expected[0])


def test_a_base_in_half_precision_keeps_its_matrices_in_fp32() -> None:
    model = apply_method(base(dtype=torch.bfloat16), "mora", {})
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(TOKENS, labels=TOKENS).logits.dtype == torch.bfloat16


def test_a_quantised_base_trains_and_says_that_it_cannot_be_merged() -> None:
    import bitsandbytes

    four = bitsandbytes.nn.Linear4bit(64, 64, compute_dtype=torch.float32, quant_type="nf4").to("cpu")
    made = MoraLayer(four, "default", MoraConfig(r=4))
    before = copy.deepcopy(made.mora_matrix["default"])
    made(torch.randn(3, 64)).sum().backward()
    assert made.mora_matrix["default"].grad is not None
    assert torch.equal(before, made.mora_matrix["default"])
    with pytest.raises(LabError, match=r"merge: the base's weights are quantised.*Load the base in 16 bits"):
        made.merge()


def test_options_that_it_has_not_are_named() -> None:
    with pytest.raises(LabError, match="operator"):
        apply_method(base(), "mora", {"operator": 5})
    with pytest.raises(LabError, match="rank"):
        apply_method(base(), "mora", {"alpha": 16})
    assert MoraOptions().operator == 6
