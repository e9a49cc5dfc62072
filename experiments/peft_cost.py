"""What parameter-efficient methods cost against full fine-tuning: how many parameters they train, what memory they save.

Claims    peft-trains-few-parameters, peft-saves-memory (lecture 3)
Refuted   if more than SMALL_SHARE is trained or the closed form is wrong; if no method saves LEAST_SAVING anywhere
Control   full fine-tuning presented as each method; the same with a hundredth of its parameters and bytes
Run       lab run peft_cost --profile cpu

Counts, not draws: the intervals are spans over models, ranks, methods, or points of batch and length.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise, product

from lab.claims import Claim, Control, Evidence, Experiment, Finding, VerdictName, over_regimes
from lab.memory.workload import PHASES
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Precision, TrialSpec, memory_spec
from lab.statistics import span

NAME = "peft_cost"
METHODS = ("lora", "qlora", "dora", "mora", "ia3", "adapter", "prompt", "prefix", "ptuning")
COUNTED = tuple(method for method in METHODS if method != "qlora")  # which trains what LoRA trains
RANKED = ("lora", "dora", "mora")

# A share that is small: the gradients and AdamW moments of 5 % of the parameters take at most 0.6 bytes per parameter
# of the base in fp32 (0.05 x 12), under a third of its weights in bf16, so that the base alone decides what fits.
SMALL_SHARE = 0.05

# A saving under 10 % buys no larger batch in practice: it is within what fragmentation of a card takes.
LEAST_SAVING = 0.10


class Sizes(Section):
    """Parameters are counted on `count_models` at each rank; peaks found at each (batch, length) of `points`."""

    count_models: tuple[str, ...]
    count_ranks: tuple[Count, ...]
    memory_models: tuple[str, ...]
    precision: Precision
    points: tuple[tuple[Count, Count], ...]


class Params(Sizes):
    """What is measured, and what is simulated at real scale.

    Simulated under autocast, as trl trains by default: without it a prepared 4-bit base attends in fp32, for which there is
    no fused kernel with grouped keys, and adapters keep fp32 copies of their inputs.
    """

    real_scale: Sizes | None = None


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Parameter counts, and peaks at each point, of every method and of full fine-tuning."""
    specs: list[TrialSpec] = []

    def add_all(sizes: Sizes, sim: bool) -> None:
        def add(arm: str, name: str, **settings: object) -> None:
            specs.append(memory_spec(NAME, arm, name, profile.device, sim, **settings))

        for model, method in product(sizes.count_models, ("full", *COUNTED)):
            if method in RANKED:
                for rank in sizes.count_ranks:
                    options = {"rank": rank}
                    add(
                        f"count-{method}",
                        f"{model}-r{rank}",
                        model=model,
                        method=method,
                        method_options=options,
                        updates=0,
                    )
            else:
                add(f"count-{method}", model, model=model, method=method, updates=0)
        for model, (batch, length), method in product(sizes.memory_models, sizes.points, ("full", *METHODS)):
            setup = {"model": model, "batch": batch, "length": length, "precision": sizes.precision}
            setup |= {"autocast": True} if sim else {}
            add(f"peak-{method}", f"{model}-{batch}x{length}", method=method, **setup)

    add_all(params, sim=False)
    if params.real_scale:
        add_all(params.real_scale, sim=True)
    return specs


# peft-trains-few-parameters -------------------------------------------------------------------------------------


def judge_few(evidence: Evidence) -> Finding:
    """Trainable parameters over those of the base, and whether the closed form gives the same count."""
    found = [r for method in COUNTED for r in evidence.select(f"count-{method}")]
    shares = [_share(r) for r in found]
    wrong = [r.spec.name for r in found if r.figure("parameters_trainable") != r.figures.get("parameters_closed_form")]
    small = [share <= SMALL_SHARE for share in shares]
    verdict: VerdictName = "refuted" if wrong else over_regimes(small)
    stored = evidence.select("count-ptuning")[0]
    because = (
        f"counts differ from the closed form: {', '.join(wrong)}"
        if wrong
        else "; ".join(
            f"{model}: {', '.join(f'{_name(r)} {_share(r):.2g}' for r in sorted(group, key=_share))}"
            for model, group in _by_model(found).items()
        )
        + f"; P-Tuning stores {stored.figure('parameters_stored') / stored.figure('parameters_trainable'):.1%} of what it trains"
    )
    return Finding.of(verdict, span(shares), "of the base's parameters", because)


def _share(record: Record) -> float:
    return record.figure("parameters_trainable") / record.figure("parameters_base")


def _name(record: Record) -> str:
    rank = record.setting("method_options").get("rank")
    return f"{record.setting('method')}{f' r{rank}' if rank else ''}"


def _by_model(records: list[Record]) -> dict[str, list[Record]]:
    models = dict.fromkeys(str(r.setting("model")) for r in records)
    return {model: [r for r in records if r.setting("model") == model] for model in models}


def full_counts(evidence: Evidence) -> Evidence:
    """Full fine-tuning presented as every method."""
    for method in COUNTED:
        evidence = evidence.replace(f"count-{method}", by="count-full")
    return evidence


# peft-saves-memory ----------------------------------------------------------------------------------------------


Point = tuple[int, tuple[float, ...], tuple[float, ...]]
"""Tokens per batch; the peak of each phase under full fine-tuning, and under the method."""


def _points(evidence: Evidence, model: str, method: str) -> list[Point]:
    """By tokens."""
    full, other = (
        {
            (r.setting("batch"), r.setting("length")): tuple(r.figure(f"peak_{phase}_bytes") for phase in PHASES)
            for r in evidence.select(f"peak-{m}", model=model)
        }
        for m in ("full", method)
    )
    return sorted((batch * length, full[batch, length], other[batch, length]) for batch, length in full)


def _savings(points: list[Point]) -> list[float]:
    """Shares of full fine-tuning's peak that the method saves."""
    return [1 - max(other) / max(full) for _, full, other in points]


def _fades_at(points: list[Point]) -> int | None:
    """Tokens per batch at which the saving falls under LEAST_SAVING; None: it does not.

    Between two points the bytes of each phase are a straight line, which savings are not; the peak is the highest phase.
    """

    from scipy.optimize import brentq

    def missing(share: float, low: Point, high: Point) -> float:
        """Bytes over what would be a saving, at a share of the way between two points."""
        full, other = _peak_between(low[1], high[1], share), _peak_between(low[2], high[2], share)
        return other - (1 - LEAST_SAVING) * full

    if missing(0, points[0], points[0]) > 0:
        return points[0][0]
    for low, high in pairwise(points):
        if missing(1, low, high) > 0:
            share = brentq(missing, 0, 1, args=(low, high))
            return round(low[0] + share * (high[0] - low[0]))
    return None


def _peak_between(low: tuple[float, ...], high: tuple[float, ...], share: float) -> float:
    return max(a + share * (b - a) for a, b in zip(low, high, strict=True))


def _steady_saving(evidence: Evidence, model: str, method: str) -> float:
    """The share of full fine-tuning's bytes between updates that the method saves; the batch has no part in them."""
    full, other = (evidence.select(f"peak-{m}", model=model)[0].figure("steady_bytes") for m in ("full", method))
    return 1 - other / full


def _models(evidence: Evidence) -> list[str]:
    return list(_by_model(evidence.select("peak-full")))


def judge_memory(evidence: Evidence) -> Finding:
    """Savings at the peak, from few tokens to many, of every method."""
    values, parts = [], []
    for model in _models(evidence):
        words = []
        for method in METHODS:
            points = _points(evidence, model, method)
            peaks = _savings(points)
            steady = _steady_saving(evidence, model, method)
            values += peaks
            fades = _fades_at(points)
            until = f"under {LEAST_SAVING:.0%} from about {fades:,} tokens a batch" if fades else "never under it"
            words.append(f"{method} {peaks[0]:.0%} to {peaks[-1]:.0%} ({until}; between updates {steady:.0%})")
        parts.append(f"{model}: {', '.join(words)}")
    enough = [saving >= LEAST_SAVING for saving in values]
    verdict = over_regimes(enough)
    return Finding.of(verdict, span(values), "of the peak saved", "; ".join(parts))


def full_memory(evidence: Evidence) -> Evidence:
    """Full fine-tuning presented as every method."""
    for method in METHODS:
        evidence = evidence.replace(f"peak-{method}", by="peak-full")
    return evidence


def saving_lines(evidence: Evidence) -> dict[str, Line]:
    """Savings at the peak over tokens per batch, of each method on the last model."""
    lines = {}
    for method in METHODS:
        points = _points(evidence, _models(evidence)[-1], method)
        lines[method] = Line([tokens for tokens, _, _ in points], [100 * saving for saving in _savings(points)])
    return lines


# Known answer ---------------------------------------------------------------------------------------------------


AMOUNTS = (
    *(f"parameters_{kind}" for kind in ("trainable", "closed_form", "stored")),
    *(f"peak_{phase}_bytes" for phase in PHASES),
    "steady_bytes",
)


def a_hundredth(presented: Callable[[Evidence], Evidence]) -> Callable[[Evidence], Evidence]:
    """A control: full fine-tuning presented as every method, which then trains and takes a hundredth of it."""

    def changed(record: Record) -> dict[str, float]:
        amount = 100.0 if record.spec.arm.endswith("-full") else 1.0
        return {"parameters_base": 100.0, **dict.fromkeys(AMOUNTS, amount)}

    return lambda evidence: presented(evidence).with_figures(changed)


EXPERIMENT = Experiment(
    name=NAME,
    title="What parameter-efficient methods cost",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="peft-trains-few-parameters",
            statement="parameter-efficient fine-tuning trains a small share of the parameters",
            lecture="3",
            tiers=("sim", "cpu"),
            threshold=f"at most {SMALL_SHARE:.0%} of the base's parameters, and exactly as many as the closed form says",
            scope="every method with its defaults, LoRA and its kin on all linear layers; count, no draw: span over all",
            judge=judge_few,
            controls={
                "full fine-tuning as every method": Control(full_counts, "refuted"),
                "a hundredth of it as every method": Control(a_hundredth(full_counts), "supported"),
            },
            advice={
                "supported": "Expect an adapter of a few per cent of the model at most, whatever the method.",
                "conditional": "Count on a small share from 100M parameters on; P-Tuning's encoder and high ranks are larger.",
                "refuted": "Count the trainable parameters before you train; they are not few.",
                "inconclusive": "Print the number of trainable parameters before you train.",
            },
            stated={"cpu": "conditional", "full": "conditional", "sim": "supported"},
        ),
        Claim(
            id="peft-saves-memory",
            statement="parameter-efficient fine-tuning saves memory",
            lecture="3",
            tiers=("sim", "cpu", "gpu"),
            threshold=f"at least {LEAST_SAVING:.0%} of full fine-tuning's peak, for every method at every batch and length",
            scope="AdamW, no checkpointing; cpu: fp32, sim: bf16 under autocast; QLoRA: nf4; span over methods and points",
            judge=judge_memory,
            controls={
                "full fine-tuning as every method": Control(full_memory, "refuted"),
                "a hundredth of it as every method": Control(a_hundredth(full_memory), "supported"),
            },
            advice={
                "supported": "Switch to LoRA when full fine-tuning does not fit.",
                "conditional": "Switch to LoRA to save gradients and optimizer state; against activations use a "
                "smaller batch or checkpointing.",
                "refuted": "Do not expect LoRA to make it fit: shrink batch and length first.",
                "inconclusive": "Ask `lab fit` for your batch and length, with the method and without, before you count on a "
                "saving.",
            },
            stated={"cpu": "conditional", "full": "conditional", "sim": "conditional"},
        ),
    ),
    plots=(
        Plot(
            "peft-saving",
            "What each method saves at the peak",
            "tokens per batch",
            "% of full fine-tuning's peak",
            saving_lines,
            log_x=True,
        ),
    ),
)
