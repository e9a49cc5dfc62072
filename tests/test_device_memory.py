"""What a device's trial measures is what the trial on a processor does, and what is predicted for the card at hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lab.device_prediction import gpu_here, gpu_like
from lab.errors import LabError
from lab.runners import execute
from lab.specs import DeviceMemory, Memory, Prediction, Simulation, memory_spec
from lab.workspace import Workspace
from tests.conftest import cuda_found

pytestmark = pytest.mark.usefixtures("one_thread")

GIB = 2**30


@pytest.mark.parametrize(
    "setup",
    [
        {},
        {"precision": "bf16-master", "step": "for-loop"},
        {"method": "lora", "precision": "bf16", "checkpointing": True},
        {"method": "qlora", "method_options": {"double_quantisation": True}, "precision": "bf16"},
        {"method": "prefix", "precision": "autocast", "gradient_accumulation_steps": 2},
        {"optimizer": "adamw_bnb_8bit", "untied": True},
        {"quantisation": "int8", "precision": "bf16", "updates": 0},
        {"quantisation": "nf4", "precision": "bf16", "updates": 0},
    ],
    ids=str,
)
def test_the_figures_are_those_of_the_trial_on_a_processor(setup: dict[str, Any], tmp_path: Path) -> None:
    workspace = Workspace(tmp_path, "cpu")
    setup = {"model": "llama-6m", "batch": 2, "length": 32, **setup}
    assert execute(DeviceMemory(**setup), workspace) == execute(Memory(**setup), workspace)


def test_memory_is_measured_by_the_device_s_trial_on_a_device_and_by_the_usual_one_elsewhere() -> None:
    def kind(device: Any, sim: bool = False) -> str:
        return memory_spec("peak", "arm", "name", device, sim, model="llama-6m").settings.kind

    assert (kind("cuda"), kind("cpu"), kind("cuda", sim=True)) == ("device-memory", "memory", "simulation")


@pytest.mark.gpu
def test_on_a_device_the_allocator_tells_of_every_phase_and_no_less_than_the_ledger(tmp_path: Path) -> None:
    settings = DeviceMemory(model="smollm2-135m", precision="bf16", batch=2, length=256, device="cuda")
    figures = execute(settings, Workspace(tmp_path, "gpu")).figures
    for phase in ("forward", "backward", "step"):
        assert (
            figures[f"peak_{phase}_bytes"] <= figures[f"allocated_{phase}_bytes"] <= figures[f"reserved_{phase}_bytes"]
        )
    assert figures["driver_before_bytes"] < figures["driver_bytes"], f"on {cuda_found()}"


# The card at hand ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "major", "gib", "found"),
    [
        ("NVIDIA H100 80GB HBM3", 9, 79.1, "H100-80GB"),
        ("NVIDIA H100 PCIe", 9, 79.2, "H100-80GB"),
        ("NVIDIA H100 NVL", 9, 93.1, "H100-NVL-94GB"),
        ("NVIDIA H200", 9, 139.8, "H200-141GB"),
        ("NVIDIA GeForce RTX 4090", 8, 23.5, "RTX-4090"),
        ("NVIDIA A100-SXM4-80GB", 8, 79.3, "A100-80GB"),
        ("NVIDIA GeForce RTX 5070 Ti", 12, 15.5, "RTX-5090"),
        ("NVIDIA GeForce RTX 3080", 8, 9.6, "RTX-3060"),
        ("NVIDIA GH200 480GB", 9, 95.0, "H100-NVL-94GB"),
    ],
)
def test_a_card_is_found_by_its_name_or_by_its_family_and_memory(name: str, major: int, gib: float, found: str) -> None:
    assert gpu_like(name, major, int(gib * GIB)) == found


def test_a_card_of_an_unknown_family_is_refused_by_name() -> None:
    with pytest.raises(LabError, match="unknown gpu 'Tesla K80'"):
        gpu_like("Tesla K80", 3, 12 * GIB)


def test_a_prediction_is_for_the_card_that_is_named_or_else_for_the_one_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = Workspace(tmp_path, "gpu")
    setup: dict[str, Any] = {"model": "llama-6m", "device": "cuda", "precision": "bf16"}

    def figures(kind: Any, **changes: Any) -> dict[str, Any]:
        return execute(kind(**setup, **changes), workspace).figures

    class Card:
        name, major, total_memory = "NVIDIA H200", 9, int(139.8 * GIB)

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    assert figures(Prediction) == figures(Simulation, gpu="H200-141GB")
    assert figures(Prediction)["peak_bytes"] > figures(Simulation)["peak_bytes"]
    assert figures(Prediction, gpu="RTX-4090") == figures(Simulation, gpu="RTX-4090")
    assert execute(Prediction(**setup), workspace).tags["gpu"] == "H200-141GB"


def test_a_processor_has_no_card() -> None:
    assert gpu_here("cpu") is None
