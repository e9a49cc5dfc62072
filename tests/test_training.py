"""One trial: what it is told is what it does, and the same spec gives the same numbers."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from lab import evaluation, training
from lab.corpus import Example
from lab.models import load_model, load_tokenizer
from lab.runners import execute
from lab.specs import Comparison, Memory, Training
from lab.workspace import Workspace
from tests.conftest import RAGGED_TASK as TASK


@pytest.fixture
def workspace(tiny_workspace: Workspace) -> Workspace:
    return tiny_workspace


pytestmark = pytest.mark.usefixtures("one_thread")


def spec(**settings: object) -> Training:
    given = {"model": "tiny", "task": TASK, "updates": 3, "micro_batch_size": 4, "evaluations": 1, **settings}
    return Training.model_validate(given)


def test_the_same_spec_gives_the_same_numbers_and_another_seed_another_order(workspace: Workspace) -> None:
    first, again, other = (execute(spec(seed=seed), workspace) for seed in (1, 1, 2))
    timed = "seconds_per_update"
    assert {k: v for k, v in first.figures.items() if k != timed} == {
        k: v for k, v in again.figures.items() if k != timed
    }
    assert first.series == again.series
    assert first.tags["data_order"] == again.tags["data_order"] != other.tags["data_order"]


def test_methods_see_the_same_rows_in_the_same_order(workspace: Workspace) -> None:
    full, lora = (execute(spec(method=name, seed=3), workspace) for name in ("full", "lora"))
    assert full.tags["data_order"] == lora.tags["data_order"]


def test_just_as_many_questions_are_asked_as_the_spec_says(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    real = evaluation.task_figures

    def counting(model: object, rows: list[evaluation.Row]) -> dict[str, float]:
        asked.append(len(rows))
        return real(model, rows)

    monkeypatch.setattr(training.evaluation, "task_figures", counting)
    execute(spec(questions=5, evaluations=3), workspace)
    assert asked == [5, 5, 5, 5]


def test_the_curve_has_the_points_that_the_spec_says(workspace: Workspace) -> None:
    found = execute(spec(updates=4, evaluations=2), workspace)
    assert found.series["curve_update"] == [2, 4]
    assert found.figures["validation_loss"] == found.series["curve_validation_loss"][-1]
    assert len(found.series["train_loss"]) == 4


def test_a_base_is_scored_as_it_is_and_an_untrained_adapter_scores_the_same(workspace: Workspace) -> None:
    base, adapter = (execute(spec(updates=0, method=name), workspace) for name in ("full", "lora"))
    for name in ("validation_loss", "test_loss", "test_accuracy", "recall", "general_bits_per_byte"):
        assert adapter.figures[name] == pytest.approx(base.figures[name], rel=1e-6)


def test_lora_leaves_the_base_as_it_was(workspace: Workspace) -> None:
    run = training.FineTuning(spec(method="lora", learning_rate=0.01), workspace)
    before = {n: p.detach().clone() for n, p in run.model.named_parameters() if not p.requires_grad}
    moved = run.snapshot()
    run.train()
    assert all(torch.equal(p, before[n]) for n, p in run.model.named_parameters() if n in before)
    assert not torch.equal(moved, run.snapshot())


@pytest.mark.parametrize(("fault", "least", "most"), [(None, 0.0, 1e-4), ("mean-of-means", 1e-2, 10.0)])
def test_accumulation_is_the_large_batch_unless_means_are_averaged(
    workspace: Workspace, fault: str | None, least: float, most: float
) -> None:
    large = spec(optimizer="sgd", learning_rate=0.1, schedule="constant", micro_batch_size=8, evaluations=0)
    small = large.model_copy(update={"micro_batch_size": 2, "gradient_accumulation_steps": 4, "fault": fault})
    found = execute(Comparison(first=large, second=small, snapshots=3), workspace)
    assert least <= found.figures["distance"] <= most
    assert found.tags["data_order"] == found.tags["second_data_order"]
    assert len(found.series["distance"]) == 3


def test_a_run_whose_loss_explodes_has_diverged_and_has_no_score(workspace: Workspace) -> None:
    found = execute(spec(optimizer="sgd", learning_rate=99, updates=10, schedule="constant"), workspace)
    assert "guessing any token alike would give 6.0" in found.diverged
    assert "test_loss" not in found.figures


def test_a_run_whose_loss_is_no_number_stops_there(workspace: Workspace) -> None:
    run = training.FineTuning(spec(updates=40), workspace)
    with torch.no_grad():
        run.trained()[0].fill_(math.nan)
    run.train()
    assert run.diverged() == "the loss is not finite after update 1"
    assert len(run.losses) == 1


def test_a_memory_trial_counts_without_training_where_it_is_told_so(tmp_path: Path) -> None:
    found = execute(Memory(model="llama-6m", method="lora", updates=0), Workspace(tmp_path, "smoke"))
    assert found.figures["parameters_closed_form"] == found.figures["parameters_trainable"]
    assert "peak_bytes" not in found.figures


def test_a_score_is_the_cross_entropy_in_float64_and_exact_is_greedy_decoding(workspace: Workspace) -> None:
    folder = workspace.model("tiny")
    model, tokenizer = load_model("tiny", folder), load_tokenizer(folder)
    examples = [Example("Question: a\nAnswer:", "b c"), Example("Question: longer than that\nAnswer:", "d")]
    rows = evaluation.example_rows(tokenizer, examples)
    wide = load_model("tiny", folder).double()
    for row, found in zip(rows, evaluation.score(model, rows), strict=True):
        with torch.no_grad():
            logits = wide(input_ids=torch.tensor([row.input_ids])).logits[0, :-1]
        labels = torch.tensor(row.labels[1:])
        kept = labels != evaluation.IGNORED
        nats = torch.nn.functional.cross_entropy(logits[kept], labels[kept], reduction="sum")
        assert found.nats == pytest.approx(float(nats), rel=1e-5)
        assert found.tokens == int(kept.sum())
        assert found.exact == bool((logits[kept].argmax(-1) == labels[kept]).all())


def test_scoring_a_model_in_4_bits_leaves_its_gradients_alone(tiny_workspace: Workspace) -> None:
    """bitsandbytes packs the weights anew in eval mode on some processors; a backward pass then reads them wrongly."""
    settings = Training(model="tiny", task=TASK, method="qlora", updates=1, micro_batch_size=4)
    run = training.FineTuning(settings, tiny_workspace)
    batch = run.collator([{"input_ids": r.input_ids, "labels": r.labels, "place": 0} for r in run.rows[:4]])

    def gradients() -> list[torch.Tensor]:
        run.model.zero_grad()
        run.model(**batch).loss.backward()
        return [p.grad.clone() for p in run.trained() if p.grad is not None]

    before = gradients()
    evaluation.score(run.model, run.rows[:4])
    assert any(bool(gradient.any()) for gradient in before)
    assert all(torch.equal(a, b) for a, b in zip(before, gradients(), strict=True))
