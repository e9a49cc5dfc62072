"""Does fine-tuning make a model of a domain, and what does the general text pay for it?

Claim     domain-specialisation (lecture 3)
Refuted   if no method lowers the loss on the domain's text by FALL; conditional if one does, and another does not or the
          loss on general text rises by more than RISE
Control   runs with the loss of the base; runs that win on the domain and double the loss on general
          text; runs that win all
Run       lab run domain --profile cpu

The domain is the log of lighthouse keepers (lab/corpus.py): words, abbreviations and an order of remarks that no base
model of this study has read. Each method's learning rate is the one with the least loss on the domain's validation split,
as someone would choose who looks at the domain alone; how much a smaller rate would have spared is told beside it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lab.claims import Claim, Control, Evidence, Experiment, Finding
from lab.params import Count, Profile, Rate, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Plan, Sweep, Training, TrialSpec
from lab.statistics import CONFIDENCE, Interval, bonferroni, lies_above, lies_within, mean_interval
from lab.sweeps import at_best, at_edge, rates, with_rate

NAME = "domain"
DOMAIN, GENERAL = "test_loss", "general_bits_per_byte"

# Gururangan et al. 2020 ("Don't Stop Pretraining"), table 1: masked language modelling loss of RoBERTa on a domain before
# and after training on it falls by 25 % (biomedicine, 1.32 to 0.99), 18 % (computer science), 8 % (reviews) and -7 %
# (news). The most of these: the logs are further from what the base has read than any of the four.
FALL = 0.25

# The same, table 12: on text like that of pretraining the loss rises, from 1.19 to 1.33 (12 %, news), 1.63 (37 %,
# biomedicine), 1.82 (53 %) and 2.07 (74 %). The least of these: what the mildest of four accepted trainings cost.
RISE = 0.12


class ModelParams(Section):
    """How a base model is trained on the domain: the same updates, batches and seeds for every method."""

    seeds: Count
    sweep_seeds: Count
    updates: Count
    micro_batch_size: Count
    questions: Count
    threads: Count
    methods: dict[str, tuple[Rate, ...]]
    """The rates that each method tries."""


class Params(Section):
    """The domain, and `tiny` and, where the time allows, `smol`."""

    task: str
    tiny: ModelParams
    smol: ModelParams | None = None


def trials(params: Params, profile: Profile) -> Plan:
    """The bases as they are, and each method's sweep."""
    plan: list[TrialSpec | Sweep] = []
    for model, chosen in (("tiny", params.tiny), ("smol", params.smol)):
        if chosen is None:
            continue

        def trial(
            arm: str, name: str, model: str = model, chosen: ModelParams = chosen, **more: str | int
        ) -> TrialSpec:
            settings = Training.model_validate(
                {
                    "model": model,
                    "task": params.task,
                    "evaluations": 1,
                    "questions": chosen.questions,
                    "micro_batch_size": chosen.micro_batch_size,
                    "device": profile.device,
                    **more,
                }
            )
            return TrialSpec(experiment=NAME, name=name, arm=arm, threads=chosen.threads, settings=settings)

        plan.append(trial(f"{model}-base", f"{model}-base", updates=0))
        for method, tried in chosen.methods.items():
            arm = f"{model}-{method}"
            specs = [
                trial(arm, f"{arm}-seed{seed}", method=method, updates=chosen.updates, seed=seed)
                for seed in range(chosen.seeds)
            ]
            plan.append(Sweep(rates=tried, by="loss", tried=tuple(specs[: chosen.sweep_seeds]), then=tuple(specs)))
    return plan


# What training did ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Effect:
    """What a method did to a model at one rate, as shares of the base's losses."""

    rate: float
    fall: Interval
    """Of the loss on the domain."""
    rise: Interval
    """Of the loss on general text."""

    def __str__(self) -> str:
        fall, rise = (f"{i.times(100):.0f} %" for i in (self.fall, self.rise))
        return f"at {self.rate:g} domain loss falls {fall}, general loss rises {rise}"


def _effect(base: Record, records: Sequence[Record], confidence: float = CONFIDENCE) -> Effect:
    return Effect(
        records[0].setting("learning_rate"),
        mean_interval([1 - r.figure(DOMAIN) / base.figure(DOMAIN) for r in records], confidence),
        mean_interval([r.figure(GENERAL) / base.figure(GENERAL) - 1 for r in records], confidence),
    )


def _arms(evidence: Evidence) -> dict[str, Record]:
    """Every arm that trained, with the record of its base."""
    trained = sorted({r.spec.arm for r in evidence.records if not r.spec.arm.endswith("-base")})
    return {arm: evidence.select(f"{arm.partition('-')[0]}-base")[0] for arm in trained}


def judge_domain(evidence: Evidence) -> Finding:
    """Fall of the domain's loss and rise of the general one, per model and method at its best rate."""
    effects, notes = {}, []
    arms = _arms(evidence)
    together = bonferroni(2 * max(1, len(arms)))  # a fall and a rise for each
    for arm, base in arms.items():
        found = evidence.attempts(arm)
        effects[arm] = _effect(base, at_best(found, "loss"), together)
        edge = " (at the edge of its grid)" if at_edge(found, "loss") else ""
        notes.append(f"{arm} {effects[arm]}{edge}{_sparing(base, found)}")
    improves = {arm: lies_above(effect.fall, FALL) for arm, effect in effects.items()}
    spares = {arm: lies_within(effect.rise, -math.inf, RISE) for arm, effect in effects.items()}
    suffer = [arm for arm, answer in spares.items() if answer == "no"]
    because = "; ".join([f"the general text suffers under {', '.join(suffer)}"] * bool(suffer) + notes)
    least = min((effect.fall for effect in effects.values()), key=lambda fall: fall.low)
    unit = "% of the domain's loss gone, by the method that does least"
    answers = set(improves.values())
    if answers == set(spares.values()) == {"yes"}:
        return Finding.of("supported", least.times(100), unit, because)
    if answers == {"no"}:
        return Finding.of("refuted", least.times(100), unit, because)
    if "yes" in answers and ("no" in answers or suffer):
        return Finding.of("conditional", least.times(100), unit, because)
    return Finding.of("inconclusive", least.times(100), unit, because)


def _sparing(base: Record, records: Sequence[Record]) -> str:
    """The rate that lowers the domain's loss most of those whose mean rise of the general loss is within bounds."""
    whole = [r for r in records if r.status == "ok"]
    tried = [_effect(base, with_rate(whole, rate)) for rate in rates(whole)]
    mild = [effect for effect in tried if effect.rise.estimate <= RISE]
    if not mild:
        return ", no rate tried spares the general text"
    best = max(mild, key=lambda effect: effect.fall.estimate)
    fall, rise = 100 * best.fall.estimate, 100 * best.rise.estimate
    return f", sparing it at {best.rate:g}: {fall:.0f} % for {rise:.0f} %"


# Controls -------------------------------------------------------------------------------------------------------


def _with(evidence: Evidence, **factors: float) -> Evidence:
    """Every run with these figures of its base, times the factors."""
    bases = _arms(evidence)

    def change(record: Record) -> dict[str, float]:
        base = bases.get(record.spec.arm)
        return {name: factor * base.figure(name) for name, factor in factors.items()} if base else {}

    return evidence.with_figures(change)


def untrained(evidence: Evidence) -> Evidence:
    """Every run has the base's loss on the domain."""
    return _with(evidence, **{DOMAIN: 1.0})


def exploding(evidence: Evidence) -> Evidence:
    """Every run has half the base's loss on the domain, and twice its loss on general text."""
    return _with(evidence, **{DOMAIN: 0.5, GENERAL: 2.0})


def all_won(evidence: Evidence) -> Evidence:
    """Every run has half the base's loss on the domain, and its loss on general text."""
    return _with(evidence, **{DOMAIN: 0.5, GENERAL: 1.0})


# Plot -----------------------------------------------------------------------------------------------------------


def trade_lines(evidence: Evidence) -> dict[str, Line]:
    """Domain loss against general loss of tiny: a line per method, a point per rate; and the base."""
    lines = {}
    for arm, base in _arms(evidence).items():
        model, _, method = arm.partition("-")
        if model != "tiny":
            continue
        found = evidence.select(arm)
        means = [
            [
                math.fsum(r.figure(name) for r in at_rate) / len(at_rate)
                for at_rate in (with_rate(found, rate) for rate in rates(found))
            ]
            for name in (GENERAL, DOMAIN)
        ]
        lines[method] = Line(*means)
        lines["base"] = Line([base.figure(GENERAL)], [base.figure(DOMAIN)])
    return lines


EXPERIMENT = Experiment(
    name=NAME,
    title="Models of a domain",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="domain-specialisation",
            statement="fine-tuning makes a model of a domain",
            lecture="3",
            tiers=("cpu", "gpu"),
            threshold=(
                f"the interval of the domain loss's fall lies above {FALL:.0%} and that of the general loss's rise below "
                f"{RISE:.0%} (95 % over all of them), for every method at the rate that is best for the domain"
            ),
            scope=(
                "entries of one grammar, whose words the base has never read (tiny's loss begins above a blind guess, so that "
                "much of the fall is the words alone), and other prose (tiny: that of its pretraining); loss alone, no task "
                "within the domain; the rate that spares is told after the fact"
            ),
            judge=judge_domain,
            controls={
                "the base's loss on the domain": Control(untrained, "refuted"),
                "half the loss on the domain for twice that on general text": Control(exploding, "conditional"),
                "half the loss on the domain and nothing paid": Control(all_won, "supported"),
            },
            advice={
                "supported": "Train on the domain's text; check general text with it, and keep the rate that leaves it alone.",
                "conditional": "Choose the rate on general text too: the best one for the domain alone ruins the rest.",
                "refuted": "Look at the data and the rate: text of a domain that does not lower its loss teaches nothing.",
                "inconclusive": "Watch a sample of general text while you train on the domain, and keep the smallest rate that "
                "still lowers its loss.",
            },
            stated={"cpu": "conditional", "full": "conditional"},
        ),
    ),
    plots=(
        Plot(
            "domain-against-general",
            "What the domain gains and general text pays, a point per rate",
            "general text, bits per byte",
            "domain text, nats per token",
            trade_lines,
            log_x=True,
            log_y=True,
        ),
    ),
)
