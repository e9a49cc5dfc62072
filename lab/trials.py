"""Running the trials of an experiment: each in a process of its own, none twice, a crash costing that one alone."""

from __future__ import annotations

import contextlib
import datetime
import fcntl
import json
import logging
import math
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from lab import records
from lab.device import LIMIT, limit_allocator, limit_gib, size_bytes
from lab.errors import LabError
from lab.grouped_queries import count_grouped_queries
from lab.models import shapes
from lab.records import Provenance, Record, Status
from lab.specs import Plan, Simulation, TrialSpec, templates
from lab.sweeps import expand
from lab.workspace import Workspace

PRELOAD = [
    "lab.cli",
    "lab.trials",
    "lab.memory.trial",
    "lab.memory.simulated_trial",
    "bitsandbytes",
    "peft",
    "transformers.optimization",
    "transformers.models.llama.modeling_llama",
    "lab.preloaded",
]
"""Imported once, in this order, by the server from which trials are forked: 10 s that no trial pays again. `lab.cli` is what
started the study: a forked process runs its parent's main module again."""

PRELOAD_FOR_CUDA = [
    "lab.cli",
    "lab.trials",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
]
"""The same where trials use a GPU: no module that starts CUDA when it is imported, as bitsandbytes does, and PEFT and the
Trainer, which import it. A process that is forked after CUDA has started cannot use it."""

NOT_DEFAULT = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
)
"""Variables that change bytes or digits on a GPU, and that clusters and containers set: a trial has torch's defaults."""

# On import it asks for a package that is not needed; the server, which imports this module first, would print that.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


SIMULATED = "none (simulated)"
"""The device of a trial on tensors without storage."""


@dataclass(frozen=True)
class Progress:
    """Where a run of trials stands."""

    done: int
    total: int
    seconds_left: float | None


class TimeIsUp(Exception):
    """The time that was given is over, and trials are left. What was measured is kept.

    Attributes:
        ended: the trials under way, which have no record, with the seconds that each had.
    """

    def __init__(self, ended: dict[str, float] | None = None):
        super().__init__("the time is up")
        self.ended = ended or {}


Report = Callable[[Record, Progress, bool], None]
"""Called for each record, with whether it was already there."""


@dataclass(frozen=True)
class Shortfall:
    """Why a trial does not fit the card: its predicted peak, and that in words."""

    predicted_bytes: int
    message: str


PREDICTED = "predicted_peak_bytes"
"""The figure of a trial that was not run because it would not have fitted."""


def run_trials(
    plan: Plan,
    workspace: Workspace,
    threads: int,
    device: str,
    report: Report,
    warn: Callable[[str], None],
    deadline: float = math.inf,
    shortfall: Callable[[TrialSpec], Shortfall | None] | None = None,
    lenient: bool = False,
) -> list[Record]:
    """Run what has no valid record yet, write each record as it comes, and drop records that nobody plans any more.

    A plan with sweeps is asked again after each round: what it wants next depends on the records.

    Args:
        deadline: on the clock `time.monotonic`; a trial that is under way then is ended and leaves no record.
        shortfall: says of a trial whether it fits the card; one that does not is recorded as out of memory, and not run.
        lenient: for a part of a plan, on a machine that is lent: records that the part does not plan stay, and a user's
            mistake in a trial is its `failed` record instead of the end.

    Raises:
        LabError: the results cannot be written, or a prepared model is missing.
        TimeIsUp: the deadline came first.
    """
    if not plan:
        return []
    origin = Origin.now(workspace, templates(plan), threads, device)
    found: dict[str, Record] = {}
    pace = _Pace(threads)
    while True:
        specs = expand(plan, found.values())
        fresh = [spec for spec in specs if spec.name not in found]
        if not fresh:
            break
        kept = {spec.name: record for spec in fresh if (record := _kept(spec, workspace, origin, warn))}
        found |= kept
        pending = [spec for spec in fresh if spec.name not in kept]
        pace.pending = list(pending)
        if pending:
            start_server(device)
        for record in kept.values():
            report(record, Progress(len(found), len(specs), pace.seconds_left()), True)
        for record in _run_all(pending, workspace, origin, deadline, lenient, shortfall):
            records.write_record(record, workspace.results)
            found[record.spec.name] = record
            pace.done(record)
            report(record, Progress(len(found), len(specs), pace.seconds_left()), False)
    if not lenient:
        _prune(workspace.results / specs[0].experiment, set(found))
    return [found[spec.name] for spec in specs]


def _kept(spec: TrialSpec, workspace: Workspace, origin: Origin, warn: Callable[[str], None]) -> Record | None:
    """The record of an earlier run, if it answers the spec here and now; a damaged one is put aside."""
    path = records.record_path(workspace.results, spec)
    if not path.is_file():
        return None
    try:
        record = records.read_record(path)
    except LabError as error:
        aside = records.set_aside(path)
        warn(f"{error} It is now {aside.name}.")
        return None
    if record.status == "oom" and PREDICTED in record.figures:  # the card may be another one now, and it costs nothing
        return None
    usable = records.reusable(record, spec, origin.code(spec), origin.environment, origin.inputs(spec))
    return record if usable else None


def _unfit(spec: TrialSpec, origin: Origin, shortfall: Callable[[TrialSpec], Shortfall | None] | None) -> Record | None:
    """The record of a trial that does not fit the card; None: it is to be run."""
    short = shortfall(spec) if shortfall else None
    if short is None:
        return None
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    provenance = origin.provenance(spec, now, 0.0)
    figures: dict[str, float | None] = {PREDICTED: short.predicted_bytes}
    return Record(spec=spec, status="oom", message=short.message, figures=figures, provenance=provenance)


def _prune(folder: Path, planned: set[str]) -> None:
    """Remove the records of trials that are in no plan any more: a judge must not see them."""
    for path in folder.glob("*.json"):
        if path.stem not in planned:
            path.unlink()


def alike(spec: TrialSpec) -> tuple[str, ...]:
    """What trials that take about as long have in common: kind, models and method."""
    return (spec.settings.kind, *sorted(spec.models()), str(getattr(spec.settings, "method", "")))


class _Pace:
    """Estimates the time left: by the mean of finished trials of the same kind, models and method."""

    def __init__(self, threads: int):
        self.pending: list[TrialSpec] = []
        self.threads = threads
        self.seen: dict[Any, list[float]] = {}

    def done(self, record: Record) -> None:
        self.pending.remove(record.spec)
        if PREDICTED not in record.figures:  # that one took no time
            self.seen.setdefault(alike(record.spec), []).append(record.provenance.seconds)

    def seconds_left(self) -> float | None:
        if not self.pending:
            return 0.0
        everything = [seconds for group in self.seen.values() for seconds in group]
        if not everything:
            return None
        mean = sum(everything) / len(everything)
        means = {group: sum(values) / len(values) for group, values in self.seen.items()}
        # Trials of one thread run side by side: each takes its share of the machine's time.
        shares = [means.get(alike(s), mean) * min(1, s.threads / self.threads) for s in self.pending]
        return sum(shares)


@dataclass(frozen=True)
class Origin:
    """What every record of one run of trials has in common."""

    root: Path
    commit: str
    dirty: bool
    environment: str
    fingerprints: dict[str, str]
    threads: int
    device: str
    device_memory_bytes: int
    driver: str
    limit_gib: float | None = None
    """Of the smaller card that this one stands for."""

    @classmethod
    def now(cls, workspace: Workspace, specs: Sequence[TrialSpec], threads: int, device: str) -> Origin:
        """The state of the tree, the installation and the prepared files."""
        commit, dirty = records.git_state(workspace.root)
        name, memory = records.describe_device(device)
        limit = limit_gib() if device == "cuda" else None
        prints = {}
        for model in sorted({model for spec in specs for model in spec.models()}):
            folder = workspace.model(model)
            if model in ("smol", "tiny") and not (folder / "config.json").is_file():
                raise LabError(f"model '{model}' is not prepared in {folder}. Run: dvc repro prepare_{_stage(model)}")
            if folder.is_dir():
                prints[model] = records.folder_fingerprint(folder)
                prints |= _commit_of(folder, model)
            elif shape := shape_fingerprint(model):
                prints[model] = shape
        for task in sorted({task for spec in specs for task in spec.tasks()}):
            prints[f"task {task}"] = records.files_fingerprint(workspace.data, workspace.data.glob(f"{task}-*.jsonl"))
        prints |= _commit_of(workspace.data, "data")
        return cls(
            workspace.root,
            commit,
            dirty,
            read_environment(workspace),
            prints,
            threads,
            name,
            memory if limit is None else min(memory, size_bytes(limit)),
            records.describe_driver(device),
            limit,
        )

    def code(self, spec: TrialSpec) -> str:
        """The fingerprint of the code that a trial runs."""
        return records.code_fingerprint(self.root, spec.settings.kind, spec.methods())

    def inputs(self, spec: TrialSpec) -> dict[str, str]:
        """The fingerprints of the files that a trial reads."""
        tasks = spec.tasks()
        wanted = spec.models() | ({"data"} if tasks else set())
        found = {key: value for key, value in self.fingerprints.items() if key.split(" ")[0] in wanted}
        found |= {} if self.limit_gib is None else {LIMIT: f"{self.limit_gib:g}"}
        return found | ({"data": "+".join(self.fingerprints[f"task {task}"] for task in tasks)} if tasks else {})

    def provenance(self, spec: TrialSpec, started: str, seconds: float) -> Provenance:
        """The provenance of one record."""
        python, platform = records.describe_python()
        simulated = isinstance(spec.settings, Simulation)
        return Provenance(
            commit=self.commit,
            dirty=self.dirty,
            code=self.code(spec),
            environment=self.environment,
            inputs=self.inputs(spec),
            versions=records.stack_versions(),
            python=python,
            platform=platform,
            device=SIMULATED if simulated else self.device,
            device_memory_bytes=0 if simulated else self.device_memory_bytes,
            driver="" if simulated else self.driver,
            threads=spec.threads,
            started=started,
            seconds=round(seconds, 3),
        )


def shape_fingerprint(model: str) -> str | None:
    """The fingerprint of a bundled configuration; None for a model that is prepared."""
    shape = shapes().get(model)
    return records.files_fingerprint(shape.parent, [shape]) if shape else None


def _stage(model: str) -> str:
    return "model" if model == "smol" else "tiny"


def _commit_of(folder: Path, name: str) -> dict[str, str]:
    """The hub commit that a prepared folder was resolved to, where it comes from the hub."""
    path = folder / "source.json"
    source = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return {f"{name} commit": source["commit"]} if "commit" in source else {}


def read_environment(workspace: Workspace) -> str:
    """The id of this installation, as the `environment` stage wrote it."""
    try:
        return json.loads(workspace.environment.read_text(encoding="utf-8"))["id"]
    except (OSError, ValueError, KeyError):
        raise LabError(f"{workspace.environment} is missing or damaged. Run: dvc repro environment") from None


# Processes ------------------------------------------------------------------------------------------------------


def start_server(device: str) -> None:
    """Start the server from which trials are forked, unless it runs already. It imports while the caller does something else."""
    if device == "cuda":
        for name in NOT_DEFAULT:
            os.environ.pop(name, None)
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU starts nothing then
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread a batch over several
    forkserver.set_forkserver_preload(PRELOAD_FOR_CUDA if device == "cuda" else PRELOAD)
    forkserver.ensure_running()


@dataclass
class _Running:
    """A trial under way in its own process."""

    spec: TrialSpec
    process: Any
    receiver: Any
    started_at: str
    started: float

    def finish(self, origin: Origin, lenient: bool) -> Record:
        """The record of the trial, whatever became of its process.

        Raises:
            LabError: the trial could not be run because of a user's mistake, unless that is to be recorded.
        """
        answer: dict[str, Any] = {}
        with contextlib.suppress(EOFError, ConnectionError):
            if self.receiver.poll(0):
                answer = self.receiver.recv()
        self.process.join()
        if "error" in answer and lenient:
            answer = {"status": "failed", "message": answer["error"]}
        if "error" in answer:
            raise LabError(f"{self.spec.experiment}/{self.spec.name}: {answer['error']}")
        if not answer:
            answer = {"status": "failed", "message": _how_it_died(self.process.exitcode)}
        provenance = origin.provenance(self.spec, self.started_at, time.perf_counter() - self.started)
        return Record(spec=self.spec, provenance=provenance, **answer)


def _run_all(
    specs: Sequence[TrialSpec],
    workspace: Workspace,
    origin: Origin,
    deadline: float,
    lenient: bool,
    shortfall: Callable[[TrialSpec], Shortfall | None] | None,
) -> Iterator[Record]:
    """Run trials in order, as many side by side as the threads allow; records come as trials end.

    The processes are forked from a server that has imported the stack. What does not fit the card is not run.
    """
    context = multiprocessing.get_context("forkserver")
    waiting = list(specs)
    running: list[_Running] = []
    try:
        while waiting or running:
            left = deadline - time.monotonic()
            if left <= 0:
                now = time.perf_counter()
                raise TimeIsUp({f"{t.spec.experiment}/{t.spec.name}": now - t.started for t in running})
            free = origin.threads - sum(trial.spec.threads for trial in running)
            # A trial that asks for more threads than there are runs alone.
            if waiting and (waiting[0].threads <= free or not running):
                spec = waiting.pop(0)
                if record := _unfit(spec, origin, shortfall):
                    yield record
                else:
                    running.append(_start(context, spec, workspace))
                continue
            ends = [end for trial in running for end in (trial.receiver, trial.process.sentinel)]
            ready = wait(ends, None if math.isinf(left) else left)
            if not ready:
                continue
            trial = next(t for t in running if t.receiver in ready or t.process.sentinel in ready)
            running.remove(trial)
            yield trial.finish(origin, lenient)
    finally:
        for trial in running:
            trial.process.kill()
            trial.process.join()


def _start(context: Any, spec: TrialSpec, workspace: Workspace) -> _Running:
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_trial_process, args=(spec.model_dump_json(), workspace, sender), name=spec.name)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    running = _Running(spec, process, receiver, now, time.perf_counter())
    process.start()
    sender.close()
    return running


def _how_it_died(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (often the kernel, when memory runs out)" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}"
    return f"the process ended with exit code {exitcode} and no answer"


def _trial_process(spec_json: str, workspace: Workspace, sender: Any) -> None:
    """The body of a trial's process: run, send figures, end."""
    _end_with_parent()
    # Ctrl-C is the parent's to handle: it ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    import torch
    import transformers

    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from lab.runners import execute

    spec = TrialSpec.model_validate_json(spec_json)
    torch.set_num_threads(spec.threads)
    limit_allocator()
    count_grouped_queries()
    try:
        outcome = execute(spec.settings, workspace)
        status: Status = "diverged" if outcome.diverged else "ok"
        answer: dict[str, Any] = {
            "status": status,
            "message": outcome.diverged,
            "figures": records.as_numbers(outcome.figures),
            "series": {name: records.as_series(values) for name, values in outcome.series.items()},
            "tags": outcome.tags,
        }
    except LabError as error:
        answer = {"error": str(error)}
    except Exception as error:
        answer = {"status": "oom" if _is_out_of_memory(error) else "failed", "message": _last_line(error)}
    sender.send(answer)
    sender.close()


def _end_with_parent() -> None:
    """End this process when the study's process has gone, so that no trial goes on unseen."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_out_of_memory(error: Exception) -> bool:
    told = ("out of memory", "can't allocate memory", "status_alloc_failed", "memoryallocation")
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in told)


def _last_line(error: Exception) -> str:
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} ({Path(frame.filename).name}, line {frame.lineno})"


# One study in a folder ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def study_lock(workspace: Workspace, name: str = "study") -> Iterator[None]:
    """Held while a study (or, with another name, one of its stages) measures in a folder.

    Raises:
        LabError: another process holds it; the message says which.
    """
    path = workspace.lock(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = path.open("a+")
    except OSError as error:
        raise LabError(f"cannot write {path}: {error.strerror}. Make the folder writable, then start again.") from None
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            owner = handle.read().strip() or "unknown"
            raise LabError(
                f"a study already runs in {workspace.root.resolve()} (process {owner}). Wait for it, or end it: kill {owner}"
            ) from None
        handle.truncate(0)
        handle.write(str(os.getpid()))
        handle.flush()
        yield
