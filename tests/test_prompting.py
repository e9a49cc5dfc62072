"""In-context learning: a cache that is read once gives what whole rows give, and the trial asks what it says."""

from __future__ import annotations

from typing import Any

import pytest

from lab import data, evaluation, prompting
from lab.corpus import Example
from lab.errors import LabError
from lab.models import load_model, load_tokenizer
from lab.prompting import Prompted, behind, draws, majority_accuracy, questions, worked
from lab.runners import Outcome, execute
from lab.specs import InContext
from lab.workspace import Workspace
from tests.conftest import RAGGED_TASK as TASK


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(prompting, "ROUNDS", 1)
    monkeypatch.setattr(prompting, "TIMED_SECONDS", 0.0)


def answered(workspace: Workspace, **settings: Any) -> Outcome:
    given = {"model": "tiny", "task": TASK, "method": "lora", "updates": 2, "micro_batch_size": 4, "questions": 6}
    given |= {"shots": (1, 2), "orders": 2, "evaluations": 0}
    return execute(InContext.model_validate(given | settings), workspace)


@pytest.fixture(scope="module")
def outcome(tiny_workspace: Workspace) -> Outcome:
    return answered(tiny_workspace)


def examples(workspace: Workspace, split: Any) -> list[Example]:
    return data.load_task(workspace.data, TASK, split)


# Worked examples in front ---------------------------------------------------------------------------------------


def test_rows_behind_a_cached_text_score_as_whole_rows_do(tiny_workspace: Workspace) -> None:
    folder = tiny_workspace.model("tiny")
    tokenizer, model = load_tokenizer(folder), load_model("tiny", folder)
    assert model.config.use_cache is False
    text = worked(tokenizer, examples(tiny_workspace, "train")[:2])
    rows = questions(tokenizer, examples(tiny_workspace, "test"))
    assert len({len(row.input_ids) for row in rows}) > 1
    prompted = Prompted(model, text)
    for _ in range(2):  # the cache is not written to: the second time is like the first
        cached = evaluation.score(prompted, rows)
        whole = evaluation.score(model, [behind(text, row) for row in rows])
        assert [s.tokens for s in cached] == [s.tokens for s in whole]
        assert [s.exact for s in cached] == [s.exact for s in whole]
        assert [s.nats for s in cached] == pytest.approx([s.nats for s in whole], rel=1e-5)
    alone = [s.nats for s in evaluation.score(model, rows)]
    assert [s.nats for s in cached] != pytest.approx(alone, rel=1e-4)


def test_worked_examples_hold_their_answers_and_a_question_asks_for_its_own_alone(tiny_workspace: Workspace) -> None:
    tokenizer = load_tokenizer(tiny_workspace.model("tiny"))
    first, second = examples(tiny_workspace, "train")[:2]
    text = tokenizer.decode(worked(tokenizer, [first, second]))
    assert text == f"{first.prompt} {first.answer}\n\n{second.prompt} {second.answer}\n\n"
    (row,) = questions(tokenizer, [first])
    asked = [label for label in row.labels if label != evaluation.IGNORED]
    assert tokenizer.decode(asked) == f" {first.answer}"


def test_draws_come_from_the_seed_and_from_as_many_rows_as_there_are() -> None:
    train = [Example(f"q{i}", f"{i}") for i in range(30)]
    drawn = draws(train, 8, 3, seed=1)
    assert drawn == draws(train, 8, 3, seed=1) != draws(train, 8, 3, seed=2)
    assert drawn[0] != drawn[1]
    assert all(len(set(of_order)) == 8 for of_order in drawn)
    assert len(draws(train[:5], 8, 1, seed=1)[0]) == 5


def test_the_majority_answer_is_that_of_the_training_split() -> None:
    train = [Example("q", answer) for answer in ("son", "wife", "son", "aunt")]
    test = [Example("q", answer) for answer in ("wife", "son", "wife", "aunt", "son")]
    assert majority_accuracy(train, test) == 2 / 5


# The trial ------------------------------------------------------------------------------------------------------


def test_each_number_of_examples_has_its_figures_and_the_best_is_one_of_them(outcome: Outcome) -> None:
    figures = outcome.figures
    for k, orders in ((0, 1), (1, 2), (2, 2)):
        accuracies = outcome.series[f"icl{k}_accuracies"]
        assert len(accuracies) == orders
        assert figures[f"icl{k}_accuracy"] == pytest.approx(sum(accuracies) / orders)
        assert min(figures[f"icl{k}_seconds"], figures[f"icl{k}_cached_seconds"]) > 0
        assert figures[f"icl{k}_flops"] == 2 * figures["parameters_base"] * figures[f"icl{k}_prompt_tokens"]
    best = figures["icl_best_shots"]
    assert best in (1, 2)
    assert figures["icl_best_accuracy"] == figures[f"icl{best}_accuracy"]
    assert figures[f"icl{best}_validation_accuracy"] == max(figures[f"icl{k}_validation_accuracy"] for k in (1, 2))
    assert figures["tuned_prompt_tokens"] == figures["icl0_prompt_tokens"] < figures["icl1_prompt_tokens"]
    assert "left_out" not in outcome.tags


def test_training_is_counted_in_tokens_without_padding(outcome: Outcome, tiny_workspace: Workspace) -> None:
    figures, lora = outcome.figures, outcome.figures["parameters_trainable"]
    tokenizer = load_tokenizer(tiny_workspace.model("tiny"))
    lengths = [len(r.input_ids) for r in evaluation.example_rows(tokenizer, examples(tiny_workspace, "train"))]
    rows = 2 * 4
    assert sum(sorted(lengths)[:rows]) <= figures["training_tokens"] <= sum(sorted(lengths)[-rows:])
    assert figures["training_seconds"] > 0
    assert (
        figures["training_flops"] == (4 * (figures["parameters_base"] + lora) + 2 * lora) * figures["training_tokens"]
    )
    whole = answered(tiny_workspace, method="full").figures
    assert whole["training_flops"] == 6 * whole["parameters_total"] * whole["training_tokens"]


def test_the_same_seed_gives_the_same_numbers_apart_from_times(outcome: Outcome, tiny_workspace: Workspace) -> None:
    again, other = answered(tiny_workspace), answered(tiny_workspace, seed=1)

    def untimed(figures: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in figures.items() if not name.endswith("seconds")}

    assert untimed(again.figures) == untimed(outcome.figures)
    assert (again.series, again.tags) == (outcome.series, outcome.tags)
    assert other.tags["data_order"] != outcome.tags["data_order"]
    assert other.figures["icl2_prompt_tokens"] != outcome.figures["icl2_prompt_tokens"]


def test_a_number_of_examples_that_does_not_fit_is_left_out_and_named(
    tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = answered(tiny_workspace, shots=(1, 50, 1000))
    assert found.tags["left_out"] == "50, 1000"
    assert "icl1_accuracy" in found.figures
    assert not [name for name in found.figures if name.startswith("icl50")]
    with pytest.raises(
        LabError, match=r"not even 50 worked examples of .* fit the context of tiny, \d+ tokens\. Lower"
    ):
        answered(tiny_workspace, shots=(50, 60))


def test_fewer_examples_are_the_first_of_more(tiny_workspace: Workspace) -> None:
    tokenizer = load_tokenizer(tiny_workspace.model("tiny"))
    settings = InContext(model="tiny", task=TASK, updates=1, shots=(1, 2), orders=3)
    texts = prompting._texts(settings, tokenizer, examples(tiny_workspace, "train"), 10**6)
    for one, two in zip(texts[1], texts[2], strict=True):
        assert two[: len(one)] == one
        assert len(two) > len(one)


def test_just_what_fits_is_kept_to_the_token(tiny_workspace: Workspace) -> None:
    tokenizer = load_tokenizer(tiny_workspace.model("tiny"))
    train = examples(tiny_workspace, "train")
    settings = InContext(model="tiny", task=TASK, updates=1, shots=(2,), orders=2)
    longest = max(len(worked(tokenizer, drawn)) for drawn in draws(train, 2, 2, 0))
    assert list(prompting._texts(settings, tokenizer, train, longest)) == [2]
    assert prompting._texts(settings, tokenizer, train, longest - 1) == {}


@pytest.mark.parametrize("method", ["prompt", "adapter"])
def test_methods_that_cannot_be_merged_answer_as_they_are(method: str, tiny_workspace: Workspace) -> None:
    found = answered(tiny_workspace, method=method, shots=(1,), orders=1).figures
    virtual = 20 if method == "prompt" else 0
    assert found["tuned_prompt_tokens"] == found["icl0_prompt_tokens"] + virtual
    assert 0 <= found["tuned_accuracy"] <= 1


def test_a_merged_model_answers_as_the_adapted_one(tiny_workspace: Workspace) -> None:
    settings = InContext(model="tiny", task=TASK, method="lora", updates=3, learning_rate=1e-2, evaluations=0)
    run = prompting.FineTuning(settings, tiny_workspace)
    run.train()
    rows = questions(run.tokenizer, examples(tiny_workspace, "test"))
    before = evaluation.score(run.model, rows)
    served = prompting._served(settings, run.model)
    assert not hasattr(served, "peft_config")
    assert [s.nats for s in evaluation.score(served, rows)] == pytest.approx([s.nats for s in before], rel=1e-4)
