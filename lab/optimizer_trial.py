"""The trials of an optimizer by its Trainer name: does it run here, what does it hold, and what does a model learn by it?"""

from __future__ import annotations

import math
import re
import tempfile
import warnings
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import torch

from lab import data, evaluation
from lab.memory import measurement
from lab.memory.trial import _memory_figures
from lab.methods import apply_method, count_parameters, quantisation
from lab.models import load_model
from lab.optimizers import check_optimizer
from lab.runners import Outcome
from lab.specs import Learning, OptimizerTry
from lab.training import FineTuning, build_trainer
from lab.workspace import Workspace

Standing = Literal["runs", "needs a package", "needs a GPU", "broken"]

# How the Trainer's handlers name what is missing: "You need to install `x`", "You need to have `x>=1`", "Please install x".
PACKAGE = re.compile(r"(?:install `?|need to have `|install https?://\S*/)(?!https?:)([A-Za-z][\w-]*)")
NO_GPU = re.compile(r"\bcuda\b|\bgpu\b|cpu-only", re.IGNORECASE)
FALLS_BACK = re.compile(r"fall(?:s|ing)? back", re.IGNORECASE)


# Does it run? ---------------------------------------------------------------------------------------------------


def try_optimizer(settings: OptimizerTry, workspace: Workspace) -> Outcome:
    """Train on random tokens under the ledger by an optimizer that may not run here, and say what became of it.

    An optimizer runs if the Trainer makes it and its updates move the parameters, and to finite values. GaLore and APOLLO get
    every linear layer, which they would otherwise ask for.

    Figures:
        runs: 1 or 0.
        falls_back: 1 if the library warns that it does something else than the name says, as paged ones do on a processor.
        largest_move: of a single parameter over the updates.
        And, where it runs, those of `lab.memory.trial.measure_memory`.
    Tags: `standing` (runs, needs a package, needs a GPU, broken), `package` (which), `reason` (the library's own words),
    `class` (the optimizer's).

    Raises:
        LabError: as `load_model`; an unknown name of an optimizer.
    """
    check_optimizer(settings.optimizer)
    model = load_model(
        settings.model,
        workspace.model(settings.model),
        precision=settings.precision,
        quantisation=settings.quantisation or quantisation(settings.method, settings.method_options),
        attention=settings.attention,
        seed=settings.seed,
        device=settings.device,
    )
    model = apply_method(model, settings.method, settings.method_options)
    tags = {"model": settings.model, "method": settings.method, "optimizer": settings.optimizer}
    outcome = Outcome(tags=tags, figures={"runs": 0, "falls_back": 0})
    outcome.figures |= {f"parameters_{name}": count for name, count in count_parameters(model).items()}
    start = [p.detach().to("cpu", copy=True) for p in model.parameters() if p.requires_grad]
    with warnings.catch_warnings(record=True) as said, tempfile.TemporaryDirectory() as scratch:
        warnings.simplefilter("always")
        try:
            measured, kind = _updates(settings, model, scratch)
        except Exception as error:
            if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
                raise
            standing, package = why_not(error, settings.device)
            outcome.tags |= {"standing": standing, "package": package, "reason": _first_line(error)}
            return outcome
    for words in (str(warning.message) for warning in said):
        if FALLS_BACK.search(words):
            outcome.figures["falls_back"] = 1
            outcome.tags["reason"] = words.strip()
    moves = _moves(model, start)
    outcome.figures["largest_move"] = max(moves)
    outcome.tags["class"] = kind
    if fault := _fault(moves):
        outcome.tags |= {"standing": "broken", "package": "", "reason": fault}
        return outcome
    outcome.figures |= {"runs": 1, **_memory_figures(measured, model)}
    outcome.tags["standing"] = "runs"
    return outcome


def _updates(settings: OptimizerTry, model: Any, scratch: str) -> tuple[measurement.Measurement, str]:
    """The memory of the last update, and the optimizer's class."""
    count = settings.batch * settings.gradient_accumulation_steps * settings.updates
    rows = data.random_rows(count, settings.length, model.config.vocab_size, settings.seed)
    trainer = build_trainer(model, rows, data.Collator(0), settings, scratch)
    trainer.args.optim_target_modules = "all-linear"
    trainer.create_optimizer()
    for group in trainer.optimizer.param_groups:
        if not group.get("fused"):
            group["foreach"] = settings.step == "foreach"
    kind = type(trainer.optimizer)
    return measurement.measure(trainer), f"{kind.__module__.split('.')[0]}.{kind.__qualname__}"


def _moves(model: Any, start: list[torch.Tensor]) -> list[float]:
    """How far the furthest element of each trained parameter has gone."""
    now = [p.detach().cpu() for p in model.parameters() if p.requires_grad]
    return [float((a.float() - b.float()).abs().max()) for a, b in zip(now, start, strict=True)]


def _fault(moves: list[float]) -> str:
    """What is wrong with an update, or an empty string. LoRA's A stands still at first: its gradient is 0 while B is 0."""
    if not all(map(math.isfinite, moves)):
        return "a parameter is no finite number after the updates"
    return "" if max(moves) > 0 else "the updates moved no parameter"


def why_not(error: BaseException, device: str) -> tuple[Standing, str]:
    """Why an optimizer did not run, and the package that it needs (an empty string where that is not it).

    A module that could not be imported names itself; else the message is read: for a package, the Trainer raises ImportError
    or ValueError. What is neither, and no cry for a GPU where there is none, is broken.
    """
    for each in _chain(error):
        if isinstance(each, ModuleNotFoundError) and each.name:
            return "needs a package", each.name.split(".")[0]
    text = str(error)
    if isinstance(error, (ImportError, ValueError)) and (found := PACKAGE.search(text)):
        return "needs a package", found[1]
    if device == "cpu" and NO_GPU.search(text):
        return "needs a GPU", ""
    return "broken", ""


def _chain(error: BaseException) -> Iterator[BaseException]:
    """The error and those that it was raised from, or while handling."""

    def links(each: BaseException | None) -> Iterator[BaseException]:
        while each is not None:
            yield each
            each = each.__cause__ or each.__context__

    return islice(links(error), 10)


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


# What is learnt by it? ------------------------------------------------------------------------------------------


def learn(settings: Learning, workspace: Workspace) -> Outcome:
    """Fine-tune and score the task alone, once, on its validation and test splits; with `updates: 0` the base as it is.

    Figures:
        <split>_loss, <split>_accuracy: see `lab.evaluation.task_figures`.
        tokens: how many the updates have read, padding not counted: equal where the data order is.
    Series: `train_loss`. Tags: `data_order`, equal in two runs that are a pair.

    Raises:
        LabError: as `FineTuning`.
    """
    run = FineTuning(settings, workspace)
    outcome = Outcome(tags={"model": settings.model, "method": settings.method, "optimizer": settings.optimizer})
    if settings.updates:
        run.train()
        outcome.diverged = run.diverged()
        outcome.series["train_loss"] = run.losses
        outcome.tags["data_order"] = run.data_order()
    read = settings.updates * settings.micro_batch_size * settings.gradient_accumulation_steps
    outcome.figures["tokens"] = sum(len(run.rows[place].input_ids) for place in run.collator.seen[:read])
    if outcome.diverged:
        return outcome
    for split in ("validation", "test"):
        examples = data.load_task(workspace.data, settings.task, split)[: settings.questions]
        found = evaluation.task_figures(run.model, evaluation.example_rows(run.tokenizer, examples))
        outcome.figures |= {f"{split}_{name}": value for name, value in found.items()}
    return outcome
