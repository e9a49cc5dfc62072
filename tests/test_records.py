"""Records: written whole or not at all, used again only where nothing that could change a number has changed."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import records
from lab.errors import LabError
from lab.records import Provenance, Record, reusable
from lab.runners import RUNNERS
from lab.specs import Memory, Training, TrialSpec
from tests.conftest import ROOT

MEMORY = TrialSpec(experiment="memory", name="a", arm="weights", settings=Memory(model="llama-6m", seed=3))


def make_record(spec: TrialSpec = MEMORY, **changes: Any) -> Record:
    """A successful record of `spec`; `changes` go to the record, or to its provenance where that has the field."""
    origin = {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": False,
        "code": "c0de",
        "environment": "here",
        "inputs": {"tiny": "aa11"},
        "versions": {"torch": "2.13.0", "transformers": "5.23.0"},
        "python": "3.11.9",
        "platform": "Linux-6",
        "device": "A processor",
        "device_memory_bytes": 2**34,
        "threads": 2,
        "started": "2026-02-03T10:00:00+00:00",
        "seconds": 1.5,
    }
    origin |= {name: changes.pop(name) for name in list(changes) if name in origin}
    fields: dict[str, Any] = {"status": "ok", "figures": {"weights_bytes": 8.0, "lost": None}, **changes}
    return Record(spec=spec, provenance=Provenance.model_validate(origin), **fields)


# Reading and writing --------------------------------------------------------------------------------------------


@given(st.dictionaries(st.text(min_size=1), st.none() | st.integers(-(2**53), 2**53) | st.floats(), max_size=5))
def test_whatever_a_trial_measures_comes_back_as_it_was_and_no_number_as_null(figures: dict[str, Any]) -> None:
    record = make_record(figures=records.as_numbers(figures), series={"loss": records.as_series(figures.values())})
    text = json.dumps(record.model_dump(mode="json"), allow_nan=False)
    back = Record.model_validate_json(text)
    assert back == record
    for name, value in figures.items():
        assert back.figures[name] == (value if value is not None and math.isfinite(value) else None)


def test_a_record_lies_under_its_experiment_and_ends_with_a_newline(tmp_path: Path) -> None:
    path = records.write_record(make_record(), tmp_path)
    assert path == tmp_path / "memory" / "a.json"
    assert path.read_text().endswith("}\n")
    assert path.stat().st_mode & 0o777 == 0o644
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]
    assert records.read_record(path) == make_record()


def test_a_write_that_fails_leaves_the_old_file_and_no_new_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.json"
    records.write_text(path, "old")

    def refuse(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", refuse)
    with pytest.raises(LabError, match=r"cannot write .*a\.json: No space left on device\. Free space or make"):
        records.write_text(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "null",
        lambda text: text.replace('"ok"', '"fine"'),
        lambda text: text.replace('"seed": 3', '"seed": "three"'),
        lambda text: text.replace('"tags"', '"labels"'),
        lambda text: "\x00\x01" + text,
    ],
)
def test_a_damaged_record_is_told_from_a_whole_one(tmp_path: Path, damage: Any) -> None:
    whole = records.write_record(make_record(), tmp_path)
    bad = whole.with_name("b.json")
    bad.write_text(damage(whole.read_text()))
    with pytest.raises(LabError, match=r"record .*b\.json is damaged: .*\. Move it away; its trial is measured again"):
        records.read_record(bad)
    found, damaged = records.read_records(whole.parent)
    assert (found, damaged) == ([make_record()], [bad])
    aside = records.set_aside(bad)
    assert aside.name == "b.json.damaged"
    assert records.read_records(whole.parent) == ([make_record()], [])


def test_a_folder_that_is_not_there_has_no_records(tmp_path: Path) -> None:
    assert records.read_records(tmp_path / "nothing") == ([], [])


def test_a_missing_figure_names_those_that_are_there() -> None:
    with pytest.raises(LabError, match=r"record memory/a: no figure 'peak_bytes'\. It has: lost, weights_bytes\."):
        make_record().figure("peak_bytes")
    with pytest.raises(LabError, match="no figure 'lost'"):
        make_record().figure("lost")
    assert make_record().figure("weights_bytes") == 8.0


def test_a_setting_that_this_kind_of_trial_lacks_is_none() -> None:
    assert make_record().setting("seed") == 3
    assert make_record().setting("learning_rate") is None


# Use again ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "again"),
    [
        ({}, True),
        ({"status": "oom"}, True),
        ({"status": "diverged"}, True),
        ({"status": "failed"}, False),
        ({"code": "other"}, False),
        ({"environment": "there"}, False),
        ({"inputs": {"tiny": "bb22"}}, False),
        ({"inputs": {}}, False),
        ({"spec": MEMORY.model_copy(update={"settings": Memory(model="llama-6m", seed=4)})}, False),
        # What cannot change a number.
        ({"commit": "f" * 40, "dirty": True, "started": "2020-01-01T00:00:00+00:00", "seconds": 9.0}, True),
    ],
)
def test_a_record_is_used_again_only_if_nothing_that_matters_changed(changes: dict[str, Any], again: bool) -> None:
    record = make_record(**changes)
    assert reusable(record, MEMORY, "c0de", "here", {"tiny": "aa11"}) is again


def test_equal_settings_have_one_digest_and_a_changed_one_another() -> None:
    first = Training(model="tiny", task="gcd", updates=3)
    spec = TrialSpec(experiment="e", name="n", arm="x", settings=first)
    assert spec.digest() == spec.model_copy(update={"name": "other", "arm": "y"}).digest()
    assert spec.digest() != spec.model_copy(update={"settings": first.model_copy(update={"seed": 1})}).digest()


# Fingerprints ---------------------------------------------------------------------------------------------------


@pytest.fixture
def sources(tmp_path: Path) -> Path:
    """A folder with a copy of the library."""
    shutil.copytree(ROOT / "lab", tmp_path / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def fingerprint(root: Path, kind: str = "training", *methods: str) -> str:
    records.code_fingerprint.cache_clear()
    try:
        return records.code_fingerprint(root, kind, frozenset(methods))
    finally:
        records.code_fingerprint.cache_clear()


def edit(path: Path, before: str, after: str) -> None:
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))


def test_a_method_of_the_lab_s_own_is_code_of_its_trials_alone(sources: Path) -> None:
    path = sources / "lab" / "methods" / "own.py"
    path.write_text("WIDTH = 1\n")
    others, own = fingerprint(sources, "training", "lora"), fingerprint(sources, "training", "own")
    assert others == fingerprint(sources) != own
    path.write_text("WIDTH = 2\n")
    assert fingerprint(sources, "training", "lora") == others
    assert fingerprint(sources, "training", "own") != own


def test_a_comment_a_docstring_or_an_empty_line_costs_no_rerun(sources: Path) -> None:
    before = fingerprint(sources)
    path = sources / "lab" / "data.py"
    path.write_text('"""Said otherwise."""\n\n# And a comment.\n' + path.read_text().split('"""', 2)[2])
    edit(path, "class Collator:\n", "class Collator:\n\n    # Why not.\n")
    assert fingerprint(sources) == before


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("training.py", "WARMUP_SHARE = 0.1", "WARMUP_SHARE = 0.2"),
        ("evaluation.py", "IGNORED = -100", "IGNORED = -99"),
        ("methods/__init__.py", "alpha: Count = 16", "alpha: Count = 32"),
        ("optimizers.py", ".float()", ".double()"),
    ],
)
def test_a_change_that_can_change_a_number_costs_a_rerun(sources: Path, name: str, before: str, after: str) -> None:
    old = fingerprint(sources)
    edit(sources / "lab" / name, before, after)
    assert fingerprint(sources) != old


def test_every_python_reads_the_same_meaning_in_a_piece_of_code() -> None:
    code = """
class Ledger(Base):
    '''Counts.'''

    @property
    async def total(self, *names: str, **kinds: int) -> "str | None":
        if (size := len(names)) > 1:
            return f"{self.part!r:>8} {kinds}" "!"
        try:
            return None
        except* ValueError:
            return lambda x: x[1:, ...]
        match size:
            case {"a": [1, *_]} | None:
                pass
"""
    # As 3.11 finds it; 3.12 has a field more in each function, and 3.13 prints no empty ones.
    assert hashlib.sha256(records.meaning(ast.parse(code)).encode()).hexdigest()[:16] == "d8e02d281ae598e5"


def test_a_change_of_what_only_judges_or_shows_costs_no_rerun(sources: Path) -> None:
    old = fingerprint(sources)
    for name in ("claims.py", "plots.py", "statistics.py", "study.py", "cli.py", "progress.py", "tracking.py"):
        (sources / "lab" / name).write_text("raise SystemExit\n")
    assert fingerprint(sources) == old


def test_measuring_memory_runs_the_code_that_trains_and_not_the_reverse(sources: Path) -> None:
    before = {kind: fingerprint(sources, kind) for kind in RUNNERS}
    edit(sources / "lab" / "memory" / "ledger.py", "-(-size // round_to)", "(size // round_to)")
    after = {kind: fingerprint(sources, kind) for kind in RUNNERS}
    measuring = {"checkpointing", "inference", "learning", "memory", "optimizer", "paging", "scaling", "simulation"}
    measuring |= {"device-memory", "limit", "prediction", "speed"}
    changed = {kind for kind in RUNNERS if before[kind] != after[kind]}
    assert {"memory", "simulation"} <= changed <= measuring | {"simulated-inference"}


def test_a_folder_is_known_by_its_names_and_bytes(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "a").write_bytes(b"12")
    (tmp_path / "model" / "b").write_bytes(b"3")
    before = records.folder_fingerprint(tmp_path / "model")
    os.utime(tmp_path / "model" / "a", (0, 0))
    assert records.folder_fingerprint(tmp_path / "model") == before
    (tmp_path / "model" / "a").write_bytes(b"1")
    (tmp_path / "model" / "b").write_bytes(b"23")
    assert records.folder_fingerprint(tmp_path / "model") != before


# Provenance -----------------------------------------------------------------------------------------------------


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """A clean git repository with params.yaml, a source and a record."""
    for name, text in (
        ("params.yaml", "profile: cpu\nseeds: 3\n"),
        ("lab.py", "x = 1\n"),
        ("results/cpu/a.json", "{}"),
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    identity = ["-c", "user.name=lab", "-c", "user.email=lab@localhost", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-q", "--no-verify", "-m", "start"]):
        subprocess.run(["git", "-C", str(tmp_path), *command], check=True)
    return tmp_path


def test_a_clean_tree_is_clean_and_has_its_commit(repository: Path) -> None:
    commit, dirty = records.git_state(repository)
    assert len(commit) == 40
    assert not dirty


@pytest.mark.parametrize(
    ("name", "text", "dirty"),
    [
        ("lab.py", "x = 2\n", True),
        ("new.py", "", True),
        ("params.yaml", "profile: cpu\nseeds: 4\n", True),
        ("params.yaml", "profile: smoke\nseeds: 3\n", False),
        ("params.yaml", "profile: [\n", True),
        ("results/cpu/a.json", "{ }", False),
        ("results/smoke/b.json", "{}", False),
        ("dvc.lock", "", False),
    ],
)
def test_a_tree_is_dirty_by_what_can_change_a_number(repository: Path, name: str, text: str, dirty: bool) -> None:
    path = repository / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    assert records.git_state(repository)[1] is dirty


def test_outside_a_repository_the_commit_is_unknown_and_the_tree_dirty(tmp_path: Path) -> None:
    assert records.git_state(tmp_path) == ("unknown", True)


def test_the_stack_and_the_device_are_described() -> None:
    versions = records.stack_versions()
    assert set(versions) == set(records.STACK)
    assert versions["torch"] != "absent"
    name, memory = records.describe_device("cpu")
    assert name
    assert memory > 2**28


def test_the_driver_of_a_gpu_is_part_of_where_a_record_comes_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert records.describe_driver("cpu") == ""
    monkeypatch.setenv("PATH", str(tmp_path))
    assert records.describe_driver("cuda") == "unknown: no nvidia-smi"
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 580.159.04\n")
    tool.chmod(0o755)
    assert records.describe_driver("cuda") == "580.159.04"


def test_in_a_bundle_the_commit_is_the_one_that_its_files_are_of(tmp_path: Path) -> None:
    assert records.git_state(tmp_path) == ("unknown", True)
    (tmp_path / records.BUNDLED).write_text('{"commit": "abc", "dirty": false}')
    assert records.git_state(tmp_path) == ("abc", False)


def test_a_repository_knows_its_own_commits_alone() -> None:
    head, _ = records.git_state(ROOT)
    assert records.has_commit(ROOT, head)
    assert not records.has_commit(ROOT, "f" * 40)
    assert not records.has_commit(ROOT, "HEAD:README.md")
