"""The trial that watches a paged optimizer on a card without room for its state: what leaves the card, where to, and when.

torch's counters do not see managed memory, so the card is asked through its driver and the process through the kernel:
what it read and wrote on disks (/proc/self/io), what lies in swap, which files it has open, what host memory is left.

What bitsandbytes 0.50 makes to page (functional.py `get_paged`; optim/optimizer.py `get_state_buffer`, `prefetch_state`):
a tensor of optimizer state of 100,000 elements or more on a CUDA device is allocated by cudaMallocManaged, looks like a
tensor on the processor, and carries `is_paged`; before its parameter is stepped it is asked to the card. Nothing is done
about parameters, and no file is opened. Whether that is what happens is what the trial measures.
"""

from __future__ import annotations

import gc
import os
import stat
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lab import data
from lab.errors import LabError
from lab.limits import ran_out
from lab.memory.ledger import inner_optimizer, tensors_in
from lab.memory.workload import BLOCKWISE
from lab.methods import apply_method
from lab.models import load_model
from lab.optimizers import check_optimizer
from lab.runners import Outcome
from lab.specs import Paging
from lab.training import build_trainer
from lab.workspace import Workspace

SLACK = 64 * 2**20
"""Bytes that stay free on a filled card beyond what a pass needs: the allocator rounds to blocks of up to 20 MiB."""


def watch_paging(settings: Paging, workspace: Workspace) -> Outcome:
    """Update a model on random tokens, by an optimizer of bitsandbytes, on a card that is filled beforehand.

    A pass without a step comes first: it says what forward and backward need. The card is then filled until that and
    `room` of the state's size are free, and the updates follow.

    Figures, in bytes after the last update unless said otherwise:
        survived: 1, or 0 if the updates ran out of memory.
        parameters_bytes, parameters_away_bytes: of the model; paged, or not on the card, between updates.
        state_bytes, state_paged_bytes: of the optimizer; of these in tensors that are `is_paged`.
        expected_state_bytes: what the optimizer was expected to hold when the card was filled.
        unseen_bytes: in use on the card by the driver's word, not by torch's, and not before the optimizer had state.
        displaced_bytes: paged state that is not on the card: state_paged_bytes less unseen_bytes.
        allocated_bytes: what torch counts, without the filling. driver_bytes: what the driver counts, without it.
        filled_bytes: the filling.
        read_bytes, written_bytes: by the process on disks during the updates. swapped_bytes: by how much its swap grew.
        host_bytes: by how much the machine's available memory fell. resident_bytes: by how much the process's grew.
        opened_files: regular files that it has open for writing, or mapped writable, and had not before.
        seconds_per_update: their median, after the first; none where memory ran out.

    Raises:
        LabError: no CUDA GPU; an optimizer that is not bitsandbytes'; a card too full to begin with.
    """
    if settings.device != "cuda" or not torch.cuda.is_available():
        raise LabError(
            f"paging: device {settings.device}, and torch {torch.__version__} finds no CUDA GPU; only there is memory "
            "managed. Run it under --profile gpu on a machine with one."
        )
    check_optimizer(settings.optimizer)
    if settings.optimizer not in BLOCKWISE:
        raise LabError(
            f"paging: {settings.optimizer} is no optimizer of bitsandbytes. Choose one of: {', '.join(BLOCKWISE)}."
        )
    model = load_model(
        settings.model,
        workspace.model(settings.model),
        precision=settings.precision,
        attention=settings.attention,
        seed=settings.seed,
        device=settings.device,
    )
    model = apply_method(model, settings.method, settings.method_options)
    parameters = [p for p in model.parameters() if p.requires_grad]
    rows = data.random_rows(settings.batch, settings.length, model.config.vocab_size, settings.seed)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(model, rows, data.Collator(0), settings, scratch)
        trainer.create_optimizer()
        optimizer = inner_optimizer(trainer.optimizer)
        ids = torch.tensor([row.input_ids for row in rows], device=settings.device)
        kept_on_disk = parameters[::2] if settings.fault == "disk" else []

        def one_pass() -> None:
            model(input_ids=ids, labels=ids).loss.backward()

        needed = _needed(one_pass, optimizer)
        unseen_before = _in_use() - torch.cuda.memory_reserved()
        expected = state_bytes(model, settings.optimizer)
        load_kernels(trainer, parameters[0])
        filling = [] if settings.room is None else _fill(needed + round(settings.room * expected))
        filled = sum(t.nbytes for t in filling)
        before, survived = Counters.now(), True
        seconds: list[float] = []
        try:
            for update in range(settings.updates):
                started = time.perf_counter()
                if update and kept_on_disk:
                    page_in(kept_on_disk, settings.device)
                one_pass()
                optimizer.step()
                optimizer.zero_grad()
                if kept_on_disk:
                    page_out(kept_on_disk, Path(scratch))
                torch.cuda.synchronize()
                seconds.append(time.perf_counter() - started)
        except Exception as error:
            if not ran_out(error):
                raise
            survived = False
        after = Counters.now()
        # By identity: the tables of an 8-bit optimizer are shared.
        state = list({id(t): t for t in tensors_in(list(optimizer.state.values()))}.values())
        paged = sum(t.nbytes for t in state if getattr(t, "is_paged", False))
        unseen = max(0, _in_use() - torch.cuda.memory_reserved() - unseen_before)
        figures: dict[str, Any] = {
            "survived": int(survived),
            "parameters_bytes": sum(p.nbytes for p in model.parameters()),
            "parameters_away_bytes": away_bytes(list(model.parameters()), settings.device),
            "state_bytes": sum(t.nbytes for t in state),
            "state_paged_bytes": paged,
            "expected_state_bytes": expected,
            "unseen_bytes": unseen,
            "displaced_bytes": max(0, paged - unseen),
            "allocated_bytes": torch.cuda.memory_allocated() - filled,
            "driver_bytes": _in_use() - filled,
            "filled_bytes": filled,
            # The first makes the state and warms up.
            "seconds_per_update": statistics.median(seconds[1:]) if survived and seconds[1:] else None,
            **after.since(before),
        }
    tags = {"model": settings.model, "method": settings.method, "optimizer": settings.optimizer}
    return Outcome(figures=figures, tags=tags)


# The card -------------------------------------------------------------------------------------------------------


def state_bytes(model: nn.Module, optimizer: str) -> int:
    """What an optimizer of bitsandbytes will hold for a model, without its scales and tables: a fiftieth of it."""
    kind = BLOCKWISE[optimizer]
    embeddings = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    each = {p: 1 if kind.in_bytes(p.numel(), p in embeddings) else 4 for p in model.parameters() if p.requires_grad}
    return sum(kind.values * p.numel() * size for p, size in each.items())


def away_bytes(parameters: Sequence[torch.Tensor], device: str) -> int:
    """Bytes of parameters that are paged or not on the device."""
    return sum(p.nbytes for p in parameters if getattr(p, "is_paged", False) or p.device.type != device)


def load_kernels(trainer: Any, like: torch.Tensor) -> None:
    """Step a small parameter like another one: what the card loads for an optimizer has no room once it is filled."""
    kind, options = trainer.get_optimizer_cls_and_kwargs(trainer.args)
    # 8 bits are for 4,096 elements and more.
    small = nn.Parameter(torch.zeros(8192, dtype=like.dtype, device=like.device))
    small.grad = torch.zeros_like(small)
    kind([small], **options).step()


def _in_use() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def _needed(one_pass: Any, optimizer: torch.optim.Optimizer) -> int:
    """What forward and backward take beyond what is there before, by torch's reserved bytes; nothing of it is kept."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    there = torch.cuda.memory_reserved()
    one_pass()
    optimizer.zero_grad()
    torch.cuda.synchronize()
    needed = torch.cuda.max_memory_reserved() - there
    gc.collect()
    torch.cuda.empty_cache()
    return needed


def _fill(leave: int) -> list[torch.Tensor]:
    """Take the card's memory but for `leave` bytes and the slack.

    Raises:
        LabError: less than that is free as it is.
    """
    free = torch.cuda.mem_get_info()[0]
    wanted = free - leave - SLACK
    if wanted < 0:
        raise LabError(
            f"paging: {free / 2**30:.1f} GiB are free on the card and {(leave + SLACK) / 2**30:.1f} GiB are needed. "
            "Choose a smaller model or batch in params.yaml, or end what else uses the card."
        )
    return [torch.empty(wanted, dtype=torch.uint8, device="cuda")]


# The process ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counters:
    """What the kernel says of this process, and of the machine's memory, in bytes; and the files open for writing."""

    read: int
    written: int
    swapped: int
    resident: int
    available: int
    files: frozenset[str]

    @classmethod
    def now(cls, proc: Path = Path("/proc")) -> Counters:
        """As the kernel counts at this moment."""
        own = proc / "self"
        io, status, machine = (parse(path.read_text()) for path in (own / "io", own / "status", proc / "meminfo"))
        return cls(
            io["read_bytes"],
            io["write_bytes"] - io.get("cancelled_write_bytes", 0),
            status.get("VmSwap", 0),
            status["VmRSS"],
            machine["MemAvailable"],
            frozenset(written_files(own)),
        )

    def since(self, before: Counters) -> dict[str, int]:
        """The figures of the time between two readings."""
        return {
            "read_bytes": self.read - before.read,
            "written_bytes": self.written - before.written,
            "swapped_bytes": self.swapped - before.swapped,
            "resident_bytes": self.resident - before.resident,
            "host_bytes": before.available - self.available,
            "opened_files": len(self.files - before.files),
        }


def parse(text: str) -> dict[str, int]:
    """The lines `name: number` and `name: number kB` of a file of the kernel's, in bytes; other lines are passed over."""
    found = {}
    for line in text.splitlines():
        name, _, value = line.partition(":")
        words = value.split()
        if words and words[0].isdigit() and words[1:] in ([], ["kB"]):
            found[name] = int(words[0]) * (1024 if words[1:] else 1)
    return found


def written_files(own: Path = Path("/proc/self")) -> set[str]:
    """Regular files that the process has open for writing, or mapped so that writes reach them."""
    found = set()
    for link in (own / "fd").iterdir():
        try:
            if stat.S_ISREG(link.stat().st_mode) and _writable(own / "fdinfo" / link.name):
                found.add(str(link.readlink()))
        except OSError:  # closed meanwhile, as the one that lists them
            continue
    for line in (own / "maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and "w" in fields[1] and "s" in fields[1] and not fields[5].startswith("/dev/"):
            found.add(fields[5])
    return found


def _writable(info: Path) -> bool:
    flags = next(line.split()[1] for line in info.read_text().splitlines() if line.startswith("flags:"))
    return int(flags, 8) & os.O_ACCMODE != os.O_RDONLY


# The planted fault ----------------------------------------------------------------------------------------------


def page_out(parameters: Sequence[nn.Parameter], folder: Path) -> None:
    """Move the parameters' values into files, through to the disk; the parameters are mapped from there."""
    for place, parameter in enumerate(parameters):
        path = folder / f"parameter-{place}"
        mapped = torch.from_file(str(path), shared=True, size=parameter.numel(), dtype=parameter.dtype)
        parameter.data = mapped.view(parameter.shape).copy_(parameter.data)
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def page_in(parameters: Sequence[nn.Parameter], device: str) -> None:
    """Back from the files to the device."""
    for parameter in parameters:
        parameter.data = parameter.data.to(device, copy=True)
