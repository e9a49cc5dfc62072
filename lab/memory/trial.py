"""The trial that measures memory: an unchanged Trainer on random tokens under the ledger."""

from __future__ import annotations

import tempfile
from typing import Any

import torch

from lab import data
from lab.memory import ledger, measurement
from lab.methods import apply_method, closed_form, count_parameters, quantisation
from lab.models import load_model
from lab.optimizers import check_optimizer
from lab.runners import Outcome
from lab.specs import Memory
from lab.training import build_trainer
from lab.workspace import Workspace


def measure_memory(settings: Memory, workspace: Workspace) -> Outcome:
    """Train on random tokens under the ledger: bytes by part and by phase, at the last update.

    With `updates: 0` the weights are counted and nothing is trained.
    """
    check_optimizer(settings.optimizer)
    model = load_model(
        settings.model,
        workspace.model(settings.model),
        precision=settings.precision,
        quantisation=settings.quantisation or quantisation(settings.method, settings.method_options),
        attention=settings.attention,
        seed=settings.seed,
        device=settings.device,
    )
    config = model.config
    if not settings.quantisation:  # integer weights cannot be set to train
        model = apply_method(model, settings.method, settings.method_options)
    counts = count_parameters(model)
    if settings.untied:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    outcome = Outcome(tags={"model": settings.model, "method": settings.method})
    outcome.figures |= {f"parameters_{name}": count for name, count in counts.items()}
    outcome.figures["parameters_closed_form"] = closed_form(config, settings.method, settings.method_options)
    outcome.figures["weights_bytes"] = ledger.held_bytes(ledger.weights(model))
    if settings.updates:
        rows = data.random_rows(
            settings.batch * settings.gradient_accumulation_steps * settings.updates,
            settings.length,
            config.vocab_size,
            settings.seed,
        )
        with tempfile.TemporaryDirectory() as scratch:
            trainer = build_trainer(model, rows, data.Collator(0), settings, scratch)
            trainer.create_optimizer()
            for group in trainer.optimizer.param_groups:
                group["foreach"] = settings.step == "foreach"
            outcome.figures |= _memory_figures(measurement.measure(trainer), model)
    return outcome


def _memory_figures(measured: measurement.Measurement, model: Any) -> dict[str, Any]:
    """The measurement as flat figures; optimizer state also by the kind of tensor that it belongs to."""
    forward, step = measured.end_of_forward, measured.step_start
    figures: dict[str, Any] = {
        "peak_bytes": max(measured.peaks.values()),
        **{f"peak_{phase}_bytes": peak for phase, peak in measured.peaks.items()},
        "activations_bytes": forward.activations,
        "logits_bytes": forward.logits,
        "gradients_bytes": step.gradients,
        "gradients_between_bytes": max(measured.gradients_between, default=0),
        "gradients_after_bytes": measured.steady.gradients,
        "optimizer_state_bytes": measured.steady.optimizer,
        "step_temporary_bytes": measured.step_temporary,
        "steady_bytes": measured.steady.total,
    }
    kinds = _parameter_kinds(model)
    for kind in ("large", "small", "embedding"):
        names = [name for name, found in kinds.items() if found == kind]
        figures[f"parameters_{kind}"] = sum(model.get_parameter(name).numel() for name in names)
        figures[f"state_{kind}_bytes"] = sum(measured.optimizer_state_by_parameter.get(name, 0) for name in names)
    return figures


def _parameter_kinds(model: Any) -> dict[str, str]:
    """`embedding`, `small` or `large` for each trainable parameter: bitsandbytes treats the three differently.

    Source:
        bitsandbytes' optimizer keeps tensors under 4096 elements in 32 bits, transformers' Trainer embeddings.
    """
    embeddings = {p for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    return {
        name: "embedding" if p in embeddings else "small" if p.numel() < 4096 else "large"
        for name, p in model.named_parameters()
        if p.requires_grad
    }
