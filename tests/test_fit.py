"""`lab fit`: the answer, its exit codes, the ladder, the stream, and what a mistake is told."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import cli
from lab.memory.workload import PARTS, PHASES
from lab.planner import answer, find_gpu, load_config, read_spec
from tests.conftest import ROOT

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
    "max_position_embeddings": 2048,
}

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """`lab fit ...` in this process, in a folder with a config.json: exit code, output, errors."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str, lines: str = "") -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["lab", "fit", *arguments])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines.encode())))
        capfd.readouterr()
        with pytest.raises(SystemExit) as caught:
            cli.main()
        seen = capfd.readouterr()
        return int(caught.value.code or 0), seen.out, seen.err

    return run


# The answer -----------------------------------------------------------------------------------------------------


def test_the_json_object_has_what_the_contract_names(fit: Run) -> None:
    code, out, _ = fit("config.json", "--method", "lora", "--batch", "2", "--length", "128", "--vram", "8", "--json")
    found = json.loads(out)
    assert code == 0
    assert found["fits"] is True
    assert set(found["parts"]) == set(PARTS)
    assert set(found["phases"]) == set(PHASES)
    assert sum(found["parts"].values()) == found["peak_bytes"] == found["phases"][found["peak_phase"]]
    assert found["steady_bytes"] <= found["peak_bytes"]
    assert set(found["parameters"]) == {"total", "trainable", "stored"}
    assert found["largest_batch"] >= 2
    assert found["assumptions"]["torch"]


def test_it_exits_with_1_where_it_does_not_fit_and_climbs_until_something_does(fit: Run) -> None:
    code, out, _ = fit("config.json", "--batch", "64", "--length", "2048", "--vram", "4")
    assert code == 1
    assert out.startswith("Does not fit: needs ")
    assert "cheapest first" in out
    assert " fits  " in out
    assert "--checkpointing" in out


def test_the_first_line_says_how_much_is_to_spare(fit: Run) -> None:
    code, out, _ = fit(".", "--length", "64", "--gpu", "rtx 4090")
    assert code == 0
    assert out.startswith("Fits: needs ")
    assert " GiB to spare." in out.splitlines()[0]


def test_the_largest_batch_fits_and_the_next_does_not() -> None:
    def at(batch: int) -> Any:
        return answer(read_spec({"config": CONFIG, "batch": batch, "length": 256, "vram_gib": 4}))

    largest = at(1).largest_batch
    assert largest is not None
    assert at(largest).fits
    assert not at(largest + 1).fits


def test_inference_is_weights_and_cache() -> None:
    one, two = (
        answer(read_spec({"config": CONFIG, "inference": True, "batch": 1, "length": n})).prediction.peak_bytes
        for n in (512, 1024)
    )
    cache = 2 * 6 * 4 * 32 * 2 * 512
    assert two - one == cache


def test_the_snippet_is_python_that_names_what_was_priced(fit: Run) -> None:
    code, out, _ = fit("config.json", "--method", "qlora", "--rank", "8", "--length", "64", "--snippet")
    text = out[out.index("import torch") :]
    compile(text, "snippet", "exec")
    assert code == 0
    assert "r=8" in text
    assert "load_in_4bit=True" in text


# The stream -----------------------------------------------------------------------------------------------------


def test_a_stream_answers_every_line_in_order_and_goes_on_after_a_mistake(fit: Run) -> None:
    good = {"config": CONFIG, "length": 64, "vram_gib": 8, "targets": None}
    lines = [
        json.dumps({"id": "first", **good}),
        "{not json",
        json.dumps({"id": "method", **good, "method": "lroa"}),
        json.dumps({"id": "key", **good, "bacth": 1}),
        json.dumps({"id": "encoder", "config": {"model_type": "bert"}}),
        json.dumps({"id": "last", "model": "llama-6m", "method": "lora", "length": 64, "vram_gib": 8}),
    ]
    code, out, _ = fit("--spec", "-", lines="\n".join(lines) + "\n")
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [row.get("id") for row in found] == ["first", None, "method", "key", "encoder", "last"]
    assert ["error" in row for row in found] == [False, True, True, True, True, False]
    assert "Did you mean 'lora'?" in found[2]["error"]
    assert "Did you mean 'batch'?" in found[3]["error"]
    assert "encoder-only" in found[4]["error"]


# Mistakes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("llama-3.1-8", "--quick"), "Did you mean 'llama-3.1-8b'?"),
        (("config.json", "--method", "full", "--quantisation", "nf4"), "Choose qlora, or drop the quantisation."),
        (("config.json", "--method", "lora", "--targets", "query"), "unknown target module 'query'"),
        (("config.json", "--method", "lora", "--rank", "4000"), "rank: 4000 is larger than"),
        (("config.json", "--batch", "0"), "batch"),
        (("config.json", "--length", "0"), "length"),
        (("config.json", "--length", "4096"), "more than the model's 2048 positions"),
        (("config.json", "--gpu", "RTX 4091"), "Did you mean 'RTX-4090'?"),
        (("config.json", "--optimizer", "adamw_troch"), "Did you mean 'adamw_torch'?"),
        (("nowhere/config.json",), "nowhere/config.json"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, tuple) else "",
)
def test_a_mistake_is_one_line_and_exit_code_2(fit: Run, arguments: tuple[str, ...], said: str) -> None:
    code, out, err = fit(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_a_config_without_its_fields_says_which(tmp_path: Path, fit: Run) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama", "hidden_size": 64}')
    code, _, err = fit("config.json")
    assert code == 2
    assert "num_hidden_layers" in err or "intermediate_size" in err


def test_a_card_is_found_whatever_the_case_and_spaces() -> None:
    assert find_gpu("rtx 4090") == find_gpu("RTX-4090")
    assert find_gpu("a100-80gb").total_bytes > 75 * 2**30


def test_a_bundled_name_gives_its_config() -> None:
    assert load_config("llama-3.1-8b")["hidden_size"] == 4096


def test_help_and_lists_need_neither_torch_nor_transformers() -> None:
    script = """
import sys
sys.argv = ["lab", "fit", "--list", "gpus"]
from lab.cli import main
try:
    main()
except SystemExit:
    pass
print([name for name in ("torch", "transformers", "peft") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
