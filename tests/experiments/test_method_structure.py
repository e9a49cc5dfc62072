"""The controls of what each method is: a fault that is the evidence refutes, beside a known answer that never does."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.method_structure import ARMS, EXPERIMENT
from lab.claims import Claim, Evidence, Verdict, judge, judge_controls
from tests.test_structure import FAULTS, GOOD, HONEST, JUDGED, SEEDS, record

CLAIMS = {claim.id: claim for claim in EXPERIMENT.claims}
METHODS = {claim.id: name for claim in CLAIMS.values() for name, found in JUDGED.items() if claim.judge is found[0]}
KNOWN = "by the definition"
PLANTED = [(id, name) for id, claim in CLAIMS.items() for name in claim.controls if name != KNOWN]
# Whether a projection is stored is told by comparing records: not where it is stored in all of them.
FAILING = [(id, fault) for id in CLAIMS for fault, said in FAULTS[METHODS[id]] if "projection" not in said]
PLAIN = {"layers": 4, "layers_of_own": 0, "queries_in_front": 0, "keys_in_front": 0, "coupled": 0}
FULL = GOOD | {"trained_outside": 100, "base_moved": 1e-3, "parameters_closed_form": None, "merges": 0}


def good() -> Evidence:
    """Every method as its definition says, and full fine-tuning."""
    made = {arm: HONEST.get(method, FULL) for arm, (method, _, _) in ARMS.items()}
    return Evidence(record(arm, seed, PLAIN | figures) for arm, figures in made.items() for seed in SEEDS)


def verdict(claim: Claim, evidence: Evidence) -> Verdict:
    return judge(EXPERIMENT, claim, "cpu", "cpu", evidence.records, len(evidence))


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_a_method_that_is_what_its_definition_says_is_supported(claim: Claim) -> None:
    found = verdict(claim, good())
    assert found.verdict == "supported"
    assert f"{KNOWN}: supported" in found.control


@pytest.mark.parametrize(("id", "fault"), PLANTED)
def test_a_claim_whose_planted_fault_is_the_evidence_is_refuted(id: str, fault: str) -> None:
    claim = CLAIMS[id]
    found = verdict(claim, claim.controls[fault].change(good()))
    assert found.verdict == "refuted", found.because
    assert f"{KNOWN}: supported" in found.control


@pytest.mark.parametrize(("id", "fault"), FAILING)
def test_a_claim_of_which_one_fact_fails_in_every_trial_is_refuted(id: str, fault: dict[str, Any]) -> None:
    _, arms = JUDGED[METHODS[id]]
    found = verdict(CLAIMS[id], good().with_figures(lambda r: fault if r.spec.arm in arms else {}))
    assert found.verdict == "refuted", found.because
    assert f"{KNOWN}: supported" in found.control


@pytest.mark.parametrize("claim", CLAIMS.values(), ids=CLAIMS)
def test_the_known_answer_needs_no_figure_that_was_measured_and_every_arm(claim: Claim) -> None:
    nothing = Evidence(r.model_copy(update={"figures": {}}) for r in good().records)
    assert judge_controls(claim, nothing)[KNOWN] == "supported"
    for missing in JUDGED[METHODS[claim.id]][1]:
        rest = Evidence(r for r in good().records if r.spec.arm != missing)
        assert judge_controls(claim, rest)[KNOWN] == "not run"
