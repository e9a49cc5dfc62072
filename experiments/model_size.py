"""Model size: which models does a card load, which does it train, and does QLoRA train those that LoRA does not?

Claims    model-size-limit, qlora-fits-where-lora-does-not (lecture 4)
Refuted   if a card loads every model; if QLoRA trains no larger model than LoRA on any card
Control   the smallest model presented as all; LoRA presented as QLoRA; a size that no card loads, that only QLoRA trains
Run       lab run model_size --profile cpu

Simulated peaks against cards: nothing is drawn. What a card of so many GB holds is said in lab/cards.py: the driver, the
context and fragmentation take their shares. On a device it is tried: beside each predicted boundary, until memory runs out.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache, partial
from typing import Any

from lab.cards import DRIVER_SHARE, GIB, usable_bytes
from lab.claims import Claim, Control, Evidence, Experiment, Finding, over_regimes
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Limit, TrialSpec, memory_spec
from lab.statistics import span

NAME = "model_size"

# The cards that one person has: from a laptop's to a rented one. The largest model is of 70B: what people fine-tune on one
# card at most (65B on 48 GB is what the QLoRA paper opens with).
CARDS = (8, 16, 24, 48, 80)

LOADED: dict[str, dict[str, Any]] = {
    "16 bits": {"precision": "bf16", "updates": 0},
    "4 bits": {"precision": "bf16", "updates": 0, "quantisation": "nf4-double"},
}
RECIPE = {"precision": "bf16", "autocast": True, "checkpointing": True}
TRAINED: dict[str, dict[str, Any]] = {
    "full": RECIPE,
    "lora": {**RECIPE, "method": "lora"},
    "qlora": {**RECIPE, "method": "qlora", "method_options": {"double_quantisation": True}},
}
WAYS = {"loaded": LOADED, "trained": TRAINED}


class Params(Section):
    """Each of `models` is loaded, and trained on one sequence of `length` tokens.

    On a device the cards of `tried` GB are emulated, as far as it has their memory.
    """

    models: tuple[str, ...]
    length: Count
    tried: tuple[Count, ...] = ()


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Each model held in 16 and in 4 bits; each trained by full fine-tuning, LoRA and QLoRA.

    On a device: for each card and way the largest model that is predicted to fit, and the smallest that is not.
    """
    specs = []
    ways = {_arm(prefix, way): settings for prefix, all_of in WAYS.items() for way, settings in all_of.items()}
    for model in params.models:
        for arm, settings in ways.items():
            setup = {"model": model, "length": params.length, **settings}
            specs.append(memory_spec(NAME, arm, model, profile.device, sim=True, **setup))
    for card in params.tried:
        for arm, settings in ways.items():
            for model in beside_the_boundary(params.models, arm, params.length, card):
                setup = {"model": model, "length": params.length, "device": profile.device, **settings}
                limit = Limit.model_validate({**setup, "card_gb": card})
                specs.append(TrialSpec(experiment=NAME, name=f"{arm}-{card}gb-{model}", arm=arm, settings=limit))
    return specs


def _arm(prefix: str, way: str) -> str:
    return f"{prefix}-{way.replace(' ', '-')}"


# Only the two models at a boundary can show it misplaced: what is larger, or smaller, says less and takes longer. The closed
# form chooses them: it needs no torch, and is exact enough to choose among sizes that are a quarter apart or more.
def beside_the_boundary(models: tuple[str, ...], arm: str, length: int, card: int) -> list[str]:
    """The largest of the models that is predicted to fit, and the smallest that is not; one alone if it is all or none."""
    by_size = sorted(models, key=_parameters)
    fits = [model for model in by_size if _closed_form(model, arm, length) <= _room(card)]
    fails = [model for model in by_size if model not in fits]
    return [*fits[-1:], *fails[:1]]


@cache
def _parameters(model: str) -> int:
    from lab.memory.architecture import Architecture
    from lab.pricing import load_config

    return Architecture.of(load_config(model)).parameters()


@cache
def _closed_form(model: str, arm: str, length: int) -> int:
    """Bytes of the weights, or of the peak, by arithmetic."""
    from lab.pricing import predict, read_spec

    spec: dict[str, Any] = {"model": model, "length": length, "dtype": "bf16"}
    way = arm.partition("-")[2]
    if arm.startswith("loaded"):
        held = {"quantisation": "nf4", "double_quantisation": True} if way == "4-bits" else {}
        return predict(read_spec({**spec, **held, "inference": True})).parts["weights"]
    nested = {"double_quantisation": True, "preparation": "kbit"} if way == "qlora" else {}
    return predict(
        read_spec({**spec, **nested, "method": way, "amp": "bf16", "checkpointing": True}), quick=True
    ).peak_bytes


def _room(card: int) -> int:
    """Bytes that a peak may take on a card of so many GB."""
    return usable_bytes(int(card * GIB * (1 - DRIVER_SHARE)))


def _tries(record: Record) -> Iterator[tuple[int, bool]]:
    """(card in GB, whether the model fits): what was tried on one card, or what a simulated size means for each."""
    if isinstance(record.spec.settings, Limit):
        if not record.figure("beyond_device"):
            yield int(record.setting("card_gb")), bool(record.figure("fits"))
        return
    need = record.figure("weights_bytes" if record.spec.arm.startswith("loaded") else "peak_bytes")
    for card in CARDS:
        yield card, need <= _room(card)


Fits = dict[str, dict[int, list[tuple[float, bool]]]]
"""By way and card: (billions of parameters, whether it fits) of each model."""


def _fits(evidence: Evidence, prefix: str) -> Fits:
    found: Fits = {}
    for way in WAYS[prefix]:
        cards = found.setdefault(way, {})
        for record in evidence.select(_arm(prefix, way)):
            for card, fits in _tries(record):
                cards.setdefault(card, []).append((record.figure("parameters_base") / 1e9, fits))
        found[way] = dict(sorted(cards.items()))
    return found


def _table(evidence: Evidence, prefix: str) -> dict[str, dict[int, float]]:
    """The largest model that fits in billions, 0 if none does, by way and card."""
    return {
        way: {card: max((size for size, fits in models if fits), default=0.0) for card, models in cards.items()}
        for way, cards in _fits(evidence, prefix).items()
    }


def _in_words(table: dict[str, dict[int, float]]) -> str:
    rows = (
        f"{way}: {', '.join(f'{size:.3g}B on {card} GB' if size else f'none on {card} GB' for card, size in row.items())}"
        for way, row in table.items()
    )
    return "; ".join(rows)


def largest_trained(evidence: Evidence) -> str:
    """In words: the largest model that trains on each card, by way of training."""
    return f"largest that trains, {_in_words(_table(evidence, 'trained'))}"


def _foreseen(evidence: Evidence, *prefixes: str) -> str:
    """Of what was tried on a device: how many boundaries were predicted right, and where not; nothing for the sim tier."""
    right: dict[tuple[str, int], bool] = {}
    wrong = []
    for record in evidence.records:
        if (
            record.status != "ok"
            or not isinstance(record.spec.settings, Limit)
            or record.spec.arm.split("-")[0] not in prefixes
        ):
            continue
        for card, fits in _tries(record):
            agrees = fits == bool(record.figure("predicted_fits"))
            right[record.spec.arm, card] = right.get((record.spec.arm, card), True) and agrees
            wrong += [] if agrees else [f"{record.spec.name} {'fits' if fits else 'does not fit'}"]
    if not right:
        return ""
    said = f"; {sum(right.values())} of {len(right)} boundaries lie where they were predicted"
    return said + (f" (not: {', '.join(wrong)})" if wrong else "")


# model-size-limit -----------------------------------------------------------------------------------------------


def judge_limit(evidence: Evidence) -> Finding:
    """On each card, in 16 and in 4 bits: is there a model that cannot be loaded?"""
    loaded = _fits(evidence, "loaded")
    verdict = over_regimes(
        not all(fits for _, fits in models) for cards in loaded.values() for models in cards.values()
    )
    table = _table(evidence, "loaded")
    sizes = [size for row in table.values() for size in row.values()]
    because = f"largest that loads, {_in_words(table)}; {largest_trained(evidence)}"
    because += _foreseen(evidence, "loaded", "trained")
    return Finding.of(verdict, span(sizes), "billion parameters load at most", because)


def smallest_control(evidence: Evidence) -> Evidence:
    """The smallest model presented as every one: it loads everywhere."""
    arms = dict.fromkeys(record.spec.arm for record in evidence.records)
    return Evidence(min(evidence.select(arm), key=lambda r: r.figure("parameters_base")) for arm in arms)


# qlora-fits-where-lora-does-not ---------------------------------------------------------------------------------


def judge_qlora(evidence: Evidence) -> Finding:
    """On each card: the largest model that QLoRA trains over the largest that LoRA trains."""
    table, lora = _table(evidence, "trained"), _fits(evidence, "trained")["lora"]
    cards = [card for card in table["lora"] if card in table["qlora"]]
    # LoRA's limit is where a model does not fit: on a device larger ones than the neighbours of a boundary are not tried.
    beyond = {card: min((size for size, fits in lora[card] if not fits), default=math.inf) for card in cards}
    verdict = over_regimes(table["qlora"][card] >= beyond[card] for card in cards)
    ratios = [table["qlora"][card] / table["lora"][card] for card in cards if table["lora"][card]]
    because = _in_words(table) + _foreseen(evidence, "trained")
    return Finding.of(verdict, span(ratios), "x the parameters that LoRA trains", because)


def lora_control(evidence: Evidence) -> Evidence:
    """LoRA presented as QLoRA."""
    return evidence.replace("trained-qlora", by="trained-lora")


def size_lines(evidence: Evidence) -> dict[str, Line]:
    """The largest model over the card's memory, by way of training, and to load."""
    table = _table(evidence, "trained")
    table |= {f"load, {way}": row for way, row in _table(evidence, "loaded").items()}
    return {way: Line(list(row), list(row.values())) for way, row in table.items()}


# Known answer ---------------------------------------------------------------------------------------------------


def two_sizes(evidence: Evidence) -> Evidence:
    """Every model in two sizes, the smaller of which fits each card, the larger none but for QLoRA."""
    presented = lora_control(evidence)  # on the same cards
    return Evidence(r for size in (1, 2) for r in presented.with_figures(partial(_of_size, size)).records)


def _arms(*prefixes: str) -> tuple[str, ...]:
    return tuple(_arm(prefix, way) for prefix in prefixes for way in WAYS[prefix])


def _of_size(size: int, record: Record) -> dict[str, float]:
    fits = size == 1 or record.spec.arm == "trained-qlora"
    needs = dict.fromkeys(("weights_bytes", "peak_bytes"), 0.0 if fits else math.inf)
    tried = dict.fromkeys(("fits", "predicted_fits"), float(fits))
    return {"parameters_base": size * 1e9, "beyond_device": 0.0, **needs, **tried}


EXPERIMENT = Experiment(
    name=NAME,
    title="Model size",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="model-size-limit",
            statement="some models cannot even be loaded on one GPU",
            lecture="4",
            tiers=("sim", "gpu"),
            threshold=f"on each card of {', '.join(map(str, CARDS))} GB, in 16 and in 4 bits, a model of up to 70B does not load",
            scope="weights alone; trained: one sequence, bf16, autocast, checkpointing, AdamW; steps between bundled models",
            judge=judge_limit,
            controls={
                "the smallest model as every one": Control(smallest_control, "refuted"),
                "a size that no card loads": Control(two_sizes, "supported", _arms("loaded", "trained")),
            },
            advice={
                "supported": "Look at the weights first: what does not load cannot be trained by any method.",
                "conditional": "Load in 4 bits before you rent a larger card: 48 GB hold a model of 70B then.",
                "refuted": "Load what you like; memory for training is what decides.",
                "inconclusive": "Ask `lab fit` for your model on your card before you download it.",
            },
            stated={"sim": "conditional"},
        ),
        Claim(
            id="qlora-fits-where-lora-does-not",
            statement="QLoRA trains models that are too large for LoRA",
            lecture="4",
            tiers=("sim", "gpu"),
            threshold=f"on each card of {', '.join(map(str, CARDS))} GB QLoRA trains a larger model than LoRA",
            scope="one sequence, bf16, autocast, checkpointing, AdamW, LoRA on all linear layers; steps between models",
            judge=judge_qlora,
            controls={
                "LoRA as QLoRA": Control(lora_control, "refuted"),
                "a size that only QLoRA trains": Control(two_sizes, "supported", _arms("trained")),
            },
            advice={
                "supported": "Quantise the base when LoRA does not fit: the same card takes a model 1.6 to 4 times larger.",
                "conditional": "Try QLoRA when LoRA does not fit, but ask `lab fit`: not every card gains a size.",
                "refuted": "Do not quantise to make it fit: activations and logits decide.",
                "inconclusive": "Ask `lab fit` for LoRA and for QLoRA on your card before you quantise.",
            },
            stated={"sim": "supported"},
        ),
    ),
    plots=(
        Plot(
            "largest-model",
            "The largest model that a card takes",
            "memory of the card, GB",
            "billion parameters",
            size_lines,
            log_x=True,
            log_y=True,
        ),
    ),
)
