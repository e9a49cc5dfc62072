"""Updates timed in turn: what is counted agrees with a count by hand, what is kept with what is stored."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lab.models import load_model
from lab.runners import Outcome, execute
from lab.specs import Timing, Training
from lab.timing import _Side
from lab.workspace import Workspace
from tests.conftest import RAGGED_TASK as TASK

pytestmark = pytest.mark.usefixtures("one_thread")


def training(method: str, **changes: Any) -> Training:
    settings: dict[str, Any] = {"model": "tiny", "task": TASK, "method": method, "updates": 1, "micro_batch_size": 4}
    return Training(**{**settings, "lengths": "fixed", "evaluations": 0, "schedule": "constant", **changes})


def timed(workspace: Workspace, first: Training, second: Training, rounds: int = 2) -> Outcome:
    return execute(Timing(first=first, second=second, rounds=rounds), workspace)


def test_the_same_settings_twice_take_about_the_same_time_and_cost_the_same(tiny_workspace: Workspace) -> None:
    found = timed(tiny_workspace, training("full"), training("full"), rounds=20)
    assert 0.7 < found.figures["ratio"] < 1.4  # loose: other processes take their share in single rounds
    assert len(found.series["first_seconds"]) == len(found.series["second_seconds"]) == 20
    for name in ("flops", "checkpoint_bytes", "parameters_trainable", "parameters_stored"):
        assert found.figures[f"first_{name}"] == found.figures[f"second_{name}"] > 0
    assert found.tags == {"model": "tiny", "first_method": "full", "second_method": "full"}


def products(workspace: Workspace, tokens: int) -> tuple[int, int]:
    """Operations of the forward pass's products with weights, and of its attention, for 4 rows of `tokens`."""
    config = load_model("tiny", workspace.model("tiny")).config
    hidden, inner, size = config.hidden_size, config.intermediate_size, config.head_dim
    queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
    layer = 2 * hidden * queries + 2 * hidden * keys + 3 * hidden * inner
    weights = config.num_hidden_layers * layer + hidden * config.vocab_size
    attention = config.num_hidden_layers * 2 * tokens * tokens * queries
    return 2 * 4 * tokens * weights, 2 * 4 * attention


def test_the_operations_of_full_fine_tuning_are_those_of_a_count_by_hand(tiny_workspace: Workspace) -> None:
    """A backward pass multiplies twice for each product; that of attention makes the scores anew: 5 products for 2."""
    linear, attention = products(tiny_workspace, 32)
    found = timed(tiny_workspace, training("full"), training("full", gradient_accumulation_steps=2))
    assert found.figures["first_flops"] == pytest.approx(3 * linear + 3.5 * attention, rel=1e-4)
    assert found.figures["second_flops"] == 2 * found.figures["first_flops"]


def test_a_product_with_four_bit_weights_counts_as_one_with_the_weights(tiny_workspace: Workspace) -> None:
    found = timed(tiny_workspace, training("lora"), training("qlora"))
    full = timed(tiny_workspace, training("full"), training("full"), rounds=1).figures["first_flops"]
    assert found.figures["first_flops"] == found.figures["second_flops"] < full


@pytest.mark.parametrize("method", ["full", "lora", "ptuning"])
def test_a_checkpoint_holds_four_bytes_for_each_parameter_stored(tiny_workspace: Workspace, method: str) -> None:
    figures = timed(tiny_workspace, training(method), training(method), rounds=1).figures
    stored = 4 * figures["first_parameters_stored"]
    header = 200 * 40  # of a safetensors file: a line for each tensor, of which there are at most 40
    assert stored <= figures["first_checkpoint_bytes"] <= stored + header
    assert (figures["first_parameters_trainable"] > figures["first_parameters_stored"]) == (method == "ptuning")


@pytest.mark.parametrize("method", ["full", "qlora"])
def test_every_update_moves_what_is_trained(tiny_workspace: Workspace, method: str, tmp_path: Any) -> None:
    side = _Side(training(method), tiny_workspace, str(tmp_path))
    before = side.run.snapshot()
    assert side.warm_up() > 0
    warm = side.run.snapshot()
    assert side.seconds() > 0
    after = side.run.snapshot()
    assert not torch.equal(before, warm)
    assert not torch.equal(warm, after)
    assert all(p.grad is None for p in side.run.model.parameters())


def test_both_sides_see_the_same_rows_in_the_trainer_s_order(tiny_workspace: Workspace, tmp_path: Any) -> None:
    sides = [_Side(training(method, seed=3), tiny_workspace, str(tmp_path)) for method in ("full", "ia3")]
    for side in sides:
        for _ in range(3):
            side.update()
    seen = [side.run.collator.seen[:12] for side in sides]
    assert seen[0] == seen[1] != sorted(seen[0])
    run = training("full", seed=3, updates=3)
    from lab.training import FineTuning

    trained = FineTuning(run, tiny_workspace)
    trained.train()
    assert trained.collator.seen[:12] == seen[0]
