"""Specifications, configurations, and the price of inference."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from lab.cards import GIB
from lab.hub_endpoint import Hub
from lab.memory.workload import Prediction, Workload, nf4_tensors
from lab.models import shapes
from lab.planner import answer
from lab.pricing import load_config, read_spec
from tests.prices import SMALL, mistake
from tests.test_hub_endpoint import run_client

NOWHERE = "http://127.0.0.1:9"


# Specifications -------------------------------------------------------------------------------------------------


def test_null_means_the_default() -> None:
    nulls = dict.fromkeys(("amp", "quantisation", "targets", "rank", "batch", "gpu", "vram_gib", "loss", "step"))
    assert read_spec({"config": SMALL, "id": "x", **nulls}) == Workload(config=SMALL)


def test_targets_are_a_list_or_words_between_commas_or_all() -> None:
    given = {"config": SMALL, "method": "lora"}
    assert read_spec({**given, "targets": "q_proj, v_proj"}).targets == ("q_proj", "v_proj")
    assert read_spec({**given, "targets": ["q_proj"]}).targets == ("q_proj",)
    assert read_spec({**given, "targets": "all-linear"}).targets is None


def test_all_linear_is_refused_where_peft_takes_in_the_experts() -> None:
    said = mistake(lambda: answer(read_spec({"model": "mixtral-8x7b", "method": "lora", "targets": "all-linear"})))
    assert said.startswith(
        "targets: 'all-linear' stands for experts or their router, which a mixtral model holds as fused "
    )


def test_the_example_of_the_contract_is_read() -> None:
    spec = {
        "id": "free text, echoed",
        "config": {**SMALL, "model_type": "mistral"},
        "method": "lora",
        "rank": 16,
        "alpha": 16,
        "dropout": 0.1,
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "dtype": "bf16",
        "amp": None,
        "quantisation": None,
        "double_quantisation": False,
        "preparation": "none",
        "optimizer": "adamw_torch",
        "step": "foreach",
        "batch": 4,
        "length": 4096,
        "accumulation": 1,
        "checkpointing": True,
        "attention": "flash_attention_2",
        "loss": "full-shifted",
        "gpu": "A100-80GB",
        "vram_gib": 80,
    }
    read = read_spec(spec)
    assert (read.batch, read.loss, read.gpu, read.checkpointing) == (4, "full-shifted", "A100-80GB", True)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": "llama-3.1-9b"}, "unknown model 'llama-3.1-9b'. Did you mean 'llama-3.1-8b'? Known: "),
    ({}, "model is missing, and so is config. Give one: a bundled name, a hub id or a path as model, or "),
    ({"model": "gpt2", "config": SMALL}, "model and config are both given. Give one: "),
    ({"config": 3}, "config is 3; it must be an object, as in a config.json. Correct it."),
    ({"config": SMALL, "bach": 4}, "bach is not a known key. Did you mean 'batch'?"),
    ({"config": SMALL, "xyzzy": 4}, "xyzzy is not a known key. Known: accumulation, alpha, "),
    ({"config": SMALL, "method": "lroa"}, "unknown method 'lroa'. Did you mean 'lora'? Known: adapter, dora, "),
    ({"config": SMALL, "attention": ["sdpa"]}, "unknown attention '['sdpa']'."),
    ({"config": SMALL, "quantisation": "nf3"}, "unknown quantisation 'nf3'. Did you mean 'nf4'? Known: int8, nf4."),
    ({"config": SMALL, "batch": 0}, "batch is 0; it must be at least 1. Raise it."),
    ({"config": SMALL, "batch": True}, "batch is True; it must be a number, not true or false. Correct it."),
    ({"config": SMALL, "length": 1.5}, "length is 1.5; it must be a valid integer, "),
    ({"config": SMALL, "vram_gib": -1}, "vram_gib is -1; it must be greater than 0"),
    ({"config": SMALL, "vram_gib": float("inf")}, "vram_gib is inf; it must be a number of GiB. Correct it."),
    ({"config": SMALL, "gpu": "H900"}, "unknown gpu 'H900'. Did you mean "),
]


@pytest.mark.parametrize(("spec", "said"), BAD, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_a_wrong_specification_is_one_line(spec: dict[str, Any], said: str) -> None:
    assert mistake(lambda: read_spec(spec)).startswith(said)


UNPRICED: list[tuple[dict[str, Any], str]] = [
    ({"config": {**SMALL, "model_type": "bert"}}, "config: model_type 'bert' is an encoder-only model; "),
    ({"config": {**SMALL, "model_type": "mamba"}}, "config: unknown model_type 'mamba'. "),
    ({"config": {k: v for k, v in SMALL.items() if k != "hidden_size"}}, "config: hidden_size is missing; "),
    ({"length": 5000}, "length: 5000 tokens are more than the model's 4096 positions. Shorten the sequences."),
    ({"quantisation": "nf4"}, "quantisation: nf4 weights cannot be trained, and method full trains all. Choose qlora"),
    ({"method": "lora", "targets": ["qproj"]}, "unknown target module 'qproj'. Did you mean 'q_proj'? Known: "),
    ({"method": "lora", "rank": 65}, "rank: 65 is larger than k_proj, 32 wide. Lower it."),
    (
        {"optimizer": "rmsprop", "step": "fused"},
        "step: rmsprop has no fused step; it has foreach and for-loop. Choose ",
    ),
    ({"optimizer": "adafactor", "step": "foreach"}, "step: adafactor has no foreach step; it has for-loop. Choose "),
    ({"inference": True, "length": 5000}, "length: 5000 tokens are more than the model's 4096 positions."),
    ({"inference": True, "double_quantisation": True}, "double_quantisation: only nf4 has it. "),
]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("spec", "said"), UNPRICED, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_what_contradicts_itself_is_one_line_before_any_engine_is_loaded(
    spec: dict[str, Any], said: str, quick: bool
) -> None:
    assert mistake(lambda: answer(read_spec({"config": SMALL, **spec}), quick)).startswith(said)


def test_an_optimizer_without_a_model_of_its_state_is_refused_by_name() -> None:
    said = mistake(lambda: answer(read_spec({"config": SMALL, "optimizer": "adamw8bit"})))
    assert said.startswith("unknown optimizer 'adamw8bit'. Did you mean 'adamw_8bit'? Known: adafactor, ")


def test_what_an_engine_raises_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(workload: Workload) -> Prediction:
        raise RuntimeError("the first line\nthe second line")

    module = ModuleType("simulation")
    module.predict = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lab.memory.simulation", module)
    said = mistake(lambda: answer(read_spec({"config": SMALL})))
    assert said == "simulation: cannot price this: RuntimeError: the first line"


# Configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shapes())
def test_every_bundled_shape_is_found_by_name(name: str) -> None:
    assert load_config(name)["model_type"]


def test_a_config_is_read_from_a_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "other.json").write_text(json.dumps(SMALL))
    for name in (tmp_path, tmp_path / "config.json", tmp_path / "other.json"):
        assert load_config(str(name)) == SMALL


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "is not JSON: "),
        (b"\xff\xfe", "is not JSON: "),
        (b"[" * 100_000, "is not JSON: "),
        (b"[1]", "holds a list, not an object. Choose a config.json."),
    ],
    ids=["cut", "bytes", "deep", "list"],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    assert mistake(lambda: load_config(str(path))).startswith(f"model: {path} {said}")


def test_a_path_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "config.json"
    assert mistake(lambda: load_config(str(missing))) == (
        f"model: there is no file or folder {missing}. Correct the path."
    )
    assert mistake(lambda: load_config(str(tmp_path))) == (
        f"model: {tmp_path} has no config.json. Choose the folder that has it."
    )


CONFIGS = """
    from lab.pricing import load_config
    answer({name: attempt(lambda: sorted(load_config(name))) for name in arguments})
"""
OFFLINE = "or choose a bundled model (lab fit --list models) or a path to a config.json."


def test_of_a_hub_repository_the_config_alone_is_downloaded(hub: Hub) -> None:
    files = {"config.json": json.dumps({**SMALL, "auto_map": {"AutoConfig": "code.Evil"}}).encode()}
    files |= {"code.py": b"raise SystemExit('run')", "model.safetensors": b"0" * 100}
    hub.commit("model", "lab/small", files)
    hub.commit("model", "lab/gated", files)
    hub.gate("lab/gated")
    hub.commit("model", "lab/adapter", {"adapter_config.json": b"{}"})
    names = ["lab/small", "lab/gated", "lab/adapter", "lab/nothing", "lab/not--a--name"]
    seen = run_client(CONFIGS, hub.environment(), *names)
    assert seen["lab/small"] == str(sorted([*SMALL, "auto_map"]))
    where = "LabError: hub: {} at revision main: "
    for name, said in (
        ("lab/gated", "access to it must be asked for on the hub; log in with `hf auth login`"),
        ("lab/adapter", "it has no config.json (an adapter, or GGUF files alone?). Name the base model"),
        ("lab/nothing", "the hub has no such repository (or it is private). Correct the name"),
        ("lab/not--a--name", "this is not how the hub names a repository (owner/name). Correct it"),
    ):
        assert seen[name] == f"{where.format(name)}{said}, {OFFLINE}"
    asked = {request.path for request in hub.requests if "/resolve/" in request.path}
    assert {path.rsplit("/", 1)[-1] for path in asked} == {"config.json"}


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}], ids=["offline", "nowhere"])
def test_without_the_hub_an_id_is_one_line_that_names_the_offline_choice(hub: Hub, environment: dict[str, str]) -> None:
    seen = run_client(CONFIGS, hub.environment() | environment, "lab/small")
    assert seen["lab/small"].startswith("LabError: hub: lab/small at revision main: the hub cannot be reached")
    assert seen["lab/small"].endswith(OFFLINE)


# Inference ------------------------------------------------------------------------------------------------------


def test_the_cache_of_a_known_model_is_the_published_one() -> None:
    """8,192 tokens of Llama-3.1-8B: 2 x 32 layers x 8 heads x 128 x 2 bytes x 8,192 = 1 GiB."""
    found = answer(read_spec({"model": "llama-3.1-8b", "inference": True, "length": 8192})).prediction
    assert found.parts["kv_cache"] == GIB
    assert found.parts["weights"] == 8_030_261_248 * 2
    assert found.parts["workspace"] == 8 * 2**20 + 128 * 1024
    assert found.peak_bytes == sum(found.parts.values())


@pytest.mark.parametrize(
    "more",
    [
        {"model_type": "llama"},
        {"model_type": "mistral", "sliding_window": 8},
        {"model_type": "gemma2", "sliding_window": 8, "head_dim": 16},
        {"model_type": "qwen3", "head_dim": 32},
    ],
    ids=lambda more: more["model_type"],
)
def test_the_cache_holds_the_bytes_that_transformers_gives_it(more: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**SMALL, "num_hidden_layers": 4, **more}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    with torch.no_grad():
        prompt = model(torch.zeros(2, 20, dtype=torch.long), use_cache=True)
        after = model(torch.zeros(2, 1, dtype=torch.long), past_key_values=prompt.past_key_values, use_cache=True)
    held = sum(
        tensor.untyped_storage().nbytes()
        for layer in after.past_key_values.layers
        for tensor in (layer.keys, layer.values)
    )
    spec = {"config": config, "inference": True, "batch": 2, "length": 21, "dtype": "fp32"}
    found = answer(read_spec(spec)).prediction
    assert found.parts["kv_cache"] == held
    assert found.parts["weights"] == sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize("double", [False, True])
def test_a_matrix_in_nf4_holds_the_bytes_that_bitsandbytes_gives_it(double: bool) -> None:
    import torch
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(160, 64), compress_statistics=double, quant_type="nf4")
    tensors = [packed, state.absmax, state.code]
    if double:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    assert sum(nf4_tensors(160 * 64, double)) == sum(tensor.nbytes for tensor in tensors)


def test_a_quantised_base_of_inference_is_smaller_by_what_its_matrices_are() -> None:
    spec = {"model": "llama-3.1-8b", "inference": True}
    sizes = {
        kind: answer(read_spec({**spec, **more})).prediction.parts["weights"] / GIB  # type: ignore[dict-item]
        for kind, more in {
            "bf16": {},
            "int8": {"quantisation": "int8"},
            "nf4": {"quantisation": "nf4"},
            "double": {"quantisation": "nf4", "double_quantisation": True},
        }.items()
    }
    # 6.98 G elements in the layers' matrices, 1.05 G in embedding and head.
    layers, rest = 6.979_321_856e9, 2 * (8_030_261_248 - 6_979_321_856)
    assert sizes["bf16"] == pytest.approx((2 * layers + rest) / GIB, rel=1e-3)
    assert sizes["int8"] == pytest.approx((layers + rest) / GIB, rel=1e-3)
    assert sizes["nf4"] == pytest.approx((0.5625 * layers + rest) / GIB, rel=1e-3)
    assert sizes["double"] == pytest.approx(((0.5 + 1 / 64 + 4 / (64 * 256)) * layers + rest) / GIB, rel=1e-3)
