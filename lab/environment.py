"""What is installed. Evidence measured by another installation is never taken for one's own."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import uuid
from pathlib import Path

from lab import records
from lab.workspace import Workspace

MARK = Path(sys.prefix) / "lab-installation"
"""Lies in the virtual environment, so that it goes with it."""


def installation(mark: Path = MARK) -> str:
    """The id of this virtual environment, or of a bundle where it was unpacked, drawn at its first use."""
    if not mark.is_file():
        records.write_text(mark, uuid.uuid4().hex + "\n")
    return mark.read_text(encoding="utf-8").strip()


def describe_environment(mark: Path = MARK) -> dict[str, object]:
    """Versions, processor, threads and the installation, with the hash of all of these as `id`."""
    python, platform = records.describe_python()
    processor, memory = records.describe_device("cpu")
    facts: dict[str, object] = {
        "installation": installation(mark),
        "python": python,
        "platform": platform,
        "processor": processor,
        "processors": os.cpu_count(),
        "memory_gib": round(memory / 2**30, 1),
        "versions": records.stack_versions(),
    }
    text = json.dumps(facts, sort_keys=True)
    return {"id": hashlib.sha256(text.encode()).hexdigest()[:16], **facts}


def write_environment(workspace: Workspace, mark: Path = MARK) -> None:
    """Write the environment file; every training stage depends on it."""
    records.write_text(workspace.environment, json.dumps(describe_environment(mark), indent=1) + "\n")
