"""A process for each trial, forked from a server that has imported the stack; a crash costs that trial alone."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from lab import records
from lab.device import limit_allocator
from lab.errors import LabError
from lab.grouped_queries import count_grouped_queries
from lab.origin import Origin, timestamp
from lab.records import Record, Status
from lab.specs import TrialSpec
from lab.workspace import Workspace

PRELOAD = [
    "lab.cli",
    "lab.processes",
    "lab.memory.trial",
    "lab.memory.simulated_trial",
    "bitsandbytes",
    "peft",
    "transformers.optimization",
    "transformers.models.llama.modeling_llama",
    "lab.preloaded",
]
"""Imported once, in this order, by the server from which trials are forked: 10 s that no trial pays again. `lab.cli` is what
started the study: a forked process runs its parent's main module again."""

PRELOAD_FOR_CUDA = [
    "lab.cli",
    "lab.processes",
    "torch",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
]
"""The same where trials use a GPU: no module that starts CUDA when it is imported, as bitsandbytes does, and PEFT and the
Trainer, which import it. A process that is forked after CUDA has started cannot use it."""

NOT_DEFAULT = (
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
    "TORCH_ALLOW_TF32_CUBLAS_OVERRIDE",
    "CUBLAS_WORKSPACE_CONFIG",
)
"""Variables that change bytes or digits on a GPU, and that clusters and containers set: a trial has torch's defaults."""

# On import it asks for a package that is not needed; the server, which imports this module first, would print that.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def start_server(device: str) -> None:
    """Start the server from which trials are forked, unless it runs already. It imports while the caller does something else."""
    if device == "cuda":
        for name in NOT_DEFAULT:
            os.environ.pop(name, None)
        os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # asking whether there is a GPU starts nothing then
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")  # the Trainer would spread a batch over several
    forkserver.set_forkserver_preload(PRELOAD_FOR_CUDA if device == "cuda" else PRELOAD)
    forkserver.ensure_running()


@dataclass
class Running:
    """A trial under way in its own process."""

    spec: TrialSpec
    process: Any
    receiver: Any
    started_at: str
    started: float

    def finish(self, origin: Origin, lenient: bool) -> Record:
        """The record of the trial, whatever became of its process.

        Raises:
            LabError: the trial could not be run because of a user's mistake, unless that is to be recorded.
        """
        answer: dict[str, Any] = {}
        with contextlib.suppress(EOFError, ConnectionError):
            if self.receiver.poll(0):
                answer = self.receiver.recv()
        self.process.join()
        if "error" in answer and lenient:
            answer = {"status": "failed", "message": answer["error"]}
        if "error" in answer:
            raise LabError(f"{self.spec.experiment}/{self.spec.name}: {answer['error']}")
        if not answer:
            answer = {"status": "failed", "message": _how_it_died(self.process.exitcode)}
        provenance = origin.provenance(self.spec, self.started_at, self.seconds)
        return Record(spec=self.spec, provenance=provenance, **answer)

    @property
    def ends(self) -> tuple[Any, Any]:
        """What becomes ready when the trial answers or its process ends: see `multiprocessing.connection.wait`."""
        return self.receiver, self.process.sentinel

    @property
    def seconds(self) -> float:
        """Since it was started."""
        return time.perf_counter() - self.started

    def kill(self) -> None:
        """End it; no record is left."""
        self.process.kill()
        self.process.join()


def start_trial(spec: TrialSpec, workspace: Workspace) -> Running:
    """Start a trial in a process of its own, forked from the server."""
    context = multiprocessing.get_context("forkserver")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_trial_process, args=(spec.model_dump_json(), workspace, sender), name=spec.name)
    running = Running(spec, process, receiver, timestamp(), time.perf_counter())
    process.start()
    sender.close()
    return running


def _how_it_died(exitcode: int | None) -> str:
    if exitcode is not None and exitcode < 0:
        name = signal.Signals(-exitcode).name
        hint = " (often the kernel, when memory runs out)" if name == "SIGKILL" else ""
        return f"the process was ended by {name}{hint}"
    return f"the process ended with exit code {exitcode} and no answer"


def _trial_process(spec_json: str, workspace: Workspace, sender: Any) -> None:
    """The body of a trial's process: run, send figures, end."""
    _end_with_parent()
    # Ctrl-C is the parent's to handle: it ends this process.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    import warnings

    import torch
    import transformers

    warnings.filterwarnings("ignore")
    logging.getLogger().setLevel(logging.ERROR)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    from lab.runners import execute

    spec = TrialSpec.model_validate_json(spec_json)
    torch.set_num_threads(spec.threads)
    limit_allocator()
    count_grouped_queries()
    try:
        outcome = execute(spec.settings, workspace)
        status: Status = "diverged" if outcome.diverged else "ok"
        answer: dict[str, Any] = {
            "status": status,
            "message": outcome.diverged,
            "figures": records.as_numbers(outcome.figures),
            "series": {name: records.as_series(values) for name, values in outcome.series.items()},
            "tags": outcome.tags,
        }
    except LabError as error:
        answer = {"error": str(error)}
    except Exception as error:
        answer = {"status": "oom" if _is_out_of_memory(error) else "failed", "message": _last_line(error)}
    sender.send(answer)
    sender.close()


def _end_with_parent() -> None:
    """End this process when the study's process has gone, so that no trial goes on unseen."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            wait([parent.sentinel])
            os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _is_out_of_memory(error: Exception) -> bool:
    told = ("out of memory", "can't allocate memory", "status_alloc_failed", "memoryallocation")
    return isinstance(error, MemoryError) or any(words in str(error).lower() for words in told)


def _last_line(error: Exception) -> str:
    import traceback

    frame = traceback.extract_tb(error.__traceback__)[-1]
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first} ({Path(frame.filename).name}, line {frame.lineno})"
