"""The trial that asks where training starts: from pretrained weights, from random ones, or from permuted ones."""

from __future__ import annotations

import hashlib
import math
from typing import Any

import torch
from transformers import AutoModelForCausalLM, set_seed

from lab import data, evaluation
from lab.errors import LabError
from lab.runners import Outcome
from lab.specs import Start
from lab.training import FineTuning
from lab.workspace import Workspace


def begin(settings: Start, workspace: Workspace) -> Outcome:
    """Train every weight from the start that the settings name, and score the test split along the way.

    The batches of update n are the same from every start and whatever the number of updates.

    Figures:
        validation_loss, validation_accuracy: after the last update; what a rate is chosen by.
        test_loss, test_accuracy: after the last update.
        blind_loss: of a guess that takes every token for equally likely, nats per token.
        vocabulary: tokens that the model knows.
        seconds_per_update: scoring included.
    Series:
        curve_update: after which updates the test split was scored; the first is 0.
        curve_tokens: tokens of prompts and answers that were learnt from until then.
        curve_test_loss, curve_test_accuracy: nats per answer token, and the share of answers that are exactly right.
        train_loss: of each update.
    Tags:
        data_order: a digest of which rows were seen until the first point of the curve.

    Raises:
        LabError: as `FineTuning`; a method that does not train every weight, or no points on the curve.
    """
    if settings.method != "full":
        raise LabError(f"start: method is {settings.method!r}; only full trains every weight. Set method: full.")
    if not 1 <= settings.evaluations <= settings.updates:
        raise LabError(
            f"start: evaluations is {settings.evaluations}; it must be 1 to {settings.updates}, the updates. Change it."
        )
    run = FineTuning(settings, workspace)
    restart(run.model, settings.start, settings.seed)
    examples = {
        split: data.load_task(workspace.data, settings.task, split)[: settings.questions]
        for split in ("validation", "test")
    }
    questions = {split: evaluation.example_rows(run.tokenizer, found) for split, found in examples.items()}
    points = [round(settings.updates * n / settings.evaluations) for n in range(settings.evaluations + 1)]
    curve: list[dict[str, float]] = []

    def score_after(update: int) -> None:
        if update in points:
            curve.append(evaluation.task_figures(run.model, questions["test"]))

    score_after(0)
    run.train(after_update=score_after)
    outcome = Outcome(tags={"model": settings.model, "method": settings.method, "task": settings.task})
    outcome.diverged = run.diverged()
    rows_per_update = settings.micro_batch_size * settings.gradient_accumulation_steps
    seen = run.collator.seen
    lengths = [len(run.rows[place].input_ids) for place in seen]
    first = repr(seen[: points[1] * rows_per_update])
    outcome.tags["data_order"] = hashlib.sha256(first.encode()).hexdigest()[:16]
    reached = points[: len(curve)]
    outcome.series |= {
        "train_loss": run.losses,
        "curve_update": reached,
        "curve_tokens": [sum(lengths[: update * rows_per_update]) for update in reached],
        **{f"curve_test_{name}": [point[name] for point in curve] for name in ("loss", "accuracy")},
    }
    vocabulary = run.model.config.vocab_size
    outcome.figures |= {
        "vocabulary": vocabulary,
        "blind_loss": math.log(vocabulary),
        "seconds_per_update": run.seconds / settings.updates,
    }
    if not outcome.diverged:
        for split, rows in questions.items():
            found = evaluation.task_figures(run.model, rows)
            outcome.figures |= {f"{split}_{name}": value for name, value in found.items()}
    return outcome


def restart(model: Any, start: str, seed: int) -> None:
    """Give a pretrained model the weights of another start, in place.

    `random` is the model's own initialisation. `permuted` puts the rows of each tensor, the entries of a vector, in a random
    order of its own: each keeps its norm and its singular values, and no two fit together any more.

    Raises:
        LabError: there is no such start.
    """
    if start == "pretrained":
        return
    set_seed(seed)
    if start == "random":
        fresh = AutoModelForCausalLM.from_config(model.config, dtype=torch.float32).state_dict()
    elif start == "permuted":
        fresh = {
            name: parameter.detach()[torch.randperm(len(parameter)).to(parameter.device)]
            for name, parameter in model.named_parameters()
        }
    else:
        raise LabError(f"start: start is {start!r}; it must be pretrained, random or permuted. Choose one of these.")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(fresh[name])
