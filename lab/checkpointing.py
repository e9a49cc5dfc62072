"""The trial that holds gradient checkpointing against none: equal gradients, bytes kept, operations and time."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import flop_counter
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from lab.errors import LabError
from lab.memory.ledger import Ledger, weights
from lab.methods import apply_method, quantisation
from lab.models import DTYPES, check_model, shapes
from lab.runners import Outcome
from lab.specs import Checkpointing
from lab.timing import _formulas
from lab.workspace import Workspace

WITHOUT = "without"
WITH = "non_reentrant"
WAYS: dict[str, dict[str, bool] | None] = {
    WITHOUT: None,
    WITH: {"use_reentrant": False},
    "reentrant": {"use_reentrant": True},
    "unpreserved": {"use_reentrant": False, "preserve_rng_state": False},
}
"""Options of `torch.utils.checkpoint.checkpoint`. The Trainer takes the second; the last is a planted fault."""


def trade(settings: Checkpointing, workspace: Workspace) -> Outcome:
    """Run one batch forward and backward in each of WAYS, then time the first two of them in turn, in one process.

    Every pass begins with the same random state, so that dropout drops the same. What starts at zero (LoRA's B) is given
    small numbers first: as long as it is zero, A has no gradient that could differ.

    Figures:
        difference_<way>: the largest difference between a gradient's elements with checkpointing and without, over the
            largest element without: over all trained parameters; 0 is equal to the bit.
        without_flops, with_flops: of forward and backward, as `lab.timing` counts them.
        without_kept_bytes, with_kept_bytes: what a forward pass made and is alive when it returns, the loss held.
        hidden_bytes: of one hidden state `(batch, tokens, hidden size)`: what a checkpoint has to keep of a layer.
        layers: how many the model has.
    With `rounds`, also `without_seconds` and `with_seconds`, medians of forward and backward, and `ratio`: the median over
    the rounds of with over without. The one that begins changes from round to round. Series: the seconds.

    Raises:
        LabError: the model is no bundled shape, or is to be quantised.
    """
    model = _build(settings)
    batch = _batch(settings, model)
    outcome = Outcome(tags={"model": settings.model, "method": settings.method})
    reference = _Pass.of(model, batch, WAYS[WITHOUT], settings.seed)
    outcome.figures |= {"without_flops": reference.flops, "without_kept_bytes": reference.kept_bytes}
    for way, options in WAYS.items():
        if way == WITHOUT:
            continue
        found = _Pass.of(model, batch, options, settings.seed)
        outcome.figures[f"difference_{way}"] = _difference(reference.gradients, found.gradients)
        if way == WITH:
            outcome.figures |= {"with_flops": found.flops, "with_kept_bytes": found.kept_bytes}
    config = model.config
    element = next(model.parameters()).element_size()
    outcome.figures["hidden_bytes"] = settings.batch * settings.length * config.hidden_size * element
    outcome.figures["layers"] = config.num_hidden_layers
    if settings.rounds:
        _time(settings, model, batch, outcome)
    return outcome


def _build(settings: Checkpointing) -> Any:
    """The shape with random weights and the method on it, ready to train."""
    bundled = shapes()
    if settings.model not in bundled:
        check_model(settings.model)
        raise LabError(
            f"checkpointing: model '{settings.model}' is prepared, and its depth and dropout cannot be chosen. "
            "Choose a bundled shape: lab fit --list models"
        )
    held = settings.quantisation or quantisation(settings.method, settings.method_options)
    if held:
        raise LabError(f"checkpointing: a base in {held} is not built here. Choose method full or lora, unquantised.")
    config = json.loads(bundled[settings.model].read_text(encoding="utf-8"))
    config |= {"attention_dropout": settings.attention_dropout, "use_cache": False}
    if settings.layers:
        config["num_hidden_layers"] = settings.layers
    set_seed(settings.seed)
    dtype = getattr(torch, DTYPES[settings.precision])
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype, attn_implementation="sdpa")
    model = apply_method(model.to(settings.device), settings.method, settings.method_options)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model.train()


def _batch(settings: Checkpointing, model: Any) -> dict[str, Tensor]:
    """Random tokens, `(batch, tokens)`, which the model is to say again."""
    generator = torch.Generator().manual_seed(settings.seed)
    tokens = torch.randint(model.config.vocab_size, (settings.batch, settings.length), generator=generator)
    tokens = tokens.to(settings.device)
    return {"input_ids": tokens, "labels": tokens}


@contextmanager
def checkpointed(model: Any, options: Mapping[str, bool] | None) -> Iterator[None]:
    """Every layer of the model is a checkpoint until the block ends; None: no layer is.

    A reentrant checkpoint gives gradients only where its input asks for one: transformers makes the embedding's output ask,
    also where the embedding is frozen, and leaves it asking; here that ends too, as it would cost passes without checkpoints.

    Args:
        options: see WAYS.
    """
    if options is None:
        yield
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # The second names are those of transformers before 5.20, and aliases since.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    disable = getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable
    enable(dict(options))
    try:
        yield
    finally:
        disable()
        base.disable_input_require_grads()


@dataclass(frozen=True)
class _Pass:
    """What one forward and backward pass left: gradients of what is trained, operations, bytes kept in between."""

    gradients: list[Tensor]
    flops: int
    kept_bytes: int

    @classmethod
    def of(cls, model: Any, batch: Mapping[str, Tensor], options: Mapping[str, bool] | None, seed: int) -> _Pass:
        """Run it, from the random state of `seed`."""
        set_seed(seed)
        ledger = Ledger()
        ledger.assign(weights(model), "weights")
        ledger.assign(batch.values(), "inputs")
        counter = flop_counter.FlopCounterMode(display=False, custom_mapping=_formulas())
        with checkpointed(model, options), counter:
            with ledger:
                ledger.enter_phase("forward")
                loss = model(**batch).loss
                kept = ledger.parts.activations
            loss.backward()
        trained = [p for p in model.parameters() if p.requires_grad]
        # A parameter that the loss does not reach has no gradient, which counts as zeros.
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in trained]
        model.zero_grad()
        return cls(gradients, int(counter.get_total_flops()), kept)


def _difference(reference: list[Tensor], found: list[Tensor]) -> float:
    """The largest difference of an element, over the largest element of the reference."""
    gap = max(float((a.double() - b.double()).abs().max()) for a, b in zip(reference, found, strict=True))
    return gap / max(float(a.abs().max()) for a in reference)


def _time(settings: Checkpointing, model: Any, batch: Mapping[str, Tensor], outcome: Outcome) -> None:
    """Forward and backward without and with checkpointing, in turn. The passes before have warmed both up."""
    sides = {"without": WAYS[WITHOUT], "with": WAYS[WITH]}
    seconds: dict[str, list[float]] = {side: [] for side in sides}
    for place in range(settings.rounds):
        for side in sides if place % 2 == 0 else reversed(sides):
            with checkpointed(model, sides[side]):
                seconds[side].append(_seconds(settings, model, batch))
    for side, found in seconds.items():
        outcome.series[f"{side}_seconds"] = found
        outcome.figures[f"{side}_seconds"] = statistics.median(found)
    pairs = zip(seconds["with"], seconds["without"], strict=True)
    outcome.figures["ratio"] = statistics.median(second / first for second, first in pairs)


def _seconds(settings: Checkpointing, model: Any, batch: Mapping[str, Tensor]) -> float:
    """The time of one forward and backward pass; gradients are released outside."""
    wait = torch.cuda.synchronize if settings.device == "cuda" else lambda: None
    wait()
    started = time.perf_counter()
    model(**batch).loss.backward()
    wait()
    took = time.perf_counter() - started
    model.zero_grad()
    return took
