"""Claims: what a judge is given, what becomes of its answer, and what happens where the evidence is not whole."""

from __future__ import annotations

import importlib.util
import shutil
import sys
import types
from collections.abc import Callable
from dataclasses import fields, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from lab import records
from lab.claims import (
    DECIDED,
    Cell,
    Claim,
    Control,
    Evidence,
    Experiment,
    Finding,
    MissingEvidence,
    Registry,
    Tier,
    Verdict,
    VerdictName,
    discover,
    distrust,
    in_words,
    judge,
)
from lab.errors import LabError
from lab.memory.ledger import Parts
from lab.memory.workload import PHASES
from lab.origin import shape_fingerprint
from lab.params import Count, Profile, Section
from lab.plots import Line, Plot, draw
from lab.records import Record
from lab.specs import Adapters, InContext, Memory, Setup, Training, TrialSpec
from lab.statistics import Interval
from lab.study import Study
from lab.sweeps import expand
from tests.conftest import ROOT
from tests.test_records import make_record

REGISTRY = discover()


def trial(arm: str, seed: int = 0, figure: float = 1.0, **changes: Any) -> Record:
    """A record of the arm with one figure, `score`."""
    spec = TrialSpec(experiment="mine", name=f"{arm}-{seed}", arm=arm, settings=Memory(model="llama-6m", seed=seed))
    return make_record(spec, figures={"score": figure}, **changes)


def high_scores(evidence: Evidence) -> Finding:
    """Supported if every score of `real` is above 0.5."""
    scores = [r.figure("score") for r in evidence.select("real")]
    verdict: VerdictName = "supported" if min(scores) > 0.5 else "refuted"
    return Finding(verdict, scores[0], min(scores), max(scores), "points", len(scores), "scores are what they are")


def planted(evidence: Evidence) -> Evidence:
    return evidence.replace("real", by="fault")


def known(evidence: Evidence) -> Evidence:
    return evidence.with_figures(lambda record: {"score": 1.0})


FAULT, KNOWN = Control(planted, "refuted"), Control(known, "supported")


CLAIM = Claim(
    id="scores-are-high",
    statement="scores are high",
    lecture="1",
    tiers=("cpu",),
    threshold="above 0.5",
    scope="the test",
    judge=high_scores,
    controls={"a planted fault": FAULT, "a known answer": KNOWN},
    advice={"supported": "Rely on it.", "refuted": "Do not rely on it.", "inconclusive": "Measure it yourself."},
)


class MyParams(Section):
    seeds: Count


def my_trials(params: MyParams, profile: Profile) -> list[TrialSpec]:
    return [trial("real", seed).spec for seed in range(params.seeds)]


MINE = Experiment(name="mine", title="Mine", params=MyParams, trials=my_trials, claims=(CLAIM,))

GOOD = [trial("real", seed, 0.9) for seed in range(3)]
FAULTS = [trial("fault", seed, 0.1) for seed in range(3)]


def judged(found: list[Record], claim: Claim = CLAIM, planned: int | None = None) -> Verdict:
    return judge(MINE, claim, "cpu", "cpu", found, len(found) if planned is None else planned)


# Evidence -------------------------------------------------------------------------------------------------------


def test_select_gives_the_successful_records_of_an_arm_in_the_order_of_their_seeds() -> None:
    found = [trial("real", 10), trial("real", 2), trial("fault", 1), trial("real", 3, status="diverged")]
    evidence = Evidence(found)
    assert [r.setting("seed") for r in evidence.select("real")] == [2, 10]
    assert [r.setting("seed") for r in evidence.select(seed=1)] == [1]
    assert [r.setting("seed") for r in evidence.select("real", seed=10, model="llama-6m")] == [10]
    assert len(evidence) == 4
    assert [r.status for r in evidence.unsuccessful] == ["diverged"]


def test_select_never_gives_nothing_and_says_what_it_looked_for() -> None:
    evidence = Evidence([trial("real", 3, status="oom")])
    with pytest.raises(MissingEvidence, match="no successful record with arm real, seed 3"):
        evidence.select("real", seed=3)
    assert not evidence.has("real")
    assert Evidence(GOOD).has("real", seed=2)
    assert not Evidence(GOOD).has("real", seed=5)


def test_replace_puts_one_arm_in_the_place_of_another_and_leaves_the_evidence_alone() -> None:
    evidence = Evidence([*GOOD, *FAULTS])
    changed = evidence.replace("real", by="fault")
    assert [r.figure("score") for r in changed.select("real")] == [0.1] * 3
    assert [r.figure("score") for r in changed.select("fault")] == [0.1] * 3
    assert [r.figure("score") for r in evidence.select("real")] == [0.9] * 3
    with pytest.raises(MissingEvidence, match="arm other"):
        evidence.replace("real", by="other")


def test_other_figures_stand_beside_and_in_place_of_a_record_s_own_and_leave_the_evidence_alone() -> None:
    evidence = Evidence([*GOOD, *FAULTS])
    changed = evidence.with_figures(lambda r: {"score": 0.2, "more": 1.0} if r.spec.arm == "real" else {})
    assert [r.figures for r in changed.select("real")] == [{"score": 0.2, "more": 1.0}] * 3
    assert changed.select("fault") == evidence.select("fault")
    assert [r.figures for r in evidence.select("real")] == [{"score": 0.9}] * 3


def test_cells_are_told_by_their_answer() -> None:
    one = Interval(1.0, 0.5, 1.5, 3)
    cells = [Cell("a", one, "no"), Cell("b", one, "yes"), Cell("c", one, "no")]
    assert in_words("smaller", cells, lambda i: f"{i.estimate:g}") == "smaller (yes: b 1; no: a 1, c 1)"


# Judging --------------------------------------------------------------------------------------------------------


def test_a_verdict_carries_the_finding_the_claim_and_where_it_was_measured() -> None:
    verdict = judged([*GOOD, *FAULTS])
    assert (verdict.verdict, verdict.effect, verdict.low, verdict.high, verdict.n) == ("supported", 0.9, 0.9, 0.9, 3)
    assert (verdict.claim, verdict.experiment, verdict.tier, verdict.profile) == (
        "scores-are-high",
        "mine",
        "cpu",
        "cpu",
    )
    assert verdict.advice == "Rely on it."
    assert verdict.scope == "the test; A processor, 2 threads; torch 2.13.0, transformers 5.23.0"
    assert verdict.control == "a planted fault: refuted, a known answer: supported"
    assert verdict.records == tuple(f"mine/{r.spec.name}" for r in [*GOOD, *FAULTS])
    assert judged([trial("real", 0, 0.2), trial("fault", 0, 0.1)]).verdict == "refuted"


def test_a_planted_fault_that_is_not_seen_makes_the_verdict_inconclusive() -> None:
    verdict = judged([*GOOD, *(trial("fault", seed, 0.8) for seed in range(3))])
    assert verdict.verdict == "inconclusive"
    assert verdict.effect is None
    assert verdict.because == (
        "the check is not to be trusted (control a planted fault gave supported, should give refuted)"
    )
    assert verdict.control == "a planted fault: supported, a known answer: supported"
    assert verdict.advice == "Measure it yourself."


def test_a_known_answer_that_is_judged_otherwise_makes_the_verdict_inconclusive() -> None:
    wrong = Control(lambda evidence: evidence.with_figures(lambda record: {"score": 0.4}), "supported")
    verdict = judged([*GOOD, *FAULTS], replace(CLAIM, controls={"a planted fault": FAULT, "a known answer": wrong}))
    assert verdict.verdict == "inconclusive"
    assert verdict.because == (
        "the check is not to be trusted (control a known answer gave refuted, should give supported)"
    )


def test_a_control_that_must_decide_nothing_makes_the_verdict_inconclusive_where_it_does() -> None:
    silent = Control(known, ("inconclusive", "refuted"))
    verdict = judged([*GOOD, *FAULTS], replace(CLAIM, controls={"a planted fault": FAULT, "nothing there": silent}))
    assert verdict.because == (
        "the check is not to be trusted (control nothing there gave supported, should give inconclusive or refuted)"
    )
    nothing = Control(lambda evidence: Evidence([]), ("inconclusive", "refuted"))
    fine = judged([*GOOD, *FAULTS], replace(CLAIM, controls={"a planted fault": FAULT, "nothing there": nothing}))
    assert (fine.verdict, fine.control) == ("supported", "a planted fault: refuted, nothing there: inconclusive")


def test_without_a_planted_fault_that_could_be_tried_nothing_stands() -> None:
    untried = "the check is not to be trusted (no planted fault could be tried)"
    assert judged(GOOD).because == untried
    assert judged(GOOD).control == "a planted fault: not run, a known answer: supported"
    low = [trial("real", seed, 0.2) for seed in range(3)]
    assert judged(low).because == untried  # though the known answer is judged otherwise
    assert judged([*GOOD, *FAULTS], replace(CLAIM, controls={})).because == untried


def test_a_control_whose_records_are_missing_does_not_count_where_another_fault_was_tried() -> None:
    elsewhere = Control(lambda evidence: evidence.replace("real", by="of another tier"), "refuted")
    verdict = judged([*GOOD, *FAULTS], replace(CLAIM, controls={"elsewhere": elsewhere, "a planted fault": FAULT}))
    assert (verdict.verdict, verdict.control) == ("supported", "elsewhere: not run, a planted fault: refuted")


def test_a_control_without_the_arms_that_it_needs_was_not_run() -> None:
    needy = Control(known, "supported", needs=("real", "of another tier"))
    verdict = judged([*GOOD, *FAULTS], replace(CLAIM, controls={"a known answer": needy, "a planted fault": FAULT}))
    assert (verdict.verdict, verdict.control) == ("supported", "a known answer: not run, a planted fault: refuted")


def test_a_verdict_that_every_control_gives_too_does_not_stand() -> None:
    low = [trial("real", seed, 0.2) for seed in range(3)]
    verdict = judged([*low, *FAULTS], replace(CLAIM, controls={"a planted fault": FAULT}))
    assert verdict.verdict == "inconclusive"
    assert verdict.because == "the check is not to be trusted (every control gave refuted too)"
    assert judged([*low, *FAULTS]).verdict == "refuted"


def test_controls_run_where_nothing_is_decided_and_decide_nothing() -> None:
    def undecided(evidence: Evidence) -> Finding:
        found = high_scores(evidence)
        return replace(found, verdict="inconclusive") if found.effect == 0.9 else found

    verdict = judged([*GOOD, *FAULTS], replace(CLAIM, judge=undecided))
    assert (verdict.verdict, verdict.effect, verdict.because) == ("inconclusive", 0.9, "scores are what they are")
    assert verdict.control == "a planted fault: refuted, a known answer: supported"


def test_without_records_a_claim_was_not_run() -> None:
    verdict = judged([], planned=6)
    assert (verdict.verdict, verdict.n, verdict.effect, verdict.records) == ("not run", 0, None, ())
    assert verdict.because == "nothing has been measured under the profile cpu"
    assert verdict.advice == "Measure it yourself."  # what to do while nothing is decided
    assert judged([], planned=0).because == "the profile cpu plans no trial of it"


def test_a_tier_that_the_claim_does_not_name_is_not_judged() -> None:
    verdict = judge(MINE, CLAIM, "gpu", "gpu", [*GOOD, *FAULTS], 6)
    assert (verdict.verdict, verdict.because) == ("not run", "this claim has no gpu tier")


def test_the_condition_that_a_judge_names_is_the_verdict_s_unless_the_check_is_not_to_be_trusted() -> None:
    def naming(evidence: Evidence) -> Finding:
        return replace(high_scores(evidence), flips="above 0.5 points")

    claim = replace(CLAIM, judge=naming)
    assert judged([*GOOD, *FAULTS]).flips == ""
    assert judged([*GOOD, *FAULTS], claim).flips == "above 0.5 points"
    assert judged(GOOD, claim).flips == ""
    assert judged([], claim).flips == ""
    interval = Interval(1.0, 0.5, 1.5, 3)
    assert Finding.of("supported", interval, "points", "why", "above 0.5 points").flips == "above 0.5 points"
    assert Finding.of("supported", interval, "points", "why") == Finding("supported", 1.0, 0.5, 1.5, "points", 3, "why")


def test_evidence_without_the_arm_is_inconclusive_and_says_what_is_missing() -> None:
    verdict = judged(FAULTS, planned=6)
    assert verdict.verdict == "inconclusive"
    assert verdict.because == "no successful record with arm real; 3 of 6 trials are missing"


def test_trials_without_a_result_are_counted() -> None:
    verdict = judged([*GOOD, *FAULTS, trial("real", 8, status="oom"), trial("real", 9, status="failed")])
    assert (verdict.verdict, verdict.n, verdict.unsuccessful) == ("supported", 3, 2)


@pytest.mark.parametrize("fault", [ValueError("three points are needed"), KeyError(128), ZeroDivisionError("by zero")])
def test_a_judge_that_cannot_work_on_what_is_there_is_inconclusive_and_says_why(fault: Exception) -> None:
    def stumble(_: Evidence) -> Finding:
        raise fault

    verdict = judged(GOOD, replace(CLAIM, judge=stumble))
    assert verdict.verdict == "inconclusive"
    assert str(fault) in verdict.because


def test_a_record_without_the_figure_is_inconclusive() -> None:
    verdict = judged([make_record(GOOD[0].spec, figures={"other": 1.0}), *FAULTS])
    assert verdict.verdict == "inconclusive"
    assert verdict.because == "record mine/real-0: no figure 'score'. It has: other."


def test_a_verdict_has_what_the_contract_names() -> None:
    contract = [
        "claim",
        "experiment",
        "tier",
        "profile",
        "verdict",
        "effect",
        "low",
        "high",
        "unit",
        "n",
        "threshold",
        "scope",
        "advice",
        "records",
    ]
    assert set(contract) <= {field.name for field in fields(Verdict)}


# Registry -------------------------------------------------------------------------------------------------------


def profile_with(**sections: Any) -> Profile:
    sizes = {"train": 1, "validation": 1, "test": 1}
    return Profile.model_validate({"device": "cpu", "threads": 1, "tiny": {}, "data": sizes, **sections})


def test_an_unknown_experiment_names_the_nearest() -> None:
    with pytest.raises(LabError, match=r"unknown experiment 'mien'\. Did you mean 'mine'\?"):
        Registry({"mine": MINE}).experiment("mien")


def test_one_claim_in_two_experiments_is_refused() -> None:
    with pytest.raises(LabError, match=r"claim 'scores-are-high' is in two experiments\. Give each its own id"):
        _ = Registry({"mine": MINE, "other": replace(MINE, name="other")}).claims


def test_two_trials_of_one_name_are_refused() -> None:
    twice = replace(MINE, trials=lambda params, profile: my_trials(params, profile) * 2)
    with pytest.raises(LabError, match=r"experiments/mine\.py: two trials are called 'real-0'"):
        twice.plan(profile_with(mine={"seeds": 1}), "params.yaml: profiles.cpu")


def test_a_profile_that_leaves_an_experiment_out_plans_nothing_for_it() -> None:
    assert MINE.plan(profile_with(), "here") == []
    assert len(MINE.plan(profile_with(mine={"seeds": 3}), "here")) == 3


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"mien": {}}, r"params\.yaml: profiles\.cpu: unknown key 'mien'\. Did you mean 'mine'\?"),
        ({"mine": {"seeds": 0}}, r"params\.yaml: profiles\.cpu\.mine: seeds is 0; it must be at least 1"),
        ({"mine": {"seed": 3}}, r"params\.yaml: profiles\.cpu\.mine: seed is not a known key\. Did you mean 'seeds'"),
        ({"mine": 3}, r"params\.yaml: profiles\.cpu\.mine"),
    ],
)
def test_a_section_that_no_experiment_takes_is_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError, match=said):
        Registry({"mine": MINE}).check_profile(profile_with(**sections), "params.yaml: profiles.cpu")


def test_a_folder_without_experiments_says_where_to_run() -> None:
    with pytest.raises(LabError, match=r"no package 'no_such_package' here\. Run lab in the folder of the study"):
        discover("no_such_package")


def test_experiments_come_in_the_order_of_the_lecture() -> None:
    places = [min(claim.lecture for claim in e.claims) for e in REGISTRY.experiments.values()]
    assert places == sorted(places)
    assert {"weights-bytes", "grad-accumulation-equals-large-batch", "peft-keeps-quality"} <= set(REGISTRY.claims)


CLAIMS = pytest.mark.parametrize(("experiment", "claim"), list(REGISTRY.claims.values()), ids=list(REGISTRY.claims))


def reachable_verdicts(function: Callable[..., Any]) -> set[str]:
    """The verdicts that a judge's code names, itself or in the functions of its module that it calls."""
    names = {"supported", "refuted", "conditional"}
    found: set[str] = set()
    seen: set[types.CodeType] = set()

    def read(code: types.CodeType, module: dict[str, Any]) -> None:
        if code in seen:
            return
        seen.add(code)
        for constant in code.co_consts:
            if isinstance(constant, types.CodeType):
                read(constant, module)
            elif isinstance(constant, str) and constant in names:
                found.add(constant)
        for name in code.co_names:
            called = module.get(name)
            if isinstance(called, types.FunctionType) and called.__module__.startswith(("experiments", "lab.claims")):
                read(called.__code__, called.__globals__)

    read(function.__code__, function.__globals__)
    return found


@CLAIMS
def test_every_claim_has_one_line_of_advice_for_each_verdict_that_it_can_reach_and_while_nothing_is_decided(
    experiment: Experiment, claim: Claim
) -> None:
    reachable = reachable_verdicts(claim.judge)
    assert {"supported", "refuted"} <= reachable
    wanted = {*reachable, "inconclusive"}
    assert wanted <= set(claim.advice), f"no advice for {wanted - set(claim.advice)}"
    for line in claim.advice.values():
        assert line == " ".join(line.split())
        assert line.endswith(".")
        assert len(line) < 160


@CLAIMS
def test_every_claim_says_before_its_evidence_what_would_refute_it(experiment: Experiment, claim: Claim) -> None:
    assert any(set(each.given) & {"refuted", "conditional"} for each in claim.controls.values()), "no planted fault"
    assert claim.threshold
    assert claim.scope
    assert claim.tiers
    assert set(claim.stated) <= {"cpu", "full", "gpu", "sim"}


@CLAIMS
def test_each_verdict_that_a_claim_can_reach_can_stand_beside_its_controls(
    experiment: Experiment, claim: Claim
) -> None:
    answers = [
        dict(zip(claim.controls, row, strict=True)) for row in product(*(c.given for c in claim.controls.values()))
    ]
    for name in set(DECIDED) & reachable_verdicts(claim.judge):
        assert "" in {distrust(claim, name, given) for given in answers}, f"{name} cannot stand: {answers}"


# Part of the evidence -------------------------------------------------------------------------------------------

FIGURES = {
    "vocabulary": 1000.0,
    **{f"parameters_{kind}": 1000.0 for kind in ("total", "base", "trainable", "stored", "closed_form")},
    **{f"{side}_test_loss": loss for side, loss in (("base", 3.0), ("first", 1.0), ("second", 1.1))},
    **{f"{side}_seconds_per_update": 0.1 for side in ("first", "second")},
    "validation_accuracy": 0.3,
    "test_accuracy": 0.3,
    "validation_loss": 1.0,
    "test_loss": 1.0,
    "recall": 0.5,
    "general_bits_per_byte": 1.5,
    "ratio": 0.8,
    **{f"{side}_{cost}": 1000.0 for side in ("first", "second") for cost in ("flops", "checkpoint_bytes", "seconds")},
    "distance": 1e-6,
    "largest_difference": 1e-7,
    "loss_difference": 1e-6,
    **{f"{kind}_distance": 1e-7 for kind in ("reload", "switch", "back", "merged")},
    "unswitched_distance": 0.5,
    "own_loss": 1.0,
    "other_loss": 1.5,
    "switch_seconds": 1e-4,
}
BYTES = [
    "weights",
    "gradients",
    "gradients_between",
    "gradients_after",
    "optimizer_state",
    "step_temporary",
    "activations",
    "logits",
    "steady",
    "peak",
    "peak_forward",
    "peak_backward",
    "peak_step",
    "state_large",
    "state_small",
    "state_embedding",
    "adapter",
    "model",
]


def in_context_figures(settings: InContext) -> dict[str, float | None]:
    """Those of a base that answers one question in ten, more slowly with more examples, and of its tuned self."""
    figures: dict[str, float | None] = {"majority_accuracy": 0.1, "training_seconds": 5.0, "training_tokens": 100.0}
    figures |= {"icl_best_shots": float(settings.shots[0]), "icl_best_accuracy": 0.1, "training_flops": 1e9}
    figures |= {"tuned_accuracy": 0.9, "tuned_prompt_tokens": 10.0, "tuned_seconds": 0.1, "tuned_flops": 1e6}
    for k in (0, *settings.shots):
        figures |= {f"icl{k}_accuracy": 0.1, f"icl{k}_validation_accuracy": 0.1, f"icl{k}_flops": (1 + k) * 1e6}
        figures |= {f"icl{k}_prompt_tokens": 10.0 * (1 + k), f"icl{k}_seconds": 0.1 * (1 + k)}
        figures |= {f"icl{k}_cached_seconds": 0.1 * (1 + k / 4)}
    return figures


def own_figures(spec: TrialSpec) -> dict[str, Any]:
    """What `made_up_figures(spec)` in the tests of its experiment says that a trial leaves; a list is a series."""
    module = f"tests.experiments.test_{spec.experiment}"
    if importlib.util.find_spec(module) is None:
        return {}
    function = getattr(importlib.import_module(module), "made_up_figures", None)
    return function(spec) if function else {}


def made_up(spec: TrialSpec) -> Record:
    """A record with every figure and series that a trial of its kind leaves; the numbers say nothing."""
    settings = spec.settings
    scale = float(settings.batch * settings.length) if isinstance(settings, Setup) else 1.0
    figures: dict[str, float | None] = {**FIGURES, **{f"{name}_bytes": 1000 * scale for name in BYTES}}
    figures |= {f"parameters_{kind}": 300.0 for kind in ("large", "small", "embedding")}
    figures |= {f"peak_{phase}_{part.name}_bytes": 100.0 for phase in PHASES for part in fields(Parts)}
    if isinstance(settings, InContext):
        figures |= in_context_figures(settings)
    order = f"seed {spec.runs[0].seed}" if spec.runs else ""
    series: dict[str, list[float | None]] = {
        "distance": [1e-7, 1e-6],
        "distance_update": [1.0, 2.0],
        "train_loss": [3.0, 2.0],
        "curve_update": [0.0, 1.0, 2.0],
        "curve_validation_loss": [3.0, 2.0, 1.0],
        "curve_validation_accuracy": [0.0, 0.1, 0.3],
        "curve_recall": [1.0, 0.9, 0.5],
        "curve_general_bits_per_byte": [1.0, 1.2, 1.5],
    }
    tags = {"data_order": order, "second_data_order": order}
    for name, value in own_figures(spec).items():
        if isinstance(value, list):
            series[name] = value
        else:
            figures[name] = value
    return make_record(spec, figures=figures, series=series, tags=tags)


@cache
def load(profile: str) -> Study:
    return Study.load(profile, ROOT)


def only_on_gpu(experiment: Experiment) -> bool:
    return all(claim.tiers == ("gpu",) for claim in experiment.claims)


def planned(experiment: Experiment, tier: Tier) -> list[TrialSpec]:
    """What the judges of an experiment see in the smallest profile: its own trials, and of those that it reads.

    What only a GPU can show is in no other profile than that of a GPU: its judge is tried on that plan.
    """
    study, found = load("gpu" if only_on_gpu(experiment) else "smoke"), []
    for read in (experiment, *map(REGISTRY.experiment, experiment.reads)):
        plan, records = study.plan(read), dict[str, Record]()
        while fresh := [spec for spec in expand(plan, records.values()) if spec.name not in records]:
            records |= {spec.name: made_up(spec) for spec in fresh}
        found += expand(plan, records.values())
    return [spec for spec in found if (spec.tier or study.tier) == tier]


TIERS = [
    pytest.param(experiment, claim, tier, id=f"{claim.id}-{tier}")
    for experiment, claim in REGISTRY.claims.values()
    for tier in claim.tiers
    if planned(experiment, tier)
]


@pytest.mark.parametrize(("experiment", "claim", "tier"), TIERS)
def test_no_single_trial_that_fails_or_is_missing_ends_the_judging(
    experiment: Experiment, claim: Claim, tier: Tier
) -> None:
    specs = planned(experiment, tier)
    whole = [made_up(spec) for spec in specs]
    assert judge(experiment, claim, "smoke", tier, whole, len(specs)).verdict != "not run"
    for place, spec in enumerate(specs):
        without = whole[:place] + whole[place + 1 :]
        verdict = judge(experiment, claim, "smoke", tier, without, len(specs))
        assert f"1 of {len(specs)} trials are missing" in verdict.because, spec.name
        failed = [*without, make_record(spec, status="failed", figures={}, message="killed")]
        assert judge(experiment, claim, "smoke", tier, failed, len(specs)).unsuccessful == 1, spec.name
    for alone in whole:
        assert judge(experiment, claim, "smoke", tier, [alone], len(specs)).verdict != "supported"


def test_every_claim_is_judged_in_some_tier_of_the_smallest_profile() -> None:
    assert {str(param.values[1].id) for param in TIERS} == set(REGISTRY.claims)  # type: ignore[union-attr]


def test_evidence_of_one_tier_does_not_count_in_another() -> None:
    simulated = [r.model_copy(update={"spec": r.spec.model_copy(update={"tier": "sim"})}) for r in GOOD]
    assert judged([*simulated, *FAULTS], planned=6).verdict == "inconclusive"


OF_A_CARD = ("share-of-peak",)
"""Plots of what only a card has; the tests of their experiments draw them."""

OF_SMOL = "-smol"
"""How plots of SmolLM2 end, which the profile `cpu` has not: the tests of their experiments draw them, too."""

PLOTS = [
    (e, plot)
    for e in REGISTRY.experiments.values()
    for plot in e.plots
    if plot.name not in OF_A_CARD and not plot.name.endswith(OF_SMOL)
]


@pytest.mark.parametrize(("experiment", "plot"), PLOTS, ids=[plot.name for _, plot in PLOTS])
def test_a_plot_is_the_same_bytes_twice_and_absent_where_the_evidence_is_not_whole(
    experiment: Experiment, plot: Plot, tmp_path: Path
) -> None:
    tier: Tier = "gpu" if only_on_gpu(experiment) else "cpu" if planned(experiment, "cpu") else "sim"
    whole = [made_up(spec) for spec in planned(experiment, tier)]
    first, again = draw(plot, Evidence(whole), tmp_path / "a"), draw(plot, Evidence(whole), tmp_path / "b")
    assert first is not None
    assert again is not None
    assert first.read_bytes() == again.read_bytes()
    parts = [whole[:place] + whole[place + 1 :] for place in range(len(whole))]
    for part in [*parts, *([alone] for alone in whole)]:
        try:
            plot.lines(Evidence(part))
        except Exception:
            assert draw(plot, Evidence(part), tmp_path / "c") is None
    assert not (tmp_path / "c").exists()


def test_lines_beyond_the_colours_are_dashed(tmp_path: Path) -> None:
    def dashed(lines: int) -> int:
        plot = Plot("many", "", "", "", lambda _: {f"line {n}": Line([0, 1], [0, n]) for n in range(lines)})
        drawn = draw(plot, Evidence([]), tmp_path / f"{lines}.svg")
        assert drawn is not None
        return drawn.read_text(encoding="utf-8").count("stroke-dasharray")

    assert dashed(10) == 0
    assert dashed(12) == 4  # in the axes and in the legend


# Committed evidence ---------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study in a folder of its own, with made-up records of the memory formulas."""
    shutil.copy(ROOT / "params.yaml", tmp_path)
    shutil.copytree(ROOT / "lab", tmp_path / "lab", ignore=shutil.ignore_patterns("__pycache__"))
    found = Study.load("smoke", tmp_path)
    sys.path.remove(str(tmp_path))
    code = records.code_fingerprint(tmp_path, "memory")
    for spec in found.planned(found.registry.experiment("memory_formulas")):
        record = made_up(spec)
        inputs = {model: shape_fingerprint(model) for model in spec.models()}
        origin = record.provenance.model_copy(update={"code": code, "inputs": inputs})
        records.write_record(record.model_copy(update={"provenance": origin}), found.workspace.results)
    return found


def test_evidence_of_this_plan_and_code_is_not_stale(study: Study) -> None:
    assert study.stale(study.registry.experiment("memory_formulas")) == []
    assert study.by_other_code() == []
    reasons = study.stale(study.registry.experiment("grad_accumulation"))
    assert reasons
    assert all(reason.endswith(" is missing") for reason in reasons)


def test_a_plot_whose_records_have_gone_goes_with_them(study: Study) -> None:
    folder = study.workspace.results / "plots"
    folder.mkdir()
    (folder / "accumulation-distance.svg").write_text("of an experiment that has no record now")
    study.write_verdicts()
    drawn = {path.name for path in folder.iterdir()}
    assert "accumulation-distance.svg" not in drawn


def test_evidence_is_stale_by_the_record_that_is_damaged_missing_or_of_another_plan_or_code(study: Study) -> None:
    experiment = study.registry.experiment("memory_formulas")
    paths = [records.record_path(study.workspace.results, spec) for spec in study.planned(experiment)]
    names = [path.stem for path in paths]
    paths[0].write_text("{")
    paths[1].unlink()
    third, fourth = records.read_record(paths[2]), records.read_record(paths[3])
    settings = third.spec.settings.model_copy(update={"seed": 99})
    spec = third.spec.model_copy(update={"settings": settings})
    records.write_record(third.model_copy(update={"spec": spec}), study.workspace.results)
    origin = fourth.provenance.model_copy(update={"code": "other"})
    records.write_record(fourth.model_copy(update={"provenance": origin}), study.workspace.results)
    reasons = study.stale(experiment)
    assert f"{names[0]}.json is damaged" in reasons
    assert f"{names[1]} is missing" in reasons
    assert f"{names[2]} was measured with other settings" in reasons
    assert f"{names[3]} was measured with other code" in reasons
    assert study.by_other_code() == ["memory_formulas"]


def test_damaged_records_are_missing_trials_to_the_verdict_and_unplanned_ones_do_not_count(study: Study) -> None:
    folder = study.workspace.results / "memory_formulas"
    specs = study.planned(study.registry.experiment("memory_formulas"))
    for spec in specs:
        if spec.arm == "weights":
            (folder / f"{spec.name}.json").write_text("{")
    stray = TrialSpec(experiment="memory_formulas", name="stray", arm="weights", settings=Memory(model="llama-6m"))
    records.write_record(made_up(stray), study.workspace.results)
    verdict = next(v for v in study.verdicts if (v.claim, v.tier) == ("weights-bytes", "cpu"))
    assert verdict.verdict == "inconclusive"
    count = sum(spec.arm == "weights" for spec in specs)
    assert verdict.because == f"no successful record with arm weights; {count} of {len(specs)} trials are missing"
    assert next(v for v in study.verdicts if v.claim == "peft-keeps-quality").verdict == "not run"


def test_the_tasks_of_a_study_are_those_of_its_training_trials(study: Study) -> None:
    specs = [spec for e in study.registry.experiments.values() for spec in study.planned(e)]
    first = {run.task for spec in specs for run in spec.runs if isinstance(run, Training)}
    further = {task for spec in specs for run in spec.runs if isinstance(run, Adapters) for task in run.further_tasks}
    assert further
    assert study.tasks() == sorted(first | further)
