"""What inference holds and takes, on real tensors and on those without storage; and that each fault is seen."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, DynamicCache

from lab import inference
from lab.errors import LabError
from lab.inference import kv_cache_bytes, measure
from lab.memory.ledger import Ledger, held_bytes, weights
from lab.models import shapes
from lab.runners import execute
from lab.specs import Inference, SimulatedInference
from lab.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, "smoke")


LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "vocab_size": 64,
    "max_position_embeddings": 128,
}
GPT: dict[str, Any] = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128, "vocab_size": 64}
SLIDING = {**LLAMA, "num_key_value_heads": 2, "sliding_window": 8, "max_position_embeddings": 128}

KINDS: dict[str, tuple[dict[str, Any], int]] = {
    "grouped queries": ({**LLAMA, "num_key_value_heads": 2}, 2 * 3 * 2 * 8),
    "a key for each query": ({**LLAMA, "num_key_value_heads": 4}, 2 * 3 * 4 * 8),
    "one key for all": ({**GPT, "model_type": "gpt_bigcode", "multi_query": True}, 2 * 2 * 1 * 8),
    "fused keys": ({**GPT, "model_type": "gpt2"}, 2 * 2 * 4 * 8),
    "heads of their own width": (
        {**LLAMA, "model_type": "qwen3", "num_key_value_heads": 2, "head_dim": 16},
        2 * 3 * 2 * 16,
    ),
}
"""By kind, a configuration and the elements that a token adds to the cache, counted by hand."""


def small(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=dtype).eval()


def measured(model: Any, batch: int, length: int, tokens: int) -> dict[str, int]:
    return measure(model, model.config, torch.zeros(batch, length, dtype=torch.long), tokens, Ledger())


# The formula ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_cache_holds_what_the_formula_says_to_the_byte(kind: str, dtype: torch.dtype) -> None:
    config, elements = KINDS[kind]
    found = measured(small(config, dtype), batch=3, length=11, tokens=2)
    said = kv_cache_bytes(AutoConfig.for_model(**config), 3, 13, dtype.itemsize)
    assert found["cache_bytes"] == said == elements * 3 * 13 * dtype.itemsize
    assert found["prefill_cache_bytes"] == elements * 3 * 11 * dtype.itemsize


@pytest.mark.parametrize("kind", ["mistral", "gemma3_text"])
@pytest.mark.parametrize("length", [3, 7, 8, 9, 30])
def test_a_sliding_window_holds_no_more_tokens_than_it_sees_once_one_is_decoded(kind: str, length: int) -> None:
    further = {"head_dim": 8, "sliding_window_pattern": 2} if kind == "gemma3_text" else {}
    config = {**SLIDING, "model_type": kind, **further}
    sliding, full = (2, 1) if kind == "gemma3_text" else (3, 0)  # every second of gemma's layers sees all
    one = 2 * 2 * 8 * 4
    found = measured(small(config), batch=1, length=length, tokens=1)
    said = kv_cache_bytes(AutoConfig.for_model(**config), 1, length + 1, 4)
    assert found["cache_bytes"] == said == one * (sliding * min(length + 1, 8) + full * (length + 1))
    # A prompt that is longer than the window is held whole until then: the window is a view of it.
    assert found["prefill_cache_bytes"] == one * 3 * length


def test_a_formula_that_forgets_grouped_queries_says_more_where_they_are_grouped_alone() -> None:
    for kind, factor in (("grouped queries", 2), ("a key for each query", 1), ("one key for all", 4)):
        said = inference.formulas(AutoConfig.for_model(**KINDS[kind][0]), 2, 5, 2)
        assert said["multi_head_bytes"] == factor * said["formula_bytes"]


@given(st.integers(1, 64), st.integers(1, 4096), st.sampled_from([1, 2, 4]))
def test_the_formula_grows_with_batch_tokens_and_bytes(batch: int, tokens: int, dtype_bytes: int) -> None:
    config = AutoConfig.for_model(**json.loads(shapes()["llama-3.1-8b"].read_text()))
    assert kv_cache_bytes(config, batch, tokens, dtype_bytes) == 65536 * batch * tokens * dtype_bytes


def test_an_encoder_has_no_cache() -> None:
    with pytest.raises(LabError, match=r"model_type 'bert' is an encoder-only model; only decoders are covered"):
        kv_cache_bytes(BertConfig(), 1, 1)


def test_a_cache_that_repeats_its_keys_for_every_query_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fault that the control of the experiment plants in the formula, planted in the cache."""
    model = small(KINDS["grouped queries"][0])
    sound = measured(model, 1, 5, 1)["cache_bytes"]
    whole = inference.keys_and_values
    monkeypatch.setattr(inference, "keys_and_values", lambda cache: [t.repeat_interleave(2, 1) for t in whole(cache)])
    assert measured(model, 1, 5, 1)["cache_bytes"] == 2 * sound


# Bytes ----------------------------------------------------------------------------------------------------------


def test_the_peaks_hold_weights_and_cache_and_little_else_while_decoding() -> None:
    model = small(KINDS["grouped queries"][0])
    found = measured(model, batch=2, length=64, tokens=3)
    assert found["weights_bytes"] == held_bytes(weights(model))
    both = found["weights_bytes"] + found["cache_bytes"]
    assert both < found["decode_peak_bytes"] < 1.2 * both
    assert found["decode_peak_bytes"] < found["prefill_peak_bytes"]


@pytest.mark.parametrize("quantisation", [None, "nf4"])
@pytest.mark.parametrize("model", ["llama-6m", "llama-7m-untied"])
def test_the_simulated_bytes_are_those_of_real_tensors(model: str, quantisation: Any, workspace: Workspace) -> None:
    setup = {"model": model, "batch": 2, "length": 24, "tokens": 2, "precision": "bf16", "quantisation": quantisation}
    real = execute(Inference(**setup), workspace).figures
    simulated = execute(SimulatedInference(**setup), workspace).figures
    assert simulated == real
    assert ("quantised_weights_bytes" in real) == bool(quantisation)


def test_a_simulated_model_may_be_of_any_size_and_slide(workspace: Workspace) -> None:
    setup: dict[str, Any] = {"model": "gemma-3-1b", "precision": "bf16", "length": 2048, "device": "cuda"}
    found = execute(SimulatedInference(**setup), workspace).figures
    assert found["base_cache_bytes"] == found["formula_bytes"] < found["base_prefill_cache_bytes"]
    assert found["base_prefill_cache_bytes"] == 2 * 26 * 256 * 2048 * 2


def test_a_simulated_card_does_not_depend_on_the_processor_that_simulates_it(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bitsandbytes packs weights anew for a processor with bf16 products, in evaluation."""
    setup: dict[str, Any] = {
        "model": "llama-6m",
        "precision": "bf16",
        "quantisation": "nf4",
        "length": 24,
        "device": "cuda",
    }
    found = []
    for has_it in (False, True):
        monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda has_it=has_it: has_it)
        found.append(execute(SimulatedInference(**setup), workspace).figures)
    assert found[0] == found[1]


# Ways and times -------------------------------------------------------------------------------------------------


def infer(workspace: Workspace, **changes: Any) -> Any:
    setup: dict[str, Any] = {"model": "llama-6m", "length": 8, "tokens": 2}
    return execute(Inference.model_validate({**setup, **changes}), workspace)


def test_merging_gives_back_the_base_s_bytes_and_the_adapter_s_outputs(workspace: Workspace) -> None:
    found = infer(workspace, method="lora").figures
    assert found["merged_weights_bytes"] == found["base_weights_bytes"] < found["unmerged_weights_bytes"]
    assert found["merged_distance"] < 5e-6 < 1e-2 < found["adapter_distance"]
    caches = {found[f"{way}_cache_bytes"] for way in ("base", "unmerged", "merged")}
    assert caches == {found["formula_bytes"]}
    assert not [name for name in found if "seconds" in name]


def test_an_adapter_that_cannot_merge_has_no_merged_way(workspace: Workspace) -> None:
    found = infer(workspace, method="adapter").figures
    assert found["adapter_distance"] > 1e-2
    assert not [name for name in found if name.startswith("merged")]


def test_what_is_timed_is_every_way_in_every_round(workspace: Workspace) -> None:
    outcome = infer(workspace, method="lora", rounds=2)
    ways = ("base", "unmerged", "merged")
    assert set(outcome.series) == {f"{w}_{what}_seconds" for w in ways for what in ("prefill", "decode", "together")}
    assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in outcome.series.values())
    assert outcome.figures["base_over_base"] == 1
    assert {f"{w}_decode_over_prefill" for w in ways} <= set(outcome.figures)
    assert outcome.figures["cached_distance"] < 5e-6


def test_the_same_settings_give_the_same_figures_but_for_time(workspace: Workspace) -> None:
    first, again = (infer(workspace, method="lora", rounds=1).figures for _ in range(2))
    timed = ("seconds", "_over_prefill", "_over_base")
    assert {k: v for k, v in first.items() if not k.endswith(timed)} == {
        k: v for k, v in again.items() if not k.endswith(timed)
    }


def test_ratios_are_taken_within_a_round_and_their_median_told() -> None:
    seconds = {
        "base_prefill_seconds": [1.0, 2.0, 100.0],
        "base_decode_seconds": [3.0, 6.0, 100.0],
        "base_together_seconds": [1.0, 2.0, 100.0],
        "merged_prefill_seconds": [1.0, 1.0, 1.0],
        "merged_decode_seconds": [3.0, 12.0, 200.0],
        "merged_together_seconds": [1.0, 1.0, 1.0],
    }
    found = inference._times(seconds, ["base", "merged"])
    assert found["base_decode_seconds"] == 6.0
    assert found["base_decode_over_prefill"] == 3.0
    assert found["base_together_over_prefill"] == 1.0
    assert found["merged_over_base"] == 2.0


def test_a_cache_that_forgets_a_token_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(KINDS["grouped queries"][0])
    prompts = torch.arange(12)[None]
    assert inference._cached_distance(model, prompts, 2) < 5e-6

    class Forgetful(DynamicCache):
        def update(self, keys: Any, values: Any, layer: int, *rest: Any, **more: Any) -> Any:
            if keys.shape[-2] > 1:
                keys, values = keys.clone(), values.clone()
                keys[:, :, 0], values[:, :, 0] = 0, 0
            return super().update(keys, values, layer, *rest, **more)

    monkeypatch.setattr(inference, "DynamicCache", Forgetful)
    assert inference._cached_distance(model, prompts, 2) > 1e-3


def test_a_merge_that_leaves_the_adapter_out_is_seen(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "merge", lambda model: model.unload())
    assert infer(workspace, method="lora").figures["merged_distance"] > 1e-2


# Refused --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"method": "lora", "quantisation": "nf4"},
            r"inference: method lora on a base in nf4; one thing at a time is compared\. Choose method full, or no quantisation",
        ),
        ({"method": "qlora"}, r"inference: method qlora on a base in nf4; one thing at a time"),
        (
            {"method": "prompt"},
            r"inference: method prompt puts virtual tokens into the cache; .* Choose lora, dora, ia3, mora or adapter",
        ),
        (
            {"length": 4095},
            r"inference: 4097 tokens are read \(the prompt of 4095, and 2 decoded\), and llama-6m has 4096 positions\. Lower",
        ),
        ({"length": 2048, "rounds": 1}, r"4098 tokens are read \(the prompt of 2048 twice, and 2 decoded\)"),
    ],
)
def test_what_is_not_covered_is_refused(changes: dict[str, Any], said: str, workspace: Workspace) -> None:
    with pytest.raises(LabError, match=said):
        infer(workspace, **changes)


def test_a_simulation_refuses_a_method_and_more_tokens_than_positions(workspace: Workspace) -> None:
    with pytest.raises(
        LabError, match=r"simulated inference: method is lora; only bases are covered\. Choose full, or"
    ):
        execute(SimulatedInference(model="llama-6m", method="lora"), workspace)
    with pytest.raises(LabError, match=r"length: 4097 tokens are more than the model's 4096 positions"):
        execute(SimulatedInference(model="llama-6m", length=4096), workspace)
