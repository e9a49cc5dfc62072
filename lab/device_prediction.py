"""Predictions for the card that is here: its name decides how much its libraries' workspaces take."""

from __future__ import annotations

from lab.cards import GPUS, find_gpu
from lab.errors import LabError
from lab.memory.simulated_trial import simulate_memory
from lab.runners import Outcome
from lab.specs import Prediction
from lab.workspace import Workspace

FAMILIES = {7: ("Volta", "Turing"), 8: ("Ampere", "Ada"), 9: ("Hopper",), 10: ("Blackwell",), 12: ("Blackwell",)}
"""The families of `lab.cards` by the first number of a card's compute capability."""


def predict_here(settings: Prediction, workspace: Workspace) -> Outcome:
    """The figures of `simulate_memory` for the card of this machine, where the settings name no other.

    Raises:
        LabError: an unknown model, settings that contradict each other, or a card of no known family.
    """
    gpu = settings.gpu or gpu_here(settings.device)
    outcome = simulate_memory(settings.model_copy(update={"gpu": gpu}), workspace)
    outcome.tags |= {"gpu": gpu} if gpu else {}
    return outcome


def gpu_here(device: str) -> str | None:
    """The name in `lab.cards` of the CUDA device that trials run on; None on a processor."""
    if device != "cuda":
        return None
    import torch

    properties = torch.cuda.get_device_properties(0)
    return gpu_like(properties.name, properties.major, properties.total_memory)


def gpu_like(name: str, major: int, total_bytes: int) -> str:
    """The card of the table that has this name, or else that of its family which is nearest in memory.

    Args:
        major: the first number of its compute capability.
    Raises:
        LabError: it is of a family that the table does not have.
    """
    try:
        return find_gpu(name).name
    except LabError:
        kin = [gpu for gpu in GPUS.values() if gpu.family in FAMILIES.get(major, ())]
        if not kin:
            raise
        return min(kin, key=lambda gpu: abs(gpu.total_bytes - total_bytes)).name
