from __future__ import annotations

import math
from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from lab.statistics import (
    Interval,
    exponent,
    first_at_most,
    lies_above,
    lies_within,
    mean_interval,
    mean_product,
    mean_ratio,
    paired_difference,
    slope,
    span,
)

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


@given(st.floats(-10, 10), st.floats(-1e3, 1e3))
def test_the_slope_of_a_line_is_found(steepness: float, start: float) -> None:
    x = [1.0, 2.0, 2.0, 5.0, 9.0]
    found = slope(x, [start + steepness * v for v in x])
    assert found.estimate == pytest.approx(steepness, abs=1e-6)
    assert found.low - 1e-6 <= steepness <= found.high + 1e-6


def test_the_slopes_interval_is_that_of_the_regression_in_float64() -> None:
    x, y = np.array([1.0, 2.0, 4.0, 8.0]), np.array([1.0, 2.5, 3.0, 9.0])
    matrix = np.stack([np.ones(4), x], axis=1)
    (start, steepness), *_ = np.linalg.lstsq(matrix, y, rcond=None)
    rest = y - start - steepness * x
    error = math.sqrt(rest @ rest / 2 / ((x - x.mean()) ** 2).sum())
    found = slope(x.tolist(), y.tolist())
    assert found.estimate == pytest.approx(steepness)
    assert found.high - found.low == pytest.approx(2 * stats.t.ppf(0.975, 2) * error)


def test_a_flat_line_has_the_slope_zero_and_points_above_one_place_have_none() -> None:
    assert slope([1.0, 2.0, 4.0], [5.0, 5.0, 5.0]) == Interval(0.0, 0.0, 0.0, 3)
    for x in ([1.0, 2.0], [3.0, 3.0, 3.0]):
        with pytest.raises(ValueError, match="a slope needs three points and two values of x"):
            slope(x, x)


def test_a_mean_ratio_is_geometric_and_upside_down_it_is_that_of_the_inverses() -> None:
    ratios = [1.2, 1.5, 1.3]
    found, inverse = mean_ratio(ratios), mean_ratio([1 / ratio for ratio in ratios])
    assert found.estimate == pytest.approx(math.prod(ratios) ** (1 / 3))
    assert (1 / inverse.high, 1 / inverse.low) == pytest.approx((found.low, found.high))
    one = mean_ratio([1.3])
    assert (one.low, one.high, one.n) == (0.0, math.inf, 1)
    with pytest.raises(ValueError, match="positive"):
        mean_ratio([1.0, 0.0])
    with pytest.raises(ValueError, match="positive"):
        mean_ratio([])


def test_a_product_of_means_knows_no_order_of_its_factors_and_covers_as_often_as_it_says() -> None:
    updates, times = [1.2, 1.5, 1.3, 1.9], [0.8, 0.6, 0.7]
    found = mean_product(updates, times)
    assert found.estimate == pytest.approx(mean_ratio(updates).estimate * mean_ratio(times).estimate)
    assert (found.low, found.high) == pytest.approx(astuple(mean_product(times, updates[::-1]))[1:3])
    assert found.low < found.estimate < found.high
    assert found.n == 3
    constant = mean_product([2.0, 2.0], times)
    assert (constant.low, constant.high) == pytest.approx([2 * b for b in astuple(mean_ratio(times))[1:3]])
    assert astuple(mean_product([2.0], times))[1:] == (0.0, math.inf, 1)
    with pytest.raises(ValueError, match="positive"):
        mean_product([1.0, 0.0], times)
    draw = np.random.default_rng(0)
    drawn = [mean_product(draw.lognormal(1, 0.5, 5).tolist(), draw.lognormal(-1, 0.1, 6).tolist()) for _ in range(1000)]
    assert 0.93 <= np.mean([interval.low <= 1 <= interval.high for interval in drawn]) <= 0.97


def test_a_curve_is_at_most_a_level_first_where_the_line_between_two_points_crosses_it() -> None:
    falling = [(0.0, 4.0), (10.0, 2.0), (20.0, 3.0), (30.0, 0.0)]
    assert first_at_most(falling, 4.0) == 0.0
    assert first_at_most(falling, 3.0) == 5.0
    assert first_at_most(falling, 2.0) == 10.0
    assert first_at_most(falling, 1.5) == 25.0
    assert first_at_most(falling, -1.0) is None
    assert first_at_most([], 1.0) is None


def test_an_interval_is_written_in_one_form_and_turned_into_another_unit() -> None:
    share = Interval(0.5, 0.25, math.inf, 3)
    assert f"{share:.2f}" == "0.50 [0.25, inf]"
    assert f"{share}" == str(share) == "0.5 [0.25, inf] (n = 3)"
    assert share.times(100) == Interval(50.0, 25.0, math.inf, 3)
