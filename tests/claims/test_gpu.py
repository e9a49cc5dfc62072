"""The same claims, measured again on the CUDA device that is here: `pytest -m gpu`."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.claims import Claim, Experiment, judge
from lab.records import Record
from lab.study import Study
from lab.trials import Progress, run_trials
from lab.workspace import Workspace
from tests.conftest import ROOT

REGISTRY = Study.load("cpu", ROOT).registry
ON_GPU = [(experiment, claim) for experiment, claim in REGISTRY.claims.values() if "gpu" in claim.tiers]


@pytest.mark.gpu
@pytest.mark.parametrize(("experiment", "claim"), ON_GPU, ids=[claim.id for _, claim in ON_GPU])
def test_the_claim_can_be_judged_on_this_device(experiment: Experiment, claim: Claim, tmp_path_factory: object) -> None:
    records = _measure(experiment)
    verdict = judge(experiment, claim, "gpu", "gpu", records, len(records))
    assert verdict.verdict in ("supported", "refuted", "conditional"), (
        f"{claim.id}: {verdict.verdict}; {verdict.because}"
    )


_MEASURED: dict[str, list[Record]] = {}


def _measure(experiment: Experiment) -> list[Record]:
    """The experiment's trials under the `gpu` profile, once for all its claims."""
    if experiment.name not in _MEASURED:
        study = Study.load("gpu", ROOT)
        study.require_device()

        def report(record: Record, progress: Progress, was_there: bool) -> None:
            print(f"{progress.done}/{progress.total} {record.spec.name} {record.status}")

        _MEASURED[experiment.name] = run_trials(
            study.plan(experiment), Workspace(ROOT, "gpu"), study.profile.threads, "cuda", report, print
        )
    return _MEASURED[experiment.name]


def test_without_a_gpu_the_gpu_profile_says_what_it_needs(root: Path) -> None:
    from lab.errors import LabError
    from tests.conftest import cuda_found

    if cuda_found():
        pytest.skip("needs a machine without a CUDA GPU; this one has one")
    with pytest.raises(LabError, match=r"profile 'gpu' needs a CUDA GPU; torch .* finds none"):
        Study.load("gpu", root).require_device()
