"""The widths of what the lab's own methods add: by arithmetic, for those who ask without torch."""

from __future__ import annotations

import math


def mora_side(inputs: int, outputs: int, rank: int, operator: int) -> int:
    """The side of the square matrix that has about as many parameters as LoRA of that rank; even where pairs are turned.

    Source: Jiang et al. 2024, section 4: the square root of (inputs + outputs) x rank, rounded.
    """
    nearest = int(math.sqrt((inputs + outputs) * rank) + 0.5)
    return max(2, nearest // 2 * 2) if operator == 6 else max(1, nearest)


def bottleneck_width(hidden: int, reduction_factor: int) -> int:
    """Of the bottleneck of an adapter beside hidden states of that width: at least 1."""
    return max(1, hidden // reduction_factor)
