"""Trials in processes of their own: none twice, a death costs that trial alone."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from lab import records
from lab.errors import LabError
from lab.origin import Origin
from lab.records import Record
from lab.specs import Memory, Plan, Sweep, Training, TrialSpec
from lab.trials import Progress, Shortfall, TimeIsUp, run_trials, study_lock
from lab.workspace import Workspace
from tests.conftest import ROOT
from tests.test_records import make_record


def spec(name: str, **settings: object) -> TrialSpec:
    memory = Memory.model_validate({"model": "llama-6m", "updates": 0, **settings})
    return TrialSpec(experiment="memory_formulas", name=name, arm="weights", settings=memory)


class Listener:
    """Keeps the records as they come."""

    def __init__(self) -> None:
        self.fresh: list[Record] = []
        self.reused: list[Record] = []
        self.warnings: list[str] = []
        self.progress: list[Progress] = []

    def __call__(self, record: Record, progress: Progress, was_there: bool) -> None:
        (self.reused if was_there else self.fresh).append(record)
        self.progress.append(progress)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """A study's folder with the library's sources, for the fingerprint, and an environment."""
    (tmp_path / "lab").symlink_to(ROOT / "lab")
    (tmp_path / "build").mkdir()
    (tmp_path / "build" / "environment.json").write_text('{"id": "here"}')
    return Workspace(tmp_path, "smoke")


def run(specs: Plan, workspace: Workspace) -> Listener:
    listener = Listener()
    run_trials(specs, workspace, 1, "cpu", listener, listener.warnings.append)
    return listener


def test_a_trial_is_measured_once_and_again_only_for_a_reason(workspace: Workspace) -> None:
    first = run([spec("a"), spec("b", precision="bf16")], workspace)
    assert [r.status for r in first.fresh] == ["ok", "ok"]
    assert first.fresh[0].figure("weights_bytes") == pytest.approx(
        4 * first.fresh[0].figure("parameters_total"), rel=1e-3
    )
    assert first.progress[-1] == Progress(2, 2, 0.0)

    again = run([spec("a"), spec("b", precision="bf16")], workspace)
    assert (len(again.fresh), len(again.reused)) == (0, 2)

    changed = run([spec("a"), spec("b", precision="fp16")], workspace)
    assert [r.spec.name for r in changed.fresh] == ["b"]

    workspace.environment.write_text('{"id": "elsewhere"}')
    assert len(run([spec("a")], workspace).fresh) == 1, "evidence of another installation is not one's own"


def test_at_the_deadline_a_trial_under_way_is_ended_and_leaves_no_record(workspace: Workspace) -> None:
    listener = Listener()
    slow = spec("slow", updates=5000, batch=8, length=256)
    for each, seconds in ((spec("a"), 0.0), (slow, 3.0)):  # before the first is started, and while it runs
        with pytest.raises(TimeIsUp) as caught:
            run_trials([each], workspace, 1, "cpu", listener, print, deadline=time.monotonic() + seconds)
    assert not listener.fresh
    assert not list(workspace.results.rglob("*.json"))
    assert list(caught.value.ended) == ["memory_formulas/slow"]
    assert 0 < caught.value.ended["memory_formulas/slow"] < 60
    run_trials([spec("a")], workspace, 1, "cpu", listener, print, deadline=time.monotonic() + 300)
    assert [record.status for record in listener.fresh] == ["ok"]


def test_records_that_nobody_plans_any_more_are_removed(workspace: Workspace) -> None:
    run([spec("a"), spec("b", precision="bf16")], workspace)
    run([spec("a")], workspace)
    assert [path.name for path in (workspace.results / "memory_formulas").iterdir()] == ["a.json"]


def test_a_sweep_goes_on_with_what_its_records_say(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    def training(seed: int) -> TrialSpec:
        settings = Training(model="llama-6m", task="aiw_friends", updates=1, seed=seed)
        return TrialSpec(experiment="mine", name=f"seed{seed}", arm="lora", settings=settings)

    def measure(specs: Sequence[TrialSpec], *_: object) -> list[Record]:
        accuracy = {1e-4: 0.1, 3e-4: 0.2, 1e-3: 0.9, 3e-3: 0.8, 1e-2: 0.2}
        return [make_record(s, figures={"validation_accuracy": accuracy[s.settings.learning_rate]}) for s in specs]  # type: ignore[union-attr]

    monkeypatch.setattr("lab.trials._run_all", measure)
    plan = [Sweep(rates=(1e-4, 1e-3, 1e-2), tried=(training(0),), then=(training(0), training(1)))]
    names = [record.spec.name for record in run(plan, workspace).fresh]
    assert names == ["seed0-lr0.0001", "seed0-lr0.001", "seed0-lr0.01", "seed1-lr0.001"]
    stray = workspace.results / "mine" / "seed9-lr0.001.json"
    stray.write_text("{}")
    moved = [plan[0].model_copy(update={"rates": (1e-3, 3e-3)})]
    run(moved, workspace)
    assert {path.stem for path in stray.parent.iterdir()} == {
        "seed0-lr0.001", "seed0-lr0.003", "seed0-lr0.0003", "seed1-lr0.001"
    }  # fmt: skip


def test_a_damaged_record_is_named_set_aside_and_measured_again(workspace: Workspace) -> None:
    run([spec("a")], workspace)
    path = records.record_path(workspace.results, spec("a"))
    path.write_text(path.read_text()[:100])
    listener = run([spec("a")], workspace)
    assert [r.status for r in listener.fresh] == ["ok"]
    assert "a.json is damaged" in listener.warnings[0]
    assert "a.json.damaged" in listener.warnings[0]
    assert path.with_name("a.json.damaged").is_file()
    assert records.read_record(path).status == "ok"


def test_a_trial_that_fails_leaves_a_record_and_is_tried_again(workspace: Workspace) -> None:
    # Rows of one token have nothing to predict: the loss cannot be computed.
    broken = spec(
        "broken", updates=2, length=1, method="lora", method_options={"rank": 8, "targets": ["q_proj"]}, batch=1
    )
    broken = broken.model_copy(update={"settings": broken.settings.model_copy(update={"seed": -1})})
    listener = run([broken, spec("after")], workspace)
    assert [r.status for r in listener.fresh] == ["failed", "ok"]
    assert "Error" in listener.fresh[0].message
    assert [r.spec.name for r in run([broken, spec("after")], workspace).fresh] == ["broken"]


def test_a_users_mistake_in_a_trial_is_no_record(workspace: Workspace) -> None:
    with pytest.raises(LabError, match=r"unknown target module 'query'.*q_proj"):
        run([spec("a", method="lora", method_options={"targets": ["query"]})], workspace)
    assert not (workspace.results / "memory_formulas" / "a.json").exists()


def test_on_a_lent_machine_a_mistake_costs_its_trial_alone_and_no_record_is_dropped(workspace: Workspace) -> None:
    listener = Listener()
    records.write_record(make_record(spec("other")), workspace.results)
    wrong = spec("wrong", method="lora", method_options={"targets": ["query"]})
    run_trials([wrong, spec("after")], workspace, 1, "cpu", listener, print, lenient=True)
    assert [(r.spec.name, r.status) for r in listener.fresh] == [("wrong", "failed"), ("after", "ok")]
    assert "unknown target module 'query'" in listener.fresh[0].message
    assert (workspace.results / "memory_formulas" / "other.json").is_file()


def test_new_examples_of_one_task_leave_the_records_of_another_valid(workspace: Workspace) -> None:
    workspace.data.mkdir(parents=True)
    for task in ("aiw", "gcd"):
        (workspace.data / f"{task}-train.jsonl").write_text(task)
    training = Training(model="llama-6m", task="aiw", updates=1)
    trained = TrialSpec(experiment="e", name="a", arm="a", settings=training)

    def data_print() -> str:
        return Origin.now(workspace, [trained], 1, "cpu").inputs(trained)["data"]

    before = data_print()
    (workspace.data / "gcd-train.jsonl").write_text("other")
    assert data_print() == before
    (workspace.data / "aiw-train.jsonl").write_text("other")
    assert data_print() != before


def test_a_killed_trial_costs_that_trial_alone(workspace: Workspace) -> None:
    slow = spec("slow", updates=500, batch=8, length=256)
    killed: list[int] = []

    def kill_when_it_trains() -> None:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not killed:
            for pid in children_of(os.getpid()):
                if process_seconds(pid) > 1.5 and is_trial(pid):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)
                    return
            time.sleep(0.1)

    thread = threading.Thread(target=kill_when_it_trains)
    thread.start()
    listener = run([spec("before"), slow, spec("after")], workspace)
    thread.join()
    assert killed, "no trial process was found to kill"
    assert [(r.spec.name, r.status) for r in listener.fresh] == [("before", "ok"), ("slow", "failed"), ("after", "ok")]
    assert "SIGKILL" in listener.fresh[1].message


def children_of(pid: int) -> list[int]:
    """All descendants of a process."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            child = int(path.parent.name)
            found += [child, *children_of(child)]
    return found


def process_seconds(pid: int) -> float:
    """Processor seconds that a process has used."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def is_trial(pid: int) -> bool:
    """A process forked by the server: its parent runs the server's code, and so does the parent's parent not."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        return b"forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_trial_ends_with_the_study_that_started_it(workspace: Workspace, tmp_path: Path) -> None:
    script = tmp_path / "study.py"
    plan = json.dumps([spec("slow", updates=500, batch=8, length=256).model_dump(mode="json")])
    script.write_text(
        textwrap.dedent(f"""
        from pathlib import Path
        import json
        from lab.specs import TrialSpec
        from lab.trials import run_trials
        from lab.workspace import Workspace
        if __name__ == "__main__":
            specs = [TrialSpec.model_validate(row) for row in json.loads({plan!r})]
            run_trials(specs, Workspace(Path({str(tmp_path)!r}), "smoke"), 1, "cpu", print, print)
        """)
    )
    study = subprocess.Popen([sys.executable, str(script)])
    trials: list[int] = []
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and not trials:
        trials = [pid for pid in children_of(study.pid) if is_trial(pid) and process_seconds(pid) > 0.5]
        time.sleep(0.1)
    assert trials, "the study started no trial"
    study.kill()
    study.wait()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline and any(Path(f"/proc/{pid}").exists() for pid in trials):
        time.sleep(0.1)
    assert not any(Path(f"/proc/{pid}").exists() for pid in trials)


def test_a_second_study_in_one_folder_says_so(workspace: Workspace) -> None:
    said = rf"a study already runs in .* \(process {os.getpid()}\)"
    with study_lock(workspace), pytest.raises(LabError, match=said), study_lock(workspace):
        pass
    with study_lock(workspace):
        pass


def test_results_that_cannot_be_written_are_one_line_and_leave_no_half_file(workspace: Workspace) -> None:
    workspace.results.parent.mkdir(parents=True)
    workspace.results.write_text("a file where the folder should be")
    with pytest.raises(LabError, match=r"cannot write .*a\.json: .*then start again"):
        run([spec("a")], workspace)
    assert workspace.results.read_text() == "a file where the folder should be"


def test_a_full_disk_is_one_line_and_leaves_no_half_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(LabError, match=r"No space left on device\. Free space"):
        records.write_text(tmp_path / "a.json", "{}")
    assert list(tmp_path.iterdir()) == []


def test_a_trial_that_does_not_fit_the_card_is_recorded_and_not_run(workspace: Workspace) -> None:
    def shortfall(each: TrialSpec) -> Shortfall | None:
        return Shortfall(99 * 2**30, "not run: lab fit predicts 99.0 GiB") if each.name == "large" else None

    listener = Listener()
    plan = [spec("large"), spec("small", precision="bf16")]
    run_trials(plan, workspace, 1, "cpu", listener, listener.warnings.append, shortfall=shortfall)
    large, small = listener.fresh
    assert (large.status, large.message) == ("oom", "not run: lab fit predicts 99.0 GiB")
    assert large.figures == {"predicted_peak_bytes": 99 * 2**30}
    assert large.provenance.seconds == 0
    assert small.status == "ok"
    assert listener.progress[-1] == Progress(2, 2, 0.0)
    assert records.read_record(records.record_path(workspace.results, spec("large"))) == large

    later = run([spec("large"), spec("small", precision="bf16")], workspace)
    assert [(r.spec.name, r.status) for r in later.fresh] == [("large", "ok")], "on a larger card it is run"


def test_what_does_not_fit_is_priced_when_its_turn_comes(workspace: Workspace) -> None:
    priced: list[str] = []

    def shortfall(each: TrialSpec) -> Shortfall | None:
        priced.append(each.name)
        return Shortfall(2**40, "not run")

    listener = Listener()
    with pytest.raises(TimeIsUp):
        run_trials([spec("a"), spec("b")], workspace, 1, "cpu", listener, print, deadline=0.0, shortfall=shortfall)
    assert priced == []


def test_a_record_of_an_emulated_card_says_so_and_is_no_evidence_for_the_card_itself(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "describe_device", lambda _: ("A card", 80 * 2**30))
    whole = Origin.now(workspace, [spec("a")], 1, "cuda")
    monkeypatch.setenv("LAB_VRAM_GIB", "24")
    part = Origin.now(workspace, [spec("a")], 1, "cuda")
    assert part.inputs(spec("a")) == {**whole.inputs(spec("a")), "LAB_VRAM_GIB": "24"}
    assert part.device_memory_bytes < 24 * 2**30 < whole.device_memory_bytes
    assert Origin.now(workspace, [spec("a")], 1, "cpu").limit_gib is None
