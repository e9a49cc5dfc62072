"""The bundle: small enough, whole on arrival, of committed files alone, and SmolLM2 in parts."""

from __future__ import annotations

import hashlib
import zipfile
from pathlib import Path

import pytest

from lab import bundle, run_bundle
from lab.errors import LabError
from lab.manifest import MANIFEST, check_manifest, write_manifest
from tests.conftest import ROOT

LIBRARIES = ("cpu.so", "cuda118.so", "cuda130.so", "cuda132.so", "rocm72.so")


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A wheel with libraries for several versions of CUDA, as bitsandbytes has."""
    path = tmp_path / "bitsandbytes-0.1-py3-none-any.whl"
    names = [f"bitsandbytes/libbitsandbytes_{library}" for library in LIBRARIES]
    with zipfile.ZipFile(path, "w") as archive:
        for name in (*names, "bitsandbytes/__init__.py"):
            archive.writestr(name, name * 100)
        rows = "".join(f"{name},sha256=x,1\n" for name in (*names, "bitsandbytes/__init__.py"))
        archive.writestr("bitsandbytes-0.1.dist-info/RECORD", rows)
    return path


def test_of_the_shared_libraries_the_processor_s_and_one_version_of_cuda_s_are_left(wheel: Path) -> None:
    bundle.strip(wheel, "130")
    kept = ["bitsandbytes/libbitsandbytes_cpu.so", "bitsandbytes/libbitsandbytes_cuda130.so"]
    with zipfile.ZipFile(wheel) as archive:
        assert sorted(name for name in archive.namelist() if name.endswith(".so")) == kept
        record = archive.read("bitsandbytes-0.1.dist-info/RECORD").decode()
    assert [row.split(",")[0] for row in record.splitlines()] == [*kept, "bitsandbytes/__init__.py"]


def test_a_version_of_cuda_that_the_wheel_has_not_is_named_with_those_that_it_has(wheel: Path) -> None:
    with pytest.raises(LabError, match=r"bitsandbytes-0.1.* has no library for CUDA 999. It has: 118, 130, 132."):
        bundle.strip(wheel, "999")


def test_every_wheel_is_pinned_and_has_a_reason() -> None:
    pins = bundle._pins(ROOT)
    assert len(pins) == len(bundle.WHEELS)
    assert all("==" in pin for pin in pins)
    assert all(bundle.WHEELS.values())


def test_a_folder_over_the_limit_says_what_is_large_in_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "LIMIT", 2 * 2**20)
    (tmp_path / "large").write_bytes(bytes(3 * 2**20))
    (tmp_path / "small").write_bytes(b"1")
    with pytest.raises(LabError, match=r"is 3 MiB; 2 MiB is the limit. Largest: large \(3 MiB\), small"):
        bundle.check_limit(tmp_path)


# Whole on arrival -----------------------------------------------------------------------------------------------


def test_a_folder_says_which_of_its_files_is_missing_or_damaged(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    one, two = tmp_path / "one", tmp_path / "deep" / "two"
    one.write_text("1")
    two.write_text("2")
    write_manifest(tmp_path, {"commit": "abc"})
    (tmp_path / "later").write_text("what is written there does not count")
    assert check_manifest(tmp_path)["commit"] == "abc"
    two.write_text("3")
    with pytest.raises(LabError, match=r"deep/two is damaged. Copy .* again."):
        check_manifest(tmp_path)
    two.unlink()
    with pytest.raises(LabError, match=r"deep/two is missing. Copy .* again."):
        check_manifest(tmp_path)
    (tmp_path / MANIFEST).write_text("{")
    with pytest.raises(LabError, match=r"manifest.json is missing or damaged. Copy .* again."):
        check_manifest(tmp_path)


# SmolLM2 in parts -----------------------------------------------------------------------------------------------


def parts_of(folder: Path, content: bytes, parts: int) -> list[Path]:
    length = -(-len(content) // parts)
    made = []
    for part in range(1, parts + 1):
        place = folder / f"bundle-part-{part}"
        place.mkdir()
        (place / bundle.PIECE).write_bytes(content[(part - 1) * length : part * length])
        write_manifest(place, {"of": "model.whl", "part": part, "parts": parts})
        made.append(place)
    return made


def test_the_parts_of_a_file_are_joined_in_order_and_checked(tmp_path: Path) -> None:
    content = bytes(range(256)) * 41
    parts = parts_of(tmp_path, content, 3)
    expected = hashlib.sha256(content).hexdigest()
    joined = bundle.join(parts[::-1], expected, tmp_path / "downloads")
    assert joined is not None
    assert joined.read_bytes() == content
    assert bundle.join([], expected, tmp_path) is None
    with pytest.raises(LabError, match=r"part 2 of 3 of model.whl is missing. Copy all parts beside the bundle."):
        bundle.join([parts[0], parts[2]], expected, tmp_path)
    with pytest.raises(LabError, match=r"models.smol.wheel_sha256 is 0000.* Build the parts again"):
        bundle.join(parts, "0" * 64, tmp_path)
    (parts[1] / bundle.PIECE).write_bytes(b"other")
    with pytest.raises(LabError, match=r"bundle-part-2/piece is damaged"):
        bundle.join(parts, expected, tmp_path)


def test_the_order_of_value_names_experiments(tmp_path: Path) -> None:
    from lab.study import Study

    text = (ROOT / "params.yaml").read_text().replace("- peak_memory ", "- peak_memry ", 1)
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(LabError, match=r"unknown experiment 'peak_memry'. Did you mean 'peak_memory'?"):
        Study.load("gpu", tmp_path)
    order = Study.load("gpu", ROOT).params.bundle.order
    assert len(order) == len(set(order)) > 5


def test_a_wheel_stays_packed_where_the_machine_has_it_or_lacks_what_it_needs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "wheels").mkdir()
    for name, version in (("mine", "2.1"), ("older", "1.0"), ("datasets", "9.0")):
        with zipfile.ZipFile(tmp_path / "wheels" / f"{name}-{version}-py3-none-any.whl", "w") as archive:
            archive.writestr(f"{name}.py", "")
    monkeypatch.setattr(run_bundle, "WHEELS", tmp_path / "wheels")
    monkeypatch.setattr(run_bundle, "SITE", tmp_path / "site")
    machine = {"older": "1.10", "mine": "2.0.9"}
    monkeypatch.setattr(run_bundle, "_installed", lambda name: machine.get(name, ""))
    run_bundle.unpack("first")
    assert {path.name for path in (tmp_path / "site").glob("*.py")} == {"mine.py"}
    machine["pyarrow"] = "26.0"
    run_bundle.unpack("first")
    assert not (tmp_path / "site" / "datasets.py").exists(), "once for a manifest"
    run_bundle.unpack("second")
    assert {path.name for path in (tmp_path / "site").glob("*.py")} == {"mine.py", "datasets.py"}
