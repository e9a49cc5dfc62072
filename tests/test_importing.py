"""What comes back from a GPU elsewhere is filed only if it is evidence. These records are made up, and marked so."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from lab import records
from lab.errors import LabError
from lab.importing import file_records, name_metrics, slug
from lab.offline import SCHEMA, unpack
from lab.records import Record
from lab.specs import Memory, TrialSpec
from lab.study import Study
from tests.conftest import ROOT
from tests.test_records import make_record

H100 = "NVIDIA H100 80GB HBM3"
NO_TREE = Study.load("gpu", ROOT)


def commit() -> str:
    return records._git(ROOT, "rev-parse", "HEAD")


def measured(name: str = "a", **changes: Any) -> Record:
    """A record as an H100 would leave it, but for the mark that it is made up."""
    spec = TrialSpec(experiment="memory_formulas", name=name, arm="weights", settings=Memory(model="llama-6m"))
    code = records.code_fingerprint(ROOT, "memory", spec.methods())
    origin: dict[str, Any] = {"commit": commit(), "code": code, "device": H100, "device_memory_bytes": 85 * 10**9}
    return make_record(spec, **{**origin, **changes})


def synthetic(record: Record) -> Record:
    return record.model_copy(update={"provenance": record.provenance.model_copy(update={"synthetic": True})})


def packed(folder: Path, found: Sequence[Record], **header: Any) -> Path:
    """A file of records with any header."""
    lines = [json.dumps({"schema": SCHEMA, "profile": "gpu", "commit": commit(), "dirty": False, **header})]
    lines += [json.dumps(record.model_dump(mode="json")) for record in found]
    text = "".join(f"{line}\n" for line in lines).encode()
    text += json.dumps({"sha256": hashlib.sha256(text).hexdigest()}).encode() + b"\n"
    path = folder / "records.jsonl.gz"
    path.write_bytes(gzip.compress(text))
    return path


def test_records_are_filed_by_device_and_a_second_import_changes_nothing(tmp_path: Path) -> None:
    path = packed(tmp_path, [measured("a"), measured("b")])
    filed = file_records(NO_TREE, path, tmp_path)
    assert (filed.folder, filed.fresh, filed.replaced, filed.kept) == ("gpu-h100", 2, 0, 0)
    there = tmp_path / "gpu-h100" / "memory_formulas" / "a.json"
    assert records.read_record(there) == measured("a")
    again = file_records(NO_TREE, path, tmp_path)
    assert (again.fresh, again.replaced, again.kept) == (0, 0, 2)
    newer = packed(tmp_path, [measured("a", started="2027-01-01T00:00:00+00:00", figures={"weights_bytes": 9.0})])
    assert file_records(NO_TREE, newer, tmp_path).replaced == 1
    assert records.read_record(there).figure("weights_bytes") == 9.0
    older = file_records(NO_TREE, packed(tmp_path, [measured("a"), measured("b")]), tmp_path)
    assert (older.replaced, older.kept) == (0, 2)


def test_a_failure_never_takes_the_place_of_a_result_and_running_out_of_memory_is_one(tmp_path: Path) -> None:
    later = "2027-01-01T00:00:00+00:00"
    file_records(NO_TREE, packed(tmp_path, [measured("a"), measured("b")]), tmp_path)
    found = [measured("a", status="failed", started=later), measured("b", status="oom", started=later)]
    filed = file_records(NO_TREE, packed(tmp_path, found), tmp_path)
    assert (filed.replaced, filed.kept) == (1, 1)
    assert records.read_record(tmp_path / "gpu-h100" / "memory_formulas" / "a.json") == measured("a")


def test_a_file_of_two_devices_is_one_line(tmp_path: Path) -> None:
    path = packed(tmp_path, [measured("a"), measured("b", device="NVIDIA H200")])
    with pytest.raises(
        LabError, match=r"holds records of NVIDIA H100 80GB HBM3 and of NVIDIA H200\. Unpack the bundle anew"
    ):
        file_records(NO_TREE, path, tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        (synthetic(measured()), "memory_formulas/a is synthetic, which is no evidence. Measure it"),
        (measured(dirty=True), "was measured from a dirty tree. Commit, build the bundle again"),
        (measured(commit="f" * 40), "is of commit ffffffffffff, which is not in this repository. Fetch it"),
        (measured(code="0ther"), "was measured by other code than is here. Check out what measured it: git checkout"),
    ],
)
def test_what_is_no_evidence_is_refused_and_nothing_is_written(tmp_path: Path, record: Record, reason: str) -> None:
    path = packed(tmp_path, [measured("good"), record])
    with pytest.raises(LabError, match=reason):
        file_records(NO_TREE, path, tmp_path / "results")
    assert not (tmp_path / "results").exists()


def test_neither_synthetic_records_nor_a_rehearsal_can_enter_results(tmp_path: Path) -> None:
    with pytest.raises(LabError, match="is synthetic"):
        file_records(NO_TREE, packed(tmp_path, [synthetic(measured())]))
    with pytest.raises(LabError, match=r"is of the profile smoke: a rehearsal. Choose another folder for it: --into"):
        file_records(NO_TREE, packed(tmp_path, [measured()], profile="smoke"))
    with pytest.raises(LabError, match="is of the profile smoke: a rehearsal"):
        file_records(NO_TREE, packed(tmp_path, [measured()], profile="smoke"), ROOT / "results")


def test_a_file_that_is_damaged_or_of_another_kind_says_so(tmp_path: Path) -> None:
    path = packed(tmp_path, [measured()])
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    with pytest.raises(LabError, match=r"records.jsonl.gz is damaged or cut short .* Copy it again"):
        unpack(path)
    path.write_bytes(gzip.compress(gzip.decompress(whole).replace(b'"weights_bytes": 8.0', b'"weights_bytes": 7.0')))
    with pytest.raises(LabError, match="its bytes are not those that were packed"):
        unpack(path)
    path.write_bytes(gzip.compress(b"some text\n"))
    with pytest.raises(LabError, match=r"is no file of records. Name the records.jsonl.gz"):
        unpack(path)
    path.write_bytes(gzip.compress(b""))
    with pytest.raises(LabError, match="is no file of records"):
        unpack(path)
    with pytest.raises(LabError, match=f"has schema 99; this lab reads {SCHEMA}. Use the lab at commit"):
        unpack(packed(tmp_path, [measured()], schema=99))
    with pytest.raises(LabError, match="there is no file"):
        unpack(tmp_path / "elsewhere")
    with pytest.raises(LabError, match=r"holds no record. Give the bundle more time"):
        file_records(NO_TREE, packed(tmp_path, []), tmp_path)


def test_a_record_that_this_lab_does_not_write_is_refused(tmp_path: Path) -> None:
    text = gzip.decompress(packed(tmp_path, [measured()]).read_bytes()).splitlines(keepends=True)[:-1]
    text[1] = text[1].replace(b'"status": "ok"', b'"status": "splendid"')
    last = json.dumps({"sha256": hashlib.sha256(b"".join(text)).hexdigest()}).encode()
    path = tmp_path / "changed.gz"
    path.write_bytes(gzip.compress(b"".join([*text, last])))
    with pytest.raises(LabError, match="a record is not as this lab writes it"):
        unpack(path)


def test_dvc_shows_the_metrics_of_each_device_that_was_imported(tmp_path: Path) -> None:
    def dvc(*arguments: str) -> str:
        command = [sys.executable, "-m", "dvc", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    dvc("init", "--no-scm", "--quiet")
    pipeline = tmp_path / "dvc.yaml"
    pipeline.write_text("stages:\n  one:\n    cmd: echo\n")
    for device in ("gpu-h100", "gpu-rtx-4090"):
        (tmp_path / "results" / device).mkdir(parents=True)
        (tmp_path / "results" / device / "metrics.json").write_text('{"weights-bytes": {"gpu": {"n": 9}}}')
        name_metrics(pipeline, device)
        name_metrics(pipeline, device)
    assert pipeline.read_text().count("metrics.json") == 2
    shown = json.loads(dvc("metrics", "show", "--json"))
    assert {f"results/{device}/metrics.json" for device in ("gpu-h100", "gpu-rtx-4090")} == set(shown[""]["data"])


@pytest.mark.parametrize(
    ("device", "folder"),
    [
        (H100, "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA RTX 6000 Ada Generation", "rtx-6000-ada"),
        ("Tesla T4", "t4"),
    ],
)
def test_a_device_gets_a_short_folder(device: str, folder: str) -> None:
    assert slug(device) == folder


def test_imported_records_are_judged_under_their_own_name_and_what_has_not_run_is_no_fault(tmp_path: Path) -> None:
    for name in ("experiments", "lab", "params.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    file_records(NO_TREE, packed(tmp_path, [measured()]), tmp_path / "results")
    study = Study.load("gpu-h100", tmp_path)
    assert (study.workspace.profile, study.workspace.results.name) == ("gpu", "gpu-h100")
    assert {verdict.profile for verdict in study.verdicts} == {"gpu-h100"}
    assert {verdict.tier for verdict in study.verdicts} == {"gpu"}
    assert study.stale(study.registry.experiment("peak_memory")) == []
    with pytest.raises(LabError, match="unknown profile 'gpu-a100'"):
        Study.load("gpu-a100", tmp_path)
