"""The judge of trl's trainers, on made-up records: what is lacking, what does not move, and both controls."""

from __future__ import annotations

from typing import Any

import pytest

from experiments import rlhf
from experiments.rlhf import LEAST, NAMED, OTHERS, Params, TrainerParams
from lab.claims import Evidence, Verdict, judge
from lab.errors import LabError
from lab.params import Profile, parse
from lab.records import Record
from lab.specs import Rlhf, TrialSpec
from tests.test_records import make_record

CLAIM = rlhf.EXPERIMENT.claims[0]
ALL = (*NAMED, *OTHERS)
SPREAD = (0.0, 0.002, -0.002, 0.001, -0.001)


def made_up_figures(spec: TrialSpec) -> dict[str, Any]:
    """Every figure and series that a trial of this experiment leaves."""
    settings = spec.settings
    assert isinstance(settings, Rlhf)
    if settings.trainer == "ppo":
        return {"present": 0.0}
    after = 0.8 + 0.001 * settings.seed
    figures: dict[str, Any] = {"present": 1.0, "train_loss": [0.7, 0.6], "train_reward": [0.1, 0.2]}
    for name in ("objective", "margin", "accuracy"):
        figures |= {f"{name}_before": 0.5, f"{name}_control": 0.5, f"{name}_after": after}
    return figures | {"unread": 0.5}


def record(trainer: str, seed: int, rise: float | None) -> Record:
    """A trial whose objective rises so much; None: the trainer is lacking."""
    settings = Rlhf.model_validate({"model": "tiny", "task": "t", "trainer": trainer, "updates": 1, "seed": seed})
    spec = TrialSpec(experiment="rlhf", name=f"{trainer}-seed{seed}", arm=trainer, settings=settings)
    figures: dict[str, float | None] = {"present": 0.0}
    if rise is not None:
        after = 0.5 + rise + SPREAD[seed]
        figures = {"present": 1.0, "objective_control": 0.5, "objective_after": after, "unread": 0.5}
        if trainer != "reward":
            figures |= {"accuracy_control": 0.4, "accuracy_after": after}
    return make_record(spec, figures=figures)


def records(seeds: int = 5, **rises: float | None) -> list[Record]:
    chosen: dict[str, float | None] = {**dict.fromkeys(ALL, 0.2), "ppo": None, **rises}
    return [record(trainer, seed, rise) for trainer, rise in chosen.items() for seed in range(seeds)]


def verdict(found: list[Record]) -> Verdict:
    return judge(rlhf.EXPERIMENT, CLAIM, "cpu", "cpu", found, len(found))


def test_without_ppo_it_is_conditional_and_says_so() -> None:
    found = verdict(records())
    assert found.verdict == "conditional"
    assert (found.effect, found.low, found.high, found.n) == (3, 3, 3, 5)
    assert "it has no PPO trainer" in found.because
    assert "DPO rises by 0.2" in found.because
    assert "GRPO rises by 0.2" in found.because
    assert found.control == "no update presented as trained: refuted, every trainer there and moving: supported"


def test_with_ppo_it_is_supported_and_the_control_refutes() -> None:
    found = verdict(records(ppo=0.2))
    assert found.verdict == "supported"
    assert found.effect == 4
    assert "no update presented as trained: refuted" in found.control


def test_it_is_refuted_where_nothing_named_moves_and_the_other_control_supports() -> None:
    found = verdict(records(sft=0.0, reward=0.0, dpo=-0.1))
    assert found.verdict == "refuted"
    assert "SFT does not rise enough" in found.because
    assert "every trainer there and moving: supported" in found.control


def test_a_rise_that_is_smaller_than_the_least_is_none() -> None:
    assert rlhf.judge(Evidence(records(sft=0.0, reward=LEAST - 0.02, dpo=0.0))).verdict == "refuted"
    assert rlhf.judge(Evidence(records(sft=0.0, reward=LEAST + 0.02, dpo=0.0))).verdict == "conditional"


def test_what_the_seeds_do_not_decide_is_counted_as_possible() -> None:
    found = rlhf.judge(Evidence(records(ppo=0.2, reward=LEAST)))
    assert (found.verdict, found.effect, found.high) == ("inconclusive", 3, 4)
    assert "reward model is undecided" in found.because


def test_the_trainers_that_the_lecture_does_not_name_are_reported_and_decide_nothing() -> None:
    found = rlhf.judge(Evidence(records(ppo=0.2, kto=0.0, grpo=None)))
    assert found.verdict == "supported"
    assert "KTO does not rise enough" in found.because
    assert "it has no GRPO trainer" in found.because


def test_intervals_hold_together_for_all_trainers_that_are_there() -> None:
    alone = rlhf._rise(records()[:5], 1)
    together = rlhf._rise(records()[:5], 6)
    assert together.low < alone.low < 0.2 < alone.high < together.high


def test_greedy_answers_that_get_worse_while_the_objective_rises_are_told() -> None:
    worse = {"accuracy_control": 0.2, "accuracy_after": 0.05}
    found = [
        r.model_copy(update={"figures": r.figures | worse}) if r.spec.arm == "dpo" else r for r in records(ppo=0.2)
    ]
    told = rlhf.judge(Evidence(found))
    assert told.verdict == "supported"
    assert "greedy answers right 20% before and 5% after" in told.because
    assert told.because.count("greedy") == 6


def test_what_needs_no_question_is_no_sign_of_reading_it() -> None:
    def learnt(r: Record) -> dict[str, float | None]:
        """RLOO ends at the commonest answer in each seed, the reward model at what is commoner; GRPO near it."""
        changes = {"rloo": {"accuracy_after": 0.5}, "reward": {"unread": 0.75}, "grpo": {"unread": 0.7}}
        return dict(changes.get(r.spec.arm, {}))

    said = rlhf.judge(Evidence(records()).with_figures(learnt)).because
    assert (
        "shown to have read the question, by pairs or by answers right: SFT 70% where 50% need none, DPO 70% where "
        "50% need none, KTO 70% where 50% need none; not shown: reward model 70% where 75% need none, "
        "RLOO 50% where 50% need none, GRPO 70% where 70% need none"
    ) in said


def test_the_plot_has_a_line_for_each_trainer_that_is_there() -> None:
    lines = rlhf.rise_lines(Evidence(records()))
    assert list(lines) == ["SFT", "reward model", "DPO", "KTO", "RLOO", "GRPO"]
    assert lines["DPO"].y[1] == pytest.approx(0.2)


PARAMS: dict[str, Any] = {
    "model": "tiny",
    "task": "family",
    "seeds": 2,
    "questions": 10,
    "samples": 1,
    "generations": 4,
    "warm_up_updates": 3,
    "warm_up_learning_rate": 1e-3,
    "trainers": {"sft": {"learning_rate": 1e-3, "updates": 5, "micro_batch_size": 6}},
}


def test_every_trainer_is_planned_for_every_seed_from_one_start() -> None:
    both = {name: TrainerParams(learning_rate=1e-3, updates=5, micro_batch_size=8) for name in ("sft", "grpo")}
    params = Params.model_validate({**PARAMS, "trainers": both})
    sizes = {"train": 1, "validation": 1, "test": 1}
    profile = Profile.model_validate({"device": "cpu", "threads": 2, "tiny": {}, "data": sizes})
    specs = rlhf.trials(params, profile)
    assert [spec.name for spec in specs] == ["sft-seed0", "sft-seed1", "grpo-seed0", "grpo-seed1"]
    assert {spec.settings.warm_up_updates for spec in specs} == {3}  # type: ignore[union-attr]
    assert specs[0].models() == {"tiny"}
    assert specs[0].tasks() == ["family"]


def test_a_batch_that_holds_half_a_group_is_refused() -> None:
    raw = {**PARAMS, "trainers": {"rloo": {"learning_rate": 1e-3, "updates": 5, "micro_batch_size": 6}}}
    with pytest.raises(LabError, match=r"trainers.rloo.micro_batch_size is 6; it must be a multiple of generations, 4"):
        parse(Params, raw, "params.yaml: profiles.cpu.rlhf")
    assert parse(Params, PARAMS, "here").trainers["sft"].micro_batch_size == 6
