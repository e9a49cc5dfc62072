"""The judge of where training starts, on made-up curves: when a loss is reached, what never arriving means, the controls."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from experiments import pretrained_start
from experiments.pretrained_start import EXPERIMENT, PAYS, arrival, race, target_of
from lab.claims import Evidence, MissingEvidence, judge
from lab.errors import LabError
from lab.params import Profile, load_params
from lab.records import Record
from lab.specs import Start, Sweep, TrialSpec
from tests.conftest import ROOT
from tests.test_records import make_record

CLAIM = EXPERIMENT.claims[0]
BLIND = 10.0
BUDGET, POINTS, PATIENCE, SEEDS = 20, 4, 3, 5


def falling(settings: Start, floor: float, updates: float) -> list[float]:
    """A curve that falls on a straight line from a blind guess to the floor, which it reaches after so many updates."""
    step = settings.updates / settings.evaluations
    return [BLIND - (BLIND - floor) * min(1.0, n * step / updates) for n in range(settings.evaluations + 1)]


def record(
    task: str, start: str, seed: int, losses: Sequence[float] | None = None, needs: float = 20, rate: float = 1e-3
) -> Record:
    times = PATIENCE if start == "random" else 1
    settings = Start.model_validate(
        {
            "model": "tiny",
            "task": task,
            "start": start,
            "updates": BUDGET * times,
            "evaluations": POINTS * times,
            "seed": seed,
            "learning_rate": rate,
        }
    )
    name = f"{task}-{start}-{seed}-{rate:g}".replace("_", "-")
    spec = TrialSpec(experiment="pretrained_start", name=name, arm=f"{task}-{start}", settings=settings)
    curve = list(losses or falling(settings, 1.0, needs))
    places = [BUDGET // POINTS * n for n in range(len(curve))]
    series: dict[str, list[float | None]] = {
        "curve_update": [float(place) for place in places],
        "curve_tokens": [100.0 * place for place in places],
        "curve_test_loss": list(curve),
    }
    figures = {"blind_loss": BLIND, "validation_loss": curve[-1], "test_loss": curve[-1], "test_accuracy": 0.5}
    return make_record(spec, figures=figures, series=series, tags={"data_order": f"seed {seed}"})


def runs(task: str, random: float, pretrained: float = 20, permuted: float = 60, seeds: int = SEEDS) -> list[Record]:
    """A task on which each start comes to the floor after so many updates, seeds a hundredth apart."""
    needs = {"pretrained": pretrained, "random": random, "permuted": permuted}
    return [
        record(task, start, seed, needs=updates * (1 + 0.01 * (seed - 2) * (start == "random")))
        for start, updates in needs.items()
        for seed in range(seeds)
    ]


def verdict(found: list[Record]) -> Any:
    return judge(EXPERIMENT, CLAIM, "cpu", "cpu", found, len(found))


def made_up_figures(spec: TrialSpec) -> dict[str, Any]:
    """What a trial leaves: a curve that falls, from random weights in three times the updates."""
    settings = spec.settings
    assert isinstance(settings, Start)
    points = range(settings.evaluations + 1)
    updates = [settings.updates * n / settings.evaluations for n in points]
    losses = [7.0 - 6.0 * n / settings.evaluations for n in points]
    return {
        **dict.fromkeys(("validation_loss", "test_loss", "seconds_per_update"), 1.0),
        **dict.fromkeys(("validation_accuracy", "test_accuracy"), 0.5),
        "vocabulary": 1000.0,
        "blind_loss": 7.0,
        "train_loss": losses,
        "curve_update": updates,
        "curve_tokens": [100 * update for update in updates],
        "curve_test_loss": losses,
        "curve_test_accuracy": [0.5 for _ in points],
    }


def test_it_is_supported_where_random_weights_need_far_more_updates_on_every_task() -> None:
    found = verdict([*runs("near", 55), *runs("far", 50)])
    assert found.verdict == "supported"
    assert found.effect == pytest.approx(2.5, rel=0.01)
    assert (found.unit, found.n) == ("times the updates from random weights, where least", 5)
    assert "near: 2.8 [" in found.because
    assert "never arrived" not in found.because
    said = "permuted weights as the pretrained: refuted, a random start that never arrives: supported, "
    assert found.control == said + "a random start that is there as soon: refuted"


def test_it_is_refuted_where_random_weights_are_nearly_as_fast_on_every_task() -> None:
    assert verdict([*runs("near", 30), *runs("far", 20)]).verdict == "refuted"


def test_it_is_conditional_where_it_pays_on_one_task_alone_and_names_that() -> None:
    found = verdict([*runs("near", 55), *runs("far", 22)])
    assert found.verdict == "conditional"
    assert found.because.startswith("it pays on near; far: ")
    assert found.effect == pytest.approx(1.1, rel=0.1)
    assert found.flips.startswith("it pays on near: random takes 2.8 [")
    assert "] times the updates; it does not on far: random takes 1.2 [" in found.flips


def test_it_tells_what_the_tasks_have_in_common_with_what_was_read_where_it_flips() -> None:
    found = verdict([*there_at_once("leg_counting", 50), *runs("aiw_siblings", 22)])
    assert found.flips.startswith(
        "it pays on leg_counting (read in pretraining): pretrained is there at once; it does not on aiw_siblings (alike in form "
        "alone): random takes 1.2 ["
    )
    assert verdict([*runs("near", 55), *runs("far", 50)]).flips == ""
    assert "it is undecided on far: random takes" in verdict([*runs("near", 55), *runs("far", 20 * PAYS)]).flips


def test_every_task_of_a_profile_is_told_by_what_it_has_in_common_with_what_was_read() -> None:
    arms = set()
    for profile in load_params(ROOT / "params.yaml").profiles.values():
        plan = EXPERIMENT.plan(profile, "here")
        arms |= {item.then[0].arm.rpartition("-")[0] for item in plan if isinstance(item, Sweep)}
    assert arms == pretrained_start.KIN.keys()


def test_the_scope_leaves_what_full_alone_tries_to_full() -> None:
    assert "read in pretraining and alike in form (" in CLAIM.scope
    assert CLAIM.scope.endswith(
        "in the profile full also a task that is unlike, and a model that has read the web (smol)"
    )


def test_at_the_threshold_nothing_is_decided() -> None:
    assert verdict([*runs("near", 20 * PAYS), *runs("far", 20 * PAYS)]).verdict == "inconclusive"
    assert verdict(runs("near", 55, seeds=1)).verdict == "inconclusive"


def test_a_random_start_that_never_arrives_needs_at_least_its_budget() -> None:
    stuck = [record("near", "random", seed, [BLIND - 0.1 * n for n in range(13)]) for seed in range(SEEDS)]
    found = race(Evidence([r for r in runs("near", 30) if r.spec.arm != "near-random"] + stuck), "near", 0.95)
    assert found.unreached == SEEDS
    # 60 updates over the 19 that the pretrained start takes to 95 % of the way.
    assert found.updates.estimate == pytest.approx(60 / 19)
    assert found.answer == "yes"
    assert "at least 3.2" in str(found)
    assert "(5 of 5 never arrived)" in str(found)


def test_one_that_never_arrived_keeps_the_answer_from_being_no() -> None:
    late = [record("near", "random", seed, [BLIND] * 13) for seed in range(1)]
    soon = [record("near", "random", seed, needs=1 + seed / 100) for seed in range(1, 30)]
    pretrained = [record("near", "pretrained", seed) for seed in range(30)]
    found = race(Evidence([*pretrained, *late, *soon]), "near", 0.95)
    assert found.updates.high < PAYS
    assert found.answer == "undecided"


def test_the_target_is_most_of_the_way_from_a_blind_guess_to_where_the_pretrained_start_ends() -> None:
    assert target_of(record("near", "pretrained", 0)) == pytest.approx(10 - 0.95 * 9)


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ([9, 5, 1], 5.0),
        ([9, 7, 3], 7.5),
        ([4, 3, 2], 0.0),
        ([9, 8, 7], None),
        ([9, 4, 9], 4.0),
        ([9, 9, 5], 10.0),
    ],
)
def test_a_loss_is_reached_on_the_line_between_two_points(losses: list[float], expected: float | None) -> None:
    found = record("near", "pretrained", 0, losses)
    assert arrival(found, 5.0) == (None if expected is None else pytest.approx(expected))
    tokens = arrival(found, 5.0, "curve_tokens")
    assert tokens == (None if expected is None else pytest.approx(100 * expected))


def there_at_once(task: str, random: float) -> list[Record]:
    """A task whose pretrained start needs no update, and random weights so many."""
    there = [record(task, "pretrained", seed, [1.0] * 5) for seed in range(SEEDS)]
    return [*there, *(record(task, "random", seed, needs=random + seed) for seed in range(SEEDS))]


def test_where_pretrained_weights_are_there_at_once_no_ratio_is_told_and_the_random_run_alone_decides() -> None:
    found = race(Evidence(there_at_once("near", 50)), "near", 0.95)
    assert found.answer == "yes"
    assert "times" not in str(found)
    assert str(found).startswith(
        "pretrained is at 1.5 nats at once, so that there is no ratio; random weights after 47 to 52 of 60"
    )
    assert str(found).endswith("and the 1.00 of pretrained before training they reach too")
    as_soon = [record("near", "random", seed, [BLIND, *[0.0] * 12]) for seed in range(SEEDS)]
    assert race(Evidence([*there_at_once("near", 50)[:SEEDS], *as_soon]), "near", 0.95).answer == "no"


def test_random_weights_that_never_come_to_what_pretrained_ones_have_at_once_are_told_with_their_budget() -> None:
    found = race(Evidence(there_at_once("near", 500)), "near", 0.95)
    assert (found.answer, found.unreached) == ("yes", SEEDS)
    assert (
        "random weights not by the end of 60 updates, and the 1.00 of pretrained before training they never reach"
        in str(found)
    )


def test_a_task_without_a_ratio_is_no_part_of_the_effect() -> None:
    mixed = verdict([*there_at_once("near", 50), *runs("far", 55)])
    assert mixed.verdict == "supported"
    assert mixed.effect == pytest.approx(2.75, rel=0.01)
    alone = verdict(there_at_once("near", 50))
    assert (alone.verdict, alone.effect, alone.n) == ("supported", None, 0)


def test_each_start_has_the_rate_that_its_validation_loss_chose() -> None:
    slow = [record("near", "pretrained", seed, [BLIND] * 5, rate=1e-4) for seed in range(SEEDS)]
    found = verdict([*runs("near", 55), *slow])
    assert found.verdict == "supported"
    assert "pretrained at 0.001 (at the edge of its grid) ends at 1" in found.because


def test_runs_that_saw_other_batches_are_no_pair() -> None:
    found = runs("near", 55)
    found[0] = found[0].model_copy(update={"tags": {"data_order": "other"}})
    with pytest.raises(LabError, match=r"near: the runs of seed 0 saw other batches\. Run: lab run pretrained_start"):
        race(Evidence(found), "near", 0.95)
    assert verdict(found).verdict == "inconclusive"


def test_without_a_pair_there_is_no_race() -> None:
    apart = [record("near", "pretrained", 0), record("near", "random", 1)]
    with pytest.raises(MissingEvidence, match="near: no seed was run from both starts"):
        race(Evidence(apart), "near", 0.95)


def test_the_curves_are_means_over_the_seeds() -> None:
    lines = pretrained_start.curve_lines(Evidence(runs("near", 55)))
    assert list(lines) == ["near, pretrained", "near, random", "near, permuted"]
    assert list(lines["near, pretrained"].x) == [0, 5, 10, 15, 20]
    assert lines["near, pretrained"].y[-1] == pytest.approx(1.0)


@pytest.mark.parametrize("name", ["cpu", "full"])
def test_the_random_start_gets_more_updates_and_the_same_points_and_rates(name: str) -> None:
    profile: Profile = load_params(ROOT / "params.yaml").profiles[name]
    plan = EXPERIMENT.plan(profile, "here")
    sweeps = {item.then[0].arm: item for item in plan if isinstance(item, Sweep)}
    tasks = ("leg_counting", "aiw_siblings", *["keepers_log", "smol-family"] * (name == "full"))
    assert len(sweeps) == len(plan) == len(pretrained_start.STARTS) * len(tasks)
    for task in tasks:
        assert len({sweeps[f"{task}-{start}"].rates for start in pretrained_start.STARTS}) == 1
        first, other = (sweeps[f"{task}-{start}"].then[0].settings for start in ("pretrained", "random"))
        assert isinstance(first, Start)
        assert isinstance(other, Start)
        assert other.updates == 3 * first.updates > PAYS * first.updates
        assert other.updates / other.evaluations == first.updates / first.evaluations
        assert first.schedule == other.schedule == "constant"
        assert len(sweeps[f"{task}-pretrained"].tried) == len(sweeps[f"{task}-random"].tried)
        assert len(sweeps[f"{task}-random"].then) >= (3 if first.model == "smol" else 5)
        assert first.model == other.model == ("smol" if task == "smol-family" else "tiny")
        assert first.task == task.removeprefix("smol-")
