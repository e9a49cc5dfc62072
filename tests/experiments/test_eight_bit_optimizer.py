"""The judges of the 8-bit optimizer on made-up records of every plan: each claim can be refuted, and the controls show it."""

from __future__ import annotations

import pytest

from experiments.eight_bit_optimizer import EXPERIMENT
from lab.claims import Claim, Evidence, Tier, in_tier, judge
from lab.records import Record
from lab.specs import TrialSpec
from tests.experiments import known_answers


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


EVERYWHERE = known_answers.everywhere(EXPERIMENT, measured)


@pytest.mark.parametrize(("claim", "tier", "found"), EVERYWHERE)
def test_a_claim_that_does_not_hold_is_refuted_and_then_a_control_says_otherwise(
    claim: Claim, tier: Tier, found: list[Record]
) -> None:
    known_answers.assert_its_fault_refutes(EXPERIMENT, claim, tier, found, "supported")


@pytest.mark.parametrize(
    "state",
    [
        {"optimizer_state_bytes": 900.0},  # 3 a parameter: six with the weights in large matrices alone
        {"optimizer_state_bytes": 600.0, "state_large_bytes": 600.0},  # six in two ways, each in one place
    ],
)
def test_six_bytes_in_one_place_alone_are_a_condition(state: dict[str, float]) -> None:
    found = in_tier(known_answers.planned(EXPERIMENT, "cpu", measured), "cpu")
    changed = Evidence(found).with_figures(lambda r: state if r.spec.arm in ("fp32", "lora") else {}).records
    said = judge(EXPERIMENT, EXPERIMENT.claims[0], "made-up", "cpu", changed, len(changed))
    assert said.verdict == "conditional"


@pytest.mark.parametrize(("claim", "tier", "found"), EVERYWHERE)
def test_the_known_answer_is_supported_whatever_was_measured(claim: Claim, tier: Tier, found: list[Record]) -> None:
    known_answers.assert_known_whatever_was_measured(claim, found)


@pytest.mark.parametrize(("claim", "tier", "found"), EVERYWHERE)
def test_the_known_answer_is_not_run_without_the_records_that_the_judge_needs(
    claim: Claim, tier: Tier, found: list[Record]
) -> None:
    known_answers.assert_known_where_the_judge_can_work(claim, found)
