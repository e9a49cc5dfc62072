"""What the judge makes of curves that are known: where they flatten, what a share is, and its controls."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest

from experiments import little_data
from experiments.little_data import EXPERIMENT, MARGIN, Params, judge_little, size_at, trials
from lab.claims import Evidence, Finding, MissingEvidence, judge
from lab.errors import LabError
from lab.params import DataSizes, Profile
from lab.records import Record
from lab.specs import Sweep, Training, TrialSpec
from tests.test_records import make_record

CLAIM = EXPERIMENT.claims[0]
SIZES = (15, 30, 60, 120, 240, 480, 960, 1920)
SEEDS = 5
RATE = 1e-3

Curve = Callable[[int], float]


def record(rows: int | None, accuracy: float, seed: int = 0, rate: float = RATE, method: str = "full") -> Record:
    """A run with this test accuracy; without rows the base."""
    arm = "tiny-base" if rows is None else f"tiny-{method}"
    settings = Training(
        model="tiny",
        task="aiw_siblings",
        method=method,
        updates=120 if rows else 0,
        micro_batch_size=16,
        examples=rows,
        seed=seed,
        learning_rate=rate,
    )
    spec = TrialSpec(experiment="little_data", name=f"{arm}-{rows or 0}-{seed}-{rate:g}", arm=arm, settings=settings)
    figures = {"test_accuracy": accuracy, "validation_accuracy": accuracy, "validation_loss": 1.5 - accuracy}
    return make_record(spec, figures=figures, series={"train_loss": [2.0] + [0.5] * little_data.LAST_UPDATES})


def evidence(curve: Curve, base: float = 0.0, spread: float = 0.001, seeds: int = SEEDS) -> Evidence:
    """Every number of rows and seed, the seeds apart by `spread`, and two rates on all rows that are worse."""
    found = [record(None, base)]
    found += [
        record(rows, curve(rows) + spread * seed * (-1) ** place, seed)
        for place, rows in enumerate(SIZES)
        for seed in range(seeds)
    ]
    found += [record(SIZES[-1], 0.1, seed, rate) for rate in (3e-4, 3e-3) for seed in range(2)]
    return Evidence(found)


def flat_after(rows: int) -> Curve:
    return lambda size: 0.9 if size >= rows else 0.9 - 0.1 * math.log2(rows / size)


def judged(found: Evidence) -> Finding:
    return judge_little(found)


@pytest.mark.parametrize(
    ("rows", "verdict"),
    [(15, "supported"), (120, "supported"), (240, "conditional"), (960, "conditional"), (1920, "refuted")],
)
def test_the_verdict_follows_from_where_the_curve_flattens(rows: int, verdict: str) -> None:
    finding = judged(evidence(flat_after(rows)))
    assert finding.verdict == verdict
    assert finding.effect == pytest.approx(rows)
    assert finding.n == SEEDS


def test_a_larger_number_of_rows_that_is_worse_is_no_support() -> None:
    assert judged(evidence(lambda rows: 0.5 if rows == 480 else 0.9)).verdict == "inconclusive"


def test_seeds_that_spread_decide_nothing() -> None:
    assert judged(evidence(flat_after(120), spread=0.04)).verdict == "inconclusive"
    assert judged(evidence(flat_after(120), seeds=1)).verdict == "inconclusive"


def test_a_gap_within_the_margin_is_not_missed_and_one_beyond_it_is() -> None:
    assert judged(evidence(lambda rows: 0.9 - (MARGIN - 0.02) * (rows < 1920))).verdict == "supported"
    assert judged(evidence(lambda rows: 0.9 - (MARGIN + 0.02) * (rows < 1920))).verdict == "refuted"


def test_a_flat_curve_of_a_model_that_learnt_nothing_supports_nothing() -> None:
    finding = judged(evidence(lambda rows: 0.3, base=0.3))
    assert finding.verdict == "inconclusive"
    assert finding.because.startswith("all rows teach nothing")


def test_the_reasons_name_the_judged_number_the_accuracies_and_the_gap_between_the_losses() -> None:
    because = judged(evidence(flat_after(240))).because
    assert because.startswith("judged at 120 rows: -10.0 [")
    assert "full at 0.001: accuracy by rows 15: 0.5" in because
    assert "validation loss less training loss by rows 15: 0.5" in because


def test_without_a_run_on_all_rows_there_is_nothing_to_compare_with() -> None:
    whole = evidence(flat_after(120))
    with pytest.raises(MissingEvidence, match="full: no successful record with 1920 rows"):
        judged(Evidence([r for r in whole.records if r.setting("examples") != 1920]))


def test_the_interval_of_where_it_flattens_stays_within_what_was_tried() -> None:
    found = evidence(lambda rows: 0.9)
    last = [record(rows, 0.9 if rows >= 960 else 0.5, SEEDS) for rows in SIZES]
    records = little_data.curve(Evidence([*found.records, *last]), "full")
    flat = little_data.flat_from(records)
    assert flat.estimate == pytest.approx(15 * 64 ** (1 / 6))
    assert (flat.low, flat.n) == (pytest.approx(15), 6)
    assert flat.high <= 1920


def test_a_share_is_rounded_down_to_a_number_that_was_tried() -> None:
    assert size_at(SIZES, little_data.LIMA_SHARE) == 120
    assert size_at(SIZES, little_data.HALF) == 960
    assert size_at([480, 1920], little_data.LIMA_SHARE) == 480


@pytest.mark.parametrize(("rows", "verdict"), [(60, "supported"), (240, "conditional"), (1920, "refuted")])
def test_every_verdict_stands_against_a_control(rows: int, verdict: str) -> None:
    found = evidence(flat_after(rows)).records
    assert judge(EXPERIMENT, CLAIM, "cpu", "cpu", found, len(found)).verdict == verdict


def test_each_control_is_judged_as_what_it_is() -> None:
    found = evidence(flat_after(60))
    answers = {name: judged(control.change(found)).verdict for name, control in CLAIM.controls.items()}
    assert answers == {
        "the fewest rows as the judged number": "conditional",
        "the fewest rows as all but the most": "refuted",
        "all rows at every number": "supported",
        "a base that knew it all": "inconclusive",
    }


def test_another_method_is_reported_and_not_judged() -> None:
    lora = [record(rows, 0.4 if rows < 1920 else 0.9, seed, 1e-2, "lora") for rows in SIZES for seed in range(SEEDS)]
    both = Evidence([*evidence(flat_after(60)).records, *lora])
    finding = judged(both)
    assert finding.verdict == "supported"
    assert "lora at 0.01" in finding.because
    assert list(little_data.accuracy_lines(both)) == ["full", "lora", "base"]


def profile(train: int) -> Profile:
    return Profile(device="cpu", threads=2, tiny={}, data=DataSizes(train=train, validation=1, test=1))


PARAMS = Params(
    task="gcd",
    seeds=3,
    sweep_seeds=2,
    updates=10,
    micro_batch_size=8,
    halvings=2,
    questions=5,
    methods={"full": (1e-3,)},
)


def test_the_numbers_of_rows_are_all_that_the_updates_see_and_its_halves() -> None:
    base, sweep = trials(PARAMS, profile(80))
    assert isinstance(sweep, Sweep)
    assert isinstance(base, TrialSpec)
    assert [spec.settings.examples for spec in sweep.then] == [rows for rows in (80, 40, 20) for _ in range(3)]  # type: ignore[union-attr]
    assert {(spec.settings.examples, spec.settings.seed) for spec in sweep.tried} == {(80, 0), (80, 1)}  # type: ignore[union-attr]
    assert {spec.settings.updates for spec in sweep.then} == {10}  # type: ignore[union-attr]


def test_more_rows_than_there_are_is_refused() -> None:
    with pytest.raises(LabError, match=r"10 updates of 8 see 80 rows; data.train is 79. Raise data.train"):
        trials(PARAMS, profile(79))
