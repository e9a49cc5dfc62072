"""Worked examples in the prompt, or a tuned model: which answers better, and which is cheaper?

Claim     peft-beats-icl (lecture 3)
Refuted   if on no model, with or without reuse of the examples' cache, the tuned one is both better by QUALITY_MARGIN
          and quicker by COST_MARGIN
Control   in-context answers presented as the tuned model's; a tuned model no better than the base; one that is perfect
Run       lab run in_context --profile cpu

The number of examples is chosen on the validation split; the order is not: accuracies are means over random draws. Where
no number of examples helps, there is no in-context learning whose cost could be compared: its cells are undecided.
The form of the prompt (a blank line between examples, no end token asked for) is what served in-context learning best in
first tries, on the test split too: if that is unfair, it is to the tuned model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product

from lab.claims import Claim, Control, Evidence, Experiment, Finding, over_answers
from lab.params import Count, Profile, Rate, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import InContext, TrialSpec
from lab.statistics import Answer, Interval, bonferroni, lies_above, mean_interval

NAME = "in_context"

# Half of what the paper behind the claim reports: 72.4 % for T-Few against 66.6 % for in-context learning with GPT-3
# (Liu et al. 2022). A smaller gain is not the one that it speaks of.
QUALITY_MARGIN = 0.03

# Quicker means by a tenth: the base and the merged model do the same arithmetic, and one trial by hand on `tiny` timed
# them 8 % apart. On a busy machine they come out further apart; the interval over seeds has to show that.
COST_MARGIN = 1.1

# How an answer to a question behind k examples is timed: all read anew, or the examples' keys and values kept.
WAYS = {"examples read anew": "seconds", "examples' cache kept": "cached_seconds"}


class ModelParams(Section):
    """What is asked, how many examples stand in front, and how each method tunes."""

    task: str
    seeds: Count
    shots: tuple[Count, ...]
    orders: Count
    questions: Count
    updates: Count
    micro_batch_size: Count
    learning_rates: dict[str, Rate]


class Params(Section):
    """`tiny` and, where the time allows, `smol`."""

    tiny: ModelParams
    smol: ModelParams | None = None


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """For each model, method and seed one trial, which does both. All processor threads: answers are timed."""
    specs = []
    for model, chosen in (("tiny", params.tiny), ("smol", params.smol)):
        if chosen is None:
            continue
        for (method, rate), seed in product(chosen.learning_rates.items(), range(chosen.seeds)):
            settings = InContext(
                model=model,
                task=chosen.task,
                method=method,
                learning_rate=rate,
                updates=chosen.updates,
                micro_batch_size=chosen.micro_batch_size,
                questions=chosen.questions,
                shots=chosen.shots,
                orders=chosen.orders,
                evaluations=0,
                seed=seed,
                device=profile.device,
            )
            arm = f"{model}-{method}"
            specs.append(
                TrialSpec(
                    experiment=NAME, name=f"{arm}-seed{seed}", arm=arm, threads=profile.threads, settings=settings
                )
            )
    return specs


# peft-beats-icl -------------------------------------------------------------------------------------------------


def _arms(evidence: Evidence) -> list[str]:
    """Model and method, `tiny` first."""
    return sorted({record.spec.arm for record in evidence.records}, reverse=True)


def _best(record: Record, name: str) -> float:
    """A figure of in-context learning with the chosen number of examples."""
    return record.figure(f"icl{record.figure('icl_best_shots'):.0f}_{name}")


def _gain(record: Record) -> float:
    return record.figure("tuned_accuracy") - record.figure("icl_best_accuracy")


def break_even(found: Sequence[Record], cost: str) -> Interval:
    """After how many answers training is made up for, in `seconds`, `cached_seconds` or `flops`; infinite: never.

    The interval is that of the share of the training's cost which one answer saves, turned over: so trials that save
    nothing can be averaged with those that do.
    """
    unit = cost.removeprefix("cached_")
    saved = mean_interval([(_best(r, cost) - r.figure(f"tuned_{unit}")) / r.figure(f"training_{unit}") for r in found])
    estimate, low, high = (1 / share if share > 0 else math.inf for share in (saved.estimate, saved.high, saved.low))
    return Interval(estimate, low, high, saved.n)


def _both(quality: Answer, cost: Answer) -> Answer:
    """Whether a tuned model beats in-context learning in both."""
    if "no" in (quality, cost):
        return "no"
    return "yes" if quality == cost == "yes" else "undecided"


def judge(evidence: Evidence) -> Finding:
    """On each model, with and without reuse: better by the margin and quicker by the margin, paired by seed."""
    answers: list[Answer] = []
    gains: list[Interval] = []
    notes = []
    arms = _arms(evidence)
    together = bonferroni((1 + len(WAYS)) * max(1, len(arms)))  # a gain and the costs for each
    for arm in arms:
        found = evidence.select(arm)
        gain = mean_interval([_gain(r) for r in found], together)
        gains.append(gain)
        quality = lies_above(gain, QUALITY_MARGIN)
        helped = mean_interval([r.figure("icl_best_accuracy") - r.figure("icl0_accuracy") for r in found], together)
        helps = lies_above(helped, QUALITY_MARGIN) == "yes"
        costs = []
        for way, seconds in WAYS.items():
            ratio = mean_interval([_best(r, seconds) / r.figure("tuned_seconds") for r in found], together)
            cost = lies_above(ratio, COST_MARGIN) if helps else "undecided"
            answers.append(_both(quality, cost))
            costs.append(
                f"{way}: {ratio:.2f} x the tuned model's time per answer, quicker {cost}, "
                f"training made up for after {_answers(break_even(found, seconds))}"
            )
        shots = "/".join(f"{k:.0f}" for k in sorted({r.figure("icl_best_shots") for r in found}))
        notes.append(
            f"{arm}: better {quality}, tuned {_mean(found, 'tuned_accuracy'):.2f}, "
            f"{shots} examples {_mean(found, 'icl_best_accuracy'):.2f}{_left_out(found)} "
            f"(none {_mean(found, 'icl0_accuracy'):.2f} at {_without(found):.2f} x the tuned model's time, the commonest answer "
            f"{_mean(found, 'majority_accuracy'):.2f}){'' if helps else _nothing(helped)}; prompts of "
            f"{_mean(found, 'tuned_prompt_tokens'):.0f} and {math.fsum(_best(r, 'prompt_tokens') for r in found) / len(found):.0f} "
            f"tokens; {'; '.join(costs)}; "
            f"by FLOPs after {_answers(break_even(found, 'flops'))}"
        )
    worst = min(gains, key=lambda gain: gain.low)
    return Finding.of(
        over_answers(answers), worst.times(100), "points of accuracy, tuned minus in-context", ". ".join(notes)
    )


def _without(found: Sequence[Record]) -> float:
    """The time of an answer without examples over that of the tuned model."""
    return math.fsum(r.figure("icl0_seconds") / r.figure("tuned_seconds") for r in found) / len(found)


def _nothing(helped: Interval) -> str:
    return f"; nothing to compare: no number of examples helps (the best by {helped.times(100):.1f} points over none)"


def _left_out(found: Sequence[Record]) -> str:
    """The numbers of examples that the context does not hold."""
    left = sorted({r.tags["left_out"] for r in found if "left_out" in r.tags})
    return f" ({' or '.join(left)} do not fit)" if left else ""


def _mean(found: Sequence[Record], name: str) -> float:
    return math.fsum(r.figure(name) for r in found) / len(found)


def _answers(count: Interval) -> str:
    return f"{count:,.0f} answers".replace("inf", "never")


def _with_tuned(change: Callable[[Record], dict[str, float]]) -> Callable[[Evidence], Evidence]:
    """A control: other figures of the tuned model, made from each record's own."""

    return lambda evidence: evidence.with_figures(change)


as_tuned = _with_tuned(
    lambda r: {"tuned_accuracy": r.figure("icl_best_accuracy"), "tuned_seconds": _best(r, "seconds")}
)
as_base = _with_tuned(lambda r: {"tuned_accuracy": r.figure("icl0_accuracy")})
perfect = _with_tuned(
    lambda r: {
        "tuned_accuracy": 1.0,
        "icl_best_accuracy": 0.5,
        "icl0_accuracy": 0.5 - 2 * QUALITY_MARGIN,  # beside examples that help
        **{f"icl{r.figure('icl_best_shots'):.0f}_{cost}": 2 * r.figure("tuned_seconds") for cost in WAYS.values()},
    }
)


# By number of examples ------------------------------------------------------------------------------------------


def _shots(found: Sequence[Record]) -> list[int]:
    """The numbers of examples, none too, that every record was asked with."""
    return [
        k for k in (0, *found[0].setting("shots")) if all(r.figures.get(f"icl{k}_accuracy") is not None for r in found)
    ]


def table(evidence: Evidence) -> list[str]:
    """A row of Markdown for every model and number of examples, and for the tuned model, which is given none.

    Accuracy, tokens of a prompt, milliseconds of an answer with all read anew and with the examples' cache kept.
    """
    lines = []
    for arm in _arms(evidence):
        found = evidence.select(arm)
        model, _, method = arm.partition("-")
        ways = {str(k): (f"icl{k}", tuple(WAYS.values())) for k in _shots(found)}
        ways[f"0, tuned by {method}"] = ("tuned", ("seconds",))
        for shots, (way, kinds) in ways.items():
            times = [f"{1000 * _mean(found, f'{way}_{kind}'):.2f}" for kind in kinds]
            cells = [f"{_mean(found, f'{way}_accuracy'):.2f}", f"{_mean(found, f'{way}_prompt_tokens'):.0f}", *times]
            lines.append(f"| {model} | {shots} | {' | '.join([*cells, '-'][:4])} |")
    return lines


def _over_shots(found: Sequence[Record], figure: str) -> Line:
    """A figure over the number of worked examples."""
    asked = {k: mean_interval([r.figure(f"icl{k}_{figure}") for r in found]) for k in _shots(found)}
    return Line(
        list(asked),
        [i.estimate for i in asked.values()],
        [i.low for i in asked.values()],
        [i.high for i in asked.values()],
    )


def _level(found: Sequence[Record], figure: str) -> Line:
    """A figure of the tuned model, as a level line."""
    tuned, shots = mean_interval([r.figure(f"tuned_{figure}") for r in found]), _shots(found)
    return Line([shots[0], shots[-1]], [tuned.estimate] * 2, [tuned.low] * 2, [tuned.high] * 2)


def accuracy_lines(evidence: Evidence) -> dict[str, Line]:
    """Accuracy over the number of worked examples, and that of the tuned model as a level line."""
    lines = {}
    for arm in _arms(evidence):
        found = evidence.select(arm)
        model, _, method = arm.partition("-")
        lines[f"{model}, in context"] = _over_shots(found, "accuracy")
        lines[f"{model}, tuned by {method}"] = _level(found, "accuracy")
    return lines


def token_lines(evidence: Evidence) -> dict[str, Line]:
    """Tokens of a prompt over the number of worked examples."""
    return {arm.partition("-")[0]: _over_shots(evidence.select(arm), "prompt_tokens") for arm in _arms(evidence)}


def second_lines(evidence: Evidence) -> dict[str, Line]:
    """Time of an answer over the number of worked examples, both ways, and that of the tuned model as a level line."""
    lines: dict[str, Line] = {}
    for arm in _arms(evidence):
        found = evidence.select(arm)
        model, _, method = arm.partition("-")
        lines |= {f"{model}, {way}": _over_shots(found, seconds) for way, seconds in WAYS.items()}
        lines[f"{model}, tuned by {method}"] = _level(found, "seconds")
    return lines


EXPERIMENT = Experiment(
    name=NAME,
    title="In-context learning against a tuned model",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="peft-beats-icl",
            statement="parameter-efficient fine-tuning beats in-context learning in quality and in cost",
            lecture="3",
            tiers=("cpu", "gpu"),
            threshold=(
                f"intervals (95 % over all of them): accuracy at least {100 * QUALITY_MARGIN:.0f} points above the best number of "
                f"examples, and its time per answer at least {COST_MARGIN} x the tuned model's, examples read anew and cached; "
                "cost undecided where that number of examples does not help by as many points"
            ),
            scope=(
                "one model both ways, short answers; tuned by LoRA alone, on all rows of the training split (2,000), prompted with "
                "at most 16; a time per answer is one pass that scores it, and nothing is generated; "
                "the form of the prompt as served it best, on the test split too; without the cost of a sweep; intervals are over "
                "seeds, given the test questions: of 200 (tiny) one is 0.5 points, of 32 (smol, profile full) 3.1; a model of 1M "
                "parameters is too small to show in-context learning"
            ),
            judge=judge,
            controls={
                "in-context answers as the tuned model's": Control(as_tuned, "refuted"),
                "a tuned model as good as the base": Control(as_base, "refuted"),
                "a perfect tuned model at half the time": Control(perfect, "supported"),
            },
            advice={
                "supported": "Tune a small model rather than write examples into each prompt, if it is asked often enough.",
                "conditional": "Tune for quality; count queries before you tune for cost, above all if the server caches examples.",
                "refuted": "Put worked examples into the prompt, and keep their cache, before you train anything.",
                "inconclusive": "Tune if the base gets your questions wrong; to save cost, time both ways on your server first.",
            },
            stated={"cpu": "inconclusive", "full": "inconclusive"},
        ),
    ),
    plots=(
        Plot(
            "accuracy-over-shots",
            "Worked examples in the prompt, or a tuned model",
            "worked examples in the prompt",
            "test accuracy",
            accuracy_lines,
        ),
        Plot(
            "prompt-tokens-over-shots",
            "What worked examples cost in tokens",
            "worked examples in the prompt",
            "tokens of a prompt",
            token_lines,
        ),
        Plot(
            "seconds-over-shots",
            "What worked examples cost in time",
            "worked examples in the prompt",
            "seconds of an answer",
            second_lines,
            log_y=True,
        ),
    ),
)
