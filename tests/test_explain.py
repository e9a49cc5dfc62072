"""The page on one claim."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import pytest

from lab.claims import Tier, VerdictName
from lab.errors import LabError
from lab.explain import flips, page
from lab.study import Study
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def study() -> Study:
    return Study.load("cpu", ROOT)


def fields(text: str) -> dict[str, str]:
    """The page's fields by name, each with the text of its first occurrence."""
    found: dict[str, str] = {}
    name = ""
    for line in text.splitlines()[1:]:
        if line and not line.startswith(" "):
            name = line[:16].strip()
            found.setdefault(name, line[16:])
        elif name:
            found[name] += f" {line.strip()}"
    return found


@pytest.mark.parametrize("claim", ["weights-bytes", "peft-keeps-quality", "model-size-limit"])
def test_a_page_has_what_a_person_asks(study: Study, claim: str) -> None:
    experiment = study.registry.claims[claim][0].name
    found = fields(page(study, claim))
    wanted = [
        "Claim",
        "Counts as true",
        "Verdict",
        "Figures",
        "Elsewhere",
        "Because",
        "Where it flips",
        "Scope",
        "Check",
        "Advice",
    ]
    assert [*wanted, "Plot", "Records", "Source", "Run it again"] == list(found)
    assert found["Claim"].startswith(study.registry.claims[claim][1].statement)
    assert found["Run it again"] == f"rm -r results/cpu/{experiment} && lab study {experiment} --profile cpu"
    assert (ROOT / found["Source"]).is_file()
    assert (ROOT / found["Plot"].strip()).is_file()


def test_a_page_says_what_other_profiles_and_other_machines_found_in_the_same_tier(study: Study) -> None:
    text = fields(page(study, "peft-keeps-quality"))["Elsewhere"]
    for name in ("full", "cpu-epyc"):
        (other,) = [v for v in Study.load(name, ROOT).verdicts if v.claim == "peft-keeps-quality"]
        assert f"{name}: {other.verdict}, " in text
    assert "Elsewhere" not in fields(page(study, "paged-adamw-pages"))


def test_what_a_profile_leaves_out_is_said_to_run_in_another(study: Study) -> None:
    found = fields(page(study, "paged-adamw-pages"))
    assert found["Because"] == "the profile cpu plans no trial of it"
    assert found["Run it again"] == "lab study paged_optimizer --profile gpu"
    found = fields(page(Study.load("gpu", ROOT), "hub-pinned-revision"))
    assert found["Run it again"] == "lab study hub --profile cpu"


def test_records_of_earlier_code_are_said_to_be_so(study: Study, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Code" not in fields(page(study, "weights-bytes"))
    monkeypatch.setattr(Study, "has_other_code", lambda _, experiment: experiment.name == "memory_formulas")
    assert "by earlier code of the lab" in fields(page(study, "weights-bytes"))["Code"]


def test_no_line_is_wider_than_a_terminal(study: Study) -> None:
    for claim in study.registry.claims:
        assert max(map(len, page(study, claim).splitlines())) <= 100


def test_a_claim_without_evidence_says_that_it_was_not_run() -> None:
    found = fields(page(Study.load("gpu", ROOT), "weights-bytes"))
    assert found["Verdict"].startswith("not run")
    assert found["Where it flips"] == "not known: the evidence does not decide"
    assert "Records" not in found
    assert found["Run it again"] == "lab study memory_formulas --profile gpu"


def test_a_rule_flips_within_a_tier_between_tiers_or_nowhere_that_was_measured(study: Study) -> None:
    def told(**verdicts: VerdictName) -> str:
        first = next(v for v in study.verdicts if v.claim == "weights-bytes")
        made = [replace(first, tier=cast(Tier, tier), verdict=verdict) for tier, verdict in verdicts.items()]
        other = Study(study.params, study.registry, study.workspace)
        other.__dict__["verdicts"] = made
        return flips(other, made[0])

    assert told(cpu="supported", sim="supported") == (
        "nowhere in the regimes that were measured; outside them it was not tried"
    )
    assert told(cpu="supported", sim="refuted") == "in the sim tier it is refuted"
    within = "within what was measured: true in one regime and false in another, both named above"
    assert told(cpu="conditional", sim="conditional") == within
    assert told(cpu="conditional", sim="refuted") == f"{within}; in the sim tier it is refuted"
    undecided = "not known: the evidence does not decide"
    assert told(cpu="inconclusive", sim="supported") == f"{undecided}; in the sim tier it is supported"


def test_the_condition_that_a_judge_found_stands_in_the_place_of_the_fixed_words(study: Study) -> None:
    first = next(v for v in study.verdicts if v.claim == "weights-bytes")
    other = Study(study.params, study.registry, study.workspace)

    def told(verdict: VerdictName, elsewhere: VerdictName, condition: str = "from 1,024 tokens on") -> str:
        made = [
            replace(first, tier="cpu", verdict=verdict, flips=condition),
            replace(first, tier="sim", verdict=elsewhere),
        ]
        other.__dict__["verdicts"] = made
        return flips(other, made[0])

    assert told("conditional", "conditional") == "from 1,024 tokens on"
    assert told("supported", "refuted") == "from 1,024 tokens on; in the sim tier it is refuted"
    undecided = "not known: the evidence does not decide"
    assert told("inconclusive", "inconclusive") == f"{undecided}; as far as it goes: from 1,024 tokens on"
    assert told("inconclusive", "inconclusive", "") == undecided
    assert fields(page(other, "weights-bytes"))["Where it flips"] == undecided


def test_trials_without_a_result_are_told(study: Study) -> None:
    first = next(v for v in study.verdicts if v.claim == "weights-bytes")
    other = Study(study.params, study.registry, study.workspace)
    other.__dict__["verdicts"] = [replace(first, unsuccessful=3)]
    assert (
        fields(page(other, "weights-bytes"))["Beware"] == "3 trials gave no result; the verdict counts them as missing"
    )


def test_an_unknown_claim_is_told_with_the_nearest(study: Study) -> None:
    with pytest.raises(LabError, match=r"unknown claim 'weight-bytes'\. Did you mean 'weights-bytes'\? Known: "):
        page(study, "weight-bytes")
