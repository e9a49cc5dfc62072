"""MLflow: a view on the records, for browsing. Trouble with it costs one line of warning, never a trial.

One MLflow experiment per experiment file, one parent run per study (profile, commit, clean or dirty tree), one child
run per record. All of it comes from the records, so `lab log` rebuilds it at any time.
"""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import hashlib
import json
import logging
import os
import re
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from lab.records import Record
from lab.workspace import Workspace

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import DatasetInput, Metric, Run

LOCK_SECONDS = 3.0
"""How long a record waits for a database that another process writes to. Logging one takes 0.03 s."""

CREATION_SECONDS = 60.0
"""How long to wait for a process that creates the database: 2 to 6 s on two cores, more on a network disk."""

STEPS = {"curve_": "curve_update", "distance": "distance_update"}
"""Series whose name begins so were taken after the updates that the other series names; all others after 1, 2, ..."""

# MLflow's own limits (mlflow.utils.validation, 3.17), which it does not export.
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_DIGEST_LENGTH = 36
_PARENT = "mlflow.parentRunId"
_NOTE = "mlflow.note.content"
_VIEW = "trials"


@dataclass
class _Parent:
    """The parent run of a study, and the end of its last trial in milliseconds since 1970."""

    run_id: str
    end: int
    touched: bool = False


class Tracker:
    """Puts records into MLflow, or, where MLflow cannot be used, does nothing."""

    def __init__(self, workspace: Workspace, warn: Callable[[str], None]):
        self.workspace = workspace
        self._warn = warn
        self._client: MlflowClient | None = None
        self._experiments: dict[str, str] = {}
        self._parents: dict[tuple[str, str], _Parent] = {}
        self._seen: dict[str, list[Record]] = {}

    @classmethod
    def open(cls, workspace: Workspace, warn: Callable[[str], None]) -> Tracker:
        """Open the database of the workspace, and create it where there is none yet (2 to 6 s).

        Never raises: a database that is locked, damaged or of another MLflow version, a folder that is missing or
        cannot be written, or an MLflow that is not installed, gives one warning and a tracker that does nothing.
        """
        tracker = cls(workspace, warn)
        with tracker._surviving():
            # MLflow reports its use over the network unless told not to.
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
            if not workspace.root.is_dir():
                raise FileNotFoundError(2, "No such folder", str(workspace.root))
            from mlflow import MlflowClient

            # Two processes that meet in the migration of a fresh database both crash.
            with _held(workspace.lock("tracking"), CREATION_SECONDS), _quiet():
                if _database(workspace).exists():
                    _check_unlocked(_database(workspace))
                else:
                    # Halves the time to log a record, and the UI's reading holds up no study.
                    _run_sql(_database(workspace), "PRAGMA journal_mode = WAL", mode="rwc")
                client = MlflowClient(workspace.tracking_uri)
                client.search_experiments(max_results=1)
            tracker._client = client
        return tracker

    def log(self, record: Record, claims: Sequence[str]) -> None:
        """Put a record into MLflow, unless it is there already.

        A record that replaces another one of its trial becomes a new run; the older run gets the tag `replaced_by`.
        """
        if self._client is None:
            return
        with self._surviving(), self._writing() as client:
            experiment, parent = self._parent(client, record, claims)
            self._seen.setdefault(experiment, []).append(record)
            content = _content_hash(record)
            outdated = []
            for run in _search(client, experiment, {_PARENT: parent.run_id, "trial": record.spec.name}):
                if run.info.status == "RUNNING":
                    # The process ended while it logged this run.
                    client.delete_run(run.info.run_id)
                elif run.data.tags.get("record") == content:
                    return
                elif "replaced_by" not in run.data.tags:
                    outdated.append(run.info.run_id)
            run_id = self._log_run(client, experiment, parent, record, _tags(self.workspace.label, record, claims))
            for older in outdated:
                client.set_tag(older, "replaced_by", run_id)

    def log_artifacts(self, experiment: str, paths: Sequence[Path]) -> None:
        """Copy files, such as plots, to the experiment's parent run: the one logged to last.

        Nothing happens for files that are missing, or for an experiment of which no record was ever logged.
        """
        files = [path for path in paths if path.is_file()]
        if self._client is None or not files:
            return
        with self._surviving(), self._writing() as client:
            run_id = self._latest_parent(client, experiment)
            if run_id is None:
                return
            location = client.get_run(run_id).info.artifact_uri or ""
            if not location.startswith(self.workspace.artifacts.as_uri() + "/"):
                raise _MovedError(f"{_database(self.workspace)} keeps its files in {location.split('://')[-1]}")
            for path in files:
                client.log_artifact(run_id, str(path))

    def close(self) -> None:
        """End the parent runs that got a run, and leave a database that is whole in one file."""
        touched = [parent for parent in self._parents.values() if parent.touched]
        if self._client is None:
            return
        with self._surviving(), self._writing() as client:
            for parent in touched:
                client.set_terminated(parent.run_id, "FINISHED", end_time=parent.end)
                parent.touched = False
            if touched:
                for experiment, records in self._seen.items():
                    client.set_experiment_tag(experiment, f"mlflow.sharedViewState.{_VIEW}", json.dumps(_view(records)))
            _run_sql(_database(self.workspace), "PRAGMA wal_checkpoint(TRUNCATE)")

    def pages(self) -> dict[str, str]:
        """For each experiment the address of its table of trials, to be put behind `http://127.0.0.1:5000/`.

        The server's first page shows none of them: it opens in a mode for applications, not for training.
        """
        found: dict[str, str] = {}
        if self._client is not None:
            with self._surviving(), _quiet():
                for experiment in self._client.search_experiments(order_by=["name ASC"]):
                    if f"mlflow.sharedViewState.{_VIEW}" in experiment.tags:
                        found[experiment.name] = _page(experiment.experiment_id)
        return found

    # Runs -------------------------------------------------------------------------------------------------------

    def _experiment(self, client: MlflowClient, name: str, claims: Sequence[str]) -> str:
        """The id of an MLflow experiment, created where it is missing and restored where it was deleted."""
        if name not in self._experiments:
            found = client.get_experiment_by_name(name)
            if found is None:
                location = self.workspace.artifacts.as_uri()
                tags = {"mlflow.experimentKind": "custom_model_development"}
                created = client.create_experiment(name, artifact_location=location, tags=tags)
                note = f"{', '.join(claims)}. [Table of trials]({_page(created)})"  # the list shows how it begins
                client.set_experiment_tag(created, _NOTE, note)
                self._experiments[name] = created
            else:
                if found.lifecycle_stage == "deleted":
                    client.restore_experiment(found.experiment_id)
                self._experiments[name] = found.experiment_id
        return self._experiments[name]

    def _parent(self, client: MlflowClient, record: Record, claims: Sequence[str]) -> tuple[str, _Parent]:
        """The experiment's id and the parent run of the study that a record belongs to."""
        name, origin = record.spec.experiment, record.provenance
        experiment = self._experiment(client, name, claims)
        state = "dirty" if origin.dirty else "clean"
        study = f"{self.workspace.label} {origin.commit} {state}".replace("'", "")
        if (name, study) not in self._parents:
            found = _search(client, experiment, {"study": study})
            if found:
                parent = _Parent(found[0].info.run_id, found[0].info.end_time or 0)
            else:
                title = f"{self.workspace.label} {origin.commit[:7]}{' dirty' if origin.dirty else ''}"
                tags = {"study": study, **_study_tags(self.workspace.label, record, claims)}
                run = client.create_run(experiment, start_time=_times(record)[0], tags=tags, run_name=title)
                parent = _Parent(run.info.run_id, 0)
            self._parents[name, study] = parent
        return experiment, self._parents[name, study]

    def _log_run(
        self, client: MlflowClient, experiment: str, parent: _Parent, record: Record, tags: dict[str, str]
    ) -> str:
        """Write one child run. Its end is written last, so that an unfinished one can be told."""
        from mlflow.entities import Param

        if not parent.touched:
            client.update_run(parent.run_id, status="RUNNING")
            parent.touched = True
        start, end = _times(record)
        run = client.create_run(
            experiment, start_time=start, tags={_PARENT: parent.run_id, **tags}, run_name=record.spec.name
        )
        run_id = run.info.run_id
        inputs = _data_sets(record, self.workspace)
        if inputs:
            client.log_inputs(run_id, inputs)
        params = [Param(key, value) for key, value in flatten(record.spec.settings.model_dump(mode="json")).items()]
        metrics = _metrics(record, end)
        while params or metrics:
            chunk = params[:_PARAMS_PER_BATCH]
            room = _METRICS_PER_BATCH - len(chunk)
            client.log_batch(run_id, params=chunk, metrics=metrics[:room])
            params, metrics = params[_PARAMS_PER_BATCH:], metrics[room:]
        client.set_terminated(run_id, "FINISHED" if record.status == "ok" else "FAILED", end_time=end)
        parent.end = max(parent.end, end)
        return run_id

    def _latest_parent(self, client: MlflowClient, experiment: str) -> str | None:
        logged = [parent.run_id for (name, _), parent in self._parents.items() if name == experiment]
        if logged:
            return logged[-1]
        found = client.get_experiment_by_name(experiment)
        if found is None:
            return None
        runs = _search(client, found.experiment_id, {"profile": self.workspace.label, "kind": "study"})
        return runs[0].info.run_id if runs else None

    # Trouble ----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Turn any error into one warning and a tracker that does nothing."""
        try:
            yield
        except Exception as error:
            self._client = None
            reason, action = _explain(error, self.workspace)
            self._warn(f"MLflow is off: {reason}. The records are kept. {action}, then run: lab log")

    @contextlib.contextmanager
    def _writing(self) -> Iterator[MlflowClient]:
        """The client, while no other tracker writes."""
        assert self._client is not None
        with _held(self.workspace.lock("tracking"), LOCK_SECONDS), _quiet():
            # MLflow itself would wait 20 s, for each of several writes.
            _check_unlocked(_database(self.workspace))
            yield self._client


class _MovedError(Exception):
    """The database belongs to a study in another folder."""


def _explain(error: Exception, workspace: Workspace) -> tuple[str, str]:
    """What is wrong, and what to do about it, each as a part of one line."""
    text = " ".join(str(error).split())
    database = _database(workspace)
    if isinstance(error, ImportError):
        return f"it cannot be imported ({text})", "Install it: pip install mlflow"
    if isinstance(error, _MovedError):
        return text, "Move that database away"
    if "locked" in text and "database" in text:
        return f"{database} was locked for {LOCK_SECONDS:.0f} s by another process", "End that process"
    if "Can't locate revision" in text or "out-of-date database schema" in text:
        return f"another version of MLflow wrote {database} ({text.split('. ')[0]})", "Move that database away"
    if "not a database" in text or "malformed" in text:
        return f"{database} is damaged", "Move that database away"
    if isinstance(error, TimeoutError):
        return text, "Wait for that process, or end it"
    if isinstance(error, FileNotFoundError) and not workspace.root.is_dir():
        return f"the folder {workspace.root} is missing", "Create it"
    if isinstance(error, OSError):
        return f"cannot write {error.filename}: {error.strerror}", "Free space or make the folder writable"
    if "unable to open" in text or "readonly" in text or "is full" in text:
        return f"cannot write {database}", f"Free space or make {workspace.root} writable"
    return f"{type(error).__name__}: {text[:200]}".rstrip("."), f"Move {database} away"


def _database(workspace: Workspace) -> Path:
    return Path(workspace.tracking_uri.removeprefix("sqlite:///"))


def _run_sql(database: Path, *statements: str, mode: str = "rw") -> None:
    address = f"file:{quote(str(database))}?mode={mode}"
    connection = sqlite3.connect(address, uri=True, timeout=LOCK_SECONDS, isolation_level=None)
    with contextlib.closing(connection):
        for statement in statements:
            connection.execute(statement)


def _check_unlocked(database: Path) -> None:
    """Raises sqlite3.OperationalError where another process keeps the database locked for LOCK_SECONDS."""
    _run_sql(database, "BEGIN IMMEDIATE", "ROLLBACK")


@contextlib.contextmanager
def _held(path: Path, seconds: float) -> Iterator[None]:
    """Hold a file lock; wait for it for so many seconds at most."""
    path.parent.mkdir(exist_ok=True)
    deadline = time.monotonic() + seconds
    with path.open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise TimeoutError(f"another process holds {path} for more than {seconds:.0f} s") from None
                time.sleep(0.02)
        yield


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep MLflow's and Alembic's log lines and tracebacks off the study's output."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _search(client: MlflowClient, experiment: str, tags: Mapping[str, str]) -> list[Run]:
    """The runs that are not deleted and have these tags, the latest first."""
    wanted = " and ".join(f"tags.`{key}` = '{value}'" for key, value in tags.items())
    return list(client.search_runs([experiment], wanted))


# What a record becomes ------------------------------------------------------------------------------------------


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow's parameters.

    Settings that are not set are left out, so that their column stays empty; a value longer than MLflow takes is cut.

    >>> flatten({"first": {"learning_rate": 0.001, "fault": None}, "targets": ["q_proj", "v_proj"]})
    {'first.learning_rate': '0.001', 'targets': 'q_proj, v_proj'}
    """
    flat: dict[str, str] = {}
    for key, value in values.items():
        name = _key(prefix + key)
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{name}.")
        elif isinstance(value, (list, tuple)) and all(isinstance(item, (str, int, float)) for item in value):
            flat[name] = _cut(", ".join(map(str, value)), _PARAM_LENGTH)
        elif value is not None:
            flat[name] = _cut(value if isinstance(value, str) else json.dumps(value), _PARAM_LENGTH)
    return flat


def _key(name: str) -> str:
    """A name with the characters that MLflow takes."""
    return re.sub(r"[^\w\-./: ]", "_", name)[:250]


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "…"


def _content_hash(record: Record) -> str:
    text = json.dumps(record.model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _times(record: Record) -> tuple[int, int]:
    """Start and end in milliseconds since 1970."""
    start = int(datetime.datetime.fromisoformat(record.provenance.started).timestamp() * 1000)
    return start, start + round(record.provenance.seconds * 1000)


def _metrics(record: Record, end: int) -> list[Metric]:
    """The figures, and the series over their steps. MLflow keeps no gap: what is null is left out."""
    from mlflow.entities import Metric

    metrics: list[Metric] = []
    last: dict[str, Metric] = {}
    for name, values in record.series.items():
        if name in STEPS.values():
            continue
        for step, value in zip(_steps(name, record), values, strict=False):
            if value is not None:
                last[name] = Metric(_key(name), value, end, step)
                metrics.append(last[name])
    for name, figure in record.figures.items():
        # A figure with the name of a series (such as `distance`) is its value in the end.
        point = last.get(name)
        if figure is not None and (point is None or point.value != figure):
            metrics.append(Metric(_key(name), figure, end + bool(point), point.step if point else 0))
    return metrics


def _steps(name: str, record: Record) -> list[int]:
    """The update after which each value of a series was taken."""
    count = len(record.series[name])
    for prefix, steps_name in STEPS.items():
        steps = [step for step in record.series.get(steps_name, []) if step is not None]
        if name.startswith(prefix) and len(steps) == count:
            return [int(step) for step in steps]
    return list(range(1, count + 1))


def _page(experiment: str) -> str:
    return f"#/experiments/{experiment}/runs?viewStateShareKey={_VIEW}&workflowType=machine_learning"


def _view(records: Sequence[Record]) -> dict[str, Any]:
    """A table of trials for MLflow's page: one row each, with the settings and figures in which they differ.

    The page by itself shows the parent run alone, closed, and neither parameters nor metrics. This is what it stores
    for "share view" (3.17); a page that does not know it says so, and shows its own table.
    """
    settings = [flatten(record.spec.settings.model_dump(mode="json")) for record in records]
    # A trial that failed lacks figures; that alone makes no difference.
    succeeded = [record for record in records if record.status == "ok"] or records
    figures = [{name: value for name, value in record.figures.items() if value is not None} for record in succeeded]
    columns = [f"tags.`{name}`" for name in ("status", "arm", "profile")]
    columns += [f"params.`{name}`" for name in _differing(settings)[:8]]
    columns += [f"metrics.`{_key(name)}`" for name in _differing(figures)[:12]]
    return {
        "searchFilter": "tags.kind = 'trial' and tags.replaced_by IS NULL",
        "orderByKey": "attributes.run_name",
        "orderByAsc": True,
        "startTime": "ALL",
        "lifecycleFilter": "Active",
        "datasetsFilter": [],
        "modelVersionFilter": "All Runs",
        "selectedColumns": columns,
    }


def _differing(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys, in order, whose values are not the same in all rows; every key of a single row."""
    keys = list(dict.fromkeys(key for row in rows for key in row))
    return [key for key in keys if len(rows) == 1 or len({row.get(key) for row in rows}) > 1]


def _data_sets(record: Record, workspace: Workspace) -> list[DatasetInput]:
    """The tasks that a trial learns, with the digest of the prepared data; none for a memory trial."""
    from mlflow.entities import Dataset, DatasetInput, InputTag

    digest = record.provenance.inputs.get("data")
    if not digest:
        return []
    source = {"uri": str(workspace.data.relative_to(workspace.root))}
    if "data commit" in record.provenance.inputs:
        source["commit"] = record.provenance.inputs["data commit"]
    return [
        DatasetInput(
            Dataset(task, digest[:_DIGEST_LENGTH], "local", json.dumps(source)),
            [InputTag("mlflow.data.context", "training")],
        )
        for task in record.spec.tasks()
    ]


def _study_tags(profile: str, record: Record, claims: Sequence[str]) -> dict[str, str]:
    """What all trials of a study have in common."""
    origin = record.provenance
    return {
        "kind": "study",
        "profile": profile,
        "commit": origin.commit,
        "dirty": str(origin.dirty).lower(),
        "experiment": record.spec.experiment,
        "claims": _cut(",".join(claims), _TAG_LENGTH),
        "mlflow.source.name": f"experiments/{record.spec.experiment}.py",
        "mlflow.source.type": "LOCAL",
        "mlflow.source.git.commit": origin.commit,
    }


def _tags(profile: str, record: Record, claims: Sequence[str]) -> dict[str, str]:
    """The tags of a child run: where the record comes from, how it ended, and what the trial said of itself."""
    origin = record.provenance
    tags = _study_tags(profile, record, claims) | {
        "kind": "trial",
        "trial": record.spec.name,
        "arm": record.spec.arm,
        "status": record.status,
        "record": _content_hash(record),
        "device": origin.device,
        "threads": str(origin.threads),
        "versions": ", ".join(f"{name} {version}" for name, version in origin.versions.items()),
        "python": origin.python,
        "platform": origin.platform,
        "code": origin.code,
        "environment": origin.environment,
    }
    if origin.synthetic:
        tags["synthetic"] = "true"
    if record.message:
        tags[_NOTE] = record.message
    settings = record.spec.settings.model_dump(mode="json")
    extra = {_key(key): value for key, value in record.tags.items() if settings.get(key) != value}
    return {key: _cut(value, _TAG_LENGTH) for key, value in (extra | tags).items()}
