"""The parts of the project agree: dvc.yaml, the registry, the code fingerprint, the imports."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import records
from lab.claims import discover
from lab.runners import RUNNERS, module_of
from tests.conftest import ROOT

REGISTRY = discover()
NAMES = set(REGISTRY.experiments)
STAGES: dict[str, Any] = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
HEAVY = ("torch", "transformers", "mlflow", "dvc", "peft", "datasets", "bitsandbytes", "scipy", "matplotlib")


def paths(entries: list[Any]) -> list[str]:
    """The paths of a stage's deps or outs, whose entries are strings or mappings of one key."""
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


def named(entries: list[Any], pattern: str) -> list[str]:
    return [found[1] for path in paths(entries) if (found := re.fullmatch(pattern, path))]


# dvc.yaml -------------------------------------------------------------------------------------------------------


def test_every_experiment_is_a_stage_a_plan_and_a_reason_to_judge_again() -> None:
    trials, plan, verdicts = STAGES["trials"], STAGES["plan"], STAGES["verdicts"]
    results = r"results/\$\{profile\}/(\w+)"
    for listed in (
        trials["foreach"],
        named(plan["outs"], r"build/\$\{profile\}/plan/(\w+)\.json"),
        named(verdicts["deps"], results),
    ):
        assert sorted(listed) == sorted(NAMES)


def read_by(kind: str) -> set[str]:
    module = module_of(kind)
    return {path.relative_to(ROOT / "lab").as_posix() for path in records.numeric_files(ROOT, module)}


def test_a_training_stage_depends_on_the_code_that_the_fingerprint_reads_and_on_no_other() -> None:
    listed = {path.removeprefix("lab/") for path in paths(STAGES["trials"]["do"]["deps"]) if path.startswith("lab/")}
    read = set().union(*map(read_by, RUNNERS))
    assert "evaluation.py" in read
    uncovered = {name for name in read if not any(name == path or name.startswith(f"{path}/") for path in listed)}
    assert not uncovered, "in the fingerprint of a trial, but no dep of the stage `trials`"
    unread = {path for path in listed if not any(name == path or name.startswith(f"{path}/") for name in read)}
    assert unread == {"shapes", "sweeps.py"}, "a dep of `trials`, but in no trial's fingerprint (shapes are inputs)"


@pytest.fixture(scope="module")
def imported() -> dict[str, set[str]]:
    """By module that runs a kind of trial, what it imports of `lab`: each in a process that has everything but `lab`."""
    script = """
import json, os, sys
import bitsandbytes, datasets, peft, torch, transformers.trainer, trl
for module in sys.argv[1:]:
    if os.fork() == 0:
        try:
            __import__(module)
            print(json.dumps([module, [name for name in sys.modules if name.split(".")[0] == "lab"]]), flush=True)
        finally:
            os._exit(0)
    os.wait()
"""
    command = [sys.executable, "-c", script, *sorted(set(map(module_of, RUNNERS)))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, cwd=ROOT, check=True)
    return {module: set(names) for module, names in map(json.loads, done.stdout.splitlines())}


@pytest.mark.parametrize("kind", RUNNERS)
def test_what_a_trial_imports_of_the_library_is_in_the_fingerprint_or_a_declaration(
    kind: str, imported: dict[str, set[str]]
) -> None:
    modules = imported[module_of(kind)] - set(records.DECLARATIONS)
    read = {f"lab.{name.removesuffix('.py').removesuffix('/__init__').replace('/', '.')}" for name in read_by(kind)}
    assert module_of(kind) in modules
    assert modules <= read


def test_a_training_stage_does_not_depend_on_its_experiment_s_file() -> None:
    assert not [path for path in paths(STAGES["trials"]["do"]["deps"]) if path.startswith("experiments")]


def test_no_parameter_has_a_name_that_dvc_leaves_out_of_its_hash() -> None:
    def keys(value: Any) -> set[str]:
        if isinstance(value, dict):
            return set(map(str, value)).union(*map(keys, value.values()))
        return set().union(*map(keys, value)) if isinstance(value, list) else set()

    assert not keys(yaml.safe_load((ROOT / "params.yaml").read_text())) & {"size", "nfiles"}


# Imports --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", ["lab", "lab.cli", "lab.study", "experiments"])
def test_importing_the_library_is_light(module: str) -> None:
    script = f"""
import json, sys, time
start = time.perf_counter()
import {module}
print(json.dumps([time.perf_counter() - start, [name for name in {HEAVY!r} if name in sys.modules]]))
"""
    # The best of three: another process may hold the processor during one of them.
    runs = [subprocess.run([sys.executable, "-c", script], capture_output=True, cwd=ROOT, check=True) for _ in range(3)]
    answers = [json.loads(done.stdout) for done in runs]
    assert min(seconds for seconds, _ in answers) < 1
    assert [heavy for _, heavy in answers] == [[], [], []]


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", sources("lab"), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_the_library_knows_no_experiment(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        assert not [name for name in names if name.split(".")[0] == "experiments"], f"line {getattr(node, 'lineno', 0)}"


# Experiments ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(NAMES))
def test_an_experiment_opens_with_claim_refutation_control_and_how_to_run_it(name: str) -> None:
    text = ast.get_docstring(ast.parse((ROOT / "experiments" / f"{name}.py").read_text())) or ""
    first = text.splitlines()[0]
    assert first.rstrip().endswith(("?", ".", "!"))
    for word in ("Claim", "Refuted", "Control"):
        assert re.search(rf"(?m)^{word}s? +\S", text), f"no line '{word}'"
    profile = "gpu" if all(claim.tiers == ("gpu",) for claim in REGISTRY.experiments[name].claims) else "cpu"
    assert re.search(rf"(?m)^Run +lab run {name} --profile {profile}$", text)
    for claim in REGISTRY.experiments[name].claims:
        assert claim.id in text


def test_the_file_of_an_experiment_has_its_name_and_every_file_has_one() -> None:
    files = {path.stem for path in sources("experiments")} - {"__init__"}
    assert files == NAMES
    claims = [claim.id for experiment in REGISTRY.experiments.values() for claim in experiment.claims]
    assert all(re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)+", claim) for claim in claims)
    plots = [plot.name for experiment in REGISTRY.experiments.values() for plot in experiment.plots]
    assert len(set(plots)) == len(plots)
