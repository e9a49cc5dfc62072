"""The peak: what is it made of, and can it be known before the run?

Claims    four-parts-explain-peak (lecture 2), prediction-matches-measurement
Refuted   parts: the four hold less than LEAST_SHARE of every peak; prediction: most peaks are off by more than MOST_OFF,
          on a device by more than DEVICE_MOST
Control   a sum that forgets the optimizer, one that forgets all four, one that counts everything; the lecture's rules as the
          prediction, one that is 4 % above what was measured, what was measured
Run       lab run peak_memory --profile cpu

Bytes, not draws: a peak is counted to the byte, so the intervals are spans over setups.
"""

from __future__ import annotations

from statistics import median
from typing import Any

from pydantic import Field

from lab.cards import CONTEXT_BYTES, GIB, RESERVED_SHARE, shown_bytes
from lab.claims import Claim, Control, Evidence, Experiment, Finding, VerdictName, over_regimes
from lab.errors import unknown
from lab.memory.workload import MIB, PHASES
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Prediction, Simulation, TrialSpec, memory_spec
from lab.statistics import span

NAME = "peak_memory"

# As for the other memory rules: finer than any card's free memory is known (see memory_formulas.py).
LEAST_SHARE = 0.95

# A prediction is of use where it is finer than what nobody can know: how much of a card fragmentation takes (3 % and more,
# see lab/cards.py). A third of that leaves the prediction the smaller of the two errors.
MOST_OFF = 0.01

# A device's allocator holds what no tensor shows: scratch of kernels, workspaces of libraries, ends of segments that are too
# small to cut off. So there the middle is held to MOST_OFF, and the worst to what `lab fit` adds to each prediction for
# fragmentation: beyond that, something that it calls fitting may run out of memory.
DEVICE_MOST = 0.03

# So many different setups make a device's evidence (an update of each takes some ten minutes in all); fewer decide nothing.
LEAST_ON_DEVICE = 60

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
DEVICE_SETUPS: dict[str, dict[str, Any]] = {
    "full-paged-32-bit": {"optimizer": "paged_adamw_32bit"},
    "full-paged-8-bit": {"optimizer": "paged_adamw_8bit"},
    "full-autocast-checkpointing": {"precision": "autocast", "checkpointing": True},
    "full-bf16-8-bit": {"precision": "bf16", "optimizer": "adamw_bnb_8bit"},
    "full-bf16-checkpointing": {"precision": "bf16", "checkpointing": True},
    "full-bf16-eager": {"precision": "bf16", "attention": "eager"},
    "full-bf16-for-loop": {"precision": "bf16", "step": "for-loop"},
    "full-bf16-fused": {"precision": "bf16", "optimizer": "adamw_torch_fused", "step": "fused"},
    "full-bf16-sgd": {"precision": "bf16", "optimizer": "sgd"},
    "lora-autocast": {"method": "lora", "precision": "autocast"},
    "lora-eager": {**LORA_BF16, "attention": "eager"},
    "lora-8-bit": {**LORA_BF16, "optimizer": "adamw_bnb_8bit"},
    "dora-checkpointing": {"method": "dora", "precision": "bf16", "checkpointing": True},
    "qlora-checkpointing": {"method": "qlora", "precision": "bf16", "checkpointing": True},
    "qlora-paged-8-bit": {"method": "qlora", "precision": "bf16", "optimizer": "paged_adamw_8bit"},
    "full-flash": {"precision": "bf16", "cudnn": False},
    "lora-flash": {**LORA_BF16, "cudnn": False},
}
"""What a profile may name beside: pages need a card, the others tell more where kernels differ by type. Those of `flash` are
what is predicted, where torch would choose cuDNN's attention."""

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


class Grid(Section):
    """A model in each of some setups, at each (batch, length) of some points."""

    setups: tuple[str, ...]
    points: tuple[tuple[Count, Count], ...]


class Params(Section):
    """`model` is trained in each of `setups`, at each (batch, length) of `points`; others in the common ones, at a point of theirs.

    Those of `grids` are in setups and at points of their own. `gpu` names a card whose workspaces are predicted; None: on a
    CUDA device those of the card that is here.
    """

    model: str
    other_models: dict[str, tuple[Count, Count]]
    setups: tuple[str, ...] = tuple(SETUPS)
    points: tuple[tuple[Count, Count], ...]
    grids: dict[str, Grid] = Field(default_factory=dict)
    real_models: tuple[str, ...] = ()
    real_point: tuple[Count, Count] = (4, 1024)
    gpu: str | None = None


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Each setup measured and predicted; the published ones predicted; the common ones simulated at real scale."""
    specs = []
    cells = [(params.model, name, point) for name in params.setups for point in params.points]
    cells += [(model, name, point) for model, point in params.other_models.items() for name in COMMON]
    cells += [(model, name, at) for model, grid in params.grids.items() for name in grid.setups for at in grid.points]
    known = SETUPS | DEVICE_SETUPS
    predict = Prediction if profile.device == "cuda" else Simulation  # the first asks which card is here
    for model, name, (batch, length) in cells:
        if name not in known:
            raise unknown("setup", name, known, f"{NAME}: ")
        setup = {"model": model, "batch": batch, "length": length, **known[name]}
        cell = f"{model}-{name}-{batch}x{length}"
        specs.append(memory_spec(NAME, "measured", cell, profile.device, **setup))
        asked = {key: value for key, value in setup.items() if key != "cudnn"}
        predicted = predict(**asked, device=profile.device, gpu=params.gpu)
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
    """Everything is counted but the optimizer's state, which is booked as something else."""
    return _moved(count_everything(evidence), ("optimizer",), "other")


def no_parts(evidence: Evidence) -> Evidence:
    """All four are booked as something else."""
    return _moved(evidence, FOUR, "other")


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
    """(measured, predicted) of each setup that has both."""
    predicted = {r.spec.name.removeprefix("predicted-"): r for r in evidence.select("predicted")}
    return [(r, predicted[_setup(r)]) for r in evidence.select("measured") if _setup(r) in predicted]


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
    pairs, errors, published = _pairs(evidence), _errors(evidence), _published_errors(evidence)
    on_device = any(m.setting("device") == "cuda" for m, _ in pairs)
    most = DEVICE_MOST if on_device else MOST_OFF
    off = [name for name, error in errors.items() if abs(error) > most]
    full = [_setup(r) for r in evidence.attempts("measured") if on_device and r.status == "oom"]
    middle, worst = median(map(abs, published)), max(map(abs, published))
    strangers = middle <= PUBLISHED_MEDIAN and worst <= PUBLISHED_MOST
    fine = not off and not full and median(map(abs, errors.values())) <= MOST_OFF and strangers
    verdict: VerdictName = "refuted" if 2 * len(off) > len(errors) else "supported" if fine else "conditional"
    alone = len(evidence.select("measured")) - len(pairs)
    if alone or (on_device and len(pairs) < LEAST_ON_DEVICE):
        verdict = "inconclusive"
    because = (
        (f"{alone} setups have no prediction yet; " if alone else "")
        + (
            f"only {len(pairs)} setups, {LEAST_ON_DEVICE} decide; "
            if on_device and len(pairs) < LEAST_ON_DEVICE
            else ""
        )
        + f"{len(errors) - len(off)} of {len(errors)} peaks within {most:.0%}"
        + (f" (not {', '.join(off if on_device else off[:3])})" if off else "")
        + (f"; predicted to fit and out of memory: {', '.join(full)}" if full else "")
        + f"; largest error {max(map(abs, errors.values())):.2g}; {len(published)} published figures of a 7B model: "
        f"median {middle:.2%}, largest {worst:.2%}" + (f"; {_on_device(pairs)}" if on_device else "")
    )
    return Finding.of(verdict, span(list(errors.values())), "relative error of the predicted peak", because)


def _on_device(pairs: list[tuple[Record, Record]]) -> str:
    """What lies between prediction and card: the median, where the largest error is, what tensors, torch and the card hold."""
    errors = [p.figure("peak_bytes") / m.figure("peak_bytes") - 1 for m, p in pairs]
    ledgers = [m.figure("ledger_peak_bytes") / m.figure("peak_bytes") - 1 for m, _ in pairs]
    reserves = span([m.figure("reserved_bytes") / m.figure("peak_bytes") - 1 for m, _ in pairs])
    # Pages lie on the card and are no part of what torch reserves.
    unpaged = [(m, p) for m, p in pairs if not str(m.setting("optimizer")).startswith("paged_")]
    contexts = span([(m.figure("driver_bytes") - m.figure("reserved_bytes")) / GIB for m, _ in unpaged])
    held = sum(m.figure("driver_bytes") <= shown_bytes(int(p.figure("peak_bytes"))) for m, p in unpaged)
    return (
        f"median {median(map(abs, errors)):.2%}; {_by_phase(pairs)}; {_largest_error(pairs)}; the ledger is {min(ledgers):+.1%} to "
        f"{max(ledgers):+.1%} off the allocator; reserved beyond the peak {reserves.low:.1%} to {reserves.high:.1%} (taken: "
        f"{RESERVED_SHARE:.0%}); context {contexts.low:.2f} to {contexts.high:.2f} GiB (taken: {CONTEXT_BYTES / GIB:.1f}); "
        f"the card held at most what `lab fit` counts with in {held} of {len(unpaged)}; {_kernels(pairs)}"
    )


def _by_phase(pairs: list[tuple[Record, Record]]) -> str:
    """How far the predicted peak of each phase is from what the allocator held at most in it."""
    words = []
    for phase in PHASES:
        found = [abs(p.figure(f"peak_{phase}_bytes") / m.figure(f"allocated_{phase}_bytes") - 1) for m, p in pairs]
        words.append(f"{phase} {median(found):.2%} (largest {max(found):.1%})")
    return f"by phase: {', '.join(words)}"


def _kernels(pairs: list[tuple[Record, Record]]) -> str:
    """The largest error by the kernel that torch chose for attention: the prediction is of FlashAttention."""
    worst: dict[str, float] = {}
    for m, p in pairs:
        kernel = m.tags.get("attention_kernel", "none (eager)")
        worst[kernel] = max(worst.get(kernel, 0.0), abs(p.figure("peak_bytes") / m.figure("peak_bytes") - 1))
    return "largest error by attention kernel: " + ", ".join(f"{k} {v:.2%}" for k, v in sorted(worst.items()))


def _largest_error(pairs: list[tuple[Record, Record]]) -> str:
    """The setup with the largest error, and in which part of its highest phase most of that is."""
    measured, predicted = max(
        pairs, key=lambda pair: abs(pair[1].figure("peak_bytes") / pair[0].figure("peak_bytes") - 1)
    )
    phase = _peak_phase(measured)
    gaps = {part: _part(predicted, phase, part) - _part(measured, phase, part) for part in (*FOUR, *REST)}
    # What the allocator holds and no tensor shows: of it the prediction knows the workspaces, and books them as other.
    gaps["other"] -= measured.figure("peak_bytes") - measured.figure("ledger_peak_bytes")
    part = max(gaps, key=lambda name: abs(gaps[name]))
    error = predicted.figure("peak_bytes") / measured.figure("peak_bytes") - 1
    return (
        f"most off is {_setup(measured)} ({error:+.2%}), in {phase} most of all by {part} ({gaps[part] / MIB:+.1f} MiB)"
    )


def rules_control(evidence: Evidence) -> Evidence:
    """The lecture's rules as the prediction: weights, as much again for gradients, 12 bytes of AdamW; no activations."""

    def rule(record: Record) -> dict[str, float]:
        if record.spec.arm != "predicted":
            return {}
        width = 2 if str(record.setting("precision")).startswith("bf16") else 4
        trained = record.figure("parameters_trainable")
        return {"peak_bytes": width * record.figure("parameters_total") + (width + 12) * trained}

    return evidence.with_figures(rule)


def too_high(evidence: Evidence) -> Evidence:
    """Every prediction is 4 % above what was measured: too far on a processor and on a device."""
    return _at_measured(evidence, 1.04)


def hindsight(evidence: Evidence) -> Evidence:
    """What was measured, and published, as the prediction, where it fitted: supported, whatever the predictions were."""

    def published(record: Record) -> dict[str, float]:
        if record.spec.arm != "published":
            return {}
        return {name: gib * GIB for name, gib in PUBLISHED[record.spec.name.removeprefix("published-")][1].items()}

    return _at_measured(Evidence(evidence.select()), 1.0).with_figures(published)


def _at_measured(evidence: Evidence, factor: float) -> Evidence:
    """Each prediction as that many times what was measured."""
    seen = {predicted.spec.name: factor * measured.figure("peak_bytes") for measured, predicted in _pairs(evidence)}
    return evidence.with_figures(lambda r: {"peak_bytes": seen[r.spec.name]} if r.spec.name in seen else {})


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
            controls={
                "the optimizer forgotten": Control(forget_optimizer, "conditional"),
                "all four forgotten": Control(no_parts, "refuted"),
                "everything counted": Control(count_everything, "supported"),
            },
            advice={
                "supported": "Add up weights, gradients, optimizer state and activations; that is the peak.",
                "conditional": "Add the logits (batch x length x vocabulary, fp32) and the step's temporaries to the four.",
                "refuted": "Do not add up the four: temporaries and logits decide. Ask `lab fit`.",
                "inconclusive": "Ask `lab fit` for the peak instead of adding up the four.",
            },
            stated={"cpu": "conditional", "full": "conditional", "sim": "conditional"},
        ),
        Claim(
            id="prediction-matches-measurement",
            statement="peak memory can be known before the run",
            lecture="2",
            tiers=("cpu", "gpu"),
            threshold=(
                f"all within {MOST_OFF:.0%}, on a device median {MOST_OFF:.0%} and all within {DEVICE_MOST:.0%}; "
                f"published: median {PUBLISHED_MEDIAN:.1%}, all within {PUBLISHED_MOST:.0%}"
            ),
            scope="the Trainer on random tokens, every sequence of full length; span over setups",
            judge=judge_prediction,
            controls={
                "the lecture's rules": Control(rules_control, "refuted"),
                "4 % too high": Control(too_high, "refuted"),
                "what was measured": Control(hindsight, "supported"),
            },
            advice={
                "supported": "Ask `lab fit` before you rent a card; its prediction is finer than what fragmentation takes.",
                "conditional": "Ask `lab fit`, and leave room where your setup is among those that it misses.",
                "refuted": "Measure a few updates before you trust a prediction.",
                "inconclusive": "Ask `lab fit`, keep a tenth of the card free, and watch the peak of the first updates.",
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
