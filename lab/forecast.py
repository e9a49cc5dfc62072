"""What a study asks of a card, before it starts: bytes by `lab fit`'s own prediction, minutes by records or by a rule."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from lab import pricing
from lab.cards import GIB, find_gpu, peak_flops, usable_bytes
from lab.device import Card
from lab.errors import LabError
from lab.memory.architecture import Architecture
from lab.memory.workload import Workload
from lab.models import DTYPES, shapes
from lab.params import Profile
from lab.specs import (
    Checkpointing,
    DeviceMemory,
    Inference,
    Limit,
    Plan,
    Rlhf,
    Scaling,
    Setup,
    Simulation,
    Speed,
    Sweep,
    Training,
    TrialSpec,
    templates,
)
from lab.trials import Shortfall, alike
from lab.workspace import Workspace

TASK_TOKENS = 128
"""Of a row of a task: more than any of the lab's own has, prompt and answer together."""

MASTER_BYTES = 14
"""What `bf16-master` holds at the peak beyond bf16 weights under AdamW, for each trained parameter: the copy and its gradient
in fp32 (8), and moments (4) and a foreach temporary (2) that are twice as wide. Neither engine prices it."""

START_SECONDS = 12
"""The rule: of a trial on a card, for its process, CUDA's context, the first kernels."""

UPDATE_SECONDS = 0.1
"""The rule: of an update at least, however small the model: a thousand kernels have to be launched, and Python is slow."""

TOKEN_SECONDS = 0.03
"""The rule: of decoding a token for a whole batch: a forward pass, of which the card does little and Python much."""

SHARES = {"bf16": 0.3, "fp16": 0.3, "autocast": 0.3, "bf16-master": 0.3, "fp32": 0.03}
"""The rule: what an update reaches of the card's peak in 16 bits. fp32 runs without tensor cores, at a tenth of that."""

UNKNOWN_PEAK = 1e14
"""The rule: operations per second in 16 bits of a card whose peak `lab.cards` does not know."""

DRAWN_PER_SECOND = 1e8
"""The rule: random weights that a processor draws, where a model is made before it goes to the card."""

SIMULATED_SECONDS = 1.0
"""Of a trial on tensors without storage: the mean of 500 under the profile `cpu` was 0.9."""


@dataclass(frozen=True)
class Peak:
    """A predicted peak, and whether the closed form gave it (which needs more slack than the simulation)."""

    peak_bytes: int
    quick: bool


@dataclass(frozen=True)
class Row:
    """What one experiment asks for.

    Attributes:
        trials: how many it plans; a sweep may add some.
        peak_bytes: the largest predicted peak of them; None where none is predicted. setup: the trial that has it.
        seconds: of all that are run. timed: how many of them by records; the others by the rule.
        unfit: the names of those that do not fit.
    """

    experiment: str
    trials: int
    peak_bytes: int | None
    setup: str
    seconds: float
    timed: int
    unfit: tuple[str, ...]


class Forecast:
    """What trials of a profile ask of a card, in memory and time."""

    def __init__(self, card: Card, workspace: Workspace, profile: Profile):
        self.card, self.workspace, self.profile = card, workspace, profile
        self._prices: dict[str, Peak | None] = {}

    # Memory -----------------------------------------------------------------------------------------------------

    def peak(self, spec: TrialSpec) -> Peak | None:
        """The predicted peak of a trial on the card; None where nothing of it is there, or `lab fit` cannot price it.

        Where two runs are compared their models lie on the card together.
        """
        if not _on_card(spec) or isinstance(spec.settings, Rlhf):
            return None
        found = [self._price(run) for run in spec.runs]
        known = [peak for peak in found if peak]
        if not known or len(known) < len(found):
            return None
        return Peak(sum(peak.peak_bytes for peak in known), any(peak.quick for peak in known))

    def shortfall(self, spec: TrialSpec) -> Shortfall | None:
        """Why a trial does not fit what is free on the card; None: it does, or it is to find that out itself."""
        peak = None if spec.settings.finds_limit else self.peak(spec)
        room = usable_bytes(self.card.free_bytes, peak.quick) if peak else 0
        if peak is None or peak.peak_bytes <= room:
            return None
        said = (
            f"not run: lab fit predicts {_gib(peak.peak_bytes)}, and {self.card.name} has {_gib(max(0, room))} for it"
        )
        return Shortfall(peak.peak_bytes, said)

    def _price(self, run: Training | Setup) -> Peak | None:
        asked = run.model_dump(exclude={"seed", "task", "questions", "schedule", "learning_rate"})
        key = f"{type(run).__name__} {json.dumps(asked, sort_keys=True, default=str)}"
        if key not in self._prices:
            try:
                self._prices[key] = self._predict(run)
            except (LabError, ValueError):  # the trial says for itself what is wrong with it
                self._prices[key] = None
        return self._prices[key]

    def _predict(self, run: Training | Setup) -> Peak:
        if isinstance(run, Inference):
            return self._predict_inference(run)
        if isinstance(run, Setup) and run.updates == 0 and not isinstance(run, Checkpointing):
            return Peak(self._held(run), quick=True)
        # Imports torch, which a profile without a card never needs here.
        from lab.memory.simulated_trial import workload_of

        config = self._config(run.model)
        if isinstance(run, Checkpointing) and run.layers:
            config["num_hidden_layers"] = run.layers
        workload = workload_of(_simulation(run), config).model_copy(update={"gpu": self._gpu})
        master = 0
        try:
            found, quick = pricing.predict(workload, quick=True), True
        except LabError:
            found, quick = pricing.predict(workload), False
        if run.precision == "bf16-master":
            master = MASTER_BYTES * found.parameters["trainable"]
        return Peak(found.peak_bytes + master, quick)

    def _predict_inference(self, run: Inference) -> Peak:
        """Weights and a full cache; a method or a quantisation is held against a base that lies beside it."""
        workload = Workload(
            config=self._config(run.model),
            dtype=_dtype(run),
            batch=run.batch,
            length=run.length + run.tokens,
            inference=True,
        )
        beside = self._held(run) if run.method != "full" or run.quantisation else 0
        return Peak(pricing.predict(workload).peak_bytes + beside, quick=True)

    def _held(self, run: Training | Setup) -> int:
        """The weights of the base alone, as the run holds them."""
        held_as, _, double = (getattr(run, "quantisation", None) or "").partition("-")
        workload = Workload.model_validate(
            {
                **{"config": self._config(run.model), "method": run.method, "dtype": _dtype(run), "inference": True},
                **{"quantisation": held_as or None, "double_quantisation": bool(double), "length": 1},
            }
        )
        return pricing.predict(workload).parts["weights"]

    @cached_property
    def _gpu(self) -> str | None:
        with suppress(LabError):
            return find_gpu(self.card.name).name
        return None

    def _config(self, model: str) -> dict[str, Any]:
        """The configuration of a model, also of one that is not prepared yet."""
        prepared = self.workspace.model(model) / "config.json"
        path = shapes().get("smollm2-135m" if model == "smol" and not prepared.is_file() else model, prepared)
        if model == "tiny" and not prepared.is_file():
            from lab.base_models import tiny_recipe

            found: dict[str, Any] = tiny_recipe(self.profile, self.workspace).config(0, 0).to_dict()
            return found
        return pricing.load_config(str(path))

    # Time -------------------------------------------------------------------------------------------------------

    def seconds(self, spec: TrialSpec) -> tuple[float, bool]:
        """What a trial takes, and whether records of trials like it on this card say so, rather than the rule."""
        if spec.tier == "sim" or isinstance(spec.settings, Simulation):
            return SIMULATED_SECONDS, False
        measured = self._measured.get(alike(spec))
        return (measured, True) if measured else (self._rule(spec), False)

    @cached_property
    def _measured(self) -> dict[tuple[str, ...], float]:
        """Mean seconds of trials on a card of this name, in any results folder of a GPU, by what they have in common."""
        found: dict[tuple[str, ...], list[float]] = {}
        for path in (self.workspace.root / "results").glob("gpu*/*/*.json"):
            with suppress(OSError, ValueError, KeyError, TypeError):
                raw = json.loads(path.read_bytes())
                if raw["provenance"]["device"] == self.card.name and raw["provenance"]["seconds"] > 0:
                    group = alike(TrialSpec.model_validate(raw["spec"]))
                    found.setdefault(group, []).append(float(raw["provenance"]["seconds"]))
        return {group: sum(values) / len(values) for group, values in found.items()}

    def _rule(self, spec: TrialSpec) -> float:
        """START_SECONDS, what it takes to draw the weights, and operations over a share of the card's peak."""
        total = float(START_SECONDS)
        if isinstance(spec.settings, Scaling):
            tuning = spec.settings.tuning_updates * len(spec.settings.tuning_rates)
            total += UPDATE_SECONDS * (spec.settings.recipe.get("steps", 0) + tuning)
        for run in spec.runs:
            with suppress(LabError, OSError):
                parameters = Architecture.of(self._config(run.model)).parameters()
                drawn = 0.0 if isinstance(run, Speed | DeviceMemory | Limit) else parameters / DRAWN_PER_SECOND
                peak = SHARES[run.precision] * (peak_flops(self.card.name) or UNKNOWN_PEAK)
                update = max(UPDATE_SECONDS, 6 * parameters * _tokens(run) / peak)
                total += drawn + _updates(spec, run) * update + TOKEN_SECONDS * _decoded(run)
        return total

    # Both -------------------------------------------------------------------------------------------------------

    def rows(self, plans: Mapping[str, Plan], at_work: Callable[[str], None] = lambda name: None) -> Iterator[Row]:
        """What each experiment asks for, by its plan; `at_work` hears which one is being worked out."""
        for name, plan in plans.items():
            if plan:
                at_work(name)
                yield self._row(name, plan)

    def _row(self, name: str, plan: Plan) -> Row:
        counts = _counts(plan)
        peaks = {spec.name: (peak.peak_bytes, spec) for spec, _ in counts if (peak := self.peak(spec))}
        unfit = {spec.name for spec, _ in counts if self.shortfall(spec)}
        largest = max(peaks.values(), key=lambda found: found[0], default=None)
        seconds, timed = 0.0, 0
        for spec, count in counts:
            if spec.name not in unfit:
                each, measured = self.seconds(spec)
                seconds += count * each
                timed += count * measured
        return Row(
            experiment=name,
            trials=sum(count for _, count in counts),
            peak_bytes=largest[0] if largest else None,
            setup=largest[1].name if largest else "",
            seconds=seconds,
            timed=timed,
            unfit=tuple(sorted(unfit)),
        )


def _counts(plan: Plan) -> list[tuple[TrialSpec, int]]:
    """The trials of a plan, each with how often it is run: those of a sweep's first part at every rate."""
    counts: dict[str, tuple[TrialSpec, int]] = {}
    for item in plan:
        often = {spec.name: len(item.rates) for spec in item.tried} if isinstance(item, Sweep) else {}
        for spec in templates([item]):
            before = counts[spec.name][1] if spec.name in counts else 0
            new = often.pop(spec.name, 0 if before and isinstance(item, Sweep) else 1)
            counts[spec.name] = (spec, before + new)
    return list(counts.values())


def _on_card(spec: TrialSpec) -> bool:
    return (
        spec.tier != "sim" and not isinstance(spec.settings, Simulation) and any(r.device == "cuda" for r in spec.runs)
    )


def _dtype(run: Training | Setup) -> Any:
    return {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[DTYPES[run.precision]]


def _simulation(run: Training | Setup) -> Simulation:
    """The run as `lab fit` simulates one; a row of a task has TASK_TOKENS."""
    if isinstance(run, Training):
        names = {"model", "method", "method_options", "precision", "optimizer", "gradient_accumulation_steps"}
        changes: dict[str, Any] = {"batch": run.micro_batch_size, "length": TASK_TOKENS}
    else:
        names = set(Setup.model_fields) & set(Simulation.model_fields)
        # Two passes, with every activation kept, and no optimizer.
        changes = {"optimizer": "sgd", "updates": 1} if isinstance(run, Checkpointing) else {}
        if attention := getattr(run, "attention", None):
            changes["attention"] = attention
    return Simulation.model_validate({**{name: getattr(run, name) for name in names}, **changes, "device": "cuda"})


def _tokens(run: Training | Setup) -> int:
    """Of an update."""
    rows = run.micro_batch_size if isinstance(run, Training) else run.batch
    return rows * run.gradient_accumulation_steps * (TASK_TOKENS if isinstance(run, Training) else run.length)


def _updates(spec: TrialSpec, run: Training | Setup) -> float:
    """How many updates a trial makes of a run, or passes that take as long."""
    if isinstance(run, Speed):
        return 2.0 * run.rounds * (run.updates + 2)  # two of a block warm up
    rates = len(getattr(run, "learning_rates", (1,)))
    rounds = 0 if spec.settings.kind == "timing" else getattr(run, "rounds", 0)
    scored = getattr(run, "evaluations", 0) * getattr(run, "questions", 0) / 8  # forward alone, and short rows
    return run.updates * rates + 2 * rounds + scored / 3


def _decoded(run: Training | Setup) -> int:
    """How many tokens a trial decodes, one after the other."""
    if isinstance(run, Inference):
        return 4 * run.rounds * run.tokens  # base, quantised or with an adapter, merged; and a second prompt
    samples = isinstance(run, Rlhf) and run.trainer in ("rloo", "grpo", "ppo")
    return run.updates * TASK_TOKENS // 2 if samples else 0


# Printing -------------------------------------------------------------------------------------------------------


def as_dict(card: Card, rows: Sequence[Row]) -> dict[str, Any]:
    """The forecast as JSON."""
    return {
        "card": {"name": card.name, "total_bytes": card.total_bytes, "free_bytes": card.free_bytes},
        "experiments": [asdict(row) for row in rows],
        "trials": sum(row.trials for row in rows),
        "seconds": sum(row.seconds for row in rows),
    }


def print_forecast(card: Card, rows: Sequence[Row], console: Any = None) -> None:
    """The card, a line for each experiment, the total, and how the minutes were reckoned."""
    from rich.console import Console
    from rich.table import Table

    if console is None:  # a file is wide enough for the table
        console = Console(highlight=False, soft_wrap=True)
        console = console if console.is_terminal else Console(highlight=False, soft_wrap=True, width=120)
    room = usable_bytes(card.free_bytes)
    console.print(
        f"[bold]{card.name}[/bold]: {_gib(card.total_bytes)}, of which a predicted peak may take {_gib(room)}"
    )
    table = Table(box=None, pad_edge=False)
    table.add_column("experiment")
    for column in ("trials", "not fitting", "minutes", "largest peak"):
        table.add_column(column, justify="right")
    table.add_column("of", no_wrap=True)
    for row in rows:
        peak = "-" if row.peak_bytes is None else _gib(row.peak_bytes)
        table.add_row(
            row.experiment, f"{row.trials}", f"{len(row.unfit) or '-'}", _minutes(row.seconds), peak, row.setup
        )
    trials, unfit = sum(row.trials for row in rows), sum(len(row.unfit) for row in rows)
    table.add_row("in all", f"{trials}", f"{unfit or '-'}", _minutes(sum(row.seconds for row in rows)), "", "")
    console.print(table)
    timed = sum(row.timed for row in rows)
    flops = peak_flops(card.name)
    per = f"{flops / 1e12:g} TFLOP/s" if flops else f"{UNKNOWN_PEAK / 1e12:g} TFLOP/s, as its peak is not known here"
    console.print(
        f"Minutes are an estimate: {timed} of {trials} trials by records of this card, the others by a rule: {START_SECONDS} s "
        f"to start, then operations at {SHARES['bf16']:.0%} of {per} ({SHARES['fp32']:.0%} in fp32), at least "
        f"{UPDATE_SECONDS:g} s an update. Peaks are `lab fit`'s; what it cannot price has none and runs."
    )
    if unfit:
        console.print("What does not fit is not run; it is recorded as out of memory, with its predicted peak.")


def _gib(size: float) -> str:
    return f"{size / GIB:.1f} GiB"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f}" if seconds >= 90 else f"{seconds / 60:.1f}"
