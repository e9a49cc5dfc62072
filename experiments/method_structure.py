"""What is each tuning method? Its structure and function, after a few updates on `tiny`.

Claims    adapter-inserts-modules, prompt-tuning-is-input-only, prefix-tuning-acts-per-layer, p-tuning-uses-an-encoder,
          lora-is-low-rank, ia3-rescales, mora-is-high-rank, dora-splits-magnitude-and-direction (lecture 3)
Refuted   if a fact that the definition says does not hold for any seed and variant; conditional if for some
Control   for each claim the method that is nearest to it, presented as it; one that does all that its definition says
Run       lab run method_structure --profile cpu

Nothing reads the name of a class: parameters, outputs, tables of attention and singular values are looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

from lab.claims import Claim, Control, Evidence, Experiment, Finding, VerdictName, over_regimes
from lab.params import Count, Profile, Section
from lab.records import Record
from lab.specs import Structure, TrialSpec
from lab.statistics import Answer, bonferroni, lies_above, mean_interval, span

NAME = "method_structure"
RANK, TOKENS = 8, 20

# Fast enough to move everything in a few updates; nothing here is a contest.
ARMS: dict[str, tuple[str, dict[str, Any], float]] = {
    "full": ("full", {}, 1e-3),
    "lora": ("lora", {"rank": RANK}, 3e-3),
    "dora": ("dora", {"rank": RANK}, 3e-3),
    "ia3": ("ia3", {}, 1e-2),
    **{f"mora-{operator}": ("mora", {"rank": RANK, "operator": operator}, 3e-3) for operator in (1, 2, 3, 4, 6)},
    **{f"adapter-{place}": ("adapter", {"placement": place}, 3e-3) for place in ("houlsby", "pfeiffer", "parallel")},
    "prompt": ("prompt", {"virtual_tokens": TOKENS}, 1e-2),
    "prefix": ("prefix", {"virtual_tokens": TOKENS}, 1e-2),
    "prefix-projection": ("prefix", {"virtual_tokens": TOKENS, "projection": True}, 1e-2),
    "ptuning-mlp": ("ptuning", {"virtual_tokens": TOKENS, "encoder": "mlp"}, 1e-2),
    "ptuning-lstm": ("ptuning", {"virtual_tokens": TOKENS, "encoder": "lstm"}, 1e-2),
}

# The same function: fp32 has 24 bits, and a forward pass through four layers rounds some 30 times: 30 x 2^-24 = 2e-6.
SAME = 5e-6

# Merging is exact to rounding: the same count of roundings in the type that is merged in, 2^-8 in bf16. Normalisation
# computes in fp32 even in a float64 model.
MERGE_ERROR = {"float64": SAME, "float32": SAME, "bfloat16": 30 * 2**-8}

# In bf16 that count (0.117) is more than all that IA3 does to the output in some updates (0.05 to 0.11), so that a merge
# that did nothing would pass: two thirds of the change have to be there as well. A tenth would be less than two roundings.
MERGE_SHARE = 1 / 3

# A change of singular values or of a scale, computed in float64, is exact to some 1e-13; what is real is 1e-4.
EXACT = 1e-6

# The side of a square matrix is a whole number n, 32 for the matrices of `tiny` at rank 8: off by a half in 32 is 3 %
# of the parameters, by one, where the side must be even, 6 %.
BUDGET = 0.06

# "High" rank: four times the rank of the LoRA that has as many parameters; the square root of parameters gives 4 and more.
HIGH = 4


class Params(Section):
    """How often, and how long, each method is trained."""

    model: str
    task: str
    seeds: Count
    updates: Count
    micro_batch_size: Count


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Each method and variant, for each seed. All processor threads: forward passes are timed."""
    specs = []
    for (arm, (method, options, rate)), seed in product(ARMS.items(), range(params.seeds)):
        settings = Structure(
            model=params.model,
            task=params.task,
            method=method,
            method_options=options,
            learning_rate=rate,
            updates=params.updates,
            micro_batch_size=params.micro_batch_size,
            seed=seed,
            device=profile.device,
        )
        specs.append(
            TrialSpec(experiment=NAME, name=f"{arm}-seed{seed}", arm=arm, threads=profile.threads, settings=settings)
        )
    return specs


# Facts ----------------------------------------------------------------------------------------------------------

Fact = Callable[[Record], bool]

FROZEN: dict[str, Fact] = {
    "the base is frozen and comes back when switched off": lambda r: (
        r.figure("trained_outside") == r.figure("base_moved") == 0 and r.figure("off_distance") <= SAME
    ),
    "all that it adds is trained, as many as the closed form says": lambda r: (
        r.figure("added_still") == 0 and r.figure("parameters_trainable") == r.figures.get("parameters_closed_form")
    ),
    "training changes the output": lambda r: r.figure("end_distance") > 100 * SAME,
}
IDENTITY: dict[str, Fact] = {"it begins as the base": lambda r: r.figure("start_distance") <= SAME}
MERGES: dict[str, Fact] = {
    "it merges to rounding in every type": lambda r: (
        r.figure("merges") == 1
        and all(
            r.figure(f"merge_error_{dtype}") <= min(most, MERGE_SHARE * r.figure("end_distance"))
            for dtype, most in MERGE_ERROR.items()
        )
    )
}


def _verdict(records: Sequence[Record], facts: Mapping[str, Fact]) -> tuple[VerdictName, str]:
    """Over records that each hold all facts or not; and which facts fail, where."""
    failing = {fact: [r.spec.name for r in records if not holds(r)] for fact, holds in facts.items()}
    broken = {name for names in failing.values() for name in names}
    verdict = over_regimes(r.spec.name not in broken for r in records)
    failed = [f"not so that {fact}: {', '.join(names[:3])}" for fact, names in failing.items() if names]
    return verdict, "; ".join(failed) or f"{len(facts)} facts hold for {len(records)} trials: {'; '.join(facts)}"


def _with_cells(verdict: VerdictName, answers: Sequence[Answer]) -> VerdictName:
    """The verdict of the facts, which what is measured with an interval can only lower."""
    if verdict != "supported" or set(answers) == {"yes"}:
        return verdict
    return "conditional" if "no" in answers else "inconclusive"


def _all(evidence: Evidence, *arms: str) -> list[Record]:
    return [record for arm in arms for record in evidence.select(arm)]


def _instead(by: str, *arms: str) -> Callable[[Evidence], Evidence]:
    """A control: the arm `by` presented as each of `arms`."""

    def control(evidence: Evidence) -> Evidence:
        for arm in arms:
            evidence = evidence.replace(arm, by=by)
        return evidence

    control.__doc__ = f"{by} presented as {', '.join(arms)}."
    return control


def merging_nothing(evidence: Evidence) -> Evidence:
    """Merged models that are the base: all that training changed is missing, in every type."""

    def change(record: Record) -> dict[str, float]:
        lost = {f"merge_error_{dtype}": record.figure("end_distance") for dtype in MERGE_ERROR}
        return lost if record.figures.get("merges") else {}

    return evidence.with_figures(change)


# What the judges look at where all holds that a definition says: of every method, and of each beside that or instead.
EVERY: dict[str, float] = {
    **dict.fromkeys(("trained_outside", "base_moved", "off_distance", "added_still", "start_distance", "coupled"), 0),
    **dict.fromkeys((f"merge_error_{dtype}" for dtype in MERGE_ERROR), 0),
    **dict.fromkeys(("parameters_trainable", "parameters_closed_form", "parameters_stored"), 1000),
    **dict.fromkeys(("end_distance", "merges", "latency", "layers", "magnitude_moved", "direction_moved"), 1),
}
IN_FRONT: dict[str, float] = {"queries_in_front": TOKENS, "keys_in_front": TOKENS, "layers_of_own": 0}
BY_DEFINITION: dict[str, dict[str, float]] = {
    "adapter": {"merges": 0, "latency": 2},
    "prompt": IN_FRONT,
    "prefix": {**IN_FRONT, "queries_in_front": 0, "layers_of_own": 1},
    "ptuning": {**IN_FRONT, "coupled": 1, "parameters_stored": 100},
    "lora": {"rank_largest": RANK},
    "ia3": {"weights_changed": 3, "rescale_error": 0},
    "mora": {"rank_smallest": HIGH * RANK},
    "dora": {"magnitude_error": 0, "magnitude_moved": 2, "latency": 2},
}


def by_definition(evidence: Evidence) -> Evidence:
    """Every method as its definition says, whatever was measured; times spread a little over the seeds."""

    def change(record: Record) -> dict[str, float]:
        figures = EVERY | BY_DEFINITION.get(ARMS[record.spec.arm][0], {})
        return figures | {"latency": figures["latency"] + record.setting("seed") / 1000}

    return evidence.with_figures(change)


# Claims ---------------------------------------------------------------------------------------------------------

ADAPTERS = ("adapter-houlsby", "adapter-pfeiffer", "adapter-parallel")
MORAS = tuple(arm for arm in ARMS if arm.startswith("mora"))
PREFIXES, PTUNINGS = ("prefix", "prefix-projection"), ("ptuning-mlp", "ptuning-lstm")


def judge_adapter(evidence: Evidence) -> Finding:
    """Facts of structure, and the time that a forward pass takes with the adapters over that without."""
    facts = FROZEN | IDENTITY | {"it cannot be merged": lambda r: r.figure("merges") == 0}
    verdict, because = _verdict(_all(evidence, *ADAPTERS), facts)
    together = bonferroni(len(ADAPTERS))
    latency = {arm: mean_interval([r.figure("latency") for r in evidence.select(arm)], together) for arm in ADAPTERS}
    verdict = _with_cells(verdict, [lies_above(interval, 1.0) for interval in latency.values()])
    times = ", ".join(f"{arm.partition('-')[2]} {interval}" for arm, interval in latency.items())
    least = min(latency.values(), key=lambda interval: interval.low)
    return Finding.of(verdict, least, "x the time of a forward pass", f"{because}; time of a forward pass: {times}")


def judge_prompt(evidence: Evidence) -> Finding:
    """Parameters, and tokens that stand in front of the input at every layer."""
    found = evidence.select("prompt")
    facts = FROZEN | {
        "its tokens pass through every layer as the input's do": lambda r: (
            r.figure("queries_in_front") == r.figure("keys_in_front") == TOKENS and r.figure("layers_of_own") == 0
        ),
        "each token has numbers of its own, and all are stored": lambda r: (
            r.figure("coupled") == 0 and r.figure("parameters_stored") == r.figure("parameters_trainable")
        ),
    }
    verdict, because = _verdict(found, facts)
    taken = span([r.figure("queries_in_front") for r in found])
    return Finding.of(verdict, taken, "tokens of the context taken", because)


def judge_prefix(evidence: Evidence) -> Finding:
    """Keys that no token makes, at every layer, with and without the projection."""
    found = _all(evidence, *PREFIXES)
    stored = {r.figure("parameters_stored") for r in found}
    facts = FROZEN | {
        "every layer has keys of its own in front, and the input keeps its place": lambda r: (
            r.figure("layers_of_own") == r.figure("layers")
            and r.figure("keys_in_front") == TOKENS
            and r.figure("queries_in_front") == 0
        ),
        "the projection is trained and not stored": lambda r: len(stored) == 1,
    }
    verdict, because = _verdict(found, facts)
    share = span([r.figure("layers_of_own") / r.figure("layers") for r in found])
    return Finding.of(verdict, share, "of the layers have keys of their own", because)


def judge_ptuning(evidence: Evidence) -> Finding:
    """An encoder couples the virtual tokens; what it makes is stored, and not the encoder."""
    found = _all(evidence, *PTUNINGS)
    facts = FROZEN | {
        "one number of the encoder moves every virtual token": lambda r: r.figure("coupled") == 1,
        "its tokens pass through every layer as the input's do": lambda r: (
            r.figure("queries_in_front") == r.figure("keys_in_front") == TOKENS
        ),
        "less is stored than trained": lambda r: r.figure("parameters_stored") < r.figure("parameters_trainable"),
    }
    verdict, because = _verdict(found, facts)
    share = span([r.figure("parameters_stored") / r.figure("parameters_trainable") for r in found])
    return Finding.of(verdict, share, "of what is trained is stored", because)


def judge_lora(evidence: Evidence) -> Finding:
    """The numeric rank of each weight's change, by singular values in float64."""
    found = evidence.select("lora")
    facts = FROZEN | IDENTITY | MERGES
    facts |= {f"no weight changes by more than rank {RANK}": lambda r: 0 < _rank(r, "rank_largest") <= RANK}
    verdict, because = _verdict(found, facts)
    ranks = span([_rank(r, "rank_largest") for r in found])
    return Finding.of(verdict, ranks, f"is the largest rank of a change (r = {RANK})", because)


def _rank(record: Record, name: str) -> float:
    return record.figures.get(name) or 0.0


def judge_ia3(evidence: Evidence) -> Finding:
    """What is left of a weight's change when each row, or each column, may have a factor."""
    found = evidence.select("ia3")
    facts = FROZEN | IDENTITY | MERGES
    facts |= {
        "three weights of a layer change: keys, values and the feed-forward": lambda r: (
            r.figures.get("weights_changed") == 3 * r.figure("layers")
        ),
        "each by factors of its rows or columns alone": lambda r: _rescale_error(r) <= EXACT,
    }
    verdict, because = _verdict(found, facts)
    left = span([_rescale_error(r) for r in found])
    return Finding.of(verdict, left, "of the change is no rescaling", because)


def _rescale_error(record: Record) -> float:
    found = record.figures.get("rescale_error")
    return 1.0 if found is None else found


def judge_mora(evidence: Evidence) -> Finding:
    """The numeric rank of each weight's change under every operator, with as many parameters as LoRA."""
    found = _all(evidence, *MORAS)
    budget = evidence.select("lora")[0].figure("parameters_trainable")
    facts = FROZEN | IDENTITY | MERGES
    facts |= {
        f"it has LoRA's number of parameters within {BUDGET:.0%}": lambda r: (
            abs(r.figure("parameters_trainable") / budget - 1) <= BUDGET
        ),
        f"every weight changes by rank {HIGH * RANK} at least": lambda r: _rank(r, "rank_smallest") >= HIGH * RANK,
    }
    verdict, because = _verdict(found, facts)
    ranks = span([_rank(r, "rank_smallest") / RANK for r in found])
    return Finding.of(verdict, ranks, "x LoRA's rank, the smallest of a change", because)


def judge_dora(evidence: Evidence) -> Finding:
    """Norms of the merged weights against the magnitudes that are trained; and what it costs over LoRA."""
    found = evidence.select("dora")
    facts = FROZEN | IDENTITY | MERGES
    facts |= {
        "the norms of the weights are the magnitudes that it trains": lambda r: _magnitude_error(r) <= SAME,
        "magnitudes and directions have both moved": lambda r: (
            min(_rank(r, "magnitude_moved"), _rank(r, "direction_moved")) > EXACT
        ),
    }
    verdict, because = _verdict(found, facts)
    pairs = list(zip(found, evidence.select("lora"), strict=True))
    time = mean_interval([d.figure("latency") / p.figure("latency") for d, p in pairs], bonferroni(2))
    more = pairs[0][0].figure("parameters_trainable") / pairs[0][1].figure("parameters_trainable")
    because += f"; {more:.2f} x LoRA's parameters"
    if verdict == "supported":  # both have moved, so that there is something to divide by
        apart = mean_interval([_apart(d) / _apart(p) for d, p in pairs], bonferroni(2))
        verdict = _with_cells(verdict, [lies_above(time, 1.0), lies_above(apart, 1.0)])
        because += f"; magnitudes move {apart} x as far as LoRA's for as much of a turn"
    return Finding.of(verdict, time, "x the time of a forward pass with LoRA", because)


def _apart(record: Record) -> float:
    """How far magnitudes move for as much of a turn of the directions, means over the weights."""
    return record.figure("magnitude_moved") / record.figure("direction_moved")


def _magnitude_error(record: Record) -> float:
    found = record.figures.get("magnitude_error")
    return 1.0 if found is None else found


OTHERWISE = "Look at the verdict's reasons before you take the method for what its paper says."


def _claim(
    id: str,
    statement: str,
    threshold: str,
    judge: Any,
    arms: tuple[str, ...],
    faults: Any,
    advice: str,
    otherwise: str = OTHERWISE,
    **more: Any,
) -> Claim:
    """A definition: it holds on `tiny` or not, and what to do is one line if it does."""
    undecided = "Compare the method with LoRA on your own task before you choose it for what its paper says."
    return Claim(
        id=id,
        statement=statement,
        lecture="3",
        threshold=threshold,
        judge=judge,
        controls={
            **{name: Control(change, "refuted") for name, change in faults.items()},
            "by the definition": Control(by_definition, "supported", arms),
        },
        advice={"supported": advice, "conditional": otherwise, "refuted": otherwise, "inconclusive": undecided},
        **{
            "tiers": ("cpu",),
            "stated": {"cpu": "supported", "full": "supported"},
            "scope": "tiny after some updates, PEFT and the lab's own; every seed and variant",
            **more,
        },
    )


EXPERIMENT = Experiment(
    name=NAME,
    title="What each method is",
    params=Params,
    trials=trials,
    claims=(
        _claim(
            "adapter-inserts-modules",
            "adapters are small modules between the layers",
            "begins as the base, base frozen, no merge; the interval of a forward pass's time (95 % over three placements) lies "
            "above the base's",
            judge_adapter,
            ADAPTERS,
            {"LoRA as adapters": _instead("lora", *ADAPTERS)},
            "Take adapters where their delay in every forward pass does not matter: they cannot be merged away.",
            scope="tiny, 96 tokens a batch; three placements; PEFT's switch stands for the model without adapters",
        ),
        _claim(
            "prompt-tuning-is-input-only",
            "prompt tuning learns a prompt in front of the input and nothing else",
            f"{TOKENS} tokens x width parameters, passed through every layer as input; base frozen",
            judge_prompt,
            ("prompt",),
            {"prefix tuning as prompt tuning": _instead("prefix", "prompt")},
            "Count the virtual tokens as part of the context: they take room and time in every layer.",
            scope="tiny; that quality needs a large model (Lester et al. 2021) is not shown here",
        ),
        _claim(
            "prefix-tuning-acts-per-layer",
            "prefix tuning learns vectors in front at every layer",
            "every layer has keys that no token makes; count under grouped-query attention exact; base frozen",
            judge_prefix,
            PREFIXES,
            {"prompt tuning as prefix tuning": _instead("prompt", *PREFIXES)},
            "Expect two vectors per token and layer, as wide as the keys: grouped-query attention makes them few.",
        ),
        _claim(
            "p-tuning-uses-an-encoder",
            "P-tuning makes its prompt embeddings by an encoder",
            "one number of the encoder moves every virtual token; less is stored than trained",
            judge_ptuning,
            PTUNINGS,
            {"prompt tuning as P-tuning": _instead("prompt", *PTUNINGS)},
            "Plan memory for the encoder in training; the file holds the embeddings alone.",
        ),
        _claim(
            "lora-is-low-rank",
            "LoRA adds a change of low rank",
            f"rank of every weight's change at most r; begins as the base; merges to rounding in fp64, fp32, bf16, and within "
            f"{MERGE_SHARE:.2f} of what training changed",
            judge_lora,
            ("lora",),
            {
                "MoRA as LoRA": _instead("mora-6", "lora"),
                "full fine-tuning as LoRA": _instead("full", "lora"),
                "a merge that does nothing": merging_nothing,
            },
            "Merge LoRA before you serve one task: the function stays the same and the delay goes.",
        ),
        _claim(
            "ia3-rescales",
            "IA3 rescales keys, values and the feed-forward",
            "three weights a layer change, by factors of rows or columns alone; begins as the base; merges to rounding",
            judge_ia3,
            ("ia3",),
            {"LoRA as IA3": _instead("lora", "ia3"), "a merge that does nothing": merging_nothing},
            "Take IA3 for the smallest file: it scales what the model has and adds no direction.",
            "Merge IA3 in fp32: it scales and adds no direction, but in bf16 rounding may take a third of a small change.",
            stated={"cpu": "supported", "full": "conditional"},
        ),
        _claim(
            "mora-is-high-rank",
            "MoRA's square matrix changes weights by a high rank with LoRA's budget",
            f"parameters within {BUDGET:.0%} of LoRA's, rank of every change at least {HIGH} r, for all five operators",
            judge_mora,
            (*MORAS, "lora"),
            {"LoRA as MoRA": _instead("lora", *MORAS), "a merge that does nothing": merging_nothing},
            "Expect a high-rank change from MoRA at LoRA's size; merge it, its operators cost time.",
        ),
        _claim(
            "dora-splits-magnitude-and-direction",
            "DoRA trains magnitude and direction apart, the direction by LoRA",
            "norms of the merged weights equal the trained magnitudes; both move; merges to rounding; the intervals of a forward "
            "pass's time over LoRA's, and of how far magnitudes move for a turn over LoRA's, lie above 1 (95 % over both)",
            judge_dora,
            ("dora", "lora"),
            {"LoRA as DoRA": _instead("lora", "dora"), "a merge that does nothing": merging_nothing},
            "Merge DoRA before you serve: until then it takes longer than LoRA in every forward pass.",
            tiers=("cpu", "gpu"),
            scope="tiny after some updates, PEFT, PyTorch's kernels; movements are means over the weights: whether magnitude and "
            "direction move apart from one weight to the next, as Liu et al. 2024 draw it, is not in the records",
        ),
    ),
)
