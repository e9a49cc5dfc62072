"""The judge of in-context learning against a tuned model, on made-up records."""

from __future__ import annotations

import math
from typing import Any

import pytest

from experiments.in_context import EXPERIMENT, accuracy_lines, break_even, judge, second_lines, table, token_lines
from lab.claims import Evidence, Finding
from lab.claims import judge as judge_claim
from lab.records import Record
from lab.specs import InContext, TrialSpec
from tests.test_claims import in_context_figures
from tests.test_records import make_record

(CLAIM,) = EXPERIMENT.claims


def record(seed: int, model: str = "tiny", **figures: float) -> Record:
    """The best number of examples is 4, which answers 0.3 (none 0.1); tuned 0.9; 5 times its time, twice with a cache."""
    settings = InContext(model=model, task="aiw_siblings", method="lora", updates=1, shots=(1, 4), seed=seed)
    arm = f"{model}-lora"
    spec = TrialSpec(experiment="in_context", name=f"{arm}-seed{seed}", arm=arm, settings=settings)
    best = {"icl_best_shots": 4.0, "icl_best_accuracy": 0.3, "icl4_accuracy": 0.3}
    return make_record(spec, figures={**in_context_figures(settings), **best, **figures})


def evidence(model: str = "tiny", seeds: int = 3, **figures: float) -> list[Record]:
    """One record per seed, whose accuracies differ a little."""
    tuned = figures.pop("tuned_accuracy", 0.9)
    return [record(seed, model, tuned_accuracy=tuned + 0.01 * seed, **figures) for seed in range(seeds)]


def judged(*records: list[Record]) -> Finding:
    return judge(Evidence([r for part in records for r in part]))


def test_better_and_quicker_both_ways_is_support() -> None:
    found = judged(evidence(), evidence("smol"))
    assert found.verdict == "supported"
    assert found.effect == pytest.approx(61)
    assert found.n == 3
    assert (
        "tuned 0.91, 4 examples 0.30 (none 0.10 at 1.00 x the tuned model's time, the commonest answer 0.10);"
        in found.because
    )
    assert "examples read anew: 5.00 [5.00, 5.00] x the tuned model's time per answer, quicker yes" in found.because
    assert "training made up for after 12 [12, 12] answers; examples' cache kept: 2.00" in found.because
    assert "by FLOPs after 250 [250, 250] answers" in found.because


@pytest.mark.parametrize("accuracy", [0.2, 0.26])
def test_without_the_margin_in_quality_it_is_refuted_whatever_the_cost(accuracy: float) -> None:
    assert judged(evidence(tuned_accuracy=accuracy)).verdict == "refuted"


def test_no_slower_is_refuted_whatever_the_quality() -> None:
    found = judged(evidence(icl4_seconds=0.1, icl4_cached_seconds=0.1))
    assert found.verdict == "refuted"
    assert "after never [never, never] answers" in found.because


def test_quicker_only_where_the_examples_are_read_anew_is_conditional() -> None:
    assert judged(evidence(icl4_cached_seconds=0.105)).verdict == "conditional"


def test_where_no_number_of_examples_helps_there_is_nothing_to_compare_the_cost_with() -> None:
    found = judged(evidence(icl0_accuracy=0.29))
    assert found.verdict == "inconclusive"
    assert (
        "nothing to compare: no number of examples helps (the best by 1.0 [1.0, 1.0] points over none)" in found.because
    )
    assert judged(evidence(icl0_accuracy=0.29, icl4_seconds=0.1, icl4_cached_seconds=0.1)).verdict == "inconclusive"
    assert judged(evidence(icl0_accuracy=0.29, tuned_accuracy=0.2)).verdict == "refuted"
    assert judged(evidence(icl0_accuracy=0.29), evidence("smol")).verdict == "inconclusive"


def test_one_model_of_two_is_conditional() -> None:
    assert judged(evidence(), evidence("smol", tuned_accuracy=0.2)).verdict == "conditional"


def test_an_interval_on_both_sides_of_a_margin_decides_nothing() -> None:
    spread = [record(seed, tuned_accuracy=accuracy) for seed, accuracy in enumerate((0.2, 0.4, 0.6))]
    assert judged(spread).verdict == "inconclusive"
    assert judged(evidence(), [record(0, "smol"), *spread]).verdict == "inconclusive"
    noisy = [record(seed, icl4_seconds=0.1 * x, icl4_cached_seconds=0.1 * x) for seed, x in enumerate((0.8, 1.2, 1.6))]
    assert judged(noisy).verdict == "inconclusive"
    assert judged(evidence(seeds=1)).verdict == "inconclusive"


def test_break_even_is_training_over_what_an_answer_saves_and_open_where_that_may_be_nothing() -> None:
    assert break_even(evidence(), "seconds").estimate == pytest.approx(5.0 / 0.4)
    mixed = [record(seed, icl4_seconds=0.1 + saved) for seed, saved in enumerate((-0.1, 0.2, 0.5))]
    found = break_even(mixed, "seconds")
    assert found.estimate == pytest.approx(5.0 / 0.2)
    assert 0 < found.low < found.estimate
    assert found.high == math.inf


@pytest.mark.parametrize(
    ("figures", "verdict", "answers"),
    [
        ({}, "supported", ("refuted", "refuted", "supported")),
        ({"icl4_cached_seconds": 0.1}, "conditional", ("refuted", "refuted", "supported")),
        ({"tuned_accuracy": 0.2}, "refuted", ("refuted", "refuted", "supported")),
    ],
)
def test_every_verdict_has_a_control_that_is_judged_otherwise(
    figures: dict[str, Any], verdict: str, answers: tuple[str, ...]
) -> None:
    records = evidence(**figures)
    found = judge_claim(EXPERIMENT, CLAIM, "cpu", "cpu", records, len(records))
    assert found.verdict == verdict
    assert found.control == ", ".join(f"{n}: {a}" for n, a in zip(CLAIM.controls, answers, strict=True))


def test_the_plot_has_a_curve_and_a_level_line_for_each_model() -> None:
    lines = accuracy_lines(Evidence([*evidence(), *evidence("smol")]))
    assert list(lines) == ["tiny, in context", "tiny, tuned by lora", "smol, in context", "smol, tuned by lora"]
    assert lines["tiny, in context"].x == [0, 1, 4]
    assert lines["tiny, in context"].y == pytest.approx([0.1, 0.1, 0.3])
    assert lines["smol, tuned by lora"].y == pytest.approx([0.91, 0.91])


def test_the_plots_of_cost_have_a_curve_for_each_way_and_a_level_line() -> None:
    found = Evidence([*evidence(icl4_seconds=0.7), *evidence("smol")])
    tokens, seconds = token_lines(found), second_lines(found)
    assert list(tokens) == ["tiny", "smol"]
    assert tokens["tiny"].x == [0, 1, 4]
    assert tokens["tiny"].y == pytest.approx([10, 20, 50])
    ways = ("examples read anew", "examples' cache kept", "tuned by lora")
    assert list(seconds) == [f"{model}, {way}" for model in ("tiny", "smol") for way in ways]
    assert seconds["tiny, examples read anew"].y == pytest.approx([0.1, 0.2, 0.7])
    assert seconds["tiny, examples' cache kept"].y == pytest.approx([0.1, 0.125, 0.2])
    assert seconds["smol, examples read anew"].y == pytest.approx([0.1, 0.2, 0.5])
    assert seconds["smol, tuned by lora"].y == pytest.approx([0.1, 0.1])


def test_the_table_has_a_row_for_every_number_of_examples_and_for_the_tuned_model() -> None:
    slow = Evidence([*evidence(icl4_seconds=0.7, icl4_prompt_tokens=51.0), *evidence("smol", tuned_accuracy=0.4)])
    assert table(slow) == [
        "| tiny | 0 | 0.10 | 10 | 100.00 | 100.00 |",
        "| tiny | 1 | 0.10 | 20 | 200.00 | 125.00 |",
        "| tiny | 4 | 0.30 | 51 | 700.00 | 200.00 |",
        "| tiny | 0, tuned by lora | 0.91 | 10 | 100.00 | - |",
        "| smol | 0 | 0.10 | 10 | 100.00 | 100.00 |",
        "| smol | 1 | 0.10 | 20 | 200.00 | 125.00 |",
        "| smol | 4 | 0.30 | 50 | 500.00 | 200.00 |",
        "| smol | 0, tuned by lora | 0.41 | 10 | 100.00 | - |",
    ]


def test_a_number_of_examples_that_one_seed_has_not_is_in_no_plot_and_no_table() -> None:
    records = evidence()
    left = {n: v for n, v in records[0].figures.items() if not n.startswith("icl1_")}
    without = Evidence([records[0].model_copy(update={"figures": left}), *records[1:]])
    assert [row.split("|")[2].strip() for row in table(without)] == ["0", "4", "0, tuned by lora"]
    for lines in (accuracy_lines, token_lines, second_lines):
        assert next(iter(lines(without).values())).x == [0, 4]
