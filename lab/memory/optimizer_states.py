"""Optimizers by their Trainer names, for the simulation: torch's and transformers' own classes, and a model of bitsandbytes'.

bitsandbytes' kernels update in place; what counts is the state that they keep, which `BlockwiseState` allocates by the same
rules and without its import of several seconds. Tests compare it with the real optimizers.

Source: bitsandbytes 0.50.2, optim/optimizer.py; transformers 5.23, trainer.py (`create_optimizer`) and trainer_optimizer.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lab.errors import unknown
from lab.memory.ledger import tensors_in
from lab.memory.workload import BLOCKWISE, OPTIMIZERS, Blockwise, Workload


def make_optimizer(workload: Workload, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer by its Trainer name, over the Trainer's two groups: with weight decay, and without.

    Raises:
        LabError: the simulation has no model of it.
    """
    groups, name, step = _groups(model), workload.optimizer, workload.stepped_by
    kinds: dict[str, Any] = {"foreach": step == "foreach", "fused": step == "fused"}
    if name in BLOCKWISE:
        embeddings: set[Tensor] = {p for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        return BlockwiseState(groups, BLOCKWISE[name], embeddings)
    match name:
        case "adamw_torch" | "adamw_torch_fused":
            return torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.0, **kinds)
        case "sgd":
            return torch.optim.SGD(groups, lr=1e-4, **kinds)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=1e-4, **kinds)
        case "rmsprop":
            return torch.optim.RMSprop(groups, lr=1e-4, foreach=kinds["foreach"])
        case "adafactor":
            from transformers.optimization import Adafactor

            return Adafactor(groups, lr=1e-4, scale_parameter=False, relative_step=False)
    raise unknown("optimizer", name, OPTIMIZERS)


def _groups(model: nn.Module) -> list[dict[str, Any]]:
    from transformers.trainer_pt_utils import get_parameter_names

    undecayed = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]
    decayed = set(get_parameter_names(model, [nn.LayerNorm], undecayed))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    groups = [[p for name, p in named if (name in decayed) == wanted] for wanted in (True, False)]
    return [{"params": group, "weight_decay": 0.0} for group in groups if group]


class BlockwiseState(torch.optim.Optimizer):
    """The state that an optimizer of bitsandbytes keeps, and no arithmetic."""

    def __init__(self, params: Any, kind: Blockwise, embeddings: set[Tensor]) -> None:
        super().__init__(params, {})
        self.kind, self.embeddings = kind, embeddings
        self.host_bytes = 0
        self.tables: list[Tensor] = []

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Allocate the state of parameters that have a gradient and no state yet."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter not in self.state:
                    self.state[parameter] = self._state_of(parameter)

    def _state_of(self, parameter: Tensor) -> dict[str, Any]:
        kind, elements = self.kind, parameter.numel()
        in_bytes = kind.in_bytes(elements, parameter in self.embeddings)
        dtype = torch.uint8 if in_bytes else torch.float32
        state: dict[str, Any] = {}
        for number, values in enumerate(kind.tensors, start=1):
            size = values * elements
            if kind.paged and size >= kind.UNPAGED:
                self.host_bytes += size * dtype.itemsize
            else:
                state[f"state{number}"] = torch.zeros(size, dtype=dtype)
            if in_bytes:
                state[f"absmax{number}"] = torch.zeros(values * -(-elements // kind.BLOCK))
                if len(self.tables) < number:
                    self.tables.append(torch.zeros(256))
                state[f"qmap{number}"] = self.tables[number - 1]
        return state


def state_tensors(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Everything that the optimizer keeps, master weights too."""
    return [*tensors_in(list(optimizer.state.values())), *getattr(optimizer, "master_weights", [])]


def on_host(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """What a CUDA run keeps on the processor: torch's counters of steps, but for fused steps."""
    if any(group.get("fused") for group in optimizer.param_groups):
        return []
    return list(tensors_in([state.get("step") for state in optimizer.state.values()]))


def host_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of state in managed memory, which the device's own counters do not see."""
    return int(getattr(optimizer, "host_bytes", 0))
