"""One base, many adapters: does it serve each task as a model of its own would, and how much room does a task take?

Claim     one-base-many-adapters (lecture 3)
Refuted   if for every method something fails: the switched base says other than the dedicated model, merging changes the
          function, a task's own adapter is no better than another's, or it is not small; conditional if for some methods
Control   a base that never switches; an adapter as large as the model; each adapter's loss presented as another's
Run       lab run many_adapters --profile cpu
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

from pydantic import Field

from lab.claims import Claim, Control, Evidence, Experiment, Finding, over_answers
from lab.params import Count, Profile, Rate, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Adapters, TrialSpec
from lab.statistics import Answer, Interval, bonferroni, paired_difference, span

NAME = "many_adapters"

# The same function: fp32 has 24 bits, and a forward pass through four layers rounds some 30 times: 30 x 2^-24 = 2e-6, of
# the largest logit. Switching repeats the same operations and should give 0; merging rounds each weight once more.
SAME = 5e-6

# A small share of the model's bytes: at a tenth, ten tasks take the room of two models, not of ten.
SHARE = 0.1

# The methods that are changes of weights: one of these without a merged model has not merged.
MERGEABLE = ("lora", "dora", "ia3", "mora")

# How many tasks the plot goes to.
TASKS = (1, 2, 5, 10, 20, 50, 100)


class MethodParams(Section):
    """A method's learning rate and options."""

    learning_rate: Rate
    options: dict[str, Any] = Field(default_factory=dict)


class Params(Section):
    """The tasks that one base serves, and how each adapter is trained."""

    model: str
    tasks: tuple[str, ...] = Field(min_length=2)
    seeds: Count
    updates: Count
    micro_batch_size: Count
    questions: Count
    methods: dict[str, MethodParams] = Field(min_length=1)


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Each method, for each seed."""
    specs = []
    for (method, chosen), seed in product(params.methods.items(), range(params.seeds)):
        settings = Adapters(
            model=params.model,
            task=params.tasks[0],
            further_tasks=params.tasks[1:],
            method=method,
            method_options=chosen.options,
            learning_rate=chosen.learning_rate,
            updates=params.updates,
            micro_batch_size=params.micro_batch_size,
            questions=params.questions,
            seed=seed,
            device=profile.device,
        )
        specs.append(TrialSpec(experiment=NAME, name=f"{method}-seed{seed}", arm=method, settings=settings))
    return specs


# Judge ----------------------------------------------------------------------------------------------------------

FACTS: dict[str, Callable[[Record], bool]] = {
    "the switched base says what the dedicated model says, there and back": lambda r: (
        max(r.figure("reload_distance"), r.figure("switch_distance"), r.figure("back_distance")) <= SAME
    ),
    "where it merges, merging keeps the function": lambda r: _merged_distance(r) <= SAME,
    "the adapters of two tasks say different things": lambda r: r.figure("unswitched_distance") > SAME,
    f"a task takes at most {SHARE:.0%} of the model's bytes": lambda r: _share(r) <= SHARE,
}


def judge(evidence: Evidence) -> Finding:
    """Facts of every trial, and the interval over the seeds of what a task loses by another's adapter."""
    every = evidence.select()
    by_method = _by_method(every)
    confidence = bonferroni(len(by_method))
    answers: dict[str, Answer] = {}
    reasons = []
    for method, records in by_method.items():
        failing = [fact for fact, holds in FACTS.items() if not all(map(holds, records))]
        lost = _lost(records, confidence)
        better = _better(lost)
        answers[method] = "no" if failing else better
        reasons += [f"{method}: not so that {fact}" for fact in failing]
        if better != "yes":
            reasons.append(
                f"{method}: {'undecided' if better == 'undecided' else 'not so'} that its own is better ({lost})"
            )
    shares = span([_share(r) for r in every])
    gaps = [_lost(records, confidence).estimate for records in by_method.values()]
    switch = 1000 * max(r.figure("switch_seconds") for r in every)
    summary = f"{min(gaps):.2f} to {max(gaps):.2f} nats lost by another's adapter; a switch takes up to {switch:.1f} ms"
    return Finding.of(
        over_answers(answers.values()), shares, "of the model's bytes for a task", "; ".join([*reasons, summary])
    )


def _better(lost: Interval) -> Answer:
    """Whether a task's own adapter is better than another's: no difference at all is not."""
    return "yes" if lost.low > 0 else "no" if lost.high <= 0 else "undecided"


def _by_method(records: Sequence[Record]) -> dict[str, list[Record]]:
    methods = dict.fromkeys(r.spec.arm for r in sorted(records, key=lambda r: r.spec.arm))
    return {method: [r for r in records if r.spec.arm == method] for method in methods}


def _lost(records: Sequence[Record], confidence: float) -> Interval:
    """Test loss with another task's adapter less that with its own, over the seeds."""
    other, own = ([r.figure(f"{whose}_loss") for r in records] for whose in ("other", "own"))
    return paired_difference(other, own, confidence)


def _merged_distance(record: Record) -> float:
    """Of the merged model to the dedicated one: 0 for a method that cannot merge, infinite if one that can did not."""
    found = record.figures.get("merged_distance")
    return found if found is not None else math.inf if record.spec.arm in MERGEABLE else 0.0


def _share(record: Record) -> float:
    return record.figure("adapter_bytes") / record.figure("model_bytes")


# Controls -------------------------------------------------------------------------------------------------------


def _presented(**figures: str) -> Callable[[Evidence], Evidence]:
    """A control: in every trial, each of these figures is given the value of the other that it names."""

    def control(evidence: Evidence) -> Evidence:
        every = Evidence(evidence.select())
        return every.with_figures(lambda r: {name: r.figure(other) for name, other in figures.items()})

    control.__doc__ = f"{', '.join(figures.values())} presented as {', '.join(figures)}."
    return control


def mixed_up(evidence: Evidence) -> Evidence:
    """Each adapter as another's: of two losses the smaller is the other's."""
    losses = ("own_loss", "other_loss")
    return Evidence(evidence.select()).with_figures(
        lambda r: dict(zip(losses, sorted(map(r.figure, losses), reverse=True), strict=True))
    )


def flawless(evidence: Evidence) -> Evidence:
    """Exact outputs, adapters of no size, each a nat better on its own task."""
    best = {"reload_distance": 0.0, "switch_distance": 0.0, "back_distance": 0.0, "merged_distance": 0.0}
    best |= {"unswitched_distance": 0.5, "adapter_bytes": 0.0}

    def changed(record: Record) -> dict[str, float]:
        return best | {"own_loss": 1.0 + record.setting("seed") / 10, "other_loss": 2.0 + record.setting("seed") / 10}

    return Evidence(evidence.select()).with_figures(changed)


# Plot -----------------------------------------------------------------------------------------------------------


def room_lines(evidence: Evidence) -> dict[str, Line]:
    """MiB on disk over the number of tasks: a model for each, and one base with an adapter for each."""
    every = evidence.select()
    model = max(r.figure("model_bytes") for r in every)
    lines = {"a model for each": Line(TASKS, [tasks * model / 2**20 for tasks in TASKS])}
    for method, records in _by_method(every).items():
        adapter = max(r.figure("adapter_bytes") for r in records)
        lines[method] = Line(TASKS, [(model + tasks * adapter) / 2**20 for tasks in TASKS])
    return lines


EXPERIMENT = Experiment(
    name=NAME,
    title="One base, many adapters",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="one-base-many-adapters",
            statement="one model serves many tasks, each by an adapter that is switched on at run time",
            lecture="3",
            tiers=("cpu", "gpu"),
            threshold=f"outputs within {SAME:g} of the dedicated model's, switched and merged ({', '.join(MERGEABLE)}); the "
            "interval of what is lost by another task's adapter (95 % over all methods) lies above 0; at most "
            f"{SHARE:.0%} of the model's bytes; for every method",
            scope="tiny, fp32, QLoRA not among the methods, adapters of a few updates from files; span of the bytes over methods "
            "and seeds; on a larger model an adapter's share is smaller",
            judge=judge,
            controls={
                "a base that never switches": Control(
                    _presented(switch_distance="unswitched_distance", back_distance="unswitched_distance"), "refuted"
                ),
                "adapters as large as the model": Control(_presented(adapter_bytes="model_bytes"), "refuted"),
                "nothing to find fault with": Control(flawless, "supported"),
                "each adapter as another's": Control(mixed_up, "refuted"),
            },
            advice={
                "supported": "Keep one base and a file for each task; switch at run time, and merge where there is one task.",
                "conditional": "Look which methods hold: serve many tasks by those, and count the bytes of a task first.",
                "refuted": "Keep a model for each task until switching gives what the dedicated models give.",
                "inconclusive": "Keep a model for each task until you have compared its answers with those of the switched base.",
            },
            stated={"cpu": "supported", "full": "supported"},
        ),
    ),
    plots=(
        Plot(
            "room-by-tasks",
            "Room for many tasks",
            "tasks",
            "MiB on disk",
            room_lines,
            log_x=True,
            log_y=True,
        ),
    ),
)
