"""The trial that reads a large data set: real Arrow files, memory counted by the kernel, and a planted fault for each count."""

from __future__ import annotations

import mmap
import multiprocessing
import re
import shutil
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from lab import large_datasets
from lab.errors import LabError
from lab.large_datasets import OPERATIONS, Peak
from lab.specs import LargeDataset
from lab.workspace import Workspace

MEGABYTE = 10**6


def settings(**chosen: Any) -> LargeDataset:
    return LargeDataset.model_validate({"total_bytes": 40 * MEGABYTE, **chosen})


def read(folder: Path, **chosen: Any) -> dict[str, Any]:
    """The figures of a trial in a process of its own, as the study runs it: memory freed before would be used again."""
    with ProcessPoolExecutor(max_workers=1, mp_context=multiprocessing.get_context("spawn")) as process:
        trial = process.submit(large_datasets.read_at_scale, settings(**chosen), Workspace(folder, "smoke"))
        return trial.result().figures


@pytest.fixture(scope="module")
def mapped(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("study")
    found = read(folder)
    assert not [path for path in folder.rglob("*") if path.is_file()], "the data set is removed"
    return found


@pytest.fixture(scope="module")
def held(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return read(tmp_path_factory.mktemp("study"), way="in-memory")


def test_every_operation_sees_the_rows_that_it_should_see(mapped: dict[str, Any], held: dict[str, Any]) -> None:
    assert mapped["rows"] == 40 * MEGABYTE // 4096
    assert 40 * MEGABYTE < mapped["data_bytes"] < 41 * MEGABYTE
    assert [mapped[f"{operation}_right"] for operation in OPERATIONS] == [1] * len(OPERATIONS)
    assert [held[f"{operation}_right"] for operation in OPERATIONS] == [1] * len(OPERATIONS)


def test_mapped_rows_are_not_private_and_rows_kept_in_memory_are(
    mapped: dict[str, Any], held: dict[str, Any], tmp_path: Path
) -> None:
    assert mapped["iterate_private_bytes"] < 20 * MEGABYTE
    assert held["iterate_private_bytes"] > 40 * MEGABYTE
    assert read(tmp_path, way="objects")["iterate_private_bytes"] > mapped["iterate_private_bytes"]


def test_a_map_is_cached_on_disk_by_what_the_function_captures_and_not_by_what_it_imports(
    mapped: dict[str, Any], held: dict[str, Any]
) -> None:
    assert (mapped["map_calls"], mapped["map_again_calls"]) == (mapped["rows"], 0)
    assert mapped["captured_calls"] == mapped["few"]
    assert (mapped["edited_calls"], mapped["edited_stale"]) == (0, mapped["few"])
    # Data without a file has no place for a cache.
    assert held["map_again_calls"] == held["rows"]
    assert held["edited_stale"] == 0


def test_the_peak_sees_memory_that_is_freed_again_and_not_the_page_cache(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(40 * MEGABYTE))
    with Peak() as peak:
        # Pages of the system's: what malloc gives may have lain in this process before.
        held = mmap.mmap(-1, 40 * MEGABYTE, flags=mmap.MAP_PRIVATE)
        held[:: mmap.PAGESIZE] = bytes(len(range(0, 40 * MEGABYTE, mmap.PAGESIZE)))
        peak._look()
        held.close()
    assert 40 * MEGABYTE <= peak.private_bytes < 50 * MEGABYTE
    with (tmp_path / "file").open("rb") as file, Peak() as peak:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        assert sum(mapped[:: mmap.PAGESIZE]) == 0
        peak._look()
    assert peak.private_bytes < 5 * MEGABYTE
    assert peak.resident_bytes >= 40 * MEGABYTE


def test_private_memory_agrees_with_the_kernels_count_of_anonymous_pages() -> None:
    private, resident = large_datasets.memory()
    rollup = Path("/proc/self/smaps_rollup").read_text()
    anonymous = 1024 * int(re.search(r"Anonymous: +(\d+)", rollup)[1])  # type: ignore[index]
    assert private == pytest.approx(anonymous, abs=2 * MEGABYTE)
    assert private < resident


def test_too_small_a_disk_is_one_line_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=50 * MEGABYTE)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(LabError) as caught:
        large_datasets.read_at_scale(settings(), Workspace(tmp_path, "smoke"))
    assert str(caught.value) == (
        "a data set of 0.04 GB needs 0.1 GB of disk, and 0.1 are free. Free some, or lower gigabytes of large_datasets in "
        "params.yaml."
    )
    assert not list((tmp_path / "build" / "smoke" / "scratch").iterdir())


def test_a_platform_without_the_count_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_datasets, "STATUS", tmp_path / "status")
    with pytest.raises(LabError, match=r"status is not there to count private memory by\. Leave large_datasets out"):
        large_datasets.read_at_scale(settings(), Workspace(tmp_path, "smoke"))


def fails(message: str) -> dict[str, float]:
    raise (MemoryError if "memory" in message else OSError)(message)


def is_killed(message: str) -> dict[str, float]:
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)
    return {}


def test_an_operation_that_fails_says_why_and_one_that_is_killed_ran_out_of_memory() -> None:
    with pytest.raises(RuntimeError, match="OSError: disk full"):
        large_datasets._apart(fails, "disk full\nand more")
    with pytest.raises(MemoryError, match="MemoryError: no memory"):
        large_datasets._apart(fails, "no memory")
    with pytest.raises(MemoryError, match="is_killed was ended with exit code -9: out of memory"):
        large_datasets._apart(is_killed, "")
