"""What parameter-efficient methods cost: evidence against a claim refutes it; its known answer is right on any evidence."""

from __future__ import annotations

import pytest

from experiments.peft_cost import AMOUNTS, EXPERIMENT
from lab.claims import Claim, Evidence, Tier, in_tier, judge, judge_controls
from lab.records import Record
from lab.specs import TrialSpec
from lab.study import Study
from tests.conftest import ROOT
from tests.test_records import make_record

FEW, MEMORY = EXPERIMENT.claims

EVERYWHERE = pytest.mark.parametrize(
    ("claim", "profile", "tier"),
    [
        *((claim, *where) for claim in (FEW, MEMORY) for where in (("smoke", "cpu"), ("cpu", "cpu"), ("full", "sim"))),
        (MEMORY, "gpu", "gpu"),
    ],
    ids=lambda value: value.id if isinstance(value, Claim) else value,
)


def records(profile: str, **figures: float | None) -> list[Record]:
    """One of each trial that is planned, all with the same figures."""
    plan = Study.load(profile, ROOT).plan(EXPERIMENT)
    return [make_record(spec, figures=figures) for spec in plan if isinstance(spec, TrialSpec)]


@EVERYWHERE
def test_methods_that_train_and_take_what_full_fine_tuning_does_refute_the_claim(
    claim: Claim, profile: str, tier: Tier
) -> None:
    found = records(profile, **dict.fromkeys(("parameters_base", *AMOUNTS), 8e6))
    said = judge(EXPERIMENT, claim, profile, tier, found, len(found))
    assert said.verdict == "refuted", said.because
    assert said.control == "full fine-tuning as every method: refuted, a hundredth of it as every method: supported"


@pytest.mark.parametrize("tier", ["cpu", "sim"])
@pytest.mark.parametrize("claim", [FEW, MEMORY], ids=lambda claim: claim.id)
def test_a_planted_fault_that_is_the_evidence_refutes_the_claim(claim: Claim, tier: Tier) -> None:
    measured = in_tier(Study.load("cpu", ROOT).evidence("peft_cost")[0], tier)
    planted = claim.controls["full fine-tuning as every method"].change(Evidence(measured)).records
    said = judge(EXPERIMENT, claim, "cpu", tier, planted, len(planted))
    assert said.verdict == "refuted", said.because
    assert said.control.endswith(", a hundredth of it as every method: supported")


@EVERYWHERE
def test_the_known_answer_needs_no_figure_that_was_measured(claim: Claim, profile: str, tier: Tier) -> None:
    nothing = Evidence(in_tier(records(profile), tier))
    assert judge_controls(claim, nothing)["a hundredth of it as every method"] == "supported"


@pytest.mark.parametrize(("claim", "arm"), [(FEW, "count-full"), (MEMORY, "peak-full")], ids=["few", "memory"])
def test_a_known_answer_whose_records_are_missing_was_not_run(claim: Claim, arm: str) -> None:
    others = Evidence(r for r in records("smoke") if r.spec.arm != arm)
    assert judge_controls(claim, others)["a hundredth of it as every method"] == "not run"
