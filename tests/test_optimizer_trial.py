"""Optimizers by name: what runs is told from what lacks a package or a GPU and from what is broken; what is learnt is scored."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.trainer import Trainer

from experiments.optimizers import ADAMW, NAMES
from lab import data, evaluation
from lab.errors import LabError
from lab.models import load_tokenizer
from lab.optimizer_trial import why_not
from lab.runners import Outcome, execute
from lab.specs import Learning, Memory, OptimizerTry, Training
from lab.training import FineTuning
from lab.workspace import Workspace
from tests.conftest import RAGGED_TASK

pytestmark = pytest.mark.usefixtures("one_thread")


def tried(workspace: Workspace, optimizer: str, **changes: Any) -> Outcome:
    return execute(OptimizerTry(model="tiny", optimizer=optimizer, batch=2, length=16, **changes), workspace)


def test_the_names_are_those_of_the_installed_trainer_and_the_first_is_its_default(tmp_path: Any) -> None:
    from transformers import TrainingArguments
    from transformers.training_args import OptimizerNames

    assert sorted(NAMES) == sorted(entry.value for entry in OptimizerNames)
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none")
    assert arguments.optim == ADAMW


# Does it run? ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adafactor", "adamw_bnb_8bit", "sgd"])
def test_what_runs_leaves_what_the_ledger_measures(optimizer: str, tiny_workspace: Workspace) -> None:
    found = tried(tiny_workspace, optimizer, step="for-loop")
    assert found.tags["standing"] == "runs"
    assert (found.figures["runs"], found.figures["falls_back"]) == (1, 0)
    assert 0 < found.figures["largest_move"] < 1
    step = "fused" if optimizer == ADAMW else "for-loop"
    memory = execute(Memory(model="tiny", optimizer=optimizer, batch=2, length=16, step=step), tiny_workspace)
    for name in ("optimizer_state_bytes", "peak_bytes", "steady_bytes", "parameters_trainable", "state_large_bytes"):
        assert found.figures[name] == memory.figures[name], name


def test_bytes_of_state_are_those_of_a_count_by_hand(tiny_workspace: Workspace) -> None:
    adamw, sgd = (tried(tiny_workspace, name).figures for name in (ADAMW, "sgd"))
    parameters = adamw["parameters_trainable"]
    assert 0 <= adamw["optimizer_state_bytes"] - 8 * parameters < 4 * 100  # a count of steps for each tensor
    assert sgd["optimizer_state_bytes"] == 0


def test_the_classes_behind_the_names_are_told(tiny_workspace: Workspace) -> None:
    assert tried(tiny_workspace, "lion_8bit").tags["class"] == "bitsandbytes.Lion"
    assert tried(tiny_workspace, "adafactor", method="lora").tags["class"] == "transformers.Adafactor"


def test_one_that_falls_back_says_so(tiny_workspace: Workspace) -> None:
    found = tried(tiny_workspace, "paged_adamw_8bit")
    assert (found.figures["runs"], found.figures["falls_back"]) == (1, 1)
    assert found.tags["reason"].startswith("Paged optimizers are not supported on CPU")


def test_one_without_its_package_leaves_a_record_that_names_it(tiny_workspace: Workspace) -> None:
    found = tried(tiny_workspace, "adamw_anyprecision")
    assert found.diverged == ""
    assert (found.tags["standing"], found.tags["package"]) == ("needs a package", "torchdistx")
    assert found.tags["reason"] == "ValueError: Please install https://github.com/pytorch/torchdistx"
    assert found.figures["runs"] == 0
    assert "peak_bytes" not in found.figures


class Idle(torch.optim.SGD):
    """A planted fault: a step that does nothing."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


class Exploding(torch.optim.SGD):
    """A planted fault: a step that ends in no number."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                p.fill_(torch.nan)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Idle, "the updates moved no parameter"),
        (Exploding, "a parameter is no finite number after the updates"),
    ],
)
def test_one_that_steps_wrongly_is_broken(
    kind: Any, reason: str, tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", lambda *_: (kind, {"lr": 0.1}))
    found = tried(tiny_workspace, "sgd")
    assert (found.tags["standing"], found.tags["reason"], found.figures["runs"]) == ("broken", reason, 0)


def test_running_out_of_memory_is_not_put_down_to_the_optimizer(
    tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(Trainer, "create_optimizer", refuse)
    with pytest.raises(torch.OutOfMemoryError):
        tried(tiny_workspace, "sgd")


def test_an_unknown_name_is_refused(tiny_workspace: Workspace) -> None:
    with pytest.raises(LabError, match=r"unknown optimizer 'adamw8bit'\. Did you mean 'adamw_8bit'\?"):
        tried(tiny_workspace, "adamw8bit")


def chained() -> Exception:
    """As the Trainer raises it where a module cannot be imported."""
    error = ValueError("Trainer failed to import syncfree AdamW from torch_xla.")
    error.__context__ = ModuleNotFoundError("No module named 'torch_xla'", name="torch_xla.amp")
    return error


@pytest.mark.parametrize(
    ("error", "device", "standing"),
    [
        (chained(), "cpu", ("needs a package", "torch_xla")),
        (
            ImportError(
                "You need to install `galore_torch` in order to use GaLore. Install it with `pip install git+x`"
            ),
            "cpu",
            ("needs a package", "galore_torch"),
        ),
        (ImportError("You need to have `torchao>=0.4.0` in order"), "cpu", ("needs a package", "torchao")),
        (ValueError("Please install grokadamw with `pip install grokadamw`"), "cpu", ("needs a package", "grokadamw")),
        (ValueError("Please install https://github.com/pytorch/x"), "cpu", ("needs a package", "x")),
        (AssertionError("Torch not compiled with CUDA enabled"), "cpu", ("needs a GPU", "")),
        (
            RuntimeError("not available in CPU-only version of bitsandbytes.\nPlease install with"),
            "cpu",
            ("needs a GPU", ""),
        ),
        (RuntimeError("CUDA error: an illegal memory access"), "cuda", ("broken", "")),
        (RuntimeError("the tensors have different shapes"), "cpu", ("broken", "")),
        (ValueError("all parameters must have gradients"), "cpu", ("broken", "")),
    ],
)
def test_what_an_error_says_is_read(error: Exception, device: str, standing: tuple[str, str]) -> None:
    assert why_not(error, device) == standing


# What is learnt by it? ------------------------------------------------------------------------------------------


def learnt(workspace: Workspace, **changes: Any) -> Outcome:
    settings: dict[str, Any] = {
        "model": "tiny",
        "task": RAGGED_TASK,
        "updates": 3,
        "micro_batch_size": 4,
        "questions": 8,
    }
    return execute(Learning(**{**settings, **changes}), workspace)


def test_the_scores_are_those_of_a_training_trial_with_the_same_settings(tiny_workspace: Workspace) -> None:
    short = learnt(tiny_workspace)
    whole = execute(
        Training(model="tiny", task=RAGGED_TASK, updates=3, micro_batch_size=4, questions=8, evaluations=1),
        tiny_workspace,
    )
    assert short.series["train_loss"] == whole.series["train_loss"]
    for name in ("validation_loss", "validation_accuracy", "test_loss", "test_accuracy"):
        assert short.figures[name] == whole.figures[name]
    assert short.tags["data_order"] == whole.tags["data_order"]


def test_two_optimizers_read_the_same_tokens_and_the_base_none(tiny_workspace: Workspace) -> None:
    adamw, sgd, base = (learnt(tiny_workspace, **c) for c in ({}, {"optimizer": "sgd"}, {"updates": 0}))
    assert adamw.tags["data_order"] == sgd.tags["data_order"]
    assert adamw.figures["tokens"] == sgd.figures["tokens"] > base.figures["tokens"] == 0
    # One pass over the 64 rows reads each token once.
    whole = learnt(tiny_workspace, updates=16)
    rows = evaluation.example_rows(
        load_tokenizer(tiny_workspace.model("tiny")), data.load_task(tiny_workspace.data, RAGGED_TASK, "train")
    )
    assert whole.figures["tokens"] == sum(len(row.input_ids) for row in rows)
    assert "train_loss" not in base.series


def test_a_rate_of_nearly_nothing_leaves_the_base_as_it_is(tiny_workspace: Workspace) -> None:
    idle = learnt(tiny_workspace, optimizer="sgd", learning_rate=1e-9)
    base = learnt(tiny_workspace, updates=0)
    assert idle.figures["test_loss"] == pytest.approx(base.figures["test_loss"], rel=1e-6)
    assert learnt(tiny_workspace).figures["test_loss"] != pytest.approx(base.figures["test_loss"], rel=1e-6)


def test_a_run_that_diverged_has_no_scores(tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FineTuning, "diverged", lambda self: "it went wrong")
    found = learnt(tiny_workspace)
    assert found.diverged == "it went wrong"
    assert set(found.figures) == {"tokens"}
