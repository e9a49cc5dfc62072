"""A whole study from end to end, as `make study PROFILE=smoke` runs it: stopped, started again, and run once more."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.conftest import ROOT

BIN = Path(sys.executable).parent


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the project, with today's uncommitted changes, in an empty folder."""
    folder = tmp_path_factory.mktemp("clone") / "study"
    subprocess.run(["git", "clone", "-q", str(ROOT), str(folder)], check=True)
    listed = subprocess.run(
        ["git", "ls-files", "-mo", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, folder / name)
    return folder


def lab(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "PYTHONPATH": str(folder)}
    return subprocess.Popen(
        [sys.executable, "-m", "lab.cli", *arguments],
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


@pytest.mark.study
@pytest.mark.timeout(3000)
def test_a_study_goes_on_where_it_stopped_and_ends_with_verdicts(clone: Path) -> None:
    results = clone / "results" / "smoke"
    study = lab(clone, "study", "--profile", "smoke")
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline and len(list(results.glob("*/*.json"))) < 3:
        time.sleep(0.2)
        if study.poll() is not None:
            pytest.fail(f"the study ended early:\n{study.stdout.read() if study.stdout else ''}")
    os.killpg(study.pid, signal.SIGKILL)
    study.communicate()
    early = {path: path.stat().st_mtime_ns for path in results.glob("*/*.json")}
    assert len(early) >= 3
    (clone / ".dvc" / "tmp" / "rwlock").write_text("")  # cut off while DVC wrote it

    printed, _ = (again := lab(clone, "study", "--profile", "smoke")).communicate()
    assert again.returncode == 0, printed[-3000:]
    assert "Verdicts, profile smoke" in printed
    assert all(path.stat().st_mtime_ns == written for path, written in early.items()), "finished trials ran again"
    assert "profile: cpu" in (clone / "params.yaml").read_text()
    verdicts = json.loads((results / "verdicts.json").read_text())
    assert {v["tier"] for v in verdicts if v["verdict"] == "not run"} == {"gpu"}
    assert {v["verdict"] for v in verdicts} <= {"supported", "refuted", "conditional", "inconclusive", "not run"}
    assert (clone / "mlflow.db").is_file()
    assert list((results / "plots").glob("*.svg"))

    started = time.monotonic()
    printed, _ = (third := lab(clone, "study", "--profile", "smoke")).communicate()
    assert third.returncode == 0
    assert "Running stage" not in printed, "a second study with nothing changed does nothing"
    assert time.monotonic() - started < 30
