"""The trial that finds out whether a card of so many GB loads, or trains, a model: until memory runs out, or two updates are done.

A smaller card is a share of the card at hand, by the same mechanism as `lab.device.LIMIT`: torch's allocator refuses to
reserve more than the smaller one would have beside its context. Nothing else is emulated: kernels and their workspaces are
those of the card at hand. On a processor a ledger refuses instead, so that the same path runs without a GPU.
"""

from __future__ import annotations

import contextlib
import tempfile
from typing import Any

import torch

from lab.cards import CONTEXT_BYTES, GIB, usable_bytes
from lab.device import limit_allocator, limit_gib, size_bytes
from lab.device_memory import load, make_trainer
from lab.device_prediction import gpu_here
from lab.memory.ledger import Ledger, inner_optimizer, weights
from lab.memory.simulated_trial import simulate_memory
from lab.runners import Outcome
from lab.specs import Limit, Simulation
from lab.workspace import Workspace

SAME_CARD = 0.01
"""A card at hand that lacks no more of a card's memory than this share is that card: drivers differ by as much."""


def try_limit(settings: Limit, workspace: Workspace) -> Outcome:
    """Whether the model fits on the card, in `fits`; where it does, the allocator's peaks; where not, the phase that it came to,
    in the tag `ran_out_in`: load, forward, backward or step.

    With `updates: 0` the weights are loaded and nothing is trained. A card that is larger than the one at hand cannot be
    emulated: `beyond_device` is 1 and there is no `fits`.

    Raises:
        LabError: an unknown model, or settings that contradict each other.
    """
    gpu = gpu_here(settings.device)
    outcome = Outcome(tags={"model": settings.model, "method": settings.method, **({"gpu": gpu} if gpu else {})})
    foreseen = simulate_memory(_simulation(settings, gpu), workspace).figures
    predicted = foreseen["peak_bytes"] if settings.updates else foreseen["weights_bytes"]
    limit, usable = _room(settings)
    beyond = limit is None
    outcome.figures |= {
        "parameters_base": foreseen["parameters_base"],
        "predicted_bytes": predicted,
        "predicted_fits": int(predicted <= usable),
        "beyond_device": int(beyond),
    }
    if limit is not None:
        peaks, ran_out_in = _find_out(settings, workspace, limit)
        outcome.figures |= {"limit_bytes": limit, "fits": int(not ran_out_in), **peaks}
        outcome.tags |= {"ran_out_in": ran_out_in} if ran_out_in else {}
    return outcome


def _simulation(settings: Limit, gpu: str | None) -> Simulation:
    shared = {name: value for name, value in settings.model_dump().items() if name in Simulation.model_fields}
    return Simulation.model_validate({**shared, "kind": "simulation", "gpu": gpu})


def _room(settings: Limit) -> tuple[int | None, int]:
    """What the allocator may reserve, None if the card at hand has less; and the highest predicted peak that should fit."""
    if settings.device != "cuda":
        room = int(settings.card_gb * GIB)
        return room, room
    total = size_bytes(settings.card_gb)
    here, emulated = torch.cuda.get_device_properties(0).total_memory, limit_gib()
    here = here if emulated is None else min(here, size_bytes(emulated))
    limit = None if here < total * (1 - SAME_CARD) else min(here, total) - CONTEXT_BYTES
    return limit, usable_bytes(total)


def _find_out(settings: Limit, workspace: Workspace, limit: int) -> tuple[dict[str, int], str]:
    """The peaks, or the phase in which memory ran out."""
    card: _Cuda | _Processor = (_Cuda if settings.device == "cuda" else _Processor)(limit)
    reached = ["load"]
    try:
        with contextlib.ExitStack() as stack:
            stack.callback(card.release)
            model, config = load(settings, workspace)
            card.hold(model)
            if settings.updates:
                scratch = stack.enter_context(tempfile.TemporaryDirectory())
                # The Trainer's name for 16-bit products is a precision here: the weights are loaded as they are to be.
                how = settings.model_copy(update={"precision": "autocast"}) if settings.autocast else settings
                trainer = make_trainer(model, config, how, scratch)
                _follow(trainer, reached)
                with card.counting():
                    trainer.train()
            return card.highest(), ""
    except Exception as error:
        if not ran_out(error):
            raise
        return {}, reached[-1]


def ran_out(error: Exception) -> bool:
    """Whether an error says that the device's memory ran out; that of the host is another matter."""
    told = (
        "CUDA out of memory",
        "CUBLAS_STATUS_ALLOC_FAILED",
        "cudaErrorMemoryAllocation",
        "CUDA error: out of memory",
    )
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in told)
    )


def _follow(trainer: Any, reached: list[str]) -> None:
    """Append each phase of an update to `reached` as it begins."""

    def begin(phase: str) -> Any:
        return lambda *_: reached.append(phase)

    trainer.model.register_forward_pre_hook(begin("forward"))
    trainer.model.register_forward_hook(begin("backward"))
    inner_optimizer(trainer.optimizer).register_step_pre_hook(begin("step"))


class _Cuda:
    """The card at hand, of which a part may be reserved."""

    def __init__(self, limit: int) -> None:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limit / total))

    def hold(self, model: Any) -> None:
        """The model is there."""

    def counting(self) -> Any:
        """While this lasts, the model trains."""
        return contextlib.nullcontext()

    def highest(self) -> dict[str, int]:
        """The highest that was allocated, and reserved."""
        return {
            "allocated_bytes": torch.cuda.max_memory_allocated(),
            "reserved_bytes": torch.cuda.max_memory_reserved(),
        }

    def release(self) -> None:
        """The limit is what it is for every trial."""
        torch.cuda.set_per_process_memory_fraction(1.0)
        limit_allocator()


class _Processor(Ledger):
    """A ledger that refuses what goes beyond its limit, as an allocator does."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit, self.most = limit, 0

    def _note_peak(self) -> None:
        super()._note_peak()
        self.most = max(self.most, self.live_bytes)
        if self.live_bytes > self.limit:
            raise torch.OutOfMemoryError(f"{self.live_bytes} bytes are live; {self.limit} is the limit")

    def hold(self, model: Any) -> None:
        self.adopt(weights(model))

    def counting(self) -> Any:
        return self

    def highest(self) -> dict[str, int]:
        return {"allocated_bytes": self.most}

    def release(self) -> None:
        self.limit = 2**63
