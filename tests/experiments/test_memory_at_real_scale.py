"""What the judges of the memory claims do between their points: where a saving fades, what a card takes."""

from __future__ import annotations

import pytest

from experiments import model_size, peak_memory, peft_cost
from lab.memory.architecture import Architecture
from lab.planner import load_config


@pytest.mark.parametrize(
    ("points", "fades"),
    [
        ([(10, 0.5), (20, 0.3)], None),
        ([(10, 0.05), (20, 0.01)], 10),
        ([(100, 0.3), (200, 0.05)], 180),
        ([(100, 0.3), (200, 0.2), (400, 0.0)], 300),
    ],
)
def test_a_saving_fades_on_the_line_between_two_points(points: list[tuple[int, float]], fades: int | None) -> None:
    assert peft_cost._fades_at(points) == fades


def test_a_card_holds_less_than_its_name_says_and_takes_the_largest_model_that_is_no_more() -> None:
    assert 0.85 * 24 * 2**30 < model_size._room(24) < 0.96 * 24 * 2**30
    room = model_size._room(24)
    needs = [(1.0, room - 1.0), (2.0, float(room)), (3.0, room + 1.0)]
    assert model_size._largest(needs, 24) == 2.0
    assert model_size._largest([(1.0, room + 1.0)], 24) == 0.0


def test_the_published_figures_are_those_of_the_tests_of_the_simulation() -> None:
    from tests.memory.test_simulation import PUBLISHED

    of_tests = sorted(gib for _, peak, steady in PUBLISHED for gib in (peak, steady) if gib)
    assert sorted(gib for _, figures in peak_memory.PUBLISHED.values() for gib in figures.values()) == of_tests


@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b"])
def test_the_models_of_real_scale_are_of_the_size_that_their_names_say(model: str) -> None:
    billions = float(model.rpartition("-")[2].removesuffix("b"))
    assert Architecture.of(load_config(model)).parameters() / 1e9 == pytest.approx(billions, rel=0.25)
