"""Run the lab on a machine without a network: `python run.py --minutes 9`.

This file lies at the top of a bundle (`make bundle`). It checks that every file has arrived, unpacks the wheels that the
machine lacks, and starts `lab offline` with the options that it was given. Start it again to go on; what was measured lies
in records.jsonl.gz, for `lab import`.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
import zipfile
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
STUDY, WHEELS, SITE = HERE / "study", HERE / "wheels", HERE / "site"


TOO_LARGE = {"datasets": "pyarrow"}
"""What a wheel needs that a bundle has no room for. Without it the wheel stays packed: transformers imports `datasets` for its
Trainer wherever that is there, and would fail."""


def main() -> None:
    """Check, unpack, and become `lab offline`, whose minutes began here."""
    started = time.time()
    sys.path.insert(0, str(STUDY))
    try:
        from lab.errors import LabError
        from lab.manifest import MANIFEST, check_manifest, sha256
    except ImportError as error:
        sys.exit(_fail(f"study/ is not whole ({error}). Copy the bundle again."))
    try:
        manifest = check_manifest(HERE)
    except LabError as error:
        sys.exit(_fail(str(error)))
    here = f"{sys.version_info.major}.{sys.version_info.minor}"
    if here != manifest["python"]:
        sys.exit(
            _fail(f"the bundle is for Python {manifest['python']}, this is {here}. Build it with --python {here}.")
        )
    unpack(sha256(HERE / MANIFEST))
    path = [str(STUDY), str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
        "HF_HUB_OFFLINE": "1",
        "LAB_STARTED": str(started),
    }
    os.chdir(STUDY)
    options = ["--profile", manifest["profile"], *sys.argv[1:]]
    os.execve(sys.executable, [sys.executable, "-m", "lab.cli", "offline", *options], environment)


def unpack(content: str) -> None:
    """Unpack into `site/`, once for a manifest, each wheel that the machine has not, or has in an older version."""
    mark = SITE / "unpacked"
    if mark.is_file() and mark.read_text(encoding="utf-8") == content:
        return
    shutil.rmtree(SITE, ignore_errors=True)
    SITE.mkdir()
    for wheel in sorted(WHEELS.glob("*.whl")):
        name, version = wheel.name.split("-")[:2]
        if name in TOO_LARGE and not _installed(TOO_LARGE[name]):
            continue
        if _order(_installed(name)) < _order(version):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(SITE)
    mark.write_text(content, encoding="utf-8")


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _order(version: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", version)]


def _fail(reason: str) -> int:
    print(f"run.py: {reason}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    main()
