"""Speed: does the lab's trainer take as long as the plain library does, and how much of the device is put to use?

Claim     lab-trainer-is-as-fast (the lab's own)
Refuted   if on every model and by every method the two trainers' times are more than MARGIN apart
Control   the lab's trainer at twice its time; one that recomputes activations (measured); the plain Trainer as the lab's
Run       lab run speed --profile cpu

Both train one model in turn in one process: random weights at real shapes, rows of random tokens of full length, of which
neither time nor operations depend on. What differs is what the lab sets and a person does not: the optimizer (the lab's is
adamw_torch; the library's own default is a fused one), the loss logged after each update, the collator.
"""

from __future__ import annotations

import math
from itertools import product
from typing import Literal

from pydantic import Field

from lab.cards import peak_flops
from lab.claims import Cell, Claim, Control, Evidence, Experiment, Finding, MissingEvidence, in_words, over_answers
from lab.methods import METHODS
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Speed, TrialSpec
from lab.statistics import bonferroni, lies_within, mean_ratio

NAME = "speed"
SLOWER = "control-checkpointing"

# Equivalence, not only "no slower": a trainer that is quicker than a person's would promise too much. One hour in twenty
# changes no plan; training_cost takes the same margin, and found that the same settings timed against themselves agree
# within 2 %.
MARGIN = 0.05


class ModelParams(Section):
    """By which methods a model is trained; `optimizers` names one for both sides, where AdamW's state would not fit."""

    methods: tuple[str, ...] = tuple(METHODS)
    precision: Literal["fp32", "bf16"]
    batch: Count
    length: Count
    optimizers: dict[str, str] = Field(default_factory=dict)


class Params(Section):
    """Each model by each of its methods, in `repeats` processes; see `lab.specs.Speed` for `rounds` and `updates`.

    The control is of the first model, by the first of its methods.
    """

    models: dict[str, ModelParams]
    repeats: Count
    rounds: Count
    updates: Count


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Every pair, and the control; what is timed takes all threads."""
    specs = []
    cells: list[tuple[str, str, str, dict[str, str]]] = []
    for model, chosen in params.models.items():
        cells += [(f"pair-{method}", model, method, {}) for method in chosen.methods]
    first, chosen = next(iter(params.models.items()))
    cells.append((SLOWER, first, chosen.methods[0], {"fault": "checkpointing"}))
    for (arm, model, method, changes), seed in product(cells, range(params.repeats)):
        chosen = params.models[model]
        named = chosen.optimizers.get(method)
        settings = Speed.model_validate(
            {
                **chosen.model_dump(include={"precision", "batch", "length"}),
                **({"optimizer": named, "plain_optimizer": named} if named else {}),
                **{"model": model, "method": method, "rounds": params.rounds, "updates": params.updates},
                **{"seed": seed, "device": profile.device, **changes},
            }
        )
        name = f"{arm}-{model}-seed{seed}"
        specs.append(TrialSpec(experiment=NAME, name=name, arm=arm, threads=profile.threads, settings=settings))
    return specs


# What the judge reads -------------------------------------------------------------------------------------------


def _pairs(evidence: Evidence) -> dict[tuple[str, str], list[Record]]:
    """The trials by (model, method), those too that gave no result.

    Raises:
        MissingEvidence: there is none.
    """
    found: dict[tuple[str, str], list[Record]] = {}
    for record in evidence.records:
        if record.spec.arm.startswith("pair-"):
            found.setdefault((record.setting("model"), record.setting("method")), []).append(record)
    if not found:
        raise MissingEvidence("no pair of trainers was timed")
    return found


def _mean(records: list[Record], figure: str) -> float:
    return math.fsum(r.figure(figure) for r in records) / len(records)


def share_of_peak(record: Record) -> float | None:
    """The model's operations in an update, over what the device could do in the lab's time for it (model FLOPs utilisation).

    None on a processor, on a card whose peak is not known (`lab.cards.PEAKS`), and for weights in fp32.
    """
    peak = peak_flops(record.provenance.device) if record.setting("device") == "cuda" else None
    if peak is None or record.setting("precision") != "bf16":
        return None
    return record.figure("plain_flops") / record.figure("lab_seconds") / peak


def _row(cell: tuple[str, str], records: list[Record]) -> str:
    """Tokens a second by the lab and by the library, the share of the peak, and the operations beside the rule's."""
    lab, plain = (_mean(records, f"{side}_tokens_per_second") for side in ("lab", "plain"))
    shares = [share for r in records if (share := share_of_peak(r)) is not None]
    of_peak = f", {math.fsum(shares) / len(shares):.0%} of the peak" if shares else ""
    rule = _mean(records, "plain_flops") / _mean(records, "rule_flops")
    return f"{_on(cell)} {lab:,.0f} and {plain:,.0f}{of_peak}, {rule:.2f} x 6N"


def _on(cell: tuple[str, str]) -> str:
    return f"{cell[1]} on {cell[0]}"


def judge_speed(evidence: Evidence) -> Finding:
    """In each pair: is the lab's time that of the plain Trainer, within MARGIN either way?"""
    pairs = _pairs(evidence)
    done = {cell: ok for cell, found in pairs.items() if (ok := [r for r in found if r.status == "ok"])}
    if not done:
        raise MissingEvidence(f"no pair of trainers was timed to the end: {_not_timed(pairs)}")
    cells = []
    for cell, records in done.items():
        ratios = mean_ratio([r.figure("ratio") for r in records], bonferroni(len(pairs)))
        cells.append(Cell(_on(cell), ratios, lies_within(ratios, 1 / (1 + MARGIN), 1 + MARGIN)))
    furthest = max(cells, key=lambda cell: abs(math.log(cell.interval.estimate)))
    rows = "; ".join(_row(cell, records) for cell, records in done.items())
    because = f"{in_words('as fast', cells, '{:.3f}'.format)}; tokens a second, lab and plain: {rows}"
    unknown = {r.provenance.device for rs in done.values() for r in rs if r.setting("device") == "cuda"}
    unknown = {device for device in unknown if peak_flops(device) is None}
    because += f"; no share of the peak: that of {', '.join(sorted(unknown))} is not known here" if unknown else ""
    because += f"; not timed: {missing}" if (missing := _not_timed(pairs)) else ""
    verdict = over_answers(cell.answer for cell in cells)
    return Finding.of(verdict, furthest.interval, "x the plain Trainer's time, furthest from 1", because)


def _not_timed(pairs: dict[tuple[str, str], list[Record]]) -> str:
    """The methods that are missing on a model: those whose trials gave no result, and those that were not asked for."""
    found = [
        f"{_on(cell)} ({records[0].status}: {records[0].message})"
        for cell, records in pairs.items()
        if all(r.status != "ok" for r in records)
    ]
    for model in dict.fromkeys(model for model, _ in pairs):
        left = [method for method in METHODS if (model, method) not in pairs]
        found += [f"{', '.join(left)} on {model} (not in this profile)"] if left else []
    return "; ".join(found)


# Controls -------------------------------------------------------------------------------------------------------


def twice_the_time(evidence: Evidence) -> Evidence:
    """The lab's trainer as if it took twice as long."""
    return evidence.with_figures(lambda r: {"ratio": 2 * r.figure("ratio")})


def as_plain(evidence: Evidence) -> Evidence:
    """The plain Trainer presented as the lab's."""
    return evidence.with_figures(lambda r: {"ratio": 1.0})


def recomputing(evidence: Evidence) -> Evidence:
    """The lab's trainer with gradient checkpointing, which the plain one does without, in place of every pair."""
    slow = evidence.select(SLOWER)
    arm = f"pair-{slow[0].setting('method')}"
    return Evidence(r.model_copy(update={"spec": r.spec.model_copy(update={"arm": arm})}) for r in slow)


# Plots ----------------------------------------------------------------------------------------------------------


def _lines(evidence: Evidence, value: str) -> dict[str, Line]:
    """A line for each method over the size of the model."""
    points: dict[str, list[tuple[float, float]]] = {}
    for (_, method), found in _pairs(evidence).items():
        records = [r for r in found if r.status == "ok"]
        if value == "share":
            shares = [100 * share for r in records if (share := share_of_peak(r)) is not None]
            records, y = (records, math.fsum(shares) / len(shares)) if shares else ([], 0.0)
        elif records:
            y = _mean(records, "lab_tokens_per_second")
        if records:
            points.setdefault(method, []).append((records[0].figure("parameters_base") / 1e9, y))
    return {method: Line(*zip(*sorted(found), strict=True)) for method, found in points.items()}


def tokens_per_second(evidence: Evidence) -> dict[str, Line]:
    """Tokens per second by the lab's trainer, by method."""
    return _lines(evidence, "tokens")


def shares_of_peak(evidence: Evidence) -> dict[str, Line]:
    """The share of the device's peak in per cent, by method; nothing where no peak is known."""
    return _lines(evidence, "share")


EXPERIMENT = Experiment(
    name=NAME,
    title="Speed",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="lab-trainer-is-as-fast",
            statement="what the lab times is what a person gets: its trainer is as fast as the library's plain defaults",
            lecture="4",
            tiers=("cpu", "gpu"),
            threshold=f"the lab's time for an update within a factor of {1 + MARGIN:.2f} of the plain Trainer's, either way, by "
            "each method on each model; 95 % over all of them together",
            scope="one model trained in turn in one process, rows of random tokens of full length, weights in the precision "
            "named and no autocast; the plain Trainer's optimizer is its own default, or named on both sides",
            judge=judge_speed,
            controls={
                "the lab's trainer at twice its time": Control(twice_the_time, "refuted"),
                "gradient checkpointing on the lab's side": Control(recomputing, "refuted"),
                "the plain Trainer as the lab's": Control(as_plain, "supported"),
            },
            advice={
                "supported": "Plan with the lab's times: a plain Trainer takes as long.",
                "refuted": "Time some updates of your own script: it does not take as long as the lab's.",
                "conditional": "Name the optimizer when you compare times: defaults differ, and where much is trained it shows.",
                "inconclusive": "Take the lab's times for orders of magnitude, and time some updates of your own script before you "
                "plan.",
            },
            stated={"cpu": "inconclusive", "full": "inconclusive"},
        ),
    ),
    plots=(
        Plot(
            "tokens-per-second",
            "Tokens per second by the lab's trainer",
            "billion parameters",
            "tokens per second",
            tokens_per_second,
            log_x=True,
            log_y=True,
        ),
        Plot(
            "share-of-peak",
            "Share of the device's peak (model FLOPs utilisation)",
            "billion parameters",
            "% of the peak in 16 bits",
            shares_of_peak,
            log_x=True,
        ),
    ),
)
