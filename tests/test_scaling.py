"""Models of several sizes: they read the same tokens, and what is said of each agrees with counts by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from lab import corpus, evaluation, scaling
from lab.errors import LabError
from lab.evaluation import IGNORED, Row
from lab.models import load_model
from lab.runners import Outcome, execute
from lab.scaling import Base, blind_nats, labelled, pretrain, read_recipe
from lab.specs import Scaling, TrialSpec
from lab.training import FineTuning
from lab.workspace import Workspace
from tests.conftest import RAGGED_TASK

TEXT = {
    "vocabulary": 400,
    "people": 2,
    "repetitions": 6,
    "prose_documents": 20,
    "task_documents": 10,
    "tokenizer_prompts": 10,
    "steps": 6,
    "batch": 4,
}
LARGER = {"hidden_size": 32, "layers": 2, "heads": 2, "key_value_heads": 1, "intermediate_size": 64}
SMALLER = {**LARGER, "hidden_size": 16, "intermediate_size": 32}


pytestmark = pytest.mark.usefixtures("one_thread")


def settings(shape: dict[str, int] = LARGER, **changes: Any) -> Scaling:
    chosen: dict[str, Any] = {"recipe": {**TEXT, **shape}, "task": RAGGED_TASK, "learning_rate": 0.01, "questions": 8}
    chosen |= {"tuning_rates": (0.001, 0.01), "tuning_updates": 2, "micro_batch_size": 4}
    return Scaling.model_validate(chosen | changes)


def scaled(workspace: Workspace, shape: dict[str, int] = LARGER, **changes: Any) -> Outcome:
    return execute(settings(shape, **changes), workspace)


@pytest.fixture(scope="module")
def larger(tiny_workspace: Workspace) -> Outcome:
    return scaled(tiny_workspace)


def test_two_sizes_read_the_same_tokens_in_the_same_order(larger: Outcome, tiny_workspace: Workspace) -> None:
    smaller = scaled(tiny_workspace, SMALLER)
    assert smaller.tags["data_order"] == larger.tags["data_order"]
    assert smaller.figures["tokens"] == larger.figures["tokens"] == 6 * 4 * 128
    assert smaller.figures["parameters_total"] < larger.figures["parameters_total"]
    for figure in ("weights_bytes", "held_bytes", "steady_bytes", "peak_bytes"):
        assert smaller.figures[figure] < larger.figures[figure]
    for figure in ("blind_bits_per_byte", "blind_recall", "blind_loss", "vocabulary"):
        assert smaller.figures[figure] == larger.figures[figure]
    assert len(larger.series["pretraining_loss"]) == 6


def test_another_seed_reads_other_tokens_and_the_same_settings_give_the_same_numbers(
    larger: Outcome, tiny_workspace: Workspace
) -> None:
    again = scaled(tiny_workspace)
    assert (again.figures, again.series, again.tags) == (larger.figures, larger.series, larger.tags)
    other = scaled(tiny_workspace, seed=1)
    assert other.tags["data_order"] != larger.tags["data_order"]


def test_bytes_are_those_that_a_count_by_hand_gives(larger: Outcome) -> None:
    recipe = read_recipe(settings())
    model = AutoModelForCausalLM.from_config(recipe.config(0, 1), dtype=torch.float32)
    parameters = {id(p): p.numel() for p in model.parameters()}
    assert larger.figures["parameters_total"] == sum(parameters.values())
    buffers = {b.data_ptr(): b.numel() * b.element_size() for b in model.buffers()}
    assert larger.figures["weights_bytes"] - 4 * larger.figures["parameters_total"] == sum(buffers.values())
    # fp32 weights and gradients, and AdamW's two moments.
    assert larger.figures["held_bytes"] == pytest.approx(16 * larger.figures["parameters_total"], rel=0.01)
    assert larger.figures["held_bytes"] < larger.figures["peak_bytes"]


def test_pretraining_teaches_and_a_rate_that_moves_nothing_does_not(larger: Outcome, tiny_workspace: Workspace) -> None:
    idle = scaled(tiny_workspace, learning_rate=1e-9)
    for figure in ("validation_loss", "general_bits_per_byte"):
        assert larger.figures[figure] < 0.95 * idle.figures[figure]
    guess = math.log(idle.figures["vocabulary"])
    assert idle.figures["validation_loss"] == pytest.approx(guess, rel=0.1)


def test_the_saved_model_is_the_one_that_was_examined(tiny_workspace: Workspace, tmp_path: Any) -> None:
    made = scaling._Made(tiny_workspace.root, tiny_workspace.profile, tmp_path / "model")
    base = pretrain(settings(), made)
    assert made.model("smol") == made.model("tiny") == tmp_path / "model"
    assert made.data == tiny_workspace.data
    model = load_model("tiny", made.model("tiny"))
    assert AutoConfig.from_pretrained(made.base).hidden_size == 32
    stories = corpus.general_prose(scaling.HELD_OUT_STORIES, 0, "validation")
    tokenizer = scaling.FineTuning(scaling.tuning(settings(), 0.01), made).tokenizer
    rows = [evaluation.encode_text(tokenizer, text) for text in stories]
    assert evaluation.mean_nats(evaluation.score(model, rows)) == base.figures["validation_loss"]


def test_the_rate_with_the_least_validation_loss_is_tested(larger: Outcome) -> None:
    losses = larger.series["tuning_validation_loss"]
    assert larger.figures["task_validation_loss"] == min(losses)
    assert larger.figures["tuning_rate"] == (0.001, 0.01)[losses.index(min(losses))]
    assert {"test_loss", "test_accuracy"} <= set(larger.figures)


def test_a_guess_by_frequency_is_the_entropy_that_a_count_gives() -> None:
    read = [Row([0, 1, 1, 2], [IGNORED, 1, 1, 2]), Row([1], [1])]
    asked = [Row([3, 1, 2], [IGNORED, 1, 2]), Row([3], [3])]
    counts = torch.tensor([0, 3, 1, 0], dtype=torch.float64) + 1
    logs = (counts / counts.sum()).log()
    assert labelled(asked) == [1, 2, 3]
    assert blind_nats(read, asked, 4) == pytest.approx(float(-logs[[1, 2, 3]].sum()), rel=1e-12)
    assert blind_nats([], asked, 4) == pytest.approx(3 * math.log(4))


def test_the_commonest_value_of_each_attribute_is_what_a_guess_recalls(larger: Outcome) -> None:
    values: dict[str, list[str]] = {}
    for fact in corpus.facts(2, 0):
        values.setdefault(fact.attribute, []).append(fact.value)
    right = sum(max(own.count(value) for value in own) for own in values.values())
    assert larger.figures["blind_recall"] == right / sum(map(len, values.values()))


def test_a_rate_that_diverges_is_left_out(tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FineTuning, "diverged", lambda self: "so" if self.settings.learning_rate > 0.005 else "")
    found = scaled(tiny_workspace)
    assert found.series["tuning_validation_loss"][1] is None
    assert found.figures["tuning_rate"] == 0.001
    assert not found.diverged
    monkeypatch.setattr(FineTuning, "diverged", lambda self: "so")
    none = scaled(tiny_workspace)
    assert none.diverged == "tuning diverged at every rate"
    assert "test_loss" not in none.figures


@pytest.mark.parametrize("losses", [[], [2.0, math.nan]])
def test_pretraining_that_diverged_leaves_no_figures(
    losses: list[float], tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaling, "pretrain", lambda *_: Base(losses, {"validation_loss": 1.0}, "order"))
    found = scaled(tiny_workspace)
    assert found.diverged == f"the loss of pretraining is not finite after update {len(losses)}"
    assert not found.figures


def test_a_recipe_with_a_slip_is_refused_before_anything_is_trained(tiny_workspace: Workspace) -> None:
    with pytest.raises(LabError, match=r"scaling: recipe: poeple is not a known key\. Did you mean 'people'\?"):
        scaled(tiny_workspace, {**LARGER, "poeple": 3})
    with pytest.raises(LabError, match=r"scaling: recipe: hidden_size 30 must be an even multiple of heads 4"):
        scaled(tiny_workspace, {**LARGER, "hidden_size": 30, "heads": 4})


def test_the_trial_reads_its_task_and_no_prepared_model() -> None:
    spec = TrialSpec(experiment="x", name="x", arm="x", settings=settings())
    assert spec.tasks() == [RAGGED_TASK]
    assert (spec.models(), spec.methods(), spec.runs) == (set(), frozenset(), ())
