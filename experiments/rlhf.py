"""RLHF with trl: does each trainer that the installed trl has move its own objective, and which trainers does it lack?

Claim     trl-covers-rlhf (lecture 1)
Refuted   if no trainer that the lecture names (SFT, reward model, DPO, PPO) is there and moves; conditional if some are
Control   the model after updates at a learning rate of 0 presented as trained; every named trainer there and moving
Run       lab run rlhf --profile cpu

That an objective moves does not show that the question was read: the commonest answer, or how often an answer is right
elsewhere, may move it as far. The verdict says how far these go, and which trainers get further.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import fmean
from typing import Literal

from pydantic import Field, model_validator

from lab.claims import Claim, Control, Evidence, Experiment, Finding, over_answers
from lab.params import Count, Profile, Rate, Section
from lab.plots import Line, Plot
from lab.records import Record
from lab.specs import Rlhf, TrialSpec
from lab.statistics import Answer, Interval, bonferroni, lies_above, paired_difference

NAME = "rlhf"

NAMED = ("sft", "reward", "dpo", "ppo")
"""What the lecture says that trl has. These decide the verdict; the others are reported beside them."""

OTHERS = ("kto", "rloo", "grpo")
"""A further preference trainer, and the two that do RL with a reward, as PPO did, without a value model."""

SAMPLING: tuple[Literal["rloo", "grpo", "ppo"], ...] = ("rloo", "grpo", "ppo")

PAIRED = ("reward", "dpo", "kto")

TITLES = {
    "sft": "SFT",
    "reward": "reward model",
    "dpo": "DPO",
    "ppo": "PPO",
    "kto": "KTO",
    "rloo": "RLOO",
    "grpo": "GRPO",
}

# The least that counts as moved. Shares of pairs and mean rewards lie between 0 and 1: five more in a hundred is what a
# reader would see in a plot; for SFT, 0.05 nats are 5 % of an answer token's perplexity.
LEAST = 0.05


class TrainerParams(Section):
    """A trainer's own numbers."""

    learning_rate: Rate
    updates: Count
    micro_batch_size: Count
    """RL: sampled answers, a multiple of `generations`."""


class Params(Section):
    """The task, the start that the trainers share, and each trainer's numbers."""

    model: str
    task: str
    seeds: Count
    questions: Count
    samples: Count
    generations: int = Field(ge=2)
    warm_up_updates: int = Field(ge=0)
    warm_up_learning_rate: Rate
    trainers: dict[Literal["sft", "reward", "dpo", "kto", "rloo", "grpo", "ppo"], TrainerParams]

    @model_validator(mode="after")
    def _groups_are_whole(self) -> Params:
        for trainer in {*SAMPLING} & set(self.trainers):
            size = self.trainers[trainer].micro_batch_size
            if size % self.generations:
                raise ValueError(
                    f"trainers.{trainer}.micro_batch_size is {size}; it must be a multiple of generations, {self.generations}"
                )
        return self


def trials(params: Params, profile: Profile) -> list[TrialSpec]:
    """Each trainer for each seed, all from the base that a few updates have taught what an answer looks like."""
    specs = []
    for (trainer, chosen), seed in product(params.trainers.items(), range(params.seeds)):
        settings = Rlhf(
            model=params.model,
            task=params.task,
            trainer=trainer,
            learning_rate=chosen.learning_rate,
            updates=chosen.updates,
            micro_batch_size=chosen.micro_batch_size,
            warm_up_updates=params.warm_up_updates,
            warm_up_learning_rate=params.warm_up_learning_rate,
            generations=params.generations,
            samples=params.samples,
            questions=params.questions,
            seed=seed,
            device=profile.device,
        )
        specs.append(TrialSpec(experiment=NAME, name=f"{trainer}-seed{seed}", arm=trainer, settings=settings))
    return specs


# Judge ----------------------------------------------------------------------------------------------------------


def judge(evidence: Evidence) -> Finding:
    """Which of the named trainers are there and move their objective by LEAST over the no-update control."""
    there = [trainer for trainer in (*NAMED, *OTHERS) if _present(evidence, trainer)]
    rises = {trainer: _rise(evidence.select(trainer), len(there)) for trainer in there}
    answers: dict[str, Answer] = {
        trainer: lies_above(rises[trainer], LEAST) if trainer in there else "no" for trainer in NAMED
    }
    others = {trainer: lies_above(rises[trainer], LEAST) for trainer in OTHERS if trainer in there}
    reasons = [f"trl {evidence.select()[0].provenance.versions.get('trl', 'of unknown version')}"]
    lacking = [TITLES[trainer] for trainer in (*NAMED, *OTHERS) if trainer not in there]
    if lacking:
        reasons.append(f"it has no {' and no '.join(lacking)} trainer")
    words = {"yes": "rises by", "no": "does not rise enough:", "undecided": "is undecided:"}
    reasons += [
        f"{TITLES[t]} {words[a]} {rises[t]}{_greedy(evidence.select(t))}"
        for t, a in {**answers, **others}.items()
        if t in there
    ]
    if there:
        reasons.append(_reads(evidence, there))
    given = list(answers.values())
    sure, possible = given.count("yes"), len(given) - given.count("no")
    unit = f"of {len(NAMED)} named trainers there and moving"
    seeds = min(rise.n for rise in rises.values()) if rises else 1
    return Finding(over_answers(given), sure, sure, possible, unit, seeds, "; ".join(reasons))


def _present(evidence: Evidence, trainer: str) -> bool:
    """Whether the installed trl has it; the same for every seed."""
    return evidence.select(trainer)[0].figure("present") == 1


def _greedy(records: list[Record]) -> str:
    """What became of the greedy answers: a trainer can move its objective and leave them worse. A reward model has none."""
    shares = [[r.figures.get(f"accuracy_{arm}") for r in records] for arm in ("control", "after")]
    if any(share is None for row in shares for share in row):
        return ""
    before, after = (sum(share or 0.0 for share in row) / len(row) for row in shares)
    return f", greedy answers right {before:.0%} before and {after:.0%} after"


def _reads(evidence: Evidence, there: Sequence[str]) -> str:
    """Which trainers end by LEAST above what can be had without the question, and where each ends."""
    words: dict[Answer, list[str]] = {"yes": [], "no": [], "undecided": []}
    for trainer in there:
        found = [r for r in evidence.select(trainer) if "unread" in r.figures]
        if not found:
            continue
        ends = [r.figure("objective_after" if trainer in PAIRED else "accuracy_after") for r in found]
        unread = [r.figure("unread") for r in found]
        answer = lies_above(paired_difference(ends, unread, bonferroni(len(there))), LEAST)
        words[answer].append(f"{TITLES[trainer]} {fmean(ends):.0%} where {fmean(unread):.0%} need none")
    shown = [*words["no"], *words["undecided"]]
    return (
        "shown to have read the question, by pairs or by answers right: "
        + (", ".join(words["yes"]) or "none")
        + (f"; not shown: {', '.join(shown)}" if shown else "")
    )


def _rise(records: list[Record], trainers: int, confidence: float | None = None) -> Interval:
    """How much more the objective is after training than after updates at a learning rate of 0, over the seeds."""
    after = [r.figure("objective_after") for r in records]
    control = [r.figure("objective_control") for r in records]
    return paired_difference(after, control, confidence or bonferroni(trainers))


# Controls -------------------------------------------------------------------------------------------------------


def still(evidence: Evidence) -> Evidence:
    """The measured arm without a learning rate, presented as trained."""

    def changed(record: Record) -> dict[str, float]:
        return {"objective_after": record.figure("objective_control")} if record.figure("present") == 1 else {}

    return Evidence(evidence.select()).with_figures(changed)


def complete(evidence: Evidence) -> Evidence:
    """Every trainer there, each objective ten times LEAST above its control."""

    def changed(record: Record) -> dict[str, float]:
        control = record.figures.get("objective_control") or 0.0
        return {"present": 1, "objective_control": control, "objective_after": control + 10 * LEAST}

    return Evidence(evidence.select()).with_figures(changed)


# Plot -----------------------------------------------------------------------------------------------------------


def rise_lines(evidence: Evidence) -> dict[str, Line]:
    """What training adds to the mean objective, with its 95 % interval; a trainer that is lacking has no line."""
    lines = {}
    for trainer in (*NAMED, *OTHERS):
        if evidence.has(trainer) and _present(evidence, trainer):
            rise = _rise(evidence.select(trainer), 1)
            lines[TITLES[trainer]] = Line((0, 1), (0.0, rise.estimate), (0.0, rise.low), (0.0, rise.high))
    return lines


EXPERIMENT = Experiment(
    name=NAME,
    title="RLHF with trl",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="trl-covers-rlhf",
            statement="trl covers supervised fine-tuning, reward modelling, DPO and PPO-style RLHF",
            lecture="1",
            tiers=("cpu", "gpu"),
            threshold=f"the installed trl has a trainer of that name, and the interval of its objective's rise over the no-update "
            f"control lies above {LEAST:g} (share of preferences, mean reward; SFT: nats per answer token), 95 % over all trainers "
            "together (Bonferroni); SFT, reward model, DPO and PPO decide, KTO, RLOO and GRPO are reported",
            scope="full fine-tuning of a small model on one task of reasoning-gym, fp32, after a short warm-up; held-out "
            "rows; preferences are right answers against answers of other questions; an objective that moves, be the question "
            "read or not; rates and updates tried beforehand on other rows and seeds; the claim ages with trl",
            judge=judge,
            controls={
                "no update presented as trained": Control(still, "refuted"),
                "every trainer there and moving": Control(complete, "supported"),
            },
            advice={
                "supported": "Take trl's trainers for all four, and set learning rate and precision yourself.",
                "conditional": "Take the trainers that are there and move; GRPO or RLOO may stand in PPO's place.",
                "refuted": "Do not count on trl's trainers as they are: check on held-out rows that your objective moves.",
                "inconclusive": "Run the trainer for some updates, and measure your objective on held-out rows before and after.",
            },
            stated={"cpu": "conditional", "full": "conditional"},
        ),
    ),
    plots=(
        Plot(
            "rise-by-trainer",
            "What each trainer of trl adds to its own objective",
            "0: no update, 1: trained",
            "objective less its control",
            rise_lines,
            named=True,
        ),
    ),
)
