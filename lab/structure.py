"""The trial that looks at a method itself: what it adds, what moves in training, what it does to the weights.

Everything is a number, told from parameters and outputs, not from names of classes.
"""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from lab.methods import ADDED, closed_form, count_parameters
from lab.methods.saving import merge, unmergeable
from lab.models import load_model
from lab.outputs import distance, logits, random_batch
from lab.runners import Outcome
from lab.specs import Structure
from lab.training import FineTuning
from lab.workspace import Workspace

REPEATS = 40
"""Of each forward pass that is timed, with and without the method in turn: their medians spread by some per cent."""

NEGLIGIBLE = 1e-9
"""Singular values below this share of the largest are rounding: in float64 it is 1e-13 of the weights, a change 1e-4."""


def examine(settings: Structure, workspace: Workspace) -> Outcome:
    """Train a few updates and say what the method is made of, what it moved and what it can do.

    Figures:
        start_distance: largest difference of the logits from the base's before training, over the base's largest.
        end_distance: the same after training.
        trained_outside: trainable parameters that the method did not add.
        base_moved: largest change of a parameter of the base.
        added_still: tensors that the method added and training left alone.
        off_distance: of the logits with the method switched off after training, from the base's.
        queries_in_front, keys_in_front: tokens beside the input's that ask, and that are seen, at every layer.
        layers_of_own: layers whose keys in front are not what the layer makes of tokens in front.
        latency: time of a forward pass with the method over that with it switched off.
        merges, and where it does: merged_latency, merge_error_<dtype> (relative, of the logits), and of the change of
        each weight `rank_smallest`, `rank_largest`, `rank_possible`, `rescale_error`, `magnitude_moved`, `direction_moved`.
        magnitude_error: of the magnitudes that the method trains against the norms of the merged weights' outputs.
        coupled: share of the virtual tokens that one number of the method's encoder moves.
    """
    run = FineTuning(settings, workspace)
    model = run.model.eval()
    base = load_model(
        settings.model, workspace.model(settings.model), seed=settings.seed, device=settings.device
    ).eval()
    batch = random_batch(base, settings.seed)
    expected = logits(base, batch)
    outcome = Outcome(tags={"model": settings.model, "method": settings.method})
    figures = outcome.figures
    figures |= {f"parameters_{name}": count for name, count in count_parameters(model).items()}
    figures["parameters_closed_form"] = closed_form(base.config, settings.method, settings.method_options)
    figures["start_distance"] = distance(logits(model, batch), expected)

    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    added = {name for name in before if any(mark in name for mark in ADDED)}
    figures["trained_outside"] = sum(
        p.numel() for name, p in model.named_parameters() if p.requires_grad and name not in added
    )
    run.train()
    outcome.diverged = run.diverged()
    model.eval()
    moved = {name: float((p.detach() - before[name]).abs().max()) for name, p in model.named_parameters()}
    figures["base_moved"] = max(change for name, change in moved.items() if name not in added)
    figures["added_still"] = sum(moved[name] == 0 for name in added)
    figures["end_distance"] = distance(logits(model, batch), expected)
    with _switched_off(model):
        figures["off_distance"] = distance(logits(model, batch), expected)
    figures |= _in_front(model, batch)
    figures["latency"] = _latency(model, batch)
    figures["coupled"] = _coupled(model, batch)
    figures |= _merged(model, base, batch)
    return outcome


@contextlib.contextmanager
def _switched_off(model: Any) -> Iterator[None]:
    with model.disable_adapter() if hasattr(model, "disable_adapter") else contextlib.nullcontext():
        yield


def _in_front(model: Any, batch: Tensor) -> dict[str, int]:
    """Tokens in front of the input, told from the tables of attention; and whether layers have keys of their own."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    held = inner.config._attn_implementation
    inner.set_attn_implementation("eager")
    with torch.no_grad():
        tables = model(input_ids=batch, attention_mask=torch.ones_like(batch), output_attentions=True).attentions
    inner.set_attn_implementation(held)
    queries, keys = ([table.shape[axis] - batch.shape[1] for table in tables] for axis in (-2, -1))
    return {
        "layers": len(tables),
        "queries_in_front": min(queries),
        "keys_in_front": min(keys),
        "layers_of_own": sum(k > q for q, k in zip(queries, keys, strict=True)),
    }


def _latency(model: Any, batch: Tensor) -> float:
    """Median time of a forward pass with the method over the median without, in turn; 1 for full fine-tuning."""
    if not hasattr(model, "disable_adapter"):
        return 1.0
    on, off = [], []
    for _ in range(REPEATS):
        on.append(_seconds(model, batch))
        with _switched_off(model):
            off.append(_seconds(model, batch))
    return statistics.median(on) / statistics.median(off)


def _seconds(model: Any, batch: Tensor) -> float:
    wait = torch.cuda.synchronize if batch.is_cuda else lambda: None  # a GPU answers before it has worked
    wait()
    started = time.perf_counter()
    logits(model, batch)
    wait()
    return time.perf_counter() - started


def _coupled(model: Any, batch: Tensor) -> float:
    """The share of virtual tokens whose vectors move if one number of what makes them, not of their own, is changed."""
    if not hasattr(model, "prompt_encoder"):
        return 0.0
    encoder = model.prompt_encoder[model.active_adapter]
    shared = [p for name, p in encoder.named_parameters() if "embedding" not in name]
    if not shared:
        return 0.0
    tokens = model.prompt_tokens[model.active_adapter].to(batch.device)
    with torch.no_grad():
        before = encoder(tokens[None])[0]
        shared[-1].view(-1)[0] += 1.0
        after = encoder(tokens[None])[0]
        shared[-1].view(-1)[0] -= 1.0
    return float((before != after).any(-1).double().mean())


# Merging --------------------------------------------------------------------------------------------------------


def _merged(model: Any, base: Any, batch: Tensor) -> dict[str, float]:
    """What merging gives, if the method can be merged."""
    if unmergeable(model):
        return {"merges": 0}
    figures: dict[str, float] = {"merges": 1}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        apart = copy.deepcopy(model).to(dtype)
        expected = logits(apart, batch)
        merged = merge(apart)
        figures[f"merge_error_{str(dtype).removeprefix('torch.')}"] = distance(logits(merged, batch), expected)
        if dtype == torch.float64:
            figures |= _changes(merged, base, model)
        if dtype == torch.float32:
            times = [(_seconds(merged, batch), _seconds(base, batch)) for _ in range(REPEATS)]
            figures["merged_latency"] = statistics.median(a for a, _ in times) / statistics.median(b for _, b in times)
    return figures


def _changes(merged: Any, base: Any, model: Any) -> dict[str, float]:
    """What has become of the weights, in float64."""
    weights = {
        name: module.weight.detach().double() for name, module in base.named_modules() if isinstance(module, nn.Linear)
    }
    changed = {
        name: (weight, merged.get_submodule(name).weight.detach())
        for name, weight in weights.items()
        if not torch.equal(weight, merged.get_submodule(name).weight.detach())
    }
    if not changed:
        return {"weights_changed": 0}
    ranks = [_rank(after - before) for before, after in changed.values()]
    rescaled = [min(_scaled(before, after), _scaled(before.T, after.T)) for before, after in changed.values()]
    norms = [(before.norm(dim=1), after.norm(dim=1)) for before, after in changed.values()]
    cosines = [nn.functional.cosine_similarity(before, after, dim=1) for before, after in changed.values()]
    figures: dict[str, float] = {
        "weights_changed": len(changed),
        "rank_smallest": min(ranks),
        "rank_largest": max(ranks),
        "rank_possible": min(min(before.shape) for before, _ in changed.values()),
        "rescale_error": max(rescaled),
        "magnitude_moved": statistics.fmean(float(((b - a) / a).abs().mean()) for a, b in norms),
        "direction_moved": statistics.fmean(float((1 - cosine).mean()) for cosine in cosines),
    }
    magnitudes = {
        name.split(".lora_magnitude_vector")[0].removeprefix("base_model.model."): parameter.detach().double()
        for name, parameter in model.named_parameters()
        if "lora_magnitude_vector" in name
    }
    if magnitudes:
        figures["magnitude_error"] = max(
            distance(merged.get_submodule(name).weight.norm(dim=1), vector) for name, vector in magnitudes.items()
        )
    return figures


def _rank(change: Tensor) -> int:
    singular = torch.linalg.svdvals(change)
    return int((singular > NEGLIGIBLE * singular[0]).sum())


def _scaled(before: Tensor, after: Tensor) -> float:
    """How far `after` is from `before` with a factor for each row: 0 if it is just that."""
    factors = (before * after).sum(1) / (before * before).sum(1)
    return float((after - factors[:, None] * before).norm() / (after - before).norm())
