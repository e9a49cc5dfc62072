"""Intervals and tests. Scipy does the arithmetic; the functions here fix the conventions: two-sided 95 % intervals of
the mean by Student's t, pairs subtracted before anything else, margins given from outside.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """An estimate with its confidence interval, and from how many independent draws."""

    estimate: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self:.4g} (n = {self.n})"

    def __format__(self, form: str) -> str:
        """Its three numbers in one form: `f"{Interval(0.5, 0.25, 0.75, 3):.2f}"` is `0.50 [0.25, 0.75]`."""
        return f"{self.estimate:{form}} [{self.low:{form}}, {self.high:{form}}]" if form else str(self)

    def times(self, factor: float) -> Interval:
        """In another unit: a share times 100 is in points."""
        return Interval(factor * self.estimate, factor * self.low, factor * self.high, self.n)


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean and its Student t interval. One draw has an infinite interval: it decides nothing.

    Args:
        values: independent draws (for a paired comparison: the differences).
        confidence: two-sided.
    Raises:
        ValueError: no value, or one that is not finite.
    """
    from scipy import stats

    n = len(values)
    if n == 0 or not all(math.isfinite(v) for v in values):
        raise ValueError(f"an interval needs finite values, got {list(values)}")
    mean = math.fsum(values) / n
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    deviation = math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (n - 1))
    half = float(stats.t.ppf((1 + confidence) / 2, n - 1)) * deviation / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_difference(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of `first - second` over pairs (the same seed, the same data order), with its interval.

    Raises:
        ValueError: the two are not of one length.
    """
    return mean_interval([a - b for a, b in zip(first, second, strict=True)], confidence)


def bonferroni(comparisons: int) -> float:
    """The confidence that each of so many intervals needs so that all hold together with `CONFIDENCE`."""
    return 1 - (1 - CONFIDENCE) / comparisons


def span(values: Sequence[float]) -> Interval:
    """The mean with the smallest and the largest: for exact counts, where nothing is drawn."""
    return Interval(math.fsum(values) / len(values), min(values), max(values), len(values))


Answer = Literal["yes", "no", "undecided"]


def lies_within(interval: Interval, low: float, high: float) -> Answer:
    """Equivalence: `yes` if the whole interval lies in [low, high], `no` if all of it lies outside.

    With a 95 % interval this is two one-sided tests at 2.5 % each (Schuirmann 1987), stricter than the usual 5 %.
    """
    if low <= interval.low and interval.high <= high:
        return "yes"
    if interval.high < low or interval.low > high:
        return "no"
    return "undecided"


def lies_above(interval: Interval, bound: float) -> Answer:
    """One-sided: `yes` if the whole interval lies above `bound`, `no` if all of it lies below."""
    return lies_within(interval, bound, math.inf)


def mean_ratio(ratios: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The geometric mean of ratios, with the interval of their logarithms: turned upside down it is that of the inverses.

    Raises:
        ValueError: no ratio, or one that is not positive.
    """
    if min(ratios, default=0) <= 0:
        raise ValueError(f"a mean ratio needs positive values, got {list(ratios)}")
    logs = mean_interval([math.log(ratio) for ratio in ratios], confidence)
    return Interval(math.exp(logs.estimate), math.exp(logs.low), _exp(logs.high), logs.n)


def mean_product(first: Sequence[float], second: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The product of two geometric means of ratios that were drawn apart from each other, so that no draw has a partner.

    Its logarithm is a sum of two means, whose interval is Welch's: variances need not be equal, nor numbers of draws.
    `n` is the smaller of these.

    Raises:
        ValueError: no ratio, or one that is not positive.
    """
    from scipy import stats

    one, other = mean_ratio(first, confidence), mean_ratio(second, confidence)
    estimate, n = one.estimate * other.estimate, min(one.n, other.n)
    if n == 1:
        return Interval(estimate, 0.0, math.inf, 1)
    if min(first) == max(first):  # scipy divides by the spread
        return Interval(estimate, one.estimate * other.low, one.estimate * other.high, n)
    logs, inverses = [math.log(ratio) for ratio in first], [-math.log(ratio) for ratio in second]
    low, high = stats.ttest_ind(logs, inverses, equal_var=False).confidence_interval(confidence)
    return Interval(estimate, math.exp(low), _exp(high), n)


def _exp(value: float) -> float:
    """e^value, infinite where that is too large for a float."""
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf


def first_at_most(points: Iterable[tuple[float, float]], level: float) -> float | None:
    """The first x at which y is at most `level`, on straight lines between points `(x, y)`; None: never."""
    before: tuple[float, float] | None = None
    for x, y in points:
        if y <= level:
            return x if before is None else before[0] + (x - before[0]) * (before[1] - level) / (before[1] - y)
        before = (x, y)
    return None


def slope(x: Sequence[float], y: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The b of y = a + b x by least squares, with its t interval.

    Raises:
        ValueError: fewer than three points, or all at one x.
    """
    from scipy import stats

    if len(x) < 3 or min(x) == max(x):
        raise ValueError(f"a slope needs three points and two values of x, got {list(zip(x, y, strict=True))}")
    if min(y) == max(y):  # scipy divides by their spread
        return Interval(0.0, 0.0, 0.0, len(x))
    fit = stats.linregress(x, y)
    half = float(stats.t.ppf((1 + confidence) / 2, len(x) - 2)) * float(fit.stderr)
    return Interval(float(fit.slope), float(fit.slope) - half, float(fit.slope) + half, len(x))


def exponent(x: Sequence[float], y: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The b of y = a x^b by least squares on logarithms, with the t interval of the slope.

    Raises:
        ValueError: fewer than three points, or one that is not positive.
    """
    if len(x) < 3 or min(*x, *y) <= 0:
        raise ValueError(f"an exponent needs three positive points, got {list(zip(x, y, strict=True))}")
    return slope([math.log(v) for v in x], [math.log(v) for v in y], confidence)
