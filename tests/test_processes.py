"""The server from which trials are forked, and what their ends are taken for."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest

from lab.processes import NOT_DEFAULT, PRELOAD_FOR_CUDA, _is_out_of_memory, start_server
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20 MiB"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)"), True),
        (RuntimeError("cudaErrorMemoryAllocation at line 9"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
    ],
)
def test_a_library_that_finds_no_memory_is_out_of_memory_too(error: Exception, status: bool) -> None:
    assert _is_out_of_memory(error) == status


def test_the_server_freezes_last_what_it_has_imported_and_nothing_where_cuda_could_start(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[list[str]] = []
    monkeypatch.setattr("lab.processes.forkserver.set_forkserver_preload", asked.append)
    monkeypatch.setattr("lab.processes.forkserver.ensure_running", lambda: None)
    for name in (*NOT_DEFAULT, "PYTORCH_NVML_BASED_CUDA_CHECK", "CUDA_VISIBLE_DEVICES"):
        monkeypatch.setenv(name, "1")
    start_server("cpu")
    assert asked.pop()[-1] == "lab.preloaded"
    start_server("cuda")
    assert asked == [PRELOAD_FOR_CUDA]
    assert not set(NOT_DEFAULT) & set(os.environ)


def test_what_is_frozen_is_the_imported_stack() -> None:
    script = "import gc, lab.preloaded; print(gc.get_freeze_count())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert int(done.stdout) > 100_000


@pytest.mark.parametrize(("modules", "starts"), [(PRELOAD_FOR_CUDA, False), (["bitsandbytes"], True)])
def test_what_the_server_of_a_gpu_s_trials_imports_starts_no_cuda(modules: list[str], starts: bool) -> None:
    # With a GPU pretended to be there, whoever asks more of it than whether it is there would have started CUDA.
    script = """
        import importlib, os, sys, torch

        def started(*_, **__):
            print("started", flush=True)
            os._exit(3)

        torch.cuda.is_available = lambda: True
        for name in ("_lazy_init", "init", "get_device_capability", "get_device_properties", "get_device_name"):
            setattr(torch.cuda, name, started)
        for name in sys.argv[1:]:
            importlib.import_module(name)
    """
    command = [sys.executable, "-c", textwrap.dedent(script), *modules]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode != 0) == starts, done.stdout + done.stderr  # bitsandbytes reaches for CUDA in its own way
