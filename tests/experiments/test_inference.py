"""The judge of what inference needs, on made-up records: each sense both ways, what is told beside them, the controls."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from experiments import inference
from experiments.inference import EXPERIMENT, MARGIN, SAME, SHARE, SLOWER, Held, Params, Timed
from lab.claims import Evidence, Verdict, judge
from lab.params import Profile
from lab.records import Record
from lab.specs import Inference, SimulatedInference, TrialSpec
from tests.test_records import make_record

CLAIM = EXPERIMENT.claims[0]
SPREAD = (0.99, 1.0, 1.01)
WEIGHTS = 1000.0


def ways_of(spec: TrialSpec) -> list[str]:
    settings: Any = spec.settings
    adapted = ["unmerged", "merged"] if settings.method == "lora" else ["unmerged"]
    return ["base", *(["quantised"] if settings.quantisation else []), *(adapted if settings.method != "full" else [])]


def made_up_figures(spec: TrialSpec) -> dict[str, Any]:
    """What a trial leaves: a cache of a byte for each token of 1,000-byte weights, decoding at 5 times the price of reading."""
    settings: Any = spec.settings
    tokens = float(settings.batch * (settings.length + settings.tokens))
    figures: dict[str, Any] = {"formula_bytes": tokens, "multi_head_bytes": 4 * tokens}
    for way in ways_of(spec):
        weights = WEIGHTS / 4 if way == "quantised" else WEIGHTS
        figures |= {f"{way}_weights_bytes": weights, f"{way}_cache_bytes": tokens, f"{way}_prefill_cache_bytes": tokens}
        figures |= {f"{way}_prefill_peak_bytes": 2 * weights, f"{way}_decode_peak_bytes": (weights + tokens) / 0.9}
        if getattr(settings, "rounds", 0):
            figures |= {f"{way}_{what}_seconds": 0.1 for what in ("prefill", "decode", "together")}
            figures |= {f"{way}_decode_over_prefill": 5.0, f"{way}_together_over_prefill": 1.0}
            figures[f"{way}_over_base"] = 1.3 if way in ("unmerged", "quantised") else 1.0
            figures["cached_distance"] = 1e-7
    if settings.method == "lora":
        figures |= {"adapter_distance": 0.5, "merged_distance": 1e-7}
    return figures


def profile(device: str = "cpu") -> Profile:
    sizes = {"train": 1, "validation": 1, "test": 1}
    return Profile.model_validate({"device": device, "threads": 2, "tiny": {}, "data": sizes})


PARAMS = Params(
    held={"llama-6m": Held(precision="bf16", points=((1, 8), (8, 98)), four_bit=True)},
    timed={"llama-6m": Timed(batches=(1, 32), seeds=3, rounds=2, length=16, tokens=4)},
    real_scale={"llama-3.1-8b": ((1, 9), (8, 99))},
)


def records(tier: str = "cpu", few: bool = True, changed: Mapping[str, float] | None = None) -> list[Record]:
    """Those of the planned trials; `changed` figures, where a trial has them, or by arm as `arm__figure`.

    Args:
        few: also at few tokens, of which the cache holds less than a tenth of the weights.
    """
    found = []
    for spec in inference.trials(PARAMS, profile()):
        if (spec.tier or "cpu") != tier:
            continue
        figures = made_up_figures(spec)
        for name, value in (changed or {}).items():
            arm, _, figure = name.rpartition("__")
            if figure in figures and arm in ("", spec.arm):
                figures[figure] = value
        spread = SPREAD[spec.settings.seed % 3] if isinstance(spec.settings, Inference) else 1.0
        for name in figures:
            if name.endswith(("_over_prefill", "_over_base")):
                figures[name] *= spread
        if not few and spec.arm == "memory":
            larger = {"formula_bytes": 500.0 + figures["formula_bytes"]}
            figures |= larger | {f"{way}_cache_bytes": larger["formula_bytes"] for way in ways_of(spec)}
        found.append(make_record(spec, figures=figures))
    return found


def verdict(found: list[Record], tier: Any = "cpu") -> Verdict:
    return judge(EXPERIMENT, CLAIM, "cpu", tier, found, len(found))


# Both ways ------------------------------------------------------------------------------------------------------


def test_a_need_in_every_regime_supports_the_claim() -> None:
    found = verdict(records(few=False))
    assert found.verdict == "supported"
    assert found.unit == "cache bytes for a byte of weights"
    assert "a formula that forgets grouped queries: refuted" in found.control
    assert "a formula in fp32: refuted" in found.control


def test_a_need_in_no_regime_refutes_it() -> None:
    nothing = {
        "formula_bytes": 10.0,
        "base_cache_bytes": 10.0,
        "unmerged_cache_bytes": 10.0,
        "merged_cache_bytes": 10.0,
        "quantised_cache_bytes": 10.0,
    }
    ratios = {"base_decode_over_prefill": 1.2, "quantised_decode_over_prefill": 1.2, "unmerged_over_base": 1.0}
    found = verdict(records(changed={**nothing, **ratios}))
    assert found.verdict == "refuted"
    assert "a cache as large as the weights, decoding ten times as dear: supported" in found.control


def test_a_need_with_many_tokens_alone_is_conditional_and_both_sides_are_named() -> None:
    found = verdict(records())
    assert found.verdict == "conditional"
    assert "yes: llama-6m bf16 8 x 98 0.8, llama-6m nf4 8 x 98 3.2; no: llama-6m bf16 1 x 8 0.01" in found.because
    for control, answer in (
        ("a cache of nothing, decoding at the price of reading", "refuted"),
        ("a cache as large as the weights, decoding ten times as dear", "supported"),
        ("a formula that forgets grouped queries", "refuted"),
    ):
        assert f"{control}: {answer}" in found.control


def test_bytes_alone_are_judged_where_nothing_has_storage() -> None:
    found = verdict(records("sim"), "sim")
    assert found.verdict == "conditional"
    assert "decoded" not in found.because
    assert "a formula that forgets grouped queries: refuted" in found.control
    assert verdict(records("sim", few=False), "sim").verdict == "supported"


# Boundaries -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "expected"), [(SHARE, "supported"), (SHARE * 0.999, "conditional")])
def test_the_cache_is_a_need_from_its_share_of_the_weights_on(share: float, expected: str) -> None:
    size = share * WEIGHTS
    caches = {"memory__formula_bytes": size, "memory__base_cache_bytes": size, "memory__quantised_cache_bytes": size}
    assert verdict(records(changed=caches)).verdict == expected


@pytest.mark.parametrize(
    ("figure", "bound", "sense"),
    [
        ("plain__base_decode_over_prefill", SLOWER, "a token decoded"),
        ("adapter__unmerged_over_base", 1 + MARGIN, "an adapter beside the base"),
    ],
)
def test_a_time_is_a_need_where_its_whole_interval_lies_above_the_bound(figure: str, bound: float, sense: str) -> None:
    more, less, near = (
        verdict(records(few=False, changed={figure: value})) for value in (1.2 * bound, 0.8 * bound, bound)
    )
    assert (more.verdict, less.verdict, near.verdict) == ("supported", "conditional", "inconclusive")
    assert f"{sense} at least" in less.because
    assert "no: llama-6m" in less.because
    assert "undecided: llama-6m" in near.because


@pytest.mark.parametrize("way", ["base", "quantised", "unmerged", "merged"])
def test_one_byte_that_the_formula_does_not_say_refutes_it(way: str) -> None:
    found = records(few=False)
    place, wrong = next((i, r) for i, r in enumerate(found) if f"{way}_cache_bytes" in r.figures)
    size = wrong.figure(f"{way}_cache_bytes") + 1
    found[place] = wrong.model_copy(update={"figures": wrong.figures | {f"{way}_cache_bytes": size}})
    judged = verdict(found)
    assert judged.verdict == "refuted"
    assert judged.because == f"the cache is not as large as the formula says: {wrong.spec.name} ({way})"


@pytest.mark.parametrize("figure", ["cached_distance", "merged_distance"])
def test_outputs_that_differ_decide_nothing(figure: str) -> None:
    found = verdict(records(changed={f"lora__{figure}": 2 * SAME}))
    assert found.verdict == "inconclusive"
    assert found.because == f"lora-llama-6m-b1-seed0: {figure} is 0.0002; the same outputs differ by 0.0001 at most."
    assert verdict(records(changed={f"lora__{figure}": SAME})).verdict == "conditional"
    assert verdict(records(changed={"quantised__cached_distance": 0.01})).verdict == "conditional"  # bf16 rounds more


# Controls and what is missing -----------------------------------------------------------------------------------


def test_tokens_read_together_are_not_decoded_one_by_one() -> None:
    changed = inference._changed(inference._without_need)(Evidence(records(few=False)))
    cells = inference._decode_cells(changed)
    assert {cell.answer for cell in cells} == {"no"}
    assert len(cells) == 4
    assert {cell.answer for cell in inference._decode_cells(Evidence(records()))} == {"yes"}


def test_without_times_or_a_second_point_nothing_is_decided() -> None:
    found = records(few=False)
    bytes_alone = [r for r in found if r.spec.arm == "memory"]
    assert verdict(bytes_alone).verdict == "inconclusive"
    assert "nothing was timed: a token decoded at least 2 times one read" in verdict(bytes_alone).because
    one_point = [r for r in found if r.spec.name != "memory-llama-6m-1x8"]
    assert "bytes at one point only" in verdict(one_point).because


# What is told ---------------------------------------------------------------------------------------------------


def test_it_tells_where_the_cache_outweighs_the_weights_what_merging_and_what_4_bits_give() -> None:
    because = verdict(records()).because
    # 100 tokens of a sequence hold 100 bytes: ten sequences as many as the weights, in 4 bits two and a half.
    assert "as many bytes as weights: llama-6m bf16 of 9.3e-07 GiB from batch 10 at 98 tokens" in because
    assert "from batch 2.5 at 98 tokens" in because
    assert "at its fewest tokens the cache is 1.0% to 4.0% of the weights" in because
    assert "weights and formula explain 90.0% (llama-6m " in because
    assert ") to 90.0% of the peak while decoding; " in because
    assert "time, merged: llama-6m lora merged batch 1 1 [" in because
    assert "time, 4 bits over 16: llama-6m nf4 batch 1 1.3 [" in because
    assert "4 bits hold 25% to 25% of the weights' bytes" in because


def test_it_tells_what_reading_the_prompt_takes_where_the_formula_explains_least_of_it() -> None:
    because = verdict(records()).because
    # 1,010 bytes of 2,000 and 1,800 of 2,000; in 4 bits 260 and 1,050 of 500: the made-up peaks know no cache.
    assert (
        "; 50.5% (llama-6m bf16 1 x 8) to 210.0% of that while the prompt is read, which is up to 1.8 times" in because
    )
    assert "1.8 times as much (llama-6m bf16 1 x 8: 1.9e-06 GiB)" in because
    simulated = verdict(records("sim"), "sim").because
    assert "of that while the prompt is read" in simulated
    assert "ms for a token" not in simulated


def test_it_tells_what_a_token_takes_that_is_read_and_one_that_is_written() -> None:
    found = records(changed={"plain__base_decode_seconds": 0.25})
    for place, r in enumerate(found):
        if r.spec.arm == "plain":
            figures = {**r.figures, "base_prefill_seconds": 0.1 * SPREAD[r.setting("seed")]}
            found[place] = r.model_copy(update={"figures": figures})
    because = verdict(found).because
    assert (
        "ms for a token read and for one written: llama-6m fp32 batch 1 100 [95, 105] and 250 [250, 250], " in because
    )
    assert "llama-6m nf4 batch 1 100 [100, 100] and 100 [100, 100]" in because


def test_it_tells_from_how_many_tokens_on_the_cache_counts() -> None:
    # A byte a token: a tenth of 1,000 bytes of weights are 100 tokens, of 250 bytes 25.
    found = verdict(records())
    assert found.flips == (
        "the cache holds 0.1 of the weights' bytes (as many as they) from so many tokens on, batch x length: llama-6m bf16 100 "
        "(1,000), llama-6m nf4 25 (250); a token decoded at least 2 times one read: wherever the repeats decide; an adapter "
        "beside the base at least 1.05 times its time: wherever the repeats decide"
    )
    assert verdict(records(few=False)).flips == ""
    assert verdict(records("sim"), "sim").flips.endswith("llama-3.1-8b bf16 100 (1,000), llama-3.1-8b nf4 25 (250)")
    cheap = verdict(records(few=False, changed={"adapter__unmerged_over_base": 1.0})).flips
    assert cheap.startswith(
        "cache at least 0.1 of the weights: wherever it was counted; a token decoded at least 2 times"
    )
    assert "an adapter beside the base at least 1.05 times its time (yes: llama-6m lora batch 1 1.3 [" in cheap
    assert "; no: llama-6m adapter batch 1 1 [" in cheap


def test_where_layers_have_a_window_it_tells_sequences_of_a_length_in_the_place_of_tokens() -> None:
    found = []
    for r in records("sim"):
        size = 400.0 if r.setting("batch") > 1 else r.figure("formula_bytes")  # 50 bytes a sequence of 99 tokens
        caches = {f"{way}_cache_bytes": size for way in ("base", "quantised")}
        found.append(r.model_copy(update={"figures": {**r.figures, **caches, "formula_bytes": size}}))
    assert "llama-3.1-8b bf16 2 (20) sequences of 99 tokens, llama-3.1-8b nf4 0.5 (5)" in verdict(found, "sim").flips


def test_it_tells_where_a_prompt_is_held_beyond_its_window() -> None:
    assert "held whole" not in verdict(records()).because
    because = verdict(records("sim", changed={"base_prefill_cache_bytes": 1600.0}), "sim").because
    assert "a prompt beyond the window is held whole until the next token: 1.6e+02 times its cache" in because
    assert "2 times its cache on llama-3.1-8b at 99 tokens" in because


def test_the_picture_has_a_line_for_each_model_and_precision() -> None:
    lines = inference.cache_lines(Evidence(records()))
    assert set(lines) == {"llama-6m bf16", "llama-6m nf4"}
    assert lines["llama-6m nf4"].x == [10, 800]
    assert lines["llama-6m nf4"].y == pytest.approx([0.04, 3.2])


# Plan -----------------------------------------------------------------------------------------------------------


def test_what_is_timed_takes_all_threads_and_bytes_are_counted_side_by_side() -> None:
    specs = inference.trials(PARAMS, profile())
    assert {spec.threads for spec in specs if spec.arm == "memory"} == {1}
    assert {spec.threads for spec in specs if spec.arm != "memory"} == {2}
    assert [s.name for s in specs if s.arm == "plain"] == [
        f"plain-llama-6m-b{b}-seed{s}" for b in (1, 32) for s in range(3)
    ]
    assert {s.settings.precision for s in specs if s.arm == "quantised"} == {"bf16"}  # type: ignore[union-attr]
    assert {s.methods() for s in specs} == {frozenset({name}) for name in ("full", "lora", "adapter")}
    simulated = [s for s in specs if s.tier == "sim"]
    assert [s.name for s in simulated] == ["sim-memory-llama-3.1-8b-1x9", "sim-memory-llama-3.1-8b-8x99"]
    assert all(isinstance(s.settings, SimulatedInference) and s.settings.device == "cuda" for s in simulated)


def test_on_a_gpu_the_same_is_measured_there() -> None:
    specs = inference.trials(PARAMS, profile("cuda"))
    assert {s.settings.device for s in specs} == {"cuda"}  # type: ignore[union-attr]
