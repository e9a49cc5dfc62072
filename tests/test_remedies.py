"""What to change where it does not fit. Most of it stands on a price that is plain arithmetic."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lab import planner
from lab.cards import GPUS, find_gpu
from lab.errors import LabError
from lab.memory.workload import Prediction, Workload
from lab.planner import Answer, answer
from lab.pricing import read_spec
from lab.remedies import ladder
from tests.prices import arithmetic


def test_the_ladder_ends_with_what_fits_and_then_a_card(priced: Callable[..., Answer]) -> None:
    found = priced(model="llama-3.1-8b", batch=4, length=4096, attention="eager", vram_gib=24)
    *rungs, card = ladder(found)
    assert [rung.name for rung in rungs] == [
        "fused attention",
        "chunked loss",
        "gradient checkpointing",
        "fused optimizer step",
        "8-bit optimizer",
        "paged 8-bit optimizer",
        "LoRA",
    ]
    assert [rung.fits for rung in rungs] == [*[False] * (len(rungs) - 1), True]
    needed = [rung.needed_bytes for rung in rungs]
    assert needed == sorted(needed, reverse=True)
    for rung in rungs:
        assert rung.time
        assert rung.quality
    assert card.fits
    assert card.workload == found.workload.model_copy(update={"gpu": card.workload.gpu, "vram_gib": None})
    smaller = [gpu for gpu in GPUS.values() if gpu.total_bytes < find_gpu(card.workload.gpu or "").total_bytes]
    assert not any(found.takes(gpu.total_bytes, found.prediction) for gpu in smaller)


def test_each_rung_stands_on_those_before_it(priced: Callable[..., Answer]) -> None:
    found = priced(model="llama-3.1-8b", batch=4, length=4096, vram_gib=24)
    before = found.workload
    for rung in list(ladder(found))[:-1]:
        assert rung.options
        changed = {name for name in Workload.model_fields if getattr(before, name) != getattr(rung.workload, name)}
        assert changed <= {word[2:].replace("-", "_") for word in rung.options.split() if word.startswith("--")}
        assert rung.prediction == arithmetic(rung.workload)
        before = rung.workload


def test_a_smaller_micro_batch_keeps_the_batch_of_the_update(priced: Callable[..., Answer]) -> None:
    spec = {"model": "llama-3.2-1b", "method": "lora", "checkpointing": True, "loss": "chunked", "length": 8192}
    found = priced(batch=12, accumulation=2, vram_gib=6, **spec)
    (rung,) = [rung for rung in ladder(found) if rung.name == "smaller micro-batch"]
    assert rung.fits
    assert rung.workload.batch * rung.workload.accumulation == 24
    assert rung.workload.batch < 12


def test_a_remedy_that_does_not_apply_or_does_not_help_is_left_out(priced: Callable[..., Answer]) -> None:
    asked = {"model": "llama-3.1-8b", "method": "qlora", "optimizer": "paged_adamw_8bit", "attention": "sdpa"}
    found = priced(checkpointing=True, loss="chunked", length=65536, vram_gib=8, **asked)
    remedy, card = ladder(found)
    assert remedy.name == "shorter sequences"
    assert card.name.startswith("bigger card, as asked: ")


def test_a_bigger_card_that_is_too_old_for_what_was_asked_is_left_out(priced: Callable[..., Answer]) -> None:
    def card(attention: str) -> str:
        *_, rung = ladder(priced(model="smollm2-360m", length=8192, gpu="RTX-3060", attention=attention))
        return str(rung.workload.gpu)

    assert card("sdpa") == "T4"
    assert card("flash_attention_2") == "RTX-4060-Ti-16GB"


def test_where_no_remedy_is_enough_the_ladder_ends_with_a_smaller_model(priced: Callable[..., Answer]) -> None:
    *rungs, smaller, card = ladder(priced(model="llama-3.1-70b", vram_gib=24))
    assert not any(rung.fits for rung in rungs)
    assert smaller.fits
    assert smaller.name.startswith("smaller model: ")
    assert card.fits
    assert card.name.startswith("bigger card, with all of the above: ")


def test_what_no_card_takes_gets_a_smaller_model_and_no_card(priced: Callable[..., Answer]) -> None:
    *rungs, smaller = ladder(priced(model="llama-3.1-405b", vram_gib=24))
    assert not any(rung.fits for rung in rungs)
    assert smaller.fits
    assert smaller.name.startswith("smaller model: ")


def test_a_remedy_that_the_engine_does_not_cover_is_left_out(
    priced: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    def without_8bit(workload: Workload, quick: bool = False) -> Prediction:
        if "8bit" in workload.optimizer:
            raise LabError("unknown optimizer")
        return arithmetic(workload)

    monkeypatch.setattr(planner, "predict", without_8bit)
    rungs = list(ladder(priced(model="llama-3.1-8b", batch=4, length=4096, vram_gib=24)))
    assert "LoRA" in [rung.name for rung in rungs]
    assert not any("8bit" in rung.workload.optimizer for rung in rungs)


def test_inference_has_a_ladder_too() -> None:
    found = answer(read_spec({"model": "llama-3.1-8b", "inference": True, "batch": 8, "length": 8192, "vram_gib": 16}))
    names = [rung.name for rung in ladder(found)]
    assert names[:2] == ["smaller batch", "weights in nf4"]
