"""A counter that refuses shared keys, as torch's did before 2.12, counts them; one that takes them counts the same as before."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils import flop_counter

from lab.grouped_queries import COUNTS, count_grouped_queries

QUERY, SHARED = (2, 8, 16, 4), (2, 2, 16, 4)
SHAPES = {"sdpa_flop_count": (QUERY, SHARED, SHARED), "sdpa_backward_flop_count": (QUERY, QUERY, SHARED, SHARED)}


def original(name: str) -> Any:
    count = getattr(flop_counter, name)
    return getattr(count, "of_equal_heads", count)


@pytest.mark.parametrize("name", COUNTS)
def test_a_counter_that_refuses_shared_keys_counts_them_as_the_one_that_takes_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = original(name)

    def refuses(*shapes: Any) -> int:
        assert len({shape[1] for shape in shapes}) == 1, "heads differ"
        return taken(*shapes)

    monkeypatch.setattr(flop_counter, name, refuses)
    with pytest.raises(AssertionError):
        getattr(flop_counter, name)(*SHAPES[name])
    count_grouped_queries()
    assert getattr(flop_counter, name)(*SHAPES[name]) == taken(*SHAPES[name]) > 0


def test_twice_is_once_and_the_counter_itself_counts_what_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in COUNTS:
        monkeypatch.setattr(flop_counter, name, original(name))
    count_grouped_queries()
    counts = [getattr(flop_counter, name) for name in COUNTS]
    count_grouped_queries()
    assert counts == [getattr(flop_counter, name) for name in COUNTS]

    from lab.timing import _formulas

    query, key = torch.randn(QUERY, requires_grad=True), torch.randn(SHARED, requires_grad=True)
    with flop_counter.FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
        attended = torch.nn.functional.scaled_dot_product_attention(query, key, key, enable_gqa=True)
        attended.sum().backward()
    assert counter.get_total_flops() >= original("sdpa_flop_count")(QUERY, SHARED, SHARED)
