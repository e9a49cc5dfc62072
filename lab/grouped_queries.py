"""Counting the operations of attention in which several heads of queries share one of keys, with any torch.

torch's counter took that from 2.12 on (pytorch/pytorch#177169, #177188); before, it refused the shapes with an AssertionError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

COUNTS = ("sdpa_flop_count", "sdpa_backward_flop_count")


def count_grouped_queries() -> None:
    """Let torch's counter count shared keys and values as if each head had its own, which is what later ones do.

    Its formulas look these functions up when they are called. Calling this again changes nothing.
    """
    from torch.utils import flop_counter

    for name in COUNTS:
        count = getattr(flop_counter, name)
        if not hasattr(count, "of_equal_heads"):
            setattr(flop_counter, name, _grouped(count))


def _grouped(of_equal_heads: Callable[..., int]) -> Callable[..., int]:
    def count(*shapes: Any) -> int:
        """Of the shapes (gradient,) query, key and value, each (batch, heads, tokens, width)."""
        *rest, key, value = shapes
        heads = rest[-1][1]
        return of_equal_heads(*rest, *((shape[0], heads, *shape[2:]) for shape in (key, value)))

    count.of_equal_heads = of_equal_heads  # type: ignore[attr-defined]
    return count
