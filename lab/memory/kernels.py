"""What a CUDA device does otherwise than tensors on the processor, for the simulation; and what the Trainer adds.

With `device: cpu` nothing is emulated, so that a simulation can be compared with real tensors to the byte.

Source: aten/src/ATen/native/transformers/cuda (attention), aten/src/ATen/native/Dropout.cpp,
aten/src/ATen/cuda/CublasHandlePool.cpp (workspaces), of torch 2.13;
trl/kernels/chunked_logprob.py of trl 1.16; Liger-Kernel's fused_linear_cross_entropy.py.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lab.memory.architecture import Architecture
from lab.memory.ledger import AllocatorLedger, Ledger
from lab.memory.workload import Dtype, Workload, sdpa_kernel

DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FLASH = "lab_fa2"


# Device ---------------------------------------------------------------------------------------------------------


def make_ledger(workload: Workload) -> Ledger:
    """The ledger that counts as the workload's device does."""
    ledger = AllocatorLedger() if workload.device == "cuda" else Ledger()
    ledger.logits_width = Architecture.of(workload.config).vocabulary
    return ledger


# Attention and dropout ------------------------------------------------------------------------------------------


class _FlashAttention(torch.autograd.Function):
    """Allocates what FlashAttention-2 allocates: output and log-sum-exp; backward an fp32 query gradient.

    Shapes: query `(batch, heads, tokens, width)`, key and value with fewer heads where they are grouped.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, heads, tokens, width = query.shape
        output = query.new_empty(batch, tokens, heads, width).transpose(1, 2)
        normaliser = query.new_empty(batch, heads, tokens, dtype=torch.float32)
        seeds = query.new_empty(2, dtype=torch.int64)
        ctx.save_for_backward(query, key, value, output, normaliser, seeds)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, _, _, _ = ctx.saved_tensors
        batch, heads, tokens, width = query.shape
        padded, wide = -(-tokens // 128) * 128, -(-width // 32) * 32
        scratch = [
            query.new_empty(batch, heads, padded, dtype=torch.float32),
            query.new_empty(batch, padded, heads, wide, dtype=torch.float32),
        ]
        grad_query, grad_key, grad_value = (_like_tokens_first(t) for t in (query, key, value))
        if key.shape[1] != heads:
            scratch += [key.new_empty(batch, key.shape[2], heads, width) for _ in range(2)]
        del scratch
        return grad_query, grad_key, grad_value


def _like_tokens_first(tensor: Tensor) -> Tensor:
    batch, heads, tokens, width = tensor.shape
    return tensor.new_empty(batch, tokens, heads, width).transpose(1, 2)


class _EfficientAttention(torch.autograd.Function):
    """Allocates what the memory-efficient kernel allocates; it takes masks and fp32, and no grouped keys."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        batch, heads, tokens, width = query.shape
        output = query.new_empty(batch, tokens, heads, width).transpose(1, 2)
        normaliser = query.new_empty(batch, heads, -(-tokens // 32) * 32, dtype=torch.float32)
        saved = () if mask is None else (mask,)
        ctx.save_for_backward(query, key, value, output, normaliser, *saved)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors[:3]
        batch, heads, tokens, width = query.shape
        scratch = [query.new_empty(batch, heads, tokens, dtype=torch.float32)]
        if query.dtype != torch.float32:
            scratch.append(query.new_empty(batch, heads, tokens, width, dtype=torch.float32))
        found = tuple(_like_tokens_first(t) for t in (query, key, value))
        del scratch
        return (*found, None)


class _SafeSoftmax(torch.autograd.Function):
    """Allocates what torch's softmax of rows that may be masked whole allocates: it looks for them, and copies."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor) -> Tensor:
        weights = torch.empty_like(scores)
        masked = torch.empty_like(scores, dtype=torch.bool)
        found = torch.empty_like(scores)
        del weights, masked
        ctx.save_for_backward(found)
        return found

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Tensor:
        return torch.empty_like(ctx.saved_tensors[0])


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float, causal: bool
) -> Tensor:
    """What torch falls back to, as `_scaled_dot_product_attention_math` goes on CUDA: in fp32, with scores in the open."""
    groups = query.shape[1] // key.shape[1]
    wide_query, wide_key, wide_value = query.float(), key.float(), value.float()
    scaled = wide_query * 0.5
    if causal:
        mask = torch.zeros(query.shape[2], key.shape[2])
    repeated_key, repeated_value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (wide_key, wide_value))
    scores = scaled @ (repeated_key.transpose(2, 3) * 0.5)
    if mask is not None:
        scores.add_(mask)
    scores = _SafeSoftmax.apply(scores)
    scores = _dropout(scores, dropout)
    second = scores.to(query.dtype)
    output = (scores @ repeated_value).to(query.dtype)
    del second  # the weights are returned too, and dropped
    return output


def _attend(
    workload: Workload,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """`scaled_dot_product_attention` as CUDA chooses a kernel for it."""
    if torch.is_autocast_enabled("cpu"):
        dtype = torch.get_autocast_dtype("cpu")
        query, key, value = (t.to(dtype) for t in (query, key, value))
    name = next(name for name, dtype in DTYPES.items() if dtype == query.dtype)
    grouped = key.shape[1] != query.shape[1]
    kernel = sdpa_kernel(workload, name, attn_mask is not None, grouped, query.shape[-1])
    if kernel == "flash":
        return _FlashAttention.apply(query, key, value)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=query.dtype)
    if kernel == "efficient":
        return _EfficientAttention.apply(query, key, value, attn_mask)
    with torch.autocast("cpu", enabled=False):
        return _plain_attention(query, key, value, attn_mask, dropout_p, is_causal)


def _flash_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **_: Any
) -> tuple[Tensor, None]:
    """The flash-attn package behind transformers' interface: grouped keys and windows without a mask."""
    if query.dtype == torch.float32:
        query, key, value = (t.to(torch.bfloat16) for t in (query, key, value))
    output = _FlashAttention.apply(query, key, value)
    return output.transpose(1, 2).contiguous(), None


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """CUDA's fused dropout: an output, and a mask of one byte per element."""
    return torch.native_dropout(input, p, training)[0] if training and p else input


def attention_name(workload: Workload) -> str:
    """The name by which transformers finds the attention of the workload."""
    if workload.attended_by != "flash_attention_2":
        return workload.attended_by
    from transformers import AttentionInterface, AttentionMaskInterface

    AttentionInterface.register(FLASH, _flash_forward)
    AttentionMaskInterface.register(FLASH, lambda *args, **kwargs: None)
    return FLASH


@contextlib.contextmanager
def emulated(workload: Workload) -> Iterator[None]:
    """Put the kernels of the workload's device in the place of the processor's."""
    if workload.device == "cpu":
        yield
        return
    functional = nn.functional
    original = functional.scaled_dot_product_attention, functional.dropout
    with contextlib.ExitStack() as stack:
        if workload.held_as:
            from lab.memory.quantised import cuda_products

            stack.enter_context(cuda_products())
        functional.scaled_dot_product_attention = functools.partial(_attend, workload)
        functional.dropout = _dropout
        try:
            yield
        finally:
            functional.scaled_dot_product_attention, functional.dropout = original


# Forward and loss -----------------------------------------------------------------------------------------------


def forward(model: nn.Module, workload: Workload, batch: dict[str, Tensor], ended: Callable[[], None]) -> Tensor:
    """The loss, as the Trainer asks for it.

    Args:
        ended: called when it is there, the model's output still alive.
    """
    whole: Any = model
    base = whole.get_base_model() if hasattr(whole, "get_base_model") else whole
    labels = batch["labels"]
    count = torch.tensor(labels.numel())
    with contextlib.ExitStack() as stack:
        if workload.amp:
            stack.enter_context(torch.autocast("cpu", dtype=DTYPES[workload.amp]))
        match workload.loss:
            case "full":
                output = model(**batch, num_items_in_batch=count)
            case "full-shifted":
                base.loss_function = _shifted_loss
                output = model(**batch, num_items_in_batch=count)
            case loss:
                function = _ChunkedLoss if loss == "chunked" else _FusedLoss
                head = base.get_output_embeddings()
                handle = head.register_forward_pre_hook(lambda _, inputs: _stop(inputs[0]))
                try:
                    model(input_ids=batch["input_ids"])
                except _Hidden as caught:
                    hidden = caught.args[0]
                finally:
                    handle.remove()
                flat = hidden[:, :-1].reshape(-1, hidden.shape[-1])
                output = {"loss": function.apply(flat, head.weight)}
                del hidden, flat
    if workload.amp:
        from accelerate.utils import convert_to_fp32  # type: ignore[import-untyped]

        output = convert_to_fp32(output)
    ended()
    return output["loss"]


class _Hidden(Exception):
    """Carries the input of the head out of the model: the head itself does not run."""


def _stop(hidden: Tensor) -> None:
    raise _Hidden(hidden)


def _shifted_loss(logits: Tensor, labels: Tensor, vocab_size: int, **_: Any) -> Tensor:
    """transformers before 4.50: a shifted copy of the fp32 logits."""
    logits = logits.float()
    shifted = logits[..., :-1, :].contiguous()
    wanted = labels[..., 1:].contiguous()
    return nn.functional.cross_entropy(shifted.view(-1, vocab_size), wanted.view(-1))


class _ChunkedLoss(torch.autograd.Function):
    """trl's head: tiles of 4,096 tokens by 32,768 words, again in backward, gradients summed in fp32."""

    TOKENS, WORDS = 4096, 32768

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        tokens = len(hidden)
        running = [hidden.new_empty(tokens, dtype=torch.float32) for _ in range(7)]
        tile = hidden.new_empty(min(tokens, _ChunkedLoss.TOKENS), _ChunkedLoss.WORDS)
        ctx.save_for_backward(hidden, weight, running[0], running[1])
        del tile, running
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight, _, _ = ctx.saved_tensors
        needs_hidden, needs_weight = ctx.needs_input_grad
        grad_hidden = hidden.new_empty(hidden.shape, dtype=torch.float32) if needs_hidden else None
        grad_weight = weight.new_empty(weight.shape, dtype=torch.float32) if needs_weight else None
        tile = hidden.new_empty(min(len(hidden), _ChunkedLoss.TOKENS), _ChunkedLoss.WORDS)
        found = (
            None if grad_hidden is None else grad_hidden.to(hidden.dtype),
            None if grad_weight is None else grad_weight.to(weight.dtype),
        )
        del tile
        return found


class _FusedLoss(torch.autograd.Function):
    """Liger's head: gradients already in forward, over chunks of tokens whose logits are as large as the input."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        tokens, width = hidden.shape
        chunks = max(1, -(-weight.shape[0] // width))
        rows = min(tokens, 2 ** math.ceil(math.log2(max(1, -(-tokens // chunks)))))
        grad_hidden = hidden.new_empty(hidden.shape)
        grad_weight = weight.new_empty(weight.shape) if weight.requires_grad else None
        losses = hidden.new_empty(tokens, dtype=torch.float32)
        logits = hidden.new_empty(rows, weight.shape[0])
        product = weight.new_empty(weight.shape) if weight.requires_grad else None
        ctx.save_for_backward(grad_hidden, *([] if grad_weight is None else [grad_weight]))
        del logits, product, losses
        return hidden.new_empty((), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, Tensor | None]:
        saved = ctx.saved_tensors
        return saved[0], saved[1] if len(saved) > 1 else None
