"""Verdicts beside those of a commit, or of another machine: are they the same?"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lab import records
from lab.claims import Verdict
from lab.errors import LabError
from lab.study import Study


@dataclass(frozen=True)
class Pair:
    """A claim in one tier, as it was found there and as it is here."""

    there: Verdict
    here: Verdict

    @property
    def same(self) -> bool:
        """The same verdict, on whatever effect."""
        return self.there.verdict == self.here.verdict

    @property
    def apart(self) -> bool:
        """The two intervals share no point, so that the effects differ by more than either says it may err."""
        (low, high), (other_low, other_high) = map(_bounds, (self.there, self.here))
        return high < other_low or other_high < low


def pairs(study: Study, other: str) -> list[Pair]:
    """What was judged both there and here, in the order of the study.

    Args:
        other: results of another machine, named as their folder is (`cpu-epyc`); else a commit, whose verdicts under the
            study's profile are meant.
    Raises:
        LabError: there is neither such a folder nor such a commit, or it has no verdicts.
    """
    results = study.workspace.results
    inside = (results / "verdicts.json").relative_to(study.workspace.root).as_posix()
    beside = results.parent / other / "verdicts.json"
    if beside.is_file():
        text: str | None = beside.read_text(encoding="utf-8")
    else:
        text = records.committed(study.workspace.root, other, inside)
    if text is None:
        raise LabError(
            f"'{other}' is neither a folder of results with verdicts nor a commit that has {inside}. "
            f"`git log -- {inside}` lists those that have it."
        )
    there = _by_claim(text)
    found = [Pair(_as_there(v, there[v.claim, v.tier]), v) for v in study.verdicts if (v.claim, v.tier) in there]
    return [pair for pair in found if "not run" not in (pair.there.verdict, pair.here.verdict)]


def of_others(study: Study, verdict: Verdict) -> list[Verdict]:
    """The same claim in the same tier, by the other results of this folder: of other profiles, of other machines."""
    found = []
    for path in sorted(study.workspace.results.parent.glob("*/verdicts.json")):
        there = _by_claim(path.read_text(encoding="utf-8"))
        if path.parent != study.workspace.results and (verdict.claim, verdict.tier) in there:
            found.append(_as_there(verdict, there[verdict.claim, verdict.tier]))
    return [other for other in found if other.verdict != "not run"]


def summary(found: Sequence[Pair], other: str) -> str:
    """How many verdicts are the same, and how many effects are further apart than their intervals."""
    same, apart = sum(pair.same for pair in found), sum(pair.apart for pair in found)
    return f"Against {other}: {same} of {len(found)} verdicts are the same; effects with intervals apart: {apart}"


def _by_claim(verdicts: str) -> dict[tuple[str, str], dict[str, Any]]:
    """The rows of a verdicts.json by claim and tier."""
    return {(row["claim"], row["tier"]): row for row in json.loads(verdicts)}


def _as_there(here: Verdict, row: dict[str, Any]) -> Verdict:
    """The verdict there; what a later version of the lab added to verdicts is as it is here."""
    known = {field.name for field in dataclasses.fields(Verdict)}
    return dataclasses.replace(here, **{key: value for key, value in row.items() if key in known})


def _bounds(verdict: Verdict) -> tuple[float, float]:
    """Infinite where there is none: JSON has no infinity."""
    low, high = verdict.low, verdict.high
    return -math.inf if low is None else low, math.inf if high is None else high
