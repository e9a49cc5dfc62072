"""Model size: which models does a card load, which does it train, and does QLoRA train those that LoRA does not?

Claims    model-size-limit, qlora-fits-where-lora-does-not (lecture 4)
Refuted   if a card loads every model; if QLoRA trains no larger model than LoRA on any card
Control   the smallest model presented as all; LoRA presented as QLoRA
Run       lab run model_size --profile cpu

Simulated peaks against cards: nothing is drawn. What a card of so many GB holds is said in lab/cards.py: the driver, the
context and fragmentation take their shares.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lab.cards import DRIVER_SHARE, GIB, usable_bytes
from lab.claims import Claim, Evidence, Experiment, Finding, over_regimes
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot
from lab.specs import TrialSpec, memory_spec
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


class Params(Section):
    """Each of `models` is loaded, and trained on one sequence of `length` tokens."""

    models: tuple[str, ...]
    length: Count


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Each model held in 16 and in 4 bits; each trained by full fine-tuning, LoRA and QLoRA."""
    specs = []
    for model in params.models:
        for ways, prefix in ((LOADED, "loaded"), (TRAINED, "trained")):
            for way, settings in ways.items():
                setup = {"model": model, "length": params.length, **settings}
                specs.append(memory_spec(NAME, _arm(prefix, way), model, profile.device, sim=True, **setup))
    return specs


def _arm(prefix: str, way: str) -> str:
    return f"{prefix}-{way.replace(' ', '-')}"


def _room(card: int) -> int:
    """Bytes that a peak may take on a card of so many GB."""
    return usable_bytes(int(card * GIB * (1 - DRIVER_SHARE)))


def _needs(evidence: Evidence, arm: str) -> list[tuple[float, float]]:
    """(billions of parameters, bytes that it takes) of each model, by size."""
    figure = "weights_bytes" if arm.startswith("loaded") else "peak_bytes"
    found = [(r.figure("parameters_base") / 1e9, r.figure(figure)) for r in evidence.select(arm)]
    return sorted(found)


def _largest(needs: list[tuple[float, float]], card: int) -> float:
    """Billions of parameters of the largest model that fits; 0 if none does."""
    return max((size for size, need in needs if need <= _room(card)), default=0.0)


def _table(evidence: Evidence, prefix: str, ways: Mapping[str, Any]) -> dict[str, dict[int, float]]:
    """The largest model in billions, by way and card."""
    needs = {way: _needs(evidence, _arm(prefix, way)) for way in ways}
    return {way: {card: _largest(need, card) for card in CARDS} for way, need in needs.items()}


def _in_words(table: dict[str, dict[int, float]]) -> str:
    rows = (
        f"{way}: {', '.join(f'{size:.3g}B on {card} GB' if size else f'none on {card} GB' for card, size in row.items())}"
        for way, row in table.items()
    )
    return "; ".join(rows)


# model-size-limit -----------------------------------------------------------------------------------------------


def judge_limit(evidence: Evidence) -> Finding:
    """On each card, in 16 and in 4 bits: is there a model that cannot be loaded?"""
    table = _table(evidence, "loaded", LOADED)
    largest = max(size for size, _ in _needs(evidence, "loaded-16-bits"))
    sizes = [size for row in table.values() for size in row.values()]
    verdict = over_regimes(size < largest for size in sizes)
    trained = _table(evidence, "trained", TRAINED)
    because = f"largest that loads, {_in_words(table)}; largest that trains, {_in_words(trained)}"
    return Finding.of(verdict, span(sizes), "billion parameters load at most", because)


def smallest_control(evidence: Evidence) -> Evidence:
    """The smallest model presented as every one: it loads everywhere."""
    arms = dict.fromkeys(record.spec.arm for record in evidence.records)
    return Evidence(min(evidence.select(arm), key=lambda r: r.figure("parameters_base")) for arm in arms)


# qlora-fits-where-lora-does-not ---------------------------------------------------------------------------------


def judge_qlora(evidence: Evidence) -> Finding:
    """On each card: the largest model that QLoRA trains over the largest that LoRA trains."""
    table = _table(evidence, "trained", TRAINED)
    verdict = over_regimes(table["qlora"][card] > table["lora"][card] for card in CARDS)
    ratios = [table["qlora"][card] / table["lora"][card] for card in CARDS if table["lora"][card]]
    return Finding.of(verdict, span(ratios), "x the parameters that LoRA trains", _in_words(table))


def lora_control(evidence: Evidence) -> Evidence:
    """LoRA presented as QLoRA."""
    return evidence.replace("trained-qlora", by="trained-lora")


def size_lines(evidence: Evidence) -> dict[str, Line]:
    """The largest model over the card's memory, by way of training, and to load."""
    table = _table(evidence, "trained", TRAINED)
    table |= {f"load, {way}": row for way, row in _table(evidence, "loaded", LOADED).items()}
    return {way: Line(list(row), list(row.values())) for way, row in table.items()}


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
            controls={"the smallest model as every one": smallest_control},
            advice={
                "supported": "Look at the weights first: what does not load cannot be trained by any method.",
                "conditional": "Load in 4 bits before you rent a larger card: 48 GB hold a model of 70B then.",
                "refuted": "Load what you like; memory for training is what decides.",
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
            controls={"LoRA as QLoRA": lora_control},
            advice={
                "supported": "Quantise the base when LoRA does not fit: the same card takes a model two to four times larger.",
                "conditional": "Try QLoRA when LoRA does not fit, but ask `lab fit`: not every card gains a size.",
                "refuted": "Do not quantise to make it fit: activations and logits decide.",
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
