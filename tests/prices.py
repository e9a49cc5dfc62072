"""A small model, and a price by plain arithmetic in the place of the engines': for tests of what is made of prices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lab.errors import LabError
from lab.memory.architecture import Architecture
from lab.memory.workload import BYTES, PARTS, Prediction, Workload, check

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}


def arithmetic(workload: Workload, quick: bool = False) -> Prediction:
    """A price in the place of the engines': the rules of thumb, in which every remedy does what its name says."""
    check(workload)
    w, shape = workload, Architecture.of(workload.config)
    full = w.method == "full"
    trained = shape.parameters() if full else shape.parameters() // 100
    weights = shape.parameters() * (0.6 if w.held_as == "nf4" else BYTES[w.dtype])
    width = BYTES[w.dtype] if full else 4
    state = 0 if w.optimizer.startswith("paged") else 2 if "8bit" in w.optimizer else 2 * width
    tokens = w.batch * w.length
    held = tokens * shape.hidden * shape.layers * (2 if w.checkpointing else 34)
    held += w.batch * w.length**2 * shape.heads * (6 if w.attention == "eager" else 0)
    logits = tokens * shape.vocabulary * (0.1 if w.loss == "chunked" else 6)
    fixed = {"weights": weights, "optimizer": trained * state}
    parts = {
        "forward": {**fixed, "activations": held, "logits": logits},
        "backward": {**fixed, "activations": held, "logits": logits, "gradients": trained * width * 0.5},
        "step": {
            **fixed,
            "gradients": trained * width,
            "temporaries": trained * width if w.optimizer == "adamw_torch" else 0,
        },
    }
    phases = {phase: int(sum(sizes.values())) for phase, sizes in parts.items()}
    peak = max(phases, key=phases.__getitem__)
    return Prediction(
        peak_bytes=phases[peak],
        steady_bytes=int(sum(fixed.values())),
        parts={name: int(parts[peak].get(name, 0)) for name in PARTS},
        phases=phases,
        parameters={"total": shape.parameters(), "trainable": trained, "stored": trained},
    )


def mistake(call: Callable[[], Any]) -> str:
    """The one line of the error that a call raises."""
    with pytest.raises(LabError) as caught:
        call()
    (line,) = str(caught.value).splitlines()
    return line
