"""What the tests of a known answer share: records of every plan, and what is asked of each claim on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from lab.claims import Claim, Evidence, Experiment, MissingEvidence, Tier, VerdictName, in_tier, judge, judge_controls
from lab.records import Record
from lab.specs import TrialSpec
from lab.study import Study
from tests.conftest import ROOT
from tests.test_records import make_record

Measured = Callable[[TrialSpec], dict[str, float]]


def planned(experiment: Experiment, profile: str, measured: Measured) -> list[Record]:
    """A record of each trial of a profile, with the figures that `measured` makes up."""
    study = Study.load(profile, ROOT)
    return [
        make_record(spec, figures=measured(spec)) for spec in study.planned(study.registry.experiment(experiment.name))
    ]


def everywhere(experiment: Experiment, measured: Measured) -> list[Any]:
    """(claim, tier, records) of each claim, in each profile and tier that runs without a GPU."""
    records = {profile: planned(experiment, profile, measured) for profile in ("smoke", "cpu", "full")}
    return [
        pytest.param(claim, tier, in_tier(found, tier), id=f"{claim.id}-{tier}-{profile}")
        for claim in experiment.claims
        for profile, found in records.items()
        for tier in claim.tiers
        if tier != "gpu" and in_tier(found, tier)
    ]


def assert_its_fault_refutes(
    experiment: Experiment, claim: Claim, tier: Tier, found: list[Record], stated: VerdictName
) -> None:
    """The records give `stated`; the planted fault as the evidence is refuted, and stands by the known answer."""
    assert judge(experiment, claim, "made-up", tier, found, len(found)).verdict == stated
    fault, known = claim.controls
    planted = claim.controls[fault].change(Evidence(found)).records
    refuted = judge(experiment, claim, "made-up", tier, planted, len(planted))
    assert refuted.verdict == "refuted"
    assert refuted.control == f"{fault}: refuted, {known}: supported"


def assert_known_whatever_was_measured(claim: Claim, found: list[Record]) -> None:
    """The last control, which is the known answer, is supported without any figure of the records."""
    nothing = Evidence(record.model_copy(update={"figures": {}}) for record in found)
    assert [*judge_controls(claim, nothing).values()][-1] == "supported"


def assert_known_where_the_judge_can_work(claim: Claim, found: list[Record]) -> None:
    """Without an arm the known answer is `not run` if the judge needs it, and supported if not."""
    for arm in {record.spec.arm for record in found}:
        without = Evidence(record for record in found if record.spec.arm != arm)
        expected = "supported"
        try:
            claim.judge(without)
        except MissingEvidence:
            expected = "not run"
        assert [*judge_controls(claim, without).values()][-1] == expected, arm
