"""The shape read from a config.json is that of the model which transformers builds from it, and of nothing else."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
import textwrap
from collections import Counter
from typing import Any

import pytest

from lab import models
from lab.errors import LabError
from lab.memory.architecture import ALIASES, DEFAULTS, FULL, IA3_FEEDFORWARD, IA3_TARGETS, SLIDING, Architecture

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "vocab_size": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT_SIZES = {"n_embd": 48, "n_layer": 3, "n_head": 4, "n_positions": 40, "vocab_size": 96}

SMALL: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama with biases": {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    "llama with wide heads": {"head_dim": 20},
    "llama without grouped heads": {"num_key_value_heads": None},
    "mistral": {"sliding_window": 8},
    "mistral without a window": {"sliding_window": None, "num_key_value_heads": 4},
    "qwen2": {},
    "qwen2 with a window": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "qwen3": {"head_dim": 16},
    "qwen3 with an uneven width": {"head_dim": 16, "hidden_size": 50},
    "qwen3 with heads of 128": {"attention_bias": True, "tie_word_embeddings": True},
    "gemma": {"num_key_value_heads": 1},
    "gemma2": {"head_dim": 16, "sliding_window": 8},
    "gemma2 untied": {"tie_word_embeddings": False, "attention_bias": True},
    "gemma3_text": {"head_dim": 16, "num_hidden_layers": 7},
    "gemma3_text with a pattern": {"sliding_window_pattern": 2},
    "gemma3_text with its layers named": {"layer_types": [FULL, SLIDING, FULL], "sliding_window": 8},
    "phi": {"resid_pdrop": 0.1},
    "phi with normed heads": {"qk_layernorm": True, "tie_word_embeddings": True},
    "phi3": {"sliding_window": 8},
    "granite": {"attention_bias": True, "attention_dropout": 0.1},
    "smollm3": {},
    "smollm3 with a window": {"use_sliding_window": True, "sliding_window": 8, "no_rope_layers": [1, 0, 1]},
    "gpt2": GPT_SIZES,
    "gpt2 untied": GPT_SIZES | {"n_inner": 100, "tie_word_embeddings": False},
    "gpt2 by the other names": {},
    "gpt_bigcode": GPT_SIZES,
    "gpt_bigcode with all heads": GPT_SIZES | {"multi_query": False, "n_inner": 100},
    "mixtral": {"num_local_experts": 4},
    "qwen2_moe": {"num_experts": 4, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 40},
    "qwen2_moe without biases": {"qkv_bias": False, "use_sliding_window": True, "max_window_layers": 2},
    "qwen2_moe with a dense layer": {"num_experts": 4, "mlp_only_layers": [1], "moe_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "head_dim": 16, "moe_intermediate_size": 24},
    "qwen3_moe by the other name": {"num_local_experts": 4, "use_sliding_window": True, "sliding_window": 8},
    "qwen3_moe with dense layers": {"num_experts": 4, "decoder_sparse_step": 2, "moe_intermediate_size": 24},
}


def small(case: str) -> dict[str, Any]:
    """A small config of the kind that the case's name begins with."""
    fields = SMALL[case]
    return {"model_type": case.split()[0], **({} if "n_embd" in fields else SIZES), **fields}


def bundled(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(models.shapes()[name].read_text(encoding="utf-8"))
    return config


CONFIGS = {case: small(case) for case in SMALL} | {name: bundled(name) for name in models.shapes()}

PUBLISHED = {
    "gemma-2-2b": 2_614_341_888,
    "gemma-2-9b": 9_241_705_984,
    "gemma-2b": 2_506_172_416,
    "gemma-3-1b": 999_885_952,
    "gpt2": 124_439_808,
    "gpt2-xl": 1_557_611_200,
    "granite-3.1-2b": 2_533_531_648,
    "llama-2-13b": 13_015_864_320,
    "llama-2-7b": 6_738_415_616,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b-v0.1": 7_241_732_096,
    "mistral-7b-v0.3": 7_248_023_552,
    "mixtral-8x7b": 46_702_792_704,
    "phi-2": 2_779_683_840,
    "phi-3-mini-4k": 3_821_079_552,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920,
    "qwen3-1.7b": 1_720_574_976,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-4b": 4_022_468_096,
    "qwen3-8b": 8_190_735_360,
    "smollm2-1.7b": 1_711_376_384,
    "smollm2-135m": 134_515_008,
    "smollm2-360m": 361_821_120,
    "smollm3-3b": 3_075_098_624,
    "starcoderbase-1b": 1_137_207_296,
}
"""Parameters as the models' pages state them, a tied head counted once."""


def built(config: dict[str, Any]) -> Any:
    """The model that transformers makes of a config, without storage."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))


def decoder_layers(model: Any) -> Any:
    return model.transformer.h if hasattr(model, "transformer") else model.model.layers


def linears_found(module: Any) -> Counter[tuple[str, int, int, bool]]:
    """(name, inputs, outputs, bias) of every linear module in `module`."""
    import torch
    from transformers.pytorch_utils import Conv1D

    def size(found: Any) -> tuple[int, int]:
        return (found.nx, found.nf) if isinstance(found, Conv1D) else (found.in_features, found.out_features)

    return Counter(
        (path.rsplit(".", 1)[-1], *size(found), found.bias is not None)
        for path, found in module.named_modules()
        if isinstance(found, torch.nn.Linear | Conv1D)
    )


# What transformers builds --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_and_linears_are_those_of_the_model_that_transformers_builds(name: str) -> None:
    shape, model = Architecture.of(CONFIGS[name]), built(CONFIGS[name])
    assert shape.parameters() == sum(p.numel() for p in model.parameters())

    known = [linear for modules in shape.linears.values() for linear in modules]
    expected = Counter({(m.name, m.inputs, m.outputs, m.bias): 0 for m in known})
    for module in known:
        expected[module.name, module.inputs, module.outputs, module.bias] += module.copies
    assert expected == linears_found(model)

    for index, layer in enumerate(decoder_layers(model)):
        assert shape.layer_parameters(index) == sum(p.numel() for p in layer.parameters())
        here = Counter((m.name, m.inputs, m.outputs, m.bias) for m in shape.layer_linears(index))
        assert here == linears_found(layer)
        for linear in shape.layer_linears(index):
            layer.get_submodule(linear.path)


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_are_those_of_the_configuration_class(name: str) -> None:
    from transformers import AutoConfig

    shape, config = Architecture.of(CONFIGS[name]), AutoConfig.for_model(**CONFIGS[name])
    assert (shape.hidden, shape.layers, shape.heads) == (
        config.hidden_size,
        config.num_hidden_layers,
        config.num_attention_heads,
    )
    assert (shape.vocabulary, shape.positions) == (config.vocab_size, config.max_position_embeddings)
    assert shape.tied == config.tie_word_embeddings
    window = getattr(config, "sliding_window", None)
    given = getattr(config, "layer_types", None) or [SLIDING if window else FULL] * shape.layers
    assert list(shape.layer_types) == given
    assert shape.window == (window if SLIDING in given else None)
    assert shape.experts == (getattr(config, "num_experts", 0) if any(shape.sparse) else 0)
    assert shape.logits_capped == bool(getattr(config, "final_logit_softcapping", None))
    assert shape.scores_capped == bool(getattr(config, "attn_logit_softcapping", None))
    attention = "attn_pdrop" if shape.learned_positions else "attention_dropout"
    assert shape.attention_dropout == getattr(config, attention)
    assert shape.residual_dropout == getattr(config, "resid_pdrop", 0.0)


def test_attention_and_feed_forward_have_the_heads_and_widths_that_the_fields_say() -> None:
    shape = Architecture.of(bundled("qwen3-30b-a3b"))
    (queries,), (keys,) = shape.linears["q_proj"], shape.linears["k_proj"]
    assert (queries.outputs, keys.outputs) == (shape.heads * shape.head_size, shape.key_value_heads * shape.head_size)
    assert (shape.inner, shape.expert_inner, shape.experts, shape.experts_per_token) == (0, 768, 128, 8)
    assert Architecture.of(small("qwen3_moe with dense layers")).sparse == (False, True, False)
    assert Architecture.of(bundled("gpt2")).inner == 4 * 768
    assert not Architecture.of(bundled("phi-2")).gated
    assert Architecture.of(bundled("phi-3-mini-4k")).gated


@pytest.mark.parametrize("kind", DEFAULTS)
def test_what_a_config_leaves_out_is_what_its_configuration_class_has(kind: str) -> None:
    from transformers import AutoConfig

    declared = {field.name: field.default for field in dataclasses.fields(AutoConfig.for_model(kind))}
    for name, default in DEFAULTS[kind].items():
        name = name if name in declared else ALIASES.get(kind, {}).get(name, name)
        if name in declared:
            assert declared[name] == default, name
        else:
            # Not declared, but read where a config has them.
            assert (name, default) in {("head_dim", None), ("sliding_window_pattern", 6)}


def test_a_gemma3_of_text_and_images_has_the_shape_of_its_text_model() -> None:
    text = {key: value for key, value in small("gemma3_text").items() if key != "model_type"}
    shape = Architecture.of({"model_type": "gemma3", "text_config": text, "vision_config": {}})
    assert shape == Architecture.of(small("gemma3_text"))
    assert not Architecture.of({"model_type": "gemma3", "text_config": text, "tie_word_embeddings": False}).tied
    # As the 4B model's config.json is: all else is the default.
    text = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34, "sliding_window": 1024}
    assert Architecture.of({"model_type": "gemma3", "text_config": text}).parameters() == 3_880_263_168


def test_of_a_gemma3_of_text_and_images_both_engines_price_the_text_model_and_say_so() -> None:
    from lab.cards import cautions
    from lab.memory import closed_form, simulation
    from lab.memory.workload import Workload

    text = {key: value for key, value in small("gemma3_text").items() if key != "model_type"}
    both = Workload(config={"model_type": "gemma3", "text_config": text}, method="lora", rank=2, length=32)
    alone = both.model_copy(update={"config": small("gemma3_text")})
    for engine in (closed_form, simulation):
        assert engine.predict(both) == engine.predict(alone)
    (said,) = cautions(both)
    assert said.startswith(
        "of gemma3 the language model alone is priced; AutoModelForCausalLM loads the vision tower too"
    )
    assert cautions(alone) == []
    # And it does.
    assert any(
        "vision_tower" in name for name, _ in built({"model_type": "gemma3", "text_config": text}).named_parameters()
    )


def test_the_vision_tower_of_gemma3_takes_what_the_caution_says() -> None:
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    text = {"hidden_size": 2560, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 96}
    config = {"text_config": text, "vision_config": {**vision, "image_size": 896, "patch_size": 14}}
    model = built({"model_type": "gemma3", **config})
    beside = sum(p.numel() for name, p in model.named_parameters() if "vision_tower" in name or "projector" in name)
    assert round(2 * beside / 2**30, 1) == 0.8


# Bundled shapes ------------------------------------------------------------------------------------------------------


def test_bundled_models_have_the_parameters_that_their_pages_state() -> None:
    counted = {name: Architecture.of(bundled(name)).parameters() for name in PUBLISHED}
    assert counted == PUBLISHED
    ours = {"llama-6m", "llama-7m-untied", "llama-14m-wide-vocabulary"}
    assert set(models.shapes()) == ours | set(PUBLISHED)


def test_every_kind_but_one_is_bundled() -> None:
    kinds = {Architecture.of(bundled(name)).kind for name in models.shapes()}
    assert set(DEFAULTS) - kinds == {"qwen2_moe"}


# Targets -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SMALL)
def test_default_targets_of_lora_are_the_linear_modules_of_the_layers(case: str) -> None:
    from peft import LoraConfig, get_peft_model

    shape, model, rank = Architecture.of(small(case)), built(small(case)), 2
    targets = shape.default_targets("lora")
    assert targets == shape.default_targets("qlora") == shape.default_targets("dora")
    adapted = get_peft_model(model, LoraConfig(r=rank, target_modules=list(targets)))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    modules = {module for target in targets for module in shape.matching(target)}
    assert trainable == sum(m.copies * rank * (m.inputs + m.outputs) for m in modules)

    left = {name for name, *_ in linears_found(decoder_layers(built(small(case))))} - set(targets)
    dense_layers_of_experts = (
        {"gate_proj", "up_proj", "down_proj"} if shape.kind == "qwen3_moe" and shape.inner else set()
    )
    assert left == dense_layers_of_experts | ({"shared_expert_gate"} if shape.kind == "qwen2_moe" else set())


@pytest.mark.parametrize("case", [case for case in SMALL if case.split()[0] in IA3_TARGETS])
def test_default_targets_of_ia3_are_those_of_peft(case: str) -> None:
    from peft import IA3Config, get_peft_model
    from peft.utils.constants import (
        TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING,
        TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING,
    )

    shape = Architecture.of(small(case))
    targets = shape.default_targets("ia3")
    absent = {"w2"} if shape.kind == "mixtral" else set()
    assert {*targets} | absent == {*TRANSFORMERS_MODELS_TO_IA3_TARGET_MODULES_MAPPING[shape.kind]}
    last = {*TRANSFORMERS_MODELS_TO_IA3_FEEDFORWARD_MODULES_MAPPING[shape.kind]} - absent
    assert {target for target in targets if target in IA3_FEEDFORWARD} == last

    adapted = get_peft_model(built(small(case)), IA3Config(task_type="CAUSAL_LM"))
    trainable = sum(p.numel() for p in adapted.parameters() if p.requires_grad)
    modules = {module for target in targets for module in shape.matching(target)}
    assert trainable == sum(m.copies * (m.inputs if m.feedforward else m.outputs) for m in modules)


def test_a_target_may_be_a_name_or_the_end_of_a_path() -> None:
    shape = Architecture.of(small("gpt2"))
    assert [m.path for m in shape.matching("c_proj")] == ["attn.c_proj", "mlp.c_proj"]
    assert [m.path for m in shape.matching("mlp.c_proj")] == ["mlp.c_proj"]
    assert [m.path for m in shape.matching("lm_head")] == ["lm_head"]
    said = r"unknown target module 'q_proj'\. Did you mean 'c_proj'\? Known: c_attn, c_fc, c_proj, lm_head\."
    for target in ("q_proj", "proj", "p.c_proj"):
        with pytest.raises(LabError, match=said.replace("q_proj", target)):
            shape.matching(target)


@pytest.mark.parametrize(
    ("case", "target"),
    [
        ("mixtral", "w2"),
        ("mixtral", "gate"),
        ("mixtral", "all-linear"),
        ("qwen3_moe", "mlp.down_proj"),
        ("qwen3_moe", "gate"),
        ("qwen3_moe", "all-linear"),
        ("qwen3_moe with dense layers", "down_proj"),
    ],
)
def test_a_target_that_peft_takes_for_fused_experts_is_refused(case: str, target: str) -> None:
    from peft import LoraConfig, get_peft_model

    shape = Architecture.of(small(case))
    with pytest.raises(LabError) as error:
        shape.matching(target)
    assert str(error.value) == (
        f"targets: '{target}' stands for experts or their router, which a {shape.kind} model holds as fused parameters "
        "and not as linear modules; adapters on them are not covered. Choose from: q_proj, k_proj, v_proj, o_proj."
    )
    targets = target if target == "all-linear" else [target, "q_proj"]
    adapted = get_peft_model(built(small(case)), LoraConfig(target_modules=targets))
    assert adapted.peft_config["default"].target_parameters


@pytest.mark.parametrize(
    ("case", "target"), [("mixtral", "gate_proj"), ("qwen3_moe", "experts"), ("qwen2_moe", "gate_up_proj")]
)
def test_a_target_that_only_means_experts_is_told_why_there_is_no_such_module(case: str, target: str) -> None:
    with pytest.raises(LabError, match=f"'{target}' stands for experts or their router, which a {case} model holds"):
        Architecture.of(small(case)).matching(target)


def test_the_shared_expert_of_qwen2_moe_is_made_of_linear_modules() -> None:
    assert [m.path for m in Architecture.of(small("qwen2_moe")).matching("down_proj")] == [
        "mlp.shared_expert.down_proj"
    ]


def test_methods_without_targets_have_none_and_ia3_asks_for_them_where_peft_has_no_choice() -> None:
    assert Architecture.of(small("llama")).default_targets("full") == ()
    with pytest.raises(LabError) as error:
        Architecture.of(small("phi3")).default_targets("ia3")
    assert str(error.value) == (
        "targets: PEFT has no default for ia3 on a phi3 model. "
        "Give some of: qkv_proj, o_proj, gate_up_proj, down_proj, lm_head."
    )


# Errors --------------------------------------------------------------------------------------------------------------

KNOWN = ", ".join(sorted(DEFAULTS))
LLAMA = small("llama")
MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "no model_type": ({"hidden_size": 64}, f"config: model_type is missing. Add it; known: {KNOWN}."),
    "unknown kind": (
        {"model_type": "qwen4"},
        f"config: unknown model_type 'qwen4'. Did you mean 'qwen3'? Known: {KNOWN}.",
    ),
    "encoder": (
        {"model_type": "bert", "hidden_size": 64},
        f"config: model_type 'bert' is an encoder-only model; only decoders are covered. Choose one of: {KNOWN}.",
    ),
    "encoder-decoder": (
        {"model_type": "t5"},
        f"config: model_type 't5' is an encoder-decoder model; only decoders are covered. Choose one of: {KNOWN}.",
    ),
    "missing": (
        {key: value for key, value in LLAMA.items() if key != "hidden_size"},
        "config: hidden_size is missing; the shape of a llama model needs it. Add it.",
    ),
    "missing by its own name": (
        {key: value for key, value in small("gpt2").items() if key != "n_embd"},
        "config: n_embd is missing; the shape of a gpt2 model needs it. Add it.",
    ),
    "no text": (
        {"model_type": "gemma3"},
        "config: text_config is missing; a gemma3 model has its shape there. Add it.",
    ),
    "text": (
        LLAMA | {"vocab_size": "32000"},
        "config: vocab_size is '32000'; it must be a whole number of at least 1. Correct it.",
    ),
    "zero": (
        LLAMA | {"num_hidden_layers": 0},
        "config: num_hidden_layers is 0; it must be a whole number of at least 1. Correct it.",
    ),
    "bool": (
        LLAMA | {"num_attention_heads": True},
        "config: num_attention_heads is True; it must be a whole number of at least 1. Correct it.",
    ),
    "fraction by its own name": (
        small("gpt2") | {"n_positions": 10.5},
        "config: n_positions is 10.5; it must be a whole number of at least 1. Correct it.",
    ),
    "flag": (
        LLAMA | {"tie_word_embeddings": "false"},
        "config: tie_word_embeddings is 'false'; it must be true or false. Correct it.",
    ),
    "probability": (
        LLAMA | {"attention_dropout": 10},
        "config: attention_dropout is 10; it must be from 0 to 1. Correct it.",
    ),
    "uneven width": (
        LLAMA | {"hidden_size": 50},
        "config: hidden_size 50 is not a multiple of 4 heads. Correct one of them.",
    ),
    "uneven width with heads of their own": (
        small("gemma2") | {"hidden_size": 50},
        "config: hidden_size 50 is not a multiple of 4 heads. Correct one of them.",
    ),
    "uneven heads": (
        LLAMA | {"num_key_value_heads": 3},
        "config: 4 attention heads cannot share 3 key-value heads evenly. Correct one.",
    ),
    "pattern of another length": (
        small("qwen2") | {"layer_types": [FULL]},
        "config: layer_types is ['full_attention']; it must be a list of 3 entries, one for each layer. Correct it.",
    ),
    "pattern of another attention": (
        small("qwen3") | {"layer_types": [FULL, FULL, "linear_attention"]},
        "config: layer_types has 'linear_attention'; only full_attention and sliding_attention are covered. Correct it.",
    ),
    "no list": (
        small("qwen3_moe") | {"mlp_only_layers": 1},
        "config: mlp_only_layers is 1; it must be a list. Correct it.",
    ),
    "not covered": (
        small("gpt2") | {"add_cross_attention": True},
        "config: add_cross_attention is True, which is not covered. Choose a model without it.",
    ),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_config_that_cannot_be_read_is_one_line(mistake: str) -> None:
    config, said = MISTAKES[mistake]
    with pytest.raises(LabError) as error:
        Architecture.of(config)
    assert str(error.value) == said


def test_the_shape_is_read_without_torch_or_transformers() -> None:
    script = """
        import json, sys, time
        started = time.process_time()
        from lab.memory.architecture import Architecture
        Architecture.of(json.loads(sys.argv[1])).parameters()
        print(json.dumps([time.process_time() - started, sorted({"torch", "transformers", "peft"} & set(sys.modules))]))
    """
    command = [sys.executable, "-c", textwrap.dedent(script), json.dumps(bundled("llama-3.1-405b"))]
    seconds, imported = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert imported == []
    assert seconds < 0.5
