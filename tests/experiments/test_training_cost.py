"""The judges of what training costs, on records with known costs; and the picture with every method in it."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from experiments import training_cost
from experiments.training_cost import EXPERIMENT, FULL, METHODS, Params
from lab.claims import Claim, Evidence, Verdict, judge
from lab.plots import Line, draw
from lab.records import Record
from lab.specs import Memory, Simulation, Timing, Training, TrialSpec, templates
from lab.statistics import bonferroni, mean_ratio
from lab.study import Study
from tests.conftest import ROOT
from tests.test_records import make_record

CLAIMS: dict[str, Claim] = {claim.id: claim for claim in EXPERIMENT.claims}
SEEDS = range(4)
SPREAD = (0.99, 1.0, 1.01, 1.0)


def training(method: str, seed: int = 0, **changes: Any) -> Training:
    settings: dict[str, Any] = {"model": "tiny", "task": "aiw_siblings", "method": method, "seed": seed}
    return Training(**{**settings, "updates": 5, **changes})


def timing(arm: str, ratio: float, first: str = FULL, second: str = "lora", costs: float = 0.5) -> list[Record]:
    """Trials in which the second takes `ratio` of the first's time and `costs` of its operations and bytes."""
    found = []
    for seed, spread in zip(SEEDS, SPREAD, strict=True):
        settings = Timing(first=training(first, seed), second=training(second, seed))
        spec = TrialSpec(experiment="training_cost", name=f"{arm}-tiny-seed{seed}", arm=arm, settings=settings)
        figures: dict[str, float | None] = {"ratio": ratio * spread}
        figures |= {"second_parameters_trainable": 10.0, "second_parameters_stored": 10.0}
        for name in ("flops", "checkpoint_bytes"):
            figures |= {f"first_{name}": 1000.0, f"second_{name}": 1000.0 * costs}
        found.append(make_record(spec, figures=figures))
    return found


def peak(method: str, size: float, weights: float = 1000.0, sim: bool = False) -> Record:
    kind = Simulation if sim else Memory
    spec = TrialSpec(
        experiment="training_cost",
        name=f"peak-{method}-tiny",
        arm=f"peak-{method}",
        tier="sim" if sim else None,
        settings=kind(model="tiny", method=method),
    )
    return make_record(spec, figures={"peak_bytes": size, "steady_bytes": size, "weights_bytes": weights})


def trained(method: str, losses: tuple[float, ...], seeds: Any = SEEDS, test_loss: float = 1.0) -> list[Record]:
    """Runs of peft_vs_full with a point of the curve every 10 updates."""
    found = []
    for seed in seeds:
        spec = TrialSpec(
            experiment="peft_vs_full",
            name=f"tiny-{method}-seed{seed}",
            arm=f"tiny-{method}",
            settings=training(method, seed),
        )
        updates = [10.0 * (place + 1) for place in range(len(losses))]
        figures = {"validation_accuracy": 0.5, "test_accuracy": 0.5, "test_loss": test_loss * SPREAD[seed]}
        series = {"curve_update": updates, "curve_validation_loss": list(losses)}
        found.append(make_record(spec, figures=figures, series=series))
    return found


def base() -> Record:
    spec = TrialSpec(experiment="peft_vs_full", name="tiny-base", arm="tiny-base", settings=training(FULL, updates=0))
    return make_record(spec, figures={"validation_loss": 3.0, "test_loss": 3.0})


def verdict(claim: str, records: list[Record], tier: Any = "cpu") -> Verdict:
    return judge(EXPERIMENT, CLAIMS[claim], "cpu", tier, records, len(records))


# peft-trains-faster ---------------------------------------------------------------------------------------------

FULL_CURVE = (2.0, 1.0)
"""Half-way from 3 to 1 is 2: reached after 10 updates."""


def faster(ratio: float, losses: tuple[float, ...], **more: Any) -> Verdict:
    runs = [base(), *trained(FULL, FULL_CURVE), *trained("lora", losses, **more)]
    return verdict("peft-trains-faster", [*timing("time-lora", ratio), *runs])


def test_faster_updates_and_as_few_of_them_support_the_claim() -> None:
    found = faster(0.8, FULL_CURVE)
    assert found.verdict == "supported"
    assert found.effect == pytest.approx(0.8, rel=0.01)
    assert "full fine-tuning as every method: refuted" in found.control


def test_slower_updates_and_as_many_refute_it_and_the_other_control_differs() -> None:
    found = faster(1.2, FULL_CURVE)
    assert found.verdict == "refuted"
    assert "full fine-tuning at half its cost as every method: supported" in found.control


@pytest.mark.parametrize(
    ("ratio", "losses", "said"),
    [
        (0.8, (2.5, 2.0), "time to the target loss (no: lora on tiny 1.60"),  # 20 updates for 10
        (0.8, (2.9, 2.8), "time to the target loss (no: lora on tiny inf [inf, inf]"),  # never
    ],
)
def test_the_two_senses_are_judged_apart(ratio: float, losses: tuple[float, ...], said: str) -> None:
    found = faster(ratio, losses)
    assert found.verdict == "conditional"
    assert said in found.because


def test_what_is_reached_before_the_first_point_of_a_curve_is_undecided() -> None:
    early = faster(1.2, (1.0, 1.0))  # 5 updates for 10, on a straight line from the start
    assert early.verdict == "inconclusive"
    assert "time to the target loss (undecided: lora on tiny 0.60" in early.because
    assert early.because.endswith("; undecided, since it is reached before the first point of a curve: lora on tiny")
    late = [*timing("time-lora", 1.2), base(), *trained(FULL, (1.0, 1.0)), *trained("lora", (2.5, 2.0))]
    assert verdict("peft-trains-faster", late).verdict == "inconclusive"
    never = [*late[: len(SEEDS) + 1], *trained(FULL, (1.0, 1.0)), *trained("lora", (2.9, 2.8))]
    assert verdict("peft-trains-faster", never).verdict == "refuted"


def test_a_faster_method_may_need_fewer_updates_on_points_that_were_measured() -> None:
    full, lora = trained(FULL, (2.5, 2.0, 1.0)), trained("lora", (2.0, 1.5, 1.0))
    found = verdict("peft-trains-faster", [*timing("time-lora", 1.2), base(), *full, *lora])
    assert found.verdict == "conditional"
    assert "time to the target loss (yes: lora on tiny 0.60" in found.because
    assert "full fine-tuning as every method: refuted" in found.control


def test_a_time_within_the_margin_of_full_fine_tuning_s_is_not_faster() -> None:
    assert faster(0.97, FULL_CURVE).verdict == "refuted"
    assert faster(0.95, FULL_CURVE).verdict == "inconclusive"


def test_a_method_that_does_not_always_arrive_is_slower_or_undecided_and_never_faster() -> None:
    some = [*trained("lora", (2.0,), seeds=(0, 1)), *trained("lora", (2.9,), seeds=(2, 3))]
    records = [*timing("time-lora", 0.5), base(), *trained(FULL, FULL_CURVE), *some]
    assert verdict("peft-trains-faster", records).verdict == "inconclusive"
    slow = verdict("peft-trains-faster", [*timing("time-lora", 1.2), *records[len(SEEDS) :]])
    assert slow.verdict == "refuted"


def test_both_senses_need_evidence_and_a_target_needs_full_fine_tuning_that_learns() -> None:
    alone = verdict("peft-trains-faster", timing("time-lora", 0.5))
    assert (alone.verdict, alone.because) == ("inconclusive", "no curve of peft_vs_full for a method that was timed")
    still = [*timing("time-lora", 0.5), base(), *trained(FULL, (3.0, 3.1)), *trained("lora", FULL_CURVE)]
    assert "did not lower the validation loss" in verdict("peft-trains-faster", still).because


def test_a_method_that_was_timed_in_vain_is_not_passed_over() -> None:
    records = [base(), *trained(FULL, FULL_CURVE), *trained("lora", FULL_CURVE), *timing("time-lora", 0.5)]
    failed = [make_record(r.spec, status="failed", figures={}, message="killed") for r in timing("time-ia3", 0.5)]
    assert verdict("peft-trains-faster", records).verdict == "supported"
    assert verdict("peft-trains-faster", [*records, *failed]).verdict == "inconclusive"


def test_a_ratio_s_interval_is_the_inverse_ratio_s_inverted_and_wider_for_more_comparisons() -> None:
    ratios = [0.5, 0.6, 0.8]
    one, other = (mean_ratio(values, 0.95) for values in (ratios, [1 / r for r in ratios]))
    assert (one.low, one.high) == pytest.approx((1 / other.high, 1 / other.low))
    wide = mean_ratio(ratios, bonferroni(9))
    assert 0 < wide.low < one.low < one.estimate < one.high < wide.high
    alone = mean_ratio([0.5], 0.95)
    assert (alone.low, alone.high) == (0, math.inf)


# full-ft-costs-more ---------------------------------------------------------------------------------------------


def costs(ratio: float, share: float, size: float) -> Verdict:
    records = [*timing("time-lora", ratio, costs=share), peak(FULL, 1000.0), peak("lora", size)]
    return verdict("full-ft-costs-more", records)


def test_full_fine_tuning_costs_more_only_if_every_cost_is_higher() -> None:
    assert costs(0.8, 0.5, 500.0).verdict == "supported"
    assert costs(1.0, 1.0, 1000.0).verdict == "refuted"
    for ratio, share, size, said in (
        (1.2, 0.5, 500.0, "seconds (no: lora"),
        (0.8, 0.99, 500.0, "FLOPs (no: lora"),
        (0.8, 0.5, 950.0, "peak bytes (no: lora"),
    ):
        found = costs(ratio, share, size)
        assert found.verdict == "conditional"
        assert said in found.because
    assert "as every method: refuted" in costs(0.8, 0.5, 500.0).control
    assert "at half its cost as every method: supported" in costs(1.0, 1.0, 1000.0).control


def test_a_peak_that_was_not_measured_leaves_the_costs_open() -> None:
    assert verdict("full-ft-costs-more", [*timing("time-lora", 0.8), peak(FULL, 1000.0)]).verdict == "inconclusive"


# quantised-peft-is-cheaper --------------------------------------------------------------------------------------


def quantised(ratio: float, size: float, weights: float, test_loss: float = 1.0) -> Verdict:
    records = [
        peak("lora", 1000.0),
        peak("qlora", size, weights),
        *timing("qlora-over-lora", ratio, "lora", "qlora"),
        base(),
        *trained("lora", FULL_CURVE),
        *trained("qlora", FULL_CURVE, test_loss=test_loss),
    ]
    return verdict("quantised-peft-is-cheaper", records)


def test_quantisation_is_cheaper_if_bytes_fall_and_nothing_is_paid_for_it() -> None:
    assert quantised(1.0, 500.0, 300.0).verdict == "supported"
    slower = quantised(1.3, 500.0, 300.0)
    assert slower.verdict == "conditional"
    assert "no dearer (yes: progress lost on tiny 0.00 [0.00, 0.00]; no: time per update on tiny 1.30" in slower.because
    worse = quantised(1.0, 500.0, 300.0, test_loss=1.5)
    assert worse.verdict == "conditional"
    assert "no: progress lost on tiny 0.25" in worse.because
    assert quantised(1.05, 500.0, 300.0).verdict == "inconclusive"


def test_quantisation_that_saves_no_bytes_is_refuted_however_fast() -> None:
    found = quantised(0.5, 950.0, 1000.0)
    assert found.verdict == "refuted"
    assert found.control.startswith("LoRA as QLoRA: refuted, LoRA at half its cost as QLoRA: supported")


def test_a_fifth_of_the_progress_or_twice_the_time_is_noticed() -> None:
    found = quantised(1.0, 500.0, 300.0)
    assert "QLoRA that lost a fifth of the progress: conditional, QLoRA at twice the time: conditional" in found.control


def test_without_training_nothing_is_known_of_the_loss_and_quantisation_is_not_supported() -> None:
    records = [peak("lora", 1000.0), peak("qlora", 500.0, 300.0), *timing("qlora-over-lora", 1.0, "lora", "qlora")]
    found = verdict("quantised-peft-is-cheaper", records)
    assert found.verdict == "inconclusive"
    assert "undecided: progress lost on tiny, not trained, nan [-inf, inf]" in found.because


def test_in_the_sim_tier_bytes_decide_and_elsewhere_time_is_needed_too() -> None:
    sizes = [peak("lora", 1000.0, sim=True), peak("qlora", 500.0, 300.0, sim=True)]
    assert verdict("quantised-peft-is-cheaper", sizes, "sim").verdict == "supported"
    partly = [sizes[0], peak("qlora", 950.0, 300.0, sim=True)]
    assert verdict("quantised-peft-is-cheaper", partly, "sim").verdict == "conditional"
    real = [peak("lora", 1000.0), peak("qlora", 500.0, 300.0)]
    assert verdict("quantised-peft-is-cheaper", real).verdict == "inconclusive"


# Trials and picture ---------------------------------------------------------------------------------------------


def test_every_method_is_timed_alone_against_full_fine_tuning_with_a_seed_for_each_repeat() -> None:
    chosen = {"task": "aiw_siblings", "repeats": 2, "rounds": 3, "micro_batch_size": 4, "length": 32}
    params = Params.model_validate({"models": {"tiny": chosen}})
    profile = Study.load("cpu", ROOT).profile
    specs = templates(EXPERIMENT.trials(params, profile))
    timings = [spec for spec in specs if isinstance(spec.settings, Timing)]
    assert len(timings) == 2 * (len(METHODS) + 1)
    assert all(spec.threads == profile.threads for spec in timings)
    for spec in timings:
        first, second = spec.settings.first, spec.settings.second  # type: ignore[union-attr]
        assert (first.seed, first.evaluations) == (second.seed, 0)
        assert spec.arm in (f"time-{second.method}", "qlora-over-lora")
    assert {spec.arm for spec in specs if isinstance(spec.settings, Memory)} == {f"peak-{m}" for m in (FULL, *METHODS)}


def test_the_picture_has_a_point_for_every_method_that_was_timed_and_trained() -> None:
    records = [*timing("time-lora", 1.5), *timing("time-ia3", 0.5), peak(FULL, 2e6), peak("lora", 1e6), base()]
    records += [*trained(FULL, FULL_CURVE), *trained("lora", FULL_CURVE)]
    lines = training_cost.quality_memory_time(Evidence(records))
    assert list(lines) == [FULL, "lora"]
    assert (lines[FULL].x, lines[FULL].y, lines[FULL].area) == ([2.0], [0.5], [1.0])
    assert lines["lora"].area == pytest.approx([1.5], rel=0.01)


def test_a_method_is_on_the_front_unless_another_is_as_good_in_all_and_better_in_one() -> None:
    lines = {
        "small": Line([1], [0.5], area=[1]),
        "good": Line([2], [0.9], area=[1]),
        "quick": Line([2], [0.5], area=[0.5]),
        "beaten": Line([2], [0.9], area=[1.1]),
        "equal to good": Line([2], [0.9], area=[1]),
    }
    assert training_cost.undominated(lines) == {"small", "good", "quick", "equal to good"}


def test_names_beside_points_that_lie_close_together_cover_neither_points_nor_names(tmp_path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    points = {name: Line([10 + place % 3], [0.9 + 0.001 * place], area=[1.5]) for place, name in enumerate(METHODS)}
    plot = replace(EXPERIMENT.plots[0], lines=lambda evidence: {FULL: Line([20], [0.95], area=[1]), **points})
    seen: list[Figure] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("matplotlib.pyplot.close", seen.append)
        path = draw(plot, Evidence([]), tmp_path / "plot.svg")
    assert path is not None
    assert all(f"<!-- {name} -->" in path.read_text() for name in (FULL, *METHODS))
    seen[0].draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in seen[0].axes[0].texts]
    assert len(boxes) == len(METHODS) + 1
    assert not [(a, b) for a, b in combinations(boxes, 2) if a.overlaps(b)]
    assert all(seen[0].bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))
