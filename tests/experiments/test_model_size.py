"""The judges of model size on made-up records of a device, and that what is tried there lies at the predicted boundaries."""

from __future__ import annotations

import pytest

from experiments import model_size
from experiments.model_size import CARDS
from lab.claims import Claim, Evidence, Tier, Verdict, in_tier, judge, judge_controls
from lab.records import Record
from lab.specs import Limit, TrialSpec
from lab.study import Study
from tests.conftest import ROOT
from tests.test_records import make_record

LOADS, QLORA = model_size.EXPERIMENT.claims

BILLIONS = {"small": 1.0, "middle": 8.0, "large": 32.0, "largest": 70.0}

# As predicted: by way, by card, which models are tried and which of them fit.
PREDICTED: dict[str, dict[int, dict[str, bool]]] = {
    "loaded-16-bits": {8: {"small": True, "middle": False}, 48: {"middle": True, "large": False}},
    "loaded-4-bits": {8: {"middle": True, "large": False}, 48: {"largest": True}},
    "trained-full": {8: {"small": False}, 48: {"small": True, "middle": False}},
    "trained-lora": {8: {"small": True, "middle": False}, 48: {"middle": True, "large": False}},
    "trained-qlora": {8: {"middle": True, "large": False}, 48: {"large": True, "largest": False}},
}


def record(arm: str, card: int, model: str, fits: bool | None, predicted: bool) -> Record:
    """One that was tried; with `fits` None, one that the device at hand is too small for."""
    spec = TrialSpec(
        experiment="model_size",
        name=f"{arm}-{card}gb-{model}",
        arm=arm,
        settings=Limit(model=model, card_gb=card, device="cuda"),
    )
    figures: dict[str, float | None] = {
        "parameters_base": BILLIONS[model] * 1e9,
        "predicted_bytes": 1.0,
        "predicted_fits": float(predicted),
        "beyond_device": float(fits is None),
    }
    return make_record(spec, figures=figures | ({} if fits is None else {"fits": float(fits)}))


def records(found: dict[tuple[str, int, str], bool | None] | None = None) -> list[Record]:
    """As predicted, but for what was found otherwise."""
    return [
        record(arm, card, model, (found or {}).get((arm, card, model), predicted), predicted)
        for arm, cards in PREDICTED.items()
        for card, models in cards.items()
        for model, predicted in models.items()
    ]


def verdict(claim: Claim, found: list[Record]) -> Verdict:
    return judge(model_size.EXPERIMENT, claim, "gpu", "gpu", found, len(found))


def test_on_a_device_what_loads_is_said_by_card() -> None:
    said = verdict(LOADS, records())
    assert said.verdict == "conditional"  # the largest loads in 4 bits on 48 GB
    assert (said.low, said.high, said.n) == (1.0, 70.0, 4)
    assert "16 bits: 1B on 8 GB, 8B on 48 GB; 4 bits: 8B on 8 GB, 70B on 48 GB" in said.because
    assert "full: none on 8 GB, 1B on 48 GB" in said.because
    assert said.because.endswith("; 10 of 10 boundaries lie where they were predicted")
    assert said.control == "the smallest model as every one: refuted, a size that no card loads: supported"


def test_where_no_card_loads_the_largest_the_claim_holds_and_the_prediction_is_said_to_be_wrong() -> None:
    said = verdict(LOADS, records({("loaded-4-bits", 48, "largest"): False}))
    assert said.verdict == "supported"
    wrong = "; 9 of 10 boundaries lie where they were predicted (not: loaded-4-bits-48gb-largest does not fit)"
    assert said.because.endswith(wrong)


def test_qlora_is_held_against_lora_on_each_card() -> None:
    said = verdict(QLORA, records())
    assert said.verdict == "supported"
    assert (said.low, said.high, said.n) == (4.0, 8.0, 2)
    assert said.because.endswith("; 6 of 6 boundaries lie where they were predicted")
    assert said.control == "LoRA as QLoRA: refuted, a size that only QLoRA trains: supported"


@pytest.mark.parametrize(
    ("found", "wrong"),
    [
        ({("trained-qlora", 8, "middle"): False}, "trained-qlora-8gb-middle does not fit"),
        ({("trained-lora", 8, "middle"): True}, "trained-lora-8gb-middle fits"),
    ],
    ids=["QLoRA trains less", "LoRA trains more, and where it ends was not seen"],
)
def test_a_card_on_which_qlora_is_not_seen_to_gain_makes_it_conditional(
    found: dict[tuple[str, int, str], bool | None], wrong: str
) -> None:
    said = verdict(QLORA, records(found))
    assert said.verdict == "conditional"
    assert f"5 of 6 boundaries lie where they were predicted (not: {wrong})" in said.because


@pytest.mark.parametrize("claim", [LOADS, QLORA], ids=lambda claim: claim.id)
def test_a_card_that_the_device_cannot_stand_for_is_left_out(claim: Claim) -> None:
    small: dict[tuple[str, int, str], bool | None] = {
        (arm, 48, model): None for arm, cards in PREDICTED.items() for model in cards[48]
    }
    said = verdict(claim, records(small))
    assert said.verdict == "supported"
    assert "48 GB" not in said.because


# A claim that does not hold ------------------------------------------------------------------------------------------


def all_of(prefix: str, fits: bool) -> dict[tuple[str, int, str], bool | None]:
    """Every model of the ways that begin so is found to fit, or not to."""
    return {
        (arm, card, model): fits
        for arm, cards in PREDICTED.items()
        if arm.startswith(prefix)
        for card, models in cards.items()
        for model in models
    }


@pytest.mark.parametrize(
    ("claim", "found"),
    [(LOADS, all_of("loaded", True)), (QLORA, all_of("trained-qlora", False))],
    ids=["every model loads", "QLoRA trains none"],
)
def test_evidence_against_a_claim_refutes_it(claim: Claim, found: dict[tuple[str, int, str], bool | None]) -> None:
    said = verdict(claim, records(found))
    assert said.verdict == "refuted", said.because
    assert said.control.endswith(": supported")


@pytest.mark.parametrize("tier", ["sim", "gpu"])
@pytest.mark.parametrize("claim", [LOADS, QLORA], ids=lambda claim: claim.id)
def test_a_planted_fault_that_is_the_evidence_refutes_the_claim(claim: Claim, tier: Tier) -> None:
    simulated = Study.load("cpu", ROOT).evidence("model_size")[0]
    fault, _ = claim.controls.values()
    planted = fault.change(Evidence(simulated if tier == "sim" else records())).records
    said = judge(model_size.EXPERIMENT, claim, "gpu", tier, planted, len(planted))
    assert said.verdict == "refuted", said.because
    assert said.control.endswith(": supported")


@pytest.mark.parametrize(("profile", "tier"), [("smoke", "sim"), ("cpu", "sim"), ("full", "sim"), ("gpu", "gpu")])
@pytest.mark.parametrize("claim", [LOADS, QLORA], ids=lambda claim: claim.id)
def test_the_known_answer_needs_no_figure_that_was_measured(claim: Claim, profile: str, tier: Tier) -> None:
    plan = [spec for spec in Study.load(profile, ROOT).plan(model_size.EXPERIMENT) if isinstance(spec, TrialSpec)]
    nothing = Evidence(in_tier([make_record(spec, figures={}) for spec in plan], tier))
    assert [*judge_controls(claim, nothing).values()][-1] == "supported"


@pytest.mark.parametrize(
    ("missing", "of_limit", "of_qlora"),
    [("loaded-4-bits", "not run", "supported"), ("trained-full", "not run", "not run")],
)
def test_a_known_answer_whose_records_are_missing_was_not_run(missing: str, of_limit: str, of_qlora: str) -> None:
    evidence = Evidence(r for r in records() if r.spec.arm != missing)
    given = [[*judge_controls(claim, evidence).values()][-1] for claim in (LOADS, QLORA)]
    assert given == [of_limit, of_qlora]


# What is tried -------------------------------------------------------------------------------------------------------


def test_what_is_tried_are_the_neighbours_of_the_boundaries_that_the_simulation_predicts() -> None:
    simulated = Evidence(Study.load("cpu", ROOT).evidence("model_size")[0])
    plan = Study.load("gpu", ROOT).plan(model_size.EXPERIMENT)
    tried = [(spec, spec.settings) for spec in plan if isinstance(spec, TrialSpec) and isinstance(spec.settings, Limit)]
    assert {(spec.arm, settings.card_gb) for spec, settings in tried} == {(arm, c) for arm in PREDICTED for c in CARDS}
    for arm in PREDICTED:
        figure = "weights_bytes" if arm.startswith("loaded") else "peak_bytes"
        found = sorted(simulated.select(arm), key=lambda r: r.figure("parameters_base"))
        for card in CARDS:
            fits = [str(r.setting("model")) for r in found if r.figure(figure) <= model_size._room(card)]
            fails = [model for r in found if (model := str(r.setting("model"))) not in fits]
            beside = [settings.model for spec, settings in tried if spec.arm == arm and settings.card_gb == card]
            assert beside == [*fits[-1:], *fails[:1]], f"{arm} on {card} GB"


def test_what_is_tried_is_what_is_simulated_but_for_the_card() -> None:
    plan = [spec for spec in Study.load("gpu", ROOT).plan(model_size.EXPERIMENT) if isinstance(spec, TrialSpec)]
    simulated = {(s.arm, *s.models()): s.settings for s in plan if s.tier == "sim"}
    tried = [spec for spec in plan if isinstance(spec.settings, Limit)]
    for spec in tried:
        twin = simulated[(spec.arm, *spec.models())]
        for name in (
            "precision",
            "autocast",
            "checkpointing",
            "method",
            "method_options",
            "quantisation",
            "length",
            "updates",
        ):
            assert getattr(spec.settings, name) == getattr(twin, name), f"{spec.name}: {name}"

        assert TrialSpec.model_validate_json(spec.model_dump_json()) == spec
        assert spec.settings.finds_limit, "or a forecast would answer in the place of the trial"


@pytest.mark.parametrize("profile", ["smoke", "cpu", "full"])
def test_without_a_card_only_simulated_trials_are_planned(profile: str) -> None:
    plan = Study.load(profile, ROOT).plan(model_size.EXPERIMENT)
    assert {spec.tier for spec in plan if isinstance(spec, TrialSpec)} == {"sim"}
