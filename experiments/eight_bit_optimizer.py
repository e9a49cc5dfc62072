"""The 8-bit optimizer: what does it hold per parameter, and does it train as AdamW does?

Claims    adamw8bit-6-bytes (lecture 2), adamw8bit-matches-adamw (lecture 4)
Refuted   bytes: no way of counting comes within TOLERANCE of 6; training: more than MARGIN of AdamW's progress lost
Control   AdamW with 32-bit state in its place; the 8-bit optimizer with a tenth of the learning rate; records of
          one that holds two bytes for each parameter, and ends with AdamW's loss
Run       lab run eight_bit_optimizer --profile cpu
"""

from __future__ import annotations

from itertools import product

from lab.claims import Claim, Control, Evidence, Experiment, Finding, VerdictName
from lab.params import Count, Profile, Rate, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Comparison, Training, TrialSpec, memory_spec
from lab.statistics import lies_within, mean_interval, span

NAME = "eight_bit_optimizer"
EIGHT_BIT = "adamw_bnb_8bit"

# As for the other memory rules: finer than any card's free memory is known (see memory_formulas.py).
TOLERANCE = 0.05

# The optimizers match if the 8-bit one loses (or gains) at most this share of the progress that AdamW makes in the same
# updates. 5 % is one update in twenty: less than a user would notice, and what one more epoch of twenty would repair.
MARGIN = 0.05


# The control and the yardstick are far from the margin: three seeds show them.
SEEDS_BESIDE = 3

KINDS = ("large", "small", "embedding")

COUNTED = {
    "fp32": {"optimizer": EIGHT_BIT},
    "bf16": {"optimizer": EIGHT_BIT, "precision": "bf16"},
    "lora": {"optimizer": EIGHT_BIT, "method": "lora"},
    "control-bytes": {"optimizer": "adamw_torch"},
}


class Params(Section):
    """`models` are counted, `real_models` simulated; `task` is learnt by `tiny` from `seeds` data orders."""

    models: tuple[str, ...]
    real_models: tuple[str, ...] = ()
    task: str
    seeds: Count
    updates: Count
    learning_rate: Rate
    micro_batch_size: Count


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Counts in fp32 and bf16 and with LoRA; pairs of AdamW and its 8-bit form on the same data order."""
    specs = []
    for model, (arm, settings) in product((*params.models, *params.real_models), COUNTED.items()):
        sim = model in params.real_models
        specs.append(memory_spec(NAME, arm, model, profile.device, sim, model=model, **settings))
    for seed in range(params.seeds):
        adamw = Training(
            model="tiny",
            task=params.task,
            learning_rate=params.learning_rate,
            updates=params.updates,
            micro_batch_size=params.micro_batch_size,
            seed=seed,
            evaluations=1,
            device=profile.device,
        )
        eight = adamw.model_copy(update={"optimizer": EIGHT_BIT})
        slow = eight.model_copy(update={"learning_rate": params.learning_rate / 10})
        reordered = adamw.model_copy(update={"seed": seed + 1000})
        beside = (("control-slow", slow), ("reordered", reordered)) if seed < SEEDS_BESIDE else ()
        for arm, second in (("pair", eight), *beside):
            pair = Comparison(first=adamw, second=second, snapshots=10)
            specs.append(TrialSpec(experiment=NAME, name=f"{arm}-seed{seed}", arm=arm, settings=pair))
    return specs


# adamw8bit-6-bytes ----------------------------------------------------------------------------------------------


def _per_parameter(record: Record, kind: str) -> float | None:
    count = record.figure(f"parameters_{kind}")
    return record.figure(f"state_{kind}_bytes") / count if count else None


def judge_bytes(evidence: Evidence) -> Finding:
    """Bytes per parameter: the state alone, and with the fp32 weights that it updates counted in."""
    found = evidence.select("fp32")
    whole = [r.figure("optimizer_state_bytes") / r.figure("parameters_trainable") for r in found]
    kinds = {
        kind: [value for r in [*found, *evidence.select("lora")] if (value := _per_parameter(r, kind)) is not None]
        for kind in KINDS
    }
    # The 6 of the rule is 2 for the state and 4 for fp32 weights; it is looked for in both ways of counting, of which one is
    # enough if it holds throughout.
    counted = {
        way: {"whole model": [v + beside for v in whole], "large matrices": [v + beside for v in kinds["large"]]}
        for way, beside in (("state", 0), ("state and fp32 weights", 4))
    }
    holds = [
        [all(abs(v / 6 - 1) <= TOLERANCE for v in values) for values in where.values()] for where in counted.values()
    ]
    verdict: VerdictName = "supported" if any(map(all, holds)) else "conditional" if any(map(any, holds)) else "refuted"
    lora = [r.figure("optimizer_state_bytes") / r.figure("parameters_trainable") for r in evidence.select("lora")]
    because = (
        "; ".join(f"{w}, {name} {span(v).estimate:.2f}" for w, where in counted.items() for name, v in where.items())
        + "".join(f"; {k} {span(v).estimate:.2f}" for k, v in kinds.items() if k != "large" and v)
        + f"; a LoRA adapter {min(lora):.2f} to {max(lora):.2f}"
    )
    return Finding.of(verdict, span(whole), "bytes of state per parameter", because)


def thirty_two_bit_control(evidence: Evidence) -> Evidence:
    """AdamW with 32-bit state presented as the 8-bit optimizer."""
    return evidence.replace("fp32", by="control-bytes").replace("lora", by="control-bytes")


def two_bytes(evidence: Evidence) -> Evidence:
    """Two bytes of state for every parameter, as the rule is meant: six with the fp32 weights."""
    kinds = {f"parameters_{kind}": 1.0 for kind in KINDS} | {f"state_{kind}_bytes": 2.0 for kind in KINDS}
    return evidence.with_figures(lambda _: {**kinds, "parameters_trainable": 3.0, "optimizer_state_bytes": 6.0})


# adamw8bit-matches-adamw ----------------------------------------------------------------------------------------


def _progress_lost(record: Record) -> float:
    """Share of AdamW's progress in test loss that the second optimizer did not make (negative: it made more)."""
    progress = record.figure("base_test_loss") - record.figure("first_test_loss")
    return (record.figure("second_test_loss") - record.figure("first_test_loss")) / progress


def judge_match(evidence: Evidence) -> Finding:
    """Equivalence of the test loss after the same updates on the same data, paired by seed."""
    pairs = evidence.select("pair")
    lost = mean_interval([_progress_lost(r) for r in pairs])
    answers: dict[str, VerdictName] = {"yes": "supported", "no": "refuted", "undecided": "inconclusive"}
    verdict = answers[lies_within(lost, -MARGIN, MARGIN)]
    apart = mean_interval([r.figure("distance") for r in pairs])
    reordered = mean_interval([r.figure("distance") for r in evidence.select("reordered")])
    because = (
        f"the parameters end {apart.estimate:.2f} of their own way apart; "
        f"AdamW on another data order ends {reordered.estimate:.2f} apart"
    )
    return Finding.of(verdict, lost, "of AdamW's progress lost", because)


def slow_control(evidence: Evidence) -> Evidence:
    """An 8-bit optimizer that learns at a tenth of the rate."""
    return evidence.replace("pair", by="control-slow")


def same_loss(evidence: Evidence) -> Evidence:
    """Both optimizers end with one loss."""
    losses = {"base_test_loss": 2.0, "first_test_loss": 1.0, "second_test_loss": 1.0}
    return evidence.with_figures(lambda _: {**losses, "distance": 0.0})


def distance_lines(evidence: Evidence) -> dict[str, Line]:
    """How far apart the parameters are over the updates, the mean over seeds."""
    lines = {}
    for arm, label in (("pair", "8-bit against 32-bit AdamW"), ("reordered", "AdamW on two data orders")):
        found = evidence.select(arm)
        columns = list(zip(*(r.series["distance"] for r in found), strict=True))
        means = [mean_interval([float(v or 0) for v in column]) for column in columns]
        x = [float(v or 0) for v in found[0].series["distance_update"]]
        lines[label] = Line(x, [m.estimate for m in means], [m.low for m in means], [m.high for m in means])
    return lines


EXPERIMENT = Experiment(
    name=NAME,
    title="8-bit optimizer",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="adamw8bit-6-bytes",
            statement="an 8-bit optimizer costs 6 bytes per parameter",
            lecture="2",
            tiers=("sim", "cpu", "gpu"),
            threshold=f"within {TOLERANCE:.0%} of 6 bytes, the state alone or with the fp32 weights, over the whole model and "
            "its large matrices alike",
            scope="bitsandbytes 8-bit AdamW through the Trainer, by kind of tensor, state alone and with fp32 weights",
            judge=judge_bytes,
            controls={
                "AdamW with 32-bit state": Control(thirty_two_bit_control, "refuted"),
                "two bytes of state": Control(two_bytes, "supported", ("fp32", "lora")),
            },
            advice={
                "supported": "Reserve 6 bytes per trainable parameter.",
                "conditional": "Reserve 2 bytes of state per parameter, 8 for the embedding; add 4 only for fp32 weights.",
                "refuted": "Do not reserve 6 bytes: no way of counting gives them.",
                "inconclusive": "Reserve 8 bytes of state per parameter until you have looked at what your optimizer holds.",
            },
            stated={"cpu": "conditional", "full": "conditional", "sim": "conditional"},
        ),
        Claim(
            id="adamw8bit-matches-adamw",
            statement="the 8-bit optimizer trains as well as AdamW, with unchanged hyper-parameters",
            lecture="4",
            tiers=("cpu", "gpu"),
            threshold=f"the 95 % interval of the progress lost lies within {MARGIN:.0%} of AdamW's progress",
            scope="full fine-tuning of tiny in fp32, one learning rate, paired by seed and data order",
            judge=judge_match,
            controls={
                "a tenth of the learning rate": Control(slow_control, "refuted"),
                "the loss of AdamW": Control(same_loss, "supported", ("pair", "reordered")),
            },
            advice={
                "supported": "Use adamw_bnb_8bit with AdamW's settings; expect the same loss, not the same weights.",
                "refuted": "Tune the learning rate again when you switch to the 8-bit optimizer.",
                "inconclusive": "Compare both optimizers on a short run of your own before you rely on the 8-bit one.",
            },
            stated={"cpu": "supported", "full": "supported"},
        ),
    ),
    plots=(
        Plot(
            name="eight-bit-distance",
            title="Distance between the parameters of two runs from one start",
            x="updates",
            y="distance / way that the first has gone",
            lines=distance_lines,
        ),
    ),
)
