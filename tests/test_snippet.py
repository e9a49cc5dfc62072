"""The TrainingArguments that are printed for what was priced."""

from __future__ import annotations

import ast
import textwrap
from pathlib import Path
from typing import Any

import pytest

from lab.planner import answer
from lab.pricing import methods, read_spec
from lab.snippet import snippet
from tests.prices import SMALL

SNIPPETS: list[dict[str, Any]] = [
    *({"method": method} for method in methods() if method != "full"),
    {},
    {"method": "lora", "quantisation": "int8", "preparation": "kbit"},
    {"method": "prefix", "projection": True, "encoder_hidden_size": 32},
    {"loss": "chunked"},
    {"loss": "fused", "step": "fused", "amp": "bf16", "dtype": "fp32"},
    {"loss": "full-shifted", "step": "for-loop"},
    {"inference": True, "quantisation": "nf4"},
]


@pytest.mark.parametrize("more", SNIPPETS, ids=lambda more: "-".join(map(str, more.values())) or "full")
def test_every_snippet_is_python_that_names_what_it_imports(more: dict[str, Any]) -> None:
    tree = ast.parse(snippet(read_spec({"config": SMALL, **more}), "owner/name"))
    imported = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    }
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert called <= imported
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported <= used


def test_a_snippet_runs_and_says_what_was_priced(tmp_path: Path) -> None:
    from lab.models import load_model

    folder = tmp_path / "model"
    load_model("llama-6m", tmp_path).save_pretrained(folder)
    spec = {"model": "llama-6m", "method": "lora", "rank": 4, "targets": ["q_proj"], "dtype": "fp32"}
    workload = read_spec({**spec, "batch": 3, "accumulation": 2, "optimizer": "adamw_bnb_8bit", "checkpointing": True})
    names: dict[str, Any] = {}
    exec(snippet(workload, str(folder)), names)
    arguments = names["arguments"]
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 2)
    assert arguments.gradient_checkpointing
    assert arguments.optim == "adamw_bnb_8bit"
    model = names["load"]()
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad)
        == answer(workload).prediction.parameters["trainable"]
    )


@pytest.mark.parametrize(
    ("optimizer", "step", "said"),
    [
        ("sgd", "fused", "fused=True"),
        ("sgd", "for-loop", "foreach=False"),
        ("sgd", None, None),
        ("adamw_torch", "fused", None),
        ("adafactor", "for-loop", None),
    ],
)
def test_a_snippet_says_what_the_trainer_has_no_argument_for(
    optimizer: str, step: str | None, said: str | None
) -> None:
    written = snippet(read_spec({"config": SMALL, "optimizer": optimizer, "step": step}), "owner/name")
    assert ("hand the Trainer an optimizer made with" in written) == (said is not None)
    assert said is None or f"made with {said}." in written


def test_a_snippet_is_laid_out_like_the_rest() -> None:
    spec = {"config": SMALL, "method": "qlora", "targets": ["q_proj", "v_proj"], "double_quantisation": True}
    assert snippet(read_spec(spec), "owner/name") == textwrap.dedent(
        """\
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

        MODEL = "owner/name"


        def load():
            model = AutoModelForCausalLM.from_pretrained(
                MODEL,
                dtype=torch.bfloat16,
                attn_implementation="sdpa",
                quantization_config=BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=torch.bfloat16,
                ),
            )
            return get_peft_model(model, adapter)


        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=16,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules=["q_proj", "v_proj"],
        )
        # Sequences of 1024 tokens.
        arguments = TrainingArguments(
            output_dir="out",
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            optim="adamw_torch",
            gradient_checkpointing=False,
            bf16=False,
            fp16=False,
        )
        """
    )
