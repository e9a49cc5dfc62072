"""The trial that writes a large data set, reads it in the ways of `datasets`, counts private memory, and removes it."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import multiprocessing
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy

from lab.errors import LabError
from lab.runners import Outcome
from lab.specs import LargeDataset
from lab.workspace import Workspace

BATCH = 1000
"""Rows written and read at a time, the library's own default."""

FEW = 2000
"""Rows that are read one by one, sampled, and mapped by a function that changes."""

SHUFFLED_BATCH = 100
"""Rows read at a time from a shuffled data set, whose order is what takes memory."""

FILES = 4
"""Of a data set of any length: what a stream holds follows their number too."""

ROOM = 2.1
"""Times its bytes that a data set needs on the disk: `map` writes it anew."""

POOL_BYTES = 16 * 2**20
INTERVAL_SECONDS = 0.01

CALLS: list[int] = []
"""The rows of each batch that a mapped function was called with, in this process. The functions find it by import: what
they refer to would count as part of them when `map` looks for their cached result."""


def read_at_scale(settings: LargeDataset, workspace: Workspace) -> Outcome:
    """Write the data set, do each of `OPERATIONS` in a process of its own, and remove it.

    A row is a number and a document of `row_bytes` characters. Private memory is anonymous resident memory: it has no
    file behind it, so it cannot be dropped and read again, as the page cache can.

    Figures:
        rows, data_bytes: rows of the data set, and its bytes on disk.
        <operation>_private_bytes: most private memory during the operation beyond that of the process before it.
        <operation>_resident_bytes: the same with the mapped pages of files: what a careless count takes for its need.
        <operation>_seconds: time of the operation, opening the data set included.
        <operation>_right: 1 if it saw the rows and characters that it should have seen.
        map_calls, map_again_calls: rows that the mapped function was called with, and those when another process asked for
            the same.
        map_again_seconds: time of that second one.
        captured_calls, few: rows of `few` that were computed again where a value that the function captures had changed.
        edited_calls: those where the file of a function that is imported had been edited.
        edited_stale: rows of the result that are those of the function before it was edited.
    `objects` has the figures of `iterate` alone.

    Raises:
        LabError: the disk lacks room, or the platform has no count of private memory.
        MemoryError: memory ran out.
    """
    if not STATUS.is_file():
        raise LabError(
            f"{STATUS} is not there to count private memory by. Leave large_datasets out of the profile here."
        )
    import datasets  # noqa: F401  # before the forks, which would count its memory as their own

    name = f"data-{settings.way}-{settings.total_bytes}-{settings.row_bytes}-{settings.seed}"
    rows = max(FEW, settings.total_bytes // settings.row_bytes)
    outcome = Outcome(tags={"way": settings.way})
    with _scratch(workspace.scratch / name, settings.total_bytes) as folder:
        outcome.figures |= _apart(_write, folder, rows, settings)
        operations = OPERATIONS if settings.way != "objects" else {"iterate": _iterate_objects}
        for label, operation in operations.items():
            found = _apart(_measured, operation, folder, rows, settings)
            outcome.figures |= {f"{label}_{figure}": value for figure, value in found.items()}
        if settings.way != "objects":
            again = _apart(_measured, _map, folder, rows, settings)
            outcome.figures |= {"map_again_calls": again["calls"], "map_again_seconds": again["seconds"], "few": FEW}
            _apart(_map_few, folder, settings, "?")
            outcome.figures["captured_calls"] = _apart(_map_few, folder, settings, "!")["calls"]
            _apart(_map_imported, folder, settings, "?")
            edited = _apart(_map_imported, folder, settings, "!")
            outcome.figures |= {"edited_calls": edited["calls"], "edited_stale": edited["stale"]}
    return outcome


@contextlib.contextmanager
def _scratch(folder: Path, total_bytes: int) -> Iterator[Path]:
    """An empty folder with room for the data set; what a killed trial left there goes, and all goes at the end."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    try:
        free = shutil.disk_usage(folder).free
        if free < ROOM * total_bytes:
            raise LabError(
                f"a data set of {total_bytes / 1e9:g} GB needs {ROOM * total_bytes / 1e9:.1f} GB of disk, and {free / 1e9:.1f}"
                " are free. Free some, or lower gigabytes of large_datasets in params.yaml."
            )
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _write(folder: Path, rows: int, settings: LargeDataset) -> dict[str, float]:
    """Write `rows` documents, drawn letters, as a folder that `load_from_disk` reads.

    The folder is that of a data set of a few rows, whose files are then written anew: saving the whole from another file
    would write all of it twice.
    """
    import datasets
    from datasets.arrow_writer import ArrowWriter

    datasets.disable_progress_bars()
    features = datasets.Features({"id": datasets.Value("int64"), "text": datasets.Value("string")})
    few = datasets.Dataset.from_dict({"id": range(FILES), "text": [""] * FILES}, features=features)
    few.save_to_disk(str(folder / "saved"), num_shards=FILES)
    batches = _batches(rows, settings)
    share = math.ceil(math.ceil(rows / BATCH) / FILES)
    for path in _files(folder):
        with ArrowWriter(path=str(path), features=features) as writer:
            for batch in islice(batches, share):
                writer.write_table(batch)
            writer.finalize()
    return {"rows": rows, "data_bytes": sum(path.stat().st_size for path in _files(folder))}


def _batches(rows: int, settings: LargeDataset) -> Iterator[Any]:
    """Tables of up to `BATCH` rows. Documents are stretches of one pool: drawing every letter would take the longest."""
    import pyarrow  # type: ignore[import-untyped]

    draw, width = numpy.random.default_rng(settings.seed), settings.row_bytes
    alphabet = numpy.frombuffer(b"abcdefghijklmnopqrstuvwxyz      ", dtype=numpy.uint8)
    pool = alphabet[draw.integers(0, 32, size=max(POOL_BYTES, 2 * BATCH * width), dtype=numpy.uint8)]
    for start in range(0, rows, BATCH):
        count = min(BATCH, rows - start)
        at = int(draw.integers(0, len(pool) - count * width))
        ends = pyarrow.py_buffer(numpy.arange(count + 1, dtype=numpy.int32) * width)
        text = pyarrow.StringArray.from_buffers(count, ends, pyarrow.py_buffer(pool[at : at + count * width]))
        yield pyarrow.table({"id": numpy.arange(start, start + count), "text": text})


def _files(folder: Path) -> list[Path]:
    """Those of the data set, without the caches that `filter` and `map` put beside them."""
    return sorted((folder / "saved").glob("data-*.arrow"))


# Operations: each opens the data set and returns its own figures --------------------------------------------------


def _open(folder: Path, settings: LargeDataset) -> Any:
    import datasets

    datasets.disable_progress_bars()
    return datasets.load_from_disk(str(folder / "saved"), keep_in_memory=settings.way == "in-memory")


def _right(characters: int, rows: int, settings: LargeDataset) -> dict[str, float]:
    return {"right": characters == rows * settings.row_bytes}


def _iterate(folder: Path, rows: int, settings: LargeDataset) -> dict[str, float]:
    """Every row once, a batch at a time."""
    characters = sum(sum(map(len, batch["text"])) for batch in _open(folder, settings).iter(BATCH))
    return _right(characters, rows, settings)


def _iterate_objects(folder: Path, rows: int, settings: LargeDataset) -> dict[str, float]:
    """Every row once, from a list of dictionaries."""
    held = [
        {"id": number, "text": text}
        for batch in _open(folder, settings).iter(BATCH)
        for number, text in zip(batch["id"], batch["text"], strict=True)
    ]
    return _right(sum(len(row["text"]) for row in held), rows, settings)


def _random(folder: Path, rows: int, settings: LargeDataset) -> dict[str, float]:
    """A few rows one by one, from anywhere."""
    data = _open(folder, settings)
    places = numpy.random.default_rng(settings.seed).integers(0, rows, FEW)
    found = [data[int(place)] for place in places]
    same = all(row["id"] == place for row, place in zip(found, places, strict=True))
    return {"right": same and _right(sum(len(row["text"]) for row in found), FEW, settings)["right"]}


def _shuffle(folder: Path, rows: int, settings: LargeDataset) -> dict[str, float]:
    """A new order of all rows, read from its beginning."""
    shuffled = _open(folder, settings).shuffle(seed=settings.seed).iter(SHUFFLED_BATCH)
    seen = [number for batch in islice(shuffled, FEW // SHUFFLED_BATCH) for number in batch["id"]]
    return {"right": len(set(seen)) == FEW and seen != list(range(FEW))}


def _sample(folder: Path, rows: int, settings: LargeDataset) -> dict[str, float]:
    """A few rows by their numbers, as a data set."""
    places = numpy.random.default_rng(settings.seed).integers(0, rows, FEW)
    return {"right": _open(folder, settings).select(places)["id"][:] == places.tolist()}


def _filter(folder: Path, rows: int, settings: LargeDataset) -> dict[str, float]:
    """The rows whose text passes: about half of them."""

    def passes(batch: dict[str, list[Any]]) -> list[bool]:
        return [text < "i" for text in batch["text"]]

    kept = len(_open(folder, settings).filter(passes, batched=True))
    return {"right": 0.25 * rows < kept < 0.75 * rows}


def _map(folder: Path, rows: int, settings: LargeDataset) -> dict[str, float]:
    """Every text written anew."""

    def louder(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        from lab.large_datasets import CALLS

        CALLS.append(len(batch["text"]))
        return {"text": [text.upper() for text in batch["text"]]}

    found = _open(folder, settings).map(louder, batched=True)
    last = found[rows - 1]
    return {"right": last["id"] == rows - 1 and last["text"].isupper(), "calls": sum(CALLS)}


def _stream(folder: Path, rows: int, settings: LargeDataset) -> dict[str, float]:
    """Every row once from the files, shuffled within a buffer, without opening the whole."""
    import datasets

    files = [str(path) for path in _files(folder)]
    cache = str(folder / "cache")
    data = datasets.load_dataset("arrow", data_files=files, split="train", streaming=True, cache_dir=cache)
    shuffled = data.shuffle(seed=settings.seed, buffer_size=BATCH)
    return _right(sum(sum(map(len, batch["text"])) for batch in shuffled.iter(BATCH)), rows, settings)


OPERATIONS: dict[str, Callable[[Path, int, LargeDataset], dict[str, float]]] = {
    "iterate": _iterate,
    "random": _random,
    "shuffle": _shuffle,
    "sample": _sample,
    "filter": _filter,
    "map": _map,
    "stream": _stream,
}


def _map_few(folder: Path, settings: LargeDataset, mark: str) -> dict[str, float]:
    """A few rows mapped by a function that captures `mark`."""

    def marked(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        from lab.large_datasets import CALLS

        CALLS.append(len(batch["id"]))
        return {"mark": [mark for _ in batch["id"]]}

    return _marked(folder, settings, marked, mark)


def _map_imported(folder: Path, settings: LargeDataset, mark: str) -> dict[str, float]:
    """The same, `mark` written into the source of a function that is imported from a file."""
    source = "from lab.large_datasets import CALLS\n\ndef marked(batch):\n    CALLS.append(len(batch['id']))\n"
    (folder / "lab_marking.py").write_text(f"{source}    return {{'mark': [{mark!r} for _ in batch['id']]}}\n")
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    return _marked(folder, settings, importlib.import_module("lab_marking").marked, mark)


def _marked(folder: Path, settings: LargeDataset, function: Any, mark: str) -> dict[str, float]:
    found = _open(folder, settings).select(range(FEW)).map(function, batched=True)
    return {"calls": sum(CALLS), "stale": sum(one != mark for one in found["mark"][:])}


# Memory, and processes ------------------------------------------------------------------------------------------

STATUS = Path("/proc/self/status")


def memory() -> tuple[int, int]:
    """Private and resident bytes of this process: anonymous pages, and those with the mapped pages of files.

    Source:
        proc(5): RssAnon and VmRSS.
    """
    found = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    private, resident = (1024 * int(found[name].split()[0]) for name in ("RssAnon", "VmRSS"))
    return private, resident


class Peak:
    """The most private and resident memory between `with` and the end of the block, beyond that before it."""

    def __enter__(self) -> Peak:
        self.before = self.most = memory()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._ended.wait(INTERVAL_SECONDS):
            self._look()

    def _look(self) -> None:
        private, resident = memory()
        self.most = max(self.most[0], private), max(self.most[1], resident)

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()
        self._look()

    @property
    def private_bytes(self) -> int:
        """Of memory without a file behind it."""
        return self.most[0] - self.before[0]

    @property
    def resident_bytes(self) -> int:
        """Of all memory."""
        return self.most[1] - self.before[1]


def _measured(
    operation: Callable[[Path, int, LargeDataset], dict[str, float]], folder: Path, rows: int, settings: LargeDataset
) -> dict[str, float]:
    with Peak() as peak:
        started = time.perf_counter()
        own = operation(folder, rows, settings)
        seconds = time.perf_counter() - started
    figures = {"private_bytes": peak.private_bytes, "resident_bytes": peak.resident_bytes, "seconds": seconds}
    return {**figures, **{name: float(value) for name, value in own.items()}}


def _apart(function: Callable[..., dict[str, float]], *arguments: Any) -> dict[str, float]:
    """What `function` returns in a fork of this process, which no other operation has left anything in.

    Raises:
        MemoryError: the process was killed, or ran out of memory.
        RuntimeError: it failed; with its message.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(function, arguments, sender, os.getpid()))
    process.start()
    sender.close()
    try:
        answer = json.loads(receiver.recv())
    except EOFError:
        process.join()
        raise MemoryError(f"{function.__name__} was ended with exit code {process.exitcode}: out of memory?") from None
    process.join()
    if "error" in answer:
        raise (MemoryError if answer["memory"] else RuntimeError)(answer["error"])
    return answer


def _answer(function: Callable[..., dict[str, float]], arguments: Any, sender: Any, parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    gc.freeze()  # else each collection copies the pages of all that the trial has imported
    try:
        answer: dict[str, Any] = function(*arguments)
    except Exception as error:
        text = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
        answer = {"error": text, "memory": isinstance(error, MemoryError)}
    sender.send(json.dumps(answer, default=float))


def _end_with(parent: int) -> None:
    """End this process when the trial has gone."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)
