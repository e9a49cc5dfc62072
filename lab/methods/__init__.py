"""The tuning methods: one table of names. PEFT supplies what it has; a file here is only for what it lacks.

A method turns a model into one whose trainable parameters are those that the method trains. Its options are a closed
pydantic class, so that an option which a method has not is an error that names those which it has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field

from lab.errors import unknown
from lab.params import Count, parse

if TYPE_CHECKING:
    from torch.nn import Module

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of a Llama-shaped decoder layer; where LoRA does best (Biderman et al. 2024, section 5)."""


class Options(BaseModel):
    """The options of a method."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class FullOptions(Options):
    """Full fine-tuning has none."""


class LoraOptions(Options):
    """Low-rank adaptation (Hu et al. 2021)."""

    rank: Count = 8
    alpha: Count = 16
    dropout: float = Field(default=0.0, ge=0, lt=1)
    targets: tuple[str, ...] = Field(default=ALL_LINEAR, min_length=1)


@dataclass(frozen=True)
class Method:
    """How to apply a method, and the options that it takes."""

    options: type[Options]
    apply: Callable[[Any, Any], Any]
    trainable: Callable[[Any, Any], int] | None = None
    """The closed form: trainable parameters from the model's configuration and the options."""


def _full(model: Module, _: FullOptions) -> Module:
    return model.requires_grad_(True)


def _lora(model: Module, options: LoraOptions) -> Module:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=list(options.targets),
    )
    return get_peft_model(model, config)


METHODS: dict[str, Method] = {
    "full": Method(FullOptions, _full),
    "lora": Method(LoraOptions, _lora, lambda config, options: lora_parameters(config, options.rank, options.targets)),
}


def method(name: str) -> Method:
    """The method called `name`.

    Raises:
        LabError: there is none; the message names the nearest.
    """
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    return METHODS[name]


def apply_method(model: Any, name: str, options: dict[str, Any]) -> Any:
    """`model` with the method applied: a PEFT model, or the model itself with every parameter trainable.

    Raises:
        LabError: unknown method or option, a wrong value, or targets that the model does not have.
    """
    chosen = method(name)
    parsed = parse(chosen.options, options, f"method {name}")
    check_targets(model, getattr(parsed, "targets", ()))
    return chosen.apply(model, parsed)


def closed_form(config: Any, name: str, options: dict[str, Any]) -> int | None:
    """How many parameters the method trains, by arithmetic on the configuration; None where no formula is kept."""
    chosen = method(name)
    parsed = parse(chosen.options, options, f"method {name}")
    return chosen.trainable(config, parsed) if chosen.trainable else None


def check_targets(model: Any, targets: tuple[str, ...]) -> None:
    """Every target names a linear layer of the model.

    Raises:
        LabError: one does not; the message lists those that exist.
    """
    import torch

    present = {name.rsplit(".", 1)[-1] for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for target in targets:
        if target not in present:
            raise unknown("target module", target, present)


def count_parameters(model: Any) -> dict[str, int]:
    """Numbers of parameters, ties counted once: `total` with the method's own, `base` without, `trainable`, `stored`.

    `stored` is what an adapter file holds: for full fine-tuning all of the model. A 4-bit parameter counts as the
    elements that it stands for, not as the bytes that hold them.
    """
    total = sum(_elements(p) for p in model.parameters())
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added, stored = 0, total
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        added = sum(p.numel() for n, p in model.named_parameters() if "lora_" in n)
        stored = sum(t.numel() for t in get_peft_model_state_dict(model).values())
    return {"total": total, "base": total - added, "trainable": trainable, "stored": stored}


def _elements(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    if state is not None:
        return int(state.shape.numel())
    return int(parameter.numel())


def lora_parameters(config: Any, rank: int, targets: tuple[str, ...] = ALL_LINEAR) -> int:
    """The closed form: sum over targets of rank x (inputs + outputs), times the layers.

    Grouped-query attention makes keys and values narrower than queries.

    Source:
        Hu et al. 2021, section 4.1; checked against PEFT in tests/methods/test_methods.py.
    """
    hidden, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or hidden // config.num_attention_heads
    queries, keys = config.num_attention_heads * head, config.num_key_value_heads * head
    widths = {
        "q_proj": hidden + queries,
        "k_proj": hidden + keys,
        "v_proj": hidden + keys,
        "o_proj": queries + hidden,
        "gate_proj": hidden + inner,
        "up_proj": hidden + inner,
        "down_proj": inner + hidden,
    }
    return config.num_hidden_layers * rank * sum(widths[target] for target in targets)
