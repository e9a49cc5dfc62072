"""The judges of the memory formulas on made-up records of every plan: each rule can be refuted, and the controls show it."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.memory_formulas import EXPERIMENT, PROMISED_BYTES
from lab.claims import Claim, Tier, VerdictName
from lab.records import Record
from lab.specs import TrialSpec
from tests.experiments import known_answers

STATED: dict[str, VerdictName] = {"weights-bytes": "supported", "batch-and-length-drive-activations": "supported"}
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


EVERYWHERE = known_answers.everywhere(EXPERIMENT, measured)


def test_both_tiers_are_judged() -> None:
    assert len(EVERYWHERE) == 4 * 5  # smoke has nothing in the sim tier


@pytest.mark.parametrize(("claim", "tier", "found"), EVERYWHERE)
def test_a_rule_that_does_not_hold_is_refuted_and_then_a_control_supports(
    claim: Claim, tier: Tier, found: list[Record]
) -> None:
    stated = STATED.get(claim.id, "conditional")
    known_answers.assert_its_fault_refutes(EXPERIMENT, claim, tier, found, stated)


@pytest.mark.parametrize(("claim", "tier", "found"), EVERYWHERE)
def test_the_known_answer_is_supported_whatever_was_measured(claim: Claim, tier: Tier, found: list[Record]) -> None:
    known_answers.assert_known_whatever_was_measured(claim, found)


@pytest.mark.parametrize(("claim", "tier", "found"), EVERYWHERE)
def test_the_known_answer_is_not_run_without_the_records_that_the_judge_needs(
    claim: Claim, tier: Tier, found: list[Record]
) -> None:
    known_answers.assert_known_where_the_judge_can_work(claim, found)
