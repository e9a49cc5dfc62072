"""The trial that measures memory on a device: what `lab.memory.trial` does, with a model that is made where it trains.

Beside the ledger's figures it leaves the allocator's by phase, what the driver had in use before, and which kernel torch
chose for attention: on Hopper cards it is cuDNN's from torch 2.11 on, where `lab fit` prices FlashAttention.
"""

from __future__ import annotations

import tempfile
from typing import Any

import torch
from torch.nn.attention import SDPBackend

from lab import data
from lab.memory import ledger, measurement
from lab.memory.trial import _memory_figures
from lab.methods import apply_method, closed_form, count_parameters, quantisation
from lab.models import PREPARED, load_model
from lab.optimizers import check_optimizer
from lab.random_models import NF4, random_model
from lab.runners import Outcome
from lab.specs import Memory
from lab.training import build_trainer
from lab.workspace import Workspace


def measure_on_device(settings: Memory, workspace: Workspace) -> Outcome:
    """Train on random tokens under the ledger: bytes by part and by phase, at the last update.

    With `updates: 0` the weights are counted and nothing is trained.
    """
    on_cuda = settings.device == "cuda"
    free, total = torch.cuda.mem_get_info() if on_cuda else (0, 0)
    outcome = Outcome(tags={"model": settings.model, "method": settings.method})
    model, config = load(settings, workspace)
    outcome.figures |= {f"parameters_{name}": count for name, count in count_parameters(model).items()}
    outcome.figures["parameters_closed_form"] = closed_form(config, settings.method, settings.method_options)
    if settings.untied:
        head = model.get_output_embeddings()
        head.weight = torch.nn.Parameter(head.weight.detach().clone())
    outcome.figures["vocabulary"] = config.vocab_size
    if on_cuda and settings.attention == "sdpa":
        outcome.tags["attention_kernel"] = attention_kernel(config, next(model.parameters()).dtype, settings)
    outcome.figures["weights_bytes"] = ledger.held_bytes(ledger.weights(model))
    if settings.updates:
        if on_cuda:  # what making the model took is no part of what training reserves
            torch.cuda.empty_cache()
        with tempfile.TemporaryDirectory() as scratch:
            trainer = make_trainer(model, config, settings, scratch)
            measured = measurement.measure(trainer)
        outcome.figures |= _memory_figures(measured, model)
        for phase, (allocated, reserved) in measured.allocator_peaks.items():
            outcome.figures |= {f"allocated_{phase}_bytes": allocated, f"reserved_{phase}_bytes": reserved}
    if on_cuda:  # this process's context, and what others hold
        outcome.figures["driver_before_bytes"] = total - free
    return outcome


def attention_kernel(config: Any, dtype: torch.dtype, settings: Memory) -> str:
    """The name of the kernel that torch chooses for the causal attention of a model, by torch's own word.

    Source:
        `torch.nn.attention.SDPBackend`; the choice is that of `scaled_dot_product_attention`.
    """
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    if settings.precision == "autocast":
        dtype = torch.bfloat16
    query, key = (
        torch.empty(
            settings.batch, count, settings.length, width, dtype=dtype, device=settings.device, requires_grad=True
        )
        for count in (heads, getattr(config, "num_key_value_heads", None) or heads)
    )
    chosen = torch._fused_sdp_choice(query, key, key, is_causal=True, enable_gqa=key.shape[1] < heads)
    return SDPBackend(chosen).name


def load(settings: Memory, workspace: Workspace) -> tuple[Any, Any]:
    """The settings' model with its method, on the device; and its configuration.

    Raises:
        LabError: an unknown model, method or optimizer, or a model that is not prepared.
    """
    check_optimizer(settings.optimizer)
    torch.backends.cuda.enable_cudnn_sdp(getattr(settings, "cudnn", True))
    held_as = settings.quantisation or quantisation(settings.method, settings.method_options)
    how: dict[str, Any] = {
        "precision": settings.precision,
        "quantisation": held_as,
        "attention": settings.attention,
        "seed": settings.seed,
        "device": settings.device,
    }
    if settings.model in PREPARED or (held_as and held_as not in NF4):
        model = load_model(settings.model, workspace.model(settings.model), **how)
    else:
        model = random_model(settings.model, **how)
    config = model.config
    if not settings.quantisation:  # integer weights cannot be set to train
        model = apply_method(model, settings.method, settings.method_options)
    return model, config


def make_trainer(model: Any, config: Any, settings: Memory, scratch: str) -> Any:
    """The Trainer on random tokens, with its optimizer, which steps as the settings say."""
    rows = data.random_rows(
        settings.batch * settings.gradient_accumulation_steps * settings.updates,
        settings.length,
        config.vocab_size,
        settings.seed,
    )
    trainer: Any = build_trainer(model, rows, data.Collator(0), settings, scratch)
    trainer.create_optimizer()
    for group in trainer.optimizer.param_groups:
        group["foreach"] = settings.step == "foreach"
    return trainer
