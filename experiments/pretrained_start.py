"""Does it pay to start from a pretrained model: how many updates and tokens to the same loss as from random weights?

Claim     pretrained-start (lecture 1)
Refuted   if on no task the random start needs PAYS times the updates; conditional if on some tasks alone
Control   pretrained weights with their rows permuted, in the place of the pretrained ones; a random start that never
          arrives; one that is there as soon
Run       lab run pretrained_start --profile cpu

The same architecture, the same batches in the same order, a constant learning rate, which each start has from a sweep of
its own over the same rates, by the validation loss at the end of its budget. Tasks of `tiny` by what its pretraining has in
common with them: read in it, alike in form alone, nothing; `smol` has read the web. What pretraining itself has cost is not
counted: others have paid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from statistics import fmean

from pydantic import Field

from lab.claims import Claim, Control, Evidence, Experiment, Finding, MissingEvidence, over_answers
from lab.errors import LabError
from lab.params import Count, Profile, Rate, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Plan, Start, Sweep, TrialSpec
from lab.statistics import Answer, Interval, bonferroni, first_at_most, lies_above, mean_ratio
from lab.sweeps import at_best, at_edge

NAME = "pretrained_start"
STARTS = ("pretrained", "random", "permuted")

# The loss to be reached: this share of the way from a blind guess to where the pretrained start ends, for each seed its own.
# The end of a curve is flat, and when its last few hundredths are made up is a matter of noise.
WAY = 0.95

# Half of the updates: He et al. 2019 ("Rethinking ImageNet Pre-training"), who conclude that pretraining buys speed more
# than quality, saw training from random weights catch up in about three times the updates. Two is the least whole factor
# that their finding leaves room for; under it the choice of a rate decides more than the start.
#
# Where the pretrained start is at the loss before its first update there is no ratio. What can be told apart is then a point
# of the curve: it pays if the random start needs more than PAYS of them.
PAYS = 2.0


KIN = {
    "leg_counting": "read in pretraining",
    "aiw_siblings": "alike in form alone",
    "keepers_log": "unlike what was read",
    "smol-family": "of a model that has read the web",
}
"""What a task has in common with what its model was pretrained on."""


class TaskParams(Section):
    """A task, and the updates that the pretrained start gets on it."""

    updates: Count
    micro_batch_size: Count
    questions: Count


class ModelParams(Section):
    """The tasks of a model, and what each start tries on them."""

    tasks: dict[str, TaskParams] = Field(min_length=1)
    seeds: Count
    sweep_seeds: Count
    permuted_seeds: Count
    rates: tuple[Rate, ...]


class Params(Section):
    """`tiny` and, where the time allows, `smol`."""

    tiny: ModelParams
    smol: ModelParams | None = None
    evaluations: Count
    """Points on the curve of the pretrained start; the random one has as many more as it has more updates."""
    patience: int = Field(gt=PAYS)
    """How many times the updates of the pretrained start the random one gets: with no more than PAYS nothing is seen."""


def trials(params: Params, profile: Profile) -> Plan:
    """Each start on each task: a sweep, and the other seeds at its best rate."""
    plan = []
    models = {"tiny": params.tiny} | ({"smol": params.smol} if params.smol else {})
    for model, chosen in models.items():
        for (task, sizes), start in product(chosen.tasks.items(), STARTS):
            times = params.patience if start == "random" else 1
            arm = f"{task if model == 'tiny' else f'{model}-{task}'}-{start}"
            specs = []
            for seed in range(chosen.permuted_seeds if start == "permuted" else chosen.seeds):
                settings = Start.model_validate(
                    {
                        "model": model,
                        "task": task,
                        "start": start,
                        "schedule": "constant",
                        "updates": times * sizes.updates,
                        "evaluations": times * params.evaluations,
                        "micro_batch_size": sizes.micro_batch_size,
                        "questions": sizes.questions,
                        "seed": seed,
                        "device": profile.device,
                    }
                )
                name = f"{arm.replace('_', '-')}-seed{seed}"
                specs.append(TrialSpec(experiment=NAME, name=name, arm=arm, settings=settings))
            tried = tuple(specs[: chosen.sweep_seeds])
            plan.append(Sweep(rates=chosen.rates, by="loss", tried=tried, then=tuple(specs)))
    return plan


# How soon ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Race:
    """What the random start needs for each update of the pretrained one, seed by seed, to the same loss."""

    target: float
    """Mean over the seeds, nats per answer token."""
    updates: Interval
    """The geometric mean of the ratios, with its interval; those of runs that never arrived count as their budget. An update
    of a start that needs none counts as one point of the curve: enough for an answer, and no number to report."""
    tokens: float
    """The same of the tokens, without an interval."""
    pretrained_updates: float
    unreached: int
    at_once: str = ""
    """What is told instead of a ratio where the pretrained start needs no update."""

    @property
    def answer(self) -> Answer:
        """Whether it pays. A run that never arrived may need any number: `no` needs all to arrive."""
        found = lies_above(self.updates, PAYS)
        return "undecided" if found == "no" and self.unreached else found

    def __str__(self) -> str:
        if self.at_once:
            return self.at_once
        least = "at least " if self.unreached else ""
        return (
            f"{self.ratio()} and {least}{self.tokens:.2g} times the tokens to {self.target:.2g} nats, which pretrained takes "
            f"{self.pretrained_updates:.0f} updates to"
            + f" ({self.unreached} of {self.updates.n} never arrived)"
            * bool(self.unreached)
        )

    def ratio(self) -> str:
        """In words: at least 2.1 [1.8, 2.4] times the updates."""
        least = "at least " if self.unreached else ""
        return f"{least}{self.updates:.2g} times the updates"


def arrival(record: Record, target: float, along: str = "curve_update") -> float | None:
    """After how many updates (or tokens) the test loss was first at the target; None: never.

    Between two points of the curve the loss counts as a straight line.
    """
    return first_at_most(_points(record, along), target)


def _points(record: Record, along: str) -> list[tuple[float, float]]:
    curve = zip(record.series[along], record.series["curve_test_loss"], strict=True)
    return [(place, loss) for place, loss in curve if place is not None and loss is not None]


def target_of(pretrained: Record) -> float:
    """The loss that is WAY from a blind guess to where the run ends."""
    blind = pretrained.figure("blind_loss")
    return blind - WAY * (blind - pretrained.figure("test_loss"))


def race(evidence: Evidence, task: str, confidence: float) -> Race:
    """Both starts at their best rates.

    Raises:
        LabError: a pair did not see the same batches.
        MissingEvidence: there is no pair.
    """
    runs = {
        start: {r.setting("seed"): r for r in at_best(evidence.attempts(f"{task}-{start}"), "loss") if r.status == "ok"}
        for start in ("pretrained", "random")
    }
    ratios: dict[str, list[float]] = {"curve_update": [], "curve_tokens": []}
    pairs, targets, needed, unreached = [], [], [], 0
    for seed in sorted(runs["pretrained"].keys() & runs["random"].keys()):
        first, other = runs["pretrained"][seed], runs["random"][seed]
        if first.tags["data_order"] != other.tags["data_order"]:
            raise LabError(f"{task}: the runs of seed {seed} saw other batches. Run: lab run {NAME}")
        target = target_of(first)
        for along, found in ratios.items():
            own, its = arrival(first, target, along), arrival(other, target, along)
            if own is None:
                raise MissingEvidence(f"{first.spec.name}: its curve does not come to where it ends")
            least = _points(first, along)[1][0]
            budget = _points(other, along)[-1][0]
            found.append((budget if its is None else max(its, least)) / max(own, least))
        pairs.append((first, other))
        targets.append(target)
        needed.append(arrival(first, target) or 0.0)
        unreached += arrival(other, target) is None
    if not targets:
        raise MissingEvidence(f"{task}: no seed was run from both starts")
    updates, tokens = (mean_ratio(ratios[along], confidence) for along in ("curve_update", "curve_tokens"))
    at_once = _at_once(pairs) if 0 in needed else ""
    return Race(fmean(targets), updates, tokens.estimate, fmean(needed), unreached, at_once)


def _at_once(pairs: Sequence[tuple[Record, Record]]) -> str:
    """When random weights come to the loss that a pretrained start, before training, has in some seed already."""
    curves = [_points(other, "curve_update") for _, other in pairs]
    budget = curves[0][-1][0]
    arrivals = [arrival(other, target_of(first)) for first, other in pairs]
    arrived = [place for place in arrivals if place is not None]
    before = fmean(_points(first, "curve_update")[0][1] for first, _ in pairs)
    lowest = min(loss for curve in curves for _, loss in curve)
    after = f"after {min(arrived):.0f} to {max(arrived):.0f}" if arrived else "not by the end"
    missing = f" ({len(pairs) - len(arrived)} of {len(pairs)} never arrived)" * (0 < len(arrived) < len(pairs))
    return (
        f"pretrained is at {fmean(target_of(first) for first, _ in pairs):.2g} nats at once, so that there is no ratio; random "
        f"weights {after} of {budget:.0f} updates{missing}, and the {before:.2f} of pretrained before training they "
        f"{'never reach' if lowest > before else 'reach too'}"
    )


def _tasks(evidence: Evidence) -> list[str]:
    arms = dict.fromkeys(r.spec.arm for r in evidence.records)
    return sorted({arm.rpartition("-")[0] for arm in arms})


def judge(evidence: Evidence) -> Finding:
    """On each task, the random start's updates over those of the pretrained one; the intervals hold together."""
    tasks = _tasks(evidence)
    races = {task: race(evidence, task, bonferroni(len(tasks))) for task in tasks}
    if not races:
        raise MissingEvidence("no task was run")
    notes = []
    for task, found in races.items():
        edges = [s for s in STARTS[:2] if at_edge(evidence.attempts(f"{task}-{s}"), "loss")]
        ends = {s: at_best(evidence.attempts(f"{task}-{s}"), "loss") for s in STARTS[:2]}
        losses = ", ".join(
            f"{start} at {records[0].setting('learning_rate'):g}"
            f"{' (at the edge of its grid)' * (start in edges)} ends at {_mean(records, 'test_loss'):.2g}, "
            f"{_mean(records, 'test_accuracy'):.0%} right"
            for start, records in ends.items()
        )
        notes.append(f"{task}: {found}; {losses}")
    verdict = over_answers(found.answer for found in races.values())
    pays = [task for task, found in races.items() if found.answer == "yes"]
    opening = [f"it pays on {', '.join(pays)}"] if pays and verdict == "conditional" else []
    because, unit = "; ".join([*opening, *notes]), "times the updates from random weights, where least"
    flips = _flips(races)
    ratios = [found.updates for found in races.values() if not found.at_once]
    if not ratios:
        return Finding(verdict, None, None, None, unit, 0, because, flips=flips)
    return Finding.of(verdict, min(ratios, key=lambda ratio: ratio.estimate), unit, because, flips)


def _flips(races: Mapping[str, Race]) -> str:
    """On which tasks it pays, and what they have in common with what was read; nothing where all are alike."""
    if len({found.answer for found in races.values()}) < 2:
        return ""
    parts = []
    for answer, words in (("yes", "it pays on"), ("no", "it does not on"), ("undecided", "it is undecided on")):
        told = [
            f"{task}{f' ({KIN[task]})' if task in KIN else ''}: "
            f"{'pretrained is there at once' if found.at_once else f'random takes {found.ratio()}'}"
            for task, found in races.items()
            if found.answer == answer
        ]
        parts += [f"{words} {', on '.join(told)}"] if told else []
    return "; ".join(parts)


def _mean(records: Sequence[Record], figure: str) -> float:
    return fmean(r.figure(figure) for r in records if r.status == "ok")


# Controls -------------------------------------------------------------------------------------------------------


def permuted(evidence: Evidence) -> Evidence:
    """The permuted weights presented as the pretrained ones: measured, and of the same norms."""
    for task in _tasks(evidence):
        evidence = evidence.replace(f"{task}-pretrained", by=f"{task}-permuted")
    return evidence


def _random_curves(change: Callable[[Record, Record], list[float | None]]) -> Callable[[Evidence], Evidence]:
    """Every random start with the losses that `change` makes of it and of the pretrained run of its task and seed."""

    def control(evidence: Evidence) -> Evidence:
        found = []
        for r in evidence.records:
            task, _, start = r.spec.arm.rpartition("-")
            if start == "random" and r.status == "ok":
                pretrained = evidence.select(f"{task}-pretrained", seed=r.setting("seed"))[0]
                r = r.model_copy(update={"series": {**r.series, "curve_test_loss": change(r, pretrained)}})
            found.append(r)
        return Evidence(found)

    return control


def _never(random: Record, _: Record) -> list[float | None]:
    return [random.figure("blind_loss")] * len(random.series["curve_update"])


def _as_soon(random: Record, pretrained: Record) -> list[float | None]:
    """At its first point it has what the pretrained run will end at."""
    return [random.figure("blind_loss"), *[0.0] * (len(random.series["curve_update"]) - 1)]


# Plot -----------------------------------------------------------------------------------------------------------


def curve_lines(evidence: Evidence) -> dict[str, Line]:
    """Test loss over updates, of each start on each task at its best rate: the mean over the seeds."""
    lines = {}
    for task in _tasks(evidence):
        for start in STARTS:
            if not evidence.has(f"{task}-{start}"):
                continue
            runs = [r for r in at_best(evidence.attempts(f"{task}-{start}"), "loss") if r.status == "ok"]
            curves = zip(*(r.series["curve_test_loss"] for r in runs), strict=True)
            means = [fmean(loss for loss in losses if loss is not None) for losses in curves]
            lines[f"{task}, {start}"] = Line([float(u or 0) for u in runs[0].series["curve_update"]], means)
    return lines


EXPERIMENT = Experiment(
    name=NAME,
    title="Where training starts",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="pretrained-start",
            statement="starting from a pretrained model pays",
            lecture="1",
            tiers=("cpu",),
            threshold=(
                f"to {WAY:.0%} of the way from a blind guess to where the pretrained start ends, the random start needs more "
                f"than {PAYS:g} times the updates: the 95 % interval over the seeds (together over the tasks) lies above that; "
                f"where the pretrained start needs no update, more than {PAYS:g} points of its curve"
            ),
            scope=(
                "tiny, which was pretrained for minutes on invented text, and tasks read in pretraining and alike in form (the one "
                "read in pretraining was added after the other had come out against the claim, on one seed); thousands of "
                "examples, so that random weights have enough to learn from; full training, constant rates; the updates of "
                "pretraining are not counted; in the profile full also a task that is unlike, and a model that has read the web "
                "(smol)"
            ),
            judge=judge,
            controls={
                "permuted weights as the pretrained": Control(permuted, ("inconclusive", "refuted")),
                "a random start that never arrives": Control(_random_curves(_never), "supported"),
                "a random start that is there as soon": Control(_random_curves(_as_soon), "refuted"),
            },
            advice={
                "supported": "Start from pretrained weights: the same batches bring you to the same loss in half the updates.",
                "conditional": "Start from pretrained weights and compare a short run from random ones: on most tasks they save "
                "updates, not on each.",
                "refuted": "Try random weights too: this base saves less than half of the updates on any task.",
                "inconclusive": "Start from pretrained weights, unless a short run from random ones comes as far.",
            },
            stated={"cpu": "inconclusive", "full": "conditional"},
        ),
    ),
    plots=(
        Plot(
            "loss-by-start",
            "Test loss from pretrained, random and permuted weights",
            "updates",
            "nats per answer token",
            curve_lines,
            log_y=True,
        ),
    ),
)
