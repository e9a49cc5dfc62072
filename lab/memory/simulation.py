"""The memory of one update, from tensors that have shapes but no storage.

The real transformers model, the real PEFT method and the real optimizer run one update on shadows of tensors on the
processor (`lab.memory.shadows`), with a ledger of live storages. What a CUDA device does otherwise (its attention and
dropout kernels, its allocator's rounding, cuBLAS workspaces) stands in `lab.memory.kernels`.

All decoder layers are alike, or repeat a pattern of a few kinds. So two shallow models are run, and each stretch of
the update (the first layers, the layers in between, the last layers, what comes before and after them) is extrapolated
by itself: its peak is affine in the depth, whereas the peak of a whole phase is not, since its place may move.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from lab import methods
from lab.memory import kernels
from lab.memory import optimizer_states as states
from lab.memory.architecture import Architecture, text_config
from lab.memory.kernels import DTYPES
from lab.memory.ledger import weights
from lab.memory.measurement import by_kind, optimizer_state_by_parameter, parameter_counts
from lab.memory.workload import (
    PARTS,
    PHASES,
    Prediction,
    Workload,
    assumptions,
    check,
    method_options,
    stored_parameters,
    workspace_bytes,
)

MakeOptimizer = Callable[[Workload, nn.Module], torch.optim.Optimizer]

START, END = -1, -2
"""In the place of a layer's number: what comes before and after the layers."""

EDGE = 1
"""How many layers at either end have stretches of their own; those between repeat their pattern."""


# Prediction -----------------------------------------------------------------------------------------------------


def predict(workload: Workload) -> Prediction:
    """The memory of an update, steady state, to the byte where only tensors decide.

    Raises:
        LabError: the workload contradicts itself, or no model of the simulation covers it.
    """
    check(workload)
    return rehearse_whole(workload).prediction(workload)


def rehearse_whole(workload: Workload, **how: Any) -> Rehearsal:
    """The rehearsal at full depth; of a deep model it is told from two shallow ones.

    Args:
        how: see `rehearse`.
    """
    depth = Architecture.of(workload.config).layers
    period = _period(workload.config)
    least = 2 * EDGE + period
    shallow = least + (depth - least) % period
    if 2 * (shallow + period) > depth:
        return rehearse(workload, workload.config, **how)
    small, large = (rehearse(workload, shrink(workload.config, n), **how) for n in (shallow, shallow + period))
    return small.extrapolate(large, (depth - shallow) // period, kernels.make_ledger(workload).round)


def shrink(config: Mapping[str, Any], layers: int) -> dict[str, Any]:
    """The configuration with so many layers, their kinds in the same order."""
    small = dict(config)
    for name in ("num_hidden_layers", "n_layer"):
        if name in small:
            small[name] = layers
    if small.get("layer_types"):
        small["layer_types"] = list(small["layer_types"])[:layers]
    if "text_config" in small:
        small["text_config"] = shrink(small["text_config"], layers)
    return small


def _period(config: Mapping[str, Any]) -> int:
    """After how many layers their kinds repeat."""
    kinds = Architecture.of(dict(config)).layer_types
    return next((p for p in range(1, len(kinds)) if all(a == b for a, b in zip(kinds, kinds[p:], strict=False))), 1)


@dataclass
class Rehearsal:
    """What one rehearsal saw, in bytes.

    Attributes:
        stretches: peak of each stretch, `(phase, place)`, by part; the place is a layer from either end, or what is around.
        steady: what is held between updates, by part.
        end_of_forward: what is held when the loss is there, the model's output still alive, by part.
        between: what is held after the first of several micro-batches, by part.
        step_start: what is held when the optimizer's step begins, gradients complete, by part.
        parameters: numbers of parameters.
        kinds: trainable parameters and their state, see `by_kind`.
        norms: of the gradients, stacked to clip them; not rounded.
        host: bytes of paged optimizer state.
    """

    stretches: dict[tuple[str, str], Counter[str]] = field(default_factory=dict)
    steady: Counter[str] = field(default_factory=Counter)
    end_of_forward: Counter[str] = field(default_factory=Counter)
    between: Counter[str] = field(default_factory=Counter)
    step_start: Counter[str] = field(default_factory=Counter)
    parameters: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    norms: int = 0
    host: int = 0

    def extrapolate(self, deeper: Rehearsal, periods: int, rounded: Callable[[int], int]) -> Rehearsal:
        """The same `periods` further, if `deeper` is one further: affine in the depth, stretch by stretch.

        Args:
            rounded: bytes that a storage takes. The norms of all gradients are the one storage that grows with the depth,
                and rounding is not affine.
        """

        def further(a: Mapping[str, int], b: Mapping[str, int]) -> Counter[str]:
            return Counter({name: a.get(name, 0) + periods * (b.get(name, 0) - a.get(name, 0)) for name in {**a, **b}})

        counters = ("steady", "end_of_forward", "between", "step_start", "parameters", "kinds")
        found = Rehearsal(
            {place: further(parts, deeper.stretches[place]) for place, parts in self.stretches.items()},
            **{name: further(getattr(self, name), getattr(deeper, name)) for name in counters},
            norms=self.norms + periods * (deeper.norms - self.norms),
            host=self.host + periods * (deeper.host - self.host),
        )
        if found.stretches:
            affine = rounded(self.norms) + periods * (rounded(deeper.norms) - rounded(self.norms))
            found.stretches["step", "clip"]["temporaries"] += rounded(found.norms) - affine
        return found

    @property
    def peaks(self) -> dict[str, Counter[str]]:
        """The highest stretch of each phase, by part."""
        return {
            phase: max((parts for (p, _), parts in self.stretches.items() if p == phase), key=Counter.total)
            for phase in PHASES
        }

    def prediction(self, workload: Workload) -> Prediction:
        """The answer: the highest stretch of each phase, and the parts at the highest of all."""
        workspace = workspace_bytes(workload)
        phases = {phase: parts.total() for phase, parts in self.peaks.items()}
        highest = max(self.peaks.values(), key=Counter.total)
        return Prediction(
            peak_bytes=highest.total() + workspace,
            steady_bytes=self.steady.total() + workspace,
            parts={name: highest[name] for name in PARTS} | {"workspace": workspace},
            phases={phase: peak + workspace for phase, peak in phases.items()},
            parameters=dict(self.parameters),
            host_bytes=self.host,
            assumptions={"torch": torch.__version__, "transformers": version("transformers"), **assumptions(workload)},
        )


# Rehearsal ------------------------------------------------------------------------------------------------------


def rehearse(
    workload: Workload,
    config: Mapping[str, Any],
    real: bool = False,
    train: bool = True,
    make_optimizer: MakeOptimizer = states.make_optimizer,
) -> Rehearsal:
    """One update of a model of this configuration under the ledger, after the optimizer's state is there.

    Args:
        real: with tensors that have storage, to compare with.
        train: False counts the model's parameters and weights, and no more.
        make_optimizer: another optimizer than the workload names.
    """
    with contextlib.ExitStack() as stack:
        model = build(workload, config)
        stack.enter_context(kernels.emulated(workload))
        if not real:
            stack.enter_context(_shadows(workload.device))
        materialise(model, workload)
        update = Update(workload, model, make_optimizer)
        return update.run() if train else update.count()


@contextlib.contextmanager
def _shadows(device: str) -> Iterator[None]:
    from torch import _meta_registrations as registered
    from transformers import PreTrainedModel, masking_utils

    from lab.memory.shadows import ShadowMode

    # torch's shape rule of grouped products, those of experts, knows bf16 alone, its kernels all types.
    of_bf16: Any = getattr(registered, "_meta_grouped_mm_common", None)  # of torch 2.13

    def of_all(a: Tensor, b: Tensor, *scales: Any, **options: Any) -> Any:
        return of_bf16(a.to(torch.bfloat16), b.to(torch.bfloat16), *scales, **options).to(a.dtype)

    with contextlib.ExitStack() as stack:
        # transformers looks at positions to find packed sequences, and at tokens to find padding; here there is neither.
        stack.enter_context(patch.object(masking_utils, "find_packed_sequence_indices", lambda position_ids: None))
        stack.enter_context(patch.object(PreTrainedModel, "warn_if_padding_and_no_attention_mask", lambda *_: None))
        if of_bf16:
            stack.enter_context(patch.object(registered, "_meta_grouped_mm_common", of_all))
        stack.enter_context(ShadowMode(device))
        yield


def build(workload: Workload, config: Mapping[str, Any]) -> nn.Module:
    """The model with its method, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    loaded = AutoConfig.for_model(**text_config(config))
    loaded.use_cache = False
    attention = kernels.attention_name(workload)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(loaded, dtype=DTYPES[workload.dtype], attn_implementation=attention)
        if workload.held_as:
            from lab.memory.quantised import quantise

            quantise(model, workload, DTYPES[workload.dtype])
            if workload.preparation == "kbit":
                from peft import prepare_model_for_kbit_training

                prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        method = "lora" if workload.method == "qlora" else workload.method
        chosen = methods.method(method)  # its targets, which may be the ends of paths, are checked
        if not (method == "full" and workload.held_as):  # integers cannot be set to train; they can be counted
            model = chosen.apply(model, chosen.options(**method_options(workload)))
        if workload.held_as and workload.preparation is None:
            # trl 1.16 trains adapters of a quantised base in bf16, but for DoRA's magnitudes.
            for name, parameter in model.named_parameters():
                if parameter.requires_grad and "lora_magnitude_vector" not in name:
                    parameter.data = parameter.data.to(torch.bfloat16)
    if workload.checkpointing:
        # The second name is that of transformers before 5.20, and an alias since.
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    return model.train()


def materialise(model: nn.Module, workload: Workload) -> None:
    """Give every parameter and buffer that is on the meta device a tensor of zeros, keeping ties."""
    if workload.held_as:
        from lab.memory.quantised import materialise_layer

        for module in model.modules():
            materialise_layer(module, DTYPES[workload.dtype])
    made: dict[Tensor, Tensor] = {}

    def instead(tensor: Tensor) -> Tensor:
        if tensor.device.type != "meta":
            return tensor
        if tensor not in made:
            fresh = torch.zeros(tensor.shape, dtype=tensor.dtype)
            made[tensor] = nn.Parameter(fresh, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else fresh
        return made[tensor]

    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is not None:
                    table[name] = instead(tensor)  # type: ignore[assignment]
    # PEFT keeps the numbers of virtual tokens in a plain attribute.
    for name, tokens in getattr(model, "prompt_tokens", {}).items():
        model.prompt_tokens[name] = instead(tokens)  # type: ignore[operator]


class Update:
    """One update as the Trainer does it: micro-batches, clipping, the optimizer's step, gradients released."""

    def __init__(self, workload: Workload, model: nn.Module, make_optimizer: MakeOptimizer) -> None:
        self.workload, self.model, self.make_optimizer = workload, model, make_optimizer
        self.seen = Rehearsal()
        self.ledger = kernels.make_ledger(workload)
        self.trained = [p for p in model.parameters() if p.requires_grad]
        self.layers = _mark_layers(model, self._enter)

    def _enter(self, phase: str, layer: int) -> None:
        """A layer begins, or what comes before (START) or after (END) the layers in this phase."""
        last = len(self.layers) - 1
        if layer < 0:
            place = "start" if layer == START else "end"
        elif layer < EDGE:
            place = f"+{layer}"
        elif last - layer < EDGE:
            place = f"-{last - layer}"
        else:
            place = "between"
        self.ledger.enter_phase(f"{phase} {place}")

    def count(self) -> Rehearsal:
        """The model's parameters and weights, without an update."""
        self.ledger.assign(weights(self.model), "weights")
        self.seen.steady, self.seen.parameters = self._held(), _counts(self.workload, self.model)
        return self.seen

    def run(self) -> Rehearsal:
        """Rehearse."""
        ledger, seen = self.ledger, self.count()
        optimizer = self.make_optimizer(self.workload, self.model)
        for parameter in self.trained:
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.assign([p.grad], "gradients"))
        with ledger:
            self._create_state(optimizer)
            ledger.assign(states.state_tensors(optimizer), "optimizer")
            if self.workload.device == "cuda":
                ledger.assign(states.on_host(optimizer), "host")
            seen.steady = self._held()
            seen.kinds = Counter(by_kind(self.model, optimizer_state_by_parameter(ledger, self.model, optimizer)))
            ledger.reset()
            batch = self._batch()
            for number in range(min(self.workload.accumulation, 2)):
                if number:
                    seen.between = self._held()
                self._forward_and_backward(batch)
            seen.step_start = self._held()
            ledger.enter_phase("step clip")
            nn.utils.clip_grad_norm_(self.trained, 1.0, foreach=True)
            ledger.enter_phase("step update")
            optimizer.step()
            optimizer.zero_grad()
            ledger.enter_phase("idle")
        peaks = {name: parts for name, parts in ledger.held_at_peak.items() if name != "idle"}
        seen.stretches = {(p, place): _on_device(parts) for name, parts in peaks.items() for p, place in [name.split()]}
        seen.norms = len(self.trained) * max(parameter.element_size() for parameter in self.trained)
        seen.host = states.host_bytes(optimizer)
        return seen

    def _held(self) -> Counter[str]:
        return _on_device(self.ledger.held)

    def _create_state(self, optimizer: torch.optim.Optimizer) -> None:
        """A step on gradients of zero, so that the update that is watched finds the optimizer's state."""
        for parameter in self.trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()

    def _batch(self) -> dict[str, Tensor]:
        w = self.workload
        ids = torch.zeros(w.batch, w.length, dtype=torch.long)
        batch = {"input_ids": ids, "labels": torch.zeros_like(ids)}
        self.ledger.assign(batch.values(), "activations")
        return batch

    def _forward_and_backward(self, batch: dict[str, Tensor]) -> None:
        self._enter("forward", START)
        loss = kernels.forward(self.model, self.workload, batch, self._end_forward)
        self._enter("backward", START)
        loss.backward()

    def _end_forward(self) -> None:
        self.seen.end_of_forward = self._held()


def _on_device(held: Mapping[str, int]) -> Counter[str]:
    return Counter({part: size for part, size in held.items() if part != "host"})


def _counts(workload: Workload, model: Any) -> Counter[str]:
    """`total`, `trainable` and `stored` parameters."""
    counts = parameter_counts(model)
    stored = stored_parameters(workload, counts["trainable"], model.config.num_hidden_layers)
    return Counter(total=counts["total"], trainable=counts["trainable"], stored=stored)


def _mark_layers(model: nn.Module, enter: Any) -> nn.ModuleList:
    """Say when the forward, and when the backward, pass reaches a layer; also where it is checkpointed.

    A hook would run inside the checkpoint, again in the replay; a subclass's `__call__` stands outside.
    """
    layers = next(
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and name.rsplit(".", 1)[-1] in ("layers", "h")
    )

    for number, layer in enumerate(layers):
        kind = type(layer)

        def call(self: nn.Module, *args: Any, _kind: Any = kind, _number: int = number, **kwargs: Any) -> Any:
            enter("forward", _number)
            output = _kind.__call__(self, *args, **kwargs)
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(lambda grad: enter("backward", _number))
            if _number == 0:
                first = next(a for a in (*args, *kwargs.values()) if isinstance(a, Tensor) and a.is_floating_point())
                if first.requires_grad:
                    first.register_hook(lambda grad: enter("backward", END))
            if _number == len(layers) - 1:
                enter("forward", END)
            return output

        layer.__class__ = type(kind.__name__, (kind,), {"__call__": call})
    return layers
