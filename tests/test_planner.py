"""What fits, how much more would, and sweeps. Most of it stands on a price that is plain arithmetic."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from types import ModuleType

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import planner
from lab.cards import CONTEXT_BYTES, GIB
from lab.memory.workload import Prediction, Workload
from lab.planner import Answer, answer
from lab.pricing import read_spec
from lab.remedies import ladder
from tests.prices import SMALL, arithmetic, mistake

# What fits ------------------------------------------------------------------------------------------------------


def curve(fixed: int, slope: int, bend: int, flat: int) -> Callable[[int], Prediction]:
    """A price that rises with n, ever more steeply, beside a phase that does not."""

    def price(n: int) -> Prediction:
        phases = {"forward": fixed + slope * n + bend * n * n, "backward": fixed + 2 * slope * n, "step": flat}
        return Prediction(max(phases.values()), fixed, {}, phases, {})

    return price


@settings(deadline=None)
@given(
    fixed=st.integers(0, 1000),
    slope=st.integers(0, 50),
    bend=st.integers(0, 3),
    flat=st.integers(0, 2000),
    room=st.integers(0, 10_000),
    now=st.integers(1, 300),
    hint=st.integers(-5, 400),
)
def test_the_largest_that_fits_is_that_of_trying_all(
    fixed: int, slope: int, bend: int, flat: int, room: int, now: int, hint: int
) -> None:
    price = curve(fixed, slope, bend, flat)
    tried = max((n for n in range(1, 301) if price(n).peak_bytes <= room), default=0)
    for guesses in ([now], [now, hint, hint + 1]):
        assert planner.largest_that_fits(price, room, guesses, 300) == tried


def test_on_a_line_few_predictions_are_enough() -> None:
    asked = []

    def price(n: int) -> Prediction:
        asked.append(n)
        return curve(1000, 7, 0, 0)(n)

    assert planner.largest_that_fits(price, 10_000, [4], 2**20) == 642
    assert len(asked) <= 4
    asked.clear()
    assert planner.largest_that_fits(price, 10_000, [4], 2**20, tries=2) == 642
    assert len(asked) == 2


@pytest.mark.parametrize("confirm", [True, False])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_largest_batch_fits_and_one_more_does_not(priced: Callable[..., Answer], batch: int, confirm: bool) -> None:
    spec = {"model": "llama-3.2-1b", "method": "lora", "length": 512, "vram_gib": 24}
    found = priced(confirm=confirm, batch=batch, **spec).largest_batch
    assert found
    assert priced(batch=found, **spec).fits
    assert not priced(batch=found + 1, **spec).fits


def test_where_nothing_fits_the_largest_batch_is_zero(priced: Callable[..., Answer]) -> None:
    for confirm in (True, False):
        found = priced(confirm=confirm, model="llama-3.1-8b", batch=4, vram_gib=24)
        assert (found.fits, found.largest_batch, found.longest_sequence) == (False, 0, 0)


def test_the_longest_sequence_ends_with_the_card_or_with_the_positions(priced: Callable[..., Answer]) -> None:
    spec = {"model": "llama-3.2-1b", "method": "lora", "batch": 2}
    for attention in ("sdpa", "eager"):
        found = priced(vram_gib=16, attention=attention, **spec).longest_sequence
        assert found
        assert found % planner.GRAIN == 0
        assert priced(vram_gib=16, attention=attention, length=found, **spec).fits
        assert not priced(vram_gib=16, attention=attention, length=found + planner.GRAIN, **spec).fits
    prompt = {"model": "gpt2", "method": "prompt", "virtual_tokens": 24}
    for length in (64, 1000):
        assert priced(vram_gib=80, length=length, **prompt).longest_sequence == max(960, length)


def test_without_a_card_nothing_is_said_about_fitting(priced: Callable[..., Answer]) -> None:
    found = priced(model="gpt2")
    assert (found.fits, found.spare_bytes, found.largest_batch, found.longest_sequence) == (None, None, None, None)
    assert list(ladder(found)) == []


def test_the_closed_form_alone_needs_a_margin(priced: Callable[..., Answer]) -> None:
    spec = {"model": "llama-3.2-1b", "length": 2048}
    peak = priced(**spec).prediction.peak_bytes
    just = (peak * 1.04 + CONTEXT_BYTES) / GIB / 0.98
    assert priced(vram_gib=just, **spec).fits
    assert not priced(vram_gib=just, quick=True, **spec).fits


def test_a_simulated_largest_batch_fits_and_one_more_does_not() -> None:
    spec = {"config": SMALL, "length": 256, "vram_gib": 0.9}
    found = answer(read_spec({**spec, "batch": 4}))
    assert found.largest_batch
    prices = [answer(read_spec({**spec, "batch": found.largest_batch + more})) for more in (0, 1)]
    assert [price.fits for price in prices] == [True, False]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both engines replaced: the closed form is the arithmetic, the simulation says 2 % more; who was asked."""
    asked: list[str] = []

    def put(name: str, scale: float) -> None:
        def predict(workload: Workload) -> Prediction:
            asked.append(name)
            found = arithmetic(workload)
            phases = {phase: int(scale * peak) for phase, peak in found.phases.items()}
            return replace(found, peak_bytes=max(phases.values()), phases=phases)

        module = ModuleType(name)
        module.predict = predict  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"lab.memory.{name}", module)

    put("closed_form", 1.0)
    put("simulation", 1.02)
    return asked


def test_quick_asks_the_closed_form_alone_and_otherwise_it_only_says_where_to_look(engines: list[str]) -> None:
    spec = {"model": "llama-3.2-1b", "method": "lora", "attention": "eager", "length": 512, "vram_gib": 24}
    assert answer(read_spec(spec), quick=True).largest_batch
    assert set(engines) == {"closed_form"}
    found = {}
    for confirm, at_most in ((True, 4), (False, 1)):
        engines.clear()
        found[confirm] = answer(read_spec(spec), confirm=confirm).largest_batch
        assert engines.count("simulation") <= at_most
    assert found[True]
    assert found[False] == pytest.approx(found[True], abs=1)
    engines.clear()
    assert answer(read_spec(spec)).longest_sequence
    assert engines.count("simulation") <= 5


# Sweeps --------------------------------------------------------------------------------------------


def test_a_range_doubles_from_its_low_end() -> None:
    workload = read_spec({"config": SMALL, "batch": 3, "length": 100})
    both = planner.read_ranges(["batch=1..64", "length=512..1500"], workload)
    assert both == {"batch": [1, 2, 4, 8, 16, 32, 64], "length": [512, 1024]}
    assert planner.read_ranges(["batch=3..12"], workload) == {"batch": [3, 6, 12], "length": [100]}
    assert planner.read_ranges(["length=7"], workload) == {"batch": [3], "length": [7]}


@pytest.mark.parametrize("text", ["batch", "rank=1..2", "batch=0..2", "batch=4..1", "batch=a..b", "length=1-2"])
def test_what_is_no_range_is_one_line(text: str) -> None:
    said = mistake(lambda: planner.read_ranges([text], read_spec({"config": SMALL})))
    assert said.startswith(f"sweep: '{text}' ")


def test_a_sweep_prices_every_pair(priced: Callable[..., Answer]) -> None:
    workload = priced(model="gpt2", vram_gib=8).workload
    cells = list(planner.sweep(workload, [1, 64], [128, 1024]))
    assert [(cell.batch, cell.length, cell.fits) for cell in cells] == [
        (1, 128, True),
        (64, 128, True),
        (1, 1024, True),
        (64, 1024, False),
    ]
