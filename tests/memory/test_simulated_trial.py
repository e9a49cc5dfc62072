"""The simulated trial against the measured one: the same figures, to the byte where only tensors decide."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lab.errors import LabError
from lab.memory.simulated_trial import read_config, simulate_memory, workload_of
from lab.memory.trial import measure_memory
from lab.models import shapes
from lab.specs import Memory, Simulation
from lab.workspace import Workspace

SCALARS = 64
"""Bytes of the Trainer's own numbers (its running loss, say), which the simulation does not know; 8 to 20 were seen."""

SETUPS: list[dict[str, Any]] = [
    {},
    {"precision": "bf16-master"},
    {"precision": "autocast", "checkpointing": True},
    {"optimizer": "adamw_bnb_8bit"},
    {"method": "lora", "precision": "bf16", "step": "for-loop"},
    {"method": "qlora", "method_options": {"double_quantisation": True}, "precision": "bf16"},
    {"method": "ptuning", "attention": "eager"},
    {"gradient_accumulation_steps": 2, "optimizer": "adamw_torch_fused", "step": "fused"},
]

SAME = [
    "parameters_total",
    "parameters_base",
    "parameters_trainable",
    "parameters_stored",
    "parameters_closed_form",
    "weights_bytes",
    "gradients_bytes",
    "gradients_between_bytes",
    "gradients_after_bytes",
    "optimizer_state_bytes",
    "logits_bytes",
    *(f"{figure}_{kind}" for figure in ("parameters",) for kind in ("large", "small", "embedding")),
    *(f"state_{kind}_bytes" for kind in ("large", "small", "embedding")),
]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, "cpu")


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_the_simulated_figures_are_those_that_a_training_shows(setup: dict[str, Any], workspace: Workspace) -> None:
    setup = {"model": "llama-6m", "batch": 2, "length": 32, **setup}
    measured = measure_memory(Memory(**setup), workspace).figures
    simulated = simulate_memory(Simulation(**setup), workspace).figures
    assert {name: simulated.get(name) for name in SAME} == {name: measured.get(name) for name in SAME}
    # The Trainer takes the next batch before the step, and all of an update's at its beginning: ids and labels, 8 bytes each.
    ahead = 2 * 8 * setup["batch"] * setup["length"] * setup.get("gradient_accumulation_steps", 1)
    for phase in ("forward", "backward", "step"):
        missing = measured[f"peak_{phase}_bytes"] - simulated[f"peak_{phase}_bytes"]
        assert -ahead <= missing <= ahead + SCALARS
    assert 0 <= measured["peak_bytes"] - simulated["peak_bytes"] <= ahead + SCALARS
    assert simulated["step_temporary_bytes"] == pytest.approx(measured["step_temporary_bytes"], abs=ahead)


@pytest.mark.parametrize("quantisation", ["int8", "nf4", "nf4-double"])
def test_a_quantised_model_is_counted_without_training_it(quantisation: str, workspace: Workspace) -> None:
    setup: dict[str, Any] = {
        "model": "llama-7m-untied",
        "precision": "bf16",
        "quantisation": quantisation,
        "updates": 0,
    }
    measured = measure_memory(Memory(**setup), workspace).figures
    simulated = simulate_memory(Simulation(**setup), workspace).figures
    assert simulated["weights_bytes"] == measured["weights_bytes"]
    assert simulated["parameters_total"] == measured["parameters_total"]


def test_an_untied_head_is_held_beside_the_parameters_of_a_tied_one(workspace: Workspace) -> None:
    tied, untied = (
        simulate_memory(Simulation(model="llama-3.2-1b", updates=0, untied=fault), workspace).figures
        for fault in (False, True)
    )
    assert untied["parameters_total"] == tied["parameters_total"] == pytest.approx(1.236e9, rel=1e-3)
    assert untied["weights_bytes"] - tied["weights_bytes"] == 4 * 128256 * 2048


def test_70_billion_parameters_are_simulated_like_one(workspace: Workspace) -> None:
    figures = simulate_memory(Simulation(model="llama-3.1-70b", precision="bf16", device="cuda"), workspace).figures
    assert figures["weights_bytes"] / figures["parameters_total"] == pytest.approx(2, rel=1e-3)
    assert figures["optimizer_state_bytes"] / figures["parameters_total"] == pytest.approx(4, rel=1e-3)
    parts = sum(value for name, value in figures.items() if name.startswith("peak_step_") and name != "peak_step_bytes")
    assert parts == figures["peak_step_bytes"] == figures["peak_bytes"]


def test_the_options_of_a_method_reach_the_workload() -> None:
    settings = Simulation(
        model="llama-6m", method="lora", method_options={"rank": 3, "targets": ["q_proj"]}, precision="autocast"
    )
    workload = workload_of(settings, {"model_type": "llama"})
    assert (workload.rank, workload.targets, workload.dtype, workload.amp) == (3, ("q_proj",), "fp32", "bf16")


def test_every_field_of_the_settings_that_moves_bytes_reaches_the_workload(workspace: Workspace) -> None:
    base = Simulation(model="llama-6m", method="lora", batch=2, length=64, device="cuda", precision="bf16")
    before = simulate_memory(base, workspace).figures["peak_bytes"]
    for change in (
        {"batch": 3},
        {"length": 80},
        {"checkpointing": True},
        {"attention": "eager"},
        {"loss": "chunked"},
        {"autocast": True},
        {"vocabulary": 4096},
        {"gpu": "H100-80GB"},
        {"quantisation": "nf4"},
        {"device": "cpu"},
    ):
        assert simulate_memory(base.model_copy(update=change), workspace).figures["peak_bytes"] != before, change


def test_an_unknown_model_is_one_line(workspace: Workspace) -> None:
    with pytest.raises(LabError, match=r"^unknown model 'llama-3-8b'\. Did you mean"):
        read_config("llama-3-8b", workspace)
    assert read_config("llama-6m", workspace)["model_type"] == "llama"
    assert "llama-6m" in shapes()
