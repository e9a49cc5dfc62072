"""The card at hand: what it is, how much of it is free, and who holds the rest.

Asked of nvidia-smi, which makes no CUDA context: one in the study's own process would hold memory that its trials need.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections.abc import Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

from lab.cards import CONTEXT_BYTES, DRIVER_SHARE, GIB, find_gpu
from lab.errors import LabError

MIB = 2**20

MOST_HELD = 500 * 10**6
"""Bytes that others may hold on a card on which something is measured."""

LIMIT = "LAB_VRAM_GIB"
"""The variable by which a smaller card is emulated."""


@dataclass(frozen=True)
class Holder:
    """A process with memory on the card."""

    pid: int
    name: str
    held_bytes: int


@dataclass(frozen=True)
class Card:
    """A card, and what it has now. `free_bytes` is what the driver would give to programs that come."""

    name: str
    total_bytes: int
    free_bytes: int
    holders: tuple[Holder, ...] = ()

    @classmethod
    def named(cls, name: str) -> Card:
        """A card of the table, empty.

        Raises:
            LabError: there is none of that name.
        """
        gpu = find_gpu(name)
        return cls(gpu.name, gpu.total_bytes, gpu.total_bytes)

    @classmethod
    def sized(cls, gib: float) -> Card:
        """A card that is known by its size alone, empty."""
        return cls(f"a card of {gib:g} GB", size_bytes(gib), size_bytes(gib))

    def limited(self, gib: float | None) -> Card:
        """This card as one of so many GiB; None, or more than it has: as it is."""
        if gib is None or size_bytes(gib) >= self.total_bytes:
            return self
        size = size_bytes(gib)
        name = f"{self.name} as a card of {gib:g} GB"
        return replace(self, name=name, total_bytes=size, free_bytes=min(size, self.free_bytes))


def size_bytes(gib: float) -> int:
    """What a card that is sold as so many GB gives to programs."""
    return int(gib * GIB * (1 - DRIVER_SHARE))


# Asking ---------------------------------------------------------------------------------------------------------

CARD_QUERY = "--query-gpu=name,memory.used,memory.free"
"""Not memory.total: that has some hundreds of MiB in it which the driver keeps, and which count as neither."""
HOLDERS_QUERY = "--query-compute-apps=pid,process_name,used_memory"


def card_here() -> Card:
    """The first card that torch sees, by nvidia-smi's word, or by torch's where that cannot be had.

    torch must have found one.
    """
    import torch

    properties = torch.cuda.get_device_properties(0)
    with suppress(OSError, subprocess.SubprocessError, ValueError):
        which = [f"--id=GPU-{properties.uuid}"]
        return read_smi(_smi(CARD_QUERY, *which), _smi(HOLDERS_QUERY, *which))
    # In a process of its own, whose context goes with it; that holds memory too, and is taken for CONTEXT_BYTES.
    script = "import torch; print(*torch.cuda.mem_get_info(0))"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    free, total = map(int, done.stdout.split())
    return Card(properties.name, total, min(total, free + CONTEXT_BYTES))


def _smi(*arguments: str) -> str:
    command = ["nvidia-smi", "--format=csv,noheader,nounits", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout


def read_smi(card: str, holders: str) -> Card:
    """What nvidia-smi prints for CARD_QUERY and HOLDERS_QUERY, in MiB and without a header.

    A process whose memory it does not know counts as one without.

    Raises:
        ValueError: it does not tell the card's memory.
    """
    ((name, used, free),) = _rows(card)
    found = []
    for row in _rows(holders):
        with suppress(ValueError):  # "[N/A]", or a line of words where there is none
            pid, *path, held = row
            found.append(Holder(int(pid), Path(", ".join(path)).name, int(held) * MIB))
    return Card(name, (int(used) + int(free)) * MIB, int(free) * MIB, tuple(found))


def _rows(text: str) -> list[list[str]]:
    return [[field.strip() for field in row] for row in csv.reader(io.StringIO(text)) if row]


# Refusing -------------------------------------------------------------------------------------------------------


def require_free(card: Card, own: Collection[int] | None = None) -> None:
    """Others hold at most MOST_HELD of the card: more, and neither bytes nor times measured there are the lab's own.

    Args:
        own: processes whose memory does not count; None: this one, and those that it was started by.
    Raises:
        LabError: they hold more; the message names them.
    """
    own = ancestors(os.getpid()) if own is None else own
    others = sorted((h for h in card.holders if h.pid not in own), key=lambda h: -h.held_bytes)
    ours = sum(h.held_bytes for h in card.holders if h.pid in own)
    named = sum(h.held_bytes for h in others)
    held = max(card.total_bytes - card.free_bytes - ours, named)
    if held <= MOST_HELD:
        return
    who = [f"{h.name} (process {h.pid}) {_mb(h.held_bytes)}" for h in others]
    if held - named > MOST_HELD / 10:
        who.append(f"{_mb(held - named)} by whom the driver does not say (another user's, or a display)")
    raise LabError(
        f"{card.name}: {_mb(held)} are held by others, at most {_mb(MOST_HELD)} may be: {', '.join(who)}. "
        "End them, or choose another card (CUDA_VISIBLE_DEVICES=1), then start again."
    )


def _mb(size: int) -> str:
    return f"{size / 1e6:,.0f} MB"


def ancestors(pid: int) -> set[int]:
    """A process, and all that it was started by."""
    found: set[int] = set()
    while pid > 0 and pid not in found:
        found.add(pid)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
        except OSError:
            break
    return found


# A smaller card -------------------------------------------------------------------------------------------------


def limit_gib(environment: Mapping[str, str] = os.environ) -> float | None:
    """The GB of the card that is emulated; None: the card as it is.

    Raises:
        LabError: the variable is no size.
    """
    text = environment.get(LIMIT, "")
    if not text:
        return None
    try:
        gib = float(text)
    except ValueError:
        gib = 0.0
    if not 1 <= gib < 10_000:
        raise LabError(f"{LIMIT} is '{text}'; it must be a number of GB, at least 1. Correct it, or unset it.")
    return gib


def limit_allocator() -> None:
    """Let torch's allocator, in this process, have no more than the card that is emulated would give it."""
    gib = limit_gib()
    if gib is None:
        return
    import torch

    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, (size_bytes(gib) - CONTEXT_BYTES) / total))
