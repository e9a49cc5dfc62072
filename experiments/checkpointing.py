"""Gradient checkpointing: does it relieve the batch limit, what does it cost, and are the gradients the same?

Claim     checkpointing-trades-compute-for-memory (lecture 4)
Refuted   if a gradient differs, also under dropout; if on no card the largest batch doubles; if what a layer keeps does not
          halve; if no method pays with time, or all pay with more than one forward pass again
Control   no checkpointing presented as checkpointing; the random state not preserved (measured); a price of nothing, and of
          two passes more; records with nothing to find fault with
Run       lab run checkpointing --profile cpu

Gradients and times are drawn (weights, tokens, dropout; the machine); bytes are counted. In the sim tier there are bytes
alone: the batch limit on real cards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, Literal

from lab.cards import DRIVER_SHARE, GIB, usable_bytes
from lab.claims import Claim, Control, Evidence, Experiment, Finding, VerdictName, over_answers, over_regimes
from lab.memory.workload import PHASES
from lab.params import Count, Profile, Section, Share
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Checkpointing, TrialSpec, memory_spec
from lab.statistics import Answer, Interval, bonferroni, mean_ratio, slope, span

NAME = "checkpointing"
WITHOUT, WITH = "without", "with"
"""The arms whose peaks are held against each other."""

# The same function: the replay repeats the operations of the first pass, so equal to the bit is what to expect on a
# processor. On a GPU sums of atomic additions change order: fp32 has 24 bits, and some 30 roundings in a row are 30 x 2^-24 =
# 2e-6 of the largest gradient; twice that, and many_adapters takes the same of outputs.
SAME = 5e-6

# People double batches: a gain under 2 does not buy the next one. For the batch to double, what grows with it must halve,
# so the same factor is asked of what a layer keeps.
LEAST_GAIN = 2

# The price is one forward pass more. Forward is half as much as backward in full fine-tuning, so that an update takes 4/3 of
# the time, and as much as backward under LoRA, where frozen weights take no gradient: 3/2. A second replay would make it 5/3
# and 2. The limit is half-way between one replay and two. Fewer operations than in theory are to be expected: the head is
# not replayed, nor is what follows the last tensor of a layer that backward reads.
MOST_TIME = {"full": 1.5, "lora": 1.75}
THEORY = {"full": 4 / 3, "lora": 3 / 2}

# GB, those of model_size but one. On a processor models of a few million parameters stand in for the real ones, and a
# sixty-fourth of the memory for each card: 128 MiB, in which the smallest model is about to fit, to 1.25 GiB.
CARDS = (8, 16, 24, 80)
EMULATED_SHARE = 1 / 64

# As people train: bf16 weights under autocast, as trl sets it (model_size does the same, always checkpointed). The chunked
# loss never holds all logits at once: it shows what they cost where the vocabulary is large.
REAL: dict[str, Any] = {"precision": "bf16", "autocast": True}
SIMULATED: dict[str, dict[str, Any]] = {
    "full": REAL,
    "lora": {**REAL, "method": "lora"},
    "lora-chunked": {**REAL, "method": "lora", "loss": "chunked"},
}
METHODS = tuple(MOST_TIME)


class PassParams(Section):
    """One batch of a bundled shape."""

    model: str
    precision: Literal["fp32", "bf16"] = "fp32"
    batch: Count
    length: Count


class GradientParams(PassParams):
    """Gradients compared, for each of `seeds`, without dropout and with it."""

    layers: Count
    dropout: Share
    seeds: Count


class DepthParams(PassParams):
    """What a forward pass keeps, at each depth."""

    layers: tuple[Count, ...]


class TimeParams(PassParams):
    """Timed in each of `repeats` trials, `rounds` passes of each."""

    repeats: Count
    rounds: Count


class PeakParams(Section):
    """Peaks of each model at each (batch, length); two batches or more at each length."""

    models: tuple[str, ...]
    precision: Literal["fp32", "bf16"] = "fp32"
    points: tuple[tuple[Count, Count], ...]


class Params(Section):
    """What is run on the device, and what is simulated at real scale."""

    gradients: GradientParams
    depth: DepthParams
    time: TimeParams
    peaks: PeakParams
    real_scale: PeakParams | None = None


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Gradients, depths and times by the kind `checkpointing`; peaks by measuring, and by simulating."""
    specs: list[TrialSpec] = []

    def add(arm: str, name: str, chosen: PassParams, threads: int = 1, **settings: Any) -> None:
        shared = chosen.model_dump(include={"model", "precision", "batch", "length"})
        setup = Checkpointing.model_validate({**shared, **settings, "device": profile.device})
        specs.append(TrialSpec(experiment=NAME, name=f"{arm}-{name}", arm=arm, threads=threads, settings=setup))

    chosen = params.gradients
    for method, dropout, seed in product(METHODS, (0.0, chosen.dropout), range(chosen.seeds)):
        settings: dict[str, Any] = {
            "method": method,
            "attention_dropout": dropout,
            "layers": chosen.layers,
            "seed": seed,
        }
        settings |= {"method_options": {"dropout": dropout}} if method == "lora" else {}
        add("gradients", f"{method}-{'dropout' if dropout else 'plain'}-seed{seed}", chosen, **settings)
    for layers in params.depth.layers:
        add("depth", f"{layers}", params.depth, layers=layers)

    def add_peaks(sizes: PeakParams, ways: Mapping[str, Mapping[str, Any]], sim: bool) -> None:
        for model, (way, settings), (batch, length) in product(sizes.models, ways.items(), sizes.points):
            for arm in (WITHOUT, WITH):
                setup = {"model": model, "batch": batch, "length": length, "precision": sizes.precision, **settings}
                setup |= {"checkpointing": arm == WITH}
                specs.append(memory_spec(NAME, arm, f"{model}-{way}-{batch}x{length}", profile.device, sim, **setup))

    add_peaks(params.peaks, {method: {"method": method} for method in METHODS}, sim=False)
    if params.real_scale:
        add_peaks(params.real_scale, SIMULATED, sim=True)
    for method, seed in product(METHODS, range(params.time.repeats)):
        settings = {"method": method, "seed": seed, "rounds": params.time.rounds}
        add("time", f"{method}-seed{seed}", params.time, profile.threads, **settings)
    return specs


# The batch limit ------------------------------------------------------------------------------------------------

MOST = 2**20
"""The largest batch that is asked about."""

Point = tuple[int, tuple[float, ...]]
"""A batch, and the peak of each phase."""


@dataclass(frozen=True)
class Setup:
    """What is trained in a cell: the words by which records are paired."""

    model: str
    method: str
    loss: str
    length: int

    @classmethod
    def of(cls, record: Record) -> Setup:
        """That of a record."""
        loss = record.setting("loss") or "full"
        return cls(record.setting("model"), record.setting("method"), loss, record.setting("length"))

    def __str__(self) -> str:
        loss = "" if self.loss == "full" else f" with {self.loss} loss"
        return f"{self.model} {self.method}{loss} at {self.length} tokens"


@dataclass(frozen=True)
class Cell:
    """The largest batch of a setup under a card's memory, without and with checkpointing."""

    setup: Setup
    card: int
    without: int
    with_it: int
    bound: bool = False
    """Whether `with_it` may be less: it lies beyond the batches counted, and their lines do not tell the bend."""

    @property
    def gain(self) -> float | None:
        """How many times the batch; None where nothing fits without."""
        return self.with_it / self.without if self.without else None

    @property
    def holds(self) -> bool:
        """Whether the limit is relieved: a batch LEAST_GAIN times as large, or one sequence where there was none."""
        return self.with_it >= LEAST_GAIN * max(self.without, 0.5)

    def __str__(self) -> str:
        if not self.with_it:
            return f"{self.card} GB"
        return f"{self.card} GB {self.without} to {'at most ' * self.bound}{self.with_it}"


def room(card: int, device: str) -> int:
    """Bytes that a peak may take on a card of so many GB, or on a processor in the part of them that stands in for it."""
    if device == "cpu":
        return int(card * GIB * EMULATED_SHARE)
    return usable_bytes(int(card * GIB * (1 - DRIVER_SHARE)))


def largest_batch(points: Sequence[Point], space: int) -> int:
    """The largest batch whose peak is within `space` bytes, 0 if there is none.

    Bytes of a phase are flat as long as weights and state decide, and then a straight line. Between two points the line
    that joins them lies on or above that, so that no batch is promised that does not fit; beyond the last it goes on, which
    is right where the last two are past the bend (`before_the_bend`).

    Raises:
        ValueError: fewer than two batches.
    """
    points = sorted(points)
    if len(points) < 2:
        raise ValueError(f"a batch limit needs peaks at two batches or more, got {len(points)}")

    def peak(batch: int) -> float:
        (a, low), (b, high) = next((p for p in pairwise(points) if batch <= p[1][0]), (points[-2], points[-1]))
        return max(x + (batch - a) / (b - a) * (y - x) for x, y in zip(low, high, strict=True))

    fits, fails = 0, MOST + 1
    while fails - fits > 1:
        middle = (fits + fails) // 2
        fits, fails = (middle, fails) if peak(middle) <= space else (fits, middle)
    return fits


def before_the_bend(points: Sequence[Point]) -> bool:
    """Whether backward grows less between the last two batches than forward does, all logits held: it has yet to bend.

    Past the bend backward holds at its highest what forward held, and the gradient of the logits beside it.
    """
    (_, low), (_, high) = sorted(points)[-2:]
    growth = {phase: b - a for phase, a, b in zip(PHASES, low, high, strict=True)}
    return growth["backward"] < growth["forward"]


def _setups(evidence: Evidence) -> dict[Setup, list[Record]]:
    """The records of each setup with checkpointing, by batch."""
    found: dict[Setup, list[Record]] = {}
    for record in evidence.select(WITH):
        found.setdefault(Setup.of(record), []).append(record)
    return {setup: sorted(records, key=lambda r: r.setting("batch")) for setup, records in found.items()}


def cells(evidence: Evidence) -> list[Cell]:
    """Every setup on every card.

    Raises:
        ValueError: a setup was not measured at the same batches without and with checkpointing.
    """
    found = []
    for setup, records in _setups(evidence).items():
        without, with_it = (
            [(r.setting("batch"), tuple(r.figure(f"peak_{phase}_bytes") for phase in PHASES)) for r in arm]
            for arm in ([r for r in evidence.select(WITHOUT) if Setup.of(r) == setup], records)
        )
        if sorted(b for b, _ in without) != sorted(b for b, _ in with_it):
            raise ValueError(f"{setup}: not the same batches without checkpointing and with it")
        for card in CARDS:
            space = room(card, records[0].setting("device"))
            most = largest_batch(with_it, space)
            bound = most > max(b for b, _ in with_it) and setup.loss == "full" and before_the_bend(with_it)
            found.append(Cell(setup, card, largest_batch(without, space), most, bound))
    return found


def _logits_share(record: Record) -> float:
    """The part of what a batch adds to a checkpointed peak that logits take."""
    phase = max(PHASES, key=lambda phase: record.figure(f"peak_{phase}_bytes"))
    added = record.figure(f"peak_{phase}_bytes") - record.figure("steady_bytes")
    return record.figure(f"peak_{phase}_logits_bytes") / added if added > 0 else 0.0


# Judge ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """What the evidence says of one part of the claim."""

    verdict: VerdictName
    because: str


def judge(evidence: Evidence) -> Finding:
    """The batch limit; outside the sim tier also gradients, bytes by depth and time. The claim is as good as its worst part."""
    found = cells(evidence)
    parts = [_relief(evidence, found)]
    if not any(r.spec.tier == "sim" for r in evidence.records):
        parts += [_equal(evidence), _kept(evidence), _price(evidence)]
    verdicts = {part.verdict for part in parts}
    order: tuple[VerdictName, ...] = ("refuted", "inconclusive", "conditional")
    verdict: VerdictName = next((name for name in order if name in verdicts), "supported")
    flips = _flips(evidence, found) if len({cell.holds for cell in found}) > 1 else ""
    gains = [cell.gain for cell in found if cell.gain is not None]
    because, unit = "; ".join(part.because for part in parts), "x the largest batch"
    if not gains:
        return Finding(verdict, None, None, None, unit, 0, because, flips=flips)
    return Finding.of(verdict, span(gains), unit, because, flips)


def _relief(evidence: Evidence, found: Sequence[Cell]) -> Part:
    """Where the largest batch doubles, and where it does not: where weights fill the card nothing is relieved either."""
    setups = _setups(evidence)

    def words(chosen: Iterable[Cell], logits: bool = False) -> str:
        by_setup: dict[Setup, list[Cell]] = {}
        for cell in chosen:
            by_setup.setdefault(cell.setup, []).append(cell)
        return ", ".join(
            f"{setup}"
            + (f" (logits take {_logits_share(setups[setup][-1]):.0%} of what a batch adds)" if logits else "")
            + f": {' / '.join(map(str, group))}"
            for setup, group in by_setup.items()
        )

    none = [cell for cell in found if not cell.with_it]
    little = [cell for cell in found if cell.with_it and not cell.holds]
    enough = [cell for cell in found if cell.holds]
    reasons = [f"largest batch at least {LEAST_GAIN} times as large in {len(enough)} of {len(found)} cases"]
    reasons += [words(enough)] if enough else []
    reasons += [f"less than that: {words(little, logits=True)}"] if little else []
    reasons += [f"not one sequence fits either way in {len(none)}: {words(none)}"] if none else []
    return Part(over_regimes(cell.holds for cell in found), "; ".join(reasons))


def _flips(evidence: Evidence, found: Sequence[Cell]) -> str:
    """On which cards the largest batch of a setup doubles, on which it grows by less, and on which no sequence fits."""
    setups = _setups(evidence)
    told: dict[str, list[str]] = {}
    for setup in setups:
        cells = [cell for cell in found if cell.setup == setup]
        little = [cell for cell in cells if cell.with_it and not cell.holds]
        sides = {
            "the largest batch at least doubles": [cell for cell in cells if cell.holds],
            "it grows by less": little,
            "no sequence fits": [cell for cell in cells if not cell.with_it],
        }
        words = [f"{side} on {', '.join(str(c.card) for c in there)} GB" for side, there in sides.items() if there]
        logits = f" (logits are {_logits_share(setups[setup][-1]):.0%} of what a sequence adds)" if little else ""
        told.setdefault(", ".join(words), []).append(f"{setup}{logits}")
    return "; ".join(f"{', '.join(chosen)}: {words}" for words, chosen in told.items())


def _equal(evidence: Evidence) -> Part:
    """Gradients must be equal in every trial: one that differs would be a price that nobody names."""
    found = evidence.select("gradients")
    if not {0.0} < {r.setting("attention_dropout") for r in found} or {r.setting("method") for r in found} != {
        *METHODS
    }:
        return Part("inconclusive", "gradients were not compared for every method, without dropout and with it")
    worst = max(found, key=_gap)
    lost = min(r.figure("difference_unpreserved") for r in found if r.setting("attention_dropout"))
    words = f"gradients differ by at most {_gap(worst):.2g} of the largest (random state lost: {lost:.2g} at least)"
    if lost <= SAME:  # then the comparison would not have seen a random state that is lost
        return Part("inconclusive", f"{words}: dropout that is drawn anew makes no difference here")
    equal = _gap(worst) <= SAME
    return Part("supported" if equal else "refuted", words if equal else f"{words}: {worst.spec.name}")


def _gap(record: Record) -> float:
    return max(record.figure("difference_non_reentrant"), record.figure("difference_reentrant"))


def _kept(evidence: Evidence) -> Part:
    """Bytes that a layer keeps until backward: the slope over depth."""
    without, with_it = (_by_depth(evidence, side) for side in (WITHOUT, WITH))
    hidden = evidence.select("depth")[0].figure("hidden_bytes")
    words = f"a layer keeps {with_it.estimate / hidden:.3g} hidden states, {without.estimate / hidden:.3g} without"
    if without.low >= LEAST_GAIN * with_it.high:
        return Part("supported", words)
    return Part("refuted" if without.high < LEAST_GAIN * with_it.low else "inconclusive", words)


def _by_depth(evidence: Evidence, side: str) -> Interval:
    found = evidence.select("depth")
    return slope([r.figure("layers") for r in found], [r.figure(f"{side}_kept_bytes") for r in found])


def _price(evidence: Evidence) -> Part:
    """Time with checkpointing over time without, forward and backward, by method; the intervals hold together."""
    found = evidence.select("time")
    answers: dict[str, Answer] = {}
    reasons = []
    for method, most in MOST_TIME.items():
        records = [r for r in found if r.setting("method") == method]
        if not records:
            return Part("inconclusive", f"no time was taken of {method}")
        ratio = mean_ratio([r.figure("ratio") for r in records], bonferroni(len(MOST_TIME)))
        counted = records[0].figure("with_flops") / records[0].figure("without_flops")
        answers[method] = _paid(ratio, most)
        word = {"yes": "", "no": ", which is not one pass more", "undecided": ", undecided"}[answers[method]]
        reasons.append(
            f"{method} {ratio:.2f} times the time, n = {ratio.n} "
            f"(operations {counted:.2f}, theory {THEORY[method]:.2f}){word}"
        )
    return Part(over_answers(answers.values()), ", ".join(reasons))


def _paid(ratio: Interval, most: float) -> Answer:
    """Whether the time is more than before, by one forward pass and not by two."""
    if ratio.low > 1 and ratio.high <= most:
        return "yes"
    return "no" if ratio.high <= 1 or ratio.low > most else "undecided"


# Controls -------------------------------------------------------------------------------------------------------


def nothing_checkpointed(evidence: Evidence) -> Evidence:
    """No checkpointing presented as checkpointing."""
    return evidence.replace(WITH, by=WITHOUT)


def _presented(arm: str, change: Callable[[Record], dict[str, float]]) -> Callable[[Evidence], Evidence]:
    """A control: the records of an arm with other figures."""

    return lambda evidence: evidence.with_figures(lambda r: change(r) if r.spec.arm == arm else {})


random_state_lost = _presented("gradients", lambda r: {"difference_non_reentrant": r.figure("difference_unpreserved")})
free = _presented("time", lambda r: {"ratio": 1.0})
replayed_twice = _presented("time", lambda r: {"ratio": 2 * THEORY[r.setting("method")] - 1})


def flawless(evidence: Evidence) -> Evidence:
    """Peaks that grow with the batch alone, a quarter as fast when checkpointed; equal gradients; the price of theory."""

    def changed(record: Record) -> dict[str, float]:
        match record.spec.arm:
            case "with" | "without" as arm:
                peak = record.setting("batch") * (2**20 if arm == WITH else 2**22)
                return {f"peak_{phase}_bytes": peak for phase in PHASES}
            case "gradients":
                return {"difference_non_reentrant": 0.0, "difference_reentrant": 0.0}
            case "depth":
                hidden = record.figure("layers") * record.figure("hidden_bytes")
                return {"with_kept_bytes": hidden, "without_kept_bytes": 20 * hidden}
            case "time":
                return {"ratio": THEORY[record.setting("method")] + record.setting("seed") / 1000}
        return {}

    return Evidence(evidence.select()).with_figures(changed)


# Plots ----------------------------------------------------------------------------------------------------------


def batch_lines(evidence: Evidence) -> dict[str, Line]:
    """The largest batch over the card's memory under LoRA at the shortest length, by model; cards that hold none left out."""
    found = cells(evidence)
    shortest = min(cell.setup.length for cell in found)
    lines = {}
    for model in dict.fromkeys(cell.setup.model for cell in found):
        for side, attribute in ((WITHOUT, "without"), (WITH, "with_it")):
            points = [
                (cell.card, getattr(cell, attribute))
                for cell in found
                if (cell.setup.model, cell.setup.method, cell.setup.loss) == (model, "lora", "full")
                and cell.setup.length == shortest
                and getattr(cell, attribute)
            ]
            if points:
                lines[f"{model}, {side}"] = Line([x for x, _ in points], [y for _, y in points])
    return lines


def depth_lines(evidence: Evidence) -> dict[str, Line]:
    """MiB that a forward pass keeps over the number of layers."""
    found = sorted(evidence.select("depth"), key=lambda r: r.figure("layers"))
    layers = [r.figure("layers") for r in found]
    return {side: Line(layers, [r.figure(f"{side}_kept_bytes") / 2**20 for r in found]) for side in (WITHOUT, WITH)}


EXPERIMENT = Experiment(
    name=NAME,
    title="Gradient checkpointing",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="checkpointing-trades-compute-for-memory",
            statement="gradient checkpointing relieves the batch limit, at the price of compute",
            lecture="4",
            tiers=("sim", "cpu", "gpu"),
            threshold=f"the largest batch at least {LEAST_GAIN} times as large on each card of "
            f"{', '.join(map(str, CARDS))} GB, for full fine-tuning and LoRA; a layer keeps at most 1/{LEAST_GAIN}; every "
            f"gradient within {SAME:g} of the largest; forward and backward take more than before, up to "
            f"{MOST_TIME['full']:g} times (full) and {MOST_TIME['lora']:g} (LoRA)",
            scope="every layer a checkpoint, AdamW, sequences of full length; random weights; lines through the batches that "
            "were counted (1 to 32), which beyond the last of them are extrapolated; cpu: fp32, cards of 1/64 of the memory; "
            "time without the optimizer's step; span over setups and cards where a sequence fits without",
            judge=judge,
            controls={
                "no checkpointing as checkpointing": Control(nothing_checkpointed, "refuted"),
                "the random state lost": Control(random_state_lost, "refuted", ("gradients",)),
                "no price": Control(free, "refuted", ("time",)),
                "two passes more": Control(replayed_twice, "refuted", ("time",)),
                "nothing to find fault with": Control(flawless, "supported"),
            },
            advice={
                "supported": "Turn checkpointing on when the batch does not fit: same gradients, twice the batch and more, for "
                "a second forward pass.",
                "conditional": "Checkpoint against activations. Against logits take a chunked loss, against weights LoRA or 4 "
                "bits; if one sequence fits, accumulate.",
                "refuted": "Leave checkpointing off: shorten sequences or accumulate gradients to get by with a smaller batch.",
                "inconclusive": "Try it on your setup: keep it where the largest batch doubles, and time an update with and "
                "without before a long run.",
            },
            stated={"cpu": "conditional", "full": "conditional", "sim": "conditional"},
        ),
    ),
    plots=(
        Plot(
            "largest-batch",
            "The largest batch that a card takes (LoRA)",
            "memory of the card, GB (cpu: 1/64 of it)",
            "sequences",
            batch_lines,
            log_x=True,
            log_y=True,
        ),
        Plot("kept-by-depth", "What a forward pass keeps for backward", "layers", "MiB", depth_lines),
    ),
)
