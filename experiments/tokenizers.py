"""A tokenizer belongs to its model: what does a byte of text cost a model through another tokenizer, and Korean through its own?

Claim     tokenizer-belongs-to-model (lecture 1)
Refuted   if no model loses COST bits per byte of text of a kind that it knows by a foreign tokenizer, the lead is gone after a
          short training, and Korean takes less than RATIO times the tokens per character of English; conditional if some hold
Control   the model's own tokenizer presented as foreign; foreign ones that cost a great deal
Run       lab run tokenizers --profile cpu
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from typing import Literal

from pydantic import Field

from lab.claims import Claim, Control, Evidence, Experiment, Finding, over_answers
from lab.params import Count, Profile, Rate, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Tokenizing, TrialSpec
from lab.statistics import Answer, Interval, lies_above, mean_interval, paired_difference, span

NAME = "tokenizers"

# Bits per byte that a foreign tokenizer must cost at least. Compressors and small language models lie between 1 and 2.5 bits
# on English: half a bit is the step from a general compressor to a language model, so none would give it away.
COST = 0.5

# Bits per byte by which the own tokenizer must still lead after a short training of both with new embeddings. A tenth of a
# bit is more than a model gains by twice its size (some 0.05 in the published scaling laws).
LEAD = 0.1

# How many times the tokens that a character of English takes a character of Korean must take at least. A Korean syllable says
# as much as about two letters (the two pages here: 1,175 and 2,471 characters), so below 2 a Korean page is no dearer.
RATIO = 2.0

FOREIGN = {"tiny": ("retrained",), "smol": ("permuted", "borrowed")}
"""The foreign tokenizers that decide: one of the same size, trained on other text; no text here makes one of 49,152 pieces,
so `smol` has its own pieces with exchanged ids, and another's cut of the text in its own ids."""

KNOWN = {"tiny": "stories", "smol": "english"}
"""The text of a kind that the model has learnt. On what it has not, no tokenizer helps: that is reported, not judged."""


class ModelParams(Section):
    """What is read through which tokenizers."""

    seeds: Count
    cuts: tuple[Literal["own", "permuted", "borrowed", "retrained"], ...] = Field(min_length=2)
    paragraphs: Count
    updates: int = Field(default=0, ge=0)
    batch: Count = 8
    learning_rate: Rate = 1e-3


class Params(Section):
    """The models, each with the tokenizers that it reads through."""

    models: dict[Literal["tiny", "smol"], ModelParams] = Field(min_length=1)


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Each model for each seed, which draws the permutation, the other tokenizer's text, the stories and their order."""
    specs = []
    for model, chosen in params.models.items():
        for seed in range(chosen.seeds):
            settings = Tokenizing(
                model=model,
                cuts=chosen.cuts,
                paragraphs=chosen.paragraphs,
                updates=chosen.updates,
                batch=chosen.batch,
                learning_rate=chosen.learning_rate,
                seed=seed,
                device=profile.device,
            )
            specs.append(TrialSpec(experiment=NAME, name=f"{model}-seed{seed}", arm=model, settings=settings))
    return specs


# Judge ----------------------------------------------------------------------------------------------------------


def judge(evidence: Evidence) -> Finding:
    """Each model's loss by a foreign tokenizer, the lead that training leaves, and the tokens that Korean takes."""
    answers: list[Answer] = []
    reasons = []
    costs: list[Interval] = []
    for model in FOREIGN:
        if not evidence.has(model):
            continue
        records = evidence.select(model)
        foreign = [cut for cut in FOREIGN[model] if cut in records[0].setting("cuts")]
        found, ratio = {cut: _cost(records, cut) for cut in foreign}, _ratio(records[0])
        costs += found.values()
        answers += [*(lies_above(cost, COST) for cost in found.values()), lies_above(ratio, RATIO)]
        told = [f"a {cut} tokenizer costs {cost} bits per byte of {KNOWN[model]}" for cut, cost in found.items()]
        reasons.append(f"{model}: {', '.join(told)}")
        if trained := [r for r in records if r.setting("updates")]:
            lead = _lead(trained)
            answers.append(lies_above(lead, LEAD))
            reasons.append(f"after {trained[0].setting('updates')} updates with new embeddings the own leads by {lead}")
        reasons.append(
            f"Korean takes {ratio.estimate:.3g} times the tokens per character ({ratio.low:.3g} to {ratio.high:.3g} in {ratio.n} "
            f"paragraphs of one page), {_page(records[0]):.1f} times for the same page"
        )
        reasons.append(
            f"on Korean the own costs {_mean(records, 'own'):.1f}"
            + "".join(f", the {cut} {_mean(records, cut):.1f}" for cut in foreign)
        )
    if not costs:
        raise ValueError("no model has been read with a foreign tokenizer")
    return Finding.of(
        over_answers(answers), costs[0], "bits per byte that a foreign tokenizer costs", "; ".join(reasons)
    )


def _cost(records: list[Record], foreign_cut: str) -> Interval:
    """Bits per byte of known text through a foreign tokenizer less those through the own, over the seeds."""
    model = records[0].spec.arm
    foreign, own = ([r.figure(f"{cut}_{KNOWN[model]}_bits_per_byte") for r in records] for cut in (foreign_cut, "own"))
    return paired_difference(foreign, own)


def _lead(records: list[Record]) -> Interval:
    """The same after training with new embeddings."""
    foreign, own = ([r.figure(f"trained_{cut}_bits_per_byte") for r in records] for cut in ("retrained", "own"))
    return paired_difference(foreign, own)


def _per_character(record: Record, page: str) -> list[float]:
    """Tokens per character of each paragraph with the model's own tokenizer."""
    tokens, characters = (record.series[f"{page}_{what}"] for what in ("tokens", "characters"))
    return [(a or 0) / (b or 1) for a, b in zip(tokens, characters, strict=True)]


def _ratio(record: Record) -> Interval:
    """Tokens per character of Korean over those of English: a span over the pairs of paragraphs, as nothing is drawn."""
    pairs = zip(_per_character(record, "korean"), _per_character(record, "english"), strict=True)
    return span([korean / english for korean, english in pairs])


def _page(record: Record) -> float:
    """Tokens of the Korean page over those of the same page in English."""
    return sum(t or 0 for t in record.series["korean_tokens"]) / sum(t or 0 for t in record.series["english_tokens"])


def _mean(records: list[Record], cut: str) -> float:
    return sum(r.figure(f"{cut}_korean_bits_per_byte") for r in records) / len(records)


# Controls -------------------------------------------------------------------------------------------------------


def _changed(change: Callable[[Record], Record]) -> Callable[[Evidence], Evidence]:
    return lambda evidence: Evidence(map(change, evidence.select()))


def own_as_foreign(record: Record) -> Record:
    """What the own tokenizer gave, presented as the foreign one's; the English page presented as the Korean one."""
    figures = dict(record.figures)
    for cut in chain(*FOREIGN.values()):
        figures |= {
            name.replace("own_", f"{cut}_", 1): value for name, value in record.figures.items() if "own_" in name
        }
    series = dict(record.series)
    for what in ("tokens", "characters", "bytes"):
        series[f"korean_{what}"] = series[f"english_{what}"]
    return record.model_copy(update={"figures": figures, "series": series})


def dear(record: Record) -> Record:
    """Every foreign tokenizer three bits dearer than the own; three tokens for each character of Korean, a third in English."""
    figures = dict(record.figures)
    for name, value in record.figures.items():
        if value is not None and "own_" in name and name.endswith("bits_per_byte"):
            figures |= {name.replace("own_", f"{cut}_", 1): value + 3 for cut in chain(*FOREIGN.values())}
    characters = {page: record.series[f"{page}_characters"] for page in ("korean", "english")}
    each = {"korean": 3.0, "english": 1 / 3}
    series = {f"{page}_tokens": [(c or 0) * each[page] for c in row] for page, row in characters.items()}
    return record.model_copy(update={"figures": figures, "series": record.series | series})


# Plots ----------------------------------------------------------------------------------------------------------

CUTS = ("own", "permuted", "borrowed", "retrained")


def cost_lines(evidence: Evidence) -> dict[str, Line]:
    """Bits per byte of known text over tokens per byte, a point for each tokenizer of each model."""
    lines = {}
    for model, text in KNOWN.items():
        if not evidence.has(model):
            continue
        records = evidence.select(model)
        for cut in (c for c in CUTS if c in records[0].setting("cuts")):
            bits = mean_interval([r.figure(f"{cut}_{text}_bits_per_byte") for r in records])
            tokens = mean_interval([r.figure(f"{cut}_{text}_tokens_per_byte") for r in records])
            lines[f"{model}, {cut}"] = Line((tokens.estimate,), (bits.estimate,))
    return lines


def language_lines(evidence: Evidence) -> dict[str, Line]:
    """Tokens per character of each paragraph, for each model's own tokenizer and language."""
    lines = {}
    for model in FOREIGN:
        if evidence.has(model):
            record = evidence.select(model)[0]
            for page in ("english", "korean"):
                values = _per_character(record, page)
                lines[f"{model}, {page}"] = Line(range(1, len(values) + 1), values)
    return lines


EXPERIMENT = Experiment(
    name=NAME,
    title="A tokenizer belongs to its model",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="tokenizer-belongs-to-model",
            statement="each model has a tokenizer made for it",
            lecture="1",
            tiers=("cpu",),
            threshold=f"95 % intervals above {COST:g} bits per byte for a foreign tokenizer on text of a kind that it knows, "
            f"above {LEAD:g} after a short training of both with new embeddings; above {RATIO:g} times the tokens per character "
            "in every paragraph of the Korean page; every byte of the text counted; for each model",
            scope="tiny (1,536 pieces; stories) against byte-level BPEs of its size and kind trained on other text, smol (49,152; "
            "an English page) against its own pieces with exchanged ids, and another's cut of the text in its own; one page of "
            "Korean that neither was made for: a span over its paragraphs, not over Korean",
            judge=judge,
            controls={
                "the own tokenizer presented as foreign": Control(_changed(own_as_foreign), "refuted"),
                "foreign tokenizers that are dear": Control(_changed(dear), "supported"),
            },
            advice={
                "supported": "Load tokenizer and weights from one place; count the tokens of your language before you plan.",
                "conditional": "Never swap the tokenizer without looking: measure bits per byte and tokens per character first.",
                "refuted": "Another tokenizer of similar size does here: compare bits per byte before you keep the model's own.",
                "inconclusive": "Keep the model's own tokenizer, and count the tokens of your language before you plan.",
            },
            stated={"cpu": "supported", "full": "supported"},
        ),
    ),
    plots=(
        Plot(
            "tokenizer-cost",
            "The same text through its own and other tokenizers",
            "tokens per byte",
            "bits per byte",
            cost_lines,
            joined=False,
            named=True,
        ),
        Plot(
            "tokens-by-language",
            "Tokens per character, paragraph by paragraph",
            "paragraph",
            "tokens per character",
            language_lines,
        ),
    ),
)
