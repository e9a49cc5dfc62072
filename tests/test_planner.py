"""What fits, the ladder, the cards, the configurations. Most of it stands on a price that is plain arithmetic; what the
simulation itself says of small models is asked where the two have to work together."""

from __future__ import annotations

import ast
import json
import sys
import textwrap
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lab import planner
from lab.cards import CONTEXT_BYTES, GIB, GPUS, card_bytes, find_gpu, shown_bytes, usable_bytes
from lab.errors import LabError
from lab.hub_endpoint import Hub
from lab.memory.architecture import Architecture
from lab.memory.workload import BYTES, PARTS, Prediction, Workload, check, nf4_tensors
from lab.models import shapes
from lab.planner import Answer, answer, read_spec
from lab.snippet import snippet
from tests.test_hub_endpoint import run_client

SMALL: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 1000,
    "max_position_embeddings": 4096,
}
NOWHERE = "http://127.0.0.1:9"


def arithmetic(workload: Workload, quick: bool = False) -> Prediction:
    """A price in the place of the engines': the rules of thumb, in which every remedy does what its name says."""
    check(workload)
    w, shape = workload, Architecture.of(workload.config)
    full = w.method == "full"
    trained = shape.parameters() if full else shape.parameters() // 100
    weights = shape.parameters() * (0.6 if w.held_as == "nf4" else BYTES[w.dtype])
    width = BYTES[w.dtype] if full else 4
    state = 0 if w.optimizer.startswith("paged") else 2 if "8bit" in w.optimizer else 2 * width
    tokens = w.batch * w.length
    held = tokens * shape.hidden * shape.layers * (2 if w.checkpointing else 34)
    held += w.batch * w.length**2 * shape.heads * (6 if w.attention == "eager" else 0)
    logits = tokens * shape.vocabulary * (0.1 if w.loss == "chunked" else 6)
    fixed = {"weights": weights, "optimizer": trained * state}
    parts = {
        "forward": {**fixed, "activations": held, "logits": logits},
        "backward": {**fixed, "activations": held, "logits": logits, "gradients": trained * width * 0.5},
        "step": {
            **fixed,
            "gradients": trained * width,
            "temporaries": trained * width if w.optimizer == "adamw_torch" else 0,
        },
    }
    phases = {phase: int(sum(sizes.values())) for phase, sizes in parts.items()}
    peak = max(phases, key=phases.__getitem__)
    return Prediction(
        peak_bytes=phases[peak],
        steady_bytes=int(sum(fixed.values())),
        parts={name: int(parts[peak].get(name, 0)) for name in PARTS},
        phases=phases,
        parameters={"total": shape.parameters(), "trainable": trained, "stored": trained},
    )


@pytest.fixture
def priced(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """The answer to a specification, by arithmetic."""
    monkeypatch.setattr(planner, "predict", arithmetic)
    return lambda quick=False, confirm=True, **spec: answer(read_spec(spec), quick, confirm)


def mistake(call: Callable[[], Any]) -> str:
    """The one line of the error that a call raises."""
    with pytest.raises(LabError) as caught:
        call()
    (line,) = str(caught.value).splitlines()
    return line


# Cards ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "name"),
    [
        ("A100-80GB", "A100-80GB"),
        ("a100-80gb", "A100-80GB"),
        ("NVIDIA A100-SXM4-80GB", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100-80GB"),
        ("H200", "H200-141GB"),
        ("Tesla T4", "T4"),
        ("NVIDIA GeForce RTX 4090", "RTX-4090"),
        ("4090", "RTX-4090"),
        ("RTX 4060 Ti", "RTX-4060-Ti-16GB"),
        ("Tesla V100-SXM2-32GB", "V100-32GB"),
        ("RTX A6000", "A6000"),
    ],
)
def test_a_card_is_found_by_any_of_its_names(asked: str, name: str) -> None:
    assert find_gpu(asked).name == name


@pytest.mark.parametrize("name", GPUS)
def test_every_card_is_found_by_its_own_name(name: str) -> None:
    assert find_gpu(name).name == name


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        ("RTX9090", "unknown gpu 'RTX9090'. Did you mean 'RTX-5090'? Known: V100-16GB, "),
        ("A100", "gpu: 'A100' may be A100-40GB or A100-80GB. Name one of them."),
        ("V100", "gpu: 'V100' may be V100-16GB or V100-32GB. Name one of them."),
        ("", "unknown gpu ''. Known: "),
    ],
)
def test_an_unknown_card_is_one_line_with_the_nearest(asked: str, said: str) -> None:
    assert mistake(lambda: find_gpu(asked)).startswith(said)


def test_no_card_has_more_memory_than_it_is_sold_with() -> None:
    sold = {"T4": 16, "RTX-3060": 12, "RTX-3090": 24, "RTX-4090": 24, "RTX-5090": 32, "L4": 24, "A6000": 48}
    sold |= {name: int(name.split("-")[-1][:-2]) for name in GPUS if name.endswith("GB")}
    for name, gib in sold.items():
        assert 0.9 * gib < GPUS[name].total_bytes / GIB < gib


def test_of_a_card_and_a_size_the_smaller_counts_and_a_size_alone_loses_the_drivers_share() -> None:
    config = {"config": SMALL}
    assert card_bytes(read_spec(config)) is None
    assert card_bytes(read_spec({**config, "vram_gib": 24})) == int(24 * GIB * 0.98)
    assert card_bytes(read_spec({**config, "gpu": "a100-80gb"})) == GPUS["A100-80GB"].total_bytes
    assert card_bytes(read_spec({**config, "gpu": "a100-80gb", "vram_gib": 80})) == GPUS["A100-80GB"].total_bytes
    assert card_bytes(read_spec({**config, "gpu": "a100-80gb", "vram_gib": 20})) == 20 * GIB


@given(total=st.integers(CONTEXT_BYTES, 2**40), quick=st.booleans())
def test_the_highest_peak_that_fits_shows_no_more_than_the_card_has(total: int, quick: bool) -> None:
    peak = usable_bytes(total, quick)
    assert shown_bytes(peak, quick) <= total + 1
    assert shown_bytes(peak + 2, quick) > total


# Specifications -------------------------------------------------------------------------------------------------


def test_null_means_the_default() -> None:
    nulls = dict.fromkeys(("amp", "quantisation", "targets", "rank", "batch", "gpu", "vram_gib", "loss", "step"))
    assert read_spec({"config": SMALL, "id": "x", **nulls}) == Workload(config=SMALL)


def test_targets_are_a_list_or_words_between_commas_or_all() -> None:
    given = {"config": SMALL, "method": "lora"}
    assert read_spec({**given, "targets": "q_proj, v_proj"}).targets == ("q_proj", "v_proj")
    assert read_spec({**given, "targets": ["q_proj"]}).targets == ("q_proj",)
    assert read_spec({**given, "targets": "all-linear"}).targets is None


def test_all_linear_is_refused_where_peft_takes_in_the_experts() -> None:
    said = mistake(lambda: answer(read_spec({"model": "mixtral-8x7b", "method": "lora", "targets": "all-linear"})))
    assert said.startswith(
        "targets: 'all-linear' stands for experts or their router, which a mixtral model holds as fused "
    )


def test_the_example_of_the_contract_is_read() -> None:
    spec = {
        "id": "free text, echoed",
        "config": {**SMALL, "model_type": "mistral"},
        "method": "lora",
        "rank": 16,
        "alpha": 16,
        "dropout": 0.1,
        "targets": ["q_proj", "k_proj", "v_proj", "o_proj"],
        "dtype": "bf16",
        "amp": None,
        "quantisation": None,
        "double_quantisation": False,
        "preparation": "none",
        "optimizer": "adamw_torch",
        "step": "foreach",
        "batch": 4,
        "length": 4096,
        "accumulation": 1,
        "checkpointing": True,
        "attention": "flash_attention_2",
        "loss": "full-shifted",
        "gpu": "A100-80GB",
        "vram_gib": 80,
    }
    read = read_spec(spec)
    assert (read.batch, read.loss, read.gpu, read.checkpointing) == (4, "full-shifted", "A100-80GB", True)


BAD: list[tuple[dict[str, Any], str]] = [
    ({"model": "llama-3.1-9b"}, "unknown model 'llama-3.1-9b'. Did you mean 'llama-3.1-8b'? Known: "),
    ({}, "model is missing, and so is config. Give one: a bundled name, a hub id or a path as model, or "),
    ({"model": "gpt2", "config": SMALL}, "model and config are both given. Give one: "),
    ({"config": 3}, "config is 3; it must be an object, as in a config.json. Correct it."),
    ({"config": SMALL, "bach": 4}, "bach is not a known key. Did you mean 'batch'?"),
    ({"config": SMALL, "xyzzy": 4}, "xyzzy is not a known key. Known: accumulation, alpha, "),
    ({"config": SMALL, "method": "lroa"}, "unknown method 'lroa'. Did you mean 'lora'? Known: adapter, dora, "),
    ({"config": SMALL, "attention": ["sdpa"]}, "unknown attention '['sdpa']'."),
    ({"config": SMALL, "quantisation": "nf3"}, "unknown quantisation 'nf3'. Did you mean 'nf4'? Known: int8, nf4."),
    ({"config": SMALL, "batch": 0}, "batch is 0; it must be at least 1. Raise it."),
    ({"config": SMALL, "batch": True}, "batch is True; it must be a number, not true or false. Correct it."),
    ({"config": SMALL, "length": 1.5}, "length is 1.5; it must be a valid integer, "),
    ({"config": SMALL, "vram_gib": -1}, "vram_gib is -1; it must be greater than 0"),
    ({"config": SMALL, "vram_gib": float("inf")}, "vram_gib is inf; it must be a number of GiB. Correct it."),
    ({"config": SMALL, "gpu": "H900"}, "unknown gpu 'H900'. Did you mean "),
]


@pytest.mark.parametrize(("spec", "said"), BAD, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_a_wrong_specification_is_one_line(spec: dict[str, Any], said: str) -> None:
    assert mistake(lambda: read_spec(spec)).startswith(said)


UNPRICED: list[tuple[dict[str, Any], str]] = [
    ({"config": {**SMALL, "model_type": "bert"}}, "config: model_type 'bert' is an encoder-only model; "),
    ({"config": {**SMALL, "model_type": "mamba"}}, "config: unknown model_type 'mamba'. "),
    ({"config": {k: v for k, v in SMALL.items() if k != "hidden_size"}}, "config: hidden_size is missing; "),
    ({"length": 5000}, "length: 5000 tokens are more than the model's 4096 positions. Shorten the sequences."),
    ({"quantisation": "nf4"}, "quantisation: nf4 weights cannot be trained, and method full trains all. Choose qlora"),
    ({"method": "lora", "targets": ["qproj"]}, "unknown target module 'qproj'. Did you mean 'q_proj'? Known: "),
    ({"method": "lora", "rank": 65}, "rank: 65 is larger than k_proj, 32 wide. Lower it."),
    (
        {"optimizer": "rmsprop", "step": "fused"},
        "step: rmsprop has no fused step; it has foreach and for-loop. Choose ",
    ),
    ({"optimizer": "adafactor", "step": "foreach"}, "step: adafactor has no foreach step; it has for-loop. Choose "),
    ({"inference": True, "length": 5000}, "length: 5000 tokens are more than the model's 4096 positions."),
    ({"inference": True, "double_quantisation": True}, "double_quantisation: only nf4 has it. "),
]


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize(("spec", "said"), UNPRICED, ids=lambda value: value[:30] if isinstance(value, str) else "")
def test_what_contradicts_itself_is_one_line_before_any_engine_is_loaded(
    spec: dict[str, Any], said: str, quick: bool
) -> None:
    assert mistake(lambda: answer(read_spec({"config": SMALL, **spec}), quick)).startswith(said)


def test_an_optimizer_without_a_model_of_its_state_is_refused_by_name() -> None:
    said = mistake(lambda: answer(read_spec({"config": SMALL, "optimizer": "adamw8bit"})))
    assert said.startswith("unknown optimizer 'adamw8bit'. Did you mean 'adamw_8bit'? Known: adafactor, ")


def test_what_an_engine_raises_becomes_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(workload: Workload) -> Prediction:
        raise RuntimeError("the first line\nthe second line")

    module = ModuleType("simulation")
    module.predict = fail  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lab.memory.simulation", module)
    said = mistake(lambda: answer(read_spec({"config": SMALL})))
    assert said == "simulation: cannot price this: RuntimeError: the first line"


# Configurations -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", shapes())
def test_every_bundled_shape_is_found_by_name(name: str) -> None:
    assert planner.load_config(name)["model_type"]


def test_a_config_is_read_from_a_file_or_its_folder(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    (tmp_path / "other.json").write_text(json.dumps(SMALL))
    for name in (tmp_path, tmp_path / "config.json", tmp_path / "other.json"):
        assert planner.load_config(str(name)) == SMALL


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"{", "is not JSON: "),
        (b"\xff\xfe", "is not JSON: "),
        (b"[" * 100_000, "is not JSON: "),
        (b"[1]", "holds a list, not an object. Choose a config.json."),
    ],
    ids=["cut", "bytes", "deep", "list"],
)
def test_a_file_that_is_no_config_is_one_line(tmp_path: Path, text: bytes, said: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(text)
    assert mistake(lambda: planner.load_config(str(path))).startswith(f"model: {path} {said}")


def test_a_path_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    missing = tmp_path / "nowhere" / "config.json"
    assert mistake(lambda: planner.load_config(str(missing))) == (
        f"model: there is no file or folder {missing}. Correct the path."
    )
    assert mistake(lambda: planner.load_config(str(tmp_path))) == (
        f"model: {tmp_path} has no config.json. Choose the folder that has it."
    )


CONFIGS = """
    from lab.planner import load_config
    answer({name: attempt(lambda: sorted(load_config(name))) for name in arguments})
"""
OFFLINE = "or choose a bundled model (lab fit --list models) or a path to a config.json."


def test_of_a_hub_repository_the_config_alone_is_downloaded(hub: Hub) -> None:
    files = {"config.json": json.dumps({**SMALL, "auto_map": {"AutoConfig": "code.Evil"}}).encode()}
    files |= {"code.py": b"raise SystemExit('run')", "model.safetensors": b"0" * 100}
    hub.commit("model", "lab/small", files)
    hub.commit("model", "lab/gated", files)
    hub.gate("lab/gated")
    hub.commit("model", "lab/adapter", {"adapter_config.json": b"{}"})
    names = ["lab/small", "lab/gated", "lab/adapter", "lab/nothing", "lab/not--a--name"]
    seen = run_client(CONFIGS, hub.environment(), *names)
    assert seen["lab/small"] == str(sorted([*SMALL, "auto_map"]))
    where = "LabError: hub: {} at revision main: "
    for name, said in (
        ("lab/gated", "access to it must be asked for on the hub; log in with `hf auth login`"),
        ("lab/adapter", "it has no config.json (an adapter, or GGUF files alone?). Name the base model"),
        ("lab/nothing", "the hub has no such repository (or it is private). Correct the name"),
        ("lab/not--a--name", "this is not how the hub names a repository (owner/name). Correct it"),
    ):
        assert seen[name] == f"{where.format(name)}{said}, {OFFLINE}"
    asked = {request.path for request in hub.requests if "/resolve/" in request.path}
    assert {path.rsplit("/", 1)[-1] for path in asked} == {"config.json"}


@pytest.mark.parametrize("environment", [{"HF_HUB_OFFLINE": "1"}, {"HF_ENDPOINT": NOWHERE}], ids=["offline", "nowhere"])
def test_without_the_hub_an_id_is_one_line_that_names_the_offline_choice(hub: Hub, environment: dict[str, str]) -> None:
    seen = run_client(CONFIGS, hub.environment() | environment, "lab/small")
    assert seen["lab/small"].startswith("LabError: hub: lab/small at revision main: the hub cannot be reached")
    assert seen["lab/small"].endswith(OFFLINE)


# What fits ------------------------------------------------------------------------------------------------------


def curve(fixed: int, slope: int, bend: int, flat: int) -> Callable[[int], Prediction]:
    """A price that rises with n, ever more steeply, beside a phase that does not."""

    def price(n: int) -> Prediction:
        phases = {"forward": fixed + slope * n + bend * n * n, "backward": fixed + 2 * slope * n, "step": flat}
        return Prediction(max(phases.values()), fixed, {}, phases, {})

    return price


@settings(deadline=None)
@given(
    fixed=st.integers(0, 1000),
    slope=st.integers(0, 50),
    bend=st.integers(0, 3),
    flat=st.integers(0, 2000),
    room=st.integers(0, 10_000),
    now=st.integers(1, 300),
    hint=st.integers(-5, 400),
)
def test_the_largest_that_fits_is_that_of_trying_all(
    fixed: int, slope: int, bend: int, flat: int, room: int, now: int, hint: int
) -> None:
    price = curve(fixed, slope, bend, flat)
    tried = max((n for n in range(1, 301) if price(n).peak_bytes <= room), default=0)
    for guesses in ([now], [now, hint, hint + 1]):
        assert planner.largest_that_fits(price, room, guesses, 300) == tried


def test_on_a_line_few_predictions_are_enough() -> None:
    asked = []

    def price(n: int) -> Prediction:
        asked.append(n)
        return curve(1000, 7, 0, 0)(n)

    assert planner.largest_that_fits(price, 10_000, [4], 2**20) == 642
    assert len(asked) <= 4
    asked.clear()
    assert planner.largest_that_fits(price, 10_000, [4], 2**20, tries=2) == 642
    assert len(asked) == 2


@pytest.mark.parametrize("confirm", [True, False])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_the_largest_batch_fits_and_one_more_does_not(priced: Callable[..., Answer], batch: int, confirm: bool) -> None:
    spec = {"model": "llama-3.2-1b", "method": "lora", "length": 512, "vram_gib": 24}
    found = priced(confirm=confirm, batch=batch, **spec).largest_batch
    assert found
    assert priced(batch=found, **spec).fits
    assert not priced(batch=found + 1, **spec).fits


def test_where_nothing_fits_the_largest_batch_is_zero(priced: Callable[..., Answer]) -> None:
    for confirm in (True, False):
        found = priced(confirm=confirm, model="llama-3.1-8b", batch=4, vram_gib=24)
        assert (found.fits, found.largest_batch, found.longest_sequence) == (False, 0, 0)


def test_the_longest_sequence_ends_with_the_card_or_with_the_positions(priced: Callable[..., Answer]) -> None:
    spec = {"model": "llama-3.2-1b", "method": "lora", "batch": 2}
    for attention in ("sdpa", "eager"):
        found = priced(vram_gib=16, attention=attention, **spec).longest_sequence
        assert found
        assert found % planner.GRAIN == 0
        assert priced(vram_gib=16, attention=attention, length=found, **spec).fits
        assert not priced(vram_gib=16, attention=attention, length=found + planner.GRAIN, **spec).fits
    prompt = {"model": "gpt2", "method": "prompt", "virtual_tokens": 24}
    for length in (64, 1000):
        assert priced(vram_gib=80, length=length, **prompt).longest_sequence == max(960, length)


def test_without_a_card_nothing_is_said_about_fitting(priced: Callable[..., Answer]) -> None:
    found = priced(model="gpt2")
    assert (found.fits, found.spare_bytes, found.largest_batch, found.longest_sequence) == (None, None, None, None)
    assert list(planner.ladder(found)) == []


def test_the_closed_form_alone_needs_a_margin(priced: Callable[..., Answer]) -> None:
    spec = {"model": "llama-3.2-1b", "length": 2048}
    peak = priced(**spec).prediction.peak_bytes
    just = (peak * 1.04 + CONTEXT_BYTES) / GIB / 0.98
    assert priced(vram_gib=just, **spec).fits
    assert not priced(vram_gib=just, quick=True, **spec).fits


def test_a_simulated_largest_batch_fits_and_one_more_does_not() -> None:
    spec = {"config": SMALL, "length": 256, "vram_gib": 0.9}
    found = answer(read_spec({**spec, "batch": 4}))
    assert found.largest_batch
    prices = [answer(read_spec({**spec, "batch": found.largest_batch + more})) for more in (0, 1)]
    assert [price.fits for price in prices] == [True, False]


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Both engines replaced: the closed form is the arithmetic, the simulation says 2 % more; who was asked."""
    asked: list[str] = []

    def put(name: str, scale: float) -> None:
        def predict(workload: Workload) -> Prediction:
            asked.append(name)
            found = arithmetic(workload)
            phases = {phase: int(scale * peak) for phase, peak in found.phases.items()}
            return replace(found, peak_bytes=max(phases.values()), phases=phases)

        module = ModuleType(name)
        module.predict = predict  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"lab.memory.{name}", module)

    put("closed_form", 1.0)
    put("simulation", 1.02)
    return asked


def test_quick_asks_the_closed_form_alone_and_otherwise_it_only_says_where_to_look(engines: list[str]) -> None:
    spec = {"model": "llama-3.2-1b", "method": "lora", "attention": "eager", "length": 512, "vram_gib": 24}
    assert answer(read_spec(spec), quick=True).largest_batch
    assert set(engines) == {"closed_form"}
    found = {}
    for confirm, at_most in ((True, 4), (False, 1)):
        engines.clear()
        found[confirm] = answer(read_spec(spec), confirm=confirm).largest_batch
        assert engines.count("simulation") <= at_most
    assert found[True]
    assert found[False] == pytest.approx(found[True], abs=1)
    engines.clear()
    assert answer(read_spec(spec)).longest_sequence
    assert engines.count("simulation") <= 5


# The ladder -----------------------------------------------------------------------------------------------------


def test_the_ladder_ends_with_what_fits_and_then_a_card(priced: Callable[..., Answer]) -> None:
    found = priced(model="llama-3.1-8b", batch=4, length=4096, attention="eager", vram_gib=24)
    *rungs, card = planner.ladder(found)
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
    for rung in list(planner.ladder(found))[:-1]:
        assert rung.options
        changed = {name for name in Workload.model_fields if getattr(before, name) != getattr(rung.workload, name)}
        assert changed <= {word[2:].replace("-", "_") for word in rung.options.split() if word.startswith("--")}
        assert rung.prediction == arithmetic(rung.workload)
        before = rung.workload


def test_a_smaller_micro_batch_keeps_the_batch_of_the_update(priced: Callable[..., Answer]) -> None:
    spec = {"model": "llama-3.2-1b", "method": "lora", "checkpointing": True, "loss": "chunked", "length": 8192}
    found = priced(batch=12, accumulation=2, vram_gib=6, **spec)
    (rung,) = [rung for rung in planner.ladder(found) if rung.name == "smaller micro-batch"]
    assert rung.fits
    assert rung.workload.batch * rung.workload.accumulation == 24
    assert rung.workload.batch < 12


def test_a_remedy_that_does_not_apply_or_does_not_help_is_left_out(priced: Callable[..., Answer]) -> None:
    asked = {"model": "llama-3.1-8b", "method": "qlora", "optimizer": "paged_adamw_8bit", "attention": "sdpa"}
    found = priced(checkpointing=True, loss="chunked", length=65536, vram_gib=8, **asked)
    remedy, card = planner.ladder(found)
    assert remedy.name == "shorter sequences"
    assert card.name.startswith("bigger card, as asked: ")


def test_a_bigger_card_that_is_too_old_for_what_was_asked_is_left_out(priced: Callable[..., Answer]) -> None:
    def card(attention: str) -> str:
        *_, rung = planner.ladder(priced(model="smollm2-360m", length=8192, gpu="RTX-3060", attention=attention))
        return str(rung.workload.gpu)

    assert card("sdpa") == "T4"
    assert card("flash_attention_2") == "RTX-4060-Ti-16GB"


def test_where_no_remedy_is_enough_the_ladder_ends_with_a_smaller_model(priced: Callable[..., Answer]) -> None:
    *rungs, smaller, card = planner.ladder(priced(model="llama-3.1-70b", vram_gib=24))
    assert not any(rung.fits for rung in rungs)
    assert smaller.fits
    assert smaller.name.startswith("smaller model: ")
    assert card.fits
    assert card.name.startswith("bigger card, with all of the above: ")


def test_what_no_card_takes_gets_a_smaller_model_and_no_card(priced: Callable[..., Answer]) -> None:
    *rungs, smaller = planner.ladder(priced(model="llama-3.1-405b", vram_gib=24))
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
    rungs = list(planner.ladder(priced(model="llama-3.1-8b", batch=4, length=4096, vram_gib=24)))
    assert "LoRA" in [rung.name for rung in rungs]
    assert not any("8bit" in rung.workload.optimizer for rung in rungs)


def test_inference_has_a_ladder_too() -> None:
    found = answer(read_spec({"model": "llama-3.1-8b", "inference": True, "batch": 8, "length": 8192, "vram_gib": 16}))
    names = [rung.name for rung in planner.ladder(found)]
    assert names[:2] == ["smaller batch", "weights in nf4"]


# Inference ------------------------------------------------------------------------------------------------------


def test_the_cache_of_a_known_model_is_the_published_one() -> None:
    """8,192 tokens of Llama-3.1-8B: 2 x 32 layers x 8 heads x 128 x 2 bytes x 8,192 = 1 GiB."""
    found = answer(read_spec({"model": "llama-3.1-8b", "inference": True, "length": 8192})).prediction
    assert found.parts["kv_cache"] == GIB
    assert found.parts["weights"] == 8_030_261_248 * 2
    assert found.parts["workspace"] == 8 * 2**20 + 128 * 1024
    assert found.peak_bytes == sum(found.parts.values())


@pytest.mark.parametrize(
    "more",
    [
        {"model_type": "llama"},
        {"model_type": "mistral", "sliding_window": 8},
        {"model_type": "gemma2", "sliding_window": 8, "head_dim": 16},
        {"model_type": "qwen3", "head_dim": 32},
    ],
    ids=lambda more: more["model_type"],
)
def test_the_cache_holds_the_bytes_that_transformers_gives_it(more: dict[str, Any]) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = {**SMALL, "num_hidden_layers": 4, **more}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32).eval()
    with torch.no_grad():
        prompt = model(torch.zeros(2, 20, dtype=torch.long), use_cache=True)
        after = model(torch.zeros(2, 1, dtype=torch.long), past_key_values=prompt.past_key_values, use_cache=True)
    held = sum(
        tensor.untyped_storage().nbytes()
        for layer in after.past_key_values.layers
        for tensor in (layer.keys, layer.values)
    )
    spec = {"config": config, "inference": True, "batch": 2, "length": 21, "dtype": "fp32"}
    found = answer(read_spec(spec)).prediction
    assert found.parts["kv_cache"] == held
    assert found.parts["weights"] == sum(p.numel() * 4 for p in model.parameters())


@pytest.mark.parametrize("double", [False, True])
def test_a_matrix_in_nf4_holds_the_bytes_that_bitsandbytes_gives_it(double: bool) -> None:
    import torch
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(torch.randn(160, 64), compress_statistics=double, quant_type="nf4")
    tensors = [packed, state.absmax, state.code]
    if double:
        tensors += [state.offset, state.state2.absmax, state.state2.code]
    assert sum(nf4_tensors(160 * 64, double)) == sum(tensor.nbytes for tensor in tensors)


def test_a_quantised_base_of_inference_is_smaller_by_what_its_matrices_are() -> None:
    spec = {"model": "llama-3.1-8b", "inference": True}
    sizes = {
        kind: answer(read_spec({**spec, **more})).prediction.parts["weights"] / GIB  # type: ignore[dict-item]
        for kind, more in {
            "bf16": {},
            "int8": {"quantisation": "int8"},
            "nf4": {"quantisation": "nf4"},
            "double": {"quantisation": "nf4", "double_quantisation": True},
        }.items()
    }
    # 6.98 G elements in the layers' matrices, 1.05 G in embedding and head.
    layers, rest = 6.979_321_856e9, 2 * (8_030_261_248 - 6_979_321_856)
    assert sizes["bf16"] == pytest.approx((2 * layers + rest) / GIB, rel=1e-3)
    assert sizes["int8"] == pytest.approx((layers + rest) / GIB, rel=1e-3)
    assert sizes["nf4"] == pytest.approx((0.5625 * layers + rest) / GIB, rel=1e-3)
    assert sizes["double"] == pytest.approx(((0.5 + 1 / 64 + 4 / (64 * 256)) * layers + rest) / GIB, rel=1e-3)


# Sweeps and snippets --------------------------------------------------------------------------------------------


def test_a_range_doubles_from_its_low_end() -> None:
    workload = read_spec({"config": SMALL, "batch": 3, "length": 100})
    both = planner.read_ranges(["batch=1..64", "length=512..1500"], workload)
    assert both == {"batch": [1, 2, 4, 8, 16, 32, 64], "length": [512, 1024]}
    assert planner.read_ranges(["batch=3..12"], workload) == {"batch": [3, 6, 12], "length": [100]}
    assert planner.read_ranges(["length=7"], workload) == {"batch": [3], "length": [7]}


@pytest.mark.parametrize("text", ["batch", "rank=1..2", "batch=0..2", "batch=4..1", "batch=a..b", "length=1-2"])
def test_what_is_no_range_is_one_line(text: str) -> None:
    said = mistake(lambda: planner.read_ranges([text], read_spec({"config": SMALL})))
    assert said.startswith(f"sweep: '{text}' ")


def test_a_sweep_prices_every_pair(priced: Callable[..., Answer]) -> None:
    workload = priced(model="gpt2", vram_gib=8).workload
    cells = list(planner.sweep(workload, [1, 64], [128, 1024]))
    assert [(cell.batch, cell.length, cell.fits) for cell in cells] == [
        (1, 128, True),
        (64, 128, True),
        (1, 1024, True),
        (64, 1024, False),
    ]


SNIPPETS: list[dict[str, Any]] = [
    *({"method": method} for method in planner.methods() if method != "full"),
    {},
    {"method": "lora", "quantisation": "int8", "preparation": "kbit"},
    {"method": "prefix", "projection": True, "encoder_hidden_size": 32},
    {"loss": "chunked"},
    {"loss": "fused", "step": "fused", "amp": "bf16", "dtype": "fp32"},
    {"loss": "full-shifted", "step": "for-loop"},
    {"inference": True, "quantisation": "nf4"},
]


@pytest.mark.parametrize("more", SNIPPETS, ids=lambda more: "-".join(map(str, more.values())) or "full")
def test_every_snippet_is_python_that_names_what_it_imports(more: dict[str, Any]) -> None:
    tree = ast.parse(snippet(read_spec({"config": SMALL, **more}), "owner/name"))
    imported = {
        alias.name for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom) for alias in node.names
    }
    called = {node.func.id for node in ast.walk(tree) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)}
    assert called <= imported
    used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    assert imported <= used


def test_a_snippet_runs_and_says_what_was_priced(tmp_path: Path) -> None:
    from lab.models import load_model

    folder = tmp_path / "model"
    load_model("llama-6m", tmp_path).save_pretrained(folder)
    spec = {"model": "llama-6m", "method": "lora", "rank": 4, "targets": ["q_proj"], "dtype": "fp32"}
    workload = read_spec({**spec, "batch": 3, "accumulation": 2, "optimizer": "adamw_bnb_8bit", "checkpointing": True})
    names: dict[str, Any] = {}
    exec(snippet(workload, str(folder)), names)
    arguments = names["arguments"]
    assert (arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (3, 2)
    assert arguments.gradient_checkpointing
    assert arguments.optim == "adamw_bnb_8bit"
    model = names["load"]()
    assert (
        sum(p.numel() for p in model.parameters() if p.requires_grad)
        == answer(workload).prediction.parameters["trainable"]
    )


@pytest.mark.parametrize(
    ("optimizer", "step", "said"),
    [
        ("sgd", "fused", "fused=True"),
        ("sgd", "for-loop", "foreach=False"),
        ("sgd", None, None),
        ("adamw_torch", "fused", None),
        ("adafactor", "for-loop", None),
    ],
)
def test_a_snippet_says_what_the_trainer_has_no_argument_for(
    optimizer: str, step: str | None, said: str | None
) -> None:
    written = snippet(read_spec({"config": SMALL, "optimizer": optimizer, "step": step}), "owner/name")
    assert ("hand the Trainer an optimizer made with" in written) == (said is not None)
    assert said is None or f"made with {said}." in written


def test_a_snippet_is_laid_out_like_the_rest() -> None:
    spec = {"config": SMALL, "method": "qlora", "targets": ["q_proj", "v_proj"], "double_quantisation": True}
    assert snippet(read_spec(spec), "owner/name") == textwrap.dedent(
        """\
        import torch
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig, TrainingArguments

        MODEL = "owner/name"


        def load():
            model = AutoModelForCausalLM.from_pretrained(
                MODEL,
                dtype=torch.bfloat16,
                attn_implementation="sdpa",
                quantization_config=BitsAndBytesConfig(
                    load_in_4bit=True,
                    bnb_4bit_quant_type="nf4",
                    bnb_4bit_use_double_quant=True,
                    bnb_4bit_compute_dtype=torch.bfloat16,
                ),
            )
            return get_peft_model(model, adapter)


        adapter = LoraConfig(
            task_type="CAUSAL_LM",
            r=16,
            lora_alpha=16,
            lora_dropout=0.0,
            target_modules=["q_proj", "v_proj"],
        )
        # Sequences of 1024 tokens.
        arguments = TrainingArguments(
            output_dir="out",
            per_device_train_batch_size=1,
            gradient_accumulation_steps=1,
            optim="adamw_torch",
            gradient_checkpointing=False,
            bf16=False,
            fp16=False,
        )
        """
    )
