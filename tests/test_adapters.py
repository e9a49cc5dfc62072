"""One base that serves two tasks: what the trial says of every method, and that it sees a base that does not switch."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
from peft import PeftModel

from lab import adapters
from lab.errors import LabError
from lab.runners import Outcome, execute
from lab.specs import Adapters
from lab.training import FineTuning
from lab.workspace import Workspace
from tests.conftest import RAGGED_TASK, prepare_embedded

METHODS = ("lora", "dora", "ia3", "mora", "adapter", "prompt", "prefix", "ptuning")
MERGED = ("lora", "dora", "ia3", "mora")


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def two_tasks(tiny_workspace: Workspace, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """The workspace with a second task."""
    made = Workspace(tmp_path_factory.mktemp("two"), "smoke")
    shutil.copytree(tiny_workspace.model("tiny"), made.model("tiny"))
    prepare_embedded(made.data, [RAGGED_TASK, "gcd"], train=32, validation=8, test=8)
    return made


def served(workspace: Workspace, method: str, **options: Any) -> Outcome:
    rate = 0.3 if method == "ia3" else 0.03
    settings = Adapters(
        model="tiny",
        task=RAGGED_TASK,
        further_tasks=("gcd",),
        method=method,
        method_options=options,
        learning_rate=rate,
        updates=3,
        micro_batch_size=4,
    )
    return execute(settings, workspace)


@pytest.mark.parametrize("method", METHODS)
def test_a_switched_base_says_what_dedicated_models_say(method: str, two_tasks: Workspace) -> None:
    outcome = served(two_tasks, method)
    found = outcome.figures
    assert found["switch_distance"] == found["back_distance"] == 0
    assert found["reload_distance"] < 1e-6 < 1e-4 < found["unswitched_distance"]
    assert ("merged_distance" in found) == (method in MERGED)
    assert found.get("merged_distance", 0) < 5e-6
    assert 0 < found["adapter_bytes"] < found["model_bytes"]
    weights = two_tasks.model("tiny") / "model.safetensors"
    assert found["model_bytes"] == weights.stat().st_size
    assert found["own_loss"] != found["other_loss"]
    assert found["switch_seconds"] > 0
    assert found["tasks"] == 2
    assert set(outcome.series) == {f"train_loss_{RAGGED_TASK}", "train_loss_gcd"}


def test_a_base_that_does_not_switch_is_seen(two_tasks: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PeftModel, "set_adapter", lambda *_: None)
    found = served(two_tasks, "lora").figures
    assert found["switch_distance"] > 1e-4
    assert found["back_distance"] > 1e-4


def test_it_is_the_adapter_s_options_that_its_bytes_follow(two_tasks: Workspace) -> None:
    small, large = (served(two_tasks, "lora", rank=rank).figures for rank in (1, 16))
    assert small["adapter_bytes"] < large["adapter_bytes"]


def test_a_training_that_diverged_leaves_no_figures(two_tasks: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FineTuning, "diverged", lambda self: "it went wrong" if self.settings.task == "gcd" else "")
    outcome = served(two_tasks, "lora")
    assert outcome.diverged == "it went wrong"
    assert not outcome.figures


def test_a_method_without_an_adapter_is_refused(two_tasks: Workspace) -> None:
    with pytest.raises(LabError, match=r"save: the model, a LlamaForCausalLM, has no adapter\. Apply a method first"):
        served(two_tasks, "full")


def test_switches_are_timed_in_turn() -> None:
    chosen: list[str] = []

    class Served:
        def set_adapter(self, name: str) -> None:
            chosen.append(name)

    assert adapters._switch_seconds(Served(), ("a", "b", "c")) >= 0
    assert chosen[:4] == ["a", "b", "c", "a"]
    assert len(chosen) == adapters.SWITCHES
