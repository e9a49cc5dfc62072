"""Which kernel torch would take on a card, and that what stands in for it holds what torch's own holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lab.cards import GPUS
from lab.memory import kernels
from lab.memory.ledger import Ledger
from lab.memory.simulation import predict
from lab.memory.workload import Workload, before_ampere, sdpa_kernel

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
}


def on(gpu: str | None, **settings: Any) -> Workload:
    return Workload.model_validate({"config": SMALL, "gpu": gpu, "length": 512, **settings})


def test_the_cards_without_flash_kernels_are_those_of_the_families_before_ampere() -> None:
    assert {name for name in GPUS if before_ampere(on(name))} == {
        name for name, gpu in GPUS.items() if gpu.family in ("Volta", "Turing")
    }


@pytest.mark.parametrize(
    ("gpu", "dtype", "masked", "grouped", "head_size", "kernel"),
    [
        ("A10", "bf16", False, True, 128, "flash"),
        ("A10", "bf16", True, False, 128, "efficient"),
        ("A10", "fp16", False, False, 512, "efficient"),
        ("A10", "fp32", False, False, 128, "efficient"),
        ("A10", "fp32", False, True, 128, "math"),
        ("A10", "fp32", False, False, 6, "math"),
        ("A10", "bf16", True, False, 20, "math"),
        (None, "bf16", False, False, 128, "flash"),
        ("T4", "fp16", False, False, 128, "efficient"),
        ("T4", "fp16", True, False, 128, "efficient"),
        ("T4", "fp16", False, True, 128, "math"),
        ("T4", "bf16", False, False, 128, "math"),
        ("T4", "bf16", True, False, 128, "math"),
        ("V100-32GB", "fp32", False, False, 6, "efficient"),
        ("V100-32GB", "fp16", False, False, 20, "math"),
    ],
)
def test_the_kernel_of_attention_is_the_first_that_takes_it(
    gpu: str | None, dtype: Any, masked: bool, grouped: bool, head_size: int, kernel: str
) -> None:
    assert sdpa_kernel(on(gpu), dtype, masked, grouped, head_size) == kernel


def kept_bytes(attend: Any, dtype: torch.dtype, groups: int, backward: bool) -> int:
    """Bytes that are held after an attention, or after its backward, beside what was there before."""
    query = torch.zeros(2, 4, 24, 16, dtype=dtype, requires_grad=True)
    key, value = (torch.zeros(2, 4 // groups, 24, 16, dtype=dtype, requires_grad=True) for _ in range(2))
    with Ledger() as ledger:
        output = attend(query, key, value)
        if backward:
            output.sum().backward()
        return sum(ledger.held.values())


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_attention_keeps_what_that_of_torch_keeps(dtype: torch.dtype, groups: int, backward: bool) -> None:
    def of_torch(query: Any, key: Any, value: Any) -> Any:
        return torch.ops.aten._scaled_dot_product_attention_math(
            query, key, value, None, 0.0, True, enable_gqa=groups > 1
        )[0]

    def ours(query: Any, key: Any, value: Any) -> Any:
        return kernels._plain_attention(query, key, value, None, 0.0, True)

    found = kept_bytes(ours, dtype, groups, backward)
    assert found == kept_bytes(of_torch, dtype, groups, backward) > 0


def test_an_older_card_attends_in_fp16_without_a_table_of_scores_and_in_bf16_with_one() -> None:
    def grows(**settings: Any) -> float:
        short, long = (predict(on(length=length, **settings)).parts["activations"] for length in (512, 1024))
        return long / short

    fused = {"method": "full", "loss": "chunked", "checkpointing": False}
    assert grows(gpu="T4", dtype="fp16", **fused) == pytest.approx(2, rel=0.02)
    assert grows(gpu="A10", dtype="bf16", **fused) == pytest.approx(2, rel=0.02)
    assert grows(gpu="T4", dtype="bf16", **fused) > 3
