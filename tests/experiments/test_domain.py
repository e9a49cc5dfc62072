"""What the judge makes of losses that are known, and its controls."""

from __future__ import annotations

import pytest

from experiments import domain
from experiments.domain import EXPERIMENT, FALL, RISE, judge_domain
from lab.claims import Evidence, judge
from lab.records import Record
from lab.specs import Training, TrialSpec
from tests.test_records import make_record

CLAIM = EXPERIMENT.claims[0]
BASE = (8.0, 0.5)
SEEDS = 5


def record(arm: str, loss: float, general: float, seed: int = 0, rate: float = 1e-3) -> Record:
    """A run of the arm with this loss on the domain, and on general text."""
    model, _, method = arm.partition("-")
    trained = method != "base"
    settings = Training(
        model=model,
        task="keepers_log",
        method=method if trained else "full",
        updates=60 if trained else 0,
        seed=seed,
        learning_rate=rate,
    )
    spec = TrialSpec(experiment="domain", name=f"{arm}-{seed}-{rate:g}", arm=arm, settings=settings)
    figures = {"test_loss": loss, "validation_loss": loss, "general_bits_per_byte": general}
    return make_record(spec, figures=figures)


def runs(
    arm: str, fall: float, rise: float, rate: float = 1e-3, seeds: int = SEEDS, spread: float = 0.002
) -> list[Record]:
    """Runs that lower the loss on the domain by a share and raise the general one by another, seeds a little apart."""
    return [
        record(arm, BASE[0] * (1 - fall + spread * (seed - 2)), BASE[1] * (1 + rise + spread * (seed - 2)), seed, rate)
        for seed in range(seeds)
    ]


def evidence(full: tuple[float, float], lora: tuple[float, float], spread: float = 0.002) -> Evidence:
    """Two methods with (fall, rise) each."""
    return Evidence(
        [record("tiny-base", *BASE), *runs("tiny-full", *full, spread=spread), *runs("tiny-lora", *lora, spread=spread)]
    )


GOOD, COSTLY, USELESS = (0.8, 0.03), (0.9, 2.0), (0.05, 0.01)


@pytest.mark.parametrize(
    ("full", "lora", "verdict"),
    [
        (GOOD, GOOD, "supported"),
        (GOOD, COSTLY, "conditional"),
        (COSTLY, COSTLY, "conditional"),
        (GOOD, USELESS, "conditional"),
        (USELESS, USELESS, "refuted"),
        (USELESS, (0.05, 2.0), "refuted"),
        ((FALL + 0.05, RISE - 0.05), (FALL + 0.05, RISE - 0.05), "supported"),
        ((FALL - 0.05, 0.0), (FALL - 0.05, 0.0), "refuted"),
        ((0.8, RISE + 0.05), GOOD, "conditional"),
    ],
)
def test_the_verdict_follows_from_what_the_domain_gains_and_the_rest_pays(
    full: tuple[float, float], lora: tuple[float, float], verdict: str
) -> None:
    assert judge_domain(evidence(full, lora)).verdict == verdict


def test_seeds_that_spread_or_are_alone_decide_nothing() -> None:
    assert judge_domain(evidence((FALL, 0.0), (FALL, 0.0), spread=0.05)).verdict == "inconclusive"
    alone = [record("tiny-base", *BASE), *runs("tiny-full", *GOOD, seeds=1)]
    assert judge_domain(Evidence(alone)).verdict == "inconclusive"


def test_the_effect_is_the_least_fall_and_who_suffers_is_named() -> None:
    finding = judge_domain(evidence(GOOD, COSTLY))
    assert finding.effect == pytest.approx(80.0)
    assert finding.low is not None
    assert finding.low < 80
    assert finding.because.startswith(
        "the general text suffers under tiny-lora; tiny-full at 0.001 domain loss falls 80 ["
    )


def test_the_best_rate_for_the_domain_is_judged_and_the_rate_that_spares_is_named() -> None:
    found = [record("tiny-base", *BASE), *runs("tiny-full", *COSTLY, rate=1e-2), *runs("tiny-full", *GOOD, seeds=2)]
    finding = judge_domain(Evidence(found))
    assert finding.verdict == "conditional"
    assert "tiny-full at 0.01 domain loss falls 90 [" in finding.because
    assert "(at the edge of its grid), sparing it at 0.001: 80 % for 3 %" in finding.because
    costly = judge_domain(Evidence([record("tiny-base", *BASE), *runs("tiny-full", *COSTLY)]))
    assert "no rate tried spares the general text" in costly.because


def test_each_model_is_held_against_its_own_base() -> None:
    other = [record("smol-base", 4.0, 1.0), *(record("smol-lora", 2.0, 1.01 + 0.001 * seed, seed) for seed in range(3))]
    finding = judge_domain(Evidence([*evidence(GOOD, GOOD).records, *other]))
    assert finding.verdict == "supported"
    assert "smol-lora at 0.001 domain loss falls 50 [" in finding.because
    assert set(domain.trade_lines(Evidence([*evidence(GOOD, GOOD).records, *other]))) == {"full", "lora", "base"}


@pytest.mark.parametrize(("full", "verdict"), [(GOOD, "supported"), (COSTLY, "conditional"), (USELESS, "refuted")])
def test_controls_are_judged_as_what_they_are(full: tuple[float, float], verdict: str) -> None:
    found = evidence(full, full)
    answers = {name: judge_domain(control.change(found)).verdict for name, control in CLAIM.controls.items()}
    assert answers["the base's loss on the domain"] == "refuted"
    assert answers["half the loss on the domain for twice that on general text"] == "conditional"
    assert answers["half the loss on the domain and nothing paid"] == "supported"
    assert judge(EXPERIMENT, CLAIM, "cpu", "cpu", found.records, len(found)).verdict == verdict
