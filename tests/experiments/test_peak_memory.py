"""The judge of predictions on made-up records: on a device other limits hold, and the finding says where a miss comes from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from experiments import peak_memory
from experiments.peak_memory import COMMON, DEVICE_SETUPS, PUBLISHED, SETUPS
from lab.cards import GIB, find_gpu, usable_bytes
from lab.claims import Verdict, judge
from lab.errors import LabError
from lab.memory.simulated_trial import read_config, workload_of
from lab.memory.workload import MIB, PHASES, check
from lab.pricing import predict
from lab.records import Record
from lab.specs import Memory, Simulation, TrialSpec
from lab.study import Study
from lab.workspace import Workspace
from tests.conftest import ROOT
from tests.test_records import make_record

EXPERIMENT = peak_memory.EXPERIMENT
CLAIM = next(claim for claim in EXPERIMENT.claims if claim.id == "prediction-matches-measurement")

PEAK = 10 * GIB
"""Measured by the allocator in each made-up setup; the ledger saw 64 MiB less, which the prediction books as other."""


def phases(**parts: float) -> dict[str, float]:
    """A backward pass with these parts at its peak, and phases around it that hold nothing."""
    found = {f"peak_{phase}_bytes": 0.0 for phase in PHASES}
    names = (*peak_memory.FOUR, *peak_memory.REST)
    found |= {f"peak_{phase}_{part}_bytes": 0.0 for phase in PHASES for part in names}
    found |= {f"peak_backward_{part}_bytes": size for part, size in parts.items()}
    return found | {"peak_backward_bytes": sum(parts.values())}


def measured(setup: str, device: str = "cuda", status: str = "ok", **figures: float) -> Record:
    settings = Memory(model="llama-6m", device=device)
    spec = TrialSpec(experiment="peak_memory", name=f"measured-{setup}", arm="measured", settings=settings)
    seen = PEAK - 64 * MIB
    found = {
        **phases(weights=seen - GIB, activations=GIB),
        "peak_bytes": PEAK,
        "parameters_total": 1e9,
        "parameters_trainable": 1e9,
    }
    if device == "cuda":
        found |= {f"allocated_{phase}_bytes": seen for phase in PHASES}
        held = {"ledger_peak_bytes": seen, "reserved_bytes": 1.02 * PEAK, "driver_bytes": 1.02 * PEAK + 0.5 * GIB}
        found |= held
    return make_record(spec, status=status, figures=found | figures if status == "ok" else {}, device="Made-up card")


def predicted(setup: str, error: float, device: str = "cuda", part: str = "activations") -> Record:
    settings = Simulation(model="llama-6m", device=device)
    spec = TrialSpec(experiment="peak_memory", name=f"predicted-{setup}", arm="predicted", settings=settings)
    parts = {"weights": PEAK - 64 * MIB - GIB, "activations": 1.0 * GIB, "other": 64.0 * MIB}
    parts[part] = parts.get(part, 0.0) + error * PEAK
    figures = phases(**parts) | {"peak_bytes": PEAK * (1 + error), "parameters_total": 1e9, "parameters_trainable": 1e9}
    return make_record(spec, figures=figures)


def published() -> list[Record]:
    found = []
    for name, (_, gib) in PUBLISHED.items():
        spec = TrialSpec(
            experiment="peak_memory",
            name=f"published-{name}",
            arm="published",
            settings=Simulation(model="mistral-7b-v0.1", device="cuda"),
        )
        found.append(make_record(spec, figures={figure: size * GIB for figure, size in gib.items()}))
    return found


def verdict(errors: dict[str, float], device: str = "cuda", *more: Record, part: str = "activations") -> Verdict:
    found = [*published(), *more]
    for name, error in errors.items():
        found += [measured(name, device), predicted(name, error, device, part)]
    return judge(EXPERIMENT, CLAIM, "made-up", "gpu" if device == "cuda" else "cpu", found, len(found))


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """A handful of made-up setups decides here."""
    monkeypatch.setattr(peak_memory, "LEAST_ON_DEVICE", 1)


# What is judged ---------------------------------------------------------------------------------------------------


def test_on_a_device_one_setup_may_be_nearly_3_percent_off_where_the_middle_is_within_1() -> None:
    errors = {"a": 0.001, "b": -0.005, "c": 0.029}
    assert verdict(errors).verdict == "supported"
    assert verdict(errors, "cpu").verdict == "conditional"


@pytest.mark.parametrize(
    ("errors", "expected"),
    [
        ({"a": 0.001, "b": -0.005, "c": 0.031}, "conditional"),
        ({"a": 0.011, "b": -0.012, "c": 0.001}, "conditional"),
        ({"a": 0.031, "b": -0.04, "c": 0.001}, "refuted"),
    ],
    ids=["one over 3 %", "none over 3 %, the median over 1 %", "most over 3 %"],
)
def test_on_a_device_a_worse_prediction_is_not_supported(errors: dict[str, float], expected: str) -> None:
    assert verdict(errors).verdict == expected


def test_on_a_processor_every_setup_is_held_to_1_percent() -> None:
    assert verdict({"a": 0.009, "b": -0.009}, "cpu").verdict == "supported"
    found = verdict({"a": 0.011, "b": -0.009}, "cpu")
    assert found.verdict == "conditional"
    assert found.because.startswith("1 of 2 peaks within 1% (not a); largest error 0.011; 6 published figures")
    assert "allocator" not in found.because


CONTROLS = "the lecture's rules: refuted, 4 % too high: refuted, what was measured: supported"


def test_a_prediction_4_percent_too_high_everywhere_and_the_rules_of_the_lecture_are_told_apart() -> None:
    assert verdict(dict.fromkeys("abc", 0.04)).verdict == "refuted"
    assert verdict(dict.fromkeys("abc", 0.0)).control == CONTROLS
    assert verdict(dict.fromkeys("abc", 0.0), "cpu").control == CONTROLS


def test_a_setup_that_was_predicted_to_fit_and_ran_out_of_memory_is_a_miss() -> None:
    found = verdict({"a": 0.0, "b": 0.0}, "cuda", measured("c", status="oom"), predicted("c", 0.0))
    assert found.verdict == "conditional"
    assert "; predicted to fit and out of memory: c; " in found.because


def test_a_measured_setup_without_its_prediction_decides_nothing() -> None:
    found = verdict({"a": 0.0}, "cuda", measured("b"))
    assert found.verdict == "inconclusive"
    assert found.because.startswith("1 setups have no prediction yet; 1 of 1 peaks within 3%; ")


def test_on_a_device_fewer_than_60_setups_decide_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peak_memory, "LEAST_ON_DEVICE", 60)
    found = verdict(dict.fromkeys(map(str, range(59)), 0.0))
    assert found.verdict == "inconclusive"
    assert found.because.startswith("only 59 setups, 60 decide; ")
    assert verdict(dict.fromkeys(map(str, range(60)), 0.0)).verdict == "supported"
    assert verdict({"a": 0.0}, "cpu").verdict == "supported"


# What is said of a device -----------------------------------------------------------------------------------------


def test_the_finding_tells_what_tensors_torch_and_the_card_held() -> None:
    found = verdict({"a": 0.0, "b": 0.0})
    assert "median 0.00%; " in found.because
    assert "the ledger is -0.6% to -0.6% off the allocator; " in found.because
    assert "reserved beyond the peak 2.0% to 2.0% (taken: 3%); context 0.50 to 0.50 GiB (taken: 0.7); " in found.because
    assert "the card held at most what `lab fit` counts with in 2 of 2; " in found.because


def test_the_finding_counts_the_setups_in_which_the_card_held_more_than_was_counted_with() -> None:
    full = [measured("c", driver_bytes=1.03 * PEAK + 0.8 * GIB), predicted("c", 0.0)]
    assert "counts with in 1 of 2; " in verdict({"a": 0.0}, "cuda", *full).because


def test_the_pages_of_an_optimizer_are_no_context() -> None:
    paged = measured("c", driver_bytes=1.03 * PEAK + 9 * GIB)
    settings = paged.spec.settings.model_copy(update={"optimizer": "paged_adamw_8bit"})
    paged = paged.model_copy(update={"spec": paged.spec.model_copy(update={"settings": settings})})
    found = verdict({"a": 0.0}, "cuda", paged, predicted("c", 0.0)).because
    assert "context 0.50 to 0.50 GiB" in found
    assert "counts with in 1 of 1; " in found


def test_each_phase_is_held_against_its_prediction_and_each_kernel_of_attention_has_its_largest_error() -> None:
    eager, fused = measured("a"), measured("b", allocated_forward_bytes=GIB)
    fused = fused.model_copy(update={"tags": {"attention_kernel": "CUDNN_ATTENTION"}})
    ahead = predicted("b", 0.02)
    ahead.figures["peak_forward_bytes"] = 1.5 * GIB
    found = verdict({}, "cuda", eager, predicted("a", 0.0), fused, ahead).because
    assert "by phase: forward " in found
    assert "(largest 100.0%), backward " in found  # of a, whose made-up prediction has no forward pass
    assert found.endswith("largest error by attention kernel: CUDNN_ATTENTION 2.00%, none (eager) 0.00%")


@pytest.mark.parametrize(
    ("part", "error", "said"),
    [("activations", 0.02, "activations (+204.8 MiB)"), ("other", -0.005, "other (-51.2 MiB)")],
)
def test_the_finding_names_the_phase_and_the_part_of_the_largest_error(part: str, error: float, said: str) -> None:
    found = verdict({"a": 0.001, "b": error}, part=part)
    assert f"most off is b ({error:+.2%}), in backward most of all by {said}" in found.because


def test_every_setup_that_misses_on_a_device_is_named() -> None:
    errors = dict.fromkeys("abcde", 0.05) | dict.fromkeys("fghijk", 0.0)
    assert "(not a, b, c, d, e)" in verdict(errors).because


# What is planned --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def on_gpu() -> list[TrialSpec]:
    study = Study.load("gpu", ROOT)
    plan = study.plan(study.registry.experiment("peak_memory"))
    return [spec for spec in plan if isinstance(spec, TrialSpec) and spec.tier is None]


@pytest.mark.parametrize("profile", ["smoke", "cpu", "full"])
def test_the_setups_of_a_card_are_in_no_profile_without_one(profile: str) -> None:
    study = Study.load(profile, ROOT)
    plan = study.plan(study.registry.experiment("peak_memory"))
    names = [spec.name for spec in plan if isinstance(spec, TrialSpec)]
    assert names
    assert not [name for name in names for setup in DEVICE_SETUPS if f"-{setup}-" in f"{name}-"]
    if profile != "smoke":
        committed = [record.spec for record in study.evidence("peak_memory")[0]]
        assert {spec.name: spec for spec in committed} == {
            spec.name: spec for spec in plan if isinstance(spec, TrialSpec)
        }


def test_a_profile_that_names_no_setups_has_those_of_a_processor() -> None:
    assert peak_memory.Params.model_fields["setups"].default == tuple(SETUPS)
    assert not set(SETUPS) & set(DEVICE_SETUPS)
    assert set(COMMON) <= set(SETUPS)


def test_on_a_gpu_at_least_60_configurations_are_measured_each_with_its_prediction(on_gpu: list[TrialSpec]) -> None:
    measured = {spec.name.removeprefix("measured-"): spec.settings for spec in on_gpu if spec.arm == "measured"}
    predicted = {spec.name.removeprefix("predicted-"): spec.settings for spec in on_gpu if spec.arm == "predicted"}
    assert len(measured) >= 60
    assert measured.keys() == predicted.keys()

    def asked(settings: Any) -> dict[str, Any]:
        return settings.model_dump(include=set(Memory.model_fields) - {"kind"})

    for name, settings in measured.items():
        assert asked(settings) == asked(predicted[name])
        assert settings.device == "cuda"  # type: ignore[union-attr]


def test_what_is_measured_on_a_gpu_has_every_setup(on_gpu: list[TrialSpec]) -> None:
    names = [spec.name for spec in on_gpu if spec.arm == "measured"]
    lacking = [setup for setup in (*SETUPS, *DEVICE_SETUPS) if not any(f"-{setup}-" in name for name in names)]
    assert lacking == []


def test_what_is_measured_on_a_gpu_fits_80_gb_by_the_planner(on_gpu: list[TrialSpec]) -> None:
    room = usable_bytes(find_gpu("H100-80GB").total_bytes, quick=True)
    for spec in on_gpu:
        if spec.arm == "predicted":
            settings = spec.settings
            assert isinstance(settings, Simulation)
            workload = workload_of(settings, read_config(settings.model, Workspace(Path(), "gpu")))
            check(workload)
            assert predict(workload, quick=True).peak_bytes <= room, spec.name


def test_a_setup_that_nobody_knows_is_an_error_that_names_the_nearest() -> None:
    study = Study.load("cpu", ROOT)
    params = peak_memory.Params(model="llama-6m", other_models={}, setups=("full-paged-8bit",), points=((1, 32),))
    with pytest.raises(
        LabError, match=r"peak_memory: unknown setup 'full-paged-8bit'\. Did you mean 'full-paged-8-bit'\?"
    ):
        peak_memory.trials(params, study.profile)
