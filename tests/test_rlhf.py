"""trl's trainers on a model that was hardly trained: what a trial says, and that the control moves nothing."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from lab import rlhf
from lab.corpus import KEEPERS_LOG, Example
from lab.data import load_task
from lab.errors import LabError
from lab.evaluation import encode
from lab.models import load_model, load_tokenizer
from lab.rlhf import (
    Alignment,
    Pair,
    align,
    commonest_share,
    find_trainer,
    preference_figures,
    preferences,
    told_by_frequency,
    verifier,
)
from lab.specs import Rlhf
from lab.workspace import Workspace
from tests.conftest import prepare_embedded

TASK = "chain_sum"
THERE = ("sft", "reward", "dpo", "kto", "rloo", "grpo")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def sums(tiny_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The workspace with sums to learn."""
    made = Workspace(tmp_path_factory.mktemp("sums"), "smoke")
    shutil.copytree(tiny_workspace.model("tiny"), made.model("tiny"))
    prepare_embedded(made.data, [TASK], train=24, validation=4, test=12)
    return made


def told(trainer: str, **changes: Any) -> Rlhf:
    settings = {
        "model": "tiny",
        "task": TASK,
        "updates": 3,
        "micro_batch_size": 4,
        "learning_rate": 0.02,
        "generations": 2,
    }
    return Rlhf.model_validate({**settings, "trainer": trainer, "samples": 1, **changes})


def alignment(workspace: Workspace, trainer: str) -> Alignment:
    found = find_trainer(trainer)
    assert found is not None
    return Alignment(told(trainer), workspace, found, workspace.model("tiny"))


@pytest.mark.parametrize("trainer", THERE)
def test_every_trainer_moves_its_model_and_its_control_moves_nothing(sums: Workspace, trainer: str) -> None:
    warm = {"warm_up_updates": 2} if trainer == "dpo" else {}
    outcome = align(told(trainer, **warm), sums)
    figures = outcome.figures
    assert figures["present"] == 1
    assert outcome.tags["module"] == "trl"
    assert not outcome.diverged
    names = {name.rpartition("_")[0] for name in figures if name not in ("present", "unread")}
    assert "objective" in names
    for name in names:
        assert figures[f"{name}_control"] == figures[f"{name}_before"], name
    if trainer in rlhf.PAIRED:
        assert figures["objective_before"] == 0.5
        assert figures["margin_before"] == 0
        assert figures["margin_after"] != 0
    elif trainer == "sft":
        assert figures["objective_after"] > figures["objective_before"]
    assert len(outcome.series["train_loss"]) == 3
    assert len(outcome.series["train_reward"]) == (3 if trainer in rlhf.SAMPLED else 0)


def test_a_trainer_that_trl_lacks_is_said_to_be_lacking_with_the_version(sums: Workspace) -> None:
    outcome = align(told("ppo"), sums)
    assert outcome.figures == {"present": 0}
    assert outcome.tags["absent"] == f"trl {outcome.tags['trl']} has no PPOTrainer"


def test_the_same_settings_give_the_same_numbers_and_another_seed_others(sums: Workspace) -> None:
    first, again, other = (align(told("sft", seed=seed), sums).figures for seed in (0, 0, 1))
    assert first == again
    assert first["objective_after"] != other["objective_after"]


def test_swapped_preferences_turn_the_objective_round(sums: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = alignment(sums, "dpo")
    pairs = preferences(
        run.learnt, run.verify, run.settings.seed
    )  # what was learnt: so few updates teach no arithmetic
    run.sides = [[encode(run.tokenizer, p.prompt, getattr(p, side)) for p in pairs] for side in ("chosen", "rejected")]
    rise = run.objective(run.train(0.01, 6)[0])["margin"]
    rows = run._training_rows()
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    monkeypatch.setattr(run, "_training_rows", lambda: swapped)
    fall = run.objective(run.train(0.01, 6)[0])["margin"]
    assert rise > 0 > fall


def test_an_implicit_reward_is_beta_times_the_log_ratio_to_the_start(sums: Workspace) -> None:
    run = alignment(sums, "dpo")
    model, _ = run.train(0.01, 2)
    assert run.beta == 0.1
    tokenizer, start = load_tokenizer(run.folder), load_model("tiny", run.folder)
    row = run.sides[0][0]
    sums_of_logs = []
    for each in (model.eval(), start.eval()):
        with torch.no_grad():
            logs = each(input_ids=torch.tensor([row.input_ids])).logits[0].double().log_softmax(-1)
        answer = [(place, token) for place, token in enumerate(row.labels) if token >= 0]
        sums_of_logs.append(sum(float(logs[place - 1, token]) for place, token in answer))
    assert answer[-1][1] == tokenizer.eos_token_id
    expected = 0.1 * (sums_of_logs[0] - sums_of_logs[1])
    assert run._log_ratios(model, run.sides[0])[0] == pytest.approx(expected, rel=1e-4, abs=1e-6)


def test_what_sampled_answers_are_worth_is_what_the_verifier_says(
    sums: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = alignment(sums, "rloo")
    seen: list[tuple[str, str]] = []

    def worth(text: str, right: str) -> float:
        seen.append((text, right))
        return 1.0 if len(seen) % 2 else 0.0

    monkeypatch.setattr(run, "verify", worth)
    assert run._sampled_worth(run.start()) == 0.5
    assert [right for _, right in seen] == [example.answer for example in run.held_out]


def test_a_tie_is_half_a_pair() -> None:
    assert preference_figures([1.0, 0.0, 0.0, 2.0], [0.0, 0.0, 1.0, 0.0]) == {"objective": 0.625, "margin": 0.5}


def test_a_preference_sets_the_right_answer_against_one_that_the_verifier_finds_wrong(sums: Workspace) -> None:
    examples = load_task(sums.data, TASK, "train")
    verify = verifier(TASK, examples)
    pairs = preferences(examples, verify, seed=0)
    for example, pair in zip(examples, pairs, strict=True):
        assert (pair.prompt, pair.chosen) == (example.prompt, f" {example.answer}")
        assert verify(pair.chosen, example.answer) == 1
        assert verify(pair.rejected, example.answer) < 1
    assert pairs == preferences(examples, verify, seed=0)
    assert pairs != preferences(examples, verify, seed=1)


def test_what_needs_no_question_is_counted() -> None:
    learnt = [Example(f"{n}?", answer) for n, answer in enumerate("aaabbc")]
    asked = [Example(f"{n}!", answer) for n, answer in enumerate("abab")]
    assert commonest_share(asked, learnt) == 0.5
    sides = [("a", "b"), ("b", "a"), ("c", "d"), ("d", "e")]
    pairs = [Pair("?", f" {right}", f" {wrong}") for right, wrong in sides]
    assert told_by_frequency(pairs, learnt) == (1 + 0 + 1 + 0.5) / 4


def test_wrong_answers_are_as_common_as_right_ones() -> None:
    answers = ["a"] * 60 + ["b"] * 30 + ["c"] * 10
    examples = [Example(f"{n}?", answer) for n, answer in enumerate(answers)] * 20
    pairs = preferences(examples, lambda answer, right: float(answer.strip() == right), seed=0)
    # Of answers drawn evenly it would be 75 %: half of the pairs against the one, half against the other.
    assert told_by_frequency(pairs, examples) == pytest.approx(0.6 + 0.3 * 0.1 / 0.7, abs=0.02)


def test_rewards_do_not_depend_on_what_is_scored_beside(sums: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    run = alignment(sums, "reward")
    model, _ = run.train(0.02, 3)
    together = run._rewards(model, run.sides[0])
    monkeypatch.setattr(rlhf, "REWARDED_TOGETHER", 1)
    assert together == pytest.approx(run._rewards(model, run.sides[0]), abs=1e-5)
    assert len(set(together)) > 1


def test_examples_with_one_answer_give_no_preference() -> None:
    alike = [Example("Question: 1?\nAnswer:", "1")] * 3
    with pytest.raises(
        LabError, match=r"preferences need two different answers; 3 examples have one\. Take more examples\."
    ):
        preferences(alike, lambda answer, right: float(answer == right), seed=0)


def test_a_task_without_a_verifier_is_named() -> None:
    example = [Example("Question", "right")]
    with pytest.raises(LabError, match=r"task 'keepers_log' has no verifier: it is the lab's own. Choose a task of"):
        verifier(KEEPERS_LOG, example)
    with pytest.raises(LabError, match=r"task 'hub' has no verifier: it is not reasoning-gym's."):
        verifier("hub", example)
    with pytest.raises(
        LabError, match=r"task 'countdown' cannot be verified by its answers alone: a right one is worth"
    ):
        verifier("countdown", example)


def test_a_pair_is_encoded_as_the_task_is(sums: Workspace) -> None:
    run = alignment(sums, "reward")
    example = run.held_out[0]
    assert run.sides[0][0] == encode(run.tokenizer, example.prompt, example.completion)
