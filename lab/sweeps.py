"""Learning rates found by trying: the same number for every method, chosen on the validation split, grids that grow.

The rate with the best mean over the seeds is chosen. If it is the first or last of its grid, the grid is extended by one
there; where the best stays at an edge, `at_edge` says so.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Literal

from lab.records import Record
from lab.specs import Plan, Sweep, TrialSpec

Criterion = Literal["accuracy", "loss"]


def expand(plan: Plan, records: Iterable[Record]) -> list[TrialSpec]:
    """The trials that a plan asks for, as far as the records of its sweeps decide: call it again with what they give."""
    by_name = {record.spec.name: record for record in records}
    found: dict[str, TrialSpec] = {}
    for item in plan:
        specs = _expand_sweep(item, by_name) if isinstance(item, Sweep) else [item]
        found |= {spec.name: spec for spec in specs}
    return list(found.values())


def _expand_sweep(sweep: Sweep, by_name: dict[str, Record]) -> list[TrialSpec]:
    specs = [at_rate(spec, rate) for rate in sweep.rates for spec in sweep.tried]

    def tried() -> list[Record]:
        return [by_name[spec.name] for spec in specs if spec.name in by_name and by_name[spec.name].spec == spec]

    if len(tried()) < len(specs):
        return specs
    best = best_rate(tried(), sweep.by)
    if len(sweep.rates) > 1 and best in (min(sweep.rates), max(sweep.rates)):
        beyond = next_rate(best, up=best == max(sweep.rates))
        specs += [at_rate(spec, beyond) for spec in sweep.tried]
        if len(tried()) < len(specs):
            return specs
        best = best_rate(tried(), sweep.by)
    return specs + [at_rate(spec, best) for spec in sweep.then]


def at_rate(spec: TrialSpec, rate: float) -> TrialSpec:
    """The trial with this learning rate, which its name says at its end."""
    settings = spec.settings.model_copy(update={"learning_rate": rate})
    return spec.model_copy(update={"name": f"{spec.name}-lr{rate:g}", "settings": settings})


def next_rate(rate: float, up: bool) -> float:
    """The next of ..., 0.1, 0.3, 1, 3, 10, ... above or below a rate."""
    power = math.floor(math.log10(rate) + 1e-9)
    series = [float(f"{mantissa}e{power + shift}") for shift in (-1, 0, 1) for mantissa in (1, 3)]
    if up:
        return min(value for value in series if value > rate * (1 + 1e-9))
    return max(value for value in series if value < rate * (1 - 1e-9))


# What the records of a sweep say ----------------------------------------------------------------------------------


def rates(records: Sequence[Record]) -> list[float]:
    """The learning rates tried, in order."""
    return sorted({record.setting("learning_rate") for record in records})


def best_rate(records: Sequence[Record], by: Criterion = "accuracy") -> float:
    """The rate with the best mean on the validation split over the seeds that every rate was tried with.

    A run that gave no score counts as the worst. The smaller of two equal rates is chosen: it changes the model less.
    """
    shared = on_common_seeds(records)

    def score(rate: float) -> float:
        found = [_score(r, by) for r in with_rate(shared, rate)]
        return math.fsum(found) / len(found) if all(map(math.isfinite, found)) else -math.inf

    return max(rates(records), key=lambda rate: (score(rate), -rate))


def on_common_seeds(records: Sequence[Record]) -> list[Record]:
    """The records of those seeds that every rate was tried with."""
    seeds = set.intersection(*({r.setting("seed") for r in with_rate(records, rate)} for rate in rates(records)))
    return [record for record in records if record.setting("seed") in seeds]


def at_best(records: Sequence[Record], by: Criterion = "accuracy") -> list[Record]:
    """The records at the best rate, in order of their seeds."""
    return sorted(with_rate(records, best_rate(records, by)), key=lambda record: record.setting("seed"))


def at_edge(records: Sequence[Record], by: Criterion = "accuracy") -> bool:
    """Whether the best rate is the first or last of a grid that has more than one."""
    tried = rates(records)
    return len(tried) > 1 and best_rate(records, by) in (tried[0], tried[-1])


def with_rate(records: Iterable[Record], rate: float) -> list[Record]:
    """The records at a learning rate, in the order given."""
    return [record for record in records if record.setting("learning_rate") == rate]


def _score(record: Record, by: Criterion) -> float:
    value = record.figures.get(f"validation_{by}")
    if value is None:
        return -math.inf
    return -value if by == "loss" else value
