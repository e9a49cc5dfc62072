from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lab.statistics import Interval, exponent, lies_above, lies_within, mean_interval, paired_difference, span

values = st.lists(st.floats(-1e3, 1e3, allow_nan=False), min_size=2, max_size=12)


@given(values)
def test_the_interval_is_students_t_in_float64(draws: list[float]) -> None:
    found = mean_interval(draws)
    error = np.std(np.array(draws, dtype=np.float64), ddof=1) / math.sqrt(len(draws))
    if error < 1e-9:
        assert found.low == pytest.approx(found.high, abs=1e-6)
        return
    low, high = stats.t.interval(0.95, len(draws) - 1, loc=np.mean(draws), scale=error)
    assert (found.low, found.high) == pytest.approx((low, high), rel=1e-9, abs=1e-9)
    assert found.low <= found.estimate <= found.high


def test_one_draw_decides_nothing() -> None:
    assert mean_interval([0.3]) == Interval(0.3, -math.inf, math.inf, 1)
    assert lies_above(mean_interval([0.3]), 0.0) == "undecided"


def test_no_draw_and_nan_are_errors() -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval([])
    with pytest.raises(ValueError, match="finite"):
        mean_interval([1.0, math.nan])


@given(values, st.floats(-100, 100))
def test_what_is_common_to_a_pair_drops_out(draws: list[float], shift: float) -> None:
    difference = paired_difference([v + shift for v in draws], draws)
    assert difference.estimate == pytest.approx(shift, abs=1e-9)


def test_pairs_of_unequal_length_are_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        paired_difference([1.0, 2.0], [1.0])


def test_the_interval_covers_the_mean_as_often_as_it_says() -> None:
    generator = np.random.default_rng(0)
    covered = sum(
        interval.low <= 1.0 <= interval.high
        for interval in (mean_interval(generator.normal(1.0, 2.0, 5).tolist()) for _ in range(2000))
    )
    assert 0.935 < covered / 2000 < 0.965


@pytest.mark.parametrize(
    ("interval", "answer"),
    [
        (Interval(0.0, -0.04, 0.04, 5), "yes"),
        (Interval(0.1, 0.06, 0.14, 5), "no"),
        (Interval(-0.1, -0.14, -0.06, 5), "no"),
        (Interval(0.03, -0.01, 0.07, 5), "undecided"),
        (Interval(0.0, -0.2, 0.2, 5), "undecided"),
    ],
)
def test_equivalence_needs_the_whole_interval(interval: Interval, answer: str) -> None:
    assert lies_within(interval, -0.05, 0.05) == answer


@given(st.floats(0.2, 3), st.floats(0.1, 100))
def test_the_exponent_of_a_power_law_is_found(power: float, scale: float) -> None:
    x = [1.0, 2.0, 4.0, 8.0]
    found = exponent(x, [scale * v**power for v in x])
    assert found.estimate == pytest.approx(power, rel=1e-9)
    assert found.high - found.low < 1e-6


def test_the_exponents_interval_is_that_of_the_regression() -> None:
    x, y = [1.0, 2.0, 4.0, 8.0, 16.0], [1.0, 2.2, 3.9, 8.3, 15.0]
    found = exponent(x, y)
    fit = stats.linregress(np.log(x), np.log(y))
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, 3) * fit.stderr)


def test_two_points_give_no_exponent() -> None:
    with pytest.raises(ValueError, match="three"):
        exponent([1.0, 2.0], [1.0, 2.0])


def test_a_span_is_smallest_and_largest() -> None:
    assert span([2.0, 4.0]) == Interval(3.0, 2.0, 4.0, 2)


def test_what_does_not_grow_has_the_exponent_zero() -> None:
    assert exponent([1.0, 2.0, 4.0], [5.0, 5.0, 5.0]) == Interval(0.0, 0.0, 0.0, 3)
