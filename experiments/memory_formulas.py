"""Memory formulas: how many bytes per parameter do weights, gradients and AdamW hold, and what do activations follow?

Claims    weights-bytes, gradients-equal-weights, adamw-12-bytes, batch-and-length-drive-activations (lecture 2)
Refuted   if a rule is off by more than TOLERANCE in every regime; conditional if it holds in some regimes only
Control   an untied copy of the embedding, a LoRA gradient, an optimizer without master weights, a flat activation curve;
          records of a model that keeps every rule
Run       lab run memory_formulas --profile cpu

The numbers are counts, not draws: every live tensor storage, once each, to the byte. Their interval is therefore the
span over models and not a confidence interval; only the exponents are fitted.
"""

from __future__ import annotations

from itertools import product

from lab.claims import Claim, Control, Evidence, Experiment, Finding, VerdictName, over_regimes
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Precision, TrialSpec, memory_spec
from lab.statistics import exponent, span

NAME = "memory_formulas"

# A rule of thumb is used to choose a card or a batch: 5 % is finer than any card's free memory is known
# (the CUDA context alone takes 0.3 to 0.6 GiB), and coarser than what buffers and step counters add (< 0.1 %).
TOLERANCE = 0.05

# "Grows with" means at least nearly in proportion: doubling the batch must add 87 % or more (2 ** 0.9).
LEAST_EXPONENT = 0.9

PROMISED_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
QUANTISED = ("int8", "nf4", "nf4-double")
REGIMES = ("fp32", "bf16", "bf16-master", "autocast")
ATTENTION = ("eager", "sdpa")


class Sizes(Section):
    """`models` are counted in every regime, the first with an untied head too; curves are of `activation_model`.

    `precision` is that of the curves: on CUDA the fused attention kernels need 16 bits.
    """

    models: tuple[str, ...]
    activation_model: str
    precision: Precision = "fp32"
    wide_vocabulary_model: str
    batches: tuple[Count, ...]
    lengths: tuple[Count, ...]


class Params(Sizes):
    """What is measured, and what is simulated at real scale."""

    real_scale: Sizes | None = None


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Weights in each precision; one training in each regime; a curve over batch and one over length."""
    specs: list[TrialSpec] = []

    def add_all(sizes: Sizes, sim: bool) -> None:
        def add(arm: str, name: str, **settings: object) -> None:
            specs.append(memory_spec(NAME, arm, name, profile.device, sim, **settings))

        for model in sizes.models:
            for precision in PROMISED_BYTES:
                add("weights", f"{model}-{precision}", model=model, precision=precision, updates=0)
            for kind in QUANTISED:
                add("quantised", f"{model}-{kind}", model=model, precision="bf16", quantisation=kind, updates=0)
            for regime in REGIMES:
                add(regime, model, model=model, precision=regime)
            add("lora", model, model=model, method="lora")
        add("untied", sizes.models[0], model=sizes.models[0], updates=0, untied=True)
        first, batches, lengths = sizes.activation_model, sizes.batches, sizes.lengths
        curve = {"model": first, "precision": sizes.precision}
        add("accumulating", first, model=first, gradient_accumulation_steps=2)
        for step in ("foreach", "for-loop"):
            add("step", f"{first}-{step}", model=first, step=step)
        add("step", f"{first}-fused", model=first, optimizer="adamw_torch_fused", step="fused")
        for kind, batch in product(ATTENTION, batches):
            add("over-batch", f"{kind}-{batch}", batch=batch, length=lengths[0], attention=kind, **curve)
        for kind, length in product(ATTENTION, lengths):
            add("over-length", f"{kind}-{length}", length=length, attention=kind, **curve)
        wide = curve | {"model": sizes.wide_vocabulary_model}
        add("wide-vocabulary", "sdpa", batch=batches[0], length=lengths[0], **wide)

    add_all(params, sim=False)
    if params.real_scale:
        add_all(params.real_scale, sim=True)
    return specs


# The known answer -----------------------------------------------------------------------------------------------


def by_every_rule(evidence: Evidence) -> Evidence:
    """Records of a model of one parameter that keeps every rule; each token adds a byte of activations and one of logits."""

    def figures(record: Record) -> dict[str, float]:
        weights = PROMISED_BYTES.get(record.setting("precision"), 4)
        tokens = record.setting("batch") * record.setting("length")
        return {
            **dict.fromkeys(("parameters_total", "parameters_trainable", "vocabulary"), 1.0),
            **dict.fromkeys(("weights_bytes", "gradients_bytes", "gradients_between_bytes"), weights),
            **dict.fromkeys(("gradients_after_bytes", "step_temporary_bytes"), 0.0),
            "optimizer_state_bytes": 12.0,
            **dict.fromkeys(("activations_bytes", "logits_bytes"), tokens),
        }

    return evidence.with_figures(figures)


# weights-bytes --------------------------------------------------------------------------------------------------


def _bytes_per_parameter(record: Record) -> float:
    return record.figure("weights_bytes") / record.figure("parameters_total")


def judge_weights(evidence: Evidence) -> Finding:
    """Bytes per parameter over the promise, in each precision and model."""
    found = evidence.select("weights")
    ratios = [_bytes_per_parameter(r) / PROMISED_BYTES[r.setting("precision")] for r in found]
    ratio = span(ratios)
    holds = all(abs(value - 1) <= TOLERANCE for value in ratios)
    parts = []
    for quantisation in QUANTISED:
        values = [_bytes_per_parameter(r) for r in evidence.select("quantised", quantisation=quantisation)]
        parts.append(f"{quantisation} {min(values):.2f} to {max(values):.2f}")
    because = f"bytes per parameter of a whole quantised model: {', '.join(parts)} (embedding, head, norms in 16 bits)"
    return Finding.of("supported" if holds else "refuted", ratio, "x promised bytes", because)


def untied_control(evidence: Evidence) -> Evidence:
    """The output head holds a copy of the embedding, as if ties were counted twice."""
    return evidence.replace("weights", by="untied")


# gradients-equal-weights ----------------------------------------------------------------------------------------


def _gradient_share(record: Record) -> float:
    return record.figure("gradients_bytes") / record.figure("weights_bytes")


def judge_gradients(evidence: Evidence) -> Finding:
    """Gradient bytes over weight bytes: full fine-tuning in each regime, and LoRA."""
    full = [_gradient_share(r) for regime in REGIMES for r in evidence.select(regime)]
    lora = [_gradient_share(r) for r in evidence.select("lora")]
    waiting = evidence.select("accumulating")[0]
    between = waiting.figure("gradients_between_bytes") / waiting.figure("weights_bytes")
    after = waiting.figure("gradients_after_bytes")
    because = (
        f"LoRA {min(lora):.3f} to {max(lora):.3f} of the weights; full fine-tuning {min(full):.3f} to {max(full):.3f}; "
        f"between micro-batches {between:.2f}, after the update {after:.0f} bytes (set to none)"
    )
    return Finding.of(_inside_alone(full, lora, 1.0), span(full), "x weight bytes", because)


def adapter_control(evidence: Evidence) -> Evidence:
    """A LoRA run presented as full fine-tuning: gradients of a few parameters only."""
    return evidence.replace("fp32", by="lora")


# adamw-12-bytes -------------------------------------------------------------------------------------------------


def _state_per_parameter(record: Record) -> float:
    return record.figure("optimizer_state_bytes") / record.figure("parameters_trainable")


def judge_adamw(evidence: Evidence) -> Finding:
    """Bytes that the optimizer holds per trainable parameter: moments, and the master copy where there is one."""
    by_regime = {regime: [_state_per_parameter(r) for r in evidence.select(regime)] for regime in REGIMES}
    found = [value for values in by_regime.values() for value in values]
    steps = [
        f"{r.setting('step')} {r.figure('step_temporary_bytes') / r.figure('parameters_trainable'):.2f}"
        for r in evidence.select("step")
    ]
    because = (
        ", ".join(f"{regime} {span(values).estimate:.2f}" for regime, values in by_regime.items())
        + f" bytes per parameter; the step's temporary adds {', '.join(steps)}"
    )
    verdict = over_regimes(abs(value / 12 - 1) <= TOLERANCE for value in found)
    return Finding.of(verdict, span(found), "bytes per parameter", because)


def no_master_control(evidence: Evidence) -> Evidence:
    """Pure bf16 runs presented as if they had master weights."""
    return evidence.replace("bf16-master", by="bf16")


# batch-and-length-drive-activations -----------------------------------------------------------------------------


def _curve(evidence: Evidence, over: str, attention: str) -> tuple[list[float], list[float]]:
    """(batch or length, bytes of activations and logits at the end of forward), in order."""
    found = evidence.select(f"over-{over}", attention=attention)
    points = sorted((r.setting(over), r.figure("activations_bytes") + r.figure("logits_bytes")) for r in found)
    return [x for x, _ in points], [y for _, y in points]


def judge_activations(evidence: Evidence) -> Finding:
    """The exponent of activation bytes over batch and over length, with eager and with fused attention."""
    fits = {(over, kind): exponent(*_curve(evidence, over, kind)) for over in ("batch", "length") for kind in ATTENTION}
    lowest = min(fits.values(), key=lambda fit: fit.low)
    wide = evidence.select("wide-vocabulary")[0]
    share = wide.figure("logits_bytes") / (wide.figure("logits_bytes") + wide.figure("activations_bytes"))
    because = (
        ", ".join(f"{over} {kind} {fit.estimate:.2f}" for (over, kind), fit in fits.items())
        + f"; logits are {share:.0%} of it with a vocabulary of {wide.figure('vocabulary'):,.0f}"
    )
    verdict: VerdictName = (
        "supported" if lowest.low >= LEAST_EXPONENT else "refuted" if lowest.high < LEAST_EXPONENT else "inconclusive"
    )
    return Finding.of(verdict, lowest, "exponent (the smallest of four)", because)


def flat_control(evidence: Evidence) -> Evidence:
    """A ledger that does not see activations: every point shows the bytes of the first."""
    first = evidence.select("over-batch")[0].figures
    flat = {name: first[name] for name in ("activations_bytes", "logits_bytes")}
    return evidence.with_figures(lambda r: flat if r.spec.arm.startswith("over-") else {})


def activation_lines(evidence: Evidence) -> dict[str, Line]:
    """MiB of activations over sequence length."""
    lines = {}
    for kind in ATTENTION:
        x, y = _curve(evidence, "length", kind)
        lines[kind] = Line(x, [value / 2**20 for value in y])
    return lines


# --------------------------------------------------------------------------------------------------------------------


def _inside_alone(inside: list[float], outside: list[float], promised: float) -> VerdictName:
    """Supported if both groups keep the promise, conditional if the first alone does, refuted if it does not."""
    keeps = [all(abs(value / promised - 1) <= TOLERANCE for value in group) for group in (inside, outside)]
    return "refuted" if not keeps[0] else "supported" if keeps[1] else "conditional"


EXPERIMENT = Experiment(
    name=NAME,
    title="Memory formulas",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="weights-bytes",
            statement="fp32 weights take 4 bytes per parameter, fp16 weights 2",
            lecture="2",
            tiers=("sim", "cpu", "gpu"),
            threshold=f"within {TOLERANCE:.0%} of the promise for every model and precision",
            scope="bytes held by weights and buffers after loading, ties counted once; span over models",
            judge=judge_weights,
            controls={
                "ties counted twice": Control(untied_control, "refuted"),
                "bytes by the rule": Control(by_every_rule, "supported", ("weights", "quantised")),
            },
            advice={
                "supported": "Multiply parameters by 4 (fp32) or 2 (bf16, fp16); 4-bit models keep a 16-bit embedding.",
                "refuted": "Count the bytes of your model; the rule does not hold for it.",
                "inconclusive": "Load the model once and read what it takes; until then count 4 bytes per parameter (fp32) or 2 "
                "(16 bits).",
            },
            stated={"cpu": "supported", "full": "supported", "sim": "supported"},
        ),
        Claim(
            id="gradients-equal-weights",
            statement="gradients take about as much memory as the weights",
            lecture="2",
            tiers=("sim", "cpu", "gpu"),
            threshold=f"within {TOLERANCE:.0%} of the weights, in every regime",
            scope="full fine-tuning in fp32, bf16, bf16 with master weights and autocast, and LoRA",
            judge=judge_gradients,
            controls={
                "LoRA as full fine-tuning": Control(adapter_control, "refuted"),
                "bytes by the rule": Control(by_every_rule, "supported", (*REGIMES, "lora", "accumulating")),
            },
            advice={
                "supported": "Reserve the weights' bytes once more for gradients.",
                "conditional": "Reserve the weights' bytes once more for full fine-tuning; for LoRA only the adapter's.",
                "refuted": "Measure the gradients of your setup; the rule does not hold.",
                "inconclusive": "Reserve the weights' bytes once more until you have measured the gradients of your setup.",
            },
            stated={"cpu": "conditional", "full": "conditional", "sim": "conditional"},
        ),
        Claim(
            id="adamw-12-bytes",
            statement="AdamW costs 12 bytes per parameter",
            lecture="2",
            tiers=("sim", "cpu", "gpu"),
            threshold=f"within {TOLERANCE:.0%} of 12 bytes in every regime",
            scope="bytes that the optimizer holds per trainable parameter: moments and master copy; temporaries apart",
            judge=judge_adamw,
            controls={
                "no master weights": Control(no_master_control, "refuted"),
                "bytes by the rule": Control(by_every_rule, "supported", (*REGIMES, "step")),
            },
            advice={
                "supported": "Reserve 12 bytes per trainable parameter for AdamW.",
                "conditional": "Reserve 12 bytes with fp32 master weights, 8 with fp32 or autocast, 4 in pure bf16.",
                "refuted": "Do not reserve 12 bytes: no common regime holds them.",
                "inconclusive": "Reserve 12 bytes per trainable parameter until you have measured what your setup holds.",
            },
            stated={"cpu": "conditional", "full": "conditional", "sim": "conditional"},
        ),
        Claim(
            id="batch-and-length-drive-activations",
            statement="batch size and sequence length add to the memory",
            lecture="2",
            tiers=("sim", "cpu", "gpu"),
            threshold=f"the 95 % interval of each exponent lies at or above {LEAST_EXPONENT}",
            scope="activations and logits alive at the end of the forward pass, eager and fused attention; fp32, sim tier bf16",
            judge=judge_activations,
            controls={
                "a ledger blind to activations": Control(flat_control, "refuted"),
                "as much for every token": Control(
                    by_every_rule, "supported", ("over-batch", "over-length", "wide-vocabulary")
                ),
            },
            advice={
                "supported": "Halve the batch to halve activations; for long texts use fused attention, eager grows faster.",
                "refuted": "Look for what else fills the memory before you shrink the batch.",
                "inconclusive": "Measure an update at your longest sequence, then again with half of the batch.",
            },
            stated={"cpu": "supported", "full": "supported", "sim": "supported"},
        ),
    ),
    plots=(
        Plot(
            name="activations-over-length",
            title="Activations at the end of the forward pass",
            x="tokens per sequence",
            y="MiB",
            lines=activation_lines,
            log_x=True,
            log_y=True,
        ),
    ),
)
