"""Is a smaller model a fair compromise: what quality is left for how many of the bytes?

Claim     smaller-model-trade-off (lecture 4)
Refuted   if on no step to the next smaller size, in no quality, KEEP of what the larger has learnt is kept; conditional if
          on some steps, or in some qualities, alone
Control   smaller models that keep a tenth; that keep all; that take the bytes of the largest
Run       lab run model_scale --profile cpu

Sizes of one family read the same tokens in the same order, each at the rate of pretraining that its own sweep over the
same rates finds best on stories of another split; each is then tuned in full on a task at the best of the same rates. A
quality is measured from what a guess without a model would get: text (bits per byte of new stories, from a guess by how
often a token is), facts (recall, from naming the commonest value), task (nats per answer token after tuning, from a guess
by how often a token is in answers). What fits where at real scale is in the simulated trials of `model_size`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

from pydantic import Field

from experiments.model_size import WAYS, largest_trained
from lab.claims import Claim, Control, Evidence, Experiment, Finding, MissingEvidence, over_answers
from lab.errors import LabError
from lab.params import Count, Profile, Rate, Section, parse
from lab.plots import Line, Plot
from lab.pretraining import TinyRecipe
from lab.records import Record
from lab.specs import Plan, Scaling, Sweep, TrialSpec
from lab.statistics import Answer, Interval, lies_above, mean_interval
from lab.sweeps import at_best, at_edge

NAME = "model_scale"
REAL = {"trained-full": "full fine-tuning", "trained-lora": "LoRA"}
"""The arms of `model_size` that are drawn beside the family, at real scale."""

# A compromise gives up something for more: at most half of the bytes, so that the same card has room for a batch or a
# context of the size of the model saved.
BYTES = 0.5

# Nine tenths of what was learnt. DistilBERT, which many take for a fair compromise, keeps 97 % of BERT's score for 60 % of
# its parameters (Sanh et al. 2019), after distillation; at half of the bytes or fewer, and without it, three times that loss.
KEEP = 0.9

QUALITIES: dict[str, Callable[[Record], float]] = {
    "text": lambda r: r.figure("blind_bits_per_byte") - r.figure("general_bits_per_byte"),
    "facts": lambda r: r.figure("recall") - r.figure("blind_recall"),
    "task": lambda r: r.figure("blind_loss") - r.figure("test_loss"),
}
"""What a model has learnt, by its name; 0 is what a guess without a model gets."""


class Shape(Section):
    """A member of the family."""

    hidden_size: Count
    layers: Count
    heads: Count
    key_value_heads: Count
    intermediate_size: Count


class Params(Section):
    """The sizes, what all of them read, and how they are tuned."""

    sizes: dict[str, Shape] = Field(min_length=2)
    text: dict[str, Count]
    """People, documents, steps and batches of pretraining: keys of `tiny`."""
    rates: tuple[Rate, ...]
    """Of pretraining, that each size tries."""
    seeds: Count
    sweep_seeds: Count
    task: str
    tuning_rates: tuple[Rate, ...]
    tuning_updates: Count
    micro_batch_size: Count
    questions: Count


def trials(params: Params, profile: Profile) -> Plan:
    """A sweep of the rate of pretraining for each size, and the other seeds at the best."""
    plan = []
    for size, shape in params.sizes.items():
        recipe = {**params.text, **shape.model_dump()}
        parse(TinyRecipe, recipe, f"{NAME}: {size}")  # a slip shows before anything is run
        specs = []
        for seed in range(params.seeds):
            settings = Scaling(
                recipe=recipe,
                task=params.task,
                tuning_rates=params.tuning_rates,
                tuning_updates=params.tuning_updates,
                micro_batch_size=params.micro_batch_size,
                questions=params.questions,
                seed=seed,
                device=profile.device,
            )
            specs.append(TrialSpec(experiment=NAME, name=f"{size}-seed{seed}", arm=size, settings=settings))
        plan.append(Sweep(rates=params.rates, by="loss", tried=tuple(specs[: params.sweep_seeds]), then=tuple(specs)))
    return plan


# Steps down the family --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """From a size to the next smaller one."""

    larger: str
    smaller: str
    bytes_share: float
    """Of what full fine-tuning holds whatever the batch: weights, gradients, optimizer."""
    peak_share: float
    """Of the peak with the trial's batch."""
    kept: Mapping[str, Interval]
    """The share of the larger model's quality that is left, by quality; the larger one's mean is taken as it is."""
    has: Mapping[str, bool]
    """Whether the larger model has learnt anything that could be lost."""
    at_edge: tuple[str, ...] = ()
    """The sizes whose tuning has its best rate at the edge of its grid in most seeds: their task decides nothing."""

    def answers(self) -> dict[str, Answer]:
        """Whether the step is fair, by quality."""
        if self.bytes_share > BYTES:
            return dict.fromkeys(self.kept, "no")
        undecided = {name for name in self.kept if not self.has[name] or (name == "task" and self.at_edge)}
        return {
            name: "undecided" if name in undecided else lies_above(interval, KEEP)
            for name, interval in self.kept.items()
        }

    def __str__(self) -> str:
        words = ", ".join(
            f"{name} {i.times(100):.0f} %"
            + f" (undecided: tuning of {' and '.join(self.at_edge)} is best at the edge of its grid)"
            * (name == "task" and bool(self.at_edge))
            if self.has[name]
            else f"{name} not learnt by {self.larger}"
            for name, i in self.kept.items()
        )
        return (
            f"{self.larger} to {self.smaller}: keeps {words} for {self.bytes_share:.0%} of the bytes held and "
            f"{self.peak_share:.0%} of the peak"
        )


def family(evidence: Evidence) -> dict[str, dict[int, Record]]:
    """The records of each size at its best rate, by seed; the largest size first.

    Raises:
        MissingEvidence: there is none.
    """
    arms = dict.fromkeys(r.spec.arm for r in evidence.records if r.spec.settings.kind == "scaling")
    found = {arm: _by_seed(evidence, arm) for arm in arms}
    found = {arm: records for arm, records in found.items() if records}
    if not found:
        raise MissingEvidence("no size was trained")
    return dict(sorted(found.items(), key=lambda item: -_mean(item[1], "parameters_total")))


def _by_seed(evidence: Evidence, arm: str) -> dict[int, Record]:
    best = at_best(evidence.attempts(arm), "loss")
    return {r.setting("seed"): r for r in best if r.status == "ok"}


def _mean(records: Mapping[int, Record], figure: str) -> float:
    return fmean(r.figure(figure) for r in records.values())


def step(larger: tuple[str, dict[int, Record]], smaller: tuple[str, dict[int, Record]]) -> Step:
    """What is kept, over the seeds that both have.

    Raises:
        LabError: a pair did not read the same tokens in the same order.
    """
    (upper, above), (lower, below) = larger, smaller
    seeds = sorted(above.keys() & below.keys())
    for seed in seeds:
        if above[seed].tags["data_order"] != below[seed].tags["data_order"]:
            raise LabError(f"{upper} and {lower} of seed {seed} read other tokens. Run: lab run {NAME}")
    kept, has = {}, {}
    for name, quality in QUALITIES.items():
        whole = mean_interval([quality(above[seed]) for seed in seeds])
        has[name] = whole.low > 0
        scale = whole.estimate if whole.estimate > 0 else 1.0
        lost = mean_interval([(quality(below[seed]) - quality(above[seed])) / scale for seed in seeds])
        kept[name] = Interval(1 + lost.estimate, 1 + lost.low, 1 + lost.high, lost.n)
    shares = [_mean(below, figure) / _mean(above, figure) for figure in ("held_bytes", "peak_bytes")]
    edges = tuple(size for size, records in (larger, smaller) if _tuned_at_edge(records.values()))
    return Step(upper, lower, shares[0], shares[1], kept, has, edges)


def _tuned_at_edge(records: Collection[Record]) -> bool:
    """Whether in most seeds the best rate of tuning is the first or last of more than one."""
    edges = [
        len(r.setting("tuning_rates")) > 1
        and r.figure("tuning_rate") in (min(r.setting("tuning_rates")), max(r.setting("tuning_rates")))
        for r in records
    ]
    return 2 * sum(edges) > len(edges)


def judge(evidence: Evidence) -> Finding:
    """Each step down the family, in each quality."""
    members = list(family(evidence).items())
    if len(members) < 2:
        raise MissingEvidence("fewer than two sizes were measured")
    steps = [step(larger, smaller) for larger, smaller in pairwise(members)]
    answers = [(s, name, answer) for s in steps for name, answer in s.answers().items()]
    notes = [str(s) for s in steps]
    for size, records in members:
        rate = next(iter(records.values())).setting("learning_rate")
        edge = " (at the edge of its grid)" * at_edge(evidence.attempts(size), "loss")
        notes.append(
            f"{size}: {_mean(records, 'parameters_total'):,.0f} parameters, {_mean(records, 'general_bits_per_byte'):.2f} "
            f"bits per byte, recall {_mean(records, 'recall'):.0%}, test loss {_mean(records, 'test_loss'):.2f}, rate "
            f"{rate:g}{edge}"
        )
    if not any(_mean(records, "test_accuracy") for _, records in members):
        notes.append("no size answers a question of the task right")
    if all(evidence.has(f"trained-{way}") for way in WAYS["trained"]):
        notes.append(f"at real scale the {largest_trained(evidence)}")
    verdict = over_answers(answer for _, _, answer in answers)
    fair = [f"{s.larger} to {s.smaller} in {name}" for s, name, answer in answers if answer == "yes"]
    opening = [f"fair are {', '.join(fair)}"] if verdict == "conditional" else []
    kept = [s.kept[name] for s, name, _ in answers if s.has[name]]
    if not kept:
        raise MissingEvidence("the larger models have learnt nothing that could be kept")
    least = min(kept, key=lambda interval: interval.estimate)
    flips = _flips(members, answers)
    return Finding.of(
        verdict, least.times(100), "% of a quality kept, where least", "; ".join([*opening, *notes]), flips
    )


def _flips(members: Sequence[tuple[str, Mapping[int, Record]]], answers: Sequence[tuple[Step, str, Answer]]) -> str:
    """Which step down is fair in which quality; nothing where all are alike."""
    if len({answer for _, _, answer in answers}) < 2:
        return ""
    sizes = {size: f"{_mean(records, 'parameters_total'):,.0f}" for size, records in members}
    parts = []
    for wanted, words in (("yes", "fair"), ("no", "not fair"), ("undecided", "undecided")):
        by_step: dict[str, list[str]] = {}
        for s, name, answer in answers:
            if answer == wanted:
                step_down = f"from {sizes[s.larger]} to {sizes[s.smaller]} parameters"
                by_step.setdefault(step_down, []).append(name)
        told = [f"{step_down} in {' and '.join(names)}" for step_down, names in by_step.items()]
        parts += [f"{words} {', '.join(told)}"] if told else []
    return "; ".join(parts)


# Controls -------------------------------------------------------------------------------------------------------

KNOWN = {"text": ("blind_bits_per_byte", "general_bits_per_byte"), "task": ("blind_loss", "test_loss")}


def keeping(share: float) -> Callable[[Evidence], Evidence]:
    """Every smaller model has this share of what the next larger one has learnt, seed by seed, for half of the bytes allowed."""

    def control(evidence: Evidence) -> Evidence:
        members = list(family(evidence).values())
        given = {r.spec.name: _inside(r) for records in members for r in records.values()}
        for place, records in enumerate(members[1:], start=1):
            for seed, record in records.items():
                if seed not in members[0]:
                    continue
                best, left = members[0][seed], share**place
                figures = given[record.spec.name]
                for blind, own in KNOWN.values():
                    figures[blind] = best.figure(blind)
                    figures[own] = best.figure(blind) - left * (best.figure(blind) - best.figure(own))
                figures["held_bytes"] = best.figure("held_bytes") * (BYTES / 2) ** place
                figures["blind_recall"] = best.figure("blind_recall")
                figures["recall"] = best.figure("blind_recall") + left * QUALITIES["facts"](best)
        return evidence.with_figures(lambda r: given.get(r.spec.name, {}))

    control.__doc__ = f"Every smaller model has {share:.0%} of what the next larger one has learnt."
    return control


def _inside(record: Record) -> dict[str, float]:
    """A best rate of tuning that is not at an edge, where the grid has one."""
    rates = sorted(record.setting("tuning_rates"))
    return {"tuning_rate": rates[len(rates) // 2]}


def as_large(evidence: Evidence) -> Evidence:
    """Every model takes the bytes of the largest."""
    largest = next(iter(family(evidence).values()))
    held = _mean(largest, "held_bytes")
    return evidence.with_figures(lambda r: {"held_bytes": held})


# Plots ----------------------------------------------------------------------------------------------------------


def quality_lines(evidence: Evidence) -> dict[str, Line]:
    """Each quality over the bytes that full fine-tuning holds, as a share of the largest model's."""
    members = family(evidence)
    largest = next(iter(members.values()))
    lines = {}
    for name, quality in QUALITIES.items():
        whole = fmean(quality(r) for r in largest.values())
        shares = [mean_interval([100 * quality(r) / whole for r in records.values()]) for records in members.values()]
        lines[name] = Line(
            [_mean(records, "held_bytes") / 2**20 for records in members.values()],
            [share.estimate for share in shares],
            [share.low for share in shares],
            [share.high for share in shares],
        )
    return lines


def byte_lines(evidence: Evidence) -> dict[str, Line]:
    """Bytes over parameters: of the family, held and at the peak; at real scale, the peaks by way of training."""
    if any(evidence.has(arm) for arm in REAL):
        lines = {}
        for arm, words in REAL.items():
            points = sorted((r.figure("parameters_base"), r.figure("peak_bytes")) for r in evidence.select(arm))
            lines[words] = Line([size for size, _ in points], [peak / 2**20 for _, peak in points])
        return lines
    members = family(evidence)
    sizes = [_mean(records, "parameters_total") for records in members.values()]
    return {
        words: Line(sizes, [_mean(records, figure) / 2**20 for records in members.values()])
        for words, figure in (("held", "held_bytes"), ("peak", "peak_bytes"))
    }


EXPERIMENT = Experiment(
    name=NAME,
    title="A smaller model",
    params=Params,
    trials=trials,
    reads=("model_size",),
    claims=(
        Claim(
            id="smaller-model-trade-off",
            statement="a smaller model is a fair compromise",
            lecture="4",
            tiers=("cpu", "gpu"),
            threshold=(
                f"on each step to the next smaller size, for at most {BYTES:.0%} of the bytes held: the 95 % interval of the "
                f"quality kept lies above {KEEP:.0%}, in text, facts and task"
            ),
            scope=(
                "a family of decoders of 0.1M to 1M parameters, pretrained in one go on the same tokens of invented text, "
                "fewer than `tiny` has read; more tokens, which a smaller model could have had for the same time, are not "
                "tried; a task whose tuning is best at the edge of its rates decides nothing; held: weights, gradients and "
                "AdamW, fp32; logits, which do not shrink with the width, count in the peak; what fits where at real scale: "
                "`lab fit` and model-size-limit"
            ),
            judge=judge,
            controls={
                "smaller models that keep a tenth": Control(keeping(0.1), "refuted"),
                "smaller models that keep all": Control(keeping(1.0), "supported"),
                "smaller models with the bytes of the largest": Control(as_large, "refuted"),
            },
            advice={
                "supported": "Take the smaller model when memory is short: a third of the bytes keeps nine tenths of the quality.",
                "conditional": "Try one size down before you buy memory, and measure what you need: not every quality is kept.",
                "refuted": "Keep the size and save memory elsewhere (LoRA, 8-bit states, checkpointing); smaller knows less.",
                "inconclusive": "Try one size down on your own task, and take it if you cannot tell its answers from the larger "
                "one's.",
            },
            stated={"cpu": "inconclusive", "full": "inconclusive"},
        ),
    ),
    plots=(
        Plot(
            "quality-by-bytes",
            "What is left of the largest model's quality",
            "MiB held in full fine-tuning",
            "% of the largest model's",
            quality_lines,
            log_x=True,
        ),
        Plot("bytes-by-parameters", "Bytes by model size", "parameters", "MiB", byte_lines, log_x=True, log_y=True),
    ),
)
