"""The judges of the memory formulas on made-up records of every plan: each rule can be refuted, and the controls show it."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.memory_formulas import EXPERIMENT, PROMISED_BYTES
from lab.claims import Claim, Evidence, MissingEvidence, Tier, Verdict, in_tier, judge, judge_controls
from lab.records import Record
from lab.specs import TrialSpec
from lab.study import Study
from tests.conftest import ROOT
from tests.test_records import make_record

STATED = {"weights-bytes": "supported", "batch-and-length-drive-activations": "supported"}
STATE_BYTES = {"bf16": 400.0, "bf16-master": 1200.0, "lora": 8.0}


def measured(spec: TrialSpec) -> dict[str, float]:
    """What a model of 100 parameters leaves, one of them LoRA's."""
    settings: Any = spec.settings
    weights = 100.0 * PROMISED_BYTES.get(settings.precision, 4)
    gradients = weights / 100 if spec.arm == "lora" else weights
    return {
        "parameters_total": 100.0,
        "parameters_trainable": 1.0 if spec.arm == "lora" else 100.0,
        "weights_bytes": weights * 1.2 if spec.arm == "untied" else weights,
        "gradients_bytes": gradients,
        "gradients_between_bytes": gradients,
        "gradients_after_bytes": 0.0,
        "optimizer_state_bytes": STATE_BYTES.get(spec.arm, 800.0),
        "step_temporary_bytes": 0.0,
        "activations_bytes": 64.0 * settings.batch * settings.length,
        "logits_bytes": 16.0 * settings.batch * settings.length,
        "vocabulary": 500.0,
    }


def planned(profile: str) -> list[Record]:
    study = Study.load(profile, ROOT)
    specs = study.planned(study.registry.experiment(EXPERIMENT.name))
    return [make_record(spec, figures=measured(spec)) for spec in specs]


RECORDS = {profile: planned(profile) for profile in ("smoke", "cpu", "full")}
EVERYWHERE = [
    pytest.param(claim, tier, in_tier(found, tier), id=f"{claim.id}-{tier}-{profile}")
    for claim in EXPERIMENT.claims
    for profile, found in RECORDS.items()
    for tier in ("sim", "cpu")
    if in_tier(found, tier)
]


def verdict(claim: Claim, tier: Tier, found: list[Record]) -> Verdict:
    return judge(EXPERIMENT, claim, "made-up", tier, found, len(found))


def test_both_tiers_are_judged() -> None:
    assert len(EVERYWHERE) == 4 * 5  # smoke has nothing in the sim tier


@pytest.mark.parametrize(("claim", "tier", "found"), EVERYWHERE)
def test_a_rule_that_does_not_hold_is_refuted_and_then_a_control_supports(
    claim: Claim, tier: Tier, found: list[Record]
) -> None:
    assert verdict(claim, tier, found).verdict == STATED.get(claim.id, "conditional")
    fault, known = claim.controls
    refuted = verdict(claim, tier, claim.controls[fault].change(Evidence(found)).records)
    assert refuted.verdict == "refuted"
    assert refuted.control == f"{fault}: refuted, {known}: supported"


@pytest.mark.parametrize(("claim", "tier", "found"), EVERYWHERE)
def test_the_known_answer_is_supported_whatever_was_measured(claim: Claim, tier: Tier, found: list[Record]) -> None:
    nothing = Evidence(record.model_copy(update={"figures": {}}) for record in found)
    assert [*judge_controls(claim, nothing).values()][-1] == "supported"


@pytest.mark.parametrize(("claim", "tier", "found"), EVERYWHERE)
def test_the_known_answer_is_not_run_without_the_records_that_the_judge_needs(
    claim: Claim, tier: Tier, found: list[Record]
) -> None:
    for arm in {record.spec.arm for record in found}:
        without = Evidence(record for record in found if record.spec.arm != arm)
        expected = "supported"
        try:
            claim.judge(without)
        except MissingEvidence:
            expected = "not run"
        assert [*judge_controls(claim, without).values()][-1] == expected, arm
