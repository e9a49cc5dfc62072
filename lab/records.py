"""Records: what a trial leaves. One JSON file each, written whole or not at all, with where it comes from."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from lab.errors import LabError
from lab.runners import module_of
from lab.specs import TrialSpec

Status = Literal["ok", "oom", "diverged", "failed"]

STACK = ("torch", "transformers", "peft", "trl", "datasets", "bitsandbytes", "accelerate", "numpy")
"""The packages whose version can change a number."""

DECLARATIONS = ("lab", "lab.errors", "lab.params", "lab.records", "lab.runners", "lab.specs", "lab.workspace")
"""Modules that cannot change a number: what they say is in the spec, a message or a path."""


class Provenance(BaseModel):
    """Where a record comes from. `code`, `inputs` and `environment` decide whether it may be used again."""

    model_config = ConfigDict(extra="forbid")

    commit: str
    dirty: bool
    code: str
    environment: str
    inputs: dict[str, str]
    versions: dict[str, str]
    python: str
    platform: str
    device: str
    device_memory_bytes: int
    driver: str = ""
    """Of a GPU."""
    threads: int
    started: str
    seconds: float
    synthetic: bool = False


class Record(BaseModel):
    """One trial: what it was told, how it ended, what it measured, where it ran."""

    model_config = ConfigDict(extra="forbid")

    spec: TrialSpec
    status: Status
    message: str = ""
    figures: dict[str, float | None] = {}
    series: dict[str, list[float | None]] = {}
    tags: dict[str, str] = {}
    provenance: Provenance

    def figure(self, name: str) -> float:
        """The figure called `name`.

        Raises:
            LabError: the record has no such figure.
        """
        value = self.figures.get(name)
        if value is None:
            known = ", ".join(sorted(self.figures)) or "none"
            raise LabError(f"record {self.spec.experiment}/{self.spec.name}: no figure '{name}'. It has: {known}.")
        return value

    def setting(self, name: str) -> Any:
        """The setting called `name`, or None where this kind of trial has none."""
        return getattr(self.spec.settings, name, None)


def write_text(path: Path, text: str) -> None:
    """Write a whole file or none: to a temporary name in the same folder, then renamed.

    Raises:
        LabError: the folder cannot be written, or the disk is full.
    """
    temporary: str | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except OSError as error:
        if temporary:
            with contextlib.suppress(OSError):
                Path(temporary).unlink()
        raise LabError(
            f"cannot write {path}: {error.strerror or error}. Free space or make {path.parent} writable, then start again."
        ) from None


def check_writable(folder: Path) -> None:
    """A record could be written into `folder`: known before the first trial has run rather than after it.

    Raises:
        LabError: it could not.
    """
    probe = folder / ".probe"
    write_text(probe, "")
    probe.unlink()


def write_record(record: Record, folder: Path) -> Path:
    """Write `folder/<experiment>/<trial>.json`."""
    path = record_path(folder, record.spec)
    write_text(path, json.dumps(record.model_dump(mode="json"), indent=1, sort_keys=True, allow_nan=False) + "\n")
    return path


def record_path(folder: Path, spec: TrialSpec) -> Path:
    """Where the record of a trial lies below the results folder of its profile."""
    return folder / spec.experiment / f"{spec.name}.json"


def read_record(path: Path) -> Record:
    """Read one record.

    Raises:
        LabError: the file is damaged.
    """
    try:
        return Record.model_validate_json(path.read_bytes())
    except (ValidationError, OSError, UnicodeDecodeError) as error:
        detail = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
        raise LabError(f"record {path} is damaged: {detail}. Move it away; its trial is measured again.") from None


def set_aside(path: Path) -> Path:
    """Rename a damaged record to `*.damaged`, so that its trial is measured again and the file can be looked at."""
    aside = path.with_name(path.name + ".damaged")
    return path.rename(aside)


def read_records(folder: Path) -> tuple[list[Record], list[Path]]:
    """All records of an experiment's folder, and the paths of those that are damaged."""
    records, damaged = [], []
    for path in sorted(folder.glob("*.json")):
        try:
            records.append(read_record(path))
        except LabError:
            damaged.append(path)
    return records, damaged


def reusable(record: Record, spec: TrialSpec, code: str, environment: str, inputs: dict[str, str]) -> bool:
    """Whether `record` answers `spec` here and now: same spec, code, installation and input files, and a result.

    A trial that crashed has no result and is tried again; one that ran out of memory or diverged has.
    """
    origin = record.provenance
    return (
        record.status != "failed"
        and record.spec == spec
        and (origin.code, origin.environment, origin.inputs) == (code, environment, inputs)
    )


# Fingerprints ---------------------------------------------------------------------------------------------------


@lru_cache
def code_fingerprint(root: Path, kind: str, methods: frozenset[str] = frozenset()) -> str:
    """A hash of the code that a kind of trial runs: its syntax trees without docstrings, so a comment costs no rerun.

    Args:
        methods: those of the trial; one of the lab's own has its code in a module of its name.
    """
    digest = hashlib.sha256()
    for path in numeric_files(root, module_of(kind), *(f"lab.methods.{method}" for method in methods)):
        digest.update(f"{path.name}\n{meaning(ast.parse(path.read_text(encoding='utf-8')))}\n".encode())
    return digest.hexdigest()[:16]


def numeric_files(root: Path, *modules: str) -> list[Path]:
    """The files of the modules and of all that they import of the library, at whatever depth, but for DECLARATIONS."""
    found: dict[str, Path] = {}
    waiting = list(modules)
    while waiting:
        name = waiting.pop()
        path = _module_file(root, name)
        if path is None or name in found or name in DECLARATIONS:
            continue
        found[name] = path
        waiting.append(name.rpartition(".")[0])
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module:
                waiting += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            elif isinstance(node, ast.Import):
                waiting += [alias.name for alias in node.names]
    return sorted(found.values())


def _module_file(root: Path, name: str) -> Path | None:
    if name.split(".")[0] != "lab":
        return None
    path = root.joinpath(*name.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)


def meaning(node: object) -> str:
    """What code does, as text: its syntax tree without docstrings, as Python 3.11's `ast.dump` writes it.

    Later Pythons have a field more in functions and classes (`type_params`), or leave empty ones out.
    """
    if isinstance(node, ast.AST):
        fields = [
            f"{name}={meaning(value)}"
            for name, value in ast.iter_fields(node)
            if not (value is None and getattr(type(node), name, ...) is None) and (name, value) != ("type_params", [])
        ]
        return f"{type(node).__name__}({', '.join(fields)})"
    if isinstance(node, list):
        return f"[{', '.join(meaning(item) for item in node if not _is_text(item))}]"
    return repr(node)


def _is_text(node: object) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def folder_fingerprint(folder: Path) -> str:
    """A hash of a folder's file names and bytes."""
    return files_fingerprint(folder, (path for path in folder.rglob("*") if path.is_file()))


def files_fingerprint(folder: Path, files: Iterable[Path]) -> str:
    """A hash of the names, below `folder`, and the bytes of some files."""
    digest = hashlib.sha256()
    for path in sorted(files):
        digest.update(f"{path.relative_to(folder)}\n".encode())
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:16]


# Provenance -----------------------------------------------------------------------------------------------------

_NOT_SOURCE = ("results/", "dvc.lock", "README.md", "FINDINGS.md")
"""What a study writes itself, or what cannot change a number: not a reason to call the tree dirty."""


BUNDLED = "bundled-from.json"
"""In a bundle: the commit that its files are of. They are checked before anything runs."""


def git_state(root: Path) -> tuple[str, bool]:
    """The commit, and whether a tracked or new file differs from it. `unknown` and dirty outside a repository and a bundle."""
    if (root / BUNDLED).is_file():
        bundled = json.loads((root / BUNDLED).read_text(encoding="utf-8"))
        return bundled["commit"], bundled["dirty"]
    try:
        commit = _git(root, "rev-parse", "HEAD")
        lines = _git(root, "status", "--porcelain", "--untracked-files=normal").splitlines()
    except (OSError, subprocess.CalledProcessError):
        return "unknown", True
    changed = [line[3:].strip('"').split(" -> ")[-1] for line in lines]
    if "params.yaml" in changed and _only_profile_changed(root):
        changed.remove("params.yaml")
    return commit, any(not path.startswith(_NOT_SOURCE) for path in changed)


def has_commit(root: Path, commit: str) -> bool:
    """Whether the repository has a commit of this name."""
    try:
        return _git(root, "cat-file", "-t", commit) == "commit"
    except (OSError, subprocess.CalledProcessError):
        return False


def committed(root: Path, revision: str, path: str) -> str | None:
    """The text of a file as a commit has it; None where there is no such file, commit or repository."""
    try:
        return _git(root, "show", f"{revision}:{path}")
    except (OSError, subprocess.CalledProcessError):
        return None


def _only_profile_changed(root: Path) -> bool:
    """Choosing another profile is no change of the study: the record's folder says which profile it was."""
    import yaml

    try:
        before = yaml.safe_load(_git(root, "show", "HEAD:params.yaml"))
        now = yaml.safe_load((root / "params.yaml").read_text(encoding="utf-8"))
        return {**before, "profile": ""} == {**now, "profile": ""}
    except (OSError, subprocess.CalledProcessError, yaml.YAMLError, TypeError):
        return False


def _git(root: Path, *arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True)
    return done.stdout.rstrip("\n")


def stack_versions() -> dict[str, str]:
    """The installed version of each package in STACK."""
    return {name: _version(name) for name in STACK}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "absent"


def describe_device(device: str) -> tuple[str, int]:
    """A device's name and its memory in bytes."""
    if device == "cuda":
        import torch

        properties = torch.cuda.get_device_properties(0)
        return properties.name, int(properties.total_memory)
    return _processor(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def describe_driver(device: str) -> str:
    """The version of a GPU's driver; empty for a processor."""
    if device != "cuda":
        return ""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: no nvidia-smi"


def _processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def describe_python() -> tuple[str, str]:
    """The Python version and the platform."""
    return sys.version.split()[0], platform.platform(terse=True)


def as_numbers(figures: dict[str, Any]) -> dict[str, float | None]:
    """Figures as JSON takes them: NaN and infinity become null."""
    return {name: _finite(value) for name, value in figures.items()}


def as_series(values: Iterable[Any]) -> list[float | None]:
    """A series as JSON takes it: NaN and infinity become null."""
    return [_finite(value) for value in values]


def _finite(value: Any) -> float | None:
    if value is None:
        return None
    number = float(value)
    if number != number or number in (float("inf"), float("-inf")):
        return None
    return int(number) if isinstance(value, int) else number
