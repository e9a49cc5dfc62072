from __future__ import annotations

from dataclasses import replace

import pytest

from lab.claims import Verdict
from lab.replication import Pair, summary

HERE = Verdict(
    claim="a-claim",
    experiment="an_experiment",
    tier="cpu",
    profile="cpu",
    verdict="supported",
    effect=1.0,
    low=0.5,
    high=1.5,
    unit="points",
    n=5,
    threshold="",
    scope="",
    advice="",
    because="",
    control="",
    unsuccessful=0,
)


@pytest.mark.parametrize(
    ("low", "high", "apart"),
    [(1.4, 2.0, False), (1.5, 2.0, False), (1.6, 2.0, True), (0.0, 0.4, True), (1.6, None, True), (None, 0.6, False)],
)
def test_intervals_are_apart_that_share_no_point_and_null_is_no_bound(
    low: float | None, high: float | None, apart: bool
) -> None:
    other = replace(HERE, low=low, high=high)
    assert Pair(other, HERE).apart is apart
    assert Pair(HERE, other).apart is apart


def test_a_summary_counts_verdicts_and_effects() -> None:
    elsewhere, refuted = replace(HERE, low=2.0, high=3.0), replace(HERE, verdict="refuted")
    found = [Pair(HERE, HERE), Pair(elsewhere, HERE), Pair(refuted, HERE)]
    assert summary(found, "abc") == "Against abc: 2 of 3 verdicts are the same; effects with intervals apart: 1"
