"""The judge of the optimizers on made-up records: what saves, what keeps the loss, in which regime, and what controls say."""

from __future__ import annotations

from typing import Any

import pytest

from experiments import optimizers
from experiments.optimizers import ADAMW, MARGIN, REGIMES
from lab.claims import Evidence, Verdict, judge
from lab.memory.workload import OPTIMIZERS
from lab.params import Profile
from lab.records import Record
from lab.specs import Learning, OptimizerTry, Simulation, Sweep, Timing, Training, TrialSpec, templates
from tests.test_records import make_record

CLAIM = optimizers.EXPERIMENT.claims[0]
FEW = "adamw_bnb_8bit"

# Bytes of state and of the peak in each regime, of AdamW and of an optimizer that saves in two of the three.
FULL = dict.fromkeys(REGIMES, (800.0, 1000.0))
SAVING = {"fp32": (200.0, 600.0), "bf16": (300.0, 850.0), "lora": (300.0, 990.0)}
EVERYWHERE = dict.fromkeys(REGIMES, (200.0, 600.0))
# Test losses by seed; the base has 3, so that AdamW's progress is 2.
BEST = (1.0, 1.1, 1.05)
AS_GOOD = tuple(loss + 0.02 for loss in BEST)
WORSE = tuple(loss + 0.5 for loss in BEST)


def made_up_figures(spec: TrialSpec) -> dict[str, Any]:
    """What the trials of this experiment leave, for tests that judge every claim."""
    settings = spec.settings
    if isinstance(settings, Learning):
        return {"tokens": 100.0 * settings.updates, "test_loss": 3.0 if spec.arm in ("base", "control-idle") else 1.0}
    if isinstance(settings, OptimizerTry):
        return {"runs": 1.0, "falls_back": 0.0, "largest_move": 0.1}
    return {}


def tried(
    name: str, bytes_held: dict[str, tuple[float, float]], sim: bool = False, model: str = "llama-6m"
) -> list[Record]:
    found = []
    kind = Simulation if sim else OptimizerTry
    for regime, (state, peak) in bytes_held.items():
        settings = kind.model_validate({"model": model, "optimizer": name, **REGIMES[regime]})
        arm = f"{regime}-{name}"
        spec = TrialSpec(
            experiment="optimizers",
            name=f"{arm}-{model}".replace("_", "-"),
            arm=arm,
            tier="sim" if sim else None,
            settings=settings,
        )
        figures = {"optimizer_state_bytes": state, "peak_bytes": peak, "parameters_trainable": 100.0}
        found.append(make_record(spec, figures={**figures, "runs": 1.0, "falls_back": 0.0}))
    return found


def learnt(arm: str, losses: tuple[float, ...], rate: float = 1e-3, **changes: Any) -> list[Record]:
    found = []
    for seed, loss in enumerate(losses):
        settings = Learning(model="tiny", task="a", learning_rate=rate, updates=5, seed=seed)
        name = f"{arm}-{seed}-{rate:g}".replace("_", "-")
        spec = TrialSpec(experiment="optimizers", name=name, arm=arm, settings=settings)
        figures = {"validation_loss": loss, "test_loss": loss, "tokens": 500.0}
        found.append(make_record(spec, figures={**figures, **changes}))
    return found


def timed(name: str, ratio: float = 1.5) -> list[Record]:
    training = Training(model="tiny", task="a", updates=1)
    spec = TrialSpec(
        experiment="optimizers",
        name=f"time-{name}".replace("_", "-"),
        arm=f"time-{name}",
        settings=Timing(first=training, second=training),
    )
    return [make_record(spec, figures={"ratio": ratio})]


def lacking(name: str, **tags: str) -> Record:
    spec = TrialSpec(
        experiment="optimizers",
        name=f"fp32-{name}".replace("_", "-"),
        arm=f"fp32-{name}",
        settings=OptimizerTry(model="llama-6m", optimizer=name),
    )
    return make_record(spec, figures={"runs": 0.0, "falls_back": 0.0}, tags=tags)


def records(
    held: dict[str, tuple[float, float]] = SAVING, losses: tuple[float, ...] = AS_GOOD, name: str = FEW
) -> list[Record]:
    return [
        *tried(ADAMW, FULL),
        *tried(name, held),
        *learnt("base", (3.0,)),
        *learnt("control-idle", (3.0, 3.0, 3.0), rate=1e-9),
        *learnt(f"loss-{ADAMW}", BEST),
        *learnt(f"loss-{name}", losses),
        *timed(name),
    ]


def verdict(found: list[Record]) -> Verdict:
    return judge(optimizers.EXPERIMENT, CLAIM, "cpu", "cpu", found, len(found))


def test_it_is_conditional_where_an_optimizer_saves_in_full_fine_tuning_and_none_does_with_lora() -> None:
    found = verdict(records())
    assert found.verdict == "conditional"
    assert (found.low, found.high, found.n) == (pytest.approx(0.01), pytest.approx(0.4), 3)
    assert found.because.startswith(f"fp32 does by {FEW}; bf16 does by {FEW}; lora does not; ")
    assert "2.00 B, peak -40/-15/-1 %, 1.0 [" in found.because
    assert "1.50 x the time" in found.because
    assert found.control == (
        "AdamW's bytes: refuted, an optimizer that hardly moves: refuted, half the bytes for the same loss: supported"
    )


def test_it_can_be_supported_and_then_two_controls_refute() -> None:
    found = verdict(records(EVERYWHERE))
    assert found.verdict == "supported"
    assert found.control.count("refuted") == 2


@pytest.mark.parametrize(
    ("held", "losses"),
    [
        (FULL, AS_GOOD),
        (EVERYWHERE, WORSE),
        (dict.fromkeys(REGIMES, (401.0, 600.0)), AS_GOOD),
        (dict.fromkeys(REGIMES, (200.0, 901.0)), AS_GOOD),
    ],
    ids=["nothing saved", "less learnt", "just over half of the state", "just under a tenth of the peak"],
)
def test_it_can_be_refuted_and_then_a_control_supports(
    held: dict[str, tuple[float, float]], losses: tuple[float, ...]
) -> None:
    found = verdict(records(held, losses))
    assert found.verdict == "refuted"
    assert "half the bytes for the same loss: supported" in found.control


def test_half_of_the_state_and_a_tenth_of_the_peak_are_enough() -> None:
    assert verdict(records(dict.fromkeys(REGIMES, (400.0, 900.0)))).verdict == "supported"


def test_a_loss_that_the_seeds_do_not_decide_is_inconclusive() -> None:
    found = verdict(records(EVERYWHERE, (BEST[0] - 0.3, BEST[1], BEST[2] + 0.4)))
    assert found.verdict == "inconclusive"
    assert "fp32 is undecided" in found.because
    # And one seed decides nothing.
    assert verdict(records(EVERYWHERE, AS_GOOD[:1])).verdict == "inconclusive"


def test_one_that_saves_and_one_that_keeps_the_loss_are_not_one_that_does_both() -> None:
    both = [*records(FULL, AS_GOOD), *tried("sgd", EVERYWHERE), *learnt("loss-sgd", WORSE), *timed("sgd")]
    assert verdict(both).verdict == "refuted"


def test_the_more_are_compared_the_wider_the_intervals() -> None:
    one = optimizers.rows(Evidence(records()))[0].lost
    more = [*records(), *tried("sgd", SAVING), *learnt("loss-sgd", AS_GOOD), *timed("sgd")]
    spread = [(*BEST[:2], BEST[2] + 0.05), AS_GOOD]
    assert one is not None
    wide = optimizers.rows(Evidence(more))[0].lost
    assert wide is not None
    assert wide.high >= one.high
    uneven = optimizers.rows(Evidence(records(losses=spread[0])))[0].lost
    both = [*records(losses=spread[0]), *tried("sgd", SAVING), *learnt("loss-sgd", AS_GOOD), *timed("sgd")]
    wider = optimizers.rows(Evidence(both))[0].lost
    assert uneven is not None
    assert wider is not None
    assert wider.high > uneven.high


def test_each_is_compared_at_its_own_best_rate_and_an_edge_is_told() -> None:
    bad = [*learnt(f"loss-{FEW}", WORSE, rate=1e-2), *learnt(f"loss-{ADAMW}", WORSE, rate=1e-4)]
    bad += learnt(f"loss-{ADAMW}", WORSE, rate=1e-2)
    found = verdict([*records(), *bad])
    assert found.verdict == "conditional"
    assert "% lost (edge)" in found.because  # that of the 8-bit one, whose best of two is the first


def test_a_run_that_diverged_has_lost_everything() -> None:
    found = records(EVERYWHERE)
    gone = [r for r in found if r.spec.arm == f"loss-{FEW}"][-1]
    found.remove(gone)
    lost = optimizers._progress_lost(
        Evidence([*found, gone.model_copy(update={"status": "diverged", "figures": {}})]), FEW
    )
    # The rate is chosen over the seeds that have a score at it: one rate here, so it is kept.
    assert lost[-1] == 1.0
    assert len(lost) == 3


def test_runs_that_have_not_read_the_same_tokens_are_no_comparison() -> None:
    found = [r for r in records() if r.spec.arm != f"loss-{FEW}"]
    found += learnt(f"loss-{FEW}", AS_GOOD, tokens=400.0)
    odd = verdict(found)
    assert odd.verdict == "inconclusive"
    assert odd.because == f"{FEW} and {ADAMW} have not read the same tokens from seed 0"


def test_what_does_not_run_is_told_by_what_it_lacks_and_compared_with_nothing() -> None:
    galore = [
        lacking(f"galore_{n}", standing="needs a package", package="galore_torch") for n in ("adamw", "adafactor")
    ]
    paged = tried("paged_adamw_8bit", {"fp32": (200.0, 600.0)})
    paged[0].figures["falls_back"] = 1.0
    odd = [*galore, lacking("lomo", standing="broken", package=""), *paged]
    found = verdict([*records(), *odd, *learnt("loss-lomo", AS_GOOD)])
    assert found.verdict == "conditional"
    assert found.because.endswith(
        "broken: lomo; needs a package galore_torch: galore_adamw, galore_adafactor; run here unpaged: paged_adamw_8bit"
    )


def test_the_table_has_every_name_that_runs_and_a_dash_for_what_was_not_tried() -> None:
    paged = tried("paged_adamw_8bit", {"fp32": (200.0, 600.0)})
    paged[0].figures["falls_back"] = 1.0
    found = optimizers.table(Evidence([*records(), *paged]))
    assert [line.split(" | ")[0] for line in found] == [f"| {ADAMW}", f"| {FEW}", "| paged_adamw_8bit (unpaged)"]
    assert found[0] == f"| {ADAMW} | 8.00 | +0 / +0 / +0 | - | - |"
    assert found[1].startswith(f"| {FEW} | 2.00 | -40 / -15 / -1 | 1.0 [")
    assert found[1].endswith(" | 1.50 |")
    assert found[2] == "| paged_adamw_8bit (unpaged) | 2.00 | -40 / - / - | - | - |"


def test_the_table_ends_with_what_does_not_run_by_what_it_lacks() -> None:
    galore = [
        lacking(f"galore_{n}", standing="needs a package", package="galore_torch") for n in ("adafactor", "adamw")
    ]
    odd = [
        lacking("lomo", standing="broken", package=""),
        *galore,
        lacking("paged_ademamix_8bit", standing="needs a GPU", package=""),
    ]
    found = optimizers.table(Evidence([*records(), *odd]))
    assert found[2:] == [
        "| broken: lomo | - | - | - | - |",
        "| needs a GPU: paged_ademamix_8bit | - | - | - | - |",
        "| needs a package galore_torch: galore_adamw, galore_adafactor | - | - | - | - |",
    ]


def named(record: Record, kind: str, moved: float = 0.1, falls_back: float = 0.0) -> Record:
    """A name that was tried, with the class that the Trainer made of it and how far its updates went."""
    figures = {**record.figures, "largest_move": moved, "falls_back": falls_back}
    return record.model_copy(update={"figures": figures, "tags": {"class": kind}})


def test_the_table_names_what_an_alias_and_an_unpaged_fall_back_are_the_same_as() -> None:
    held, other = (200.0, 600.0), (250.0, 600.0)
    arms = {
        "adamw_bnb_8bit": ("bnb.AdamW", held, 0.1, 0.0),
        "adamw_8bit": ("bnb.AdamW", held, 0.1, 0.0),
        "paged_adamw_8bit": ("bnb.AdamW", held, 0.1, 1.0),
        "paged_adamw_32bit": ("bnb.AdamW", other, 0.1, 1.0),
        "lion_8bit": ("bnb.Lion", held, 0.1, 0.0),
        "ademamix": ("bnb.AdamW", held, 0.2, 0.0),
        "rmsprop_bnb": ("bnb.RMSprop", held, 0.1, 0.0),
        "rmsprop_bnb_32bit": ("bnb.RMSprop", held, 0.1, 0.0),
    }
    tries = [
        named(tried(name, {"fp32": size})[0], kind, moved, back) for name, (kind, size, moved, back) in arms.items()
    ]
    first = [r for r in records() if r.spec.arm != f"fp32-{FEW}"]
    found = {line.split()[1]: line.split(" | ")[2:] for line in optimizers.table(Evidence([*first, *tries]))}
    assert found["adamw_8bit"] == ["-40 / = / =", f"= {FEW}", f"= {FEW} |"]
    assert found["paged_adamw_8bit"] == found["adamw_8bit"]
    assert found["rmsprop_bnb_32bit"] == ["-40 / - / -", "= rmsprop_bnb", "= rmsprop_bnb |"]
    assert found[FEW][0] == "-40 / -15 / -1"
    # Other bytes, another class, other steps, the first of two names: the same as nothing.
    for name in ("paged_adamw_32bit", "lion_8bit", "ademamix", "rmsprop_bnb"):
        assert found[name] == ["-40 / - / -", "-", "- |"]


def test_it_tells_that_lora_leaves_no_state_to_save() -> None:
    held = {**FULL, "lora": (30.0, 1000.0)}
    found = [r for r in records() if not r.spec.arm.endswith(f"-{ADAMW}") or r.spec.arm == f"loss-{ADAMW}"]
    told = verdict([*found, *tried(ADAMW, held)])
    assert told.flips == (
        "holds in fp32 (AdamW's state is 80% of the peak, the most that any saves 40%), bf16 (AdamW's state is 80% of the peak, "
        "the most that any saves 15%); does not in lora (AdamW's state is 3% of the peak, the most that any saves 1%)"
    )
    assert verdict(records(EVERYWHERE)).flips == ""
    wide = (BEST[0] - 0.3, BEST[1], BEST[2] + 0.4)
    assert "is undecided in fp32 (" in verdict(records(SAVING, wide)).flips


def test_alone_adamw_is_compared_with_nothing() -> None:
    found = verdict([r for r in records() if FEW not in r.spec.arm])
    assert found.verdict == "inconclusive"
    assert found.because == f"no optimizer to compare with {ADAMW}"


def test_a_time_that_is_missing_costs_no_verdict() -> None:
    found = verdict([r for r in records() if not r.spec.arm.startswith("time-")])
    assert found.verdict == "conditional"
    assert "the time" not in found.because


# Sim ------------------------------------------------------------------------------------------------------------


def simulated(*held: tuple[str, dict[str, tuple[float, float]]]) -> Verdict:
    found = [record for name, bytes_held in held for record in tried(name, bytes_held, sim=True)]
    return judge(optimizers.EXPERIMENT, CLAIM, "cpu", "sim", found, len(found))


def test_the_sim_tier_judges_memory_alone() -> None:
    found = simulated((ADAMW, FULL), (FEW, SAVING))
    assert found.verdict == "conditional"
    assert found.control == (
        "AdamW's bytes: refuted, an optimizer that hardly moves: not run, half the bytes for the same loss: supported"
    )
    assert "lost" not in found.because
    assert found.because.startswith(
        "by bytes alone, the loss is not asked: what is named may learn less; fp32 does by "
    )
    assert found.unit == "of AdamW's peak, by the smallest optimizer, the loss not asked"
    assert verdict(records()).unit == "of AdamW's peak, by the best optimizer that keeps the loss"
    assert simulated((ADAMW, FULL), (FEW, EVERYWHERE)).verdict == "supported"
    assert simulated((ADAMW, FULL), (FEW, FULL)).verdict == "refuted"
    assert simulated((FEW, SAVING)).verdict == "inconclusive"


def test_memory_without_losses_is_not_enough_where_models_are_trained() -> None:
    found = [r for r in records(EVERYWHERE) if not r.spec.arm.startswith("loss-")]
    assert verdict(found).verdict == "inconclusive"


def test_it_has_to_save_on_every_model() -> None:
    more = [*tried(ADAMW, FULL, model="tiny"), *tried(FEW, {**EVERYWHERE, "fp32": (200.0, 950.0)}, model="tiny")]
    found = verdict([*records(EVERYWHERE), *more])
    assert found.verdict == "conditional"
    assert found.because.startswith("fp32 does not; bf16 does by")


# Plots and plan -------------------------------------------------------------------------------------------------


def test_the_plot_has_a_point_for_each_optimizer() -> None:
    lines = optimizers.choice_lines(Evidence(records()))
    assert list(lines) == [ADAMW, FEW]
    assert (lines[ADAMW].x, lines[ADAMW].y) == ([8.0], [0.0])
    assert lines[FEW].x == [2.0]
    assert lines[FEW].y == [pytest.approx(1.0, abs=0.2)]
    peaks = optimizers.peak_lines(Evidence(records()))
    assert {regime: line.y for regime, line in peaks.items()} == {
        "fp32": [pytest.approx(60)],
        "bf16": [pytest.approx(85)],
        "lora": [pytest.approx(99)],
    }


def params(**changes: Any) -> optimizers.Params:
    section: dict[str, Any] = {
        "model": "llama-6m",
        "batch": 1,
        "length": 16,
        "task": "a",
        "seeds": 4,
        "sweep_seeds": 1,
        "updates": 5,
        "micro_batch_size": 4,
        "questions": 10,
        "rounds": 3,
        "rates": {ADAMW: [1e-3], FEW: [1e-4, 1e-3]},
    }
    return optimizers.Params.model_validate({**section, **changes})


def test_every_name_is_tried_and_those_with_rates_are_trained_and_timed() -> None:
    sizes = {"train": 1, "validation": 1, "test": 1}
    profile = Profile.model_validate({"device": "cpu", "threads": 2, "tiny": {}, "data": sizes})
    real = {"models": ["llama-3.2-1b"], "batch": 1, "length": 64}
    plan = optimizers.trials(params(real_scale=real), profile)
    specs = templates(plan)
    assert {s.settings.optimizer for s in specs if isinstance(s.settings, OptimizerTry)} == set(optimizers.NAMES)
    assert {s.arm for s in specs if s.arm.startswith(("bf16", "lora"))} == {
        f"{regime}-{name}" for regime in ("bf16", "lora") for name in (ADAMW, FEW)
    }
    sweeps = [item for item in plan if isinstance(item, Sweep)]
    assert [(sweep.rates, len(sweep.tried), len(sweep.then)) for sweep in sweeps] == [
        ((1e-3,), 1, 4),
        ((1e-4, 1e-3), 1, 4),
    ]
    timings = [s for s in specs if isinstance(s.settings, Timing)]
    assert [(s.arm, s.threads) for s in timings] == [(f"time-{FEW}", 2)]
    assert isinstance(timings[0].settings, Timing)
    assert timings[0].settings.first.optimizer == ADAMW
    assert sum(s.tier == "sim" for s in specs) == 2 * len(REGIMES)
    assert {FEW, ADAMW} <= set(OPTIMIZERS)
    assert sum(s.arm == "control-idle" for s in specs) == 3


def test_the_margin_is_that_of_the_eight_bit_optimizer() -> None:
    from experiments import eight_bit_optimizer, peft_cost

    assert MARGIN == eight_bit_optimizer.MARGIN
    assert optimizers.LEAST_SAVING == peft_cost.LEAST_SAVING
