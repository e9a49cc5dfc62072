"""Bases that bitsandbytes holds in 4 or 8 bits, for the simulation: layers without storage, and what CUDA allocates.

Source: bitsandbytes 0.50.2 (nn/modules.py, autograd/_functions.py, backends/cuda/ops.py) and transformers' own replacement
of linear layers (integrations/bitsandbytes.py): every linear layer but the output head.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lab.memory.workload import Workload

BLOCK, NESTED_BLOCK = 64, 256
"""Weights that share one scale, and scales that share one under double quantisation (Dettmers et al. 2023)."""


def quantise(model: Any, workload: Workload, dtype: torch.dtype) -> None:
    """Replace the linear layers, all but the head, by bitsandbytes' own; on the meta device."""
    import bitsandbytes
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear | Conv1D) or module is head:
            continue
        inputs, outputs = module.weight.shape[::-1] if isinstance(module, nn.Linear) else module.weight.shape
        options: dict[str, Any] = {"bias": module.bias is not None, "device": "meta"}
        layer: nn.Module
        if workload.held_as == "nf4":
            double = workload.double_quantisation
            layer = bitsandbytes.nn.Linear4bit(
                inputs, outputs, compute_dtype=dtype, compress_statistics=double, quant_type="nf4", **options
            )
        else:
            layer = bitsandbytes.nn.Linear8bitLt(inputs, outputs, has_fp16_weights=False, threshold=6.0, **options)
        if layer.bias is not None:
            layer.bias = nn.Parameter(module.bias.detach().to(dtype))
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, layer.requires_grad_(False))
        materialise_layer(layer, dtype)  # DoRA begins with the norms of the weights
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = workload.held_as == "nf4", workload.held_as == "int8"


def materialise_layer(module: Any, dtype: torch.dtype) -> None:
    """Give a layer of bitsandbytes its packed weights and their tables; other modules are left alone."""
    import bitsandbytes
    from bitsandbytes.functional import QuantState

    if isinstance(module, bitsandbytes.nn.Linear4bit):
        shape = torch.Size((module.out_features, module.in_features))
        scales = -(-shape.numel() // BLOCK)
        nested = module.weight.compress_statistics
        inner = (
            QuantState(
                absmax=torch.zeros(-(-scales // NESTED_BLOCK)),
                code=torch.zeros(256),
                blocksize=NESTED_BLOCK,
                dtype=torch.float32,
            )
            if nested
            else None
        )
        state = QuantState(
            absmax=torch.zeros(scales, dtype=torch.uint8 if nested else torch.float32),
            shape=shape,
            code=torch.zeros(16),
            blocksize=BLOCK,
            quant_type="nf4",
            dtype=dtype,
            offset=torch.zeros(()) if nested else None,
            state2=inner,
        )
        packed = torch.zeros((shape.numel() + 1) // 2, 1, dtype=torch.uint8)
        kinds: dict[str, Any] = {"quant_type": "nf4", "compress_statistics": nested, "bnb_quantized": True}
        if type(packed) is torch.Tensor:
            module.weight = bitsandbytes.nn.Params4bit(packed, requires_grad=False, quant_state=state, **kinds)
        else:
            module.weight = nn.Parameter(packed, requires_grad=False)
            module.weight.quant_state = state
            _unpacks_itself(module, lambda: _unpacked(state, state.dtype))
    elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
        shape = torch.Size((module.out_features, module.in_features))
        held, of_rows = torch.zeros(shape, dtype=torch.int8), torch.zeros(shape[0])
        if type(held) is torch.Tensor:
            module.weight = bitsandbytes.nn.Int8Params(
                held, requires_grad=False, has_fp16_weights=False, CB=held, SCB=of_rows
            )
        else:
            module.weight = nn.Parameter(held, requires_grad=False)
            module.weight.CB, module.weight.SCB = held, of_rows
            _unpacks_itself(module, lambda: torch.ops.bitsandbytes.int8_vectorwise_dequant(held, of_rows))


def _unpacks_itself(module: Any, unpack: Callable[[], Tensor]) -> None:
    """Where the weight is a fake tensor it cannot be of bitsandbytes' class, by which PEFT knows what to unpack for DoRA.

    So the layer takes the place of one of HQQ, which PEFT asks to unpack itself (peft.utils.integrations).
    """
    module.W_q, module.dequantize = True, unpack


# On CUDA --------------------------------------------------------------------------------------------------------


class _Matmul4bit(torch.autograd.Function):
    """For more than 1,536 tokens, and here for any number, the weight is unpacked and multiplied."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, packed: Tensor, bias: Tensor | None, state: Any) -> Tensor:
        ctx.state, ctx.bias = state, bias
        return nn.functional.linear(inputs, _unpacked(state, inputs.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        return torch.matmul(grads[0], _unpacked(ctx.state, grads[0].dtype)), None, None, None


def _unpacked(state: Any, dtype: torch.dtype) -> Tensor:
    scales = torch.empty(state.absmax.shape, dtype=torch.float32) if state.nested else state.absmax
    weight = torch.empty(state.shape, dtype=state.dtype)
    del scales
    return weight.to(dtype)


class _Matmul8bit(torch.autograd.Function):
    """Inputs quantised by row, an int32 product, then scaled; backward unpacks the weight."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, state: Any) -> Tensor:
        ctx.state, ctx.dtype, ctx.shape = state, inputs.dtype, inputs.shape
        flat = inputs.reshape(-1, inputs.shape[-1])
        half = flat.to(torch.float16)
        rows = torch.empty(flat.shape, dtype=torch.int8)
        scales = torch.empty(len(flat))
        ctx.kept = flat
        product = torch.empty(len(flat), state.CB.shape[0], dtype=torch.int32)
        output = torch.empty(product.shape, dtype=torch.float16)
        del half, rows, scales, product
        return output.to(inputs.dtype).reshape(*inputs.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None, None]:
        weight = ctx.state.CB.to(ctx.dtype, copy=True).mul_(ctx.state.SCB.unsqueeze(1).mul(1 / 127))
        grad = grads[0].reshape(-1, grads[0].shape[-1]).to(ctx.dtype)
        return torch.matmul(grad, weight).view(ctx.shape), None, None, None


@contextlib.contextmanager
def cuda_products() -> Iterator[None]:
    """bitsandbytes' products as they allocate on CUDA."""
    import bitsandbytes

    def four(inputs: Tensor, packed: Tensor, quant_state: Any, out: Any = None, bias: Tensor | None = None) -> Any:
        return _Matmul4bit.apply(inputs, packed, bias, quant_state)

    def eight(
        inputs: Tensor, weight: Tensor, out: Any = None, state: Any = None, threshold: float = 0.0, bias: Any = None
    ) -> Any:
        return _Matmul8bit.apply(inputs, weight, bias, state)

    original = bitsandbytes.matmul_4bit, bitsandbytes.matmul
    bitsandbytes.matmul_4bit, bitsandbytes.matmul = four, eight
    try:
        yield
    finally:
        bitsandbytes.matmul_4bit, bitsandbytes.matmul = original
