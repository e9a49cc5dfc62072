"""Filing what a GPU elsewhere has measured: checked, then kept as evidence under `results/gpu-<device>/`."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from lab import records
from lab.errors import LabError
from lab.offline import unpack
from lab.records import Record
from lab.study import Study
from lab.workspace import Workspace


@dataclass(frozen=True)
class Filed:
    """What an import did.

    Attributes:
        folder: below `results`.
        fresh, replaced, kept: records that were not there, that are newer than those that were, and that stay.
    """

    folder: str
    fresh: int
    replaced: int
    kept: int


def file_records(study: Study, path: Path, results: Path | None = None) -> Filed:
    """Check a file of records and file them; nothing is written unless all of them are right.

    Args:
        study: of the profile that the records are of.
        results: the folder that takes `<profile>-<device>/`; the study's own unless told, and that takes a GPU's alone.
    Raises:
        LabError: the file is damaged, or a record is no evidence here; the message says why.
    """
    header, found = unpack(path)
    if not found:
        raise LabError(f"{path} holds no record. Give the bundle more time: python run.py --minutes 9")
    own = study.workspace.root / "results"
    for record in found:
        _check(study, path, header["profile"], record, to_own=results is None or results.resolve() == own.resolve())
    devices = sorted({record.provenance.device for record in found if record.provenance.device_memory_bytes}) or [""]
    if len(devices) > 1:
        raise LabError(
            f"{path} holds records of {' and of '.join(devices)}. Unpack the bundle anew for each device, and import each file."
        )
    place = Workspace(study.workspace.root, header["profile"], device=slug(devices[0]))
    folder = (results or own) / place.label
    counts = {"fresh": 0, "replaced": 0, "kept": 0}
    for record in found:
        there = records.record_path(folder, record.spec)
        before = records.read_record(there) if there.is_file() else None
        worse = before and record.status == "failed" != before.status  # no failure takes the place of a result
        if before and (worse or before.provenance.started >= record.provenance.started):
            counts["kept"] += 1
            continue
        counts["replaced" if before else "fresh"] += 1
        records.write_record(record, folder)
    return Filed(place.label, **counts)


def _check(study: Study, path: Path, profile: str, record: Record, to_own: bool) -> None:
    """A record is evidence: measured, by the code that is here, from a clean tree, with the settings of the profile.

    Raises:
        LabError: it is not.
    """
    spec, origin = record.spec, record.provenance
    name = f"{path.name}: {spec.experiment}/{spec.name}"
    if origin.synthetic:
        raise LabError(f"{name} is synthetic, which is no evidence. Measure it: python run.py")
    if to_own and not profile.startswith("gpu"):
        raise LabError(f"{name} is of the profile {profile}: a rehearsal. Choose another folder for it: --into FOLDER")
    if origin.dirty:
        raise LabError(f"{name} was measured from a dirty tree. Commit, build the bundle again, and measure with it.")
    if not records.has_commit(study.workspace.root, origin.commit):
        raise LabError(
            f"{name} is of commit {origin.commit[:12]}, which is not in this repository. Fetch it: git fetch"
        )
    if origin.code != records.code_fingerprint(study.workspace.root, spec.settings.kind, spec.methods()):
        raise LabError(
            f"{name} was measured by other code than is here. Check out what measured it: git checkout {origin.commit[:12]}"
        )


def name_metrics(pipeline: Path, folder: str) -> None:
    """Name the metrics of a folder below `results` in dvc.yaml, once, so that `dvc metrics show` has them."""
    entry = f"  - results/{folder}/metrics.json\n"
    text = pipeline.read_text(encoding="utf-8")
    if entry in text:
        return
    if "\nmetrics:\n" in text:
        text = text.replace("\nmetrics:\n", f"\nmetrics:\n{entry}", 1)
    else:
        text = f"{text.rstrip()}\n\n# What GPUs elsewhere have measured, written by `lab import`.\nmetrics:\n{entry}"
    records.write_text(pipeline, text)


_WORDS = re.compile(r"nvidia|geforce|hbm\d?e?|pcie|sxm\d?|nvl|generation|\d+ ?gb|tesla|quadro", re.IGNORECASE)


def slug(device: str) -> str:
    """A device's name for a folder.

    >>> slug("NVIDIA H100 80GB HBM3"), slug("NVIDIA GeForce RTX 4090")
    ('h100', 'rtx-4090')
    """
    return "-".join(re.findall(r"[a-z0-9]+", _WORDS.sub(" ", device).lower())) or "device"
