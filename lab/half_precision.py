"""Half precision in training: what 16 bits do to matrix products, to gradients and to small updates of weights.

The loop is the plain one of torch's documentation, so that each of its parts (autocast, loss scale, rounding of the update)
can be had or left out; batches come in the Trainer's order.
"""

from __future__ import annotations

import itertools
import math
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import set_seed

from lab import data, evaluation
from lab.errors import LabError
from lab.optimizers import MasterWeightAdamW
from lab.runners import Outcome
from lab.specs import HalfPrecision, LossScaling
from lab.training import FineTuning, build_trainer
from lab.workspace import Workspace

HALF = {"bf16": torch.bfloat16, "fp16": torch.float16}

LARGEST_NORM = 1.0
"""To which gradients are clipped, as by the Trainer."""


# Trials ---------------------------------------------------------------------------------------------------------


def train_at_rates(settings: HalfPrecision, workspace: Workspace) -> Outcome:
    """Train at each learning rate from the same weights on the same batches, and score the test split.

    Figures:
        base_test_loss: nats per answer token before training, of the weights as they are held.
    Series, one value for each learning rate:
        learning_rate: those of the settings.
        test_loss: nats per answer token after the updates; none where the training broke.
        broke: the first update whose loss, or a weight after it, was not finite; 0 where none was.
        changed: share of the trained elements that an update changes as the model holds them, the mean over the updates.
        moved: share of them that differ from the start in the end.
        skipped: updates that were left out because a gradient had overflowed (with loss scaling).
        scale: the loss scale at the end (1 without).

    Raises:
        LabError: as `FineTuning`; loss scaling or stochastic rounding where there is nothing for it to work on.
    """
    if settings.loss_scaling and settings.precision != "autocast":
        raise LabError(
            f"half-precision: loss_scaling with precision {settings.precision}; torch scales back fp32 gradients alone. "
            "Set precision to autocast."
        )
    if settings.stochastic_rounding and settings.precision != "bf16":
        raise LabError(
            f"half-precision: stochastic_rounding with precision {settings.precision}; it rounds bf16 weights. "
            "Set precision to bf16."
        )
    run = FineTuning(settings, workspace)
    batches = first_batches(run, settings.updates)
    start = [p.detach().clone() for p in run.trained()]
    examples = data.load_task(workspace.data, settings.task, "test")[: settings.questions]
    rows = evaluation.example_rows(run.tokenizer, examples)
    outcome = Outcome(tags={"model": settings.model, "task": settings.task, "data_order": run.data_order()})
    with products(settings.device, settings.precision != "fp32"):
        outcome.figures["base_test_loss"] = evaluation.mean_nats(evaluation.score(run.model, rows))
    for rate in settings.learning_rates:
        with torch.no_grad():
            for weight, value in zip(run.trained(), start, strict=True):
                weight.copy_(value)
        found = train(run, batches, settings, rate)
        with products(settings.device, settings.precision != "fp32"):
            test_loss = math.nan if found.broke else evaluation.mean_nats(evaluation.score(run.model, rows))
        ended = {
            "learning_rate": rate,
            "test_loss": test_loss,
            "broke": found.broke,
            "changed": sum(found.changed) / len(found.changed),
            "moved": differing(run.trained(), start),
            "skipped": found.skipped,
            "scale": found.scale,
        }
        for name, figure in ended.items():
            outcome.series.setdefault(name, []).append(figure)
    return outcome


def scale_losses(settings: LossScaling, workspace: Workspace) -> Outcome:
    """The gradients of the first batch in fp32, and under fp16 autocast with the loss scaled by each power of two.

    Twice: of the base (`base_`), and after the settings' updates in fp32 on the batches that follow (`tuned_`).

    Figures, for each:
        <when>_loss: of the batch, nats per answer token.
        <when>_bf16_lost, <when>_bf16_error: as below, under bf16 autocast without a scale.
    Series, one value for each of `exponent`:
        <when>_lost: share of the elements that are zero and are not in fp32: too small for fp16.
        <when>_overflowed: 1 where an element is infinite or no number, else 0.
        <when>_error: |gradient - fp32's| / |fp32's| over all elements; none where one overflowed.
    """
    run = FineTuning(settings, workspace)
    probe, *batches = first_batches(run, settings.updates + 1)
    outcome = Outcome(tags={"model": settings.model, "task": settings.task})
    outcome.series["exponent"] = list(settings.exponents)
    for when in ("base", "tuned"):
        if when == "tuned":
            plain = HalfPrecision(**settings.model_dump(exclude={"kind", "exponents"}), learning_rates=(1.0,))
            found = train(run, batches, plain, settings.learning_rate)
            if found.broke:
                outcome.diverged = f"the loss or a weight is not finite after update {found.broke}"
                return outcome
        loss, reference = gradients(run, probe, None, 1.0)
        outcome.figures[f"{when}_loss"] = loss
        _, bf16 = gradients(run, probe, torch.bfloat16, 1.0)
        outcome.figures[f"{when}_bf16_lost"] = lost(bf16, reference)
        outcome.figures[f"{when}_bf16_error"] = error(bf16, reference)
        for exponent in settings.exponents:
            _, scaled = gradients(run, probe, torch.float16, 2.0**exponent)
            overflowed = not all(bool(g.isfinite().all()) for g in scaled)
            values = {"lost": lost(scaled, reference), "overflowed": float(overflowed)}
            values["error"] = math.nan if overflowed else error(scaled, reference)
            for name, value in values.items():
                outcome.series.setdefault(f"{when}_{name}", []).append(value)
    return outcome


# Training -------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """What became of a training: see `train_at_rates`."""

    losses: list[float] = field(default_factory=list)
    changed: list[float] = field(default_factory=list)
    broke: int = 0
    skipped: int = 0
    scale: float = 1.0


def first_batches(run: FineTuning, count: int) -> list[dict[str, Tensor]]:
    """The first batches of the Trainer's order, on the model's device; the training split over again where it ends."""
    with tempfile.TemporaryDirectory() as scratch:
        loader = build_trainer(run.model, run.rows, run.collator, run.settings, scratch).get_train_dataloader()
    epochs = itertools.chain.from_iterable(itertools.repeat(loader))
    device = run.model.get_input_embeddings().weight.device
    return [{name: tensor.to(device) for name, tensor in batch.items()} for batch in itertools.islice(epochs, count)]


def train(run: FineTuning, batches: list[dict[str, Tensor]], settings: HalfPrecision, learning_rate: float) -> Run:
    """One update for each batch, at a constant rate; it ends where a loss or a weight is not finite."""
    set_seed(settings.seed)
    model, weights, found = run.model.train(), run.trained(), Run()
    optimizer = _optimizer(weights, settings, learning_rate)
    scaler = torch.amp.GradScaler(settings.device, enabled=settings.loss_scaling)
    half = HALF[settings.half] if settings.precision == "autocast" else None
    for update, batch in enumerate(batches, start=1):
        before, scale = [p.detach().clone() for p in weights], scaler.get_scale()
        with products(settings.device, settings.precision != "fp32"):
            with autocast(settings.device, half):
                loss = model(**batch).loss
            scaler.scale(loss).backward()
        found.losses.append(float(loss.detach()))
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(weights, LARGEST_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        model.zero_grad()
        found.skipped += scaler.get_scale() < scale
        found.changed.append(differing(weights, before))
        finite = math.isfinite(found.losses[-1]) and all(bool(p.isfinite().all()) for p in weights)
        if not finite:
            found.broke = update
            break
    found.scale = scaler.get_scale()
    return found


def _optimizer(weights: list[Tensor], settings: HalfPrecision, learning_rate: float) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": learning_rate, "weight_decay": 0.0}
    if settings.precision == "bf16-master":
        return MasterWeightAdamW(weights, **options)
    if settings.stochastic_rounding:
        generator = torch.Generator(settings.device).manual_seed(settings.seed)
        return RoundingAdamW(weights, rounding=lambda values: stochastic_bf16(values, generator), **options)
    return torch.optim.AdamW(weights, **options)


def differing(found: list[Tensor], expected: list[Tensor]) -> float:
    """The share of elements that differ."""
    unequal = sum(int((a != b).sum()) for a, b in zip(found, expected, strict=True))
    return unequal / sum(a.numel() for a in found)


# Rounding -------------------------------------------------------------------------------------------------------


def stochastic_bf16(values: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """fp32 values in bf16, each rounded to one of its two neighbours so that its expectation is the value itself.

    bf16 is fp32 without its low 16 bits: those bits plus 16 random ones carry with just the probability that is wanted.
    Values that are not finite stay as they are.

    Source:
        Gupta et al. 2015, section 3; Zamirai et al. 2020 (bf16 training with stochastic rounding).
    """
    noise = torch.randint(0, 2**16, values.shape, dtype=torch.int32, device=values.device, generator=generator)
    carried = ((values.view(torch.int32) + noise) & -(2**16)).view(torch.float32)
    return torch.where(values.isfinite(), carried, values).bfloat16()


class RoundingAdamW(torch.optim.AdamW):
    """AdamW on bf16 weights whose update is computed in fp32 and then rounded by `rounding`; no fp32 copy is kept.

    The moments are held in bf16, rounded to nearest, as torch's AdamW holds them: of what lasts, only the rounding of the
    weights is another. 4 bytes of state per parameter. No weight decay.
    """

    def __init__(self, params: Any, rounding: Callable[[Tensor], Tensor], **options: Any):
        super().__init__(params, **options)
        self.rounding = rounding

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update."""
        loss = closure() if closure else None
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None:
                    self._update(weight, self.state[weight], group)
        return loss

    def _update(self, weight: Tensor, state: dict[str, Any], group: dict[str, Any]) -> None:
        if not state:
            state |= {"step": 0, "exp_avg": torch.zeros_like(weight), "exp_avg_sq": torch.zeros_like(weight)}
        state["step"] += 1
        (beta1, beta2), gradient = group["betas"], weight.grad.float()  # type: ignore[union-attr]
        first = state["exp_avg"].float().lerp_(gradient, 1 - beta1)
        second = state["exp_avg_sq"].float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = group["lr"] / (1 - beta1 ** state["step"])
        spread = (second / (1 - beta2 ** state["step"])).sqrt_().add_(group["eps"])
        weight.copy_(self.rounding(weight.float().addcdiv_(first, spread, value=-size)))
        state["exp_avg"].copy_(first)
        state["exp_avg_sq"].copy_(second)


# Gradients ------------------------------------------------------------------------------------------------------


def gradients(
    run: FineTuning, batch: dict[str, Tensor], half: torch.dtype | None, scale: float
) -> tuple[float, list[Tensor]]:
    """The loss of a batch, and the gradient of the scaled loss divided by the scale, for each trained tensor (fp32)."""
    run.model.train().zero_grad()
    device = run.settings.device
    with products(device, half is not None):
        with autocast(device, half):
            loss = run.model(**batch).loss
        (loss * scale).backward()
    found = [p.grad / scale if p.grad is not None else torch.zeros_like(p) for p in run.trained()]
    run.model.zero_grad()
    return float(loss.detach()), found


def lost(found: list[Tensor], reference: list[Tensor]) -> float:
    """The share of the elements that are not zero in the reference and are here."""
    both = list(zip(found, reference, strict=True))
    nonzero = sum(int((r != 0).sum()) for _, r in both)
    return sum(int(((f == 0) & (r != 0)).sum()) for f, r in both) / nonzero


def error(found: list[Tensor], reference: list[Tensor]) -> float:
    """|found - reference| / |reference| over all elements."""

    def squares(tensors: Iterator[Tensor]) -> float:
        return math.fsum(float(t.double().square().sum()) for t in tensors)

    gaps = (f - r for f, r in zip(found, reference, strict=True))
    return math.sqrt(squares(gaps) / squares(iter(reference)))


# Arithmetic -----------------------------------------------------------------------------------------------------


def autocast(device: str, half: torch.dtype | None) -> AbstractContextManager[Any]:
    """torch's autocast to a type; None: none."""
    return torch.autocast(device, dtype=half) if half else nullcontext()


def products(device: str, sixteen_bit: bool) -> AbstractContextManager[Any]:
    """`WideProducts` on a processor, where there are any of 16 bits; a GPU multiplies so by itself."""
    return WideProducts() if sixteen_bit and device == "cpu" else nullcontext()


class WideProducts(TorchDispatchMode):
    """Matrix products of 16-bit tensors as a GPU makes them: multiplied and added up in fp32, rounded once at the end.

    By torch's own kernels a processor without 16-bit instructions took 6 to 8 times as long for an update of `tiny` as in
    fp32 (torch 2.13).
    """

    WIDENED = (torch.ops.aten.mm.default, torch.ops.aten.bmm.default, torch.ops.aten.addmm.default)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in self.WIDENED or args[0].dtype not in HALF.values():
            return func(*args, **kwargs)
        return func(*(a.float() if isinstance(a, Tensor) else a for a in args), **kwargs).to(args[0].dtype)
