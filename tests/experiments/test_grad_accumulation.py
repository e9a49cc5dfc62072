"""The tolerances of gradient accumulation: what rounding alone does, and how far the fault is from it."""

from __future__ import annotations

import pytest

from experiments.grad_accumulation import TOLERANCE
from lab.runners import execute
from lab.specs import Comparison, Training
from lab.workspace import Workspace
from tests.conftest import RAGGED_TASK


def distance(workspace: Workspace, precision: str, seed: int, **second: object) -> float:
    whole = Training.model_validate(
        {
            "model": "tiny",
            "task": RAGGED_TASK,
            "optimizer": "sgd",
            "learning_rate": 0.1,
            "schedule": "constant",
            "precision": precision,
            "updates": 5,
            "micro_batch_size": 8,
            "evaluations": 0,
            "seed": seed,
        }
    )
    return execute(Comparison(first=whole, second=whole.model_copy(update=second)), workspace).figures["distance"]


@pytest.mark.parametrize(("precision", "room"), [("fp32", 10), ("autocast", 1)])
def test_the_order_of_the_rows_in_a_batch_moves_less_than_the_tolerance(
    tiny_workspace: Workspace, precision: str, room: int
) -> None:
    rounding = [distance(tiny_workspace, precision, seed, fault="permuted") for seed in range(3)]
    assert max(rounding) <= TOLERANCE[precision] / room, rounding


@pytest.mark.parametrize("precision", list(TOLERANCE))
def test_the_mean_of_means_moves_more_than_the_tolerance(tiny_workspace: Workspace, precision: str) -> None:
    parts = {"micro_batch_size": 2, "gradient_accumulation_steps": 4, "fault": "mean-of-means"}
    wrong = [distance(tiny_workspace, precision, seed, **parts) for seed in range(3)]
    assert min(wrong) >= 3 * TOLERANCE[precision], wrong
