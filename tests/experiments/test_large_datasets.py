"""The judge of large data sets, on made-up records: constant memory supports, growth refutes or conditions, controls differ."""

from __future__ import annotations

from typing import Any

import pytest

from experiments import large_datasets
from lab.claims import Evidence, judge
from lab.params import Profile
from lab.records import Record
from lab.specs import LargeDataset, TrialSpec
from tests.test_records import make_record

CLAIM = large_datasets.EXPERIMENT.claims[0]
LENGTHS, GIGABYTES = (4096, 256), (0.1, 0.5, 1.0, 2.0)
GROWING = {"mapped": 0.0, "in-memory": 1.0, "objects": 1.1}


def made_up_figures(spec: TrialSpec) -> dict[str, Any]:
    """What a trial leaves that finds no fault with mapped data."""
    settings = spec.settings
    assert isinstance(settings, LargeDataset)
    found: dict[str, Any] = {
        "rows": settings.total_bytes / settings.row_bytes,
        "data_bytes": 1.01 * settings.total_bytes,
    }
    for operation in large_datasets.OPERATIONS if settings.way != "objects" else ["iterate"]:
        private = 1e7 + 1e4 * settings.seed + GROWING[settings.way] * settings.total_bytes
        found |= {
            f"{operation}_private_bytes": private,
            f"{operation}_resident_bytes": 1e7 + 1.1 * settings.total_bytes,
        }
        found |= {f"{operation}_seconds": 1e-9 * settings.total_bytes, f"{operation}_right": 1.0}
    if settings.way == "objects":
        return found
    again = found["rows"] if settings.way == "in-memory" else 0.0
    found |= {"map_calls": found["rows"], "map_again_calls": again, "map_again_seconds": 0.01, "few": 2000.0}
    return found | {"captured_calls": 2000.0, "edited_calls": 2000.0, "edited_stale": 0.0}


def records(way: str = "mapped", length: int = 4096, seeds: int = 2, **changes: Any) -> list[Record]:
    found = []
    for gigabytes in GIGABYTES:
        for seed in range(seeds):
            settings = LargeDataset.model_validate(
                {"total_bytes": round(gigabytes * 1e9), "row_bytes": length, "way": way, "seed": seed}
            )
            name = f"{way}-{length}-{gigabytes:g}-{seed}"
            spec = TrialSpec(experiment="large_datasets", name=name, arm=way, settings=settings)
            found.append(make_record(spec, figures={**made_up_figures(spec), **changes}))
    return found


def growing(operation: str, bytes_per_byte: float, length: int = 4096, jitter: float = 0.0) -> list[Record]:
    """Mapped records in which one operation's memory grows with the data, and is off by `jitter`, up or down, at each size."""
    found = records(length=length)
    for place, record in enumerate(found):
        private = 1e7 + bytes_per_byte * record.figure("data_bytes") + jitter * (-1) ** (place // 2)
        record.figures[f"{operation}_private_bytes"] = private
    return found


HELD = [*records("in-memory"), *records("objects")]
SHORT = records(length=256)


def verdict(*found: Record) -> Any:
    return judge(large_datasets.EXPERIMENT, CLAIM, "cpu", "cpu", list(found), len(found))


def test_it_is_supported_where_no_operation_grows_and_every_planted_fault_refutes() -> None:
    found = verdict(*records(), *SHORT, *HELD)
    assert found.verdict == "supported"
    assert found.effect == pytest.approx(0, abs=1e-5)
    assert "the rows kept in memory: refuted, the rows as Python objects: refuted" in found.control
    assert "Python objects by 1.1" in found.because
    assert "in 20 times the data a row of 256 B takes 1 times the time in order, 20 at random" in found.because


def test_it_is_refuted_where_reading_every_row_takes_memory_for_it() -> None:
    both = [*growing("iterate", 0.5), *growing("iterate", 0.5, length=256)]
    found = verdict(*both, *HELD)
    assert found.verdict == "refuted"
    assert "0.5 for rows of 256 B, 0.5 for rows of 4096 B" in found.because
    assert "nothing to find fault with: supported" in found.control
    one = verdict(*growing("iterate", 0.5), *SHORT, *HELD)
    assert one.verdict == "conditional"


@pytest.mark.parametrize(("grows", "expected"), [(0.009, "supported"), (0.011, "conditional")])
def test_the_boundary_is_one_byte_in_a_hundred(grows: float, expected: str) -> None:
    found = verdict(*growing("shuffle", grows), *SHORT, *HELD)
    assert found.verdict == expected
    assert ("shuffle of rows of 4096 B grows by 0.011 bytes a byte" in found.because) == (expected == "conditional")


def test_it_tells_what_reading_in_order_takes_and_what_a_shuffle_does_by_the_length_of_rows() -> None:
    found = verdict(*growing("shuffle", 0.2, length=256), *growing("shuffle", 0.0125), *HELD)
    assert found.verdict == "conditional"
    little, much, shuffled = found.flips.split("; ")
    assert little.startswith("at most 0.01 bytes of private memory a byte of data: iterate, rows of 256 B ")
    assert "shuffle" not in little
    assert much == (
        "more than 0.01 bytes of private memory a byte of data: shuffle, rows of 256 B 0.2 [0.2, 0.2], shuffle, rows of 4096 B "
        "0.013 [0.013, 0.013]"
    )
    # A byte of text is 1.01 of data: 0.2 x 259 and 0.0125 x 4,137 bytes.
    assert shuffled == (
        "a full shuffle takes 52 bytes for a row of 256 B and 52 bytes for a row of 4096 B, which are 0.01 a byte where rows are "
        "of 5,171 B"
    )
    assert verdict(*records(), *SHORT, *HELD).flips == ""
    both = [*growing("iterate", 0.5), *growing("iterate", 0.5, length=256)]
    assert verdict(*both, *HELD).flips == ""


def test_what_map_misses_is_told_where_it_flips() -> None:
    changes: dict[str, Any] = {"edited_stale": 2000.0}
    found = verdict(*records(**changes), *records(length=256, **changes), *HELD)
    assert found.flips.endswith(
        "; for no length of rows a function is called again when the file that it is imported from has changed"
    )
    near = verdict(*growing("stream", 0.01, jitter=1e7), *SHORT, *HELD)
    assert "undecided against 0.01 bytes of private memory a byte of data: stream, rows of 4096 B 0.0" in near.flips


def test_what_jitters_across_the_boundary_is_undecided() -> None:
    found = verdict(*growing("stream", 0.01, jitter=1e7), *SHORT, *HELD)
    assert found.verdict == "inconclusive"
    assert "stream of rows of 4096 B undecided, grows by" in found.because


def test_seeds_of_one_size_are_no_further_points() -> None:
    found = [
        large_datasets.growth(growing("iterate", 0.005, jitter=1e6), "iterate"),
        *(large_datasets.growth(records(seeds=seeds), "iterate") for seeds in (1, 5)),
    ]
    assert [interval.n for interval in found] == [len(GIGABYTES)] * 3
    two = [r for r in records("objects", seeds=3) if r.setting("total_bytes") < 0.9e9]
    assert large_datasets.growth(two, "iterate").n == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"map_again_calls": 100.0}, "not so that a function is called once for each row, and not again"),
        ({"captured_calls": 0.0}, "not so that a function is called again when a value that it captures"),
        ({"edited_stale": 2000.0}, "not so that a function is called again when the file that it is imported from"),
    ],
)
def test_a_map_that_is_stale_or_computed_twice_makes_it_conditional(changes: dict[str, Any], said: str) -> None:
    found = verdict(*records(**changes), *records(length=256, **changes), *HELD)
    assert found.verdict == "conditional"
    assert said in found.because
    assert "nothing to find fault with: supported" in found.control


def test_wrong_rows_refute_however_little_memory_they_take() -> None:
    found = verdict(*records(filter_right=0.0), *SHORT, *HELD)
    assert found.verdict == "refuted"
    assert found.because == "other rows than there are: filter"


def test_a_count_that_does_not_see_python_objects_decides_nothing() -> None:
    blind = [*records("in-memory"), *records("objects", iterate_private_bytes=1e7)]
    found = verdict(*records(), *SHORT, *blind)
    assert found.verdict == "inconclusive"
    assert "Python objects do not show in the count of memory" in found.because


def test_the_page_cache_is_drawn_and_not_judged() -> None:
    lines = large_datasets.memory_lines(Evidence([*records(), *SHORT, *HELD]))
    assert lines["iterate, with the page cache"].y[-1] > 100 * lines["iterate"].y[-1]
    assert list(lines["Python objects"].x) == list(GIGABYTES)


def test_small_data_sets_are_written_for_every_seed_and_large_ones_once() -> None:
    rows = {"row_bytes": 4096, "gigabytes": [0.1], "once": [2.0]}
    held = {"row_bytes": 4096, "gigabytes": [0.05]}
    params = large_datasets.Params.model_validate({"seeds": 2, "mapped": [rows], "held": held})
    sizes = {"train": 1, "validation": 1, "test": 1}
    profile = Profile.model_validate({"device": "cpu", "threads": 2, "tiny": {}, "data": sizes})
    specs = large_datasets.trials(params, profile)
    assert [spec.name for spec in specs] == [
        "mapped-4096-2000mb-seed0",
        "mapped-4096-100mb-seed0",
        "mapped-4096-100mb-seed1",
        "in-memory-4096-50mb-seed0",
        "in-memory-4096-50mb-seed1",
        "objects-4096-50mb-seed0",
        "objects-4096-50mb-seed1",
    ]
    assert {spec.runs for spec in specs} == {()}
