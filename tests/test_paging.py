"""What the paging trial reads of the kernel, its planted fault, and its refusal without a card. The card itself: `-m gpu`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lab import paging
from lab.errors import LabError
from lab.paging import (
    Counters,
    away_bytes,
    load_kernels,
    page_in,
    page_out,
    parse,
    state_bytes,
    watch_paging,
    written_files,
)
from lab.runners import execute
from lab.specs import Paging
from lab.workspace import Workspace
from tests.conftest import ROOT, cuda_found

MIB = 2**20


# The kernel's word ----------------------------------------------------------------------------------------------


def test_numbers_come_in_bytes_and_other_lines_are_passed_over() -> None:
    status = "Name:\tpython\nUmask:\t0022\nVmRSS:\t    2048 kB\nVmSwap:\t       0 kB\nCpus_allowed:\t3 7\nSeccomp_filters:\t0\n"
    assert parse(status) == {"Umask": 22, "VmRSS": 2048 * 1024, "VmSwap": 0, "Seccomp_filters": 0}
    assert parse("rchar: 12\nwrite_bytes: 4096\ncancelled_write_bytes: 0\n") == {
        "rchar": 12,
        "write_bytes": 4096,
        "cancelled_write_bytes": 0,
    }
    assert parse("") == {}


def test_the_counters_are_read_and_subtracted(tmp_path: Path) -> None:
    def write(read: int, written: int, cancelled: int, swap: int, resident: int, available: int) -> None:
        own = tmp_path / "self"
        (own / "fd").mkdir(parents=True, exist_ok=True)
        (own / "maps").write_text("")
        (own / "io").write_text(
            f"rchar: 1\nread_bytes: {read}\nwrite_bytes: {written}\ncancelled_write_bytes: {cancelled}\n"
        )
        (own / "status").write_text(f"VmRSS: {resident} kB\nVmSwap: {swap} kB\n")
        (tmp_path / "meminfo").write_text(f"MemTotal: 99 kB\nMemAvailable: {available} kB\n")

    write(read=100, written=1000, cancelled=0, swap=0, resident=10, available=50)
    before = Counters.now(tmp_path)
    write(read=400, written=9000, cancelled=500, swap=3, resident=14, available=45)
    assert Counters.now(tmp_path).since(before) == {
        "read_bytes": 300,
        "written_bytes": 7500,
        "swapped_bytes": 3 * 1024,
        "resident_bytes": 4 * 1024,
        "host_bytes": 5 * 1024,
        "opened_files": 0,
    }


def test_the_kernel_counts_what_is_written_through_to_a_disk(tmp_path: Path) -> None:
    before = Counters.now()
    with (tmp_path / "file").open("wb") as file:
        file.write(os.urandom(8 * MIB))
        file.flush()
        os.fsync(file.fileno())
        during = Counters.now().since(before)
    if during["written_bytes"] == 0:
        pytest.skip("needs a temporary folder on a disk; this one's writes are not counted (a tmpfs?)")
    assert 8 * MIB <= during["written_bytes"] < 12 * MIB
    assert during["opened_files"] == 1


TOUCH = """
import json, torch
from lab.paging import Counters
before = Counters.now()
held = torch.ones(64 * 2**20, dtype=torch.uint8)
print(json.dumps(Counters.now().since(before)))
"""


def test_memory_that_is_touched_counts_as_resident_and_not_as_written() -> None:
    # In a process of its own: in this one a collection of garbage in between gives back what other tests held.
    done = subprocess.run([sys.executable, "-c", TOUCH], capture_output=True, text=True, cwd=ROOT, check=True)
    found = json.loads(done.stdout)
    assert 60 * MIB < found["resident_bytes"] < 100 * MIB
    assert found["written_bytes"] < MIB
    assert found["opened_files"] == 0


def test_files_open_for_writing_or_mapped_are_seen_and_those_open_for_reading_are_not(tmp_path: Path) -> None:
    before = written_files()
    (tmp_path / "read").write_bytes(b"1")
    with (tmp_path / "read").open("rb"), (tmp_path / "written").open("wb"):
        mapped = torch.from_file(str(tmp_path / "mapped"), shared=True, size=MIB, dtype=torch.uint8)
        found = {Path(path).name for path in written_files() - before}
        assert found == {"written", "mapped"}
        del mapped
    assert written_files() - before == set()


# The planted fault, and what the figures count ------------------------------------------------------------------


def test_parameters_that_are_paged_out_lie_in_files_and_come_back_as_they_were(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Linear(256, 1024)
    values = [p.detach().clone() for p in model.parameters()]
    before = written_files()
    page_out(list(model.parameters()), tmp_path)
    assert {Path(path).name for path in written_files() - before} == {"parameter-0", "parameter-1"}
    assert (tmp_path / "parameter-0").read_bytes() == values[0].numpy().tobytes()
    page_in(list(model.parameters()), "cpu")
    assert written_files() - before == set()
    for parameter, value in zip(model.parameters(), values, strict=True):
        assert torch.equal(parameter, value)
    model(torch.ones(1, 256)).sum().backward()
    assert model.weight.grad is not None


def test_the_planted_fault_is_what_the_kernel_counts(tmp_path: Path) -> None:
    model = nn.Linear(1024, 1024)
    before = Counters.now()
    page_out(list(model.parameters()), tmp_path)
    found = Counters.now().since(before)
    if found["written_bytes"] == 0:
        pytest.skip("needs a temporary folder on a disk; this one's writes are not counted (a tmpfs?)")
    assert found["written_bytes"] >= 4 * MIB
    assert found["opened_files"] == 2


def test_parameters_are_away_if_they_are_paged_or_on_another_device() -> None:
    here, there, paged = (nn.Parameter(torch.zeros(10, device=device)) for device in ("cpu", "meta", "cpu"))
    paged.is_paged = True  # type: ignore[attr-defined]
    assert away_bytes([here], "cpu") == 0
    assert away_bytes([here, there, paged], "cpu") == 80


@pytest.mark.parametrize("optimizer", ["paged_adamw_8bit", "paged_adamw_32bit", "lion_8bit"])
def test_the_state_that_is_expected_is_what_the_optimizer_holds_but_for_scales(optimizer: str) -> None:
    from bitsandbytes.optim import GlobalOptimManager
    from transformers import TrainingArguments
    from transformers.trainer import Trainer

    GlobalOptimManager.get_instance().initialize()  # it knows parameters by id, also those of models that are gone
    arguments = TrainingArguments(output_dir="unused", optim=optimizer, use_cpu=True, report_to="none")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    model = nn.Sequential(nn.Linear(256, 512, bias=False), nn.LayerNorm(512))
    made = kind(model.parameters(), **options)
    model(torch.ones(1, 256)).square().sum().backward()
    made.step()
    held = {f"state{n}" for n in (1, 2)}
    found = sum(v.nbytes for state in made.state.values() for key, v in state.items() if key in held)
    assert state_bytes(model, optimizer) == found


def test_the_optimizer_s_kernels_are_loaded_by_a_parameter_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments
    from transformers.trainer import Trainer

    stepped: list[torch.Tensor] = []
    arguments = TrainingArguments(output_dir="unused", optim="paged_adamw_8bit", use_cpu=True, report_to="none")
    trainer = Trainer(model=nn.Linear(2, 2), args=arguments)
    kind = trainer.get_optimizer_cls_and_kwargs(arguments)[0]
    step = kind.step

    def seen(self: Any, *given: Any) -> Any:
        stepped.extend(p for group in self.param_groups for p in group["params"])
        return step(self, *given)

    monkeypatch.setattr(kind, "step", seen)
    load_kernels(trainer, torch.zeros(1, dtype=torch.bfloat16))
    assert [(p.numel(), p.dtype) for p in stepped] == [(8192, torch.bfloat16)]


# Without a card, and with one -----------------------------------------------------------------------------------


def test_a_processor_is_refused_in_one_line(tiny_workspace: Workspace) -> None:
    with pytest.raises(LabError) as refused:
        execute(Paging(model="llama-6m", optimizer="paged_adamw_8bit", device="cpu"), tiny_workspace)
    said = str(refused.value)
    assert said.startswith("paging: device cpu, and torch ")
    assert said.endswith("Run it under --profile gpu on a machine with one.")
    assert "\n" not in said


def test_a_card_that_is_not_there_is_refused(tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LabError, match=r"paging: device cuda, and torch .* finds no CUDA GPU"):
        watch_paging(Paging(model="llama-6m", optimizer="paged_adamw_8bit"), tiny_workspace)


def test_an_optimizer_that_never_pages_is_refused(tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(
        LabError, match=r"paging: adafactor is no optimizer of bitsandbytes\. Choose one of: adamw_bnb_8bit"
    ):
        watch_paging(Paging(model="llama-6m", optimizer="adafactor"), tiny_workspace)


def test_a_card_that_is_full_already_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**33))
    with pytest.raises(
        LabError, match=r"paging: 1\.0 GiB are free on the card and 2\.1 GiB are needed\. Choose a smaller"
    ):
        paging._fill(2 * 2**30)


@pytest.mark.gpu
@pytest.mark.parametrize("changes", [{}, {"room": 0.5}, {"fault": "disk", "optimizer": "adamw_bnb_8bit"}])
def test_on_a_card_the_figures_add_up(changes: dict[str, Any], tiny_workspace: Workspace) -> None:
    assert cuda_found()
    settings = {"model": "llama-3.2-1b", "precision": "bf16", "optimizer": "paged_adamw_8bit", "length": 64, **changes}
    found = execute(Paging.model_validate(settings), tiny_workspace).figures
    assert found["survived"] == 1
    assert found["state_bytes"] >= found["expected_state_bytes"] > 0
    assert found["displaced_bytes"] == max(0, found["state_paged_bytes"] - found["unseen_bytes"])
    assert (found["parameters_away_bytes"] > 0) == ("fault" in changes)
