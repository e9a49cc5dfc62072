"""Does parameter-efficient fine-tuning train faster than full fine-tuning, and what does full fine-tuning cost more?

Claims    peft-trains-faster, full-ft-costs-more, quantised-peft-is-cheaper (lecture 3)
Refuted   if no method saves MARGIN of the time; if full costs nothing more; if 4 bits save no bytes over LoRA
Control   each method presented at the cost of what it is held against, and at half of it
Run       lab run training_cost --profile cpu

An update of a method and one of full fine-tuning are timed in turn in one process, so that both see the same machine. How
many updates a method needs comes from the curves of peft_vs_full, at the learning rate chosen there. The intervals of a
sense hold together over methods and models (Bonferroni).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

from lab.claims import (
    Cell,
    Claim,
    Control,
    Evidence,
    Experiment,
    Finding,
    MissingEvidence,
    VerdictName,
    in_words,
    over_answers,
)
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Timing, Training, TrialSpec, memory_spec
from lab.statistics import (
    CONFIDENCE,
    Interval,
    bonferroni,
    first_at_most,
    lies_above,
    lies_within,
    mean_interval,
    mean_product,
    mean_ratio,
    span,
)
from lab.sweeps import at_best

NAME = "training_cost"
FULL = "full"
METHODS = ("lora", "qlora", "dora", "mora", "ia3", "adapter", "prompt", "prefix", "ptuning")
QUANTISED = "qlora-over-lora"
"""The arm in which QLoRA is timed against LoRA itself."""

# Of time and of operations. Less than one hour in twenty changes no plan; and it can be told: the same settings timed
# against themselves 40 times gave a median within 2 % of 1 in four of four tries, on a machine that was not idle.
MARGIN = 0.05

# Of bytes: a saving under 10 % is within what fragmentation of a card takes (peft_cost says the same of peaks).
BYTES_MARGIN = 0.10

# Of the progress in test loss that LoRA makes, as in eight_bit_optimizer: one update in twenty.
LOSS_MARGIN = 0.05

# The loss to reach lies half-way from the base's to the best that full fine-tuning reaches with the same seed, which full
# fine-tuning does by construction; a method that learns less never comes there, and counts as slower.
TARGET = 0.5


class ModelParams(Section):
    """Which methods are timed on a model, and how: `repeats` trials of `rounds` updates, each with a seed of its own."""

    task: str
    methods: tuple[str, ...] = METHODS
    repeats: Count
    rounds: Count
    micro_batch_size: Count
    length: Count
    """Of the rows on which the peak is measured."""


class RealScale(Section):
    """Where LoRA and QLoRA are simulated: in bf16 under autocast, as in peft_cost, at each (batch, length)."""

    models: tuple[str, ...]
    points: tuple[tuple[Count, Count], ...]


class Params(Section):
    """What is timed and measured, by model, and what is simulated."""

    models: dict[str, ModelParams]
    real_scale: RealScale | None = None


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Every method against full fine-tuning, QLoRA against LoRA, and each one's peak. What is timed takes all threads."""
    specs = []
    for model, chosen in params.models.items():
        pairs = [(f"time-{method}", FULL, method) for method in chosen.methods]
        pairs += [(QUANTISED, "lora", "qlora")] if {"lora", "qlora"} <= set(chosen.methods) else []
        for (arm, first, second), seed in product(pairs, range(chosen.repeats)):
            runs = {
                side: Training(
                    model=model,
                    task=chosen.task,
                    method=method,
                    updates=chosen.rounds + 1,
                    micro_batch_size=chosen.micro_batch_size,
                    evaluations=0,
                    schedule="constant",
                    seed=seed,
                    device=profile.device,
                )
                for side, method in (("first", first), ("second", second))
            }
            settings = Timing(first=runs["first"], second=runs["second"], rounds=chosen.rounds)
            name = f"{arm}-{model}-seed{seed}"
            specs.append(TrialSpec(experiment=NAME, name=name, arm=arm, threads=profile.threads, settings=settings))
        for method in (FULL, *chosen.methods):
            setup: dict[str, Any] = {
                "model": model,
                "method": method,
                "batch": chosen.micro_batch_size,
                "length": chosen.length,
            }
            specs.append(memory_spec(NAME, f"peak-{method}", model, profile.device, **setup))
    if params.real_scale:
        points = product(params.real_scale.models, params.real_scale.points, ("lora", "qlora"))
        for model, (batch, length), method in points:
            setup = {"model": model, "method": method, "batch": batch, "length": length}
            setup |= {"precision": "bf16", "autocast": True}
            specs.append(
                memory_spec(NAME, f"peak-{method}", f"{model}-{batch}x{length}", profile.device, sim=True, **setup)
            )
    return specs


# What the judges share ------------------------------------------------------------------------------------------


def _words(title: str, cells: Sequence[Cell]) -> str:
    return in_words(title, cells, "{:.2f}".format)


def _timed(evidence: Evidence, arm: str, model: str) -> list[Record]:
    """The successful timings of an arm on a model, in order of their names.

    Raises:
        MissingEvidence: there is none.
    """
    found = [r for r in evidence.select(arm) if r.spec.models() == {model}]
    if not found:
        raise MissingEvidence(f"no successful record with arm {arm} on {model}")
    return found


def _cells(evidence: Evidence) -> list[tuple[str, str]]:
    """(model, method) of every method that was timed, those whose trials failed too: they must not go unnoticed."""
    found = [(m, r.spec.arm) for r in evidence.records for m in r.spec.models() if r.spec.arm.startswith("time-")]
    return [(model, arm.removeprefix("time-")) for model, arm in dict.fromkeys(found)]


def _trained(evidence: Evidence, model: str, method: str) -> dict[int, Record]:
    """The runs of peft_vs_full at the chosen rate, by seed ({} where the profile has none)."""
    found = [r for r in evidence.records if r.spec.arm == f"{model}-{method}"]
    return {r.setting("seed"): r for r in at_best(found)} if found else {}


# peft-trains-faster ---------------------------------------------------------------------------------------------


def _faster(name: str, interval: Interval) -> Cell:
    """A method's time over full fine-tuning's, and whether it is less."""
    return Cell(name, interval, lies_within(interval, -math.inf, 1 - MARGIN))


def _to_target(updates: Sequence[float], times: Sequence[float], confidence: float) -> Interval:
    """Time to the target over full fine-tuning's: its updates, seed by seed, times those of an update, measured apart.

    Where a run never arrives there is no mean, and all of them have to lie above.
    """
    if all(map(math.isfinite, updates)):
        return mean_product(updates, times, confidence)
    return Interval(math.inf, min(updates) * min(times), math.inf, len(updates))


def _validation(record: Record) -> list[tuple[float, float]]:
    """(update, validation loss) at each point of a run's curve."""
    series = zip(record.series.get("curve_update", []), record.series.get("curve_validation_loss", []), strict=True)
    return [(u, v) for u, v in series if u is not None and v is not None]


def _updates_to(loss: float, start: float, record: Record) -> float:
    """Updates until the validation loss first falls to `loss`, on straight lines between the points; inf: never."""
    found = first_at_most([(0.0, start), *_validation(record)], loss)
    return math.inf if found is None else found


@dataclass(frozen=True)
class Updates:
    """How many updates a method needs to the target, over how many full fine-tuning needs, by seed."""

    ratios: list[float]
    unseen: bool
    """Whether some run arrives before the first point of a curve: on the line from the start, where nothing was measured.
    That a method never arrives is seen all the same."""


def _updates_ratios(evidence: Evidence, model: str, method: str) -> Updates:
    """Both at their chosen rates, seed by seed.

    Raises:
        ValueError: full fine-tuning did not lower the loss, so that there is no target.
    """
    own, full = _trained(evidence, model, method), _trained(evidence, model, FULL)
    start = evidence.select(f"{model}-base")[0].figure("validation_loss")
    ratios, unseen = [], False
    for seed in sorted(own.keys() & full.keys()):
        best = min(loss for _, loss in _validation(full[seed]))
        if best >= start:
            raise ValueError(f"{model}: full fine-tuning did not lower the validation loss with seed {seed}")
        target = start + TARGET * (best - start)
        needed = [_updates_to(target, start, runs[seed]) for runs in (own, full)]
        ratios.append(needed[0] / needed[1])
        first = [_validation(runs[seed])[0][0] for runs in (own, full)]
        unseen |= math.isfinite(needed[0]) and any(n < f for n, f in zip(needed, first, strict=True))
    return Updates(ratios, unseen)


def judge_faster(evidence: Evidence) -> Finding:
    """Two statements, each with its cells: the time of an update, and the time until the loss is reached."""
    cells = _cells(evidence)
    times = {cell: [r.figure("ratio") for r in _timed(evidence, f"time-{cell[1]}", cell[0])] for cell in cells}
    updates = {cell: _updates_ratios(evidence, *cell) for cell in _with_curves(evidence)}
    per_update = [_faster(_on(cell), mean_ratio(ratios, bonferroni(len(times)))) for cell, ratios in times.items()]
    to_target = []
    for cell, needed in updates.items():
        found = _faster(_on(cell), _to_target(needed.ratios, times[cell], bonferroni(len(updates))))
        to_target.append(replace(found, answer="undecided") if needed.unseen else found)
    verdict = over_answers(cell.answer for cell in [*per_update, *to_target])
    slowest = max(per_update, key=lambda cell: cell.interval.high)
    means = ", ".join(f"{_on(cell)} {math.fsum(u.ratios) / len(u.ratios):.2f}" for cell, u in updates.items())
    unseen = [_on(cell) for cell, needed in updates.items() if needed.unseen]
    because = (
        f"{_words('time per update', per_update)}; {_words('time to the target loss', to_target)}; "
        f"updates to it over full's: {means}"
    )
    if unseen:
        because += f"; undecided, since it is reached before the first point of a curve: {', '.join(unseen)}"
    return Finding.of(verdict, slowest.interval, "x full's time per update, the slowest method", because)


def _with_curves(evidence: Evidence) -> list[tuple[str, str]]:
    """Model and method of what was timed and has curves, as full fine-tuning has.

    Raises:
        MissingEvidence: there is none.
    """
    found = [
        (m, method) for m, method in _cells(evidence) if _trained(evidence, m, method) and _trained(evidence, m, FULL)
    ]
    if not found:
        raise MissingEvidence("no curve of peft_vs_full for a method that was timed")
    return found


def _on(cell: tuple[str, str]) -> str:
    return f"{cell[1]} on {cell[0]}"


# full-ft-costs-more ---------------------------------------------------------------------------------------------


def judge_costs_more(evidence: Evidence) -> Finding:
    """What full fine-tuning costs over each method: operations, time, peak, file."""
    cells = _cells(evidence)
    quantities = ("FLOPs", "seconds", "peak bytes", "steady bytes", "checkpoint bytes")
    found: dict[str, list[Cell]] = {quantity: [] for quantity in quantities}

    def add(quantity: str, cell: tuple[str, str], ratio: Interval, margin: float) -> None:
        found[quantity].append(Cell(_on(cell), ratio, lies_above(ratio, 1 + margin)))

    for cell in cells:
        model, method = cell
        timed = _timed(evidence, f"time-{method}", model)
        full, own = (evidence.select(f"peak-{m}", model=model)[0] for m in (FULL, method))
        add("FLOPs", cell, span(_first_over_second(timed, "flops")), MARGIN)
        slower = mean_ratio([1 / r.figure("ratio") for r in timed], bonferroni(len(cells)))
        add("seconds", cell, slower, MARGIN)
        for kind in ("peak", "steady"):
            ratio = span([full.figure(f"{kind}_bytes") / own.figure(f"{kind}_bytes")])
            add(f"{kind} bytes", cell, ratio, BYTES_MARGIN)
        add("checkpoint bytes", cell, span(_first_over_second(timed, "checkpoint_bytes")), BYTES_MARGIN)
    every = [cell for group in found.values() for cell in group]
    if not every:
        raise MissingEvidence("no method was timed against full fine-tuning")
    least = min(every, key=lambda cell: cell.interval.low)
    stored = ", ".join(
        f"{_on(cell)} {r.figure('second_parameters_trainable'):,.0f} and {r.figure('second_parameters_stored'):,.0f}"
        for cell in cells
        for r in _timed(evidence, f"time-{cell[1]}", cell[0])[:1]
    )
    because = "; ".join([*(_words(name, group) for name, group in found.items()), f"trained and stored: {stored}"])
    return Finding.of(
        over_answers(cell.answer for cell in every), least.interval, "x a method's cost, the least of all", because
    )


def _first_over_second(records: Iterable[Record], name: str) -> list[float]:
    return [r.figure(f"first_{name}") / r.figure(f"second_{name}") for r in records]


# quantised-peft-is-cheaper --------------------------------------------------------------------------------------


def judge_quantised(evidence: Evidence) -> Finding:
    """What QLoRA saves of LoRA's bytes, and whether it costs time or loss."""
    lora = evidence.select("peak-lora")
    saved: dict[str, Cell] = {}
    for record in lora:
        point = {name: record.setting(name) for name in ("model", "batch", "length")}
        own = evidence.select("peak-qlora", **point)[0]
        for part in ("weights", "peak"):  # weights are the same at every point
            where = f" at {point['batch']} x {point['length']}" if part == "peak" else ""
            ratio = span([own.figure(f"{part}_bytes") / record.figure(f"{part}_bytes")])
            name = f"{part} of {point['model']}{where}"
            saved[name] = Cell(name, ratio, lies_within(ratio, -math.inf, 1 - BYTES_MARGIN))
    simulated = all(r.spec.tier == "sim" for r in lora)
    paid = [] if simulated else [*_quantised_times(evidence), *_quantised_losses(evidence)]
    byte_cells = list(saved.values())
    verdict: VerdictName = (
        "refuted"
        if {c.answer for c in byte_cells} == {"no"}
        else over_answers(cell.answer for cell in [*byte_cells, *paid])
    )
    because = "; ".join(
        [_words("a tenth less bytes than LoRA", byte_cells), *([_words("no dearer", paid)] if paid else [])]
    )
    return Finding.of(verdict, span([c.interval.estimate for c in byte_cells]), "x LoRA's weights and peaks", because)


def _quantised_models(evidence: Evidence) -> list[str]:
    return sorted({model for r in evidence.select(QUANTISED) for model in r.spec.models()})


def _quantised_times(evidence: Evidence) -> list[Cell]:
    models = _quantised_models(evidence)
    cells = []
    for model in models:
        ratios = [r.figure("ratio") for r in _timed(evidence, QUANTISED, model)]
        times = mean_ratio(ratios, bonferroni(2 * len(models)))  # of time and of loss
        cells.append(Cell(f"time per update on {model}", times, lies_within(times, -math.inf, 1 + MARGIN)))
    return cells


def _quantised_losses(evidence: Evidence) -> list[Cell]:
    """The share of LoRA's progress in test loss that QLoRA lacks; undecided where not both were trained."""
    models = _quantised_models(evidence)
    cells = []
    for model in models:
        lora, qlora = (_trained(evidence, model, method) for method in ("lora", "qlora"))
        if not (lora and qlora):
            nothing = Interval(math.nan, -math.inf, math.inf, 0)
            cells.append(Cell(f"progress lost on {model}, not trained,", nothing, "undecided"))
            continue
        start = evidence.select(f"{model}-base")[0].figure("test_loss")
        pairs = [
            (qlora[s].figure("test_loss"), lora[s].figure("test_loss")) for s in sorted(lora.keys() & qlora.keys())
        ]
        progress = start - math.fsum(loss for _, loss in pairs) / len(pairs)
        if progress <= 0:
            raise ValueError(f"{model}: LoRA did not lower the test loss, so that there is no progress to keep")
        lost = mean_interval([(own - loss) / progress for own, loss in pairs], bonferroni(2 * len(models)))
        cells.append(Cell(f"progress lost on {model}", lost, lies_within(lost, -math.inf, LOSS_MARGIN)))
    return cells


# Controls -------------------------------------------------------------------------------------------------------


def _at(factor: float, yardstick: str, timings: dict[str, str]) -> Callable[[Evidence], Evidence]:
    """Each method of `timings` (with the arm in which it is timed) as the yardstick, at `factor` times its costs."""

    def control(evidence: Evidence) -> Evidence:
        arms = {r.spec.arm for r in evidence.records}
        models = {model for r in evidence.records for model in r.spec.models()}
        for method, family in product(timings, ("peak", *sorted(models))):
            if {f"{family}-{method}", f"{family}-{yardstick}"} <= arms:
                evidence = evidence.replace(f"{family}-{method}", by=f"{family}-{yardstick}")
        peaks = {f"peak-{method}" for method in timings}

        def scaled(record: Record) -> dict[str, float]:
            if record.spec.arm in peaks:
                return {n: factor * record.figure(n) for n in ("weights_bytes", "peak_bytes", "steady_bytes")}
            if record.spec.arm in timings.values():
                costs = {n: factor * record.figure(f"first_{n}") for n in ("flops", "checkpoint_bytes")}
                return {"ratio": factor, **{f"second_{name}": cost for name, cost in costs.items()}}
            return {}

        return _arriving(evidence.with_figures(scaled))

    return control


def _beside_curves(control: Callable[[Evidence], Evidence]) -> Callable[[Evidence], Evidence]:
    """The control where a method that was timed has its curves; elsewhere no time to a loss can be judged."""

    def beside(evidence: Evidence) -> Evidence:
        _with_curves(evidence)
        return control(evidence)

    return beside


def _arriving(evidence: Evidence) -> Evidence:
    """Every run reaches half of the way from its base's loss to none at the first point of its curve: seen, and known."""
    changed = []
    for record in evidence.records:
        base = f"{record.spec.arm.partition('-')[0]}-base"
        if _validation(record) and record.spec.arm != base and evidence.has(base):
            half = evidence.select(base)[0].figure("validation_loss") / 2
            curve = {"curve_update": [1.0, 2.0], "curve_validation_loss": [half, 0.0]}
            record = record.model_copy(update={"series": {**record.series, **curve}})
        changed.append(record)
    return Evidence(changed)


def a_fifth_lost(evidence: Evidence) -> Evidence:
    """QLoRA whose test loss, seed by seed, is LoRA's and a fifth of LoRA's progress.

    Raises:
        MissingEvidence: on no model were both trained.
    """
    losses: dict[str, float] = {}
    for model in _quantised_models(evidence):
        lora, qlora = (_trained(evidence, model, method) for method in ("lora", "qlora"))
        for seed in lora.keys() & qlora.keys():
            start, end = evidence.select(f"{model}-base")[0].figure("test_loss"), lora[seed].figure("test_loss")
            losses[qlora[seed].spec.name] = end + (start - end) / 5
    if not losses:
        raise MissingEvidence("no model on which LoRA and QLoRA were trained")
    return evidence.with_figures(lambda r: {"test_loss": losses[r.spec.name]} if r.spec.name in losses else {})


def at_twice_the_time(evidence: Evidence) -> Evidence:
    """QLoRA whose updates take twice as long as LoRA's.

    Raises:
        MissingEvidence: it was not timed.
    """
    timed = {r.spec.name for r in evidence.select(QUANTISED)}
    return evidence.with_figures(lambda r: {"ratio": 2.0} if r.spec.name in timed else {})


OVER_FULL = {method: f"time-{method}" for method in METHODS}
OVER_LORA = {"qlora": QUANTISED}


# Plot -----------------------------------------------------------------------------------------------------------


def quality_memory_time(evidence: Evidence) -> dict[str, Line]:
    """One point for each method on tiny: peak, accuracy at the chosen rate, and as its area the time of an update over full's."""
    timed = [method for model, method in _cells(evidence) if model == "tiny"]
    methods = [FULL, *(method for method in timed if _trained(evidence, "tiny", method))]
    lines = {}
    for method in methods:
        runs = _trained(evidence, "tiny", method).values()
        accuracy = mean_interval([r.figure("test_accuracy") for r in runs]).estimate
        peak = evidence.select(f"peak-{method}", model="tiny")[0].figure("peak_bytes") / 1e6
        ratios = [1.0] if method == FULL else [r.figure("ratio") for r in _timed(evidence, f"time-{method}", "tiny")]
        lines[method] = Line([peak], [accuracy], area=[mean_ratio(ratios, CONFIDENCE).estimate])
    return lines


def undominated(lines: dict[str, Line]) -> set[str]:
    """The methods that no other beats: none is as good in memory, accuracy and time, and better in one of them."""

    def costs(line: Line) -> tuple[float, float, float]:
        return line.x[0], -line.y[0], (line.area or [1.0])[0]

    def beats(one: Line, other: Line) -> bool:
        pairs = list(zip(costs(one), costs(other), strict=True))
        return all(a <= b for a, b in pairs) and any(a < b for a, b in pairs)

    return {name for name, line in lines.items() if not any(beats(other, line) for other in lines.values())}


def pareto_points(evidence: Evidence) -> dict[str, Line]:
    """`quality_memory_time`, with a star behind the names of the methods on the Pareto front."""
    lines = quality_memory_time(evidence)
    front = undominated(lines)
    return {f"{name}*" if name in front else name: line for name, line in lines.items()}


def _claim(
    id: str, statement: str, threshold: str, scope: str, judge: Any, controls: Any, advice: Any, stated: Any
) -> Claim:
    return Claim(
        id=id,
        statement=statement,
        lecture="3",
        tiers=("sim", "cpu", "gpu") if judge is judge_quantised else ("cpu", "gpu"),
        threshold=threshold,
        scope=scope,
        judge=judge,
        controls=controls,
        advice=advice,
        stated=stated,
    )


PAID: tuple[VerdictName, ...] = ("conditional", "refuted")
"""Of bytes that fall at a price, and of a price alone."""

COSTS_OF_FULL = {
    "full fine-tuning as every method": Control(_at(1.0, FULL, OVER_FULL), "refuted"),
    "full fine-tuning at half its cost as every method": Control(_at(0.5, FULL, OVER_FULL), "supported"),
}
FASTER_THAN_FULL = {name: replace(each, change=_beside_curves(each.change)) for name, each in COSTS_OF_FULL.items()}

EXPERIMENT = Experiment(
    name=NAME,
    title="What training costs",
    params=Params,
    trials=trials,
    reads=("peft_vs_full",),
    claims=(
        _claim(
            "peft-trains-faster",
            "parameter-efficient fine-tuning trains faster",
            f"each method's interval under {1 - MARGIN:.2f} x full's time, per update and to half of full's progress in "
            "validation loss; 95 % over all methods together in each of the two; where a run never arrives no by count, if all "
            "runs lie above; undecided where a run arrives before the first point of a curve",
            "time per update: alternated in one process, batches of 16 short rows on tiny; updates to the loss: each at its own "
            "chosen learning rate, on straight lines between the points of its curve; of equally accurate rates the smallest, "
            "which makes full fine-tuning slower than it could be",
            judge_faster,
            FASTER_THAN_FULL,
            {
                "supported": "Expect to wait less with any of these methods, for an update and for a result.",
                "refuted": "Do not choose these methods for speed: take them for memory and for small files.",
                "conditional": "Time some updates of your method, and count how many it needs: fewer gradients promise nothing.",
                "inconclusive": "Do not plan with a speed-up: time some updates of your method and of full fine-tuning on your "
                "card.",
            },
            {"cpu": "conditional", "full": "conditional"},
        ),
        _claim(
            "full-ft-costs-more",
            "full fine-tuning costs more compute and storage",
            f"full over each method: FLOPs and seconds above {1 + MARGIN:.2f}, peak, steady and checkpoint bytes above "
            f"{1 + BYTES_MARGIN:.2f}; time 95 % over all methods together, counts as spans",
            "AdamW; FLOPs of matrix products and attention; a checkpoint is the weights without optimizer state",
            judge_costs_more,
            COSTS_OF_FULL,
            {
                "supported": "Plan more of everything for full fine-tuning: operations, time, memory and disk.",
                "refuted": "Do not rule full fine-tuning out for its cost before you have measured it.",
                "conditional": "Choose by what you are short of: not every method saves operations, time, memory and disk alike.",
                "inconclusive": "Measure operations, time, memory and disk of a short run both ways, and choose by what you are "
                "short of.",
            },
            {"cpu": "conditional", "full": "conditional"},
        ),
        _claim(
            "quantised-peft-is-cheaper",
            "quantisation makes parameter-efficient fine-tuning cheaper still",
            f"QLoRA over LoRA: weights and peak under {1 - BYTES_MARGIN:.2f}, time under {1 + MARGIN:.2f}, at most "
            f"{LOSS_MARGIN:.0%} of LoRA's progress in test loss lost (both 95 % over all models together; undecided where not "
            "trained); refuted if no bytes fall",
            "nf4, rank 8 on all linear layers; sim: bytes alone, bf16 under autocast; cpu: fp32, products on dequantised weights",
            judge_quantised,
            {
                "LoRA as QLoRA": Control(_at(1.0, "lora", OVER_LORA), "refuted"),
                "LoRA at half its cost as QLoRA": Control(_at(0.5, "lora", OVER_LORA), "supported"),
                "QLoRA that lost a fifth of the progress": Control(a_fifth_lost, PAID),
                "QLoRA at twice the time": Control(at_twice_the_time, PAID),
            },
            {
                "supported": "Take QLoRA instead of LoRA: it saves memory and costs nothing.",
                "refuted": "Stay with LoRA: four bits save nothing here.",
                "conditional": "Take QLoRA where weights fill the card; elsewhere it saves little, and dequantising takes time.",
                "inconclusive": "Take QLoRA where LoRA does not fit; elsewhere compare peak and time of an update first.",
            },
            {"cpu": "conditional", "full": "conditional", "sim": "conditional"},
        ),
    ),
    plots=(
        Plot(
            "quality-memory-time",
            "Quality, memory and time on tiny (area: time per update; *: Pareto front)",
            "peak of an update, MB",
            "test accuracy",
            pareto_points,
            joined=False,
            named=True,
        ),
    ),
)
