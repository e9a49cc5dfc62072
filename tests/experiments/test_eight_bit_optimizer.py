"""The judges of the 8-bit optimizer on made-up records of every plan: each claim can be refuted, and the controls show it."""

from __future__ import annotations

import pytest

from experiments.eight_bit_optimizer import EXPERIMENT
from lab.claims import Claim, Evidence, MissingEvidence, Tier, Verdict, in_tier, judge, judge_controls
from lab.records import Record
from lab.specs import TrialSpec
from lab.study import Study
from tests.conftest import ROOT
from tests.test_records import make_record


def measured(spec: TrialSpec) -> dict[str, float]:
    """A little over 2 bytes of state for each parameter, and 8 of 32 bits; the loss of AdamW but for 1 % of its progress."""
    held = 8.0 if spec.arm == "control-bytes" else 2.05
    state = {f"state_{kind}_bytes": 100 * held for kind in ("large", "small", "embedding")}
    return {
        **state,
        **{f"parameters_{kind}": 100.0 for kind in ("large", "small", "embedding")},
        "parameters_trainable": 300.0,
        "optimizer_state_bytes": sum(state.values()),
        "base_test_loss": 3.0,
        "first_test_loss": 1.0,
        "second_test_loss": 2.5 if spec.arm == "control-slow" else 1.02,
        "distance": 0.3,
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
    for tier in claim.tiers
    if tier != "gpu"
]


def verdict(claim: Claim, tier: Tier, found: list[Record]) -> Verdict:
    return judge(EXPERIMENT, claim, "made-up", tier, found, len(found))


@pytest.mark.parametrize(("claim", "tier", "found"), EVERYWHERE)
def test_a_claim_that_does_not_hold_is_refuted_and_then_a_control_says_otherwise(
    claim: Claim, tier: Tier, found: list[Record]
) -> None:
    assert verdict(claim, tier, found).verdict == "supported"
    fault, known = claim.controls
    refuted = verdict(claim, tier, claim.controls[fault].change(Evidence(found)).records)
    assert refuted.verdict == "refuted"
    assert refuted.control == f"{fault}: refuted, {known}: supported"


def test_six_bytes_in_large_matrices_alone_are_a_condition() -> None:
    claim, found = EXPERIMENT.claims[0], in_tier(RECORDS["cpu"], "cpu")
    dear = Evidence(found).with_figures(lambda r: {"optimizer_state_bytes": 3 * r.figure("parameters_trainable")})
    assert verdict(claim, "cpu", dear.records).verdict == "conditional"


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
