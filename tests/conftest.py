"""What all tests share: the options, the folder of the project, and the verdict table at the end."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lab import planner
from lab.grouped_queries import count_grouped_queries
from lab.hub_endpoint import Hub
from lab.planner import Answer, answer
from lab.pricing import read_spec
from lab.workspace import Workspace
from tests.prices import arithmetic

ROOT = Path(__file__).resolve().parent.parent

if "PYTEST_XDIST_WORKER" in os.environ:
    # Threads that wait in a loop for their kin take the processor from the other worker: twice the time for everything.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

RAGGED_TASK = "word_sequence_reversal"
"""A task whose answers differ in length."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--require-gpu", action="store_true", help="fail, rather than skip, where a test needs a GPU")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # The long studies last, so that a broken unit shows first; but first where another process runs the units meanwhile.
    side_by_side = "PYTEST_XDIST_WORKER" in os.environ
    items.sort(key=lambda item: (item.get_closest_marker("study") is None) == side_by_side)


def cuda_found() -> str | None:
    """The CUDA device here, or None."""
    import torch

    return torch.cuda.get_device_name(0) if torch.cuda.is_available() else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and cuda_found() is None:
        reason = "needs a CUDA GPU with 8 GiB; found none"
        if item.config.getoption("--require-gpu"):
            pytest.fail(reason, pytrace=False)
        pytest.skip(reason)


@pytest.fixture(scope="session", autouse=True)
def shared_keys_counted() -> None:
    """As in the process of a trial; torch before 2.12 cannot."""
    count_grouped_queries()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """torch in one thread, as a trial has it: the same numbers, and quicker on small models."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """The answer to a specification, by arithmetic."""
    monkeypatch.setattr(planner, "predict", arithmetic)
    return lambda quick=False, confirm=True, **spec: answer(read_spec(spec), quick, confirm)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """An empty hub for one test."""
    with Hub() as server:
        yield server


@pytest.fixture(scope="session")
def root() -> Path:
    """The project's folder."""
    return ROOT


def prepare_embedded(folder: Path, tasks: list[str], train: int, validation: int, test: int) -> None:
    """The splits of some tasks, made by the lab itself."""
    from lab.data import prepare_tasks
    from lab.params import DataSection, DataSizes, HubData

    hub = HubData(name="a/b", revision="main", prompt="p", answer="a")
    sizes = DataSizes(train=train, validation=validation, test=test)
    prepare_tasks(DataSection(source="embedded", hub=hub), tasks, sizes, folder)


@pytest.fixture(scope="session")
def tiny_workspace(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """A workspace with a `tiny` that was hardly trained and a few examples of one task."""
    from lab.pretraining import TinyRecipe, pretrain_tiny

    root = tmp_path_factory.mktemp("study")
    made = Workspace(root, "smoke")
    recipe = TinyRecipe(
        hidden_size=32,
        layers=2,
        heads=2,
        key_value_heads=1,
        intermediate_size=64,
        vocabulary=400,
        people=2,
        repetitions=2,
        prose_documents=20,
        task_documents=10,
        tokenizer_prompts=10,
        held_out_documents=5,
        steps=3,
        batch=4,
        minimum_recall=0.0,
    )
    pretrain_tiny(recipe, made.model("tiny"))
    facts = made.model("tiny") / "facts.json"
    facts.write_text(facts.read_text().replace('"known": false', '"known": true'))
    prepare_embedded(made.data, [RAGGED_TASK], train=64, validation=12, test=12)
    return made


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not any("tests/claims" in key for key in _test_ids(terminalreporter)):
        return
    from rich.console import Console

    from lab.progress import verdict_table
    from lab.study import Study, elsewhere

    found = [
        verdict
        for name in ("cpu", "full", *elsewhere(ROOT / "results", Study.load("cpu", ROOT).params))
        if (ROOT / "results" / name).is_dir()
        for verdict in Study.load(name, ROOT).verdicts
    ]
    text = io.StringIO()
    verdict_table(found, Console(file=text, width=150, no_color=True))
    terminalreporter.write_sep("=", "verdicts on the committed evidence")
    terminalreporter.write_line(text.getvalue())


def _test_ids(reporter: pytest.TerminalReporter) -> list[str]:
    return [getattr(report, "nodeid", "") for reports in reporter.stats.values() for report in reports]
