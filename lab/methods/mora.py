"""MoRA: a square matrix in the place of LoRA's two thin ones (Jiang et al. 2024, "MoRA: High-Rank Updating").

With as many parameters as LoRA of rank r, a square matrix M of side n, about sqrt((inputs + outputs) r), changes the
weight by up to rank n. What the layer's widths have more than n is compressed before M and decompressed after it, by
operators without parameters:

    operator   compress inputs to n              decompress n to outputs
    1          every n-th input is added         repeated as a whole
    2          neighbouring inputs are added     each repeated for its neighbours
    3          neighbouring inputs are added     repeated as a whole
    4          every n-th input is added         each repeated for its neighbours
    6          groups of n, each turned by its number as rotary embeddings turn positions, each through M; the results
               stand side by side

Inputs that do not fill the last group are continued from the first on; outputs that are too many are dropped. M begins
at zero, and nothing is scaled.

Source: the paper's section 4 and appendix, whose operators have these numbers in the authors' code (5 is not published).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftConfig, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, _get_in_out_features, check_adapters_to_merge
from peft.utils import resolve_quantization_backend
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lab.errors import LabError
from lab.methods import MoraOptions, over_layers
from lab.methods.registration import OwnModel, register
from lab.methods.sizes import mora_side

SHARED, GROUPED, ROTARY = "shared", "grouped", "rotary"
OPERATORS = {
    1: (SHARED, SHARED),
    2: (GROUPED, GROUPED),
    3: (GROUPED, SHARED),
    4: (SHARED, GROUPED),
    6: (ROTARY, ROTARY),
}
"""How inputs are compressed and outputs decompressed."""


def parameters(config: Any, options: MoraOptions) -> int:
    """The closed form: the squared side of each target in every layer."""
    return over_layers(config, options.targets, lambda i, o: mora_side(i, o, options.rank, options.operator) ** 2)


def apply(model: Any, options: MoraOptions) -> Any:
    """The model with a square matrix beside each target, as a PEFT model."""
    config = MoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        operator=options.operator,
        dropout=options.dropout,
        target_modules=list(options.targets),
    )
    return get_peft_model(model, config)


@dataclass
class MoraConfig(PeftConfig):
    """What an adapter's file says. `r` is the rank of the LoRA that has as many parameters."""

    r: int = 8
    operator: int = 6
    dropout: float = 0.0
    target_modules: Any = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = "MORA"
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)


class MoraLayer(nn.Module, BaseTunerLayer):
    """A linear layer and the square matrices beside it, one for each adapter."""

    adapter_layer_names = ("mora_matrix",)
    other_param_names = ("mora_operator", "mora_dropout")

    if TYPE_CHECKING:  # PEFT has no types, and nn.Module says that what it does not know is a tensor or a module

        def __getattr__(self, name: str) -> Any: ...

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: MoraConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.quantization_backend = resolve_quantization_backend(self.get_base_layer())
        self.in_features, self.out_features = _get_in_out_features(self.get_base_layer())
        self.mora_matrix = nn.ParameterDict()
        self.mora_operator: dict[str, int] = {}
        self.mora_dropout = nn.ModuleDict()
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: MoraConfig) -> None:
        """Add an adapter, or begin one anew."""
        width = mora_side(self.in_features, self.out_features, config.r, config.operator)
        self.mora_operator[adapter_name] = config.operator
        self.mora_dropout[adapter_name] = nn.Dropout(config.dropout)
        self.mora_matrix[adapter_name] = nn.Parameter(torch.zeros(width, width))
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def update(self, adapter_name: str, inputs: Tensor) -> Tensor:
        """What an adapter adds to the layer's output: `(..., inputs)` to `(..., outputs)`."""
        compressed, decompressed = OPERATORS[self.mora_operator[adapter_name]]
        matrix = self.mora_matrix[adapter_name].to(inputs.dtype)
        short = nn.functional.linear(_compress(compressed, inputs, len(matrix)), matrix)
        return _decompress(decompressed, short, self.out_features)

    def get_delta_weight(self, adapter_name: str) -> Tensor:
        """What an adapter adds to the weight `(outputs, inputs)`: the update of each input alone, as it is linear.

        In fp32 at least: some processors multiply 16-bit numbers slowly, and merging rounds once.
        """
        matrix = self.mora_matrix[adapter_name]
        dtype = torch.promote_types(matrix.dtype, torch.float32)
        return self.update(adapter_name, torch.eye(self.in_features, dtype=dtype, device=matrix.device)).T

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the base's weight, which forgets them but for `unmerge`.

        Raises:
            LabError: the base is quantised; or, with `safe_merge`, the sum is not finite.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.mora_matrix:
                self._add_to_base(name, 1, safe_merge)
                self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take what was merged out of the base's weight again, up to rounding."""
        while self.merged_adapters:
            self._add_to_base(self.merged_adapters.pop(), -1)

    def _add_to_base(self, name: str, sign: int, check: bool = False) -> None:
        if self.quantization_backend is not None:
            raise LabError(
                "merge: the base's weights are quantised, and their sum with an adapter would have to be quantised again. "
                "Load the base in 16 bits and merge there."
            )
        base, delta = self.get_base_layer(), sign * self.get_delta_weight(name)
        merged = base.weight.data.to(delta.dtype) + (delta.T if isinstance(base, Conv1D) else delta)
        if check and not torch.isfinite(merged).all():
            raise LabError(
                f"merge: adapter '{name}' makes weights that are not finite. Train it anew, or leave it out."
            )
        base.weight.data = merged.to(base.weight.dtype)

    def forward(self, inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output with what the active adapters add."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        output: Tensor = self.base_layer(inputs, *args, **kwargs)
        if self.disable_adapters or self.merged:
            return output
        dtype = output.dtype
        for name in self.active_adapters:
            if name in self.mora_matrix:
                cast = self._cast_input_dtype(inputs, self.mora_matrix[name].dtype)
                output = output + self.update(name, self.mora_dropout[name](cast))
        return output.to(dtype)


class MoraModel(OwnModel):
    """A model whose target layers have square matrices beside them."""

    prefix = "mora_"
    tuner_layer_cls = MoraLayer

    def make_layer(self, target: Any, adapter_name: str, config: Any, place: str) -> MoraLayer:
        """The square matrix beside a linear layer.

        Raises:
            LabError: `target` is none.
        """
        if not (isinstance(target, nn.Linear | Conv1D) or resolve_quantization_backend(target)):
            raise LabError(f"mora: {place} is a {type(target).__name__}. Target linear layers.")
        return MoraLayer(target, adapter_name, config)


register("mora", MoraConfig, MoraModel, MoraModel.prefix)


# Operators ------------------------------------------------------------------------------------------------------


def _compress(how: str, inputs: Tensor, width: int) -> Tensor:
    """`(..., inputs)` to `(..., width)`; rotary: to `(..., groups, width)`."""
    count, lead = inputs.shape[-1], inputs.shape[:-1]
    if how == GROUPED:
        longer, least = count % width, count // width
        cut = longer * (least + 1)
        first = inputs[..., :cut].reshape(*lead, longer, least + 1).sum(-1)
        return torch.cat([first, inputs[..., cut:].reshape(*lead, width - longer, least).sum(-1)], -1)
    groups = -(-count // width)
    grouped = _continued(inputs, groups * width).reshape(*lead, groups, width)
    return grouped.sum(-2) if how == SHARED else _turn(grouped)


def _decompress(how: str, short: Tensor, outputs: int) -> Tensor:
    """`(..., width)`, rotary: `(..., groups, width)`, to `(..., outputs)`."""
    if how == ROTARY:
        short = short.flatten(-2)
    if how == GROUPED:
        width = short.shape[-1]
        longer, least = outputs % width, outputs // width
        counts = torch.tensor([least + 1] * longer + [least] * (width - longer), device=short.device)
        return short[..., torch.repeat_interleave(counts)]
    return _continued(short, outputs)


def _continued(values: Tensor, size: int) -> Tensor:
    """The first `size` of the last axis, which begins again where it ends.

    Joined, as in the authors' code: taken by index, whose backward pass adds one by one, an update took a quarter longer.
    """
    times, rest = divmod(size, values.shape[-1])
    parts = [values] * times + [values[..., :rest]] * bool(rest)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def _turn(grouped: Tensor) -> Tensor:
    """Group g of `(..., groups, width)` turned as rotary embeddings turn the token at position g (Su et al. 2021)."""
    groups, width = grouped.shape[-2:]
    frequencies = 10_000.0 ** (-torch.arange(0, width, 2, device=grouped.device) / width)
    angles = torch.outer(torch.arange(groups, device=grouped.device), frequencies).repeat(1, 2)
    half = torch.cat([-grouped[..., width // 2 :], grouped[..., : width // 2]], -1)
    return grouped * angles.cos().to(grouped.dtype) + half * angles.sin().to(grouped.dtype)
