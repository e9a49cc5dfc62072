"""The same claims, measured again on the CUDA device that is here: `pytest -m gpu`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lab.claims import Claim, Experiment, judge
from lab.records import Record
from lab.specs import Sweep
from lab.study import Study
from lab.trials import Progress, run_trials
from lab.workspace import Workspace
from tests.conftest import ROOT

REGISTRY = Study.load("cpu", ROOT).registry
ON_GPU = [(experiment, claim) for experiment, claim in REGISTRY.claims.values() if "gpu" in claim.tiers]


@pytest.fixture(scope="module")
def workspace() -> Workspace:
    """A folder of its own for the records, over the models and data of the project, prepared where they are missing.

    It stays, so that tests that were stopped go on.
    """
    made = Workspace(ROOT, "gpu")
    wanted = {
        "environment": made.environment,
        "model": made.model("smol"),
        "tiny": made.model("tiny"),
        "data": made.data,
    }
    for name, path in wanted.items():
        if not path.exists():
            profile = ["--profile", "gpu"] if name in ("tiny", "data") else []
            subprocess.run([sys.executable, "-m", "lab.cli", "prepare", name, *profile], cwd=ROOT, check=True)
    folder = ROOT / ".lab" / "gpu-tests"
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("build", "lab"):
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(ROOT / name)
    return Workspace(folder, "gpu")


@pytest.mark.gpu
@pytest.mark.timeout(0)  # the first claim of an experiment measures all of it: hours, for some
@pytest.mark.parametrize(("experiment", "claim"), ON_GPU, ids=[claim.id for _, claim in ON_GPU])
def test_the_claim_can_be_judged_on_this_device(experiment: Experiment, claim: Claim, workspace: Workspace) -> None:
    records = [
        record
        for each in (experiment, *map(REGISTRY.experiment, experiment.reads))
        for record in _measure(each, workspace)
    ]
    if not records:
        pytest.skip(f"{experiment.name} has no trial that measures on a device yet; it is simulated only")
    verdict = judge(experiment, claim, "gpu", "gpu", records, len(records))
    numbers = f"{verdict.effect} [{verdict.low}, {verdict.high}] {verdict.unit}, n = {verdict.n}"
    stated = claim.stated.get("gpu")
    assert verdict.verdict != "not run"
    assert stated in (None, verdict.verdict), f"{claim.id}: stated {stated}, found {verdict.verdict}: {numbers}"
    print(f"{claim.id}: {verdict.verdict}: {numbers}; {verdict.because}")


_MEASURED: dict[str, list[Record]] = {}


def _measure(experiment: Experiment, workspace: Workspace) -> list[Record]:
    """The experiment's trials under the `gpu` profile, once for all the claims that they serve."""
    if experiment.name not in _MEASURED:
        study = Study.load("gpu", ROOT)

        def report(record: Record, progress: Progress, was_there: bool) -> None:
            print(f"{progress.done}/{progress.total} {record.spec.name} {record.status}")

        plan = [item for item in study.plan(experiment) if isinstance(item, Sweep) or item.tier is None]
        card = study.require_device()
        shortfall = study.forecast(card).shortfall if card else None
        _MEASURED[experiment.name] = run_trials(
            plan, workspace, study.profile.threads, "cuda", report, print, shortfall=shortfall
        )
    return _MEASURED[experiment.name]


def test_without_a_gpu_the_gpu_profile_says_what_it_needs(root: Path) -> None:
    from lab.errors import LabError
    from tests.conftest import cuda_found

    if cuda_found():
        pytest.skip("needs a machine without a CUDA GPU; this one has one")
    with pytest.raises(LabError, match=r"profile 'gpu' needs a CUDA GPU; torch .* finds none"):
        Study.load("gpu", root).require_device()
