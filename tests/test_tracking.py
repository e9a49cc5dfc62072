"""MLflow shows what the records say, and trouble with it costs one warning."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lab.records import Provenance, Record, Status
from lab.specs import Comparison, Memory, Training, TrialSpec
from lab.tracking import Tracker, flatten
from lab.workspace import Workspace

CLAIMS = ["accumulation-equals-large-batch", "ragged-lengths-need-a-token-mean"]
TRAINING = Training(model="tiny", task="reversal", method="lora", method_options={"rank": 8}, updates=4)


def make_record(
    name: str = "lora-seed0",
    *,
    experiment: str = "accumulation",
    settings: Training | Comparison | Memory = TRAINING,
    status: Status = "ok",
    message: str = "",
    figures: dict[str, float | None] | None = None,
    series: dict[str, list[float | None]] | None = None,
    commit: str = "0123456789abcdef0123456789abcdef01234567",
    dirty: bool = False,
    started: str = "2026-02-03T10:00:00+00:00",
    seconds: float = 5.5,
) -> Record:
    return Record(
        spec=TrialSpec(experiment=experiment, name=name, arm=name.split("-")[0], settings=settings),
        status=status,
        message=message,
        figures={"test_accuracy": 0.31, "lost": None} if figures is None else figures,
        series={"train_loss": [3.0, 2.0, 1.5, 1.25]} if series is None else series,
        tags={"model": "tiny", "data_order": "5b3c"},
        provenance=Provenance(
            commit=commit,
            dirty=dirty,
            code="c0de",
            environment="e1",
            inputs={"tiny": "aa11", "data": "dd22"},
            versions={"torch": "2.13.0", "peft": "0.21.2"},
            python="3.11.9",
            platform="Linux-6",
            device="A processor",
            device_memory_bytes=2**34,
            threads=2,
            started=started,
            seconds=seconds,
        ),
    )


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh database costs 2 to 6 s: made once, copied for each test."""
    root = tmp_path_factory.mktemp("mlflow")
    open_without_warning(Workspace(root, "cpu")).close()
    return root / "mlflow.db"


@pytest.fixture
def workspace(tmp_path: Path, empty_database: Path) -> Workspace:
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    return Workspace(tmp_path, "cpu")


def open_without_warning(workspace: Workspace) -> Tracker:
    return Tracker.open(workspace, lambda text: pytest.fail(f"warned: {text}"))


def log(workspace: Workspace, *records: Record) -> None:
    tracker = open_without_warning(workspace)
    for record in records:
        tracker.log(record, CLAIMS)
    tracker.close()


def client(workspace: Workspace) -> Any:
    from mlflow import MlflowClient

    return MlflowClient(workspace.tracking_uri)


def runs(workspace: Workspace, experiment: str = "accumulation") -> tuple[list[Any], list[Any]]:
    """The parent runs and the child runs of an experiment, the earliest first, then by name."""
    found = client(workspace).get_experiment_by_name(experiment)
    every = client(workspace).search_runs([found.experiment_id])
    every.sort(key=lambda run: (run.info.start_time, run.info.run_name))
    children = [run for run in every if "mlflow.parentRunId" in run.data.tags]
    return [run for run in every if run not in children], children


def history(workspace: Workspace, run: Any, metric: str) -> list[tuple[int, float]]:
    return [(point.step, point.value) for point in client(workspace).get_metric_history(run.info.run_id, metric)]


# What is logged -------------------------------------------------------------------------------------------------


def test_a_run_says_what_its_record_says(workspace: Workspace) -> None:
    log(workspace, make_record())
    _, [run] = runs(workspace)
    assert (run.info.run_name, run.info.status) == ("lora-seed0", "FINISHED")
    assert (run.info.start_time, run.info.end_time) == (1770112800000, 1770112805500)
    assert run.data.params["method_options.rank"] == "8"
    assert run.data.params["learning_rate"] == "0.001"
    assert "fault" not in run.data.params
    assert run.data.metrics == {"test_accuracy": 0.31, "train_loss": 1.25}
    tags = run.data.tags
    assert {key: tags[key] for key in ("commit", "dirty", "profile", "experiment", "arm", "status", "device")} == {
        "commit": "0123456789abcdef0123456789abcdef01234567",
        "dirty": "false",
        "profile": "cpu",
        "experiment": "accumulation",
        "arm": "lora",
        "status": "ok",
        "device": "A processor",
    }
    assert tags["claims"] == ",".join(CLAIMS)
    assert tags["versions"] == "torch 2.13.0, peft 0.21.2"
    assert tags["data_order"] == "5b3c"
    assert "model" not in tags, "a parameter says so already"
    assert len(tags["record"]) == 16


def test_a_run_names_its_data_set_with_the_digest(workspace: Workspace) -> None:
    log(workspace, make_record())
    _, [run] = runs(workspace)
    [given] = run.inputs.dataset_inputs
    assert (given.dataset.name, given.dataset.digest, given.dataset.source_type) == ("reversal", "dd22", "local")
    assert json.loads(given.dataset.source) == {"uri": "build/cpu/data"}
    assert [(tag.key, tag.value) for tag in given.tags] == [("mlflow.data.context", "training")]


def test_a_memory_trial_has_no_data_set_and_a_diverged_or_oom_run_says_so(workspace: Workspace) -> None:
    log(
        workspace,
        make_record("memory", settings=Memory(model="llama-7b"), status="oom", message="needs 30 GiB"),
        make_record("wild", status="diverged", message="the loss is NaN after update 3"),
    )
    _, [memory, wild] = runs(workspace)
    assert not memory.inputs.dataset_inputs
    assert (memory.info.status, memory.data.tags["status"]) == ("FAILED", "oom")
    assert memory.data.tags["mlflow.note.content"] == "needs 30 GiB"
    assert (wild.info.status, wild.data.tags["status"]) == ("FAILED", "diverged")


def test_a_comparison_has_the_settings_of_both_runs_and_its_tasks_once(workspace: Workspace) -> None:
    both = Comparison(first=TRAINING, second=TRAINING.model_copy(update={"learning_rate": 0.01}))
    log(workspace, make_record("pair", settings=both))
    _, [run] = runs(workspace)
    assert (run.data.params["first.learning_rate"], run.data.params["second.learning_rate"]) == ("0.001", "0.01")
    assert run.data.params["first.method_options.rank"] == "8"
    assert [given.dataset.name for given in run.inputs.dataset_inputs] == ["reversal"]


def test_each_series_has_its_own_steps(workspace: Workspace) -> None:
    series: dict[str, list[float | None]] = {
        "curve_update": [0, 50, 100],
        "curve_recall": [1.0, 0.75, None],
        "distance_update": [20, 40],
        "distance": [0.0, 2e-7],
        "first_loss": [3.0, None, 1.0],
    }
    log(workspace, make_record(series=series, figures={"distance": 2e-7}))
    _, [run] = runs(workspace)
    assert history(workspace, run, "curve_recall") == [(0, 1.0), (50, 0.75)]
    assert history(workspace, run, "distance") == [(20, 0.0), (40, 2e-7)], "the figure is the last point"
    assert history(workspace, run, "first_loss") == [(1, 3.0), (3, 1.0)]
    assert set(run.data.metrics) == {"curve_recall", "distance", "first_loss"}


def test_a_figure_wins_over_the_series_of_its_name(workspace: Workspace) -> None:
    log(workspace, make_record(series={"train_loss": [3.0, 2.0]}, figures={"train_loss": 1.0}))
    _, [run] = runs(workspace)
    assert run.data.metrics == {"train_loss": 1.0}


def test_long_values_are_cut_and_long_series_are_whole(workspace: Workspace) -> None:
    wordy = TRAINING.model_copy(update={"method_options": {"targets": "q" * 9000, "odd key?": 1}})
    log(
        workspace,
        make_record(settings=wordy, series={"train_loss": [float(i) for i in range(2500)]}, message="m" * 9000),
    )
    _, [run] = runs(workspace)
    assert len(run.data.params["method_options.targets"]) == 6000
    assert run.data.params["method_options.odd key_"] == "1"
    assert len(run.data.tags["mlflow.note.content"]) == 8000
    assert len(history(workspace, run, "train_loss")) == 2500


def test_flat_settings_leave_out_what_is_not_set() -> None:
    assert flatten({"a": None, "b": {"c": True, "d": [1, 2]}, "e": "x"}) == {"b.c": "true", "b.d": "1, 2", "e": "x"}


# Studies --------------------------------------------------------------------------------------------------------


def test_the_trials_of_a_study_have_one_parent(workspace: Workspace) -> None:
    log(workspace, make_record("a"), make_record("b", started="2026-02-03T10:01:00+00:00"))
    [parent], children = runs(workspace)
    assert {child.data.tags["mlflow.parentRunId"] for child in children} == {parent.info.run_id}
    assert (parent.info.run_name, parent.info.status) == ("cpu 0123456", "FINISHED")
    assert (parent.info.start_time, parent.info.end_time) == (1770112800000, 1770112865500)


def test_a_resumed_study_keeps_its_parent_and_logs_nothing_twice(workspace: Workspace) -> None:
    first, second = make_record("a"), make_record("b", started="2026-02-03T11:00:00+00:00")
    log(workspace, first)
    log(workspace, first, second)
    log(workspace, first, second, first)
    [parent], children = runs(workspace)
    assert [child.info.run_name for child in children] == ["a", "b"]
    assert parent.info.status == "FINISHED"
    assert parent.info.end_time == children[1].info.end_time


def test_a_parent_runs_until_the_tracker_is_closed(workspace: Workspace) -> None:
    log(workspace, make_record("a"))
    tracker = open_without_warning(workspace)
    tracker.log(make_record("a"), CLAIMS)
    assert runs(workspace)[0][0].info.status == "FINISHED", "nothing new"
    tracker.log(make_record("b"), CLAIMS)
    assert runs(workspace)[0][0].info.status == "RUNNING"
    tracker.close()
    assert runs(workspace)[0][0].info.status == "FINISHED"


def test_another_commit_a_dirty_tree_and_another_profile_are_other_studies(workspace: Workspace) -> None:
    log(workspace, make_record(), make_record(dirty=True), make_record(commit="f" * 40))
    log(Workspace(workspace.root, "smoke"), make_record())
    parents, children = runs(workspace)
    assert sorted(parent.info.run_name for parent in parents) == [
        "cpu 0123456",
        "cpu 0123456 dirty",
        "cpu fffffff",
        "smoke 0123456",
    ]
    assert len({child.data.tags["mlflow.parentRunId"] for child in children}) == 4


def test_a_record_that_replaces_another_is_a_new_run(workspace: Workspace) -> None:
    log(workspace, make_record(figures={"test_accuracy": 0.1}))
    log(workspace, make_record(figures={"test_accuracy": 0.2}, started="2026-02-03T12:00:00+00:00"))
    [_], [old, new] = runs(workspace)
    assert (old.data.metrics["test_accuracy"], new.data.metrics["test_accuracy"]) == (0.1, 0.2)
    assert old.data.tags["replaced_by"] == new.info.run_id
    assert "replaced_by" not in new.data.tags


def test_a_run_that_was_cut_off_while_it_was_logged_is_logged_again(workspace: Workspace) -> None:
    log(workspace, make_record())
    _, [run] = runs(workspace)
    client(workspace).update_run(run.info.run_id, status="RUNNING")
    log(workspace, make_record())
    _, [again] = runs(workspace)
    assert again.info.run_id != run.info.run_id
    assert again.info.status == "FINISHED"


def test_a_deleted_experiment_comes_back(workspace: Workspace) -> None:
    log(workspace, make_record("a"))
    client(workspace).delete_experiment(client(workspace).get_experiment_by_name("accumulation").experiment_id)
    log(workspace, make_record("b"))
    assert {child.info.run_name for child in runs(workspace)[1]} >= {"b"}


def test_plots_go_to_the_parent_run_below_the_workspace(workspace: Workspace, tmp_path: Path) -> None:
    plot = tmp_path / "results" / "forgetting.svg"
    plot.parent.mkdir()
    plot.write_text("<svg/>")
    tracker = open_without_warning(workspace)
    tracker.log_artifacts("accumulation", [plot])
    tracker.log(make_record(), CLAIMS)
    tracker.log_artifacts("accumulation", [plot, tmp_path / "missing.svg"])
    tracker.close()
    plot.write_text("<svg></svg>")
    open_without_warning(workspace).log_artifacts("accumulation", [plot])
    [parent], _ = runs(workspace)
    assert parent.info.artifact_uri.startswith(workspace.artifacts.as_uri())
    assert [file.path for file in client(workspace).list_artifacts(parent.info.run_id)] == ["forgetting.svg"]
    assert [path.read_text() for path in workspace.artifacts.rglob("*.svg")] == ["<svg></svg>"]


def test_the_experiment_links_to_a_table_of_what_differs(workspace: Workspace) -> None:
    log(
        workspace,
        make_record("a", figures={"test_accuracy": 0.1, "parameters_total": 5}),
        make_record(
            "b",
            settings=TRAINING.model_copy(update={"learning_rate": 0.01}),
            figures={"test_accuracy": 0.2, "parameters_total": 5, "lost": None},
        ),
    )
    tags = client(workspace).get_experiment_by_name("accumulation").tags
    pages = open_without_warning(workspace).pages()
    assert list(pages) == ["accumulation"]
    assert f"[Table of trials]({pages['accumulation']})" in tags["mlflow.note.content"]
    view = json.loads(tags["mlflow.sharedViewState.trials"])
    assert view["selectedColumns"] == [
        *("tags.`status`", "tags.`arm`", "tags.`profile`"),
        *("params.`learning_rate`", "metrics.`test_accuracy`"),
    ]
    found = client(workspace).get_experiment_by_name("accumulation").experiment_id
    shown = client(workspace).search_runs([found], view["searchFilter"], order_by=[f"{view['orderByKey']} ASC"])
    assert [run.info.run_name for run in shown] == ["a", "b"]


def test_what_is_logged_later_is_the_same(tmp_path: Path, empty_database: Path) -> None:
    records = [make_record("a"), make_record("b", status="failed", message="ValueError"), make_record("c", dirty=True)]

    def seen(root: Path, live: bool) -> list[Any]:
        root.mkdir()
        (root / "mlflow.db").write_bytes(empty_database.read_bytes())
        workspace = Workspace(root, "cpu")
        if live:
            for record in records:
                log(workspace, record)
        else:
            log(workspace, *(Record.model_validate_json(record.model_dump_json()) for record in records))
        parents, children = runs(workspace)
        unlike = {"mlflow.parentRunId"}
        return sorted(
            str(
                [
                    (
                        run.info.run_name,
                        run.info.status,
                        run.info.start_time,
                        run.info.end_time,
                        sorted(run.data.params.items()),
                    ),
                    (run.data.metrics, sorted((k, v) for k, v in run.data.tags.items() if k not in unlike)),
                ]
            )
            for run in parents + children
        )

    assert seen(tmp_path / "live", live=True) == seen(tmp_path / "later", live=False)


def _log_one(root: Path, name: str, gate: Any) -> None:
    gate.wait()
    log(Workspace(root, "cpu"), make_record(name))


def test_two_processes_may_meet_in_a_fresh_database(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    gate = context.Barrier(2)
    pair = [context.Process(target=_log_one, args=(tmp_path, name, gate)) for name in ("a", "b")]
    for process in pair:
        process.start()
    for process in pair:
        process.join()
    assert [process.exitcode for process in pair] == [0, 0]
    [_], children = runs(Workspace(tmp_path, "cpu"))
    assert sorted(child.info.run_name for child in children) == ["a", "b"]


def test_logging_a_record_takes_less_than_three_percent_of_a_short_trial(workspace: Workspace) -> None:
    series: dict[str, list[float | None]] = {"train_loss": [1.0 / (i + 1) for i in range(120)]}
    figures: dict[str, float | None] = {f"figure_{i}": float(i) for i in range(25)}
    tracker = open_without_warning(workspace)
    taken = []
    for i in range(8):
        started = time.perf_counter()
        tracker.log(make_record(f"t{i}", series=series, figures=figures), CLAIMS)
        taken.append(time.perf_counter() - started)
    tracker.close()
    # The shortest: what it costs when nothing else runs. Measured: 0.03 s.
    assert min(taken) < 0.15, f"the trial takes 5 s; logging took {taken}"


# Trouble --------------------------------------------------------------------------------------------------------


def warnings_of(workspace: Workspace, paths: list[Path]) -> list[str]:
    """What is said when a tracker is opened and used in full."""
    warned: list[str] = []
    tracker = Tracker.open(workspace, warned.append)
    tracker.log(make_record("a"), CLAIMS)
    tracker.log(make_record("b"), CLAIMS)
    tracker.log_artifacts("accumulation", paths)
    tracker.close()
    return warned


def is_one_line(text: str) -> bool:
    return "\n" not in text and text.startswith("MLflow is off: ") and text.endswith("then run: lab log")


@contextlib.contextmanager
def locked(database: Path) -> Iterator[None]:
    connection = sqlite3.connect(database, isolation_level=None)
    connection.execute("BEGIN EXCLUSIVE")
    yield
    connection.close()


def test_a_locked_database_costs_one_warning_and_a_few_seconds(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    started = time.monotonic()
    with locked(workspace.root / "mlflow.db"):
        [text] = warnings_of(workspace, [])
    assert is_one_line(text)
    assert f"{workspace.root}/mlflow.db was locked for 3 s by another process" in text
    assert time.monotonic() - started < 10
    assert capfd.readouterr() == ("", "")
    assert warnings_of(workspace, []) == [], "free again: logged later"
    assert len(runs(workspace)[1]) == 2


def test_a_lock_in_the_middle_of_a_study_costs_one_warning(
    workspace: Workspace, capfd: pytest.CaptureFixture[str]
) -> None:
    warned: list[str] = []
    tracker = Tracker.open(workspace, warned.append)
    tracker.log(make_record("a"), CLAIMS)
    started = time.monotonic()
    with locked(workspace.root / "mlflow.db"):
        tracker.log(make_record("b"), CLAIMS)
        tracker.log(make_record("c"), CLAIMS)
        tracker.close()
    assert time.monotonic() - started < 10
    assert [is_one_line(text) for text in warned] == [True]
    assert capfd.readouterr() == ("", "")
    log(workspace, make_record("a"), make_record("b"), make_record("c"))
    [parent], children = runs(workspace)
    assert (parent.info.status, len(children)) == ("FINISHED", 3)


@pytest.mark.parametrize("missing_table", [False, True])
def test_a_database_of_another_mlflow_costs_one_warning(
    workspace: Workspace, missing_table: bool, capfd: pytest.CaptureFixture[str]
) -> None:
    with contextlib.closing(sqlite3.connect(workspace.root / "mlflow.db", isolation_level=None)) as connection:
        connection.execute("UPDATE alembic_version SET version_num = 'ffff00000000'")
        if missing_table:
            connection.execute("DROP TABLE input_tags")
    [text] = warnings_of(workspace, [])
    assert is_one_line(text)
    assert f"another version of MLflow wrote {workspace.root}/mlflow.db" in text
    assert "ffff00000000" in text
    assert "Move that database away, then run: lab log" in text
    assert capfd.readouterr() == ("", "")


def test_a_damaged_database_costs_one_warning(tmp_path: Path) -> None:
    (tmp_path / "mlflow.db").write_text("not a database" * 1000)
    [text] = warnings_of(Workspace(tmp_path, "cpu"), [])
    assert is_one_line(text)
    assert "mlflow.db is damaged" in text


def test_a_missing_folder_costs_one_warning_and_is_not_made(tmp_path: Path) -> None:
    [text] = warnings_of(Workspace(tmp_path / "gone", "cpu"), [])
    assert is_one_line(text)
    assert f"the folder {tmp_path}/gone is missing. The records are kept. Create it" in text
    assert not (tmp_path / "gone").exists()


@pytest.mark.parametrize("place", ["kernel", "read-only", "file in the way", "folder in the way"])
def test_an_unwritable_folder_costs_one_warning(tmp_path: Path, place: str) -> None:
    root = tmp_path
    if place == "kernel":
        root = Path("/proc/self")  # nobody can write there, root included
    elif place == "read-only":
        if os.geteuid() == 0:
            pytest.skip("needs a user who is not root")
        root.chmod(0o500)
    elif place == "file in the way":
        (root / ".lab").write_text("")
    else:
        (root / "mlflow.db").mkdir()
    try:
        [text] = warnings_of(Workspace(root, "cpu"), [])
    finally:
        tmp_path.chmod(0o700)
    assert is_one_line(text)
    assert "cannot write" in text
    assert "writable, then run: lab log" in text


def test_a_database_that_vanishes_costs_one_warning(workspace: Workspace) -> None:
    warned: list[str] = []
    tracker = Tracker.open(workspace, warned.append)
    tracker.log(make_record("a"), CLAIMS)
    (workspace.root / "mlflow.db").unlink()
    tracker.log(make_record("b"), CLAIMS)
    tracker.close()
    [text] = warned
    assert is_one_line(text)


def test_a_copied_study_does_not_write_into_the_first(workspace: Workspace, tmp_path: Path) -> None:
    plot = tmp_path / "plot.svg"
    plot.write_text("<svg/>")
    log(workspace, make_record())
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "mlflow.db").write_bytes((tmp_path / "mlflow.db").read_bytes())
    [text] = warnings_of(Workspace(tmp_path / "copy", "cpu"), [plot])
    assert is_one_line(text)
    assert f"keeps its files in {workspace.artifacts}" in text
    assert not workspace.artifacts.exists()


def test_a_missing_mlflow_costs_one_warning(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    [text] = warnings_of(Workspace(tmp_path, "cpu"), [])
    assert is_one_line(text)
    assert "Install it: pip install mlflow" in text


def test_importing_the_module_imports_no_mlflow_and_using_it_leaves_the_process_alone(workspace: Workspace) -> None:
    code = f"""
import sys
from pathlib import Path
import lab.tracking
from lab.workspace import Workspace
assert "mlflow" not in sys.modules and "sqlalchemy" not in sys.modules
lab.tracking.Tracker.open(Workspace(Path({str(workspace.root)!r}), "cpu"), print).close()
import logging, mlflow
print(mlflow.get_tracking_uri(), logging.root.manager.disable, mlflow.active_run())
"""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW")}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=workspace.root, env=environment, check=True
    )
    assert done.stderr == ""
    uri, disabled, active = done.stdout.split()
    assert uri.removeprefix("sqlite:///").split("/")[-1] == "mlflow.db", "where plain `mlflow ui` looks"
    assert (disabled, active) == ("0", "None")
