"""What a folder that is carried from one machine to another holds, and whether it has arrived whole.

The standard library alone: it is read before anything is unpacked.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from lab.errors import LabError

MANIFEST = "manifest.json"


def write_manifest(folder: Path, facts: dict[str, Any]) -> None:
    """Say what a folder holds: `facts`, and the sha256 of each of its files."""
    files = {path.relative_to(folder).as_posix(): sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}
    (folder / MANIFEST).write_text(json.dumps({**facts, "files": files}, indent=1) + "\n", encoding="utf-8")


def check_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder whose files are all there, and whole; files that it does not name do not count.

    Raises:
        LabError: one is missing or damaged.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        files: dict[str, str] = manifest["files"]
    except (OSError, ValueError, KeyError):
        raise LabError(f"{folder / MANIFEST} is missing or damaged. Copy {folder.name} again.") from None
    for name, expected in files.items():
        path = folder / name
        if not path.is_file():
            raise LabError(f"{path} is missing. Copy {folder.name} again.")
        if sha256(path) != expected:
            raise LabError(f"{path} is damaged. Copy {folder.name} again.")
    return manifest


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
