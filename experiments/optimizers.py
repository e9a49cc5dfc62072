"""Does the choice of the optimizer save memory and cost nothing else? Every `optim` name of the Trainer, side by side.

Claim     optimizer-choice (lecture 4)
Refuted   if in no regime an optimizer holds at most STATE_SHARE of AdamW's state, takes LEAST_SAVING off the peak, and
          loses at most MARGIN of AdamW's progress, each at the learning rate that is best for it; conditional if in some
Control   AdamW's bytes in every optimizer's place; the loss of one that hardly moves; half the bytes for the same loss
Run       lab run optimizers --profile cpu

AdamW is `adamw_torch_fused`, what the Trainer takes if nothing is chosen and the AdamW with the least temporaries. Each name
is tried: it runs, or the record says what it lacks. Three regimes: full fine-tuning of fp32 weights, of bf16 weights, and
LoRA, where there is little state to save. The sim tier knows memory alone, and judges that.
"""

from __future__ import annotations

import math
from collections.abc import Container
from dataclasses import dataclass
from itertools import product
from typing import Any

from lab.claims import Claim, Control, Evidence, Experiment, Finding, MissingEvidence, over_answers
from lab.memory.workload import OPTIMIZERS
from lab.params import Count, Profile, Rate, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Learning, OptimizerTry, Plan, Simulation, Sweep, Timing, Training, TrialSpec
from lab.statistics import Answer, Interval, bonferroni, lies_within, mean_interval, span
from lab.sweeps import at_best, at_edge

NAME = "optimizers"
ADAMW = "adamw_torch_fused"

# All that transformers 5.23 knows; a test compares. Which of them run is found out.
LISTED = """
    adamw_torch adamw_torch_fused adamw_torch_xla adamw_torch_npu_fused adamw_anyprecision adamw_torch_4bit adamw_torch_8bit
    adafactor sgd adagrad rmsprop ademamix ademamix_8bit paged_ademamix_32bit paged_ademamix_8bit adamw_bnb_8bit adamw_8bit
    paged_adamw_32bit paged_adamw_8bit lion_32bit lion_8bit paged_lion_32bit paged_lion_8bit rmsprop_bnb rmsprop_bnb_8bit
    rmsprop_bnb_32bit galore_adamw galore_adamw_8bit galore_adafactor galore_adamw_layerwise galore_adamw_8bit_layerwise
    galore_adafactor_layerwise lomo adalomo grokadamw schedule_free_radam schedule_free_adamw schedule_free_sgd apollo_adamw
    apollo_adamw_layerwise stable_adamw
"""
NAMES = tuple(LISTED.split())

# AdamW's state is 8 of the 16 bytes that a parameter takes in fp32 (4 weight, 4 gradient). Half of it gone is a quarter of
# those 16: what takes a run from a card of 16 GiB to one of 12. Less moves no run to a smaller card.
STATE_SHARE = 0.5

# As for parameter-efficient methods (peft_cost.py): under 10 % of the peak is within what fragmentation takes.
LEAST_SAVING = 0.10

# As for the 8-bit optimizer (eight_bit_optimizer.py): 5 % of AdamW's progress is one update in twenty.
MARGIN = 0.05

# The control is far from the margin: three seeds show it.
CONTROL_SEEDS = 3

# A rate at which nothing is learnt, whatever the optimizer: SGD with clipped gradients moves by 1e-9 at most in an update.
IDLE_RATE = 1e-9

REGIMES: dict[str, dict[str, Any]] = {"fp32": {}, "bf16": {"precision": "bf16"}, "lora": {"method": "lora"}}

# At real scale products are in bf16, and LoRA's base is too: as the Trainer is told to do on a card.
SIMULATED: dict[str, dict[str, Any]] = {
    "fp32": {"autocast": True},
    "bf16": {"precision": "bf16"},
    "lora": {"method": "lora", "precision": "bf16", "autocast": True},
}


class RealScale(Section):
    """What is simulated: models, and one batch for all."""

    models: tuple[str, ...]
    batch: Count
    length: Count


class Params(Section):
    """`names` are tried on `model`; those of `rates` are also trained on `tiny`, timed, and tried in every regime."""

    names: tuple[str, ...] = NAMES
    model: str
    batch: Count
    length: Count
    real_scale: RealScale | None = None
    task: str
    seeds: Count
    sweep_seeds: Count
    updates: Count
    micro_batch_size: Count
    questions: Count
    rounds: Count
    rates: dict[str, tuple[Rate, ...]]
    """The learning rates that each optimizer tries; as many for each."""


def trials(params: Params, profile: Profile) -> Plan:
    """Tries, simulations, sweeps with more seeds at the best rate, and times in turn with AdamW's."""
    plan: list[TrialSpec | Sweep] = []

    def add(arm: str, name: str, settings: Any, **more: Any) -> None:
        plan.append(TrialSpec(experiment=NAME, name=name.replace("_", "-"), arm=arm, settings=settings, **more))

    for regime, name in product(REGIMES, params.names):
        if regime == "fp32" or name in params.rates:
            setup = {"model": params.model, "batch": params.batch, "length": params.length, "device": profile.device}
            tried = OptimizerTry.model_validate({**setup, **REGIMES[regime], "optimizer": name})
            add(f"{regime}-{name}", f"{regime}-{name}", tried)
    if real := params.real_scale:
        for regime, name, model in product(REGIMES, params.rates, real.models):
            if name in OPTIMIZERS:
                setup = {"model": model, "batch": real.batch, "length": real.length, "device": "cuda"}
                simulated = Simulation.model_validate({**setup, **SIMULATED[regime], "optimizer": name})
                add(f"{regime}-{name}", f"sim-{regime}-{name}-{model}", simulated, tier="sim")

    def learning(name: str, seed: int = 0, **changes: Any) -> Learning:
        return Learning(
            model="tiny",
            task=params.task,
            optimizer=name,
            updates=changes.pop("updates", params.updates),
            micro_batch_size=params.micro_batch_size,
            questions=params.questions,
            seed=seed,
            device=profile.device,
            **changes,
        )

    add("base", "base", learning(ADAMW, updates=0))
    for seed in range(min(CONTROL_SEEDS, params.seeds)):
        add("control-idle", f"control-idle-seed{seed}", learning("sgd", seed, learning_rate=IDLE_RATE))
    for name, rates in params.rates.items():
        start, arm = f"loss-{name}-seed".replace("_", "-"), f"loss-{name}"
        specs = [
            TrialSpec(experiment=NAME, name=f"{start}{seed}", arm=arm, settings=learning(name, seed))
            for seed in range(params.seeds)
        ]
        plan.append(Sweep(rates=rates, by="loss", tried=tuple(specs[: params.sweep_seeds]), then=tuple(specs)))
    first = Training(
        model="tiny",
        task=params.task,
        optimizer=ADAMW,
        updates=1,
        micro_batch_size=params.micro_batch_size,
        evaluations=0,
        schedule="constant",
        lengths="fixed",
        device=profile.device,
    )
    for name in params.rates:
        if name != ADAMW:
            pair = Timing(first=first, second=first.model_copy(update={"optimizer": name}), rounds=params.rounds)
            add(f"time-{name}", f"time-{name}", pair, threads=profile.threads)
    return plan


# One row for each optimizer -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """What one optimizer costs and saves."""

    name: str
    state: dict[str, Interval]
    """Bytes of state per trained parameter, by regime: span over models."""
    saved: dict[str, Interval]
    """Share of AdamW's peak that it saves, by regime: span over models."""
    saves: frozenset[str]
    """The regimes in which it saves enough, on every model."""
    lost: Interval | None
    """Share of AdamW's progress that it does not make; None in the sim tier."""
    keeps: Answer
    """Whether that lies within the margin; yes in the sim tier, which does not ask."""
    time: float | None
    """Times AdamW's for an update; None where it was not timed."""
    edge: bool
    """Whether its best rate lies at the edge of what was tried."""

    def __str__(self) -> str:
        words = [f"{self.name} {_range(self.state['fp32'], '.2f')} B"]
        words.append("peak " + "/".join(f"{-100 * s.estimate:+.0f}" for s in self.saved.values()) + " %")
        if self.lost:
            words.append(f"{self.lost.times(100):.1f} % lost{' (edge)' * self.edge}")
        return ", ".join([*words, *([f"{self.time:.2f} x the time"] if self.time else [])])


def _range(interval: Interval, form: str) -> str:
    low, high = f"{interval.low:{form}}", f"{interval.high:{form}}"
    return low if low == high else f"{low} to {high}"


def _simulated(evidence: Evidence) -> bool:
    return bool(evidence.records) and all(r.spec.tier == "sim" for r in evidence.records)


def rows(evidence: Evidence) -> list[Row]:
    """A row for each optimizer but AdamW that was trained (in the sim tier: simulated) and runs.

    Raises:
        MissingEvidence: there is none, or AdamW is not there to compare with.
    """
    simulated = _simulated(evidence)
    prefix = "fp32-" if simulated else "loss-"
    names = {r.spec.arm.removeprefix(prefix): None for r in evidence.records if r.spec.arm.startswith(prefix)}
    names.pop(ADAMW, None)
    runs = [name for name in names if evidence.has(f"fp32-{name}") and (simulated or _runs(evidence, name))]
    if not runs:
        raise MissingEvidence(f"no optimizer to compare with {ADAMW}")
    return [_row(evidence, name, len(runs), simulated) for name in runs]


def _runs(evidence: Evidence, name: str) -> bool:
    return all(r.figure("runs") for r in evidence.select(f"fp32-{name}"))


def _row(evidence: Evidence, name: str, compared: int, simulated: bool) -> Row:
    state, saved, saves = {}, {}, set()
    for regime in REGIMES:
        found = evidence.select(f"{regime}-{name}")
        adamw = {r.setting("model"): r for r in evidence.select(f"{regime}-{ADAMW}")}
        pairs = [(r, adamw[r.setting("model")]) for r in found]
        state[regime] = span([_state(r) for r in found])
        shares = [r.figure("optimizer_state_bytes") / a.figure("optimizer_state_bytes") for r, a in pairs]
        peaks = [r.figure("peak_bytes") / a.figure("peak_bytes") for r, a in pairs]
        saved[regime] = span([1 - peak for peak in peaks])
        if max(shares) <= STATE_SHARE and max(peaks) <= 1 - LEAST_SAVING:
            saves.add(regime)
    if simulated:
        return Row(name, state, saved, frozenset(saves), None, "yes", None, False)
    # So many are compared that one would pass by luck: the intervals hold for all together.
    lost = mean_interval(_progress_lost(evidence, name), bonferroni(compared))
    return Row(
        name,
        state,
        saved,
        frozenset(saves),
        lost,
        lies_within(lost, -math.inf, MARGIN),
        evidence.select(f"time-{name}")[0].figure("ratio") if evidence.has(f"time-{name}") else None,
        at_edge(evidence.attempts(f"loss-{name}"), "loss"),
    )


def _state(record: Record) -> float:
    """Bytes of state per trained parameter."""
    return record.figure("optimizer_state_bytes") / record.figure("parameters_trainable")


def _progress_lost(evidence: Evidence, name: str) -> list[float]:
    """By seed: how much of AdamW's fall in test loss the optimizer did not make, each at its best rate.

    A run that diverged has lost everything; one that crashed has no say.

    Raises:
        ValueError: the two have not read the same tokens.
    """
    base = evidence.select("base")[0].figure("test_loss")
    adamw, own = (
        {r.setting("seed"): r for r in at_best(evidence.attempts(f"loss-{n}"), "loss") if r.status != "failed"}
        for n in (ADAMW, name)
    )
    lost = []
    for seed in [seed for seed in own if seed in adamw and adamw[seed].status == "ok"]:
        if own[seed].status != "ok":
            lost.append(1.0)
            continue
        if own[seed].figure("tokens") != adamw[seed].figure("tokens"):
            raise ValueError(f"{name} and {ADAMW} have not read the same tokens from seed {seed}")
        best = adamw[seed].figure("test_loss")
        lost.append((own[seed].figure("test_loss") - best) / (base - best))
    return lost


def judge_choice(evidence: Evidence) -> Finding:
    """In each regime: is there an optimizer that saves enough and keeps AdamW's loss? In the sim tier no loss is asked."""
    table = rows(evidence)
    answers: dict[str, Answer] = {}
    for regime in REGIMES:
        kept = {row.keeps for row in table if regime in row.saves}
        answers[regime] = "yes" if "yes" in kept else "undecided" if "undecided" in kept else "no"
    keeping = [row for row in table if row.keeps == "yes"]
    best = span([max((row.saved[regime].estimate for row in keeping), default=0.0) for regime in REGIMES])
    told = {"yes": "does", "no": "does not", "undecided": "is undecided"}
    chosen = {r: ", ".join(row.name for row in keeping if r in row.saves) for r in REGIMES}
    simulated = _simulated(evidence)
    flips = _flips(evidence, answers, table) if len(set(answers.values())) > 1 else ""
    because = "; ".join(
        [
            *(["by bytes alone, the loss is not asked: what is named may learn less"] if simulated else []),
            *(f"{r} {told[answers[r]]}{f' by {chosen[r]}' if chosen[r] else ''}" for r in REGIMES),
            f"state per parameter in fp32, peak in {'/'.join(REGIMES)}: " + " | ".join(map(str, table)),
            *_standings(evidence),
        ]
    )
    by = "the smallest optimizer, the loss not asked" if simulated else "the best optimizer that keeps the loss"
    return Finding.of(over_answers(answers.values()), best, f"of AdamW's peak, by {by}", because, flips)


def _flips(evidence: Evidence, answers: dict[str, Answer], table: list[Row]) -> str:
    """In which regimes it holds and what AdamW's state is of the peak there: more than that no optimizer saves."""
    parts = []
    for answer, words in (("yes", "holds in"), ("no", "does not in"), ("undecided", "is undecided in")):
        told = []
        for regime in [regime for regime in REGIMES if answers[regime] == answer]:
            adamw = evidence.select(f"{regime}-{ADAMW}")
            state = span([r.figure("optimizer_state_bytes") / r.figure("peak_bytes") for r in adamw])
            most = max(row.saved[regime].estimate for row in table)
            told.append(
                f"{regime} (AdamW's state is {_range(state, '.0%')} of the peak, the most that any saves {most:.0%})"
            )
        parts += [f"{words} {', '.join(told)}"] if told else []
    return "; ".join(parts)


def _standings(evidence: Evidence) -> list[str]:
    """Which names do not run here as they say, by what they lack."""
    unpaged = [n for n in _tried(evidence) if _runs(evidence, n) and _falls_back(evidence, n)]
    standing = {**_lacking(evidence), **({"run here unpaged": unpaged} if unpaged else {})}
    return [f"{words}: {', '.join(names)}" for words, names in sorted(standing.items())]


def _lacking(evidence: Evidence) -> dict[str, list[str]]:
    """The names that do not run here, by what they lack."""
    lacking: dict[str, list[str]] = {}
    for name in [name for name in _tried(evidence) if not _runs(evidence, name)]:
        tags = evidence.select(f"fp32-{name}")[0].tags
        words = f"{tags.get('standing', 'broken')} {tags.get('package', '')}".strip()
        lacking.setdefault(words, []).append(name)
    return lacking


def _tried(evidence: Evidence) -> list[str]:
    """The names that were tried, in the Trainer's order; in the sim tier none is."""
    return [] if _simulated(evidence) else [name for name in NAMES if evidence.has(f"fp32-{name}")]


def _falls_back(evidence: Evidence, name: str) -> bool:
    return bool(evidence.select(f"fp32-{name}")[0].figure("falls_back"))


def table(evidence: Evidence) -> list[str]:
    """A row of Markdown for every name that runs here: bytes of state, peaks by regime, progress lost, time.

    "-": not tried; "= name" and "=": not tried, being the same as another name that was. Below them a row for each reason
    why names do not run.
    """
    compared = {row.name: row for row in rows(evidence)}
    lines = []
    for name in [n for n in _tried(evidence) if _runs(evidence, n)]:
        record, row = evidence.select(f"fp32-{name}")[0], compared.get(name)
        same = _same_as(evidence, name, compared)
        other = f"= {same}" if same else "-"
        peaks = " / ".join(
            _peak_change(evidence, regime, name) or ("=" if evidence.has(f"{regime}-{same}") else "-")
            for regime in REGIMES
        )
        lost = row.lost if row else None
        told = f"{lost.times(100):.1f}" if lost else other
        time = f"{row.time:.2f}" if row and row.time else other
        unpaged = " (unpaged)" * _falls_back(evidence, name)
        lines.append(f"| {name}{unpaged} | {_state(record):.2f} | {peaks} | {told} | {time} |")
    missing = sorted(_lacking(evidence).items())
    return [*lines, *(f"| {words}: {', '.join(names)} | - | - | - | - |" for words, names in missing)]


def _same_as(evidence: Evidence, name: str, compared: Container[str]) -> str:
    """Another name that is this optimizer, as an alias or because this one falls back to it; "" if there is none.

    The same: of one class, which holds the same bytes and moves the parameters as far. Named is one that was trained, if there
    is one, or the first.
    """
    if name in compared:
        return ""
    own = _identity(evidence, name)
    names = [n for n in _tried(evidence) if _runs(evidence, n) and not _falls_back(evidence, n)]
    others = [n for n in names if own and n != name and _identity(evidence, n) == own]
    trained = [n for n in others if n in compared]
    before = [n for n in others if _falls_back(evidence, name) or NAMES.index(n) < NAMES.index(name)]
    return next(iter([*trained, *before]), "")


def _identity(evidence: Evidence, name: str) -> tuple[Any, ...]:
    """What two names of one optimizer have in common; () where the record does not name its class."""
    record = evidence.select(f"fp32-{name}")[0]
    figures = ("optimizer_state_bytes", "peak_bytes", "largest_move")
    kind = record.tags.get("class")
    return (kind, *(record.figures.get(figure) for figure in figures)) if kind else ()


def _peak_change(evidence: Evidence, regime: str, name: str) -> str:
    if not evidence.has(f"{regime}-{name}"):
        return ""
    own, adamw = (evidence.select(f"{regime}-{n}")[0].figure("peak_bytes") for n in (name, ADAMW))
    return f"{100 * (own / adamw - 1):+.0f}"


# Controls -------------------------------------------------------------------------------------------------------


def adamw_bytes(evidence: Evidence) -> Evidence:
    """AdamW's bytes in the place of every optimizer's."""
    for regime, row in product(REGIMES, rows(evidence)):
        evidence = evidence.replace(f"{regime}-{row.name}", by=f"{regime}-{ADAMW}")
    return evidence


def idle(evidence: Evidence) -> Evidence:
    """The losses of an optimizer that hardly moves in the place of every optimizer's."""
    for row in rows(evidence):
        evidence = evidence.replace(f"loss-{row.name}", by="control-idle")
    return evidence


def all_won(evidence: Evidence) -> Evidence:
    """Every optimizer with half of AdamW's state and peak, and its losses."""
    halved = []
    for regime, row in product(REGIMES, rows(evidence)):
        for r in evidence.select(f"{regime}-{ADAMW}"):
            half = {name: r.figure(name) / 2 for name in ("optimizer_state_bytes", "peak_bytes")}
            spec = r.spec.model_copy(update={"arm": f"{regime}-{row.name}"})
            halved.append(r.model_copy(update={"spec": spec, "figures": {**r.figures, **half}}))
    arms = {r.spec.arm for r in halved}
    changed = Evidence([*(r for r in evidence.records if r.spec.arm not in arms), *halved])
    for row in rows(evidence) if not _simulated(evidence) else ():
        changed = changed.replace(f"loss-{row.name}", by=f"loss-{ADAMW}")
    return changed


# Plots ----------------------------------------------------------------------------------------------------------


def choice_lines(evidence: Evidence) -> dict[str, Line]:
    """Of each optimizer: bytes of state per parameter in fp32, and progress lost; AdamW's own are 8 and 0."""
    adamw = span([_state(r) for r in evidence.select(f"fp32-{ADAMW}")])
    points = {ADAMW: Line([adamw.estimate], [0.0])}
    for row in rows(evidence):
        if row.lost is None:
            raise MissingEvidence("the sim tier has no losses")
        points[row.name] = Line([row.state["fp32"].estimate], [100 * row.lost.estimate])
    return points


def peak_lines(evidence: Evidence) -> dict[str, Line]:
    """In each regime: the peak as a share of AdamW's over bytes of state per parameter, a point for each optimizer."""
    table = rows(evidence)
    lines = {}
    for regime in REGIMES:
        points = sorted((row.state[regime].estimate, 100 * (1 - row.saved[regime].estimate)) for row in table)
        lines[regime] = Line([x for x, _ in points], [y for _, y in points])
    return lines


EXPERIMENT = Experiment(
    name=NAME,
    title="Which optimizer",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="optimizer-choice",
            statement="choosing the optimizer saves memory, and the model learns no less",
            lecture="4",
            tiers=("sim", "cpu", "gpu"),
            threshold=(
                f"in every regime (fp32, bf16, LoRA) an optimizer with at most {STATE_SHARE:.0%} of AdamW's state and "
                f"{LEAST_SAVING:.0%} less peak whose 95 % interval (all together) of progress lost lies below {MARGIN:.0%}"
            ),
            scope=(
                "the Trainer's names and their defaults, against adamw_torch_fused; loss and time from full fine-tuning of tiny "
                "in fp32, one task, few updates; peaks from a short batch, without checkpointing; sim: memory alone"
            ),
            judge=judge_choice,
            controls={
                "AdamW's bytes": Control(adamw_bytes, "refuted"),
                "an optimizer that hardly moves": Control(idle, "refuted"),
                "half the bytes for the same loss": Control(all_won, "supported"),
            },
            advice={
                "supported": "Take a smaller optimizer first: of those that keep the loss, the one with the least state.",
                "conditional": "Choose a smaller optimizer for full fine-tuning and tune its rate; with LoRA keep AdamW.",
                "refuted": "Keep AdamW: save memory with LoRA, checkpointing or a smaller batch.",
                "inconclusive": "Keep AdamW until a smaller optimizer, at a rate swept on your task, has kept the loss.",
            },
            stated={"cpu": "conditional", "full": "conditional", "sim": "conditional"},
        ),
    ),
    plots=(
        Plot(
            "optimizer-choice",
            "What each optimizer holds, and what the model learns less",
            "bytes of state per parameter, full fine-tuning in fp32",
            "% of AdamW's progress lost",
            choice_lines,
            joined=False,
            named=True,
        ),
        Plot(
            "optimizer-peak",
            "What each optimizer leaves of AdamW's peak",
            "bytes of state per trained parameter",
            "% of AdamW's peak",
            peak_lines,
            joined=False,
        ),
    ),
)
