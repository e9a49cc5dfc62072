"""Models away from their start, and what they say: for the tests of the lab's own methods."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

TOKENS = torch.arange(3, 21).reshape(2, 9)


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
