"""The judge of half precision on made-up records: each regime, each boundary, the controls, and what is planned."""

from __future__ import annotations

from typing import Any

import pytest

from experiments import half_precision
from experiments.half_precision import (
    EXPERIMENT,
    EXPONENTS,
    JUDGED,
    LEAST_SAVING,
    MARGIN,
    MEASURED,
    WAYS,
    Params,
    Sizes,
)
from lab.claims import Evidence, Verdict, judge
from lab.params import Profile
from lab.records import Record
from lab.specs import HalfPrecision, LossScaling, TrialSpec, memory_spec
from lab.statistics import Interval
from tests.test_records import make_record

CLAIM = EXPERIMENT.claims[0]
RATES = (1e-5, 1e-3)
POINTS = ((1, 32), (8, 128))
SEEDS = 5


def made_up_figures(spec: TrialSpec) -> dict[str, Any]:
    """What the two kinds of trial leave, of a training that goes well."""
    if isinstance(spec.settings, HalfPrecision):
        return trained(spec.settings.learning_rates, 0.0)
    if isinstance(spec.settings, LossScaling):
        return scaled(spec.settings.exponents)
    return {}


def trained(rates: tuple[float, ...], lost: float | None, seed: int = 0) -> dict[str, Any]:
    """A training that loses a share of fp32's progress, which is 1 nat, at every rate; None: it breaks."""
    jitter = 0.001 * (seed - 2)
    series: dict[str, list[Any]] = {"learning_rate": list(rates)}
    series["test_loss"] = [None if lost is None else 2.0 + lost + (jitter if lost else 0.0) for _ in rates]
    series |= {name: [0.0] * len(rates) for name in ("broke", "skipped")}
    series |= {name: [1.0] * len(rates) for name in ("changed", "moved", "scale")}
    return {"base_test_loss": 3.0, **series}


def scaled(exponents: tuple[int, ...], right: range = range(8, 18)) -> dict[str, Any]:
    """Gradients that fp16 holds at the scales 2^`right`."""
    found: dict[str, Any] = {"exponent": list(exponents)}
    for when in ("base", "tuned"):
        found |= {f"{when}_loss": 1.0, f"{when}_bf16_lost": 0.0, f"{when}_bf16_error": 0.01}
        found[f"{when}_lost"] = [0.1 if e < right.start else 0.0 for e in exponents]
        found[f"{when}_overflowed"] = [float(e >= right.stop) for e in exponents]
        found[f"{when}_error"] = [None if e >= right.stop else 0.001 for e in exponents]
    return found


def record(spec: TrialSpec, found: dict[str, Any], **changes: Any) -> Record:
    series = {name: value for name, value in found.items() if isinstance(value, list)}
    figures = {name: value for name, value in found.items() if name not in series}
    return make_record(spec, figures=figures, series=series, **changes)


def memory(way: str, saved: float, points: tuple[tuple[int, int], ...] = POINTS, sim: bool = False) -> list[Record]:
    """Peaks that save this share of fp32's at every point."""
    found = []
    for batch, length in points:
        setup = {"model": "tiny", "batch": batch, "length": length, "precision": way}
        spec = memory_spec("half_precision", f"memory-{way}", f"tiny-{batch}x{length}", "cpu", sim, **setup)
        held = 1000.0 * batch * length * (1 - saved)
        found.append(
            make_record(spec, figures={"peak_bytes": 2 * held, "steady_bytes": held, "activations_bytes": held})
        )
    return found


def training(way: str, lost: float | None, rates: tuple[float, ...] = RATES, seeds: int = SEEDS) -> list[Record]:
    found = []
    for seed in range(seeds):
        settings = HalfPrecision(model="tiny", task="a", updates=4, learning_rates=rates, seed=seed, **WAYS[way])
        name = f"train-{way}-{rates[0]:g}-seed{seed}"
        spec = TrialSpec(experiment="half_precision", name=name, arm=f"train-{way}", settings=settings)
        found.append(record(spec, trained(rates, lost, seed), tags={"data_order": f"seed {seed}"}))
    return found


def scaling() -> list[Record]:
    settings = LossScaling(model="tiny", task="a", updates=4, exponents=EXPONENTS)
    spec = TrialSpec(experiment="half_precision", name="scale-tiny-seed0", arm="scale-tiny", settings=settings)
    return [record(spec, scaled(EXPONENTS))]


def everything(saved: dict[str, float] | float = 0.5, lost: dict[str, float | None] | float = 0.0) -> list[Record]:
    """Evidence in which every way saves and loses these shares; a way that a dictionary leaves out is without fault."""
    saved = dict.fromkeys(MEASURED, saved) if isinstance(saved, float) else saved
    shares: dict[str, float | None] = dict.fromkeys(JUDGED, lost) if isinstance(lost, float) else dict(lost)
    found = [*memory("fp32", 0.0), *scaling(), *training("fp32", 0.0)]
    for way in MEASURED:
        found += memory(way, saved.get(way, 0.5))
    for way in (*JUDGED, "fp16-unscaled"):
        found += training(way, shares.get(way, 0.0))
    return found


def verdict(found: list[Record], tier: Any = "cpu") -> Verdict:
    return judge(EXPERIMENT, CLAIM, "cpu", tier, found, len(found))


def test_it_is_supported_where_every_way_saves_and_trains_and_fp32_in_its_place_refutes() -> None:
    found = verdict(everything())
    assert (found.verdict, found.effect, found.n) == ("supported", 0.5, len(JUDGED) * len(POINTS))
    assert "fp32 as every way: refuted" in found.control
    assert "nothing to find fault with: supported" in found.control


def test_it_is_refuted_where_nothing_is_saved_and_the_flawless_control_is_not() -> None:
    found = verdict(everything(saved=0.0))
    assert found.verdict == "refuted"
    assert "nothing to find fault with: supported" in found.control


def test_it_is_refuted_where_all_ways_save_and_none_trains() -> None:
    assert verdict(everything(lost=0.5)).verdict == "refuted"
    assert verdict(everything(lost=dict.fromkeys(JUDGED))).verdict == "refuted"


def test_plain_fp16_that_breaks_makes_it_conditional_and_lost_updates_refute() -> None:
    found = verdict(everything(lost={"fp16": None}))
    assert found.verdict == "conditional"
    assert "every update lost: refuted" in found.control
    assert (
        "fp16: of the peak saved 50% at tiny 1 x 32, 50% at tiny 8 x 128, between updates 50%, of the progress lost all at 1e-05 "
        "(it breaks), all at 0.001 (it breaks); bf16: "
    ) in found.because
    assert found.flips == (
        "10% of the peak is saved by fp16, bf16, bf16-master, autocast, bf16-stochastic, fp16-scaled at every point; fp16 trains "
        "as fp32 does: no at 1e-05 (it breaks), 0.001 (it breaks)"
    )


@pytest.mark.parametrize("way", MEASURED)
def test_one_way_that_saves_too_little_makes_it_conditional(way: str) -> None:
    assert verdict(everything(saved={way: LEAST_SAVING - 0.01})).verdict == "conditional"
    assert verdict(everything(saved={way: LEAST_SAVING + 0.01})).verdict == "supported"


@pytest.mark.parametrize("way", JUDGED)
def test_one_way_that_loses_too_much_makes_it_conditional(way: str) -> None:
    assert verdict(everything(lost={way: MARGIN + 0.01})).verdict == "conditional"
    assert verdict(everything(lost={way: -MARGIN - 0.01})).verdict == "conditional"
    assert verdict(everything(lost={way: MARGIN - 0.01})).verdict == "supported"


def test_one_rate_at_which_weights_stand_still_is_enough_for_conditional() -> None:
    others = [r for r in everything() if r.spec.arm != "train-bf16"]
    mixed = []
    for moving, still in zip(training("bf16", 0.0), training("bf16", 0.9), strict=True):
        losses = [still.series["test_loss"][0], moving.series["test_loss"][1]]
        mixed.append(moving.model_copy(update={"series": {**moving.series, "test_loss": losses}}))
    found = verdict([*others, *mixed])
    assert found.verdict == "conditional"
    # On a line over log10 from 0.9 at -5 to 0 at -3, 0.05 is at -3.11.
    crossing = "about 0.0008 [0.0008, 0.0008]"
    assert (
        f"of the progress lost 90.0 [89.6, 90.4] % at 1e-05, 0.0 [0.0, 0.0] % at 0.001, 5% at {crossing}"
        in found.because
    )
    assert found.flips.endswith(
        f"bf16 trains as fp32 does: yes at 0.001, no at 1e-05 (below {crossing} it loses more than 5% of the progress)"
    )


def test_a_saving_at_one_point_alone_makes_it_conditional() -> None:
    others = [r for r in everything() if r.spec.arm != "memory-autocast"]
    mixed = [*memory("autocast", 0.0, POINTS[:1]), *memory("autocast", 0.4, POINTS[1:])]
    found = verdict([*others, *mixed])
    assert found.verdict == "conditional"
    assert "autocast: of the peak saved 0% at tiny 1 x 32, 40% at tiny 8 x 128" in found.because
    assert found.flips == (
        "10% of the peak is saved by fp16, bf16, bf16-master, bf16-stochastic at every point, by autocast, fp16-scaled at "
        "tiny 8 x 128 and not at tiny 1 x 32"
    )


def test_where_every_way_holds_at_every_point_and_rate_nothing_flips() -> None:
    assert verdict(everything()).flips == ""
    assert verdict(everything(saved=0.0)).flips == ""


def test_a_rate_from_which_on_enough_is_kept_has_the_rates_of_its_interval_beside_it() -> None:
    wide: dict[float, Interval | None] = {1e-5: Interval(0.9, 0.8, 1.0, 5), 1e-3: Interval(0.0, -0.1, 0.1, 5)}
    # Over log10: 0.9 to 0 meets 0.05 at -3.11, 0.8 to -0.1 at -3.33; 1.0 to 0.1 never does.
    assert half_precision._within_from(wide) == "0.0008 [0.0005, not reached]"
    assert half_precision._within_from({1e-5: Interval(0.01, 0.0, 0.1, 5), 1e-3: None}) == ""  # from the first on
    assert half_precision._within_from({1e-5: Interval(0.5, 0.4, 0.6, 5)}) == ""
    assert half_precision._within_from({1e-5: None}) == ""


def test_what_the_seeds_do_not_decide_is_inconclusive() -> None:
    found = [r for r in everything() if not r.spec.arm.startswith("train-")]
    for way in WAYS:
        found += training(way, 0.0 if way == "fp32" else 0.01, seeds=1)
    assert verdict(found).verdict == "inconclusive"


def test_intervals_hold_together_for_all_ways_and_rates() -> None:
    near = everything(lost={"bf16": MARGIN - 0.003})
    alone = half_precision.progress_lost(Evidence(near), "bf16")[RATES[0]]
    assert alone is not None
    assert alone.high < MARGIN
    assert verdict(near).verdict == "inconclusive"


def test_the_sim_tier_is_judged_by_memory_alone() -> None:
    ways = ("fp32", *MEASURED)
    found = [r for way in ways for r in memory(way, 0.5 if way in ("fp16", "bf16") else 0.0, sim=True)]
    simulated = verdict(found, "sim")
    assert simulated.verdict == "conditional"
    assert simulated.n == len(MEASURED) * len(POINTS)
    assert "progress" not in simulated.because
    assert "fused" not in simulated.because
    assert simulated.flips == (
        "10% of the peak is saved by fp16, bf16 at every point, by bf16-master, autocast at no point"
    )
    assert "every update lost: not run" in simulated.control
    assert "fp32 as every way: refuted" in simulated.control


def test_more_than_half_saved_is_told_to_come_from_attention_in_the_sim_tier_alone() -> None:
    def saving(sim: bool) -> list[Record]:
        found = memory("fp32", 0.0, sim=sim)
        for way in MEASURED:
            found += [*memory(way, 0.5, POINTS[:1], sim=sim), *memory(way, 0.75, POINTS[1:], sim=sim)]
        return found

    # Twice the activations of bf16 are a half of fp32's: the other half of 1,024,000 bytes is too little for a GiB.
    said = (
        "two bytes for four save 50%: what is above that at tiny 8 x 128 (0 GiB of fp32's 0) comes from attention, where fp32 "
        "falls back to a kernel that is not fused and keeps the scores; autocast and fp32 copies save by the same"
    )
    assert verdict(saving(sim=True), "sim").because.endswith(said)
    huge = [
        r.model_copy(update={"figures": {name: 2**20 * (value or 0) for name, value in r.figures.items()}})
        for r in saving(sim=True)
    ]
    assert "tiny 8 x 128 (500 GiB of fp32's 2,000) comes from attention" in verdict(huge, "sim").because
    measured = [r for r in everything() if not r.spec.arm.startswith("memory-")]
    assert "fused" not in verdict([*measured, *saving(sim=False)]).because


@pytest.mark.parametrize(
    ("lost", "seen"),
    [(0.0, "was not seen"), (MARGIN + 0.02, "is seen"), (MARGIN, "is undecided"), (None, "is seen")],
)
def test_what_lost_gradients_do_to_the_loss_is_told(lost: float | None, seen: str) -> None:
    because = verdict(everything(lost={"fp16-unscaled": lost})).because
    assert f"an effect of that on the loss {seen}: fp16-unscaled, tried at the highest rate alone, loses " in because


def test_pairs_on_other_data_are_refused() -> None:
    found = [
        r.model_copy(update={"tags": {"data_order": "another"}}) if r.spec.arm == "train-bf16" else r
        for r in everything()
    ]
    assert verdict(found).verdict == "inconclusive"
    assert "seed0: fp32 did not see the same rows" in verdict(found).because


def test_trainings_that_are_missing_leave_the_verdict_open() -> None:
    found = [r for r in everything() if not r.spec.arm.startswith("train-")]
    assert verdict(found).verdict == "inconclusive"


def test_the_window_of_loss_scales_ends_where_any_seed_overflows_or_loses() -> None:
    (first,) = scaling()
    second = record(first.spec, scaled(EXPONENTS, range(12, 13)))
    assert half_precision.scales_that_work([first]) == [8, 12, 16]
    assert half_precision.scales_that_work([first, second]) == [12]
    none = record(first.spec, scaled(EXPONENTS, range(30, 31)))
    assert half_precision.scales_that_work([first, none]) == []
    because = verdict(everything()).because
    assert (
        "tiny: 10% to 10% become zero without a loss scale (bf16 0%), 0.00% at most with one of 2^8, right to 2^16"
        in because
    )
    others = [r for r in everything() if not r.spec.arm.startswith("scale-")]
    assert (
        "become zero without a loss scale (bf16 0%), no scale that was tried keeps them"
        in verdict([*others, none]).because
    )


def test_every_plot_has_its_lines() -> None:
    evidence = Evidence(everything(lost={"fp16": None}))
    progress = half_precision.progress_lines(evidence)
    assert "fp16" not in progress
    assert progress["bf16"].y == [100.0, 100.0]
    assert set(half_precision.changed_lines(evidence)) == {"fp32", "bf16", "bf16-stochastic", "bf16-master"}
    scales = half_precision.scale_lines(evidence)
    assert scales["tiny before training: gradients that become zero"].y[0] == pytest.approx(10.0)
    assert scales["tiny before training: seeds in which one overflows"].y[-1] == 100.0


def test_every_way_is_trained_on_each_seed_s_data_and_fp16_under_autocast_at_the_highest_rate() -> None:
    params = Params(
        memory_models=("tiny",),
        points=POINTS,
        real_scale=Sizes(memory_models=("llama-3.2-1b",), points=((1, 512),)),
        model="tiny",
        task="a",
        seeds=2,
        examples=50,
        updates=4,
        micro_batch_size=4,
        questions=10,
        learning_rates=RATES,
        scaled={"tiny": "b"},
    )
    sizes = {"train": 1, "validation": 1, "test": 1}
    profile = Profile.model_validate({"device": "cpu", "threads": 2, "tiny": {}, "data": sizes})
    specs = half_precision.trials(params, profile)
    arms = [spec.arm for spec in specs]
    assert all(arms.count(f"train-{way}") == 2 for way in WAYS)
    assert all(arms.count(f"memory-{way}") == 3 for way in ("fp32", *MEASURED))
    assert arms.count("scale-tiny") == 2
    assert [spec.tier for spec in specs].count("sim") == 1 + len(MEASURED)
    by_name = {spec.name: spec.settings for spec in specs}
    assert by_name["train-bf16-seed1"].learning_rates == RATES  # type: ignore[union-attr]
    assert by_name["train-fp16-scaled-seed1"].learning_rates == (1e-3,)  # type: ignore[union-attr]
    assert len({spec.digest() for spec in specs}) == len(specs)
