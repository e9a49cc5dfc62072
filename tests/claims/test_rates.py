"""In-context learning is held against LoRA, at the rate that the sweep over methods chose."""

from __future__ import annotations

import pytest

from lab.claims import Evidence
from lab.study import Study
from lab.sweeps import best_rate
from tests.conftest import ROOT


@pytest.mark.parametrize("profile", ["cpu", "full"])
def test_in_context_tunes_at_the_rate_that_the_sweep_chose(profile: str) -> None:
    study = Study.load(profile, ROOT)
    swept = Evidence(study.evidence("peft_vs_full")[0])
    planned = study.planned(study.registry.experiment("in_context"))
    rates = {spec.arm: getattr(spec.settings, "learning_rate", None) for spec in planned}
    there = {record.spec.arm for record in swept.records} & rates.keys()
    if not there:
        pytest.skip(f"peft_vs_full has not run under the profile {profile}")
    assert {arm: rates[arm] for arm in there} == {arm: best_rate(swept.attempts(arm)) for arm in there}


@pytest.mark.parametrize("profile", ["smoke", "cpu", "full", "gpu"])
def test_in_context_is_held_against_lora_alone_as_its_scope_says(profile: str) -> None:
    study = Study.load(profile, ROOT)
    experiment = study.registry.experiment("in_context")
    planned = study.planned(experiment)
    assert planned
    assert {method for spec in planned for method in spec.methods()} == {"lora"}
    assert "tuned by LoRA alone" in experiment.claims[0].scope
