"""The memory of one update: a ledger around an unchanged `Trainer`, with its phases marked by hooks.

`measure(trainer)` runs the few updates that the Trainer is configured for and says, for the last one, how high each
phase rose and what held the bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lab.errors import LabError
from lab.memory.ledger import (
    Ledger,
    Parts,
    gradients,
    inner_optimizer,
    optimizer_tensors,
    storages_of,
    tensors_in,
    weights,
)

if TYPE_CHECKING:
    from transformers import Trainer


class Watch:
    """What `watch` saw; each figure is of the latest time that the moment came.

    Attributes:
        end_of_forward: when the model's forward returned, its output still alive; None before.
        step_start: when the optimizer's step began, gradients complete; None before, and after `clear`.
    """

    def __init__(self, ledger: Ledger, model: nn.Module, optimizer: Optimizer) -> None:
        self.ledger, self.model, self.optimizer = ledger, model, inner_optimizer(optimizer)
        self._steps = 0  # a step that calls its parent class's fires the hooks twice
        ledger.assign(gradients(model), "gradients")
        self._assign_state()
        self.clear()

    def clear(self) -> None:
        """Start an update: forget the moments and the peaks."""
        self.end_of_forward: Parts | None = None
        self.step_start: Parts | None = None
        self.ledger.reset()

    def _assign_state(self) -> None:
        self.ledger.assign(optimizer_tensors(self.optimizer), "optimizer")
        self.ledger.assign(weights(self.model), "weights")  # last, as the optimizer's parameters are the model's

    def _before_forward(self, model: nn.Module, args: Any, kwargs: Any) -> None:
        if torch.is_grad_enabled():
            self.ledger.logits_width = None
            self.ledger.retire()
            self.ledger.assign((t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)), "inputs")
            self.ledger.enter_phase("forward")

    def _before_head(self, head: nn.Module, *_: Any) -> None:
        if self.ledger.phase == "forward":
            self.ledger.logits_width = head.weight.shape[0]  # type: ignore[index,assignment]

    def _after_forward(self, *_: Any) -> None:
        if torch.is_grad_enabled():
            self.end_of_forward = self.ledger.parts

    def _after_gradient(self, parameter: Tensor) -> None:
        self.ledger.assign([parameter.grad] if parameter.grad is not None else [], "gradients")

    def _before_step(self, *_: Any) -> None:
        self._steps += 1
        if self._steps > 1:
            return
        self.ledger.logits_width = None
        self.ledger.retire()
        self.step_start = self.ledger.parts
        self.ledger.enter_phase("step")

    def _after_step(self, *_: Any) -> None:
        self._steps -= 1
        if self._steps:
            return
        self._assign_state()
        self.ledger.enter_phase("idle")


@contextmanager
def watch(ledger: Ledger, model: nn.Module, optimizer: Optimizer) -> Iterator[Watch]:
    """Mark the phases forward, backward, step and idle in the ledger by hooks, until the block ends.

    Forward lasts from the model's pre-hook to the first operator of the autograd engine, so a loss outside
    the model belongs to it; a pass without gradients belongs to idle, a checkpoint's replay to backward.
    """
    seen = Watch(ledger, model, optimizer)
    find_head: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = find_head()
    with ExitStack() as stack:
        for handle in (
            model.register_forward_pre_hook(seen._before_forward, with_kwargs=True),
            model.register_forward_hook(seen._after_forward),
            seen.optimizer.register_step_pre_hook(seen._before_step),
            seen.optimizer.register_step_post_hook(seen._after_step),
            *([head.register_forward_pre_hook(seen._before_head)] if head is not None else []),
            *(
                p.register_post_accumulate_grad_hook(seen._after_gradient)
                for p in model.parameters()
                if p.requires_grad
            ),
        ):
            stack.callback(handle.remove)
        stack.callback(setattr, ledger, "follows_autograd", ledger.follows_autograd)
        ledger.follows_autograd = True
        yield seen


@dataclass(frozen=True)
class Measurement:
    """Memory of one update, in bytes.

    Attributes:
        peaks: highest live bytes of forward, backward, step and idle.
        parts_at_peak: what they consist of.
        end_of_forward: of the last micro-batch, the model's output still alive.
        step_start: gradients complete, the step not begun.
        steady: after the update, gradients released.
        gradients_between: gradients held after each micro-batch but the last.
        optimizer_state_by_parameter: "shared" is what several parameters use (tables of 8-bit optimizers).
        step_temporary: how far the step rises above what was live when it began.
        parameters: `total` (ties once, 4-bit ones unpacked), `trainable`, `stored` (4-bit ones packed).
        allocator_peaks: on CUDA, allocated and reserved bytes by phase.
        driver_bytes: on CUDA, what the driver says is in use after the update: what torch reserves, the context, and other
            processes on the card.
    """

    peaks: dict[str, int]
    parts_at_peak: dict[str, Parts]
    end_of_forward: Parts
    step_start: Parts
    steady: Parts
    gradients_between: tuple[int, ...]
    optimizer_state_by_parameter: dict[str, int]
    step_temporary: int
    parameters: dict[str, int]
    allocator_peaks: dict[str, tuple[int, int]]
    driver_bytes: int = 0

    @property
    def peak_phase(self) -> str:
        """The phase that rises highest."""
        return max(self.peaks, key=self.peaks.__getitem__)


def parameter_counts(model: nn.Module) -> dict[str, int]:
    """Elements of the distinct parameters; see `Measurement.parameters`."""
    unpacked = {p: getattr(getattr(p, "quant_state", None), "shape", None) or p.shape for p in model.parameters()}
    return {
        "total": sum(shape.numel() for shape in unpacked.values()),
        "trainable": sum(p.numel() for p in unpacked if p.requires_grad),
        "stored": sum(p.numel() for p in unpacked),
    }


def optimizer_state_by_parameter(ledger: Ledger, model: nn.Module, optimizer: Optimizer) -> dict[str, int]:
    """Bytes of optimizer state of each parameter, and under "shared" of what several parameters use."""
    state = inner_optimizer(optimizer).state
    owned = {name: storages_of(tensors_in(state[p])) for name, p in model.named_parameters() if p in state}
    users = Counter(key for storages in owned.values() for key in storages)
    held = {key: entry.size for key, entry in ledger._entries.items() if entry.part == "optimizer"}
    sizes = {name: sum(held.get(key, 0) for key in keys if users[key] == 1) for name, keys in owned.items()}
    shared = sum(held.get(key, 0) for key, count in users.items() if count > 1)
    return sizes | ({"shared": shared} if shared else {})


def by_kind(model: nn.Module, state: Mapping[str, int]) -> dict[str, int]:
    """Trainable parameters, and bytes of their optimizer state, by kind of tensor: `embedding`, `small` or `large`.

    bitsandbytes treats the three differently: its optimizer keeps tensors under 4096 elements in 32 bits, transformers'
    Trainer embeddings.
    """
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    found = dict.fromkeys((name for kind in KINDS for name in (f"parameters_{kind}", f"state_{kind}_bytes")), 0)
    for name, p in model.named_parameters():
        if p.requires_grad:
            kind = "embedding" if p in embeddings else "small" if p.numel() < 4096 else "large"
            found[f"parameters_{kind}"] += p.numel()
            found[f"state_{kind}_bytes"] += state.get(name, 0)
    return found


KINDS = ("large", "small", "embedding")


def figures(
    peaks: Mapping[str, Mapping[str, int]],
    *,
    end_of_forward: Mapping[str, int],
    step_start: Mapping[str, int],
    steady: Mapping[str, int],
    between: int,
    kinds: Mapping[str, int],
) -> dict[str, int]:
    """What a trial records of one update, in bytes, whether it was measured or simulated.

    Args:
        peaks: what each phase's peak consists of, by part.
        between: the most that gradients hold between micro-batches.
        kinds: see `by_kind`.
    """
    highest = {phase: sum(parts.values()) for phase, parts in peaks.items()}
    return {
        "peak_bytes": max(highest.values()),
        **{f"peak_{phase}_bytes": peak for phase, peak in highest.items()},
        **{f"peak_{phase}_{part}_bytes": size for phase, parts in peaks.items() for part, size in parts.items()},
        "activations_bytes": end_of_forward["activations"],
        "logits_bytes": end_of_forward["logits"],
        "gradients_bytes": step_start["gradients"],
        "gradients_between_bytes": between,
        "gradients_after_bytes": steady["gradients"],
        "optimizer_state_bytes": steady["optimizer"],
        "step_temporary_bytes": highest["step"] - sum(step_start.values()),
        "steady_bytes": sum(steady.values()),
        **kinds,
    }


def _in_use() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure(trainer: Trainer, round_to: int | None = None) -> Measurement:
    """Run `trainer.train()` and account for the memory of its last update.

    Args:
        trainer: configured for two updates or more: the optimizer's state exists only from the second on.
        round_to: see `Ledger`; 512 on CUDA and 1 elsewhere unless told.
    Raises:
        LabError: fewer than two updates, or more than one device.
    """
    from transformers import TrainerCallback

    if trainer.args.n_gpu > 1:
        raise LabError(f"measure: {trainer.args.n_gpu} GPUs; the ledger counts one. Set CUDA_VISIBLE_DEVICES=0.")
    device = trainer.args.device.type
    ledger = Ledger(round_to or (512 if device == "cuda" else 1), device)
    updates: list[Measurement] = []

    class Moments(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            ledger.adopt(optimizer_tensors(inner_optimizer(kwargs["optimizer"])))
            self.seen = stack.enter_context(watch(ledger, trainer.model, kwargs["optimizer"]))

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.seen.clear()
            self.gradients_between: list[int] = []

        def on_substep_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.gradients_between.append(ledger.bytes_of(gradients(trainer.model)))

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen = self.seen
            if seen.end_of_forward is None or seen.step_start is None:  # an fp16 overflow skipped the step
                return
            updates.append(
                Measurement(
                    peaks=dict(ledger.peaks),
                    parts_at_peak={phase: Parts(**held) for phase, held in ledger.held_at_peak.items()},
                    end_of_forward=seen.end_of_forward,
                    step_start=seen.step_start,
                    steady=ledger.parts,
                    gradients_between=tuple(self.gradients_between),
                    optimizer_state_by_parameter=optimizer_state_by_parameter(ledger, trainer.model, seen.optimizer),
                    step_temporary=ledger.peaks["step"] - seen.step_start.total,
                    parameters=parameter_counts(trainer.model),
                    allocator_peaks=dict(ledger.allocator_peaks),
                    driver_bytes=_in_use() if device == "cuda" else 0,
                )
            )

    moments = Moments()
    ledger.adopt(weights(trainer.model))
    ledger.adopt(gradients(trainer.model))
    with ExitStack() as stack, ledger:
        trainer.add_callback(moments)
        stack.callback(trainer.remove_callback, moments)
        trainer.train()
    if len(updates) < 2:
        raise LabError(
            f"measure: {len(updates)} complete update(s); it takes 2 before the optimizer's state is there. "
            "Set max_steps to 2 or more."
        )
    return updates[-1]
