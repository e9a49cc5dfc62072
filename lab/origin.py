"""Where a record comes from: the commit, the code, the installation, the prepared files and the device."""

from __future__ import annotations

import datetime
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from lab import records
from lab.device import LIMIT, limit_gib, size_bytes
from lab.errors import LabError
from lab.models import shapes
from lab.records import Provenance
from lab.specs import Simulation, TrialSpec
from lab.workspace import Workspace

SIMULATED = "none (simulated)"
"""The device of a trial on tensors without storage."""


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


def timestamp() -> str:
    """Now, as a record says it: UTC, to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


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
