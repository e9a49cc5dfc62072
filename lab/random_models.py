"""Models of random weights made where they are to be, in the precision in which they are to be held.

An 8B model costs neither the minutes that drawing its weights takes a processor nor host memory, and a 70B model in 4 bits
never exists in 16: its linear layers are drawn and quantised one by one.
"""

from __future__ import annotations

import json
from typing import Any

import torch
from torch import Tensor, nn

from lab.models import DTYPES, check_model, quantisation_config, shapes
from lab.specs import Precision

SCALE = 0.02
"""Standard deviation of what is drawn for a quantised model; others have their own initialisation."""

NF4 = {"nf4": False, "nf4-double": True}
"""The quantisations that are made here, and whether their scales are quantised too."""


def random_model(
    name: str,
    *,
    precision: Precision = "fp32",
    quantisation: str | None = None,
    attention: str = "sdpa",
    seed: int = 0,
    device: str = "cpu",
) -> Any:
    """A bundled shape with random weights, made on the device: as `lab.models.load_model` gives it, but for their values.

    Args:
        quantisation: None, or one of NF4.
    Raises:
        LabError: no bundled shape.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    check_model(name)
    set_seed(seed)
    dtype = getattr(torch, DTYPES[precision])
    config = AutoConfig.for_model(**json.loads(shapes()[name].read_text(encoding="utf-8")))
    options: dict[str, Any] = {"dtype": dtype, "attn_implementation": attention}
    if quantisation is None:
        with torch.device(device):
            return AutoModelForCausalLM.from_config(config, **options)
    from accelerate import init_empty_weights  # type: ignore[import-untyped]

    with torch.device(device), init_empty_weights(include_buffers=False):
        model = AutoModelForCausalLM.from_config(config, **options)
    model.tie_weights()
    _quantise_one_by_one(model, dtype, NF4[quantisation], device)
    _draw_the_rest(model, device)
    return model.eval()


def _quantise_one_by_one(model: Any, dtype: torch.dtype, double: bool, device: str) -> None:
    """Every linear layer but the head in nf4, as transformers replaces them; one at a time exists in 16 bits."""
    from bitsandbytes.nn import Linear4bit, Params4bit
    from transformers.pytorch_utils import Conv1D
    from transformers.quantizers import AutoHfQuantizer

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D) or module is head:
            continue
        outputs, inputs = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
        kind = {"compress_statistics": double, "quant_type": "nf4"}
        layer = Linear4bit(inputs, outputs, module.bias is not None, compute_dtype=dtype, device="meta", **kind)
        layer.weight = Params4bit(
            torch.empty(outputs, inputs, dtype=dtype, device=device).normal_(std=SCALE),
            requires_grad=False,
            module=layer,
            **kind,
        ).to(device)
        if module.bias is not None:
            layer.bias = nn.Parameter(torch.zeros(outputs, dtype=dtype, device=device))
        layer.support_avx512bf16_for_cpu = False  # see lab.models: a processor would pack anew, and backward not know
        model.set_submodule(name, layer)
    model.is_loaded_in_4bit = model.is_quantized = True
    # The Trainer asks it whether such weights bear an adapter.
    model.hf_quantizer = AutoHfQuantizer.from_config(quantisation_config("nf4-double" if double else "nf4", dtype))


def _draw_the_rest(model: nn.Module, device: str) -> None:
    """Embeddings, norms and the head, which have no storage yet; ties are kept."""
    made: dict[Tensor, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is None or parameter.device.type != "meta":
                continue
            if parameter not in made:
                fresh = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
                fresh = fresh.fill_(name == "weight") if parameter.dim() == 1 else fresh.normal_(std=SCALE)
                made[parameter] = nn.Parameter(fresh, requires_grad=parameter.requires_grad)
            module._parameters[name] = made[parameter]
