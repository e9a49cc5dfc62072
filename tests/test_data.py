"""Tasks: disjoint splits, whole folders, batches padded to their own longest row, and the hub's data by commit."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab import data
from lab.corpus import Example, Fact, Split
from lab.errors import LabError
from lab.evaluation import IGNORED, Row
from lab.hub_endpoint import Hub
from lab.models import read_source
from lab.origin import Origin
from lab.params import DataSection, DataSizes, HubData
from lab.specs import Training, TrialSpec
from lab.workspace import Workspace

TASK, DATASET, NOWHERE = "family_relationships", "lab/sums", "http://127.0.0.1:9"
SIZES = DataSizes(train=40, validation=10, test=12)
HUB = HubData(name=DATASET, revision="main", prompt="question", answer="result")
EMBEDDED = DataSection(source="embedded", hub=HUB)


def prompts(folder: Path, task: str, split: Split) -> list[str]:
    return [example.prompt for example in data.load_task(folder, task, split)]


# Generated ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepared") / "data"
    data.prepare_tasks(EMBEDDED, [TASK, "gcd"], SIZES, folder)
    return folder


def test_a_prepared_task_has_its_sizes_and_no_prompt_in_two_splits(prepared: Path) -> None:
    for task in (TASK, "gcd"):
        splits = {split: prompts(prepared, task, split) for split in data.SPLITS}
        assert {split: len(found) for split, found in splits.items()} == {"train": 40, "validation": 10, "test": 12}
        everything = [prompt for found in splits.values() for prompt in found]
        assert len(set(everything)) == len(everything)


def test_the_same_seed_gives_the_same_bytes(prepared: Path, tmp_path: Path) -> None:
    data.prepare_tasks(EMBEDDED, [TASK, "gcd"], SIZES, tmp_path / "again")
    files = sorted(path.name for path in prepared.iterdir())
    assert files == sorted(path.name for path in (tmp_path / "again").iterdir())
    assert all((prepared / name).read_bytes() == (tmp_path / "again" / name).read_bytes() for name in files)
    assert read_source(prepared) == {"tasks": f"{TASK}, gcd"}


def test_an_unknown_task_is_one_line_and_leaves_the_old_data(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    data.prepare_tasks(EMBEDDED, ["gcd"], SIZES, folder)
    with pytest.raises(LabError, match=r"task: 'gdc' is unknown; .*Did you mean .*'gcd'") as caught:
        data.prepare_tasks(EMBEDDED, ["gcd", "gdc"], SIZES, folder)
    assert "\n" not in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    assert len(prompts(folder, "gcd", "train")) == 40


def test_a_task_that_is_not_prepared_says_what_to_run(tmp_path: Path) -> None:
    said = rf"task 'gcd' is not prepared in {re.escape(str(tmp_path))}\. Run: dvc repro prepare_data"
    with pytest.raises(LabError, match=said):
        data.load_task(tmp_path, "gcd", "train")


@given(st.lists(st.tuples(st.text(), st.text()), min_size=1, max_size=5))
def test_examples_come_back_as_they_were_written(tmp_path_factory: pytest.TempPathFactory, texts: Any) -> None:
    folder = tmp_path_factory.mktemp("examples")
    examples = [Example(prompt, answer) for prompt, answer in texts]
    data._write(folder, "any", "train", examples)
    assert data.load_task(folder, "any", "train") == examples


# Batches --------------------------------------------------------------------------------------------------------


def features(*lengths: int) -> list[dict[str, Any]]:
    return [
        {"input_ids": list(range(10, 10 + n)), "labels": [IGNORED, *range(11, 10 + n)], "place": place}
        for place, n in enumerate(lengths)
    ]


def test_a_batch_is_padded_to_its_own_longest_row_and_the_padding_is_neither_seen_nor_asked() -> None:
    batch = data.Collator(padding=7)(features(5, 2, 3))
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14], [10, 11, 7, 7, 7], [10, 11, 12, 7, 7]]
    assert batch["labels"].tolist()[1] == [IGNORED, 11, IGNORED, IGNORED, IGNORED]
    assert batch["attention_mask"].tolist() == [[1] * 5, [1, 1, 0, 0, 0], [1, 1, 1, 0, 0]]


def test_rows_of_one_length_come_without_a_mask() -> None:
    batch = data.Collator(padding=0)(features(4, 4))
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].shape == (2, 4)


def test_the_order_of_the_rows_is_kept_for_comparison_and_a_planted_fault_turns_the_batch_round() -> None:
    straight, reverse = data.Collator(0), data.Collator(0, reverse=True)
    one, other = straight(features(2, 3)), reverse(features(2, 3))
    assert one["input_ids"].tolist() == other["input_ids"].tolist()[::-1]
    assert straight.seen == reverse.seen == [0, 1]


@given(st.lists(st.integers(1, 9), max_size=8), st.integers(1, 12))
def test_rows_of_fixed_length_hold_the_same_tokens_all_labelled(lengths: list[int], length: int) -> None:
    rows = [Row(list(range(n)), [IGNORED] * n) for n in lengths]
    tokens = [token for row in rows for token in row.input_ids]
    found = data.fixed_length(rows, length)
    assert [len(row.input_ids) for row in found] == [length] * (len(tokens) // length)
    assert [token for row in found for token in row.input_ids] == tokens[: length * len(found)]
    assert all(row.labels == row.input_ids for row in found)


def test_random_rows_follow_from_the_seed() -> None:
    assert data.random_rows(3, 8, 100, seed=1) == data.random_rows(3, 8, 100, seed=1)
    assert data.random_rows(3, 8, 100, seed=1) != data.random_rows(3, 8, 100, seed=2)
    rows = data.random_rows(50, 8, 5, seed=0)
    assert {token for row in rows for token in row.input_ids} == set(range(5))


def test_capitals_are_facts_under_three_phrasings() -> None:
    facts = data.capital_facts()
    assert len({fact.person for fact in facts}) == len(facts) >= 50
    assert Fact("Ethiopia", "capital", "Addis Ababa", facts[0].prompts).value in {fact.value for fact in facts}
    assert all(len(fact.prompts) == 3 and all(fact.person in prompt for prompt in fact.prompts) for fact in facts)


def test_english_prose_is_there_without_a_network_and_all_different() -> None:
    texts = data.english_prose(8, 200)
    assert len(set(texts)) == 8
    assert all(150 < len(text) <= 200 and "\n" not in text for text in texts)


# The hub --------------------------------------------------------------------------------------------------------

CLIENT = """
    import json, sys
    from pathlib import Path
    from lab.data import prepare_tasks
    from lab.errors import LabError
    from lab.params import DataSection, DataSizes

    cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])
    answers = {}
    for name, (section, sizes) in cases.items():
        try:
            prepare_tasks(DataSection(**section), ["mine"], DataSizes(**sizes), folder / name)
            answers[name] = ""
        except LabError as error:
            assert not (folder / name).exists()
            answers[name] = str(error)
    print(json.dumps(answers))
"""


def ask_hub(environment: dict[str, str], folder: Path, **cases: dict[str, Any]) -> dict[str, str]:
    """For each case of changes to HUB (and of `sizes`) the line that says why it failed, or an empty one."""
    wanted = {}
    for name, changes in cases.items():
        sizes = changes.pop("sizes", {"train": 6, "validation": 2, "test": 3})
        wanted[name] = ({"source": "hub", "hub": {**HUB.model_dump(), **changes}}, sizes)
    command = [sys.executable, "-c", textwrap.dedent(CLIENT), json.dumps(wanted), str(folder)]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def sums(start: int, count: int) -> bytes:
    rows = ({"question": f"{i} + 1?", "result": i + 1} for i in range(start, start + count))
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_a_data_set_of_the_hub_is_split_and_carries_its_commit_and_mistakes_are_one_line(
    tmp_path: Path, hub: Hub
) -> None:
    files = {"data/train.jsonl": sums(0, 20), "data/test.jsonl": sums(100, 5)}
    pin = hub.commit("dataset", DATASET, files)
    latest = hub.commit("dataset", DATASET, {**files, "data/train.jsonl": sums(1000, 20)})
    hub.commit("dataset", "lab/gated", files)
    hub.gate("lab/gated")
    found = ask_hub(
        hub.environment(),
        tmp_path / "build",
        latest={},
        pinned={"revision": pin},
        one_split={"test": "train"},
        split={"test": "dev"},
        column={"answer": "answer"},
        few={"sizes": {"train": 30, "validation": 2, "test": 3}},
        unknown={"name": "lab/nothing"},
        revision={"revision": "0" * 40},
        gated={"name": "lab/gated"},
        configuration={"configuration": "main"},
    )

    build = tmp_path / "build"
    assert (found["latest"], found["pinned"], found["one_split"]) == ("", "", "")
    assert read_source(build / "latest") == {"tasks": "mine", "hub": DATASET, "revision": "main", "commit": latest}
    assert read_source(build / "pinned")["commit"] == pin
    for name, first in (("latest", 1000), ("pinned", 0), ("one_split", 1000)):
        splits = {split: prompts(build / name, "mine", split) for split in data.SPLITS}
        assert [len(splits[split]) for split in data.SPLITS] == [6, 2, 3]
        assert len({prompt for found in splits.values() for prompt in found}) == 11
        possible = {f"Question: {i} + 1?\nAnswer:" for i in range(first, first + 20)}
        assert set(splits["train"]) | set(splits["validation"]) <= possible
        assert (set(splits["test"]) <= possible) is (name == "one_split")
    example = data.load_task(build / "pinned", "mine", "test")[0]
    assert example.answer == str(int(example.prompt.split()[1]) + 1)

    offline = "or set data.source: embedded in params.yaml."
    assert found["split"] == f"data.hub.test: {DATASET} has no split 'dev'. It has: test, train."
    assert found["column"] == f"data.hub.answer: {DATASET} has no column 'answer'. It has: question, result."
    assert found["few"] == f"data.hub: {DATASET} has 20 rows in 'train'; the profile needs 32. Lower its data sizes."
    assert found["unknown"].startswith("hub: lab/nothing at revision main: the hub has no such repository")
    assert found["revision"].startswith(f"hub: {DATASET} at revision {'0' * 40}: it has no such revision.")
    assert found["gated"].startswith("hub: lab/gated at revision main: access to it must be asked for on the hub;")
    assert all(found[name].endswith(offline) for name in ("unknown", "revision", "gated"))
    assert found["configuration"] == (
        "data.hub.configuration is 'main': BuilderConfig 'main' not found. Available: ['default']. Correct it."
    )
    assert not any("\n" in text for text in found.values())

    workspace = Workspace(tmp_path, "smoke")
    (tmp_path / "lab").symlink_to(Path(data.__file__).parent)
    workspace.data.parent.mkdir()
    (build / "latest").rename(workspace.data)
    (workspace.model("tiny") / "config.json").parent.mkdir()
    (workspace.model("tiny") / "config.json").write_text("{}")
    workspace.environment.write_text('{"id": "here"}')
    training = Training(model="tiny", task="mine", updates=1)
    spec = TrialSpec(experiment="e", name="n", arm="a", settings=training)
    assert Origin.now(workspace, [spec], 1, "cpu").inputs(spec)["data commit"] == latest


@pytest.mark.parametrize(
    "switch", [{"HF_ENDPOINT": NOWHERE}, {"HF_HUB_OFFLINE": "1"}], ids=["no answer", "switched off"]
)
def test_without_a_network_a_hub_data_set_names_the_embedded_choice(
    tmp_path: Path, hub: Hub, switch: dict[str, str]
) -> None:
    found = ask_hub(hub.environment() | switch, tmp_path, case={})["case"]
    said = rf"hub: {DATASET} at revision main: the hub cannot be reached, or broke off \(\w+\)\. Connect to it, "
    assert re.fullmatch(said + r"or set data\.source: embedded in params\.yaml\.", found)
