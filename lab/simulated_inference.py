"""The trial that simulates inference: the bytes of `lab.inference`, at any size of model, on tensors without storage."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig

from lab.errors import LabError
from lab.inference import formulas, measure
from lab.memory import kernels, simulation
from lab.memory.architecture import Architecture
from lab.memory.shadows import ShadowMode
from lab.memory.simulated_trial import read_config, workload_of
from lab.memory.workload import check_length
from lab.models import DTYPES
from lab.runners import Outcome
from lab.specs import SimulatedInference
from lab.workspace import Workspace


def simulate(settings: SimulatedInference, workspace: Workspace) -> Outcome:
    """The bytes that `lab.inference.infer` records of `base` and, with a quantisation, of `quantised`.

    Raises:
        LabError: an unknown model, a method, or more tokens than the model has positions.
    """
    if settings.method != "full":
        raise LabError(
            f"simulated inference: method is {settings.method}; only bases are covered. Choose full, or measure it."
        )
    config = read_config(settings.model, workspace)
    check_length(Architecture.of(config), settings.length + settings.tokens)
    outcome = Outcome(tags={"model": settings.model, "method": settings.method})
    ways = {"base": settings.model_copy(update={"quantisation": None})}
    if settings.quantisation:
        ways["quantised"] = settings
    for way, held in ways.items():
        outcome.figures |= {f"{way}_{name}": value for name, value in _bytes_of(held, config).items()}
    dtype = getattr(torch, DTYPES[settings.precision])
    tokens = settings.length + settings.tokens
    outcome.figures |= formulas(AutoConfig.for_model(**config), settings.batch, tokens, dtype.itemsize)
    return outcome


def _bytes_of(settings: SimulatedInference, config: dict[str, Any]) -> dict[str, int]:
    """One forward pass over the prompt and one for each token, on shadows, with the kernels of the device."""
    workload = workload_of(settings, config)
    model: Any = simulation.build(workload, config).eval()
    with kernels.emulated(workload), ShadowMode(settings.device):
        simulation.materialise(model, workload)
        for layer in model.modules():
            if hasattr(layer, "support_avx512bf16_for_cpu"):
                layer.support_avx512bf16_for_cpu = False  # see lab.models: a processor would pack anew, no card does
        prompts = torch.zeros(settings.batch, settings.length, dtype=torch.long)
        return measure(model, AutoConfig.for_model(**config), prompts, settings.tokens, kernels.make_ledger(workload))
