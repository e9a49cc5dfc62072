"""Half precision: does it relieve memory, does it train as fp32 does, and where does it break?

Claim     half-precision-relieves-memory (lecture 4)
Refuted   if no way of training in 16 bits both saves LEAST_SAVING of fp32's peak, at some batch and length, and stays within
          MARGIN of its progress, at some learning rate; conditional if some do, at some
Control   fp32 presented as every way; every way with the loss before training; half of the bytes and fp32's losses
Run       lab run half_precision --profile cpu

Bytes are counted, not drawn: their interval is a span over ways and points. Losses are paired by seed and data order, and
their intervals hold together for all ways and rates (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import product
from typing import Any

from pydantic import Field

from lab.cards import GIB
from lab.claims import Claim, Control, Evidence, Experiment, Finding, over_answers
from lab.params import Count, Profile, Rate, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import HalfPrecision, LossScaling, TrialSpec, memory_spec
from lab.statistics import CONFIDENCE, Answer, Interval, bonferroni, first_at_most, lies_within, mean_interval, span

NAME = "half_precision"

# A saving under 10 % buys no larger batch in practice: it is within what fragmentation of a card takes (peft_cost.py).
LEAST_SAVING = 0.10

# A way trains as fp32 does if it loses (or gains) at most this share of the progress that fp32 makes in the same updates:
# one update in twenty, as for the 8-bit optimizer (eight_bit_optimizer.py).
MARGIN = 0.05

# A loss scale works if no gradient overflows and at most this share of the nonzero ones becomes zero. AdamW moves a weight
# by about the learning rate however small its gradient is, so a gradient that is lost is a weight that stands still.
LOST = 0.01

# Powers of two from no scale at all to beyond 2^16, where torch's dynamic scale begins.
EXPONENTS = tuple(range(0, 25, 4))

# Of bytes, where two are held in the place of four.
HALF = 0.5

WAYS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {"precision": "fp16"},
    "bf16": {"precision": "bf16"},
    "bf16-stochastic": {"precision": "bf16", "stochastic_rounding": True},
    "bf16-master": {"precision": "bf16-master"},
    "autocast": {"precision": "autocast"},
    "fp16-scaled": {"precision": "autocast", "half": "fp16", "loss_scaling": True},
    "fp16-unscaled": {"precision": "autocast", "half": "fp16"},
}
"""`fp16` and `bf16`: weights, gradients and moments in 16 bits. `autocast`, `fp16-scaled`: fp32 weights, 16-bit products."""

MEASURED = ("fp16", "bf16", "bf16-master", "autocast")
HELD_AS = {"bf16-stochastic": "bf16", "fp16-scaled": "autocast"}
"""Ways whose bytes are taken from another and not measured: fp16 and bf16 are of one width, and stochastic rounding keeps
nothing from one update to the next; what it holds for a moment is not counted."""

JUDGED = (*MEASURED, *HELD_AS)
"""`fp16-unscaled` is no way to recommend; it shows what the loss scale is for."""


class Sizes(Section):
    """Full fine-tuning with AdamW of each model, at each (batch, length) of `points`."""

    memory_models: tuple[str, ...] = Field(min_length=1)
    points: tuple[tuple[Count, Count], ...] = Field(min_length=1)


class Params(Sizes):
    """What is measured, what is simulated at real scale, what is trained, and whose gradients are scaled (model: task)."""

    real_scale: Sizes | None = None
    model: str
    task: str
    seeds: Count
    examples: Count
    updates: Count
    micro_batch_size: Count
    questions: Count
    learning_rates: tuple[Rate, ...] = Field(min_length=1)
    scaled: dict[str, str] = Field(min_length=1)


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Peaks of each way at each point; trainings of each way at each rate; gradients over loss scales."""
    specs: list[TrialSpec] = []
    for sizes, sim in ((params, False), (params.real_scale, True)):
        for model, (batch, length), way in product(
            sizes.memory_models if sizes else (), sizes.points if sizes else (), ("fp32", *MEASURED)
        ):
            setup = {"model": model, "batch": batch, "length": length, "precision": way}
            specs.append(memory_spec(NAME, f"memory-{way}", f"{model}-{batch}x{length}", profile.device, sim, **setup))
    common: dict[str, Any] = {
        "examples": params.examples,
        "updates": params.updates,
        "micro_batch_size": params.micro_batch_size,
        "questions": params.questions,
        "evaluations": 0,
        "device": profile.device,
    }
    top = max(params.learning_rates)
    for seed, (way, how) in product(range(params.seeds), WAYS.items()):
        # Which gradients fp16 loses does not depend on the learning rate.
        rates = (top,) if way.startswith("fp16-") else params.learning_rates
        run = HalfPrecision(model=params.model, task=params.task, learning_rates=rates, seed=seed, **common, **how)
        specs.append(TrialSpec(experiment=NAME, name=f"train-{way}-seed{seed}", arm=f"train-{way}", settings=run))
    for seed, (model, task) in product(range(params.seeds), params.scaled.items()):
        probe = LossScaling(model=model, task=task, learning_rate=top, exponents=EXPONENTS, seed=seed, **common)
        specs.append(TrialSpec(experiment=NAME, name=f"scale-{model}-seed{seed}", arm=f"scale-{model}", settings=probe))
    return specs


# Memory ---------------------------------------------------------------------------------------------------------


def savings(evidence: Evidence, way: str, figure: str = "peak_bytes") -> dict[str, float]:
    """By point of each model (`tiny 8 x 128`), the share of fp32's bytes that a way saves."""

    def bytes_by_point(arm: str) -> dict[str, float]:
        return {_point(r): r.figure(figure) for r in evidence.select(f"memory-{arm}")}

    full, half = bytes_by_point("fp32"), bytes_by_point(HELD_AS.get(way, way))
    return {point: 1 - half[point] / full[point] for point in full}


def _point(record: Record) -> str:
    return f"{record.setting('model')} {record.setting('batch')} x {record.setting('length'):,}"


def _unfused(evidence: Evidence) -> list[str]:
    """Where the simulation's fp32 holds more than twice the bytes of 16 bits, which the width does not explain, and how many."""
    fp32, bf16 = ({_point(r): r for r in evidence.select(arm)} for arm in ("memory-fp32", "memory-bf16"))
    beyond = []
    for point in [point for point, share in savings(evidence, "bf16").items() if round(share, 2) > HALF]:
        more = fp32[point].figure("activations_bytes") - bf16[point].figure("activations_bytes") / HALF
        beyond.append(f"{point} ({more / GIB:,.0f} GiB of fp32's {fp32[point].figure('peak_bytes') / GIB:,.0f})")
    if not beyond:
        return []
    return [
        f"two bytes for four save {HALF:.0%}: what is above that at {', '.join(beyond)} comes from attention, where fp32 falls "
        "back to a kernel that is not fused and keeps the scores; autocast and fp32 copies save by the same"
    ]


# Training -------------------------------------------------------------------------------------------------------


def _at(evidence: Evidence, way: str, name: str) -> dict[float, list[Any]]:
    """By learning rate, a series' values in the order of the seeds."""
    found: dict[float, list[Any]] = {}
    for record in evidence.select(f"train-{way}"):
        for rate, value in zip(record.series["learning_rate"], record.series[name], strict=True):
            found.setdefault(float(rate or 0), []).append(value)
    return found


def progress_lost(evidence: Evidence, way: str, confidence: float = CONFIDENCE) -> dict[float, Interval | None]:
    """By learning rate, the share of fp32's progress in test loss that the way did not make; None: a training broke.

    Raises:
        ValueError: two runs of one seed did not see the same rows.
    """
    pairs = list(zip(evidence.select("train-fp32"), evidence.select(f"train-{way}"), strict=True))
    for first, second in pairs:
        if first.tags["data_order"] != second.tags["data_order"]:
            raise ValueError(f"{second.spec.name}: fp32 did not see the same rows")
    base = [first.figure("base_test_loss") for first, _ in pairs]
    full = _at(evidence, "fp32", "test_loss")
    lost: dict[float, Interval | None] = {}
    for rate, losses in _at(evidence, way, "test_loss").items():
        if None in losses:
            lost[rate] = None
            continue
        lost[rate] = mean_interval(
            [(loss - best) / (start - best) for loss, best, start in zip(losses, full[rate], base, strict=True)],
            confidence,
        )
    return lost


def _trains(lost: Interval | None) -> Answer:
    return "no" if lost is None else lies_within(lost, -MARGIN, MARGIN)


# Gradients ------------------------------------------------------------------------------------------------------


def _over_scales(records: Sequence[Record], name: str) -> list[float]:
    """At each exponent, the largest over the seeds."""
    return [max(float(v or 0) for v in column) for column in zip(*(r.series[name] for r in records), strict=True)]


def scales_that_work(records: Sequence[Record]) -> list[int]:
    """The exponents at which nothing overflows and at most LOST is lost, in every seed, before and after training."""
    worst = [
        max(pair) for pair in zip(_over_scales(records, "base_lost"), _over_scales(records, "tuned_lost"), strict=True)
    ]
    over = [_over_scales(records, f"{when}_overflowed") for when in ("base", "tuned")]
    exponents = [int(value or 0) for value in records[0].series["exponent"]]
    return [e for e, share, *burst in zip(exponents, worst, *over, strict=True) if share <= LOST and not any(burst)]


def _gradients(evidence: Evidence) -> list[str]:
    """What each model's gradients say: how many fp16 loses, without a loss scale and with one that works."""
    words = []
    for arm in sorted({r.spec.arm for r in evidence.records if r.spec.arm.startswith("scale-")}):
        records = evidence.select(arm)
        works = scales_that_work(records)
        unscaled = [r.series[f"{when}_lost"][0] or 0.0 for r in records for when in ("base", "tuned")]
        bf16 = max(r.figure(f"{when}_bf16_lost") for r in records for when in ("base", "tuned"))
        said = "no scale that was tried keeps them"
        if works:
            place = records[0].series["exponent"].index(works[0])
            left = max(_over_scales(records, f"{when}_lost")[place] for when in ("base", "tuned"))
            said = f"{left:.2%} at most with one of 2^{works[0]}, right to 2^{works[-1]}"
        words.append(
            f"fp16 gradients of {arm.removeprefix('scale-')}: {min(unscaled):.0%} to {max(unscaled):.0%} become zero without a "
            f"loss scale (bf16 {bf16:.0%}), {said}"
        )
    return words


def _unscaled(evidence: Evidence) -> str:
    """What training without a loss scale loses by the gradients that become zero."""
    lost = progress_lost(evidence, "fp16-unscaled")
    answers = {_trains(interval) for interval in lost.values()}
    seen = "was not seen" if answers == {"yes"} else "is seen" if answers == {"no"} else "is undecided"
    at = ", ".join(_lost_at(lost))
    return f"an effect of that on the loss {seen}: fp16-unscaled, tried at the highest rate alone, loses {at}"


# Judge ----------------------------------------------------------------------------------------------------------


def judge(evidence: Evidence) -> Finding:
    """A cell for each way, point and learning rate: it saves enough, and it trains as fp32 does.

    In the sim tier nothing is trained, and memory decides alone.
    """
    simulated = all(r.spec.tier == "sim" for r in evidence.records)
    answers: list[Answer] = []
    peaks: list[float] = []
    words = []
    by_way: dict[str, tuple[dict[str, float], dict[float, Interval | None]]] = {}
    together = CONFIDENCE if simulated else bonferroni(sum(len(_at(evidence, way, "test_loss")) for way in JUDGED))
    for way in MEASURED if simulated else JUDGED:
        saved = savings(evidence, way)
        steady = span(list(savings(evidence, way, "steady_bytes").values()))
        lost = {} if simulated else progress_lost(evidence, way, together)
        by_way[way] = saved, lost
        peaks += saved.values()
        trains: list[Answer] = ["yes"] if simulated else [_trains(interval) for interval in lost.values()]
        answers += [_both(saving, trained) for saving, trained in product(saved.values(), trains)]
        at = ", ".join([*_lost_at(lost), *_enough(lost)])
        points = ", ".join(f"{share:.0%} at {point}" for point, share in saved.items())
        words.append(
            f"{way}: of the peak saved {points}, between updates {steady.estimate:.0%}"
            + (f", of the progress lost {at}" if at else "")
        )
    if simulated:
        words += _unfused(evidence)
    else:
        words += [*_standing_still(evidence), *_gradients(evidence), _unscaled(evidence)]
    flips = _flips(by_way) if len(set(answers)) > 1 else ""
    return Finding.of(over_answers(answers), span(peaks), "of fp32's peak saved", "; ".join(words), flips)


def _lost_at(lost: dict[float, Interval | None]) -> list[str]:
    """In words: 12.1 [11.8, 12.4] % at 0.001."""
    return [f"{i.times(100):z.1f} % at {rate:g}" if i else f"all at {rate:g} (it breaks)" for rate, i in lost.items()]


def _enough(lost: dict[float, Interval | None]) -> list[str]:
    """In words, from which rate on what is lost is within the margin; nothing where that is so at the first, or at none."""
    found = _within_from(lost)
    return [f"{MARGIN:.0%} at about {found}"] if found else []


def _within_from(lost: dict[float, Interval | None]) -> str:
    """The rate from which on what is lost is within the margin, on straight lines over the logarithm of the rate.

    Beside it stand the rates from which on the ends of the intervals are.
    """
    found = {math.log10(rate): interval for rate, interval in sorted(lost.items()) if interval}
    enough, first, last = (
        first_at_most([(rate, getattr(interval, end)) for rate, interval in found.items()], MARGIN)
        for end in ("estimate", "low", "high")
    )
    if enough is None or first is None or enough == min(found):
        return ""
    return f"{10**enough:.1g} [{10**first:.1g}, {'not reached' if last is None else f'{10**last:.1g}'}]"


def _flips(by_way: dict[str, tuple[dict[str, float], dict[float, Interval | None]]]) -> str:
    """Which ways save enough, and at which points; and at which rates they train as fp32 does."""
    ways: dict[str, list[str]] = {}
    for way, (saved, _) in by_way.items():
        enough, little = ([p for p in saved if (saved[p] < LEAST_SAVING) == less] for less in (False, True))
        where = f"at {', '.join(enough)} and not at {', '.join(little)}" if enough and little else ""
        ways.setdefault(where or ("at every point" if enough else "at no point"), []).append(way)
    by = ", by ".join(f"{', '.join(chosen)} {where}" for where, chosen in ways.items())
    told = [f"{LEAST_SAVING:.0%} of the peak is saved by {by}"]
    for way, (_, lost) in by_way.items():
        rates: dict[Answer, list[str]] = {}
        for rate, interval in lost.items():
            rates.setdefault(_trains(interval), []).append(f"{rate:g}" + " (it breaks)" * (interval is None))
        if rates.keys() - {"yes"}:
            words = ", ".join(
                f"{answer} at {', '.join(there)}" for answer, there in sorted(rates.items(), reverse=True)
            )
            start = _within_from(lost)
            below = f" (below about {start} it loses more than {MARGIN:.0%} of the progress)" if start else ""
            told.append(f"{way} trains as fp32 does: {words}{below}")
    return "; ".join(told)


def _both(saving: float, trains: Answer) -> Answer:
    return "no" if saving < LEAST_SAVING else trains


def _standing_still(evidence: Evidence) -> list[str]:
    """How many weights an update changes at the smallest rate, and how many a training."""
    parts = []
    for way in ("fp32", "bf16", "bf16-stochastic", "bf16-master"):
        changed, moved = _at(evidence, way, "changed"), _at(evidence, way, "moved")
        rate = min(changed)
        of_update, of_all = (sum(values) / len(values) for values in (changed[rate], moved[rate]))
        parts.append(f"{way} {of_update:.0%} in an update and {of_all:.0%} in all")
    skipped = max(value for values in _at(evidence, "fp16-scaled", "skipped").values() for value in values)
    return [
        f"weights that change at {rate:g}: {', '.join(parts)}",
        f"fp16-scaled left out up to {skipped:.0f} updates for an overflow",
    ]


# Controls -------------------------------------------------------------------------------------------------------


def _as_every_way(evidence: Evidence, by: str, kinds: Sequence[str]) -> Evidence:
    """Records of one way presented as every other, of the kinds (`memory`, `train`) that there are."""
    for kind, way in product(kinds, (*MEASURED, *HELD_AS)):
        if evidence.has(f"{kind}-{way}"):
            evidence = evidence.replace(f"{kind}-{way}", by=f"{kind}-{by}")
    return evidence


def full_precision(evidence: Evidence) -> Evidence:
    """fp32 presented as every way: nothing is lost, and nothing is saved."""
    return _as_every_way(evidence, "fp32", ("memory", "train"))


def untrained(evidence: Evidence) -> Evidence:
    """Every way ends with the loss that it began with: its updates are lost."""

    def lost(record: Record) -> Record:
        if record.spec.arm not in {f"train-{way}" for way in JUDGED}:
            return record
        losses = [record.figures["base_test_loss"]] * len(record.series["test_loss"])
        return record.model_copy(update={"series": {**record.series, "test_loss": losses}})

    return Evidence(map(lost, _as_every_way(evidence, "fp32", ("train",)).records))


def flawless(evidence: Evidence) -> Evidence:
    """fp32's losses at half of its bytes."""

    def halved(record: Record) -> dict[str, float]:
        if not record.spec.arm.startswith("memory-") or record.spec.arm == "memory-fp32":
            return {}
        return {name: record.figure(name) / 2 for name in ("peak_bytes", "steady_bytes")}

    return full_precision(evidence).with_figures(halved)


# Plots ----------------------------------------------------------------------------------------------------------


def progress_lines(evidence: Evidence) -> dict[str, Line]:
    """The share of fp32's progress that each way made, over the learning rate."""
    lines = {}
    for way in (*JUDGED, "fp16-unscaled"):
        made = {rate: lost for rate, lost in sorted(progress_lost(evidence, way).items()) if lost}
        if made:
            ends = [[100 * (1 - value) for value in (i.estimate, i.high, i.low)] for i in made.values()]
            lines[way] = Line(list(made), *map(list, zip(*ends, strict=True)))
    return lines


def changed_lines(evidence: Evidence) -> dict[str, Line]:
    """The share of weights that an update changes, over the learning rate, the mean over seeds."""
    lines = {}
    for way in ("fp32", "bf16", "bf16-stochastic", "bf16-master"):
        changed = dict(sorted(_at(evidence, way, "changed").items()))
        lines[way] = Line(list(changed), [100 * sum(values) / len(values) for values in changed.values()])
    return lines


def scale_lines(evidence: Evidence) -> dict[str, Line]:
    """The share of fp16 gradients that are lost, and of seeds in which one overflows, over the loss scale."""
    lines = {}
    for arm in sorted({r.spec.arm for r in evidence.records if r.spec.arm.startswith("scale-")}):
        records, model = evidence.select(arm), arm.removeprefix("scale-")
        scales = [2.0 ** float(value or 0) for value in records[0].series["exponent"]]
        for when, name in (("base", "before training"), ("tuned", "after training")):
            for what, figure in (
                ("gradients that become zero", "lost"),
                ("seeds in which one overflows", "overflowed"),
            ):
                columns = zip(*(r.series[f"{when}_{figure}"] for r in records), strict=True)
                lines[f"{model} {name}: {what}"] = Line(
                    scales, [100 * sum(float(v or 0) for v in column) / len(column) for column in columns]
                )
    return lines


EXPERIMENT = Experiment(
    name=NAME,
    title="Half precision",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="half-precision-relieves-memory",
            statement="fp16 or bf16 relieves memory",
            lecture="4",
            tiers=("sim", "cpu", "gpu"),
            threshold=f"at least {LEAST_SAVING:.0%} of fp32's peak saved, and the 95 % interval of the progress lost within "
            f"{MARGIN:.0%} of fp32's (all ways and rates together), for every way at every point and learning rate",
            scope="full fine-tuning with AdamW in fp16, bf16 (rounded to nearest or by chance), bf16 with an fp32 copy, and "
            "under autocast; one task, few updates, products as a GPU rounds them; the bytes of rounding by chance are plain "
            "bf16's, not measured; fp16 under autocast at the highest rate alone; sim: memory alone, and fp32 attends without a "
            "fused kernel where keys are grouped",
            judge=judge,
            controls={
                "fp32 as every way": Control(full_precision, "refuted"),
                "every update lost": Control(untrained, "refuted", ("train-fp32",)),
                "nothing to find fault with": Control(flawless, "supported"),
            },
            advice={
                "supported": "Train in 16 bits, whichever way: it saves memory and costs no quality.",
                "conditional": "Hold weights in bf16 and round by chance, or keep the rate where bf16 loses little (`tiny`: "
                "2e-4 to 5e-4); autocast and fp32 copies save activations at most.",
                "refuted": "Do not count on 16 bits: look to the batch, checkpointing or an adapter for memory.",
                "inconclusive": "Hold weights in fp32 under bf16 autocast, and compare a short run in plain 16 bits before you "
                "rely on it.",
            },
            stated={"cpu": "conditional", "full": "conditional", "sim": "conditional"},
        ),
    ),
    plots=(
        Plot(
            "half-precision-progress",
            "Training in half precision",
            "learning rate",
            "% of fp32's progress",
            progress_lines,
            log_x=True,
        ),
        Plot(
            "half-precision-changed",
            "Weights that an update changes",
            "learning rate",
            "% of the weights",
            changed_lines,
            log_x=True,
        ),
        Plot(
            "half-precision-loss-scale",
            "Gradients in fp16",
            "loss scale",
            "%",
            scale_lines,
            log_x=True,
        ),
    ),
)
