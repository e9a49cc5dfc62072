"""What the judges of the memory claims do between their points: where a saving fades, what a card takes."""

from __future__ import annotations

import pytest

from experiments import model_size, peak_memory, peft_cost
from lab.claims import Evidence
from lab.memory.architecture import Architecture
from lab.pricing import load_config
from lab.specs import Simulation, TrialSpec
from tests.test_records import make_record


@pytest.mark.parametrize(
    ("points", "fades"),
    [
        ([(10, (100.0,), (50.0,)), (20, (110.0,), (77.0,))], None),
        ([(10, (100.0,), (95.0,)), (20, (110.0,), (109.0,))], 10),
        ([(100, (100.0,), (80.0,)), (200, (100.0,), (100.0,))], 150),
        ([(100, (100.0,), (70.0,)), (200, (200.0,), (160.0,)), (400, (400.0,), (400.0,))], 267),
    ],
)
def test_a_saving_fades_where_lines_of_bytes_meet(points: list[peft_cost.Point], fades: int | None) -> None:
    assert peft_cost._fades_at(points) == fades


def test_where_a_saving_fades_is_found_from_far_points_though_another_phase_peaks() -> None:
    def point(tokens: int) -> peft_cost.Point:
        # Few tokens: full fine-tuning peaks in the step, whatever the batch; then in backward.
        return tokens, (64e9 + 2e6 * tokens, 96e9), (16e9 + 6e6 * tokens, 17e9)

    exact = (0.9 * 96e9 - 16e9) / 6e6
    assert exact < (96e9 - 64e9) / 2e6
    assert peft_cost._fades_at([point(1), point(10_000_000)]) == pytest.approx(exact, rel=1e-4)


def test_a_card_holds_less_than_its_name_says_and_takes_the_largest_model_that_is_no_more() -> None:
    assert 0.85 * 24 * 2**30 < model_size._room(24) < 0.96 * 24 * 2**30
    room = model_size._room(24)

    def largest(needs: dict[float, float]) -> float:
        settings = Simulation(model="llama-6m")
        evidence = Evidence(
            make_record(
                TrialSpec(experiment="model_size", name=f"sim-{size:g}b", arm=arm, tier="sim", settings=settings),
                figures={"parameters_base": size * 1e9, "weights_bytes": need},
            )
            for arm in ("loaded-16-bits", "loaded-4-bits")
            for size, need in needs.items()
        )
        return model_size._table(evidence, "loaded")["16 bits"][24]

    assert largest({1.0: room - 1.0, 2.0: float(room), 3.0: room + 1.0}) == 2.0
    assert largest({1.0: room + 1.0}) == 0.0


def test_the_published_figures_are_those_of_the_tests_of_the_simulation() -> None:
    from tests.memory.test_simulation import PUBLISHED

    of_tests = sorted(gib for _, peak, steady in PUBLISHED for gib in (peak, steady) if gib)
    assert sorted(gib for _, figures in peak_memory.PUBLISHED.values() for gib in figures.values()) == of_tests


@pytest.mark.parametrize("model", ["llama-3.2-1b", "llama-3.1-8b", "llama-3.1-70b"])
def test_the_models_of_real_scale_are_of_the_size_that_their_names_say(model: str) -> None:
    billions = float(model.rpartition("-")[2].removesuffix("b"))
    assert Architecture.of(load_config(model)).parameters() / 1e9 == pytest.approx(billions, rel=0.25)
