"""Which optimizers a trial may name, and the one that no library on the list has: AdamW with fp32 master weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lab.errors import unknown


def check_optimizer(name: str) -> None:
    """`name` is one that the installed transformers Trainer knows.

    Raises:
        LabError: it is not; the message names the nearest.
    """
    from transformers.training_args import OptimizerNames

    names = [entry.value for entry in OptimizerNames]
    if name not in names:
        raise unknown("optimizer", name, names)


class MasterWeightAdamW(torch.optim.AdamW):
    """AdamW that keeps an fp32 copy of half-precision weights and updates that ("mixed precision" of Micikevicius).

    The moments follow the copy, so the optimizer holds 4 (copy) + 8 (moments) bytes per parameter: the 12 of the rule of
    thumb. Apex O2 and DeepSpeed do the same; torch, transformers and bitsandbytes have no such optimizer.

    Source:
        Micikevicius et al. 2018, section 3.1; Rajbhandari et al. 2020 (ZeRO), section 3.1.
    """

    def __init__(self, params: Any, **options: Any):
        super().__init__(params, **options)
        self._models: list[list[torch.Tensor]] = []
        for group in self.param_groups:
            self._models.append(group["params"])
            group["params"] = [p.detach().clone().float().requires_grad_(True) for p in group["params"]]

    @property
    def master_weights(self) -> list[torch.Tensor]:
        """The fp32 copies."""
        return [master for group in self.param_groups for master in group["params"]]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """One update of the copies from the model's gradients, rounded back into the model."""
        pairs = [
            (weight, master)
            for weights, group in zip(self._models, self.param_groups, strict=True)
            for weight, master in zip(weights, group["params"], strict=True)
        ]
        for weight, master in pairs:
            master.grad = None if weight.grad is None else weight.grad.float()
        loss = super().step(closure)
        for weight, master in pairs:
            weight.copy_(master)
            master.grad = None
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Release the model's gradients."""
        for weights in self._models:
            for weight in weights:
                weight.grad = None
