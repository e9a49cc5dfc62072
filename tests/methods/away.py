"""Every decoder family at small size, away from its start, and what it says: for the tests of the lab's own methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = torch.arange(3, 21).reshape(2, 9)

SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
}
GPT = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {},
    "gemma3_text": {},
    "phi": {},
    "phi3": {},
    "granite": {},
    "smollm3": {},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "mixtral": {"num_local_experts": 4},
    "gpt2": GPT,
    "gpt_bigcode": GPT,
}


def base(family: str = "llama", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family]})
    return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def drawn(model: Any, seed: int = 1) -> Any:
    """The model away from its start: every trainable number drawn."""
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def logits(model: Any) -> Tensor:
    """Of TOKENS: `(2, 9, vocabulary)`."""
    with torch.no_grad():
        found: Tensor = model(TOKENS).logits
    return found
