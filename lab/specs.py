"""What a trial is told: typed settings, one class per kind of trial. A trial's numbers follow from these alone."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from lab.params import Count, Rate

Precision = Literal["fp32", "bf16", "fp16", "bf16-master", "autocast"]
"""`bf16-master`: bf16 weights, fp32 copy in the optimizer. `autocast`: fp32 weights, bf16 matrix products."""


class Settings(BaseModel):
    """Immutable and closed, so that a spec written today reads the same tomorrow."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    finds_limit: ClassVar[bool] = False
    """Whether the trial is to find what a card holds: then it runs also where a forecast says that it does not fit."""


class Training(Settings):
    """One fine-tuning run of a prepared model on a task, scored before, during and after."""

    kind: Literal["training"] = "training"
    model: str
    task: str
    method: str = "full"
    method_options: dict[str, Any] = {}
    examples: Count | None = None
    """How many rows of the training split there are to learn from; None: all."""
    learning_rate: Rate = 1e-3
    optimizer: str = "adamw_torch"
    precision: Precision = "fp32"
    updates: int = Field(ge=0)
    micro_batch_size: Count = 8
    gradient_accumulation_steps: Count = 1
    lengths: Literal["ragged", "fixed"] = "ragged"
    seed: int = 0
    schedule: Literal["constant", "linear"] = "linear"
    evaluations: int = Field(default=4, ge=0)
    """Points on the learning and forgetting curve, the last update included; 0 scores nothing at all."""
    questions: Count = 200
    """How many examples of the validation split, and of the test split, are asked."""
    fault: Literal["mean-of-means", "permuted"] | None = None
    """A planted fault. `mean-of-means` averages micro-batch means; `permuted` reorders rows inside a batch."""
    device: Literal["cpu", "cuda"] = "cpu"


class Structure(Training):
    """A few updates of a method, and what it is made of, moves and can do."""

    kind: Literal["structure"] = "structure"  # type: ignore[assignment]
    evaluations: int = 0


class InContext(Training):
    """The untouched base with worked examples in its prompt, against the same base tuned as the settings say."""

    kind: Literal["in-context"] = "in-context"  # type: ignore[assignment]
    shots: tuple[Count, ...] = (1, 2, 4, 8, 16)
    """How many worked examples stand in front of a question, as far as the context goes; none is always asked too."""
    orders: Count = 5
    """How many draws and orders of the examples are tried."""


class Adapters(Training):
    """One base with an adapter for each of several tasks, against a model of its own for each."""

    kind: Literal["adapters"] = "adapters"  # type: ignore[assignment]
    further_tasks: tuple[str, ...] = Field(min_length=1)
    """Beside `task`."""


class HalfPrecision(Training):
    """One way to train in half precision, at several learning rates from the same start."""

    kind: Literal["half-precision"] = "half-precision"  # type: ignore[assignment]
    learning_rates: tuple[Rate, ...] = Field(min_length=1)
    """In place of `learning_rate`."""
    half: Literal["bf16", "fp16"] = "bf16"
    """The type of the matrix products under autocast."""
    loss_scaling: bool = False
    """Scale the loss by as much as the gradients bear (fp16 under autocast)."""
    stochastic_rounding: bool = False
    """Round the updated bf16 weights up or down by chance, the nearer neighbour the likelier."""
    updates: Count
    gradient_accumulation_steps: Literal[1] = 1
    schedule: Literal["constant"] = "constant"  # one rate is what is asked about


class LossScaling(Training):
    """The gradients of one batch under fp16 autocast at several loss scales, before and after `updates` in fp32."""

    kind: Literal["loss-scaling"] = "loss-scaling"  # type: ignore[assignment]
    exponents: tuple[int, ...] = Field(min_length=1)
    """The loss scales, as powers of two."""
    gradient_accumulation_steps: Literal[1] = 1
    schedule: Literal["constant"] = "constant"


class Start(Training):
    """Training from a prepared model, or from other weights of the same architecture."""

    kind: Literal["start"] = "start"  # type: ignore[assignment]
    start: Literal["pretrained", "random", "permuted"] = "pretrained"
    """`permuted` is a planted fault: the rows of each pretrained tensor in random order, so that nothing fits together."""


class Scaling(Settings):
    """A model of a given shape, pretrained from random weights on the lab's text, then tuned on a task."""

    kind: Literal["scaling"] = "scaling"
    recipe: dict[str, int]
    """Shape, text and steps, as in `TinyRecipe` (lab/pretraining.py); its other keys have their defaults."""
    learning_rate: Rate = 4e-3
    """Of pretraining."""
    task: str
    tuning_rates: tuple[Rate, ...] = Field(min_length=1)
    """The rates that full fine-tuning tries; the best on the validation split is tested."""
    tuning_updates: Count
    micro_batch_size: Count = 8
    questions: Count = 200
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"


class Learning(Training):
    """A fine-tuning run that is scored once, at its end, and on its task alone: half the cost of `Training`."""

    kind: Literal["learning"] = "learning"  # type: ignore[assignment]


class Rlhf(Training):
    """A trainer of trl on a task, against itself at a learning rate of 0: does its own objective rise on held-out rows?"""

    kind: Literal["rlhf"] = "rlhf"  # type: ignore[assignment]
    method: Literal["full"] = "full"
    trainer: Literal["sft", "reward", "dpo", "kto", "rloo", "grpo", "ppo"]
    warm_up_updates: int = Field(default=0, ge=0)
    """Of supervised fine-tuning on the task, by the Trainer, before every arm: RL needs a model that is right sometimes."""
    warm_up_learning_rate: Rate = 1e-3
    generations: int = Field(default=8, ge=2)
    """RL: answers that are sampled for a prompt; a batch holds whole groups of them."""
    samples: Count = 4
    """RL: answers that are sampled for each held-out prompt when the model is scored."""
    evaluations: int = 0


class Timing(Settings):
    """Two ways to train, in turn in one process: what an update of each costs."""

    kind: Literal["timing"] = "timing"
    first: Training
    second: Training
    rounds: Count = 9
    """How many updates of each are timed, one of each in a round."""


class Comparison(Settings):
    """Two runs from the same weights, in one process: how far apart do their parameters and losses end?"""

    kind: Literal["comparison"] = "comparison"
    first: Training
    second: Training
    snapshots: Count = 5
    """At how many updates, evenly spaced, the parameters are compared."""


class Setup(Settings):
    """What training takes memory for: a model, a method, an optimizer, a batch of random tokens."""

    model: str
    method: str = "full"
    method_options: dict[str, Any] = {}
    precision: Precision = "fp32"
    quantisation: Literal["int8", "nf4", "nf4-double"] | None = None
    optimizer: str = "adamw_torch"
    step: Literal["foreach", "fused", "for-loop"] = "foreach"
    batch: Count = 1
    length: Count = 32
    gradient_accumulation_steps: Count = 1
    checkpointing: bool = False
    updates: int = Field(default=2, ge=0)
    """0 loads the model and counts, without training."""
    untied: bool = False
    """A planted fault: the output head gets a copy of the embedding instead of sharing it."""
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"


class Memory(Setup):
    """A few updates on random tokens under the ledger: bytes by part and by phase."""

    kind: Literal["memory"] = "memory"
    attention: Literal["eager", "sdpa"] = "sdpa"


class DeviceMemory(Memory):
    """The same with a model of random weights that is made on the device; see `lab.device_memory`."""

    kind: Literal["device-memory"] = "device-memory"  # type: ignore[assignment]
    cudnn: bool = True
    """Whether torch may choose cuDNN's attention, as it does on Hopper cards."""


class Limit(Memory):
    """Whether a card of so many GB loads the model (`updates: 0`) or trains it: the answer is a figure, out of memory too."""

    finds_limit: ClassVar[bool] = True
    kind: Literal["limit"] = "limit"  # type: ignore[assignment]
    card_gb: float = Field(gt=0)
    """The memory of the card by its name."""
    autocast: bool = False
    """The Trainer's `bf16=True` on weights of whatever precision."""


class OptimizerTry(Memory):
    """The same with an optimizer that may not run here; then the trial says why instead."""

    kind: Literal["optimizer"] = "optimizer"  # type: ignore[assignment]


class Paging(Memory):
    """A few updates on a card that is filled until the optimizer's state has too little room: what leaves it, and where to."""

    finds_limit: ClassVar[bool] = True
    kind: Literal["paging"] = "paging"  # type: ignore[assignment]
    device: Literal["cpu", "cuda"] = "cuda"
    room: float | None = Field(default=None, ge=0, le=1)
    """What is left on the card for the optimizer's state, as a share of it; None: the card is not filled."""
    fault: Literal["disk"] | None = None
    """A planted fault: between updates half of the parameters lie in files."""


class Tokenizing(Setup):
    """A model that reads the same text through its own tokenizer and through others: what a byte of text costs it."""

    kind: Literal["tokenizing"] = "tokenizing"
    cuts: tuple[Literal["own", "permuted", "borrowed", "retrained"], ...] = ("own", "permuted", "borrowed", "retrained")
    """How text becomes token ids: see `lab.tokenizing`."""
    paragraphs: Count = 8
    """How many paragraphs of each page, and how many stories, are scored."""
    updates: int = Field(default=0, ge=0)
    """Of training with each tokenizer, from the base and with embeddings drawn anew; 0: none."""
    learning_rate: Rate = 1e-3


class Simulation(Setup):
    """The same figures from tensors that have shapes and no storage: any size of model, any device."""

    kind: Literal["simulation"] = "simulation"
    autocast: bool = False
    """The Trainer's `bf16=True` on weights of whatever precision."""
    attention: Literal["eager", "sdpa", "flash_attention_2"] = "sdpa"
    loss: Literal["full", "full-shifted", "chunked", "fused"] = "full"
    vocabulary: Count | None = None
    """Rows of a resized embedding; None: the model's own."""
    gpu: str | None = None
    """The card, where its libraries' workspaces count."""


class Prediction(Simulation):
    """The same for the card of the machine that it runs on, where `gpu` names no other."""

    kind: Literal["prediction"] = "prediction"  # type: ignore[assignment]


class Checkpointing(Setup):
    """Forward and backward of a bundled shape on random tokens, without gradient checkpointing and with it.

    Both are always run and nothing is updated: `checkpointing`, `updates`, the optimizer and its step have no part in it.
    """

    kind: Literal["checkpointing"] = "checkpointing"
    precision: Literal["fp32", "bf16"] = "fp32"
    updates: int = 0
    layers: Count | None = None
    """How many layers the shape gets; None: its own."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    rounds: int = Field(default=0, ge=0)
    """How many passes of each are timed, one of each in a round."""


class Speed(Memory):
    """A model trained on full rows of random tokens by the lab's trainer and by the library's defaults, in turn.

    Both train with every activation kept; `step` has no part in it.
    """

    kind: Literal["speed"] = "speed"  # type: ignore[assignment]
    precision: Literal["fp32", "bf16"] = "bf16"
    """Of the weights; there is no autocast."""
    updates: Count = 4
    """How many are timed in a block, after those that warm up."""
    rounds: Count = 4
    """Blocks of each trainer, one of each in a round."""
    plain_optimizer: str | None = None
    """Of the library's side; None: the Trainer's own default."""
    checkpointing: Literal[False] = False
    gradient_accumulation_steps: Literal[1] = 1
    fault: Literal["checkpointing"] | None = None
    """A planted fault: the lab's trainer recomputes activations in backward, the other does not."""


class HubDownloads(Settings):
    """A model and data sets loaded from a hub, pinned and not, cold and warm, before and after `main` moves."""

    kind: Literal["hub"] = "hub"
    endpoint: Literal["loopback", "public"] = "loopback"
    """`loopback`: a hub within the trial, with faults to order. `public`: the one that the clients ask by themselves."""
    model: str = ""
    """On the public hub; the loopback has its own."""
    data_set: str = ""
    large_mib: tuple[Count, ...] = (4, 16, 24, 44)
    """The lengths of files whose connection breaks in the middle."""
    fault: Literal["ignores-revisions", "never-moves"] | None = None
    """A planted fault: the hub serves `main` whatever is asked for, or its `main` stays."""
    seed: int = 0


class LargeDataset(Settings):
    """A data set of documents, written to disk, read in every usual way by `datasets`, and removed."""

    kind: Literal["datasets"] = "datasets"
    total_bytes: Count
    """Of text."""
    row_bytes: Count = 4096
    """Of text in a row."""
    way: Literal["mapped", "in-memory", "objects"] = "mapped"
    """`mapped`: as `load_from_disk` does it. `in-memory`: `keep_in_memory=True`. `objects`: a list of dictionaries."""
    seed: int = 0


class Inference(Setup):
    """Prompts of `length` tokens are read, and tokens decoded one after the other, with a key-value cache.

    A method is held against its base, beside it and, where it can be, merged; a quantisation against the same base
    without. Nothing is trained.
    """

    kind: Literal["inference"] = "inference"
    updates: int = 0
    tokens: Count = 8
    """How many are decoded after each prompt."""
    rounds: int = Field(default=0, ge=0)
    """How often each is timed, in turn with the others; 0: bytes alone."""
    attention: Literal["eager", "sdpa"] = "sdpa"


class SimulatedInference(Simulation):
    """Its bytes from tensors that have shapes and no storage."""

    kind: Literal["simulated-inference"] = "simulated-inference"  # type: ignore[assignment]
    updates: int = 0
    tokens: Count = 1
    """How many are decoded after each prompt."""


AnySettings = Annotated[
    Training
    | Structure
    | InContext
    | Adapters
    | HalfPrecision
    | LossScaling
    | Start
    | Scaling
    | Learning
    | Rlhf
    | Timing
    | Comparison
    | Memory
    | DeviceMemory
    | Limit
    | OptimizerTry
    | Paging
    | Tokenizing
    | Simulation
    | Prediction
    | Checkpointing
    | Speed
    | HubDownloads
    | LargeDataset
    | Inference
    | SimulatedInference,
    Field(discriminator="kind"),
]


class TrialSpec(Settings):
    """A named trial of an experiment. `arm` is the word by which the judge finds it."""

    experiment: str
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.+-]*$")
    arm: str
    threads: Count = 1
    """Processor threads. Trials run side by side while the profile's threads last; a trial that is timed takes all."""
    tier: Literal["sim"] | None = None
    """`sim` if this is evidence for the sim tier; None: for the tier of the profile's device."""
    settings: AnySettings

    @property
    def runs(self) -> tuple[Training | Setup, ...]:
        """The settings of each training in it: two where two are compared, none where nothing is trained, else one."""
        settings = self.settings
        if isinstance(settings, (Comparison, Timing)):
            return (settings.first, settings.second)
        return (settings,) if isinstance(settings, (Training, Setup)) else ()

    def models(self) -> set[str]:
        """The prepared models that the trial reads."""
        return {run.model for run in self.runs}

    def methods(self) -> frozenset[str]:
        """The tuning methods that the trial applies."""
        return frozenset(run.method for run in self.runs)

    def tasks(self) -> list[str]:
        """The tasks that the trial learns, in order of their names."""
        runs = [run for run in self.runs if isinstance(run, Training)]
        further = [task for run in runs if isinstance(run, Adapters) for task in run.further_tasks]
        own = [self.settings.task] if isinstance(self.settings, Scaling) else []
        return sorted({*(run.task for run in runs), *further, *own})

    def digest(self) -> str:
        """A hash of the settings: two trials with one digest are the same trial."""
        text = json.dumps(self.settings.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Sweep(Settings):
    """A learning rate that is found by trying.

    Each trial of `tried` runs at every rate; the rate that does best on the validation split is chosen (`lab.sweeps`), and
    each trial of `then` runs at that. Names of trials get the rate at their end.
    """

    kind: Literal["sweep"] = "sweep"
    rates: tuple[Rate, ...] = Field(min_length=1)
    by: Literal["accuracy", "loss"] = "accuracy"
    tried: tuple[TrialSpec, ...] = Field(min_length=1)
    then: tuple[TrialSpec, ...] = ()


Plan = Sequence[TrialSpec | Sweep]
"""What an experiment wants: trials, and sweeps whose last trials depend on the records of their first."""


def templates(plan: Plan) -> list[TrialSpec]:
    """Every trial of a plan, those of a sweep once and without a rate."""
    return [spec for item in plan for spec in ((*item.tried, *item.then) if isinstance(item, Sweep) else (item,))]


def memory_spec(
    experiment: str, arm: str, name: str, device: Literal["cpu", "cuda"], sim: bool = False, **settings: Any
) -> TrialSpec:
    """A trial that measures memory on the device, or, for the sim tier, simulates it on a CUDA device.

    Args:
        name: of the trial within its arm.
        settings: see `Memory` and `Simulation`.
    """
    kind = Simulation if sim else DeviceMemory if device == "cuda" else Memory
    setup = kind.model_validate({"device": "cuda" if sim else device, **settings})
    name, tier = (f"sim-{arm}-{name}", "sim") if sim else (f"{arm}-{name}", None)
    return TrialSpec(experiment=experiment, name=name, arm=arm, tier=tier, settings=setup)
