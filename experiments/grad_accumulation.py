"""Gradient accumulation: do k micro-batches give the update of one k-times larger batch?

Claim     grad-accumulation-equals-large-batch (lecture 4)
Refuted   if after UPDATES updates the parameters of the two are further apart than TOLERANCE, in either length regime
Control   averaging the micro-batch means (the old fault of many trainers) must be told apart on ragged lengths; the
          large batch held against itself
Run       lab run grad_accumulation --profile cpu
"""

from __future__ import annotations

from lab.claims import Claim, Control, Evidence, Experiment, Finding, VerdictName
from lab.params import Count, Profile, Rate, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Comparison, Memory, Training, TrialSpec
from lab.statistics import Interval, mean_interval

NAME = "grad_accumulation"

# The largest distance, relative to the way that the parameters have gone, which rounding may explain. A gradient is
# a sum; summing it in another order changes it by about the unit roundoff of the type in which the products are made:
# 6e-8 in fp32, 4e-3 in bf16. Some thousand products and five updates make of this, at worst and in proportion to
# the square root of their number, some 1e-5 and 1e-2; the tolerance in fp32 leaves a factor of ten to that. The
# fault that it has to find moves the parameters by tens of per cent.
TOLERANCE = {"fp32": 1e-4, "autocast": 1e-2}

LENGTHS = ("fixed", "ragged")


class Params(Section):
    """A batch of `micro_batch_size` x `steps`, at once and accumulated; SGD, whose update is the gradient itself."""

    task: str
    seeds: Count
    updates: Count
    learning_rate: Rate
    micro_batch_size: Count
    steps: Count
    memory_model: str


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Pairs over lengths and precisions with SGD; AdamW beside them; the planted fault; the memory of both ways."""
    specs = []
    whole = params.micro_batch_size * params.steps
    for seed in range(params.seeds):
        for lengths in LENGTHS:
            for precision in TOLERANCE:
                for fault in (None, "mean-of-means"):
                    large = Training.model_validate(
                        {
                            "model": "tiny",
                            "task": params.task,
                            "optimizer": "sgd",
                            "learning_rate": params.learning_rate,
                            "schedule": "constant",
                            "precision": precision,
                            "lengths": lengths,
                            "updates": params.updates,
                            "micro_batch_size": whole,
                            "seed": seed,
                            "evaluations": 0,
                            "device": profile.device,
                        }
                    )
                    accumulated = large.model_copy(
                        update={
                            "micro_batch_size": params.micro_batch_size,
                            "gradient_accumulation_steps": params.steps,
                            "fault": fault,
                        }
                    )
                    arm = f"{'fault' if fault else 'pair'}-{lengths}-{precision}"
                    specs.append(_pair(arm, seed, large, accumulated))
        large = Training(
            model="tiny",
            task=params.task,
            learning_rate=1e-3,
            schedule="constant",
            updates=params.updates,
            micro_batch_size=whole,
            seed=seed,
            evaluations=0,
            device=profile.device,
        )
        accumulated = large.model_copy(
            update={"micro_batch_size": params.micro_batch_size, "gradient_accumulation_steps": params.steps}
        )
        specs.append(_pair("adamw-ragged-fp32", seed, large, accumulated))
    for arm, batch, steps in (
        ("memory-large", whole, 1),
        ("memory-accumulated", params.micro_batch_size, params.steps),
    ):
        memory = Memory(
            model=params.memory_model,
            batch=batch,
            length=64,
            gradient_accumulation_steps=steps,
            device=profile.device,
        )
        specs.append(TrialSpec(experiment=NAME, name=arm, arm=arm, settings=memory))
    return specs


def _pair(arm: str, seed: int, first: Training, second: Training) -> TrialSpec:
    settings = Comparison(first=first, second=second, snapshots=first.updates)
    return TrialSpec(experiment=NAME, name=f"{arm}-seed{seed}", arm=arm, settings=settings)


def _distance(records: list[Record]) -> Interval:
    for record in records:
        if record.tags["data_order"] != record.tags["second_data_order"]:
            raise ValueError(f"{record.spec.name}: the two runs did not see the same rows")
    return mean_interval([r.figure("distance") for r in records])


def judge(evidence: Evidence) -> Finding:
    """The worst of four regimes, as a multiple of its tolerance."""
    regimes = {
        (length, kind): _distance(evidence.select(f"pair-{length}-{kind}")) for length in LENGTHS for kind in TOLERANCE
    }
    scaled = {
        regime: Interval(
            d.estimate / TOLERANCE[regime[1]], d.low / TOLERANCE[regime[1]], d.high / TOLERANCE[regime[1]], d.n
        )
        for regime, d in regimes.items()
    }
    worst = max(scaled.values(), key=lambda interval: interval.high)
    equal = {regime: interval.high <= 1 for regime, interval in scaled.items()}
    apart = {regime: interval.low > 1 for regime, interval in scaled.items()}
    verdict: VerdictName
    if all(equal.values()):
        verdict = "supported"
    elif any(apart.values()):
        verdict = "conditional" if any(equal.values()) else "refuted"
    else:
        verdict = "inconclusive"
    adamw = _distance(evidence.select("adamw-ragged-fp32")).estimate
    losses = max(r.figure("loss_difference") for r in evidence.select("adamw-ragged-fp32"))
    large, small = evidence.select("memory-large")[0], evidence.select("memory-accumulated")[0]
    saved = 1 - small.figure("activations_bytes") / large.figure("activations_bytes")
    pairs = evidence.select("pair-ragged-fp32")
    slower = ""
    if pairs[0].setting("device") != "cuda":  # there the first of a pair pays for the start of the card
        times = [r.figure("second_seconds_per_update") / r.figure("first_seconds_per_update") for r in pairs]
        slower = f", {mean_interval(times).estimate:.2f} x the time"
    because = (
        "distance "
        + ", ".join(f"{length} {kind} {d.estimate:.1e}" for (length, kind), d in regimes.items())
        + f"; AdamW {adamw:.1e} (its first steps act on the sign), its losses differ by at most {losses:.1e}"
        + f"; {saved:.0%} fewer activation bytes{slower}"
    )
    return Finding.of(verdict, worst, "x tolerance (the worst of four)", because)


def mean_of_means_control(evidence: Evidence) -> Evidence:
    """Each micro-batch averaged by itself: right on equal lengths, wrong on ragged ones."""
    for length in LENGTHS:
        for kind in TOLERANCE:
            evidence = evidence.replace(f"pair-{length}-{kind}", by=f"fault-{length}-{kind}")
    return evidence


def no_distance(evidence: Evidence) -> Evidence:
    """The large batch held against itself."""
    return evidence.with_figures(lambda _: {"distance": 0.0})


def distance_lines(evidence: Evidence) -> dict[str, Line]:
    """Distance over updates on ragged lengths, right and with the fault."""
    lines = {}
    for arm, label in (
        ("pair-ragged-fp32", "accumulated, fp32"),
        ("pair-ragged-autocast", "accumulated, bf16 autocast"),
        ("fault-ragged-fp32", "mean of means, fp32 (the fault)"),
    ):
        found = evidence.select(arm)
        columns = list(zip(*(r.series["distance"] for r in found), strict=True))
        x = [float(v or 0) for v in found[0].series["distance_update"]]
        lines[label] = Line(x, [sum(float(v or 0) for v in column) / len(column) for column in columns])
    return lines


EXPERIMENT = Experiment(
    name=NAME,
    title="Gradient accumulation",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="grad-accumulation-equals-large-batch",
            statement="accumulating k micro-batches equals the k-times larger batch",
            lecture="4",
            tiers=("cpu", "gpu"),
            threshold=", ".join(f"{v:g} of the way gone in {k}" for k, v in TOLERANCE.items())
            + ", fixed and ragged lengths",
            scope="tiny, SGD, transformers Trainer, which weighs every token of the batch alike; AdamW beside it",
            judge=judge,
            controls={
                "mean of means": Control(mean_of_means_control, "conditional"),
                "the large batch itself": Control(no_distance, "supported"),
            },
            advice={
                "supported": "Accumulate freely with a current Trainer: fewer activations, the same update to rounding.",
                "conditional": "Accumulate where the update is the same; elsewhere compare a few updates first.",
                "refuted": "Check how your trainer averages over micro-batches before you accumulate.",
                "inconclusive": "Compare a few updates, accumulated and in one batch, before you accumulate in a long run.",
            },
            stated={"cpu": "supported", "full": "supported"},
        ),
    ),
    plots=(
        Plot(
            name="accumulation-distance",
            title="One large batch against accumulated micro-batches",
            x="updates",
            y="distance / way gone",
            lines=distance_lines,
            log_y=True,
        ),
    ),
)
