"""Does inference need resources too: memory beside the weights, and time for every token?

Claim     inference-needs-resources (lecture 4)
Refuted   if the cache is not what the formula says, to the byte; or if it nowhere holds SHARE of the weights, decoding
          nowhere costs SLOWER times as much for a token as reading, and no adapter beside the base costs MARGIN more time;
          conditional if some of it is so in one regime and not in another
Control   a formula that forgets grouped queries, and one in fp32; tokens read together presented as decoded one by
          one, beside no cache and the base in its adapter's place
Run       lab run inference --profile cpu

Bytes are counted, not drawn: their intervals are spans over models, precisions and points. What is compared in time runs
in turn in one process; the intervals over the repeats hold together within a sense (Bonferroni). Adapters and 4 bits are
timed at batch 1, where a person waits for an answer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import product
from typing import Any

from pydantic import Field

from lab.cards import GIB
from lab.claims import Cell, Claim, Control, Evidence, Experiment, Finding, MissingEvidence, in_words, over_answers
from lab.errors import LabError
from lab.memory.workload import BYTES
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Inference, Precision, SimulatedInference, TrialSpec
from lab.statistics import Interval, bonferroni, lies_above, mean_interval, span

NAME = "inference"
PLAIN, QUANTISED, MEMORY = "plain", "quantised", "memory"
NF4 = "nf4"

# Of the weights' bytes: under a tenth, a plan that forgets the cache is off by no more than what fragmentation of a card
# takes (peft_cost says the same of savings).
SHARE = 0.1

# Time of a token decoded over that of a token read. Under twice, one price for a token tells a wait or a bill within a
# factor of two whatever the mix of the two, which is as well as the number of tokens to come is known.
SLOWER = 2.0

# Of time, as in training_cost: less than one hour in twenty changes no plan.
MARGIN = 0.05

# Outputs that are the same but for rounding, of the largest logit, in fp32: some 300 roundings in a row through 30 layers,
# 300 x 2^-24 = 2e-5, and a factor of 5. A forgotten token or an adapter left out gives more than 1e-3 (tests plant both).
SAME = 1e-4


class Held(Section):
    """Where bytes are counted: at each (batch, prompt tokens) of `points`; in 4 bits too where `four_bit`."""

    precision: Precision
    points: tuple[tuple[Count, Count], ...]
    four_bit: bool = False


class Timed(Section):
    """What is timed: the base at each of `batches`, 4 bits against 16, and adapters of `methods`, by `seeds` trials each."""

    precision: Precision = "fp32"
    methods: tuple[str, ...] = ("lora", "adapter")
    four_bit: bool = True
    batches: tuple[Count, ...] = (1,)
    seeds: Count
    rounds: Count
    length: Count
    tokens: Count


class Params(Section):
    """By model. What is of real scale is simulated in bf16, and in 4 bits."""

    held: dict[str, Held]
    timed: dict[str, Timed]
    real_scale: dict[str, tuple[tuple[Count, Count], ...]] = Field(default_factory=dict)


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """The bytes at each point, and the times of each model. What is timed takes all threads."""
    specs = []

    def add(arm: str, name: str, settings: Any, **more: Any) -> None:
        specs.append(TrialSpec(experiment=NAME, name=name, arm=arm, settings=settings, **more))

    for model, held in params.held.items():
        for batch, length in held.points:
            quantisation = NF4 if held.four_bit else None
            setup = {"model": model, "batch": batch, "length": length, "precision": held.precision}
            settings = Inference(**setup, tokens=2, quantisation=quantisation, device=profile.device)
            add(MEMORY, f"{MEMORY}-{model}-{batch}x{length}", settings)
    for model, timed in params.timed.items():
        setups: list[tuple[str, dict[str, Any]]] = [(PLAIN, {"batch": batch}) for batch in timed.batches]
        setups += [(method, {"method": method}) for method in timed.methods]
        setups += [(QUANTISED, {"quantisation": NF4, "precision": "bf16"})] * timed.four_bit
        for (arm, changes), seed in product(setups, range(timed.seeds)):
            common = {name: getattr(timed, name) for name in ("precision", "rounds", "length", "tokens")}
            settings = Inference.model_validate(
                {"model": model, **common, **changes, "seed": seed, "device": profile.device}
            )
            add(arm, f"{arm}-{model}-b{settings.batch}-seed{seed}", settings, threads=profile.threads)
    for model, points in params.real_scale.items():
        for batch, length in points:
            setup = {"model": model, "batch": batch, "length": length, "precision": "bf16"}
            simulated = SimulatedInference(**setup, quantisation=NF4, device="cuda")
            add(MEMORY, f"sim-{MEMORY}-{model}-{batch}x{length}", simulated, tier="sim")
    return specs


# Cells ----------------------------------------------------------------------------------------------------------


def _ways(record: Record) -> list[str]:
    """The ways to hold the model that a trial compared."""
    return [
        name.removesuffix("_cache_bytes")
        for name in record.figures
        if name.endswith("_cache_bytes")
        if "prefill" not in name
    ]


def _held_as(record: Record, way: str) -> str:
    return NF4 if way == QUANTISED else str(record.setting("precision"))


def _share(record: Record, way: str) -> float:
    return record.figure(f"{way}_cache_bytes") / record.figure(f"{way}_weights_bytes")


def _held(evidence: Evidence) -> list[tuple[Record, str]]:
    """Each record of bytes with each of its ways, by model and tokens.

    Raises:
        MissingEvidence: all are of one point, which tells no regime from another.
    """
    records = sorted(evidence.select(MEMORY), key=lambda r: (r.setting("model"), _tokens(r)))
    if len({_tokens(r) for r in records}) < 2:
        raise MissingEvidence("bytes at one point only; two tell few tokens from many")
    return [(r, way) for r in records for way in _ways(r)]


def _tokens(record: Record) -> int:
    """Tokens in the cache, of all sequences."""
    return int(record.setting("batch") * (record.setting("length") + record.setting("tokens")))


def _cache_cells(evidence: Evidence) -> list[Cell]:
    cells = []
    for record, way in _held(evidence):
        share = _share(record, way)
        point = f"{record.setting('model')} {_held_as(record, way)} {record.setting('batch')} x {record.setting('length'):,}"
        cells.append(Cell(point, Interval(share, share, share, 1), "yes" if share >= SHARE else "no"))
    return cells


def _timed_cells(evidence: Evidence, figure: str, bound: float, wanted: Sequence[tuple[str, str]]) -> list[Cell]:
    """A ratio over the repeats, for each model and batch, of each (arm, way) that was timed."""
    groups: dict[str, list[float]] = {}
    for arm, way in wanted:
        for record in evidence.select(arm) if evidence.has(arm) else []:
            what = _held_as(record, way) if arm in (PLAIN, QUANTISED) else arm if way == "unmerged" else f"{arm} {way}"
            name = f"{record.setting('model')} {what} batch {record.setting('batch')}"
            groups.setdefault(name, []).append(record.figure(f"{way}_{figure}"))
    confidence = bonferroni(max(1, len(groups)))
    intervals = {name: mean_interval(values, confidence) for name, values in groups.items()}
    return [Cell(name, interval, lies_above(interval, bound)) for name, interval in intervals.items()]


def _methods(evidence: Evidence) -> list[str]:
    """The arms in which an adapter is timed."""
    return list(dict.fromkeys(r.spec.arm for r in evidence.records if r.setting("method") not in (None, "full")))


def _decode_cells(evidence: Evidence) -> list[Cell]:
    wanted = [(PLAIN, "base"), (QUANTISED, "base"), (QUANTISED, QUANTISED)]
    return _timed_cells(evidence, "decode_over_prefill", SLOWER, wanted)


def _adapter_cells(evidence: Evidence) -> list[Cell]:
    return _timed_cells(evidence, "over_base", 1 + MARGIN, [(arm, "unmerged") for arm in _methods(evidence)])


# Judge ----------------------------------------------------------------------------------------------------------


def judge(evidence: Evidence) -> Finding:
    """Whether every cache is as the formula says; then whether each sense is a need, in each regime."""
    every = evidence.select()
    _check_outputs(every)
    senses = {f"cache at least {SHARE:g} of the weights": _cache_cells(evidence)}
    if any(r.spec.tier != "sim" for r in every):
        senses[f"a token decoded at least {SLOWER:g} times one read"] = _decode_cells(evidence)
        senses[f"an adapter beside the base at least {1 + MARGIN:g} times its time"] = _adapter_cells(evidence)
        silent = [sense for sense, cells in senses.items() if not cells]
        if silent:
            raise MissingEvidence(f"nothing was timed: {'; '.join(silent)}")
    shares = span([_share(r, way) for r, way in _held(evidence)])
    unit = "cache bytes for a byte of weights"
    if wrong := [f"{r.spec.name} ({way})" for r in every for way in _ways(r) if not _as_the_formula_says(r, way)]:
        because = f"the cache is not as large as the formula says: {', '.join(wrong)}"
        return Finding.of("refuted", shares, unit, because)
    verdict = over_answers(cell.answer for cells in senses.values() for cell in cells)
    words = [in_words(sense, cells, _short) for sense, cells in senses.items()]
    return Finding.of(verdict, shares, unit, "; ".join([*words, *_further(evidence)]), _flips(evidence, senses))


def _as_the_formula_says(record: Record, way: str) -> bool:
    return record.figure(f"{way}_cache_bytes") == record.figure("formula_bytes")


def _check_outputs(records: Iterable[Record]) -> None:
    """What is timed says what it should: with the cache as without, merged as unmerged.

    Raises:
        LabError: it does not, beyond rounding in fp32; then its time is that of something else.
    """
    for record in records:
        for figure in ("cached_distance", "merged_distance"):
            found = record.figures.get(figure)
            if found is not None and found > SAME and record.setting("precision") == "fp32":
                raise LabError(
                    f"{record.spec.name}: {figure} is {found:.2g}; the same outputs differ by {SAME:g} at most."
                )


def _flips(evidence: Evidence, senses: Mapping[str, Sequence[Cell]]) -> str:
    """From how many tokens on the cache counts, and where what is timed does; nothing where all is so, or nothing."""
    answers = {sense: {c.answer for c in cells if c.answer != "undecided"} for sense, cells in senses.items()}
    if len(set().union(*answers.values())) < 2:
        return ""
    cache, *timed = senses
    words = []
    if len(answers[cache]) > 1:
        words.append(
            f"the cache holds {SHARE:g} of the weights' bytes (as many as they) from so many tokens on, batch x length: "
            f"{', '.join(_from_tokens(evidence))}"
        )
    else:
        words.append(f"{cache}: {'wherever' if 'yes' in answers[cache] else 'nowhere'} it was counted")
    for sense in timed:
        if len(answers[sense]) > 1:
            words.append(in_words(sense, senses[sense], _short))
        elif answers[sense]:
            words.append(f"{sense}: {'wherever' if 'yes' in answers[sense] else 'nowhere'} the repeats decide")
    return "; ".join(words)


def _from_tokens(evidence: Evidence) -> list[str]:
    """By model and way, how many tokens hold SHARE of the weights' bytes, and as many.

    Where layers have a window a token of a longer prompt adds less: there it is how many sequences of the length of most.
    """
    points: dict[tuple[str, str], list[Record]] = {}
    for record, way in _held(evidence):
        points.setdefault((record.setting("model"), way), []).append(record)
    words = []
    for (model, way), records in points.items():
        last = max(records, key=_tokens)
        each = [_share(r, way) / _tokens(r) for r in records]
        if not min(each):
            continue
        name = f"{model} {_held_as(last, way)}"
        if max(each) > 1.01 * min(each):
            sequence = _share(last, way) / last.setting("batch")
            words.append(
                f"{name} {SHARE / sequence:.2g} ({1 / sequence:.3g}) sequences of {last.setting('length'):,} tokens"
            )
        else:
            share = _share(last, way) / _tokens(last)
            words.append(f"{name} {SHARE / share:,.0f} ({1 / share:,.0f})")
    return words


def _short(interval: Interval) -> str:
    return f"{interval.estimate:.2g}" + (f" [{interval.low:.2f}, {interval.high:.2f}]" if interval.n > 1 else "")


def _further(evidence: Evidence) -> list[str]:
    """What is told and not judged: where the cache outweighs the weights, what explains the peaks, times, merging, 4 bits."""
    held = _held(evidence)
    longest = {
        (r.setting("model"), way): (r, way) for r, way in sorted(held, key=lambda pair: pair[0].setting("length"))
    }
    even = [
        f"{r.setting('model')} {_held_as(r, way)} of {r.figure(f'{way}_weights_bytes') / GIB:.2g} GiB from batch "
        f"{r.setting('batch') / _share(r, way):.3g} at {r.setting('length'):,} tokens"
        for r, way in longest.values()
        if _share(r, way) > 0
    ]
    fewest: dict[tuple[str, str], float] = {}
    for r, way in held:  # by tokens
        fewest.setdefault((r.setting("model"), way), _share(r, way))
    words = [
        f"at its fewest tokens the cache is {min(fewest.values()):.1%} to {max(fewest.values()):.1%} of the weights",
        f"as many bytes as weights: {', '.join(even)}",
        f"weights and formula explain {_explained(held, 'decode')} of the peak while decoding",
        f"{_explained(held, 'prefill')} of that while the prompt is read, which is up to {_prompt_over_decode(held)}",
        *_milliseconds(evidence),
    ]
    whole = {
        f"{r.figure('base_prefill_cache_bytes') / r.figure('base_cache_bytes'):.2g} times its cache on {r.setting('model')} "
        f"at {r.setting('length'):,} tokens"
        for r, _ in held
        if r.figure("base_prefill_cache_bytes") > r.figure("base_cache_bytes") > 0
    }
    if whole:
        words.append(f"a prompt beyond the window is held whole until the next token: {', '.join(sorted(whole))}")
    merged = [(r.spec.arm, "merged") for r in evidence.records if "merged_over_base" in r.figures]
    for title, wanted in (
        ("merged", list(dict.fromkeys(merged))),
        ("4 bits over 16", [(QUANTISED, QUANTISED)]),
    ):
        cells = _timed_cells(evidence, "over_base", 1 + MARGIN, wanted)
        if cells:
            words.append(f"time, {title}: {', '.join(f'{c.name} {_short(c.interval)}' for c in cells)}")
    fewer = [
        r.figure(f"{QUANTISED}_weights_bytes") / r.figure("base_weights_bytes") for r, way in held if way == QUANTISED
    ]
    return [*words, f"4 bits hold {min(fewer):.0%} to {max(fewer):.0%} of the weights' bytes"] if fewer else words


def _explained(held: Sequence[tuple[Record, str]], phase: str) -> str:
    """The share of a phase's peak that weights and formula explain, and where it is least."""
    shares = {
        f"{r.setting('model')} {_held_as(r, way)} {r.setting('batch')} x {r.setting('length'):,}": (
            (r.figure(f"{way}_weights_bytes") + r.figure("formula_bytes")) / r.figure(f"{way}_{phase}_peak_bytes")
        )
        for r, way in held
    }
    least = min(shares, key=lambda point: shares[point])
    return f"{shares[least]:.1%} ({least}) to {max(shares.values()):.1%}"


def _prompt_over_decode(held: Sequence[tuple[Record, str]]) -> str:
    """The peak while the prompt is read over that while decoding, where it is most."""

    def peaks(pair: tuple[Record, str]) -> tuple[float, float]:
        record, way = pair
        return record.figure(f"{way}_prefill_peak_bytes"), record.figure(f"{way}_decode_peak_bytes")

    record, way = most = max(held, key=lambda pair: peaks(pair)[0] / peaks(pair)[1])
    prefill, decode = peaks(most)
    return (
        f"{prefill / decode:.2g} times as much ({record.setting('model')} {_held_as(record, way)} {record.setting('batch')} x "
        f"{record.setting('length'):,}: {prefill / GIB:.2g} GiB)"
    )


def _milliseconds(evidence: Evidence) -> list[str]:
    """What a token of one sequence takes, read and written, of the bases that were timed."""
    wanted = [(PLAIN, "base"), (QUANTISED, "base"), (QUANTISED, QUANTISED)]
    read, written = (_timed_cells(evidence, f"{phase}_seconds", 0.0, wanted) for phase in ("prefill", "decode"))
    if not read:
        return []

    def form(interval: Interval) -> str:
        ends = (1000 * seconds for seconds in (interval.estimate, interval.low, interval.high))
        estimate, low, high = (f"{ms:.2g}" if ms < 99.5 else f"{ms:,.0f}" for ms in ends)
        return f"{estimate} [{low}, {high}]"

    told = [f"{a.name} {form(a.interval)} and {form(b.interval)}" for a, b in zip(read, written, strict=True)]
    return [f"ms for a token read and for one written: {', '.join(told)}"]


# Controls -------------------------------------------------------------------------------------------------------


def _changed(change: Callable[[Record], dict[str, float]]) -> Callable[[Evidence], Evidence]:
    """A control: these figures in the place of a successful record's own."""
    return lambda evidence: Evidence(evidence.select()).with_figures(change)


def _needing(cache: float, ratio: float) -> Callable[[Record], dict[str, float]]:
    """Every cache holds `cache` times the weights, as the formula says, and whatever is timed takes `ratio` times as long."""

    def change(record: Record) -> dict[str, float]:
        size = cache * record.figure("base_weights_bytes")
        ratios = [name for name in record.figures if name.endswith(("_decode_over_prefill", "unmerged_over_base"))]
        caches = {f"{way}_cache_bytes": size for way in _ways(record)}
        return {"formula_bytes": size, **caches, **dict.fromkeys(ratios, ratio)}

    return change


def _fp32_formula(record: Record) -> dict[str, float]:
    return {"formula_bytes": record.figure("formula_bytes") * 4 / BYTES.get(record.setting("precision"), 4)}


def _without_need(record: Record) -> dict[str, float]:
    """Nothing is a need, in each sense: no cache; what the same model took for tokens read together, behind as long a context,
    and without its adapter.
    """
    caches = {f"{way}_cache_bytes": 0.0 for way in _ways(record)}
    together = [name for name in record.figures if name.endswith("_together_over_prefill")]
    times = {name.replace("together", "decode"): record.figure(name) for name in together}
    if "unmerged_over_base" in record.figures:
        times["unmerged_over_base"] = record.figure("base_over_base")
    return {"formula_bytes": 0.0, **caches, **times}


# Plot -----------------------------------------------------------------------------------------------------------


def cache_lines(evidence: Evidence) -> dict[str, Line]:
    """The cache over the weights, by tokens in it, for each model and precision of more than one point."""
    points: dict[str, list[tuple[int, float]]] = {}
    for record, way in _held(evidence):
        label = f"{record.setting('model')} {_held_as(record, way)}"
        points.setdefault(label, []).append((_tokens(record), _share(record, way)))
    return {
        label: Line(*map(list, zip(*sorted(found), strict=True))) for label, found in points.items() if len(found) > 1
    }


EXPERIMENT = Experiment(
    name=NAME,
    title="What inference needs",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="inference-needs-resources",
            statement="inference needs resources too: a cache beside the weights, and time for every token",
            lecture="4",
            tiers=("sim", "cpu", "gpu"),
            threshold=f"the cache is what the formula says, to the byte; it holds at least {SHARE:g} of the weights' bytes; "
            f"a token decoded takes at least {SLOWER:g} times one that is read, and at least {1 + MARGIN:g} times with an "
            "adapter beside the base: 95 % intervals, at every model, batch and length",
            scope="random prompts without padding, greedy decoding, transformers' dynamic cache in the precision of the "
            "activations, weights on one device; span of cache over weights; the sim tier has bytes alone",
            judge=judge,
            controls={
                "a formula that forgets grouped queries": Control(
                    _changed(lambda r: {"formula_bytes": r.figure("multi_head_bytes")}), "refuted"
                ),
                "a formula in fp32": Control(_changed(_fp32_formula), "refuted"),
                "no cache, tokens together as one by one, the base as its adapter": Control(
                    _changed(_without_need), "refuted", (PLAIN,)
                ),
                "a cache of nothing, decoding at the price of reading": Control(
                    _changed(_needing(0.0, 1.0)), "refuted"
                ),
                "a cache as large as the weights, decoding ten times as dear": Control(
                    _changed(_needing(1.0, 10.0)), "supported"
                ),
            },
            advice={
                "supported": "Plan memory for weights, cache and what reading the prompt takes, and time by the tokens to be "
                "written; merge adapters first.",
                "conditional": "For one short chat count the weights; for long or many ones add the cache by its formula, and room "
                "to read the prompt. Merge adapters you keep.",
                "refuted": "Plan inference by its weights, and by the number of tokens whichever way they go.",
                "inconclusive": "Add the cache to the weights by its formula, and time some answers of your length before you "
                "choose a card.",
            },
            stated={"cpu": "conditional", "full": "conditional", "sim": "conditional"},
        ),
    ),
    plots=(
        Plot(
            "cache-over-weights",
            "The key-value cache beside the weights",
            "tokens in the cache (batch x length)",
            "cache bytes / weights bytes",
            cache_lines,
            log_x=True,
            log_y=True,
        ),
    ),
)
