"""Whether a model fits on a card: the answer is found by running out of memory, and is told from what else goes wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from lab import limits
from lab.cards import CONTEXT_BYTES, DRIVER_SHARE, GIB, usable_bytes
from lab.errors import LabError
from lab.memory.workload import PHASES
from lab.runners import Outcome, execute
from lab.specs import Limit
from lab.workspace import Workspace
from tests.conftest import cuda_found

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPE: dict[str, Any] = {"precision": "bf16", "autocast": True, "checkpointing": True}
LOADED: dict[str, Any] = {"precision": "bf16", "updates": 0}
WAYS: list[dict[str, Any]] = [
    RECIPE,
    {**RECIPE, "method": "lora"},
    {**RECIPE, "method": "qlora", "method_options": {"double_quantisation": True}},
    LOADED,
    {**LOADED, "quantisation": "nf4-double"},
]


def tried(card_bytes: float, folder: Path, model: str = "llama-6m", **setup: Any) -> Outcome:
    settings = Limit(model=model, length=64, card_gb=card_bytes / GIB, **setup)
    return execute(settings, Workspace(folder, "gpu"))


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_a_model_fits_where_it_is_predicted_to_and_a_little_less_memory_is_too_little(
    way: dict[str, Any], tmp_path: Path
) -> None:
    need = tried(1e9, tmp_path, **way).figures["predicted_bytes"]
    ahead = 4096  # the Trainer's batches and numbers, which the prediction leaves out
    fits, fails = tried(need + ahead, tmp_path, **way), tried(need - ahead, tmp_path, **way)
    assert (fits.figures["fits"], fits.figures["predicted_fits"], fails.figures["fits"]) == (1, 1, 0)
    assert need - ahead <= fits.figures["allocated_bytes"] <= need + ahead
    assert fails.figures["predicted_fits"] == 0
    assert "allocated_bytes" not in fails.figures
    assert fails.tags["ran_out_in"] == ("load" if way.get("updates") == 0 else fails.tags["ran_out_in"])
    assert fails.diverged == ""  # the trial is a success: not to fit is its answer


def test_the_phase_in_which_memory_ran_out_is_told(tmp_path: Path) -> None:
    from lab.memory.simulated_trial import simulate_memory
    from lab.specs import Simulation

    setup: dict[str, Any] = {"model": "llama-6m", "batch": 4, "length": 64}
    figures = simulate_memory(Simulation(**setup), Workspace(tmp_path, "cpu")).figures
    peaks = [figures[f"peak_{phase}_bytes"] for phase in PHASES]
    assert peaks[2] > peaks[1], "full fine-tuning peaks in the step, of its first update already"
    assert tried(peaks[2] - 2**16, tmp_path, batch=4).tags["ran_out_in"] == "step"
    assert tried(0.9 * figures["weights_bytes"], tmp_path, batch=4).tags["ran_out_in"] == "load"
    assert tried(figures["weights_bytes"] + 2**16, tmp_path, batch=4).tags["ran_out_in"] == "forward"
    lora: dict[str, Any] = {"batch": 16, "method": "lora"}
    found = simulate_memory(Simulation(model="llama-6m", length=64, **lora), Workspace(tmp_path, "cpu")).figures
    assert found["peak_backward_bytes"] > found["peak_forward_bytes"] + 2**20
    assert tried(found["peak_backward_bytes"] - 2**19, tmp_path, **lora).tags["ran_out_in"] == "backward"


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"), False),
        (MemoryError(), False),
        (ValueError("CUDA out of memory"), False),
    ],
    ids=str,
)
def test_the_device_s_memory_running_out_is_told_from_other_errors(error: Exception, told: bool) -> None:
    assert limits.ran_out(error) is told


def test_another_error_is_no_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(limits, "load", broken)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        tried(1e9, tmp_path)


def test_what_no_model_is_called_is_a_user_s_mistake(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="unknown model 'llama-6n'"):
        tried(1e9, tmp_path, model="llama-6n")


# On a card -----------------------------------------------------------------------------------------------------------


class Card:
    """What torch says of an H100."""

    name, major, total_memory = "NVIDIA H100 80GB HBM3", 9, int(79.1 * GIB)


def room(monkeypatch: pytest.MonkeyPatch, gb: float, total: float = 79.1) -> tuple[int | None, int]:
    card = type("Other", (Card,), {"total_memory": int(total * GIB)})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    return limits._room(Limit(model="llama-6m", device="cuda", card_gb=gb))


def test_a_smaller_card_is_what_it_would_have_beside_its_context(monkeypatch: pytest.MonkeyPatch) -> None:
    total = int(24 * GIB * (1 - DRIVER_SHARE))
    assert room(monkeypatch, 24) == (total - CONTEXT_BYTES, usable_bytes(total))


def test_the_card_at_hand_is_itself_and_no_larger_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert room(monkeypatch, 80)[0] == int(80 * GIB * (1 - DRIVER_SHARE)) - CONTEXT_BYTES
    assert room(monkeypatch, 24, total=23.5)[0] == int(23.5 * GIB) - CONTEXT_BYTES  # an RTX 4090
    assert room(monkeypatch, 141)[0] is None


def test_a_card_that_is_larger_than_the_one_at_hand_is_left_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: Card)
    found = tried(141 * GIB, tmp_path, model="llama-3.1-8b", device="cuda", **RECIPE)
    assert found.figures["beyond_device"] == 1
    assert "fits" not in found.figures
    assert found.tags["gpu"] == "H100-80GB"
    assert found.figures["predicted_bytes"] == pytest.approx(74.85 * GIB, rel=0.001)


@pytest.mark.gpu
@pytest.mark.parametrize("way", [RECIPE, {**LOADED, "quantisation": "nf4-double"}], ids=str)
def test_a_share_of_this_card_runs_out_where_it_should(way: dict[str, Any], tmp_path: Path) -> None:
    overhead = CONTEXT_BYTES / GIB / (1 - DRIVER_SHARE)

    def card(gib: float) -> Outcome:
        settings = Limit(
            model="smollm2-135m", length=256, device="cuda", card_gb=gib / (1 - DRIVER_SHARE) + overhead, **way
        )
        return execute(settings, Workspace(tmp_path, "gpu"))

    assert card(3.0).figures["fits"] == 1, f"on {cuda_found()}"
    assert card(0.05).figures["fits"] == 0
