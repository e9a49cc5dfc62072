"""Models of random weights that are made where they are to be, against those that are loaded as everyone loads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lab.errors import LabError
from lab.memory.ledger import Ledger, held_bytes, weights
from lab.models import load_model
from lab.random_models import random_model

pytestmark = pytest.mark.usefixtures("one_thread")


def tensors(model: nn.Module) -> dict[str, tuple[Any, ...]]:
    """Type, shape, precision and whether it is trained, of every parameter and buffer by name."""
    held = [*model.named_parameters(), *model.named_buffers()]
    return {name: (type(t).__name__, tuple(t.shape), t.dtype, t.requires_grad) for name, t in held}


CASES = [(shape, how) for shape in ("llama-6m", "llama-7m-untied") for how in (None, "nf4", "nf4-double")]


@pytest.mark.parametrize(
    ("shape", "quantisation"), [*CASES, ("gpt2", "nf4")]
)  # gpt2 has biases, and linear layers of its own
def test_what_is_made_holds_what_a_loaded_model_holds(shape: str, quantisation: str | None, tmp_path: Path) -> None:
    how: dict[str, Any] = {"precision": "bf16", "quantisation": quantisation, "attention": "eager"}
    made, loaded = random_model(shape, **how), load_model(shape, tmp_path, **how)
    assert tensors(made) == tensors(loaded)
    assert held_bytes(weights(made)) == held_bytes(weights(loaded))
    assert made.config._attn_implementation == loaded.config._attn_implementation
    assert made.training == loaded.training
    assert torch.isfinite(made(input_ids=torch.arange(8)[None]).logits).all()
    again = dict(random_model(shape, **how).named_parameters())
    assert all(torch.equal(parameter, again[name]) for name, parameter in made.named_parameters())
    buffers = dict(loaded.named_buffers())
    assert all(torch.equal(buffer, buffers[name]) for name, buffer in made.named_buffers())


def test_a_model_in_4_bits_exists_in_16_one_layer_at_a_time() -> None:
    with Ledger() as ledger:
        model = random_model("llama-7m-untied", precision="bf16", quantisation="nf4-double")
    final = held_bytes(weights(model))
    whole = held_bytes(weights(random_model("llama-7m-untied", precision="bf16")))
    largest = max(p.numel() for p in model.parameters()) * 2
    assert max(ledger.peaks.values()) < final + 4 * largest
    assert final + largest < whole


def test_a_model_is_made_on_the_device_that_is_named() -> None:
    made = random_model("llama-3.1-70b", precision="bf16", device="meta")
    assert {t.device.type for t in (*made.parameters(), *made.buffers())} == {"meta"}
    assert sum(p.numel() for p in made.parameters()) > 70e9


def test_what_is_no_bundled_shape_is_refused() -> None:
    with pytest.raises(LabError, match=r"unknown model 'llama-6n'. Did you mean 'llama-6m'?"):
        random_model("llama-6n")
