"""The peak: what is it made of, and can it be known before the run?

Claims    four-parts-explain-peak (lecture 2), prediction-matches-measurement
Refuted   parts: the four hold less than LEAST_SHARE of every peak; prediction: most peaks are off by more than MOST_OFF
Control   a sum that forgets the optimizer, one that counts everything; the lecture's rules as the prediction
Run       lab run peak_memory --profile cpu

Bytes, not draws: a peak is counted to the byte, so the intervals are spans over setups.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from lab.cards import GIB
from lab.claims import Claim, Evidence, Experiment, Finding, VerdictName, over_regimes
from lab.memory.workload import PHASES
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Simulation, TrialSpec, memory_spec
from lab.statistics import span

NAME = "peak_memory"

# As for the other memory rules: finer than any card's free memory is known (see memory_formulas.py).
LEAST_SHARE = 0.95

# A prediction is of use where it is finer than what nobody can know: how much of a card fragmentation takes (3 % and more,
# see lab/cards.py). A third of that leaves the prediction the smaller of the two errors.
MOST_OFF = 0.01

# Of others' measurements neither the versions nor every setting is known: 0.5 % for the middle, 3 % for the worst.
PUBLISHED_MEDIAN, PUBLISHED_MOST = 0.005, 0.03

FOUR = ("weights", "gradients", "optimizer", "activations")
REST = ("logits", "temporaries", "inputs", "other")

LORA_BF16 = {"method": "lora", "precision": "bf16"}
SETUPS: dict[str, dict[str, Any]] = {
    "full-fp32": {},
    "full-bf16": {"precision": "bf16"},
    "full-bf16-master": {"precision": "bf16-master"},
    "full-autocast": {"precision": "autocast"},
    "full-eager": {"attention": "eager"},
    "full-for-loop": {"step": "for-loop"},
    "full-fused": {"optimizer": "adamw_torch_fused", "step": "fused"},
    "full-8-bit": {"optimizer": "adamw_bnb_8bit"},
    "full-adafactor": {"optimizer": "adafactor"},
    "full-sgd": {"optimizer": "sgd"},
    "full-lion": {"optimizer": "lion_8bit"},
    "full-checkpointing": {"checkpointing": True},
    "full-accumulation": {"gradient_accumulation_steps": 2},
    "lora-fp32": {"method": "lora"},
    "lora-bf16": LORA_BF16,
    "lora-checkpointing": {**LORA_BF16, "checkpointing": True},
    "qlora": {"method": "qlora", "precision": "bf16"},
    "dora": {"method": "dora", "precision": "bf16"},
    "mora": {"method": "mora", "precision": "bf16"},
    "ia3": {"method": "ia3", "precision": "bf16"},
    "adapter": {"method": "adapter", "precision": "bf16"},
    "prompt": {"method": "prompt", "precision": "bf16"},
    "prefix": {"method": "prefix", "precision": "bf16"},
    "ptuning": {"method": "ptuning", "precision": "bf16"},
}
COMMON = ("full-fp32", "full-bf16", "full-8-bit", "lora-bf16", "qlora")
"""What other models than the first are measured with, and models of real scale simulated."""

# An A100-80GB with torch 2.4 and transformers 4.48, by others: Mistral-7B-v0.1 with one row added to its embedding, batches
# of 4,096 tokens, checkpointing, FlashAttention-2, foreach AdamW. GiB allocated at the peak, and at the end.
MISTRAL = {
    "model": "mistral-7b-v0.1",
    "vocabulary": 32001,
    "length": 4096,
    "precision": "bf16",
    "checkpointing": True,
    "attention": "flash_attention_2",
    "loss": "full-shifted",
    "device": "cuda",
    "gpu": "A100-80GB",
}
LORA_QKVO = {
    "method": "lora",
    "method_options": {"rank": 16, "alpha": 16, "dropout": 0.1, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]},
}
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, float]]] = {
    "full-4": ({"batch": 4}, {"peak_bytes": 67.460, "steady_bytes": 40.483}),
    "full-8": ({"batch": 8}, {"peak_bytes": 67.461}),
    "lora-4": ({"batch": 4, **LORA_QKVO}, {"peak_bytes": 24.871, "steady_bytes": 13.657}),
    "lora-8": ({"batch": 8, **LORA_QKVO}, {"peak_bytes": 36.082}),
}


class Params(Section):
    """`model` is trained in each of `setups`, at each (batch, length) of `points`; others in the common ones, at a point of theirs.

    `gpu` names the card of a CUDA profile, whose workspaces are predicted.
    """

    model: str
    other_models: dict[str, tuple[Count, Count]]
    setups: tuple[str, ...] = tuple(SETUPS)
    points: tuple[tuple[Count, Count], ...]
    real_models: tuple[str, ...] = ()
    real_point: tuple[Count, Count] = (4, 1024)
    gpu: str | None = None


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Each setup measured and predicted; the published ones predicted; the common ones simulated at real scale."""
    specs = []
    cells = [(params.model, name, point) for name in params.setups for point in params.points]
    cells += [(model, name, point) for model, point in params.other_models.items() for name in COMMON]
    for model, name, (batch, length) in cells:
        setup = {"model": model, "batch": batch, "length": length, **SETUPS[name]}
        cell = f"{model}-{name}-{batch}x{length}"
        specs.append(memory_spec(NAME, "measured", cell, profile.device, **setup))
        predicted = Simulation(**setup, device=profile.device, gpu=params.gpu)
        specs.append(TrialSpec(experiment=NAME, name=f"predicted-{cell}", arm="predicted", settings=predicted))
    for name, (changes, _) in PUBLISHED.items():
        settings = Simulation.model_validate({**MISTRAL, **changes})
        specs.append(TrialSpec(experiment=NAME, name=f"published-{name}", arm="published", settings=settings))
    batch, length = params.real_point
    for model in params.real_models:
        for name in COMMON:
            setup = {"model": model, "batch": batch, "length": length, **SETUPS[name]}
            specs.append(memory_spec(NAME, "measured", f"{model}-{name}", profile.device, sim=True, **setup))
    return specs


# four-parts-explain-peak ----------------------------------------------------------------------------------------


def _part(record: Record, phase: str, part: str) -> float:
    return record.figure(f"peak_{phase}_{part}_bytes")


def _share(record: Record, phase: str) -> float:
    """The share of a phase's peak that the four hold."""
    return sum(_part(record, phase, part) for part in FOUR) / record.figure(f"peak_{phase}_bytes")


def _peak_phase(record: Record) -> str:
    return max(PHASES, key=lambda phase: record.figure(f"peak_{phase}_bytes"))


def _fullest(record: Record) -> float:
    """The four, each at its fullest, over the peak: what a person who adds them up expects."""
    four = ("gradients_bytes", "optimizer_state_bytes", "activations_bytes", "weights_bytes")
    return sum(record.figure(name) for name in four) / max(record.figure(f"peak_{phase}_bytes") for phase in PHASES)


def judge_parts(evidence: Evidence) -> Finding:
    """The share of each setup's peak that weights, gradients, optimizer state and activations hold at that moment."""
    # A checkpoint's replay makes activations in backward: they cannot be told from what backward makes.
    found = evidence.select("measured", checkpointing=False)
    shares = [_share(r, _peak_phase(r)) for r in found]
    enough = [share >= LEAST_SHARE for share in shares]
    verdict = over_regimes(enough)
    by_phase = []
    for phase in PHASES:
        here = [r for r in found if _peak_phase(r) == phase]
        if not here:
            continue
        least = min(here, key=lambda r: _share(r, phase))
        rest = max(REST, key=lambda part: _part(least, phase, part))
        size = _part(least, phase, rest) / least.figure(f"peak_{phase}_bytes")
        kept = sum(_share(r, phase) >= LEAST_SHARE for r in here)
        by_phase.append(
            f"of {len(here)} setups that peak in {phase} the four explain {kept}; "
            f"least {_share(least, phase):.0%} ({_setup(least)}: {rest} {size:.0%})"
        )
    sums = span([_fullest(r) for r in found])
    because = (
        "; ".join(by_phase) + f"; each at its fullest, the four add up to {sums.low:.0%} to {sums.high:.0%} of the peak"
    )
    return Finding.of(verdict, span(shares), "of the peak", because)


def _setup(record: Record) -> str:
    return record.spec.name.removeprefix("sim-").removeprefix("measured-")


def forget_optimizer(evidence: Evidence) -> Evidence:
    """The optimizer's state is booked as something else."""
    return _moved(evidence, ("optimizer",), "other")


def count_everything(evidence: Evidence) -> Evidence:
    """Logits, temporaries and the rest are booked as activations."""
    return _moved(evidence, REST, "activations")


def _moved(evidence: Evidence, parts: tuple[str, ...], to: str) -> Evidence:
    moved = []
    for record in evidence.records:
        figures = dict(record.figures)
        for phase in PHASES if record.spec.arm == "measured" and record.status == "ok" else ():
            for part in parts:
                if part != to:
                    figures[f"peak_{phase}_{to}_bytes"] = _figure(figures, phase, to) + _figure(figures, phase, part)
                    figures[f"peak_{phase}_{part}_bytes"] = 0.0
        moved.append(record.model_copy(update={"figures": figures}))
    return Evidence(moved)


def _figure(figures: dict[str, float | None], phase: str, part: str) -> float:
    return figures[f"peak_{phase}_{part}_bytes"] or 0.0


# prediction-matches-measurement -----------------------------------------------------------------------------------


def _pairs(evidence: Evidence) -> list[tuple[Record, Record]]:
    """(measured, predicted) of each setup."""
    predicted = {r.spec.name.removeprefix("predicted-"): r for r in evidence.select("predicted")}
    return [(r, predicted[_setup(r)]) for r in evidence.select("measured")]


def _errors(evidence: Evidence) -> dict[str, float]:
    return {_setup(m): p.figure("peak_bytes") / m.figure("peak_bytes") - 1 for m, p in _pairs(evidence)}


def _published_errors(evidence: Evidence) -> list[float]:
    """Predicted over published, less one; a published figure has three decimals."""
    return [
        r.figure(figure) / (gib * GIB) - 1
        for r in evidence.select("published")
        for figure, gib in PUBLISHED[r.spec.name.removeprefix("published-")][1].items()
    ]


def judge_prediction(evidence: Evidence) -> Finding:
    """How far the predicted peak is from the measured one, in each setup; and from what others have published."""
    errors, published = _errors(evidence), _published_errors(evidence)
    off = [name for name, error in errors.items() if abs(error) > MOST_OFF]
    middle, worst = median(map(abs, published)), max(map(abs, published))
    strangers = middle <= PUBLISHED_MEDIAN and worst <= PUBLISHED_MOST
    verdict: VerdictName = (
        "refuted" if 2 * len(off) > len(errors) else "supported" if not off and strangers else "conditional"
    )
    because = (
        f"{len(errors) - len(off)} of {len(errors)} peaks within {MOST_OFF:.0%}"
        + (f" (not {', '.join(off[:3])})" if off else "")
        + f"; largest error {max(map(abs, errors.values())):.2g}; {len(published)} published figures of a 7B model: "
        f"median {middle:.2%}, largest {worst:.2%}"
    )
    return Finding.of(verdict, span(list(errors.values())), "relative error of the predicted peak", because)


def rules_control(evidence: Evidence) -> Evidence:
    """The lecture's rules as the prediction: weights, as much again for gradients, 12 bytes of AdamW; no activations."""
    changed = []
    for record in evidence.records:
        if record.spec.arm == "predicted" and record.status == "ok":
            width = 2 if str(record.setting("precision")).startswith("bf16") else 4
            trained = record.figure("parameters_trainable")
            rule = width * record.figure("parameters_total") + (width + 12) * trained
            record = record.model_copy(update={"figures": {**record.figures, "peak_bytes": rule}})
        changed.append(record)
    return Evidence(changed)


def prediction_lines(evidence: Evidence) -> dict[str, Line]:
    """Predicted over measured peaks, and the lecture's rules."""
    lines = {}
    for label, each in (("simulation", evidence), ("the lecture's rules", rules_control(evidence))):
        points = sorted((m.figure("peak_bytes") / 2**20, p.figure("peak_bytes") / 2**20) for m, p in _pairs(each))
        lines[label] = Line([x for x, _ in points], [y for _, y in points])
    return lines


EXPERIMENT = Experiment(
    name=NAME,
    title="The peak",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="four-parts-explain-peak",
            statement="model, gradients, optimizer and activations make up the memory",
            lecture="2",
            tiers=("sim", "cpu", "gpu"),
            threshold=f"at least {LEAST_SHARE:.0%} of every peak",
            scope="what each byte is at the moment of the peak, without checkpointing; no draw: span over setups",
            judge=judge_parts,
            controls={"the optimizer forgotten": forget_optimizer, "everything counted": count_everything},
            advice={
                "supported": "Add up weights, gradients, optimizer state and activations; that is the peak.",
                "conditional": "Add the logits (batch x length x vocabulary, fp32) and the step's temporaries to the four.",
                "refuted": "Do not add up the four: temporaries and logits decide. Ask `lab fit`.",
            },
            stated={"cpu": "conditional", "full": "conditional", "sim": "conditional"},
        ),
        Claim(
            id="prediction-matches-measurement",
            statement="peak memory can be known before the run",
            lecture="2",
            tiers=("cpu", "gpu"),
            threshold=f"all within {MOST_OFF:.0%}; published: median {PUBLISHED_MEDIAN:.1%}, all within {PUBLISHED_MOST:.0%}",
            scope="the Trainer on random tokens, every sequence of full length; span over setups",
            judge=judge_prediction,
            controls={"the lecture's rules": rules_control},
            advice={
                "supported": "Ask `lab fit` before you rent a card; its prediction is finer than what fragmentation takes.",
                "conditional": "Ask `lab fit`, and leave room where your setup is among those that it misses.",
                "refuted": "Measure a few updates before you trust a prediction.",
            },
            stated={"cpu": "supported", "full": "supported"},
        ),
    ),
    plots=(
        Plot(
            "predicted-over-measured",
            "Predicted and measured peaks",
            "measured MiB",
            "predicted MiB",
            prediction_lines,
            log_x=True,
            log_y=True,
            joined=False,
        ),
    ),
)
