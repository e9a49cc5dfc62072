"""Running the trials of an experiment: each in a process of its own, none twice, a crash costing that one alone."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from lab import records
from lab.errors import LabError
from lab.origin import Origin, timestamp
from lab.processes import Running, start_server, start_trial
from lab.records import Record
from lab.specs import Plan, TrialSpec, templates
from lab.sweeps import expand
from lab.workspace import Workspace


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
    provenance = origin.provenance(spec, timestamp(), 0.0)
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


def _run_all(
    specs: Sequence[TrialSpec],
    workspace: Workspace,
    origin: Origin,
    deadline: float,
    lenient: bool,
    shortfall: Callable[[TrialSpec], Shortfall | None] | None,
) -> Iterator[Record]:
    """Run trials in order, as many side by side as the threads allow; records come as trials end.

    What does not fit the card is not run.
    """
    waiting = list(specs)
    running: list[Running] = []
    try:
        while waiting or running:
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeIsUp({f"{t.spec.experiment}/{t.spec.name}": t.seconds for t in running})
            free = origin.threads - sum(trial.spec.threads for trial in running)
            # A trial that asks for more threads than there are runs alone.
            if waiting and (waiting[0].threads <= free or not running):
                spec = waiting.pop(0)
                if record := _unfit(spec, origin, shortfall):
                    yield record
                else:
                    running.append(start_trial(spec, workspace))
                continue
            ready = wait([end for trial in running for end in trial.ends], None if math.isinf(left) else left)
            if not ready:
                continue
            trial = next(t for t in running if any(end in ready for end in t.ends))
            running.remove(trial)
            yield trial.finish(origin, lenient)
    finally:
        for trial in running:
            trial.kill()


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
