"""Which function runs which kind of trial, and what it returns."""

from __future__ import annotations

from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

from lab.specs import AnySettings
from lab.workspace import Workspace

RUNNERS = {
    "training": "lab.training:train",
    "comparison": "lab.training:compare",
    "structure": "lab.structure:examine",
    "timing": "lab.timing:time_updates",
    "speed": "lab.speed:race",
    "in-context": "lab.prompting:answer",
    "adapters": "lab.adapters:serve",
    "half-precision": "lab.half_precision:train_at_rates",
    "loss-scaling": "lab.half_precision:scale_losses",
    "start": "lab.starting:begin",
    "scaling": "lab.scaling:scale",
    "checkpointing": "lab.checkpointing:trade",
    "learning": "lab.optimizer_trial:learn",
    "rlhf": "lab.rlhf:align",
    "tokenizing": "lab.tokenizing:read",
    "hub": "lab.hub:download",
    "datasets": "lab.large_datasets:read_at_scale",
    "memory": "lab.memory.trial:measure_memory",
    "device-memory": "lab.device_memory:measure_on_device",
    "limit": "lab.limits:try_limit",
    "optimizer": "lab.optimizer_trial:try_optimizer",
    "paging": "lab.paging:watch_paging",
    "simulation": "lab.memory.simulated_trial:simulate_memory",
    "prediction": "lab.device_prediction:predict_here",
    "inference": "lab.inference:infer",
    "simulated-inference": "lab.simulated_inference:simulate",
}
"""By kind of trial, `module:function`. What the module imports of `lab` is the code that can change the numbers."""


@dataclass
class Outcome:
    """What a trial found."""

    figures: dict[str, Any] = field(default_factory=dict)
    series: dict[str, list[Any]] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    diverged: str = ""


def module_of(kind: str) -> str:
    """The module that runs the trials of a kind."""
    return RUNNERS[kind].split(":")[0]


def execute(settings: AnySettings, workspace: Workspace) -> Outcome:
    """Run one trial in this process."""
    module, function = RUNNERS[settings.kind].split(":")
    outcome: Outcome = getattr(import_module(module), function)(settings, workspace)
    return outcome
