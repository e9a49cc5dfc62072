"""The trial that makes a model of some size: pretrained on the lab's text, examined, and tuned on a task."""

from __future__ import annotations

import hashlib
import math
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from lab import corpus, data, evaluation
from lab.corpus import Fact
from lab.evaluation import Row
from lab.memory.closed_form import predict
from lab.memory.ledger import held_bytes, weights
from lab.memory.workload import Workload, workspace_bytes
from lab.params import parse
from lab.pretraining import TinyRecipe, is_known, pack
from lab.runners import Outcome
from lab.specs import Scaling, Training
from lab.training import HELD_OUT_STORIES, FineTuning, build_trainer
from lab.workspace import Workspace


def scale(settings: Scaling, workspace: Workspace) -> Outcome:
    """Pretrain a model of the recipe's shape, ask what it knows, and tune it on the task.

    Text, tokenizer and order of batches follow from the seed and from what the recipe says of them, not from the shape:
    models of several sizes read the same tokens in the same order.

    Figures:
        parameters_total: tied weights once.
        weights_bytes: held by the weights.
        steady_bytes, peak_bytes: of full fine-tuning with the trial's micro-batch, by closed form; the first between updates.
        held_bytes: weights, gradients and optimizer state: what no smaller batch spares.
        tokens: read in pretraining, padding included.
        validation_loss: on invented stories of another split, nats per token; what the rate of pretraining is chosen by.
        general_bits_per_byte: on stories of the test split.
        blind_bits_per_byte: of a guess by how often each token stood in the pretraining text.
        recall: share of the facts that are known; blind_recall: by naming the commonest value of each attribute.
        task_validation_loss, test_loss, test_accuracy: after tuning at the rate with the least validation loss, which is
            `tuning_rate`; losses in nats per answer token.
        blind_loss: of a guess by how often each token is in the answers of the training split.
    Series:
        pretraining_loss: of each update; tuning_validation_loss: of each of the rates, none where the run diverged.
    Tags:
        data_order: a digest of the tokens that were read, in order.

    Raises:
        LabError: the recipe is wrong; the task is not prepared.
    """
    outcome = Outcome(tags={"task": settings.task})
    with tempfile.TemporaryDirectory() as scratch:
        made = _Made(workspace.root, workspace.profile, Path(scratch) / "model")
        base = pretrain(settings, made)
        outcome.series["pretraining_loss"] = base.losses
        outcome.tags["data_order"] = base.data_order
        if not base.losses or not all(map(math.isfinite, base.losses)):
            outcome.diverged = f"the loss of pretraining is not finite after update {len(base.losses)}"
            return outcome
        outcome.figures |= base.figures
        outcome.figures |= training_bytes(settings, made)
        tuned = tune(settings, made)
    outcome.figures |= tuned.figures
    outcome.series |= tuned.series
    outcome.diverged = tuned.diverged
    return outcome


@dataclass(frozen=True)
class _Made(Workspace):
    """The workspace, with the trial's own model in the place of the prepared ones."""

    base: Path

    def model(self, name: str) -> Path:
        return self.base


# Pretraining ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Base:
    """What pretraining left beside the model's files."""

    losses: list[float]
    figures: dict[str, Any]
    data_order: str


def read_recipe(settings: Scaling) -> TinyRecipe:
    """The recipe, with the rate and the seed of the trial.

    Raises:
        LabError: a key that it has not, or a wrong value.
    """
    return parse(TinyRecipe, {**settings.recipe, "seed": settings.seed}, "scaling: recipe")


def pretrain(settings: Scaling, made: Workspace) -> Base:
    """Train a model on facts, prose and tasks as `lab.pretraining` does, and save it with its tokenizer."""
    recipe = read_recipe(settings)
    known = corpus.facts(recipe.people, recipe.seed)
    documents = corpus.pretraining_text(
        recipe.people, recipe.seed, recipe.repetitions, recipe.prose_documents, recipe.task_documents
    )
    prompts = corpus.task_documents(corpus.TOKENIZER_TASKS, recipe.tokenizer_prompts, recipe.seed)
    tokenizer = corpus.train_tokenizer(documents + prompts, recipe.vocabulary)
    end, padding = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)
    packed = pack(tokenizer(documents)["input_ids"], recipe.length, end, padding)
    rows = [Row(row["input_ids"].tolist(), row["labels"].tolist()) for row in packed]
    set_seed(recipe.seed)
    model = AutoModelForCausalLM.from_config(recipe.config(end, padding), dtype=torch.float32).to(settings.device)
    how = Training(
        model="tiny",
        task=settings.task,
        learning_rate=settings.learning_rate,
        updates=recipe.steps,
        micro_batch_size=recipe.batch,
        seed=recipe.seed,
        device=settings.device,
    )
    collator = data.Collator(padding)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = build_trainer(model, rows, collator, how, scratch)
        trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    model.save_pretrained(made.model("tiny"))
    tokenizer.save_pretrained(made.model("tiny"))
    figures = {
        "parameters_total": model.num_parameters(),
        "vocabulary": len(tokenizer),
        "tokens": recipe.steps * recipe.batch * recipe.length,
        **knowledge(model, tokenizer, known, rows),
    }
    read = [rows[place].input_ids for place in collator.seen[: recipe.steps * recipe.batch]]
    return Base(losses, figures, hashlib.sha256(repr(read).encode()).hexdigest()[:16])


def knowledge(model: Any, tokenizer: Any, known: Sequence[Fact], rows: Sequence[Row]) -> dict[str, float]:
    """What a model knows of text and facts, and what a guess without one would.

    Args:
        rows: the pretraining text.
    """
    found: dict[str, float] = {}
    stories = {split: corpus.general_prose(HELD_OUT_STORIES, 0, split) for split in ("validation", "test")}
    encoded = {split: [evaluation.encode_text(tokenizer, text) for text in texts] for split, texts in stories.items()}
    found["validation_loss"] = evaluation.mean_nats(evaluation.score(model, encoded["validation"]))
    found["general_bits_per_byte"] = evaluation.bits_per_byte(model, encoded["test"], stories["test"])
    bits = blind_nats(rows, encoded["test"], len(tokenizer)) / math.log(2)
    found["blind_bits_per_byte"] = bits / sum(len(text.encode()) for text in stories["test"])
    answers = evaluation.recalls(model, evaluation.fact_rows(tokenizer, known), known)
    found["recall"] = sum(map(is_known, answers)) / len(answers)
    by_attribute: dict[str, Counter[str]] = {}
    for fact in known:
        by_attribute.setdefault(fact.attribute, Counter())[fact.value] += 1
    found["blind_recall"] = sum(max(values.values()) for values in by_attribute.values()) / len(known)
    return found


def blind_nats(read: Sequence[Row], asked: Sequence[Row], vocabulary: int) -> float:
    """Summed cross-entropy of the labels of `asked` for a guess by the frequency of each label in `read`.

    Each of the `vocabulary` tokens counts once more than it was read (Laplace), so that none is impossible.
    """
    counts = Counter(labelled(read))
    total = sum(counts.values()) + vocabulary
    return math.fsum(math.log(total / (counts[token] + 1)) for token in labelled(asked))


def labelled(rows: Sequence[Row]) -> list[int]:
    """The labels that are asked for, in order."""
    return [token for row in rows for token in row.labels if token != evaluation.IGNORED]


# Tuning ---------------------------------------------------------------------------------------------------------


def tune(settings: Scaling, made: Workspace) -> Outcome:
    """Full fine-tuning of the model at each rate; the one with the least validation loss is tested."""
    outcome = Outcome()
    losses: list[float | None] = []
    examples = {
        split: data.load_task(made.data, settings.task, split)[: settings.questions] for split in ("validation", "test")
    }
    for rate in settings.tuning_rates:
        run = FineTuning(tuning(settings, rate), made)
        run.train()
        questions = {split: evaluation.example_rows(run.tokenizer, found) for split, found in examples.items()}
        if run.diverged():
            losses.append(None)
            continue
        validation = evaluation.task_figures(run.model, questions["validation"])["loss"]
        if all(other is None or validation < other for other in losses):
            tested = evaluation.task_figures(run.model, questions["test"])
            outcome.figures = {"task_validation_loss": validation, "tuning_rate": rate}
            outcome.figures |= {f"test_{name}": value for name, value in tested.items()}
        losses.append(validation)
    blind = blind_nats(run.rows, questions["test"], len(run.tokenizer)) / len(labelled(questions["test"]))
    outcome.figures["blind_loss"] = blind
    outcome.series["tuning_validation_loss"] = losses
    if all(loss is None for loss in losses):
        outcome.diverged = "tuning diverged at every rate"
    return outcome


def tuning(settings: Scaling, rate: float) -> Training:
    """Full fine-tuning of the trial's model at a rate."""
    return Training(
        model="tiny",
        task=settings.task,
        learning_rate=rate,
        updates=settings.tuning_updates,
        micro_batch_size=settings.micro_batch_size,
        seed=settings.seed,
        device=settings.device,
        evaluations=0,
    )


def training_bytes(settings: Scaling, made: Workspace) -> dict[str, int]:
    """Bytes of the weights as held, and of full fine-tuning by closed form."""
    run = FineTuning(tuning(settings, settings.tuning_rates[0]), made)
    workload = Workload(
        config=run.model.config.to_dict(),
        dtype="fp32",
        batch=settings.micro_batch_size,
        length=max(len(row.input_ids) for row in run.rows),
        device=settings.device,
    )
    expected, held = predict(workload), held_bytes(weights(run.model))
    gradients = held  # of full fine-tuning in fp32: as large as the weights
    return {
        "weights_bytes": held,
        "held_bytes": expected.steady_bytes - workspace_bytes(workload) + gradients,
        "steady_bytes": expected.steady_bytes,
        "peak_bytes": expected.peak_bytes,
    }
