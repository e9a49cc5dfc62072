"""The trial of a trainer of trl: supervised, reward model, preferences, or RL with a verifiable reward.

The task's own verifier, reasoning-gym's, says what a wrong answer is and what an answer is worth.
"""

from __future__ import annotations

import math
import random
import statistics
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, set_seed
from transformers.trainer_callback import PrinterCallback

from lab import data, evaluation
from lab.corpus import KEEPERS_LOG, TASKS, Example
from lab.errors import LabError
from lab.models import load_model, load_tokenizer
from lab.runners import Outcome
from lab.specs import Rlhf, Training
from lab.training import FineTuning
from lab.workspace import Workspace

CLASSES = {
    "sft": "SFT",
    "reward": "Reward",
    "dpo": "DPO",
    "kto": "KTO",
    "rloo": "RLOO",
    "grpo": "GRPO",
    "ppo": "PPO",
}
"""By name of the settings, how trl's `...Trainer` and `...Config` begin."""

CONTROL_UPDATES = 2
"""Updates of the arm without a learning rate: no number of them moves a weight."""

WARM_UP_BATCH = 8
"""Rows in an update of the warm-up, whatever the trainer's own batch is: all trainers start from the same model."""

REWARDED_TOGETHER = 32
"""Rows that a reward model scores in one forward pass."""

PAIRED = ("reward", "dpo", "kto")
SAMPLED = ("rloo", "grpo", "ppo")

Verifier = Callable[[str, str], float]
"""What an answer is worth, from 0 to 1, given the right one."""


@dataclass(frozen=True)
class Pair:
    """A prompt, its right answer, and a wrong one that is right elsewhere."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Found:
    """A trainer of the installed trl: its two classes and the module that has them."""

    trainer: Any
    config: Any
    module: str


def find_trainer(name: str) -> Found | None:
    """The trainer of the installed trl called `name`, from its stable or its experimental part; None if it has none."""
    for module in ("trl", f"trl.experimental.{name}"):
        try:
            classes = [getattr(import_module(module), CLASSES[name] + end) for end in ("Trainer", "Config")]
        except (ImportError, AttributeError):
            continue
        return Found(classes[0], classes[1], module)
    return None


def verifier(task: str, examples: Sequence[Example]) -> Verifier:
    """reasoning-gym's verifier of a task.

    Raises:
        LabError: the task is none of reasoning-gym's, or its verifier needs more than the right answer.
    """
    from reasoning_gym.factory import DATASETS, get_score_answer_fn

    name = TASKS.get(task, (task, {}))[0]
    if name not in DATASETS:
        own = "the lab's own" if task == KEEPERS_LOG else "not reasoning-gym's"
        raise LabError(f"task '{task}' has no verifier: it is {own}. Choose a task of reasoning-gym.")
    score = get_score_answer_fn(name)

    def verify(answer: str, right: str) -> float:
        return float(score(answer.strip(), {"answer": right, "metadata": {}}))

    try:
        worth = min(verify(example.answer, example.answer) for example in examples)
    except (KeyError, TypeError, ValueError):
        worth = math.nan
    if worth != 1.0:
        raise LabError(
            f"task '{task}' cannot be verified by its answers alone: a right one is worth {worth}. Choose another task."
        )
    return verify


def preferences(examples: Sequence[Example], verify: Verifier, seed: int) -> list[Pair]:
    """Each example's right answer against the answer of another example that the verifier finds wrong.

    An answer is wrong about as often as it is right, so that which of two is the commoner tells next to nothing:
    `told_by_frequency` says how much.

    Raises:
        LabError: the examples have one answer between them.
    """
    answers = [example.answer for example in examples]
    if len(set(answers)) < 2:
        raise LabError(
            f"preferences need two different answers; {len(examples)} examples have one. Take more examples."
        )
    rng = random.Random(f"preferences {seed}")
    pairs = []
    for example in examples:
        wrong = example.answer
        while verify(wrong, example.answer) >= 1:
            wrong = rng.choice(answers)
        pairs.append(Pair(example.prompt, example.completion, f" {wrong}"))
    return pairs


def told_by_frequency(pairs: Sequence[Pair], learnt: Sequence[Example]) -> float:
    """The share of pairs whose right answer is the commoner one among the learnt, a tie counting half: no question is read."""
    often = Counter(example.completion for example in learnt)
    right, wrong = ([float(often[getattr(pair, side)]) for pair in pairs] for side in ("chosen", "rejected"))
    return preference_figures(right, wrong)["objective"]


def commonest_share(examples: Sequence[Example], learnt: Sequence[Example]) -> float:
    """The share of the examples that the commonest answer among the learnt is right of: no question is read."""
    ((commonest, _),) = Counter(example.completion for example in learnt).most_common(1)
    return statistics.fmean(example.completion == commonest for example in examples)


# The trial ------------------------------------------------------------------------------------------------------


def align(settings: Rlhf, workspace: Workspace) -> Outcome:
    """Train with one of trl's trainers, and score its own objective on held-out rows before and after.

    Every arm starts from the same weights and is scored on the same rows with the same random numbers; the control sees the
    first rows of what is trained on. Whatever trl does not need to be told is as trl has it, but for the learning rate,
    and for gradient checkpointing and bf16, which it switches on.

    Figures:
        present: 1 if the installed trl has the trainer, else 0 and nothing further; the tag `absent` then says so.
        objective_before, objective_control, objective_after: of the model as it is, after CONTROL_UPDATES at a learning
            rate of 0, and after the settings' updates. More is better:
            sft: log-likelihood of the right answer, nats per token;
            reward, dpo, kto: share of held-out pairs in which the right answer gets the larger reward (a tie counts half);
            rloo, grpo: mean worth of sampled answers by the verifier.
        margin_before, margin_control, margin_after: mean reward of the right answer less that of the wrong one (reward, dpo,
            kto). For dpo and kto the reward is beta times the log-ratio to the start.
        accuracy_before, accuracy_control, accuracy_after: share of held-out prompts whose greedy answer is right (not reward).
        unread: what can be had without the question, from how often an answer is right in the training rows: the objective of
            a preference (reward, dpo, kto), the accuracy of the commonest answer (the others).

    Raises:
        LabError: an unprepared model or task; a task without a verifier.
    """
    version = metadata.version("trl")
    outcome = Outcome(
        tags={"trl": version, "trainer": settings.trainer, "model": settings.model, "task": settings.task}
    )
    found = find_trainer(settings.trainer)
    outcome.figures["present"] = int(found is not None)
    if found is None:
        outcome.tags["absent"] = f"trl {version} has no {CLASSES[settings.trainer]}Trainer"
        return outcome
    outcome.tags["module"] = found.module
    with tempfile.TemporaryDirectory() as scratch:
        run = Alignment(settings, workspace, found, warmed_up(settings, workspace, Path(scratch)))
        arms: dict[str, Any] = {"before": run.start()}
        arms["control"], _ = run.train(0.0, CONTROL_UPDATES)
        arms["after"], history = run.train(settings.learning_rate, settings.updates)
        scores = {arm: run.objective(model) for arm, model in arms.items()}
    outcome.figures["unread"] = run.unread
    outcome.series = {
        f"train_{name}": [entry[name] for entry in history if name in entry] for name in ("loss", "reward")
    }
    if not all(math.isfinite(loss) for loss in outcome.series["train_loss"]):
        outcome.diverged = "a training loss is not finite"
        return outcome
    for arm, figures in scores.items():
        outcome.figures |= {f"{name}_{arm}": value for name, value in figures.items()}
    return outcome


def warmed_up(settings: Rlhf, workspace: Workspace, scratch: Path) -> Path:
    """The folder of the model that every arm starts from: the prepared one, or one tuned on the task's first rows.

    A folder, because trl loads its reference by name.
    """
    if not settings.warm_up_updates:
        return workspace.model(settings.model)
    told = {name: getattr(settings, name) for name in ("model", "task", "precision", "seed", "device")}
    tuned = Training(
        **told,
        examples=settings.warm_up_updates * WARM_UP_BATCH,
        updates=settings.warm_up_updates,
        learning_rate=settings.warm_up_learning_rate,
        micro_batch_size=WARM_UP_BATCH,
        evaluations=0,
    )
    run = FineTuning(tuned, workspace)
    run.train()
    run.model.save_pretrained(scratch)
    run.tokenizer.save_pretrained(scratch)
    return scratch


class Alignment:
    """A trainer's data, and its models before and after."""

    def __init__(self, settings: Rlhf, workspace: Workspace, found: Found, start: Path):
        self.settings = settings
        self.found = found
        self.folder = start
        self.tokenizer = load_tokenizer(start)
        self.learnt = data.load_task(workspace.data, settings.task, "train")[: settings.examples]
        self.held_out = data.load_task(workspace.data, settings.task, "test")[: settings.questions]
        self.verify = verifier(settings.task, self.held_out)
        self.rows = evaluation.example_rows(self.tokenizer, self.held_out)
        self.longest = max(
            sum(label != evaluation.IGNORED for label in row.labels)
            for row in evaluation.example_rows(self.tokenizer, self.learnt)
        )
        self.beta = 0.0
        self.reference: dict[int, list[evaluation.Score]] = {}
        self.unread = commonest_share(self.held_out, self.learnt)
        if settings.trainer in PAIRED:
            pairs = preferences(self.held_out, self.verify, seed=0)  # the same questions for every seed
            self.unread = told_by_frequency(pairs, self.learnt)
            self.sides = [
                [evaluation.encode(self.tokenizer, pair.prompt, getattr(pair, side)) for pair in pairs]
                for side in ("chosen", "rejected")
            ]

    def start(self) -> Any:
        """The model that every arm starts from, bit for bit: for a reward model with a head of zeros."""
        settings = self.settings
        set_seed(settings.seed)
        if settings.trainer == "reward":
            model = AutoModelForSequenceClassification.from_pretrained(
                self.folder, num_labels=1, dtype=torch.float32, pad_token_id=self.tokenizer.pad_token_id
            )
            # A head of zeros prefers nothing; a random one is right of some pairs by luck.
            torch.nn.init.zeros_(model.score.weight)
            return model.to(settings.device)
        return load_model(settings.model, self.folder, seed=settings.seed, device=settings.device)

    def train(self, learning_rate: float, updates: int) -> tuple[Any, list[dict[str, float]]]:
        """A model so trained, and what the trainer logged."""
        model = self.start()
        with tempfile.TemporaryDirectory() as scratch:
            trainer = self._trainer(model, learning_rate, updates, scratch)
            trainer.train()
            history = trainer.state.log_history
        # Scored in a model that no trainer has changed.
        trained = self.start()
        trained.load_state_dict(model.state_dict())
        return trained, history

    def _trainer(self, model: Any, learning_rate: float, updates: int, scratch: str) -> Any:
        from datasets import Dataset
        from datasets.utils.logging import disable_progress_bar

        disable_progress_bar()
        settings = self.settings
        batch = settings.micro_batch_size * settings.gradient_accumulation_steps
        more: dict[str, Any] = {}
        if settings.trainer in SAMPLED:
            more = {"num_generations": settings.generations, "max_completion_length": self.longest}
        arguments = self.found.config(
            output_dir=scratch,
            max_steps=updates,
            per_device_train_batch_size=settings.micro_batch_size,
            gradient_accumulation_steps=settings.gradient_accumulation_steps,
            learning_rate=learning_rate,
            lr_scheduler_type="constant",
            optim=settings.optimizer,
            bf16=settings.precision == "autocast",
            gradient_checkpointing=False,
            seed=settings.seed,
            data_seed=settings.seed,
            use_cpu=settings.device == "cpu",
            logging_steps=1,
            logging_nan_inf_filter=False,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            dataloader_pin_memory=settings.device == "cuda",
            **more,
        )
        self.beta = float(getattr(arguments, "beta", 0.0))
        named = {"reward_funcs": [self._worth]} if settings.trainer in SAMPLED else {}
        trainer = self.found.trainer(
            model=model,
            args=arguments,
            train_dataset=Dataset.from_list(self._training_rows()[: updates * batch]),
            processing_class=self.tokenizer,
            **named,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer

    def _training_rows(self) -> list[dict[str, Any]]:
        """The training rows under the names that trl has for their columns."""
        trainer, seed = self.settings.trainer, self.settings.seed
        if trainer == "sft":
            return [{"prompt": example.prompt, "completion": example.completion} for example in self.learnt]
        if trainer in SAMPLED:
            return [{"prompt": example.prompt, "answer": example.answer} for example in self.learnt]
        pairs = preferences(self.learnt, self.verify, seed)
        if trainer != "kto":
            return [{"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected} for pair in pairs]
        rows = [
            {"prompt": pair.prompt, "completion": answer, "label": answer == pair.chosen}
            for pair in pairs
            for answer in (pair.chosen, pair.rejected)
        ]
        # KTO estimates the drift from answers of other prompts in the batch: neighbours must not share theirs.
        random.Random(f"order {seed}").shuffle(rows)
        return rows

    def _worth(
        self, prompts: Sequence[str], completions: Sequence[str], answer: Sequence[str], **_: Any
    ) -> list[float]:
        """The reward as trl asks for it."""
        return [self.verify(text, right) for text, right in zip(completions, answer, strict=True)]

    # Objectives -------------------------------------------------------------------------------------------------

    def objective(self, model: Any) -> dict[str, float]:
        """The trainer's own objective on the held-out rows, and what goes with it: see `align`."""
        trainer = self.settings.trainer
        if trainer == "reward":
            return preference_figures(*(self._rewards(model, side) for side in self.sides))
        task = evaluation.task_figures(model, self.rows)
        if trainer == "sft":
            figures = {"objective": -task["loss"]}
        elif trainer in PAIRED:
            figures = preference_figures(*(self._log_ratios(model, side) for side in self.sides))
        else:
            figures = {"objective": self._sampled_worth(model)}
        return figures | {"accuracy": task["accuracy"]}

    def _log_ratios(self, model: Any, rows: Sequence[evaluation.Row]) -> list[float]:
        """The implicit rewards of DPO and KTO: beta times how much likelier each answer is than at the start."""
        if id(rows) not in self.reference:
            self.reference[id(rows)] = evaluation.score(self.start(), rows)
        nats = zip(self.reference[id(rows)], evaluation.score(model, rows), strict=True)
        return [self.beta * (before.nats - after.nats) for before, after in nats]

    def _rewards(self, model: Any, rows: Sequence[evaluation.Row]) -> list[float]:
        """What a reward model gives each row."""
        model.eval()
        rewards: list[float] = []
        for first in range(0, len(rows), REWARDED_TOGETHER):
            ids = [row.input_ids for row in rows[first : first + REWARDED_TOGETHER]]
            inputs = self.tokenizer.pad({"input_ids": ids}, padding_side="right", return_tensors="pt")
            with torch.no_grad():
                rewards += model(**inputs.to(self.settings.device)).logits[:, 0].tolist()
        return rewards

    def _sampled_worth(self, model: Any) -> float:
        """The mean worth of answers sampled for the held-out prompts at temperature 1."""
        model.eval()
        prompts = [example.prompt for example in self.held_out]
        inputs = self.tokenizer(
            prompts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False
        ).to(self.settings.device)
        set_seed(self.settings.seed)
        with torch.no_grad():
            sampled: Tensor = model.generate(
                input_ids=inputs["input_ids"],
                attention_mask=inputs["attention_mask"],
                do_sample=True,
                temperature=1.0,
                top_k=0,
                top_p=1.0,
                max_new_tokens=self.longest,
                num_return_sequences=self.settings.samples,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        texts = self.tokenizer.batch_decode(sampled[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right = [example.answer for example in self.held_out for _ in range(self.settings.samples)]
        return statistics.fmean(map(self.verify, texts, right))


def preference_figures(chosen: Sequence[float], rejected: Sequence[float]) -> dict[str, float]:
    """`objective`: share of the pairs with the larger reward for the right answer, a tie counting half; `margin`: mean."""
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    wins = [1.0 if margin > 0 else 0.5 if margin == 0 else 0.0 for margin in margins]
    return {"objective": statistics.fmean(wins), "margin": statistics.fmean(margins)}
