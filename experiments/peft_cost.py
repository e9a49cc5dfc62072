"""What LoRA costs against full fine-tuning: how many parameters it trains, and how much memory it saves.

Claims    peft-trains-few-parameters, peft-saves-memory (lecture 3)
Refuted   if more than SMALL_SHARE is trained or the closed form is wrong; if less than LEAST_SAVING is saved anywhere
Control   full fine-tuning presented as LoRA
Run       lab run peft_cost --profile cpu

Counts, not draws: the intervals are spans over models, ranks, or the grid of batch and length.
"""

from __future__ import annotations

from itertools import product

from lab.claims import Claim, Evidence, Experiment, Finding
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Memory, TrialSpec
from lab.statistics import Interval, span

NAME = "peft_cost"
METHODS = ("full", "lora")

# A share that is small: the gradients and AdamW moments of 5 % of the parameters take at most 0.6 bytes per parameter
# of the base in fp32 (0.05 x 12), under a third of its weights in bf16, so that the base alone decides what fits.
SMALL_SHARE = 0.05

# A saving under 10 % buys no larger batch in practice: it is within what fragmentation of a card takes.
LEAST_SAVING = 0.10


class Params(Section):
    """Parameters are counted on `count_models` at each rank; peaks measured on a grid of batches and lengths."""

    count_models: tuple[str, ...]
    count_ranks: tuple[Count, ...]
    memory_model: str
    batches: tuple[Count, ...]
    lengths: tuple[Count, ...]


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Parameter counts, and peaks on the grid, of LoRA and of full fine-tuning."""
    specs = []

    def add(arm: str, name: str, settings: Memory) -> None:
        specs.append(TrialSpec(experiment=NAME, name=f"{arm}-{name}", arm=arm, settings=settings))

    device = profile.device
    for model, rank in product(params.count_models, params.count_ranks):
        lora = Memory(model=model, method="lora", method_options={"rank": rank}, updates=0, device=device)
        add("count-lora", f"{model}-r{rank}", lora)
    for model in params.count_models:
        add("count-full", model, Memory(model=model, updates=0, device=device))
    for batch, length, method in product(params.batches, params.lengths, METHODS):
        memory = Memory(model=params.memory_model, method=method, batch=batch, length=length, device=device)
        add(f"peak-{method}", f"{batch}x{length}", memory)
    return specs


# peft-trains-few-parameters -------------------------------------------------------------------------------------


def judge_few(evidence: Evidence) -> Finding:
    """Trainable parameters over those of the base, and whether the closed form gives the same count."""
    found = evidence.select("count-lora")
    shares = [r.figure("parameters_trainable") / r.figure("parameters_base") for r in found]
    wrong = [r.spec.name for r in found if r.figure("parameters_trainable") != r.figures.get("parameters_closed_form")]
    small = [share <= SMALL_SHARE for share in shares]
    verdict = "refuted" if wrong or not any(small) else "supported" if all(small) else "conditional"
    because = (
        f"counts differ from the closed form: {', '.join(wrong)}"
        if wrong
        else "; ".join(
            f"{r.setting('model')} rank {r.setting('method_options')['rank']}: {share:.1%}"
            for r, share in zip(found, shares, strict=True)
        )
    )
    return _finding(verdict, span(shares), "of the base's parameters", because)


def full_counts(evidence: Evidence) -> Evidence:
    """Full fine-tuning presented as LoRA."""
    return evidence.replace("count-lora", by="count-full")


# peft-saves-memory ----------------------------------------------------------------------------------------------


def _savings(evidence: Evidence, figure: str) -> list[tuple[int, float]]:
    """(tokens per batch, share of full fine-tuning's bytes that LoRA saves), by tokens."""
    full = {_grid(r): r.figure(figure) for r in evidence.select("peak-full")}
    lora = {_grid(r): r.figure(figure) for r in evidence.select("peak-lora")}
    return sorted((point[0] * point[1], 1 - lora[point] / full[point]) for point in full)


def _grid(record: Record) -> tuple[int, int]:
    return record.setting("batch"), record.setting("length")


def judge_memory(evidence: Evidence) -> Finding:
    """Savings at the peak over the grid, from few tokens to many."""
    peaks = _savings(evidence, "peak_bytes")
    steady = span([saving for _, saving in _savings(evidence, "steady_bytes")])
    values = [saving for _, saving in peaks]
    enough = [saving >= LEAST_SAVING for saving in values]
    verdict = "supported" if all(enough) else "conditional" if any(enough) else "refuted"
    first_small = next((tokens for tokens, saving in peaks if saving < LEAST_SAVING), None)
    flip = (
        f"under {LEAST_SAVING:.0%} from {first_small} tokens a batch" if first_small else "at every point of the grid"
    )
    because = (
        f"peak {values[0]:.0%} at {peaks[0][0]} tokens a batch, {values[-1]:.0%} at {peaks[-1][0]}, {flip}; "
        f"between updates {steady.estimate:.0%}"
    )
    return _finding(verdict, span(values), "of the peak saved", because)


def full_memory(evidence: Evidence) -> Evidence:
    """Full fine-tuning presented as LoRA."""
    return evidence.replace("peak-lora", by="peak-full")


def saving_lines(evidence: Evidence) -> dict[str, Line]:
    """Savings over tokens per batch, at the peak and between updates."""
    lines = {}
    for figure, label in (("peak_bytes", "at the peak"), ("steady_bytes", "between updates")):
        points = _savings(evidence, figure)
        lines[label] = Line([tokens for tokens, _ in points], [100 * saving for _, saving in points])
    return lines


# --------------------------------------------------------------------------------------------------------------------


def _finding(verdict: str, interval: Interval, unit: str, because: str) -> Finding:
    return Finding(verdict, interval.estimate, interval.low, interval.high, unit, interval.n, because)  # type: ignore[arg-type]


EXPERIMENT = Experiment(
    name=NAME,
    title="What LoRA costs",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="peft-trains-few-parameters",
            statement="parameter-efficient fine-tuning trains a small share of the parameters",
            lecture="3",
            tiers=("sim", "cpu"),
            threshold=f"at most {SMALL_SHARE:.0%} of the base's parameters, and exactly as many as the closed form says",
            scope="LoRA on all linear layers; count, no draw: the interval is the span over models and ranks",
            judge=judge_few,
            controls={"full fine-tuning as LoRA": full_counts},
            advice={
                "supported": "Expect an adapter of a few per cent of the model at any rank you would use.",
                "conditional": "Count on a small share from about 100M parameters on; for smaller models lower the rank.",
                "refuted": "Count the trainable parameters before you train; they are not few.",
            },
            stated={"cpu": "conditional", "full": "conditional"},
        ),
        Claim(
            id="peft-saves-memory",
            statement="parameter-efficient fine-tuning saves memory",
            lecture="3",
            tiers=("sim", "cpu", "gpu"),
            threshold=f"at least {LEAST_SAVING:.0%} of full fine-tuning's peak, over the whole grid of batch and length",
            scope="LoRA rank 8 in fp32, no checkpointing; bytes, no draw: the interval is the span over the grid",
            judge=judge_memory,
            controls={"full fine-tuning as LoRA": full_memory},
            advice={
                "supported": "Switch to LoRA when full fine-tuning does not fit.",
                "conditional": "Switch to LoRA to save gradients and optimizer state; against activations use a "
                "smaller batch or checkpointing.",
                "refuted": "Do not expect LoRA to make it fit: shrink batch and length first.",
            },
            stated={"cpu": "supported", "full": "supported"},
        ),
    ),
    plots=(
        Plot("lora-saving", "What LoRA saves", "tokens per batch", "% of full fine-tuning", saving_lines, log_x=True),
    ),
)
