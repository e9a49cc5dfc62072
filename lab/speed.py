"""The trial that races two trainers over one model: the lab's, and the Trainer of transformers with its defaults.

What the lab times is of use to a person only if the person's own run takes as long.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils import flop_counter
from transformers import AutoConfig, AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments, set_seed

from lab import data
from lab.checkpointing import checkpointed
from lab.errors import LabError
from lab.evaluation import Row
from lab.methods import apply_method, count_parameters, quantisation
from lab.models import DTYPES, check_model, shapes
from lab.optimizers import check_optimizer
from lab.runners import Outcome
from lab.specs import Speed
from lab.timing import _formulas
from lab.training import build_trainer
from lab.workspace import Workspace

WARM_UP = 2
"""Updates of a block before the clock starts: the first makes the optimizer's state, the second finds it there."""

SIDES = ("lab", "plain")


def race(settings: Speed, workspace: Workspace) -> Outcome:
    """Train by each of SIDES in turn and say what an update takes.

    A round is a block of each side; the one that begins changes from round to round. A block is a trainer made anew and its
    `train()`: WARM_UP updates, and then `updates` between two looks at the clock, with everything that the trainer does
    around them. Both sides train the same model, which so is held once, and goes on where the other left it.

    Figures, for each side:
        <side>_seconds: of an update, the median over the rounds. <side>_tokens_per_second: of that.
        <side>_flops: of forward and backward of an update as it ran, see `lab.timing._formulas`.
    And:
        ratio: the median over the rounds of the lab's seconds over the plain trainer's.
        rule_flops: 6 for each parameter of the base and token, the rule of thumb for full fine-tuning.
        tokens: of an update. parameters_base, parameters_trainable: see `lab.methods.count_parameters`.
    Series: `<side>_seconds`, by round. Tags: the optimizer of each side.

    Raises:
        LabError: the model is no bundled shape; an unknown optimizer or method.
    """
    check_optimizer(settings.optimizer)
    if settings.plain_optimizer:
        check_optimizer(settings.plain_optimizer)
    model = build(settings)
    counts = count_parameters(model)
    tokens = settings.batch * settings.length
    outcome = Outcome(tags={"model": settings.model, "method": settings.method})
    outcome.figures |= {f"parameters_{name}": counts[name] for name in ("base", "trainable")}
    outcome.figures |= {"tokens": tokens, "rule_flops": 6 * counts["base"] * tokens}
    seconds: dict[str, list[float]] = {side: [] for side in SIDES}
    for place in range(settings.rounds):
        for side in SIDES if place % 2 == 0 else reversed(SIDES):
            block = _Block(settings, counted=place == 0)
            block.run(model, side)
            seconds[side].append(block.seconds)
            if place == 0:
                outcome.figures[f"{side}_flops"] = block.flops
                outcome.tags[f"{side}_optimizer"] = block.optimizer
    for side, found in seconds.items():
        outcome.series[f"{side}_seconds"] = found
        outcome.figures[f"{side}_seconds"] = statistics.median(found)
        outcome.figures[f"{side}_tokens_per_second"] = tokens / statistics.median(found)
    pairs = zip(seconds["lab"], seconds["plain"], strict=True)
    outcome.figures["ratio"] = statistics.median(lab / plain for lab, plain in pairs)
    return outcome


# The model ------------------------------------------------------------------------------------------------------


def build(settings: Speed) -> Any:
    """The shape with random weights and the method on it, drawn and quantised on the device itself.

    Raises:
        LabError: the model is no bundled shape.
    """
    bundled = shapes()
    if settings.model not in bundled:
        check_model(settings.model)
        raise LabError(
            f"speed: model '{settings.model}' is prepared; rows of full length are for the bundled shapes. "
            "Choose one: lab fit --list models"
        )
    config = AutoConfig.for_model(**json.loads(bundled[settings.model].read_text(encoding="utf-8")))
    dtype = getattr(torch, DTYPES[settings.precision])
    set_seed(settings.seed)
    with torch.device(settings.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=settings.attention)
    held = settings.quantisation or quantisation(settings.method, settings.method_options)
    if held:
        quantise(model, held, dtype)
    return apply_method(model, settings.method, settings.method_options).train()


def quantise(model: Any, held: str, dtype: torch.dtype) -> None:
    """Hold every linear layer but the head in nf4, where it lies; transformers can do so only while it loads a file.

    Raises:
        LabError: `held` is not in 4 bits.
    """
    import bitsandbytes

    if held not in ("nf4", "nf4-double"):
        raise LabError(f"speed: a base in {held} is not built here. Choose nf4 or nf4-double.")
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or module is head:
            continue
        options: dict[str, Any] = {"compress_statistics": held == "nf4-double", "quant_type": "nf4"}
        layer = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=dtype, device="meta", **options
        )
        packed = bitsandbytes.nn.Params4bit(module.weight.data, requires_grad=False, module=layer, **options)
        layer.weight = packed.to(module.weight.device)
        layer.bias = module.bias
        layer.support_avx512bf16_for_cpu = False  # see lab.models._keep_packing
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # what PEFT and the Trainer ask for


# Blocks ---------------------------------------------------------------------------------------------------------


class _Block(TrainerCallback):
    """Some updates by one trainer, and the clock at the end of the warm-up and at the end of all.

    Attributes:
        seconds: of an update.
        flops: of the first update, where it is `counted`.
        optimizer: by which the trainer stepped.
    """

    def __init__(self, settings: Speed, counted: bool):
        self.settings = settings
        self.counter = flop_counter.FlopCounterMode(display=False, custom_mapping=_formulas()) if counted else None
        self.looks: dict[int, float] = {}
        self.optimizer = ""

    @property
    def last(self) -> int:
        """The number of the block's last update."""
        return WARM_UP + self.settings.updates

    @property
    def seconds(self) -> float:
        return (self.looks[self.last] - self.looks[WARM_UP]) / self.settings.updates

    @property
    def flops(self) -> int:
        return int(self.counter.get_total_flops()) if self.counter else 0

    def run(self, model: Any, side: str) -> None:
        """Train the model by one of SIDES."""
        settings = self.settings
        vocabulary = model.config.vocab_size
        rows = data.random_rows(settings.batch * self.last, settings.length, vocabulary, settings.seed)
        with contextlib.ExitStack() as stack:
            scratch = stack.enter_context(tempfile.TemporaryDirectory())
            if side == "lab":
                again = settings.fault == "checkpointing"
                stack.enter_context(checkpointed(model, {"use_reentrant": False} if again else None))
                whole = settings.model_copy(update={"updates": self.last})
                trainer = build_trainer(model, rows, data.Collator(0), whole, scratch)
            else:
                stack.enter_context(_silent())
                trainer = plain_trainer(model, rows, settings, self.last, scratch)
            trainer.add_callback(self)
            trainer.train()
            self.optimizer = str(getattr(trainer.args.optim, "value", trainer.args.optim))
            trainer.accelerator.free_memory()
        del trainer
        gc.collect()  # the optimizer's state goes before the other side makes its own

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start to count with the first update."""
        if self.counter and state.global_step == 0:
            self.counter.__enter__()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Forward and backward are done."""
        if self.counter and state.global_step == 0:
            self.counter.__exit__(None, None, None)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Look at the clock when the device has done what it was told."""
        if state.global_step in (WARM_UP, self.last):
            if self.settings.device == "cuda":
                torch.cuda.synchronize()
            self.looks[state.global_step] = time.perf_counter()


def plain_trainer(model: Any, rows: list[Row], settings: Speed, updates: int, scratch: str) -> Trainer:
    """The Trainer as a person writes it down: the work is named, and that nothing is saved or reported; the rest is default.

    The progress bar stays: it is part of what a person waits for.
    """
    arguments = TrainingArguments(
        output_dir=scratch,
        max_steps=updates,
        per_device_train_batch_size=settings.batch,
        learning_rate=1e-4,
        save_strategy="no",
        report_to="none",
        use_cpu=settings.device == "cpu",
        disable_tqdm=False,
        **({"optim": settings.plain_optimizer} if settings.plain_optimizer else {}),
    )
    dataset = [{"input_ids": row.input_ids, "labels": row.labels} for row in rows]
    return Trainer(model=model, args=arguments, train_dataset=dataset)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """What is printed goes nowhere; it is made all the same."""
    with (
        Path(os.devnull).open("w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
    ):
        yield
