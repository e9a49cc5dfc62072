"""The judges of the comparison over methods, on records whose answer is known."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from experiments import peft_vs_full as subject
from lab.claims import Evidence
from lab.errors import LabError
from lab.params import parse
from lab.plots import Plot, draw
from lab.records import Record
from lab.specs import Training, TrialSpec
from tests.test_records import make_record

SEEDS = range(5)
JITTER = (0.0, 0.004, -0.004, 0.002, -0.002)


def record(arm: str, seed: int, rate: float, figures: Mapping[str, float], **curve: list[float]) -> Record:
    method = arm.split("-")[1]
    untrained = method == "base"
    settings = Training(
        model="tiny",
        task="aiw_siblings",
        method="full" if untrained else method,
        learning_rate=rate,
        updates=0 if untrained else 4,
        seed=seed,
    )
    spec = TrialSpec(experiment=subject.NAME, name=f"{arm}-seed{seed}-lr{rate:g}", arm=arm, settings=settings)
    series: Any = {f"curve_{name}": values for name, values in curve.items()}
    return make_record(spec, figures=dict(figures), series=series, tags={"data_order": f"order {seed}"})


def runs(
    method: str, accuracy: float, recall: float, rate: float = 1e-3, off: float | None = None, loss: float = 0.5
) -> list[Record]:
    found = []
    for seed in SEEDS:
        shift = JITTER[seed] * (1 if method == "full" else -1)
        figures = {"test_accuracy": accuracy + shift, "validation_accuracy": accuracy, "recall": recall + shift}
        figures |= {"general_bits_per_byte": 1.0}
        if method != "full":
            figures["off_recall"] = 1.0 if off is None else off
        points = {"validation_loss": [1.0, loss], "recall": [(1 + recall) / 2, recall], "update": [2.0, 4.0]}
        found.append(record(f"tiny-{method}", seed, rate, figures, **points))
    return found


BASE = record(
    "tiny-base",
    0,
    1e-3,
    {"test_accuracy": 0.1, "validation_loss": 1.5, "recall": 1.0, "general_bits_per_byte": 0.9},
    recall=[1.0],
)


def evidence(*groups: list[Record]) -> Evidence:
    return Evidence([BASE, *(record for group in groups for record in group)])


@pytest.mark.parametrize(
    ("lora", "prompt", "verdict"),
    [(0.9, 0.88, "supported"), (0.5, 0.2, "refuted"), (0.9, 0.2, "conditional")],
)
def test_quality_is_kept_within_the_margin(lora: float, prompt: float, verdict: str) -> None:
    found = evidence(runs("full", 0.9, 0.5), runs("lora", lora, 0.5), runs("prompt", prompt, 0.5))
    assert subject.judge_quality(found).verdict == verdict


def test_methods_whose_whole_gap_lies_within_the_margin_on_both_sides_are_equivalent() -> None:
    """Prompt is as close on average and spreads too far; prefix is no worse, and better by more than the margin."""
    spread = [
        r.model_copy(update={"figures": {**r.figures, "test_accuracy": 0.8 + 0.1 * (-1) ** r.setting("seed")}})
        for r in runs("prompt", 0.8, 0.5)
    ]
    found = evidence(runs("full", 0.8, 0.5), runs("lora", 0.79, 0.5), runs("prefix", 0.9, 0.5), spread)
    for judge in (subject.judge_quality, subject.judge_full_quality):
        assert "; equivalent within 5 points: lora on tiny; tiny: base 0.10" in judge(found).because
    apart = evidence(runs("full", 0.8, 0.5), runs("lora", 0.9, 0.5))
    assert "; equivalent within 5 points: none; " in subject.judge_quality(apart).because


def test_full_fine_tuning_may_be_the_worse() -> None:
    worse = evidence(runs("full", 0.5, 0.5), runs("lora", 0.9, 0.5), runs("prompt", 0.8, 0.5))
    assert subject.judge_full_quality(worse).verdict == "refuted"
    assert subject.judge_quality(worse).verdict == "supported"


def test_a_difference_that_spreads_over_the_margin_decides_nothing() -> None:
    spread = [
        r.model_copy(update={"figures": {**r.figures, "test_accuracy": 0.85 + 0.1 * (-1) ** r.setting("seed")}})
        for r in runs("lora", 0.85, 0.5)
    ]
    assert subject.judge_quality(evidence(runs("full", 0.9, 0.5), spread)).verdict == "inconclusive"


def test_a_rate_at_the_edge_is_said() -> None:
    swept = [*runs("lora", 0.5, 0.5, rate=1e-3), *runs("lora", 0.9, 0.5, rate=3e-3)]
    because = subject.judge_quality(evidence(runs("full", 0.9, 0.5), swept)).because
    assert "lora 0.90 (lr 0.003, at the edge of its grid)" in because


def test_other_rows_are_no_pair() -> None:
    other = [r.model_copy(update={"tags": {"data_order": "another"}}) for r in runs("lora", 0.9, 0.5)]
    with pytest.raises(ValueError, match="lora and full did not see the same rows"):
        subject.judge_quality(evidence(runs("full", 0.9, 0.5), other))


@pytest.mark.parametrize(
    ("full", "lora", "verdict"), [(0.2, 0.9, "supported"), (0.9, 0.2, "refuted"), (0.9, 0.9, "refuted")]
)
def test_what_is_forgotten_is_counted_from_the_base(full: float, lora: float, verdict: str) -> None:
    assert subject.judge_forgetting(evidence(runs("full", 0.9, full), runs("lora", 0.9, lora))).verdict == verdict


def test_a_quantised_base_that_knows_less_has_less_to_lose() -> None:
    """QLoRA ends at 0.6 of facts as its 4-bit base began with; full fine-tuning loses 0.4."""
    found = evidence(runs("full", 0.9, 0.6), runs("qlora", 0.9, 0.6, off=0.6))
    assert subject.judge_forgetting(found).verdict == "supported"
    assert subject.judge_forgetting(evidence(runs("full", 0.9, 0.6), runs("qlora", 0.9, 0.6))).verdict == "refuted"


def test_at_equal_loss_the_better_learner_is_asked_earlier() -> None:
    """Full reaches a far lower loss and forgets on the way; at LoRA's loss it had forgotten as little as LoRA."""
    full = [
        r.model_copy(
            update={
                "series": {
                    "curve_validation_loss": [1.0, 0.1],
                    "curve_recall": [0.9, 0.0],
                    "curve_update": [2.0, 4.0],
                }
            }
        )
        for r in runs("full", 0.9, 0.0)
    ]
    found = subject.judge_forgetting(evidence(full, runs("lora", 0.9, 0.8, loss=1.0)))
    assert found.verdict == "conditional"
    assert "yes: lora on tiny at its best rate" in found.because
    assert "no: lora on tiny at equal loss" in found.because


def along(found: list[Record], losses: list[float], recalls: list[float]) -> list[Record]:
    """The runs with these validation losses and recalls at the two points of their curves."""
    series = {"curve_validation_loss": losses, "curve_recall": recalls, "curve_update": [2.0, 4.0]}
    return [r.model_copy(update={"series": {**r.series, **series}}) for r in found]


@pytest.mark.parametrize(
    ("full", "lora"),
    [
        pytest.param([0.5, 0.4], [1.2, 1.2], id="by full fine-tuning"),
        pytest.param([1.2, 1.2], [0.5, 0.4], id="by the method"),
        pytest.param([0.5, 0.4], [1.7, 1.6], id="in the base, by a method that learns nothing"),
        pytest.param([1.7, 1.6], [1.7, 1.6], id="in the base, where neither learns"),
    ],
)
def test_a_loss_that_is_reached_before_the_first_point_of_a_curve_decides_nothing(
    full: list[float], lora: list[float]
) -> None:
    """The line from the base, where nothing was measured, would say 30 points, 100 or none, with no spread over seeds."""
    found = evidence(
        along(runs("full", 0.9, 0.0), full, [0.0, 0.0]), along(runs("lora", 0.9, 1.0, loss=1.2), lora, [1.0, 1.0])
    )
    curves = [subject._curve(found, "tiny", subject._best(found, "tiny", m)[0]) for m in ("full", "lora")]
    loss = max(min(loss for loss, _ in curve) for curve in curves)
    on_the_line = subject._lost_at(curves[0], loss) - subject._lost_at(curves[1], loss)
    assert min(abs(on_the_line - points) for points in (0.3, 1.0, 0.0)) < 1e-9
    judged = subject.judge_forgetting(found)
    assert judged.verdict == "inconclusive"
    assert judged.effect == pytest.approx(100)
    assert "yes: lora on tiny at its best rate; undecided: lora on tiny at equal loss; " in judged.because
    cell = "undecided, since it is reached before the first point of a curve: lora on tiny at equal loss; "
    assert cell in judged.because
    assert "lora on tiny at equal loss " not in judged.because  # no number


def test_one_seed_that_reaches_the_loss_before_a_first_point_leaves_its_cell_undecided() -> None:
    full, lora = runs("full", 0.9, 0.2), runs("lora", 0.9, 0.9)
    assert subject.judge_forgetting(evidence(full, lora)).verdict == "supported"
    early = [*along(lora[:1], [1.4, 1.2], [0.9, 0.9]), *lora[1:]]
    assert subject.judge_forgetting(evidence(full, early)).verdict == "inconclusive"


def test_a_loss_that_is_reached_at_a_first_point_was_measured_there() -> None:
    """Full fine-tuning, which had forgotten all by its first point, and a method that comes just so far."""
    full, lora = (
        along(runs("full", 0.9, 0.0), [1.0, 0.5], [0.0, 0.0]),
        along(runs("lora", 0.9, 1.0), [1.2, 1.0], [1, 1]),
    )
    judged = subject.judge_forgetting(evidence(full, lora))
    assert judged.verdict == "supported"
    assert "before the first point" not in judged.because
    assert "lora on tiny at equal loss 100 [100, 100]" in judged.because


def test_a_loss_between_two_points_is_interpolated() -> None:
    curve = [(2.0, 0.0), (1.0, 0.5), (0.5, 1.0)]
    assert subject._lost_at(curve, 1.5) == pytest.approx(0.25)
    assert subject._lost_at(curve, 0.4) == 1.0


def test_what_the_largest_rate_as_good_would_lose_is_told_and_not_judged() -> None:
    worse, broken = runs("full", 0.5, 0.0, rate=1e-1), runs("full", 0.9, 0.0, rate=3e-2)[:2]
    broken[1] = broken[1].model_copy(update={"status": "diverged"})
    swept = [*runs("full", 0.9, 1.0), *runs("full", 0.88, 0.0, rate=1e-2)[:2], *broken, *worse[:2]]
    found = subject.judge_forgetting(evidence(swept, runs("lora", 0.9, 0.6)))
    assert found.verdict == "refuted"
    assert "recall by rate as good: 0.001: 1.00, 0.01: 0.00" in found.because
    assert "rate as good: tiny would lose full 100 at 0.01 (2 seeds), lora 40 at 0.001 (5 seeds)" in found.because


def test_what_general_text_costs_is_paired_and_counted_from_each_one_s_own_base() -> None:
    """Full fine-tuning rises by 0.3 to 0.7; LoRA, whose base in 4 bits cost 0.2 more to begin with, by 0.1."""

    def costing(found: list[Record], bits: float, off: float | None = None) -> list[Record]:
        step, own = (0.1, {}) if off is None else (0.0, {"off_general_bits_per_byte": off})
        figures = [own | {"general_bits_per_byte": bits + step * (r.setting("seed") - 2)} for r in found]
        return [r.model_copy(update={"figures": {**r.figures, **new}}) for r, new in zip(found, figures, strict=True)]

    full = costing(runs("full", 0.9, 0.5), 1.4)
    told = "told and not judged, rise of general text in bits per byte, full minus method: lora on tiny "
    found = evidence(full, costing(runs("lora", 0.9, 0.9), 1.2, off=1.1))
    assert f"{told}0.40 [0.20, 0.60]; " in subject.judge_forgetting(found).because
    further = evidence(full, costing(runs("lora", 0.9, 0.9), 1.2, off=0.9))
    assert f"{told}0.20 [0.00, 0.40]; " in subject.judge_forgetting(further).because
    same = subject.full_as_every_method(found)
    assert f"{told}0.00 [0.00, 0.00]; " in subject.judge_forgetting(same).because


def test_an_interval_without_width_says_of_how_many_equal_differences_it_is() -> None:
    """22, 22 and 21 of 31 facts against 30, 30 and 29: eight more each time, though every recall varies."""

    def keeping(found: list[Record], facts: list[int]) -> list[Record]:
        return [
            r.model_copy(update={"figures": {**r.figures, "recall": count / 31}})
            for r, count in zip(found, facts, strict=False)
        ]

    full = keeping(runs("full", 0.9, 0.7), [22, 22, 21])
    equal = subject.judge_forgetting(evidence(full, keeping(runs("dora", 0.9, 1.0), [30, 30, 29]))).because
    assert "dora on tiny at its best rate 26 [26, 26]" in equal
    assert "; of no width at its best rate: dora on tiny (3 equal differences of 8 facts of 31); " in equal
    unequal = subject.judge_forgetting(evidence(full, keeping(runs("dora", 0.9, 1.0), [30, 30, 30]))).because
    assert "of no width" not in unequal


def test_an_undecided_verdict_says_what_it_excludes() -> None:
    spread = [
        r.model_copy(update={"figures": {**r.figures, "recall": 0.5 + 0.5 * (-1) ** r.setting("seed")}})
        for r in runs("prompt", 0.9, 0.5)
    ]
    found = subject.judge_forgetting(evidence(runs("full", 0.9, 0.9), runs("lora", 0.9, 0.5), spread))
    assert found.verdict == "inconclusive"
    assert "`supported` is excluded: 3 of 4 cells no, the others undecided" in found.because
    decided = subject.judge_forgetting(evidence(runs("full", 0.9, 0.9), runs("lora", 0.9, 0.5)))
    assert "excluded" not in decided.because


def test_every_method_gets_as_many_rates() -> None:
    section = {
        "tiny": {
            **dict.fromkeys(
                ("sweep_seeds", "seeds", "updates", "micro_batch_size", "evaluations", "questions", "threads"), 1
            ),
            "task": "aiw_siblings",
            "methods": {"full": {"learning_rates": [1e-3]}, "lora": {"learning_rates": [1e-3, 1e-2]}},
        }
    }
    with pytest.raises(LabError, match="as many learning_rates as every other"):
        parse(subject.Params, section, "params.yaml: profiles.mine.peft_vs_full")


def test_full_fine_tuning_as_every_method_is_as_good_and_forgets_as_much() -> None:
    same = subject.full_as_every_method(evidence(runs("full", 0.9, 0.5), runs("lora", 0.5, 0.9)))
    assert subject.judge_quality(same).verdict == subject.judge_full_quality(same).verdict == "supported"
    assert subject.judge_forgetting(same).verdict == "refuted"


# Plots ----------------------------------------------------------------------------------------------------------


def on_smol(records: list[Record]) -> list[Record]:
    """The same records, of the other model."""

    def moved(record: Record) -> Record:
        spec = record.spec
        settings = spec.settings.model_copy(update={"model": "smol"})
        names = {"arm": spec.arm.replace("tiny", "smol"), "name": spec.name.replace("tiny", "smol")}
        return record.model_copy(update={"spec": spec.model_copy(update={**names, "settings": settings})})

    return [moved(record) for record in records]


def bits_along(found: list[Record], end: float = 1.2) -> list[Record]:
    series: dict[str, list[float | None]] = {"curve_general_bits_per_byte": [1.0, end]}
    return [r.model_copy(update={"series": {**r.series, **series}}) for r in found]


SMOL_PLOTS = [plot for plot in subject.EXPERIMENT.plots if plot.name.endswith("-smol")]


@pytest.mark.parametrize("plot", SMOL_PLOTS, ids=lambda plot: plot.name)
def test_smol_is_drawn_by_plots_of_its_own_that_are_absent_without_it(plot: Plot, tmp_path: Path) -> None:
    tiny = [BASE, *bits_along([*runs("full", 0.9, 0.5), *runs("lora", 0.9, 0.9), *runs("lora", 0.2, 1.0, rate=1e-4)])]
    assert draw(plot, Evidence(tiny), tmp_path / "absent") is None
    both = Evidence([*tiny, *on_smol(tiny)])
    assert list(plot.lines(both)) == ["full on smol", "lora on smol"]
    first, again = draw(plot, both, tmp_path / "a"), draw(plot, both, tmp_path / "b")
    assert first is not None
    assert again is not None
    assert first.read_bytes() == again.read_bytes()
    beside = next(p for p in subject.EXPERIMENT.plots if p.name == plot.name.removesuffix("-smol"))
    assert "smol" not in beside.title
    assert plot.title == beside.title.replace("tiny", "smol")
    assert list(beside.lines(both).values()) == list(plot.lines(both).values())  # of the same numbers
    assert list(beside.lines(both)) == ["full", "lora"]
    changed = bits_along([*runs("full", 0.9, 0.1), *runs("lora", 0.4, 0.2)], end=1.5)
    other = Evidence([*tiny, *on_smol([BASE, *changed])])
    assert plot.lines(other)["lora on smol"] != plot.lines(both)["lora on smol"]
    assert beside.lines(other) == beside.lines(both)
