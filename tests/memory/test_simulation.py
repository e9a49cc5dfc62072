"""The simulation against real tensors to the byte, against itself at full depth, and against published measurements."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.errors import LabError
from lab.memory import kernels
from lab.memory.simulation import Rehearsal, predict, rehearse
from lab.memory.workload import BLOCKWISE, OPTIMIZERS, PARTS, Workload, check
from lab.models import shapes

GIB = 2**30
SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 88,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 256,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
}


def small(**settings: Any) -> Workload:
    """A workload on the processor, where nothing is emulated."""
    config = {**SMALL, **settings.pop("shape", {})}
    return Workload.model_validate({"config": config, "device": "cpu", "length": 16, "rank": 4, **settings})


def totals(seen: Rehearsal) -> dict[Any, int]:
    return {place: parts.total() for place, parts in seen.stretches.items()} | {"steady": seen.steady.total()}


# Real tensors ---------------------------------------------------------------------------------------------------


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    kind=st.sampled_from(["llama", "mistral", "qwen2", "qwen3", "granite", "phi3"]),
    method=st.sampled_from(["full", "lora", "dora", "ia3", "prompt", "prefix", "ptuning", "mora", "adapter"]),
    precision=st.sampled_from([("fp32", None), ("bf16", None), ("fp32", "bf16")]),
    optimizer=st.sampled_from([("adamw_torch", s) for s in ("foreach", "fused", "for-loop")] + [("sgd", None)]),
    batch=st.integers(1, 3),
    length=st.integers(2, 24),
    checkpointing=st.booleans(),
    attention=st.sampled_from(["eager", "sdpa"]),
    accumulation=st.integers(1, 2),
)
def test_the_simulation_equals_the_ledger_on_real_tensors(
    kind: str,
    method: str,
    precision: tuple[str, str | None],
    optimizer: tuple[str, str | None],
    batch: int,
    length: int,
    checkpointing: bool,
    attention: str,
    accumulation: int,
) -> None:
    workload = small(
        shape={"model_type": kind, "pad_token_id": 0},
        method=method,
        targets=["qkv_proj", "down_proj"]
        if kind == "phi3" and method in ("lora", "dora", "ia3", "mora")
        else ["k_proj", "v_proj", "down_proj"]
        if method == "ia3"
        else None,
        dtype=precision[0],
        amp=precision[1],
        optimizer=optimizer[0],
        step=optimizer[1],
        batch=batch,
        length=length,
        checkpointing=checkpointing and method != "prefix",
        attention=attention,
        accumulation=accumulation,
    )
    assert totals(rehearse(workload, workload.config)) == totals(rehearse(workload, workload.config, real=True))


@pytest.mark.parametrize(
    ("shape", "settings"),
    [
        ({"model_type": "mixtral", "num_local_experts": 4}, {"dtype": "fp32"}),
        ({"model_type": "mixtral", "num_local_experts": 4}, {"dtype": "fp32", "amp": "bf16", "accumulation": 2}),
        ({"model_type": "mixtral", "num_local_experts": 4}, {"method": "lora", "checkpointing": True}),
        (
            {"model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
            {"dtype": "fp32", "method": "dora"},
        ),
        ({"model_type": "gpt2", "num_key_value_heads": 4}, {"method": "ia3"}),
        (
            {"model_type": "gpt2", "num_key_value_heads": 4, "pad_token_id": None},
            {"method": "prefix", "dtype": "fp32", "projection": True},
        ),
        ({"model_type": "gemma2", "head_dim": 16, "sliding_window": 8}, {"method": "ptuning"}),
        ({"model_type": "gemma2", "head_dim": 16, "sliding_window": 8}, {"method": "adapter", "placement": "houlsby"}),
        ({"model_type": "gpt2", "num_key_value_heads": 4}, {"method": "mora", "operator": 2, "dtype": "fp32"}),
        ({"model_type": "mixtral", "num_local_experts": 4}, {"method": "adapter", "placement": "parallel"}),
        ({"model_type": "llama"}, {"method": "mora", "quantisation": "nf4", "preparation": "kbit"}),
        ({"model_type": "gemma3_text", "head_dim": 16, "num_hidden_layers": 7}, {"checkpointing": True}),
    ],
    ids=str,
)
def test_other_kinds_equal_the_ledger_on_real_tensors(shape: dict[str, Any], settings: dict[str, Any]) -> None:
    workload = small(shape={"pad_token_id": 0, **shape}, **settings)
    assert totals(rehearse(workload, workload.config)) == totals(rehearse(workload, workload.config, real=True))


@pytest.mark.parametrize("preparation", ["kbit", "none", None])
@pytest.mark.parametrize(
    ("method", "quantisation", "double"),
    [
        ("lora", "nf4", False),
        ("lora", "nf4", True),
        ("lora", "int8", False),
        ("qlora", None, False),
        ("qlora", None, True),
        ("dora", "nf4", False),
        ("dora", "nf4", True),
        ("dora", "int8", False),
    ],
)
def test_a_quantised_base_equals_that_of_bitsandbytes(
    method: str, quantisation: str | None, double: bool, preparation: str | None
) -> None:
    workload = small(
        shape={"hidden_size": 64, "intermediate_size": 176},
        method=method,
        quantisation=quantisation,
        double_quantisation=double,
        preparation=preparation,
        checkpointing=double,
    )
    assert totals(rehearse(workload, workload.config)) == totals(rehearse(workload, workload.config, real=True))


def test_dora_that_forgot_to_unpack_the_weight_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from lab.memory import quantised

    workload = small(shape={"hidden_size": 64, "intermediate_size": 176}, method="dora", quantisation="nf4")
    real = totals(rehearse(workload, workload.config, real=True))
    monkeypatch.setattr(quantised, "_unpacked", lambda state, dtype: torch.zeros(1, 1, dtype=dtype).expand(state.shape))
    assert totals(rehearse(workload, workload.config)) != real


def test_a_planted_fault_in_the_loss_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = small(dtype="bf16", loss="full-shifted")
    real = totals(rehearse(workload, workload.config, real=True))
    monkeypatch.setattr(
        kernels, "_shifted_loss", lambda logits, labels, **_: logits[..., :-1, :].mean()
    )  # as if no fp32 copy of the logits were made
    assert totals(rehearse(workload, workload.config)) != real


# Depth ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"method": "lora", "checkpointing": True},
        {"dtype": "fp32", "amp": "bf16"},
        {"dtype": "fp32", "amp": "bf16", "checkpointing": True, "accumulation": 2},
        {"optimizer": "adafactor"},
        {"method": "qlora", "optimizer": "paged_adamw_8bit"},
        # The norms of 542 gradients lie in one storage, of 1,536 bytes; in the shallow models of 512.
        {"device": "cuda", "optimizer": "sgd", "step": "for-loop", "shape": {"num_hidden_layers": 60}},
    ],
    ids=str,
)
def test_two_shallow_models_tell_what_a_deep_one_takes(settings: dict[str, Any]) -> None:
    workload = small(**{"shape": {"num_hidden_layers": 12}, **settings})
    whole, extrapolated = rehearse(workload, workload.config).prediction(workload), predict(workload)
    for name in ("phases", "parts", "steady_bytes", "parameters", "host_bytes", "peak_bytes"):
        assert getattr(extrapolated, name) == getattr(whole, name)
    assert sum(whole.parts.values()) == whole.peak_bytes


@pytest.mark.parametrize(("kind", "layers"), [("gemma2", 19), ("smollm3", 29), ("gemma3_text", 32)])
@pytest.mark.parametrize("method", ["full", "lora"])
def test_two_shallow_models_hold_a_pattern_of_layers_whole(kind: str, layers: int, method: str) -> None:
    shape = {"model_type": kind, "num_hidden_layers": layers, "head_dim": 8, "pad_token_id": 0, "sliding_window": 8}
    workload = small(shape=shape, method=method, checkpointing=method == "lora")
    whole, extrapolated = rehearse(workload, workload.config).prediction(workload), predict(workload)
    for name in ("phases", "parts", "steady_bytes", "parameters"):
        assert getattr(extrapolated, name) == getattr(whole, name)


@pytest.mark.parametrize("step", ["foreach", "fused", "for-loop"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_step_is_priced_where_the_optimizer_has_it_and_refused_where_not(name: str, step: str) -> None:
    from transformers import TrainingArguments
    from transformers.trainer import Trainer

    arguments = TrainingArguments(output_dir="unused", optim=name, use_cpu=True, report_to="none")
    kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
    options.pop("fused", None)
    accepted = {"foreach": {"foreach": True}, "fused": {"fused": True}, "for-loop": {"foreach": False}}[step]
    if kind.__module__.startswith("torch."):
        try:
            kind([torch.zeros(1, requires_grad=True)], **options, **accepted)
            there = name != "adamw_torch_fused" or step == "fused"
        except TypeError:
            there = False
    else:  # one parameter after the other
        there = step == "for-loop"
    workload = small(optimizer=name, step=step)
    if there:
        check(workload)
    else:
        with pytest.raises(LabError, match=f"step: {name} has no {step} step"):
            check(workload)


# CUDA -----------------------------------------------------------------------------------------------------------

MISTRAL = {**json.loads(shapes()["mistral-7b-v0.1"].read_text()), "vocab_size": 32001}
LORA = {"method": "lora", "dropout": 0.1, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}

PUBLISHED: list[tuple[dict[str, Any], float, float | None]] = [
    ({"batch": 4}, 67.460, 40.483),
    ({"batch": 8}, 67.461, None),
    ({"batch": 4, **LORA}, 24.871, 13.657),
    ({"batch": 8, **LORA}, 36.082, None),
]
"""Measured by others on an A100-80GB with torch 2.4 and transformers 4.48: GiB at the peak, and between updates."""


@pytest.mark.parametrize(("settings", "peak", "steady"), PUBLISHED, ids=["full 4", "full 8", "lora 4", "lora 8"])
def test_published_measurements_of_a_7b_model(settings: dict[str, Any], peak: float, steady: float | None) -> None:
    found = predict(
        Workload.model_validate(
            {
                "config": MISTRAL,
                "length": 4096,
                "checkpointing": True,
                "attention": "flash_attention_2",
                "loss": "full-shifted",
                "gpu": "A100-80GB",
                **settings,
            }
        )
    )
    assert found.peak_bytes / GIB == pytest.approx(peak, rel=5e-4)
    assert steady is None or found.steady_bytes / GIB == pytest.approx(steady, rel=5e-4)


@pytest.mark.parametrize("name", ["gpt2", "gemma-2-2b", "qwen3-30b-a3b", "phi-2", "llama-3.1-405b"])
def test_every_kind_of_shape_is_priced(name: str) -> None:
    config = json.loads(shapes()[name].read_text())
    found = predict(Workload(config=config, method="lora", batch=2, length=512))
    assert set(found.parts) == set(PARTS)
    assert sum(found.parts.values()) == found.peak_bytes
    assert found.steady_bytes < found.peak_bytes
    assert found.parts["weights"] >= 2 * (found.parameters["total"] - found.parameters["trainable"])


def test_pure_bf16_adamw_peaks_in_the_step_at_ten_bytes_a_parameter() -> None:
    config = json.loads(shapes()["llama-3.1-8b"].read_text())
    found = predict(Workload(config=config, batch=1, length=128, checkpointing=True))
    assert found.peak_phase == "step"
    assert found.peak_bytes / found.parameters["total"] == pytest.approx(10, rel=0.01)


def test_paged_state_is_not_on_the_device() -> None:
    paged, plain = (
        predict(small(shape={"vocab_size": 8192}, device="cuda", optimizer=f"{name}_8bit"))
        for name in ("paged_adamw", "adamw")
    )
    assert plain.host_bytes == 0 < paged.host_bytes
    assert plain.parts["optimizer"] - paged.parts["optimizer"] == paged.host_bytes


@pytest.mark.parametrize("name", sorted(BLOCKWISE))
def test_the_state_is_that_of_the_real_optimizer(name: str) -> None:
    from transformers import TrainingArguments
    from transformers.trainer import Trainer

    model = torch.nn.Sequential(torch.nn.Embedding(80, 64), torch.nn.Linear(64, 80), torch.nn.LayerNorm(80))
    arguments = TrainingArguments(output_dir="unused", optim=name, use_cpu=True, report_to="none")
    real = Trainer(model=model, args=arguments).create_optimizer()
    from lab.memory.ledger import held_bytes
    from lab.memory.optimizer_states import make_optimizer, state_tensors

    modelled = make_optimizer(small(optimizer=name, device="cuda"), model)
    sizes = []
    for optimizer in (real, modelled):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        sizes.append(held_bytes(state_tensors(optimizer)))
    assert sizes[0] == sizes[1]


# Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"quantisation": "nf4"}, "quantisation: nf4 weights cannot be trained"),
        ({"method": "qlora", "quantisation": "int8"}, "quantisation: qlora holds the base in nf4"),
        (
            {"attention": "flash_attention_2", "gpu": "T4"},
            "attention: flash_attention_2 needs Ampere or later; T4 is older. Choose sdpa, or another gpu.",
        ),
        ({"double_quantisation": True}, "double_quantisation: only nf4 has it"),
        ({"preparation": "kbit"}, "preparation: kbit is for a quantised base"),
        ({"length": 300}, "length: 300 tokens are more than the model's 256 positions"),
        ({"method": "lora", "rank": 64}, "rank: 64 is larger than"),
        ({"method": "lora", "targets": ["q_prj"]}, "unknown target module 'q_prj'. Did you mean 'q_proj'?"),
        ({"method": "prefix", "checkpointing": True}, "checkpointing: prefix tuning does not run with it"),
        ({"method": "ia3", "quantisation": "nf4", "dtype": "bf16"}, "preparation: IA3 on a quantised 16-bit base"),
        ({"optimizer": "galore_adamw"}, "unknown optimizer 'galore_adamw'"),
        (
            {"optimizer": "rmsprop", "step": "fused"},
            "step: rmsprop has no fused step; it has foreach and for-loop. Choose one, or drop it.",
        ),
        ({"shape": {"model_type": "bert"}}, "model_type"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_a_mistake_is_one_line(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(LabError) as caught:
        predict(small(**settings))
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
