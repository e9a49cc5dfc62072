"""Does full fine-tuning work with little data? Held-out accuracy over the number of examples, at one number of updates.

Claim     little-data-suffices (lecture 3; LIMA, Zhou et al. 2023)
Refuted   if half of the rows that the updates could see, and LIMA_SHARE of them, are MARGIN worse than all; conditional if
          half of them do and LIMA_SHARE of them does not
Control   the fewest examples presented as LIMA_SHARE, and as every number but the largest; a base that nothing helps
Run       lab run little_data --profile cpu

Every run makes the same number of updates: on few rows it sees each often, on the most rows each once. More rows than
that cannot change a run. The learning rate is chosen on all rows, so whatever it costs falls on the few.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from statistics import fmean

from lab.claims import Claim, Control, Evidence, Experiment, Finding, MissingEvidence
from lab.errors import LabError
from lab.params import Count, Profile, Rate, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Plan, Sweep, Training, TrialSpec
from lab.statistics import Interval, bonferroni, lies_above, mean_interval
from lab.sweeps import at_edge, best_rate

NAME = "little_data"
BASE = "tiny-base"

# Of the rows that a run's updates could see. LIMA (section 3) trained on its 1,000 examples for 15 epochs: as many
# updates would have read 15,000 different ones. Its ablation (figure 6) finds no gain from 16 times the data either.
LIMA_SHARE = 1 / 15

# Where not even half does, there is nothing to save that is worth the name.
HALF = 1 / 2

# Points of exact match that nobody misses: as for methods in peft_vs_full, half of a gap that Biderman et al. 2024 report.
MARGIN = 0.05

# Of a run's last updates: their mean loss on the rows that it learns from. One update alone is 16 rows.
LAST_UPDATES = 10


class Params(Section):
    """One number of updates; the numbers of rows are all that they can see, and `halvings` halvings of it."""

    task: str
    seeds: Count
    sweep_seeds: Count
    updates: Count
    micro_batch_size: Count
    halvings: Count
    questions: Count
    methods: dict[str, tuple[Rate, ...]]
    """The rates that each method tries. `full` is judged; others are reported and drawn."""


def trials(params: Params, profile: Profile) -> Plan:
    """The base as it is, and for each method a sweep on the most rows, then all numbers of rows at the chosen rate."""
    most = params.updates * params.micro_batch_size
    if most > profile.data.train:
        raise LabError(
            f"little_data: {params.updates} updates of {params.micro_batch_size} see {most} rows; data.train is "
            f"{profile.data.train}. Raise data.train, or lower the updates."
        )

    def trial(arm: str, name: str, **more: object) -> TrialSpec:
        settings = Training.model_validate(
            {
                "model": "tiny",
                "task": params.task,
                "evaluations": 1,
                "questions": params.questions,
                "micro_batch_size": params.micro_batch_size,
                "device": profile.device,
                **more,
            }
        )
        return TrialSpec(experiment=NAME, name=name, arm=arm, settings=settings)

    plan: list[TrialSpec | Sweep] = [trial(BASE, BASE, updates=0)]
    for method, rates in params.methods.items():
        specs = {
            (rows, seed): trial(
                f"tiny-{method}",
                f"{method}-rows{rows}-seed{seed}",
                method=method,
                updates=params.updates,
                examples=rows,
                seed=seed,
            )
            for rows in (most // 2**halving for halving in range(params.halvings + 1))
            for seed in range(params.seeds)
        }
        tried = [spec for (rows, seed), spec in specs.items() if rows == most and seed < params.sweep_seeds]
        plan.append(Sweep(rates=rates, tried=tuple(tried), then=tuple(specs.values())))
    return plan


# The curve ------------------------------------------------------------------------------------------------------


def _methods(evidence: Evidence) -> list[str]:
    """The methods with records, the judged one first."""
    found = {r.spec.arm.removeprefix("tiny-") for r in evidence.records if r.spec.arm != BASE}
    return sorted(found, key=lambda method: (method != "full", method))


def curve(evidence: Evidence, method: str) -> dict[int, list[Record]]:
    """By number of rows, in order, the records at the rate that is best on all rows.

    Raises:
        MissingEvidence: no run has as many rows as its updates can see.
    """
    found = evidence.attempts(f"tiny-{method}")
    most = max(r.setting("updates") * r.setting("micro_batch_size") for r in found)
    on_all = [r for r in found if r.setting("examples") == most]
    if not on_all:
        raise MissingEvidence(f"{method}: no successful record with {most} rows")
    rate = best_rate(on_all)
    sizes = sorted({r.setting("examples") for r in found})
    return {rows: evidence.select(f"tiny-{method}", examples=rows, learning_rate=rate) for rows in sizes}


def _accuracies(records: Iterable[Record]) -> dict[int, float]:
    return {r.setting("seed"): r.figure("test_accuracy") for r in records}


def gaps(records: dict[int, list[Record]]) -> dict[int, Interval]:
    """Accuracy with so many rows less that with all, paired by seed; the intervals hold together over the numbers."""
    *fewer, most = records
    confidence = bonferroni(max(1, len(fewer)))
    best = _accuracies(records[most])
    found = {}
    for rows in fewer:
        own = _accuracies(records[rows])
        found[rows] = mean_interval([own[seed] - best[seed] for seed in sorted(own.keys() & best.keys())], confidence)
    return found


def flat_from(records: dict[int, list[Record]]) -> Interval:
    """The number of rows from which on a seed's accuracy is within the margin of its own with all rows.

    The geometric mean over seeds with its t interval on logarithms, no smaller than the fewest rows tried and no larger
    than the most.
    """
    accuracies = {rows: _accuracies(found) for rows, found in records.items()}
    sizes, most = sorted(accuracies), max(accuracies)
    logs = []
    for seed in set.intersection(*(set(found) for found in accuracies.values())):
        enough = most
        for rows in reversed(sizes):
            if accuracies[rows][seed] < accuracies[most][seed] - MARGIN:
                break
            enough = rows
        logs.append(math.log(enough))
    found = mean_interval(logs)

    def rows_of(log: float) -> float:
        return round(math.exp(min(math.log(most), max(math.log(sizes[0]), log))), 6)

    return Interval(rows_of(found.estimate), rows_of(found.low), rows_of(found.high), found.n)


def size_at(sizes: Sequence[int], share: float) -> int:
    """The largest number of rows tried that is at most this share of the most (the fewest, where none is)."""
    return max((rows for rows in sizes if rows <= share * max(sizes)), default=min(sizes))


# little-data-suffices -------------------------------------------------------------------------------------------


def judge_little(evidence: Evidence) -> Finding:
    """Non-inferiority to all rows at LIMA's share of them and at every larger number; and that there was something to learn."""
    records = curve(evidence, "full")
    gap = gaps(records)
    if not gap:
        raise MissingEvidence("full: no run with fewer rows than all")
    answers = {rows: lies_above(interval, -MARGIN) for rows, interval in gap.items()}
    little, half = size_at(list(records), LIMA_SHARE), size_at(list(records), HALF)
    base = evidence.select(BASE)[0].figure("test_accuracy")
    learnt = mean_interval([found - base for found in _accuracies(records[max(records)]).values()])
    flat = flat_from(records)
    because = "; ".join(
        [
            f"judged at {little} rows: {gap[little].times(100):.1f} points against {max(records)} rows",
            f"base {base:.2f}",
            *(_described(evidence, method) for method in _methods(evidence)),
        ]
    )

    def enough(least: int) -> bool:
        return all(answer == "yes" for rows, answer in answers.items() if rows >= least)

    unit = f"of {max(records)} rows are where accuracy stops rising"
    if lies_above(learnt, MARGIN) != "yes":
        return Finding.of("inconclusive", flat, unit, f"all rows teach nothing that could be missed; {because}")
    if enough(little):
        return Finding.of("supported", flat, unit, because)
    if answers[little] == "no" and enough(half):
        return Finding.of("conditional", flat, unit, because)
    if answers[little] == answers[half] == "no":
        return Finding.of("refuted", flat, unit, because)
    return Finding.of("inconclusive", flat, unit, because)


def _described(evidence: Evidence, method: str) -> str:
    """A method's curve in words: accuracy by rows, and how far the loss on other rows is above that on its own."""
    records = curve(evidence, method)
    means = ", ".join(f"{rows}: {fmean(_accuracies(found).values()):.2f}" for rows, found in records.items())
    apart = ", ".join(
        f"{rows}: {fmean(r.figure('validation_loss') - _trained_loss(r) for r in records[rows]):.2f}"
        for rows in sorted({min(records), size_at(list(records), LIMA_SHARE), max(records)})
    )
    rate = records[max(records)][0].setting("learning_rate")
    edge = " (at the edge of its grid)" if at_edge(_on_all(evidence, method)) else ""
    return f"{method} at {rate:g}{edge}: accuracy by rows {means}; validation loss less training loss by rows {apart}"


def _on_all(evidence: Evidence, method: str) -> list[Record]:
    return evidence.select(f"tiny-{method}", examples=max(curve(evidence, method)))


def _trained_loss(record: Record) -> float:
    return fmean(loss for loss in record.series["train_loss"][-LAST_UPDATES:] if loss is not None)


# Controls -------------------------------------------------------------------------------------------------------


def _presented(
    evidence: Evidence, changed: Callable[[int, Sequence[int]], bool], source: Callable[..., int]
) -> Evidence:
    """Runs whose number of rows is `changed` with the accuracy, seed by seed, of the runs with `source` rows."""
    records = curve(evidence, "full")
    sizes = list(records)
    given = _accuracies(records[source(sizes)])
    own = {r.spec.name for rows in sizes if changed(rows, sizes) for r in records[rows]}

    def change(record: Record) -> dict[str, float]:
        seed = record.setting("seed")
        return {"test_accuracy": given[seed]} if record.spec.name in own and seed in given else {}

    return evidence.with_figures(change)


def fewest_as_little(evidence: Evidence) -> Evidence:
    """The judged number of rows does no better than the fewest, and every larger one as well as the largest."""
    judged = _presented(evidence, lambda rows, sizes: rows == size_at(sizes, LIMA_SHARE), min)
    return _presented(judged, lambda rows, sizes: rows > size_at(sizes, LIMA_SHARE), max)


def fewest_as_all_but_the_most(evidence: Evidence) -> Evidence:
    """No number of rows but the largest does better than the fewest."""
    return _presented(evidence, lambda rows, sizes: rows < max(sizes), min)


def most_everywhere(evidence: Evidence) -> Evidence:
    """Every number of rows does as well as the largest."""
    return _presented(evidence, lambda rows, sizes: True, max)


def nothing_learnt(evidence: Evidence) -> Evidence:
    """The base answers as well as whatever was made of it with all rows: a flat curve that says nothing."""
    best = fmean(_accuracies(curve(evidence, "full")[max(curve(evidence, "full"))]).values())
    return evidence.with_figures(lambda r: {"test_accuracy": best} if r.spec.arm == BASE else {})


# Plot -----------------------------------------------------------------------------------------------------------


def accuracy_lines(evidence: Evidence) -> dict[str, Line]:
    """Test accuracy over the number of rows, a line per method, and the base beside it."""
    lines = {}
    for method in _methods(evidence):
        records = curve(evidence, method)
        means = [mean_interval(list(_accuracies(found).values())) for found in records.values()]
        lines[method] = Line(
            list(records), [m.estimate for m in means], [m.low for m in means], [m.high for m in means]
        )
    base = evidence.select(BASE)[0].figure("test_accuracy")
    sizes = lines["full"].x
    return lines | {"base": Line([min(sizes), max(sizes)], [base, base])}


EXPERIMENT = Experiment(
    name=NAME,
    title="Fine-tuning with little data",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="little-data-suffices",
            statement="full fine-tuning works with little data",
            lecture="3",
            tiers=("cpu", "gpu"),
            threshold=(
                f"at 1/{round(1 / LIMA_SHARE)} of the rows that the updates could see and at all larger numbers, the interval "
                f"(95 % over all of them, over orders of the same rows) lies above -{100 * MARGIN:.0f} points of exact match; "
                "conditional if at a half"
            ),
            scope=(
                "tiny (1M parameters), short exact answers, one number of updates; every seed learns from the same first rows of "
                "the training split, so that n counts orders of the data and not data sets; intervals are given the test "
                "questions: of 200 one is 0.5 points; LIMA is about the style of a 65B model on chosen examples, which a small "
                "model cannot show"
            ),
            judge=judge_little,
            controls={
                "the fewest rows as the judged number": Control(fewest_as_little, "conditional"),
                "the fewest rows as all but the most": Control(fewest_as_all_but_the_most, "refuted"),
                "all rows at every number": Control(most_everywhere, "supported"),
                "a base that knew it all": Control(nothing_learnt, "inconclusive"),
            },
            advice={
                "supported": "Spend on good examples, not on many: draw the curve over their number and stop where it is flat.",
                "conditional": "Collect until accuracy stops rising: less than all will do, but not as little as LIMA took.",
                "refuted": "Collect more examples: repeating few of them is no substitute here.",
                "inconclusive": "Begin with some hundred good examples; double them, and stop collecting where accuracy no longer "
                "rises.",
            },
            stated={"cpu": "inconclusive", "full": "inconclusive"},
        ),
    ),
    plots=(
        Plot(
            "accuracy-over-examples",
            "Accuracy of tiny at one number of updates",
            "training examples",
            "test accuracy",
            accuracy_lines,
            log_x=True,
        ),
    ),
)
