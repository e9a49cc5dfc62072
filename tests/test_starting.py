"""Where training starts: each start is what it says, sees the same batches, and its curve is what a model scores."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, set_seed

from lab import data, evaluation
from lab.errors import LabError
from lab.models import load_model, load_tokenizer
from lab.runners import Outcome, execute
from lab.specs import Start
from lab.starting import restart
from lab.training import FineTuning
from lab.workspace import Workspace
from tests.conftest import RAGGED_TASK

pytestmark = pytest.mark.usefixtures("one_thread")


def settings(**changes: Any) -> Start:
    chosen: dict[str, Any] = {"model": "tiny", "task": RAGGED_TASK, "updates": 4, "evaluations": 2, "questions": 8}
    chosen |= {"micro_batch_size": 4, "learning_rate": 0.01, "schedule": "constant"}
    return Start.model_validate(chosen | changes)


def begun(workspace: Workspace, **changes: Any) -> Outcome:
    return execute(settings(**changes), workspace)


def loaded(workspace: Workspace) -> Any:
    return load_model("tiny", workspace.model("tiny"))


def test_a_random_start_is_the_model_s_own_initialisation_with_the_seed(tiny_workspace: Workspace) -> None:
    model, other = loaded(tiny_workspace), loaded(tiny_workspace)
    restart(model, "random", seed=3)
    restart(other, "random", seed=4)
    set_seed(3)
    fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32)
    for (name, found), (_, expected) in zip(model.named_parameters(), fresh.named_parameters(), strict=True):
        assert torch.equal(found, expected), name
    assert not torch.equal(model.model.embed_tokens.weight, other.model.embed_tokens.weight)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_permuted_weights_keep_norm_and_singular_values_of_each_tensor_and_nothing_else(
    tiny_workspace: Workspace,
) -> None:
    model, before = loaded(tiny_workspace), loaded(tiny_workspace)
    restart(model, "permuted", seed=0)
    for (name, found), (_, was) in zip(model.named_parameters(), before.named_parameters(), strict=True):
        assert sorted(found.flatten().tolist()) == sorted(was.flatten().tolist()), name
        if found.dim() == 2:
            values = torch.linalg.svdvals(found.double()), torch.linalg.svdvals(was.double())
            torch.testing.assert_close(*values, rtol=1e-6, atol=1e-9)
            assert not torch.equal(found, was), name
    batch = torch.arange(20).reshape(2, 10)
    with torch.no_grad():
        assert not torch.allclose(model(batch).logits, before(batch).logits, atol=0.1)


def test_a_pretrained_start_leaves_the_weights_alone(tiny_workspace: Workspace) -> None:
    model, before = loaded(tiny_workspace), loaded(tiny_workspace)
    restart(model, "pretrained", seed=0)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters(), strict=True))


def test_the_curve_begins_with_what_the_start_scores_and_ends_with_the_figures(tiny_workspace: Workspace) -> None:
    tokenizer = load_tokenizer(tiny_workspace.model("tiny"))
    questions = data.load_task(tiny_workspace.data, RAGGED_TASK, "test")[:8]
    rows = evaluation.example_rows(tokenizer, questions)
    for start in ("pretrained", "random", "permuted"):
        model = loaded(tiny_workspace)
        restart(model, start, seed=0)
        found = begun(tiny_workspace, start=start)
        assert found.series["curve_update"] == [0, 2, 4]
        assert found.series["curve_test_loss"][0] == evaluation.task_figures(model, rows)["loss"]
        assert found.series["curve_test_loss"][-1] == found.figures["test_loss"]
        assert found.series["curve_test_loss"][0] != found.series["curve_test_loss"][1]
        assert found.figures["blind_loss"] == math.log(found.figures["vocabulary"])
        assert {"validation_loss", "validation_accuracy", "test_accuracy"} <= set(found.figures)


def test_every_start_sees_the_same_batches_and_their_tokens_are_counted(tiny_workspace: Workspace) -> None:
    first = begun(tiny_workspace)
    longer = begun(tiny_workspace, start="random", updates=8, evaluations=4)
    assert first.tags["data_order"] == longer.tags["data_order"]
    assert first.series["curve_tokens"] == longer.series["curve_tokens"][:3]
    assert first.tags["data_order"] != begun(tiny_workspace, seed=1).tags["data_order"]
    run = FineTuning(settings(), tiny_workspace)
    run.train()
    counted = sum(len(run.rows[place].input_ids) for place in run.collator.seen[:16])
    assert first.series["curve_tokens"] == [0, first.series["curve_tokens"][1], counted]
    assert 0 < first.series["curve_tokens"][1] < counted


def test_the_same_settings_give_the_same_numbers(tiny_workspace: Workspace) -> None:
    once, again = begun(tiny_workspace, start="random"), begun(tiny_workspace, start="random")
    assert once.series == again.series
    timed = {"seconds_per_update"}
    assert {k: v for k, v in once.figures.items() if k not in timed} == {
        k: v for k, v in again.figures.items() if k not in timed
    }


def test_a_run_that_diverged_has_no_scores(tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FineTuning, "diverged", lambda self: "it went wrong")
    found = begun(tiny_workspace)
    assert found.diverged == "it went wrong"
    assert "validation_loss" not in found.figures


def test_a_method_that_does_not_train_every_weight_is_refused(tiny_workspace: Workspace) -> None:
    said = r"start: method is 'lora'; only full trains every weight\. Set method: full\."
    with pytest.raises(LabError, match=said):
        begun(tiny_workspace, method="lora")


@pytest.mark.parametrize("evaluations", [0, 5])
def test_a_curve_needs_points_and_no_more_than_there_are_updates(evaluations: int, tiny_workspace: Workspace) -> None:
    with pytest.raises(LabError, match=f"start: evaluations is {evaluations}; it must be 1 to 4, the updates"):
        begun(tiny_workspace, evaluations=evaluations)


def test_an_unknown_start_is_refused(tiny_workspace: Workspace) -> None:
    said = r"start: start is 'warm'; it must be pretrained, random or permuted\. Choose one of these\."
    with pytest.raises(LabError, match=said):
        restart(loaded(tiny_workspace), "warm", 0)
