"""Two trainers in turn over one model: the same work, counted; and a model that is quantised where it lies."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lab.errors import LabError
from lab.memory.architecture import Architecture
from lab.models import load_model
from lab.pricing import load_config
from lab.runners import Outcome, execute
from lab.specs import Speed
from lab.speed import SIDES, build, plain_trainer, quantise
from lab.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")


def speed(**changes: Any) -> Speed:
    settings = {"model": "llama-6m", "precision": "fp32", "length": 16, "updates": 2, "rounds": 2}
    return Speed.model_validate({**settings, **changes})


def raced(workspace: Workspace, **changes: Any) -> Outcome:
    return execute(speed(**changes), workspace)


@pytest.mark.parametrize("method", ["full", "lora", "qlora", "adapter", "prefix"])
def test_both_trainers_do_the_same_operations_and_are_timed_as_often(method: str, tiny_workspace: Workspace) -> None:
    found = raced(tiny_workspace, method=method)
    assert found.figures["lab_flops"] == found.figures["plain_flops"] > 0
    assert [len(found.series[f"{side}_seconds"]) for side in SIDES] == [2, 2]
    assert all(found.figures[f"{side}_seconds"] > 0 for side in SIDES)
    assert 0.2 < found.figures["ratio"] < 5  # loose: other processes take their share of so short a time
    assert found.figures["tokens"] == 16
    speed_of_lab = found.figures["lab_tokens_per_second"]
    assert speed_of_lab == pytest.approx(16 / found.figures["lab_seconds"])


def test_each_side_steps_by_its_own_default_unless_one_is_named(tiny_workspace: Workspace) -> None:
    by_default = raced(tiny_workspace, rounds=1).tags
    assert by_default["lab_optimizer"] == "adamw_torch"
    assert by_default["plain_optimizer"].startswith("adamw_torch")
    named = raced(tiny_workspace, rounds=1, optimizer="sgd", plain_optimizer="sgd").tags
    assert (named["lab_optimizer"], named["plain_optimizer"]) == ("sgd", "sgd")


def test_the_rule_of_six_counts_the_base_and_full_fine_tuning_is_near_it(tiny_workspace: Workspace) -> None:
    figures = raced(tiny_workspace, rounds=1).figures
    parameters = Architecture.of(load_config("llama-6m")).parameters()
    assert figures["parameters_base"] == figures["parameters_trainable"] == parameters
    assert figures["rule_flops"] == 6 * parameters * 16
    assert figures["plain_flops"] / figures["rule_flops"] == pytest.approx(1, rel=0.35)  # attention, embedding, norms


def test_the_planted_fault_replays_the_lab_s_forward_pass_alone(tiny_workspace: Workspace) -> None:
    found = raced(tiny_workspace, fault="checkpointing").figures
    assert 1.1 < found["lab_flops"] / found["plain_flops"] < 1.4
    after = raced(tiny_workspace).figures
    assert found["plain_flops"] == after["lab_flops"]


def test_the_plain_trainer_has_the_library_s_defaults(tmp_path: Any) -> None:
    from transformers import TrainingArguments

    settings = speed()
    made = plain_trainer(build(settings), [], settings, 4, str(tmp_path)).args.to_dict()
    default = TrainingArguments(output_dir=str(tmp_path)).to_dict()
    changed = {name for name in made if made[name] != default[name]}
    work = {"max_steps", "per_device_train_batch_size", "learning_rate"}
    silence = {"save_strategy", "report_to", "disable_tqdm"}
    assert changed <= work | silence | {"use_cpu", "dataloader_pin_memory"}  # memory is pinned for a card alone


def test_a_base_that_is_quantised_where_it_lies_is_the_one_that_transformers_loads(tiny_workspace: Workspace) -> None:
    built = build(speed(method="qlora", seed=3))
    loaded = load_model("llama-6m", tiny_workspace.model("llama-6m"), quantisation="nf4", seed=3)
    own, other = (
        {n: p for n, p in model.named_parameters() if "quant" in type(p).__name__.lower() or "4bit" in type(p).__name__}
        for model in (built.get_base_model(), loaded)
    )
    own = {name.replace(".base_layer", ""): p for name, p in own.items()}
    assert own.keys() == other.keys() != set()
    assert all(torch.equal(own[name].data, other[name].data) for name in own)
    trained = [name for name, p in built.named_parameters() if p.requires_grad]
    assert trained
    assert all("lora_" in name for name in trained)


def test_what_cannot_be_built_is_one_line(tiny_workspace: Workspace) -> None:
    with pytest.raises(
        LabError, match="speed: model 'tiny' is prepared; rows of full length are for the bundled shapes"
    ):
        raced(tiny_workspace, model="tiny")
    with pytest.raises(LabError, match="unknown optimizer 'adam_torch'"):
        raced(tiny_workspace, plain_optimizer="adam_torch")
    with pytest.raises(LabError, match=r"speed: a base in int8 is not built here\. Choose nf4 or nf4-double"):
        quantise(build(speed()), "int8", torch.float32)
