"""Tasks: generated with reasoning-gym or loaded from the hub, written once by a stage, read by every trial."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.corpus import Example, Fact, Split, task_examples
from lab.errors import LabError
from lab.evaluation import IGNORED, Row
from lab.models import hub_errors, replacing, write_source
from lab.params import DataSection, DataSizes, HubData

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
HUB_TASK = "hub"
"""The name under which a task from the hub is asked for, whatever its repository is called."""


def prepare_tasks(section: DataSection, tasks: Sequence[str], sizes: DataSizes, folder: Path, seed: int = 0) -> None:
    """Write every task's splits into `folder`, as JSON lines of `prompt` and `answer`.

    With `source: hub` each task is the hub's data set; the resolved commit is in `source.json`.
    """
    with replacing(folder) as fresh:
        source: dict[str, str] = {"tasks": ", ".join(tasks)}
        if section.source == "hub":
            splits, source["commit"] = _from_hub(section.hub, sizes)
            source |= {"hub": section.hub.name, "revision": section.hub.revision}
            for task in tasks:
                for split in SPLITS:
                    _write(fresh, task, split, splits[split])
        else:
            for task in tasks:
                for split in SPLITS:
                    _write(fresh, task, split, task_examples(task, split, getattr(sizes, split), seed))
        write_source(fresh, source)


def _write(folder: Path, task: str, split: Split, examples: Sequence[Example]) -> None:
    lines = [json.dumps({"prompt": e.prompt, "answer": e.answer}, ensure_ascii=False) for e in examples]
    (folder / f"{task}-{split}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _from_hub(hub: HubData, sizes: DataSizes) -> tuple[dict[Split, list[Example]], str]:
    with hub_errors(hub.name, hub.revision, "data.source: embedded"):
        import datasets
        from huggingface_hub import dataset_info

        commit = str(dataset_info(hub.name, revision=hub.revision).sha)
        try:
            loaded = datasets.load_dataset(hub.name, hub.configuration, revision=commit)
        except ValueError as error:
            if "onfig" not in str(error):
                raise
            reason = " ".join(str(error).split("Example")[0].split())
            raise LabError(f"data.hub.configuration is {hub.configuration!r}: {reason}. Correct it.") from None
    needed = {"train": sizes.train + sizes.validation, "test": sizes.test}
    if hub.test == hub.train:
        needed = {"train": sizes.train + sizes.validation + sizes.test}
    found: dict[str, list[Example]] = {}
    for role, count in needed.items():
        split = hub.train if role == "train" else hub.test
        if split not in loaded:
            raise LabError(f"data.hub.{role}: {hub.name} has no split '{split}'. It has: {', '.join(sorted(loaded))}.")
        rows = loaded[split]
        for key, column in (("prompt", hub.prompt), ("answer", hub.answer)):
            if column not in rows.column_names:
                raise LabError(
                    f"data.hub.{key}: {hub.name} has no column '{column}'. It has: {', '.join(rows.column_names)}."
                )
        if len(rows) < count:
            raise LabError(
                f"data.hub: {hub.name} has {len(rows)} rows in '{split}'; the profile needs {count}. Lower its data sizes."
            )
        chosen = rows.shuffle(seed=0).select(range(count))
        found[role] = [Example(f"Question: {row[hub.prompt]}\nAnswer:", str(row[hub.answer])) for row in chosen]
    train, validation = found["train"][: sizes.train], found["train"][sizes.train : sizes.train + sizes.validation]
    test = found.get("test") or found["train"][sizes.train + sizes.validation :]
    return {"train": train, "validation": validation, "test": test}, commit


def load_task(folder: Path, task: str, split: Split) -> list[Example]:
    """The examples of a prepared task.

    Raises:
        LabError: it was not prepared.
    """
    path = folder / f"{task}-{split}.jsonl"
    if not path.is_file():
        raise LabError(f"task '{task}' is not prepared in {folder}. Run: dvc repro prepare_data")
    # By line feeds alone: splitlines would also break at the line separators of Unicode, which JSON leaves in texts.
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").rstrip("\n").split("\n")]
    return [Example(row["prompt"], row["answer"]) for row in rows]


def fixed_length(rows: Sequence[Row], length: int) -> list[Row]:
    """The same tokens cut into rows of one length with every token labelled: each row weighs the same in a mean."""
    tokens = [token for row in rows for token in row.input_ids]
    starts = range(0, len(tokens) - length + 1, length)
    return [Row(tokens[start : start + length], tokens[start : start + length]) for start in starts]


def random_rows(count: int, length: int, vocabulary: int, seed: int) -> list[Row]:
    """Rows of random tokens, every one labelled: for memory and time, which do not depend on what the text says."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, vocabulary, (count, length), generator=generator).tolist()
    return [Row(row, row) for row in ids]


class Collator:
    """Pads a batch to its own longest row. Rows of one length come without a mask, as unpadded batches should."""

    def __init__(self, padding: int, reverse: bool = False):
        self.padding = padding
        self.reverse = reverse
        self.seen: list[int] = []
        """The place in the training set of each row, in the order in which the batches were made."""

    def __call__(self, features: list[dict[str, Any]]) -> dict[str, Any]:
        """A batch of int64 tensors `(rows, longest)`."""
        import torch

        self.seen.extend(feature["place"] for feature in features)
        if self.reverse:
            features = features[::-1]
        longest = max(len(feature["input_ids"]) for feature in features)
        gaps = [longest - len(feature["input_ids"]) for feature in features]
        batch = {
            "input_ids": [f["input_ids"] + [self.padding] * gap for f, gap in zip(features, gaps, strict=True)],
            "labels": [f["labels"] + [IGNORED] * gap for f, gap in zip(features, gaps, strict=True)],
        }
        if any(gaps):
            batch["attention_mask"] = [[1] * (longest - gap) + [0] * gap for gap in gaps]
        return {name: torch.tensor(rows) for name, rows in batch.items()}


# What the real model may forget ---------------------------------------------------------------------------------

CAPITALS = (
    "France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, Greece Athens, Austria Vienna, "
    "Poland Warsaw, Hungary Budapest, Ireland Dublin, Norway Oslo, Sweden Stockholm, Finland Helsinki, "
    "Denmark Copenhagen, Belgium Brussels, Switzerland Bern, Russia Moscow, Ukraine Kyiv, Turkey Ankara, Egypt Cairo, "
    "Kenya Nairobi, Ethiopia Addis Ababa, Ghana Accra, Nigeria Abuja, Morocco Rabat, Algeria Algiers, Tunisia Tunis, "
    "Senegal Dakar, Uganda Kampala, Zimbabwe Harare, Japan Tokyo, China Beijing, India New Delhi, Thailand Bangkok, "
    "Vietnam Hanoi, Indonesia Jakarta, Malaysia Kuala Lumpur, Iran Tehran, Iraq Baghdad, Syria Damascus, "
    "Lebanon Beirut, Jordan Amman, Nepal Kathmandu, Bangladesh Dhaka, Pakistan Islamabad, Afghanistan Kabul, "
    "Canada Ottawa, Cuba Havana, Peru Lima, Chile Santiago, Argentina Buenos Aires, Colombia Bogota, Venezuela Caracas, "
    "Ecuador Quito, Australia Canberra, Iceland Reykjavik, Romania Bucharest, Bulgaria Sofia, Serbia Belgrade, "
    "Croatia Zagreb"
)
"""Countries of one word and their capitals: facts that a small pretrained model may know."""


def capital_facts() -> list[Fact]:
    """The capitals under three phrasings."""
    facts = []
    for pair in CAPITALS.split(", "):
        country, capital = pair.split(" ", 1)
        prompts = (
            f"The capital of {country} is",
            f"The capital city of {country} is called",
            f"Question: What is the capital of {country}?\nAnswer:",
        )
        facts.append(Fact(country, "capital", capital, prompts))
    return facts


def english_prose(documents: int = 6, characters: int = 600) -> list[str]:
    """Real English prose that ships with Python: the opening of the longest entries of its language reference."""
    from pydoc_data.topics import topics

    longest = sorted(topics.values(), key=lambda text: (-len(text), text))[:documents]
    return [" ".join(text.split())[:characters] for text in longest]
