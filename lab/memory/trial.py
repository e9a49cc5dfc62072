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
    outcome.figures["vocabulary"] = config.vocab_size
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
    found = measurement.figures(
        {phase: vars(parts) for phase, parts in measured.parts_at_peak.items()},
        end_of_forward=vars(measured.end_of_forward),
        step_start=vars(measured.step_start),
        steady=vars(measured.steady),
        between=max(measured.gradients_between, default=0),
        kinds=measurement.by_kind(model, measured.optimizer_state_by_parameter),
    )
    if measured.allocator_peaks:  # on CUDA the allocator's word counts
        allocated, reserved = zip(*measured.allocator_peaks.values(), strict=True)
        found |= {"ledger_peak_bytes": found["peak_bytes"], "peak_bytes": max(allocated)}
        found |= {"reserved_bytes": max(reserved), "driver_bytes": measured.driver_bytes}
    return found
