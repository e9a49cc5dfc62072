"""The judge of the two trainers, on records with known times; what it says of shares, and of what was not timed."""

from __future__ import annotations

from typing import Any

import pytest

from experiments.speed import EXPERIMENT, SLOWER, shares_of_peak, tokens_per_second
from lab.claims import Evidence, Verdict, judge
from lab.methods import METHODS
from lab.records import Record
from lab.specs import Speed, TrialSpec, templates
from lab.study import Study
from tests.conftest import ROOT
from tests.test_records import make_record

H100 = "NVIDIA H100 80GB HBM3"


def made_up_figures(spec: TrialSpec) -> dict[str, Any]:
    """What a trial leaves, the two trainers alike."""
    return dict(pair("full", 1.0, n=1)[0].figures) if isinstance(spec.settings, Speed) else {}


def pair(method: str, ratio: float, model: str = "llama-6m", n: int = 4, arm: str = "", **changes: Any) -> list[Record]:
    """Trials in which the lab takes `ratio` of the plain Trainer's 0.5 s for 1,000 tokens and 6e12 operations."""
    found = []
    for seed, spread in zip(range(n), (0.995, 1.0, 1.005, 1.0, 1.0), strict=False):
        settings = Speed(model=model, method=method, seed=seed, device="cuda" if "device" in changes else "cpu")
        arm = arm or f"pair-{method}"
        spec = TrialSpec(experiment="speed", name=f"{arm}-{model}-seed{seed}", arm=arm, settings=settings)
        seconds = 0.5 * ratio * spread
        figures = {
            "ratio": ratio * spread,
            "lab_seconds": seconds,
            "lab_tokens_per_second": 1000 / seconds,
            "plain_tokens_per_second": 2000.0,
            "plain_flops": 6e12,
            "rule_flops": 5e12,
            "parameters_base": 6e6,
        }
        found.append(make_record(spec, figures=figures, **changes))
    return found


def verdict(records: list[Record], tier: Any = "cpu") -> Verdict:
    return judge(EXPERIMENT, EXPERIMENT.claims[0], "cpu", tier, records, len(records))


SLOW = pair("full", 1.3, arm=SLOWER)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ((1.0, 1.01), "supported"),
        ((1.2, 1.3), "refuted"),
        ((0.8, 0.85), "refuted"),  # faster than what a person gets is as wrong
        ((1.0, 1.2), "conditional"),
        ((1.045, 1.048), "inconclusive"),
    ],
)
def test_the_verdict_follows_the_times(ratios: tuple[float, float], expected: str) -> None:
    records = [*pair("full", ratios[0]), *pair("lora", ratios[1])]
    assert verdict([*records, *SLOW]).verdict == expected


def test_each_control_is_judged_by_what_it_plants() -> None:
    found = verdict([*pair("full", 1.0), *pair("lora", 1.0), *SLOW])
    assert found.control == (
        "the lab's trainer at twice its time: refuted, gradient checkpointing on the lab's side: refuted, "
        "the plain Trainer as the lab's: supported"
    )
    slow = verdict([*pair("full", 1.5), *SLOW])
    assert (slow.verdict, slow.control.endswith("the plain Trainer as the lab's: supported")) == ("refuted", True)
    hidden = verdict([*pair("full", 1.0), *pair("full", 1.0, arm=SLOWER)])
    assert "gradient checkpointing on the lab's side: supported" in hidden.control


def test_tokens_shares_and_the_rule_are_told_for_each_method() -> None:
    found = verdict([*pair("full", 1.0, device=H100), *SLOW], tier="gpu")
    share = 6e12 / 0.5 / 989.4e12
    assert f"full on llama-6m 2,000 and 2,000, {share:.0%} of the peak, 1.20 x 6N" in found.because
    assert "no share of the peak" not in found.because
    unknown = verdict([*pair("full", 1.0, device="NVIDIA Z900"), *SLOW], tier="gpu")
    assert "no share of the peak: that of NVIDIA Z900 is not known here" in unknown.because
    on_processor = verdict([*pair("full", 1.0), *SLOW]).because
    assert "of the peak" not in on_processor


def test_what_was_not_timed_is_named_with_the_reason() -> None:
    short = [r.model_copy(update={"status": "oom", "message": "not run: too large"}) for r in pair("lora", 1.0)]
    found = verdict([*pair("full", 1.0), *short, *SLOW])
    assert found.verdict == "supported"
    assert "not timed: lora on llama-6m (oom: not run: too large); qlora, dora" in found.because
    assert found.because.endswith("on llama-6m (not in this profile)")
    nothing = verdict([*short, *SLOW])
    assert nothing.verdict == "inconclusive"
    assert "no pair of trainers was timed to the end: lora on llama-6m (oom" in nothing.because


def test_a_method_is_a_line_over_the_models_and_a_share_needs_a_known_card() -> None:
    evidence = Evidence([*pair("full", 1.0), *pair("full", 1.0, model="llama-3.2-1b"), *pair("lora", 0.5)])
    lines = tokens_per_second(evidence)
    assert lines["lora"].y == pytest.approx([4000], rel=1e-3)
    assert len(lines["full"].x) == 2
    assert shares_of_peak(evidence) == {}
    on_card = shares_of_peak(Evidence(pair("full", 1.0, device=H100)))
    assert on_card["full"].y == pytest.approx([100 * 6e12 / 0.5 / 989.4e12], rel=1e-3)


@pytest.mark.parametrize("profile", ["smoke", "cpu", "full", "gpu"])
def test_every_profile_times_pairs_and_has_the_control(profile: str) -> None:
    specs = templates(Study.load(profile, ROOT).plan(EXPERIMENT))
    control = [spec for spec in specs if spec.arm == SLOWER]
    assert {spec.settings.fault for spec in control if isinstance(spec.settings, Speed)} == {"checkpointing"}
    assert len(control) > 1
    if profile == "gpu":
        cells = {(s.settings.model, s.settings.method) for s in specs if isinstance(s.settings, Speed)}
        models = ("qwen2.5-0.5b", "llama-3.2-1b", "llama-3.1-8b")
        assert cells == {(model, method) for model in models for method in METHODS}
        named = {s.settings.optimizer for s in specs if s.name.startswith("pair-full-llama-3.1-8b")}  # type: ignore[union-attr]
        assert named == {"adamw_bnb_8bit"}
