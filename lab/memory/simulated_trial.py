"""The trial that simulates memory: what `lab.memory.trial` measures, at any size of model, on tensors without storage."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from transformers import AutoConfig

from lab.memory import measurement, simulation
from lab.memory.architecture import Architecture
from lab.memory.ledger import Parts
from lab.memory.workload import Workload, check, workspace_bytes
from lab.methods import closed_form, method
from lab.models import check_model, shapes
from lab.optimizers import MasterWeightAdamW
from lab.runners import Outcome
from lab.specs import Simulation
from lab.workspace import Workspace

PRECISIONS = {
    "fp32": {"dtype": "fp32"},
    "bf16": {"dtype": "bf16"},
    "fp16": {"dtype": "fp16"},
    "bf16-master": {"dtype": "bf16"},
    "autocast": {"dtype": "fp32", "amp": "bf16"},
}


def simulate_memory(settings: Simulation, workspace: Workspace) -> Outcome:
    """The figures of `measure_memory`, predicted.

    With `updates: 0` the weights are counted and nothing is trained.

    Raises:
        LabError: an unknown model, or settings that contradict each other.
    """
    config = read_config(settings.model, workspace)
    if settings.vocabulary:
        config["vocab_size"] = settings.vocabulary
    tied = Architecture.of(config)
    workload = workload_of(settings, config | ({"tie_word_embeddings": False} if settings.untied else {}))
    how: dict[str, Any] = {"train": bool(settings.updates)}
    if settings.updates:
        check(workload)
    if settings.precision == "bf16-master":
        how["make_optimizer"] = _master_weights
    seen = simulation.rehearse_whole(workload, **how)
    outcome = Outcome(tags={"model": settings.model, "method": settings.method})
    total = tied.parameters() if settings.untied else seen.parameters["total"]
    outcome.figures |= {f"parameters_{name}": count for name, count in seen.parameters.items()}
    outcome.figures |= {"parameters_total": total, "parameters_base": tied.parameters()}
    outcome.figures["parameters_closed_form"] = _closed_form(settings, config)
    outcome.figures["vocabulary"] = config["vocab_size"]
    outcome.figures["weights_bytes"] = seen.steady["weights"]
    if settings.updates:
        workspace_size = Counter(other=workspace_bytes(workload))

        def parts(held: Counter[str]) -> dict[str, int]:
            return vars(Parts(**held + workspace_size))

        outcome.figures |= measurement.figures(
            {phase: parts(held) for phase, held in seen.peaks.items()},
            end_of_forward=parts(seen.end_of_forward),
            step_start=parts(seen.step_start),
            steady=parts(seen.steady),
            between=seen.between["gradients"],
            kinds=seen.kinds,
        )
    return outcome


def read_config(model: str, workspace: Workspace) -> dict[str, Any]:
    """The configuration of a bundled shape, or of a model that is prepared.

    Raises:
        LabError: there is no such model.
    """
    check_model(model)
    path = shapes().get(model, workspace.model(model) / "config.json")
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def workload_of(settings: Simulation, config: dict[str, Any]) -> Workload:
    """The settings of a trial as a workload: the same words, the defaults of `lab.methods`."""
    options = method(settings.method).options.model_validate(settings.method_options).model_dump()
    held_as, _, double = (settings.quantisation or "").partition("-")
    known = {name: value for name, value in options.items() if name in Workload.model_fields}
    return Workload.model_validate(
        {
            "config": config,
            "method": settings.method,
            **known,
            **PRECISIONS[settings.precision],
            **({"amp": "bf16"} if settings.autocast else {}),
            "quantisation": held_as or None,
            "double_quantisation": bool(double) or options.get("double_quantisation", False),
            "preparation": "kbit" if settings.method == "qlora" else None,
            "optimizer": settings.optimizer,
            "step": None if settings.step == "foreach" else settings.step,
            "batch": settings.batch,
            "length": settings.length,
            "accumulation": settings.gradient_accumulation_steps,
            "checkpointing": settings.checkpointing,
            "attention": settings.attention,
            "loss": settings.loss,
            "device": settings.device,
            "gpu": settings.gpu,
        }
    )


def _closed_form(settings: Simulation, config: dict[str, Any]) -> int | None:
    return closed_form(AutoConfig.for_model(**config), settings.method, settings.method_options)


def _master_weights(workload: Workload, model: Any) -> MasterWeightAdamW:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return MasterWeightAdamW(trained, lr=1e-4, weight_decay=0.0, foreach=workload.stepped_by == "foreach")
