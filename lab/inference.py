"""The trial that infers: what reading prompts and decoding with a key-value cache holds, and how long each takes.

Whatever is compared runs in turn in one process, so that what else the machine does hits all alike.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, set_seed

from lab.data import random_rows
from lab.errors import LabError
from lab.memory import closed_form
from lab.memory.architecture import Architecture
from lab.memory.ledger import Ledger, held_bytes, weights
from lab.methods import apply_method, quantisation
from lab.methods.saving import merge, unmergeable
from lab.models import load_model
from lab.outputs import distance, logits, random_batch
from lab.runners import Outcome
from lab.specs import Inference
from lab.workspace import Workspace

STIR = 0.02
"""Deviation of what is added to each parameter of a method, which begins by doing nothing: as transformers' own first weights."""


def infer(settings: Inference, workspace: Workspace) -> Outcome:
    """Read random prompts, decode greedily, and say what each way to hold the model takes for it.

    The ways: `base`, in the precision of the settings; `unmerged`, the base with the method's adapter, its parameters
    stirred, and `merged`, where the method merges; `quantised`, the base in few bits.

    Figures:
        formula_bytes: see `kv_cache_bytes`, of all that was read and decoded.
        multi_head_bytes: the same if it forgot that queries share keys and values.
        <way>_weights_bytes: distinct storages of parameters, buffers and what quantisation hangs on them.
        <way>_cache_bytes: distinct storages of the cache's keys and values after the last decoded token.
        <way>_prefill_cache_bytes: the same after the prompt.
        <way>_prefill_peak_bytes, <way>_decode_peak_bytes: the most that is alive, weights included, while the prompt is
            read (logits of its last token alone) and while tokens are decoded.
        adapter_distance, merged_distance: of the unmerged outputs from the base's, of the merged from the unmerged.
        And where it is timed, medians over the rounds:
        <way>_prefill_seconds, <way>_decode_seconds: for a token of one sequence.
        <way>_together_seconds: the same for a second prompt, all of its tokens read together behind what was decoded.
        <way>_decode_over_prefill, <way>_together_over_prefill: of these. <way>_over_base: of decoding, over the base's.
        cached_distance: what the base says after the last decoded token, from what it says when it reads all of them at once.
    Series: `<way>_prefill_seconds`, `<way>_decode_seconds`, `<way>_together_seconds`, by round.

    Raises:
        LabError: a method and a quantisation at once, virtual tokens, or too many tokens for the model's positions.
    """
    ways = _ways(settings, workspace)
    base = ways["base"]
    prompts = _prompts(settings, base)
    outcome = Outcome(tags={"model": settings.model, "method": settings.method})
    figures = outcome.figures
    itemsize = base.get_input_embeddings().weight.element_size()
    figures |= formulas(base.config, settings.batch, settings.length + settings.tokens, itemsize)
    for way, model in ways.items():
        ledger = Ledger(512 if settings.device == "cuda" else 1, settings.device)
        found = measure(model, base.config, prompts, settings.tokens, ledger)
        figures |= {f"{way}_{name}": value for name, value in found.items()}
    if "unmerged" in ways:
        batch = random_batch(base, settings.seed)
        says = {way: logits(model, batch) for way, model in ways.items()}
        figures["adapter_distance"] = distance(says["unmerged"], says["base"])
        if "merged" in ways:
            figures["merged_distance"] = distance(says["merged"], says["unmerged"])
    if settings.rounds:
        outcome.series = _timed(settings, ways, prompts)
        figures |= _times(outcome.series, ways)
        figures["cached_distance"] = _cached_distance(base, prompts, settings.tokens)
    return outcome


# Formula --------------------------------------------------------------------------------------------------------


def kv_cache_bytes(config: PreTrainedConfig, batch: int, tokens: int, dtype_bytes: int = 2) -> int:
    """Bytes that the key-value cache holds after `tokens` tokens, one at least of which was decoded.

    2 (keys and values) x layers x key-value heads x head dimension x batch x tokens x bytes per element; of a layer with
    a sliding window, no more tokens than its window. A prompt longer than the window is held whole until the next token.

    Args:
        batch: sequences decoded together.
        tokens: prompt and generated tokens per sequence.
    Raises:
        LabError: the configuration has no key-value heads that a decoder would cache (an encoder).
    Source:
        Pope et al. 2022, section 3.3; checked against storages in tests/test_inference.py.
    """
    return closed_form.kv_cache_bytes(Architecture.of(config.to_dict()), batch, tokens, dtype_bytes)


def formulas(config: PreTrainedConfig, batch: int, tokens: int, dtype_bytes: int) -> dict[str, int]:
    """What the formula says, and what one that forgets grouped queries would say."""
    shape = Architecture.of(config.to_dict())
    alone = replace(shape, key_value_heads=shape.heads)
    return {
        "formula_bytes": kv_cache_bytes(config, batch, tokens, dtype_bytes),
        "multi_head_bytes": closed_form.kv_cache_bytes(alone, batch, tokens, dtype_bytes),
    }


# Bytes ----------------------------------------------------------------------------------------------------------


def measure(model: Any, config: PreTrainedConfig, prompts: Tensor, tokens: int, ledger: Ledger) -> dict[str, int]:
    """What one way to hold a model takes, in bytes; see `infer`.

    Args:
        prompts: token ids `(batch, length)`.
        tokens: how many are decoded.
    """
    held = held_bytes(weights(model))
    ledger.adopt(weights(model))
    cache = DynamicCache(config=config)
    with torch.no_grad(), ledger:
        ledger.enter_phase("prefill")
        last = read(model, prompts, cache)
        prefilled = held_bytes(keys_and_values(cache))
        ledger.enter_phase("decode")
        decode(model, last, cache, tokens)
        ledger.enter_phase("idle")
    return {
        "weights_bytes": held,
        "cache_bytes": held_bytes(keys_and_values(cache)),
        "prefill_cache_bytes": prefilled,
        "prefill_peak_bytes": ledger.peaks["prefill"],
        "decode_peak_bytes": ledger.peaks["decode"],
    }


def keys_and_values(cache: Any) -> Iterator[Tensor]:
    """The tensors of a transformers cache, layer by layer."""
    for layer in cache.layers:
        yield from (layer.keys, layer.values)


def read(model: Any, ids: Tensor, cache: Any) -> Tensor:
    """Add tokens `(batch, tokens)` to the cache; the logits `(batch, vocabulary)` of the last, as `generate` asks for them."""
    found: Tensor = model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
    return found


def decode(model: Any, last: Tensor, cache: Any, tokens: int) -> tuple[Tensor, Tensor]:
    """Read so many tokens, each the likeliest after the one before: the logits of the last, and the tokens."""
    chosen = []
    for _ in range(tokens):
        chosen.append(last.argmax(-1, keepdim=True))
        last = read(model, chosen[-1], cache)
    return last, torch.cat(chosen, dim=1)


def _ways(settings: Inference, workspace: Workspace) -> dict[str, Any]:
    """The models that are compared, ready to infer."""
    by_method = quantisation(settings.method, settings.method_options)
    if settings.method != "full" and (settings.quantisation or by_method):
        raise LabError(
            f"inference: method {settings.method} on a base in {settings.quantisation or by_method}; one thing at a time is "
            "compared. Choose method full, or no quantisation."
        )

    def load(held_as: str | None = None) -> Any:
        return load_model(
            settings.model,
            workspace.model(settings.model),
            precision=settings.precision,
            quantisation=held_as,
            attention=settings.attention,
            seed=settings.seed,
            device=settings.device,
        )

    ways = {"base": load()}
    if settings.quantisation:
        ways["quantised"] = load(settings.quantisation)
    if settings.method != "full":
        ways["unmerged"] = unmerged = _adapted(load(), settings)
        if not unmergeable(unmerged):
            ways["merged"] = merge(copy.deepcopy(unmerged))
    return {way: model.eval() for way, model in ways.items()}


def _adapted(model: Any, settings: Inference) -> Any:
    """The model with an adapter that does something."""
    set_seed(settings.seed)
    model = apply_method(model, settings.method, settings.method_options)
    if model.peft_config[model.active_adapter].is_prompt_learning:
        raise LabError(
            f"inference: method {settings.method} puts virtual tokens into the cache; only adapters of weights are compared. "
            "Choose lora, dora, ia3, mora or adapter."
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(STIR * torch.randn(parameter.shape).to(parameter))
    return model


def _prompts(settings: Inference, base: Any) -> Tensor:
    """Random token ids `(batch, length)`, once it is known that the positions suffice for all that is read."""
    needed = settings.length * (2 if settings.rounds else 1) + settings.tokens
    positions = Architecture.of(base.config.to_dict()).positions
    if needed > positions:
        raise LabError(
            f"inference: {needed} tokens are read (the prompt of {settings.length}{' twice' if settings.rounds else ''}, and "
            f"{settings.tokens} decoded), and {settings.model} has {positions} positions. Lower length or tokens."
        )
    rows = random_rows(settings.batch, settings.length, base.config.vocab_size, settings.seed)
    return torch.tensor([row.input_ids for row in rows], device=settings.device)


# Seconds --------------------------------------------------------------------------------------------------------


def _timed(settings: Inference, ways: Mapping[str, Any], prompts: Tensor) -> dict[str, list[float]]:
    """Seconds for a token of one sequence, by round; the way that begins changes from round to round."""
    seconds: dict[str, list[float]] = {}
    names = list(ways)
    for place in range(settings.rounds):
        start = place % len(names)
        for way in (*names[start:], *names[:start]):
            for name, found in _round(ways[way], ways["base"].config, prompts, settings).items():
                seconds.setdefault(f"{way}_{name}", []).append(found)
    return seconds


def _round(model: Any, config: PreTrainedConfig, prompts: Tensor, settings: Inference) -> dict[str, float]:
    """The prompts are read, tokens decoded, and the prompts read once more behind them."""
    cache = DynamicCache(config=config)
    with torch.no_grad():
        marks = [_now(settings.device)]
        last = read(model, prompts, cache)
        marks.append(_now(settings.device))
        decode(model, last, cache, settings.tokens)
        marks.append(_now(settings.device))
        read(model, prompts, cache)
        marks.append(_now(settings.device))
    tokens = (settings.length, settings.tokens, settings.length)
    names = ("prefill_seconds", "decode_seconds", "together_seconds")
    return {
        name: (end - start) / (settings.batch * count)
        for name, count, (start, end) in zip(names, tokens, pairwise(marks), strict=True)
    }


def _now(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def _times(seconds: Mapping[str, list[float]], ways: Iterable[str]) -> dict[str, float]:
    """Medians of what was timed, and of its ratios within a round."""

    def ratio(over: str, under: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[over], seconds[under], strict=True))

    figures = {name: statistics.median(found) for name, found in seconds.items()}
    for way in ways:
        figures[f"{way}_decode_over_prefill"] = ratio(f"{way}_decode_seconds", f"{way}_prefill_seconds")
        figures[f"{way}_together_over_prefill"] = ratio(f"{way}_together_seconds", f"{way}_prefill_seconds")
        figures[f"{way}_over_base"] = ratio(f"{way}_decode_seconds", "base_decode_seconds")
    return figures


def _cached_distance(model: Any, prompts: Tensor, tokens: int) -> float:
    """How far what is said with the cache is from what is said without."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        last, chosen = decode(model, read(model, prompts, cache), cache, tokens)
        whole = model(input_ids=torch.cat([prompts, chosen], dim=1), use_cache=False, logits_to_keep=1).logits[:, -1]
    return distance(last.double(), whole.double())
