"""Adapters as files: every method comes back as it was, and each mistake is one line that says what to do."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from lab.errors import LabError
from lab.methods import OWN, apply_method, check_room
from lab.methods.saving import (
    BASE,
    CONFIG,
    WEIGHTS,
    adapter_bytes,
    load_adapter,
    merge,
    model_bytes,
    save_adapter,
    weights_digest,
)
from lab.specs import Training
from lab.training import FineTuning
from lab.workspace import Workspace
from tests.conftest import RAGGED_TASK
from tests.methods import away
from tests.methods.away import drawn, logits

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 2},
    "dora": {"rank": 2},
    "ia3": {},
    "mora": {"rank": 2},
    "adapter": {"reduction_factor": 8},
    "prompt": {"virtual_tokens": 3},
    "prefix": {"virtual_tokens": 3},
    "ptuning": {"virtual_tokens": 3},
}
MERGED = ("lora", "dora", "ia3", "mora")
APART = ("adapter", "prompt", "prefix", "ptuning")


def write_base(folder: Path, seed: int = 0, **changes: int) -> Path:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64, **changes}
    config = LlamaConfig(num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64, **sizes)
    torch.manual_seed(seed)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `base`, `other` of its shape, and `deeper`."""
    root = tmp_path_factory.mktemp("bases")
    write_base(root / "base")
    write_base(root / "other", seed=1)
    write_base(root / "deeper", num_hidden_layers=3)
    return root


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base).eval()


def adapted(base: Path, method: str, seed: int = 1) -> Any:
    return drawn(apply_method(load(base), method, METHODS[method]), seed)


def last(model: Any) -> torch.Tensor:
    """Logits without those of virtual tokens."""
    return logits(model)[:, -9:]


def said(call: Callable[[], Any]) -> str:
    with pytest.raises(LabError) as caught:
        call()
    assert "\n" not in str(caught.value)
    assert str(caught.value).endswith(".")
    return str(caught.value)


# Round trips ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_it_comes_back_as_it_was_and_two_are_switched_on_one_base(method: str, bases: Path, tmp_path: Path) -> None:
    base, expected = bases / "base", {}
    for seed, name in enumerate(("first", "second")):
        model = adapted(base, method, seed)
        expected[name] = last(model)
        save_adapter(model, tmp_path / name, base)
        assert {CONFIG, WEIGHTS, BASE} <= {path.name for path in (tmp_path / name).iterdir()}
        assert 0 < adapter_bytes(tmp_path / name) < model_bytes(base)
    assert not torch.allclose(expected["first"], expected["second"], atol=1e-3)
    one = load_adapter(load(base), tmp_path / "first", "first", base)
    one = load_adapter(one, tmp_path / "second", "second", base).eval()
    torch.testing.assert_close(last(one), expected["first"])
    for name in ("second", "first", "second"):
        one.set_adapter(name)
        torch.testing.assert_close(last(one), expected[name])
    # An adapter with a name of its own is saved like any other.
    save_adapter(one, tmp_path / "again", base)
    assert sorted(path.name for path in (tmp_path / "again").iterdir() if path.is_dir()) == []
    torch.testing.assert_close(last(load_adapter(load(base), tmp_path / "again", "it", base)), expected["second"])


@pytest.mark.parametrize("family", ["gpt2", "gemma3_text"])
@pytest.mark.parametrize("method", OWN)
def test_the_lab_s_own_methods_come_back_on_other_families(method: str, family: str, tmp_path: Path) -> None:
    """Layers that hold their weights the other way round, or norms about the sublayers; tied embeddings in both."""
    path = tmp_path / "base"
    away.base(family).save_pretrained(path)
    options = METHODS[method] | ({"targets": ("c_attn", "c_fc")} if (method, family) == ("mora", "gpt2") else {})
    model, plain = drawn(apply_method(load(path), method, options)), last(load(path))
    expected = last(model)
    assert not torch.allclose(expected, plain, atol=1e-3)
    save_adapter(model, tmp_path / "made", path)
    again = load_adapter(load(path), tmp_path / "made", "it", path).eval()
    torch.testing.assert_close(last(again), expected)
    with again.disable_adapter():
        torch.testing.assert_close(last(again), plain)
    if method in MERGED:
        torch.testing.assert_close(last(merge(again)), expected, rtol=1e-4, atol=1e-4)
    else:
        assert said(lambda: merge(again)).startswith("merge: a bottleneck adapter has a nonlinearity")
    away.base(family, seed=1).save_pretrained(tmp_path / "other")
    other = load(tmp_path / "other")
    text = said(lambda: load_adapter(other, tmp_path / "made", "it", tmp_path / "other"))
    assert text.startswith(f"adapter {tmp_path / 'made'}: it belongs to the base 'base'")


@pytest.mark.parametrize("method", MERGED)
def test_merged_it_is_the_base_s_own_class_and_says_the_same(method: str, bases: Path) -> None:
    model = adapted(bases / "base", method)
    expected = last(model)
    merged = merge(model)
    assert type(merged) is type(load(bases / "base"))
    torch.testing.assert_close(last(merged), expected, rtol=1e-4, atol=1e-4)


def test_a_folder_of_several_weights_files_has_a_digest_of_all(bases: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(bases / "base").save_pretrained(tmp_path, max_shard_size="10KB")
    parts = sorted(tmp_path.glob("*.safetensors"))
    assert len(parts) > 1
    before = weights_digest(tmp_path)
    assert before != weights_digest(bases / "base")
    parts[-1].write_bytes(parts[-1].read_bytes()[:-1] + b"x")
    assert weights_digest(tmp_path) != before


# Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("other", ["other", "deeper"])
def test_another_base_is_refused(method: str, other: str, bases: Path, tmp_path: Path) -> None:
    folder, base = tmp_path / "made", bases / "base"
    save_adapter(adapted(base, method), folder, base)
    text = said(lambda: load_adapter(load(bases / other), folder, "it", bases / other))
    assert text.startswith(f"adapter {folder}: it belongs to the base 'base' (weights {weights_digest(base)[:16]}")
    assert str(bases / other) in text
    assert text.endswith("Load it onto its own base, or train one for this.")


def test_a_model_that_is_not_from_the_folder_is_refused(bases: Path, tmp_path: Path) -> None:
    save_adapter(adapted(bases / "base", "prefix"), tmp_path / "made", bases / "base")
    text = said(lambda: load_adapter(load(bases / "deeper"), tmp_path / "made", "it", bases / "base"))
    assert "parameters, and this model" in text
    assert text.endswith("Load the base from there.")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip(path: Path) -> None:
    found = bytearray(path.read_bytes())
    found[-3] ^= 1
    path.write_bytes(found)


DAMAGE: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "weights cut short": (WEIGHTS, cut, f"{WEIGHTS} has sha256"),
    "one bit of the weights": (WEIGHTS, flip, f"{WEIGHTS} has sha256"),
    "weights missing": (WEIGHTS, Path.unlink, f"{WEIGHTS} is missing. Copy the whole folder"),
    "configuration cut short": (CONFIG, cut, f"{CONFIG} has sha256"),
    "configuration missing": (CONFIG, Path.unlink, f"{CONFIG} is missing. Copy the whole folder"),
    "another rank": (CONFIG, lambda p: p.write_text(p.read_text().replace('"r": 2', '"r": 3')), "has sha256"),
    "base missing": (BASE, Path.unlink, f"{BASE}, which says to what base it belongs, is missing"),
    "base cut short": (BASE, cut, f"{BASE} is damaged"),
    "base of another kind": (
        BASE,
        lambda p: p.write_text("[]") and None,
        f"{BASE} is damaged: it has not name, sha256",
    ),
    "no folder": ("", shutil.rmtree, "the folder is missing"),
}


@pytest.mark.parametrize(("file", "damage", "expected"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told_before_the_model_is_touched(
    file: str, damage: Callable[[Path], object], expected: str, bases: Path, tmp_path: Path
) -> None:
    folder, base = tmp_path / "made", bases / "base"
    save_adapter(adapted(base, "lora"), folder, base)
    damage(folder / file)
    model = load(base)
    text = said(lambda: load_adapter(model, folder, "it", base))
    assert expected in text
    assert str(folder) in text
    assert "ave the adapter" in text
    assert not hasattr(model, "peft_config")


def test_a_second_adapter_needs_a_name_of_its_own_and_the_first_one_s_kind(bases: Path, tmp_path: Path) -> None:
    base = bases / "base"
    for method in ("lora", "dora", "ia3"):
        save_adapter(adapted(base, method), tmp_path / method, base)
    model = load_adapter(load(base), tmp_path / "lora", "it", base)
    assert "the model has an adapter 'it' already. Choose another name." in said(
        lambda: load_adapter(model, tmp_path / "dora", "it", base)
    )
    assert "its name is 'a.b'; it must be" in said(lambda: load_adapter(model, tmp_path / "dora", "a.b", base))
    text = said(lambda: load_adapter(model, tmp_path / "ia3", "other", base))
    assert "it is of type IA3, and the model's adapters are of type LORA. Load it onto a base without" in text
    assert sorted(load_adapter(model, tmp_path / "dora", "other", base).peft_config) == ["it", "other"]


@pytest.mark.parametrize("method", APART)
def test_what_cannot_be_merged_says_why(method: str, bases: Path) -> None:
    model = adapted(bases / "base", method)
    before = last(model)
    text = said(lambda: merge(model))
    assert text.startswith("merge: ")
    assert "which no weight of the base can hold" in text
    assert text.endswith("or train LoRA.")
    assert torch.equal(last(model), before)


def test_a_model_without_an_adapter_is_neither_saved_nor_merged(bases: Path, tmp_path: Path) -> None:
    base = bases / "base"
    assert said(lambda: merge(load(base))).startswith("merge: the model, a LlamaForCausalLM, has no adapter. Apply")
    assert said(lambda: save_adapter(load(base), tmp_path / "made", base)).startswith("save: the model, a LlamaFor")
    (tmp_path / "empty").mkdir()
    text = said(lambda: save_adapter(adapted(base, "lora"), tmp_path / "made", tmp_path / "empty"))
    assert text.startswith(f"base {tmp_path / 'empty'}: no weights in it (*.safetensors)")
    assert not (tmp_path / "made").exists()


# Virtual tokens -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompt", "prefix", "ptuning"])
def test_virtual_tokens_leave_room_for_the_text(method: str, tiny_workspace: Workspace) -> None:
    positions = json.loads((tiny_workspace.model("tiny") / "config.json").read_text())["max_position_embeddings"]

    def tune(tokens: int) -> FineTuning:
        options = {"virtual_tokens": tokens}
        settings = Training(model="tiny", task=RAGGED_TASK, method=method, method_options=options, updates=1)
        return FineTuning(settings, tiny_workspace)

    longest = max(len(row.input_ids) for row in tune(1).rows)
    most = positions - longest
    assert tune(most).rows
    assert said(lambda: tune(most + 1)) == (
        f"virtual_tokens is {most + 1}: with the longest row's {longest} tokens that makes {positions + 1}, and the model "
        f"has {positions} positions. Lower virtual_tokens to {most} or fewer."
    )


def test_rows_that_fill_the_model_alone_are_to_be_shortened(bases: Path) -> None:
    model = adapted(bases / "base", "prompt")
    assert said(lambda: check_room(model, 64)).endswith("Shorten the rows to under 64 tokens.")
    check_room(adapted(bases / "base", "lora"), 64)
    check_room(load(bases / "base"), 64)
