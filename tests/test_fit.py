"""`lab fit` as a person and a program meet it: what is printed, what a mistake looks like, what is imported."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lab import planner, pricing
from lab.cards import GIB, GPUS
from lab.memory.workload import OPTIMIZERS, PARTS, PHASES, Workload
from lab.models import shapes
from tests.conftest import ROOT
from tests.prices import SMALL, arithmetic
from tests.test_cli import Answer, call

CONTRACT = {
    "peak_bytes",
    "steady_bytes",
    "parts",
    "phases",
    "peak_phase",
    "parameters",
    "fits",
    "largest_batch",
    "assumptions",
    "device_bytes",
    "host_bytes",
}
HEAVY = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "matplotlib", "scipy", "mlflow")


@pytest.fixture
def fit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`lab fit ...` in this process and an empty folder; `sent` is standard input."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str, sent: bytes = b"") -> Answer:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(sent)))
        return call(monkeypatch, capfd, "fit", *arguments)

    return run


@pytest.fixture
def quick_fit(fit: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Answer]:
    """The same, priced by plain arithmetic."""
    monkeypatch.setattr(planner, "predict", arithmetic)
    return fit


def lines(*specs: Any) -> bytes:
    """A stream: bytes as they are, everything else as JSON."""
    return b"".join(spec if isinstance(spec, bytes) else json.dumps(spec).encode() + b"\n" for spec in specs)


# The contract ---------------------------------------------------------------------------------------------------


def test_json_has_what_the_contract_names_and_the_parts_add_up(fit: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    options = "--method lora --rank 8 --targets q_proj,k_proj,v_proj,o_proj --dtype bf16 --optimizer adamw_torch"
    options += " --batch 2 --length 256 --checkpointing --attention sdpa --vram 24 --json"
    answer = fit(".", *options.split())
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert set(found) >= CONTRACT
    assert set(found["parts"]) == set(PARTS)
    assert set(found["phases"]) == set(PHASES)
    assert set(found["parameters"]) == {"total", "trainable", "stored"}
    assert sum(found["parts"].values()) == found["peak_bytes"] == found["phases"][found["peak_phase"]]
    assert found["steady_bytes"] < found["peak_bytes"]
    assert found["fits"] is True
    assert found["largest_batch"] > 2
    assert found["parameters"]["trainable"] == 2 * 8 * (64 + 64 + 2 * (64 + 32) + 64 + 64)
    assert {"engine", "torch", "transformers", "context", "slack"} <= set(found["assumptions"])


def test_paged_state_is_counted_apart(fit: Callable[..., Answer]) -> None:
    sizes = {}
    for optimizer in ("adamw_bnb_8bit", "paged_adamw_8bit"):
        found = json.loads(fit("llama-6m", "--optimizer", optimizer, "--length", "64", "--json").out)
        sizes[optimizer] = found["device_bytes"], found["host_bytes"]
        assert found["fits"] is None
    assert sizes["adamw_bnb_8bit"][1] == 0
    assert sizes["paged_adamw_8bit"][1] > 0
    assert sizes["paged_adamw_8bit"][0] < sizes["adamw_bnb_8bit"][0]


@pytest.mark.parametrize(
    ("card", "code", "first"),
    [
        (("--vram", "80"), 0, "Fits: needs "),
        (("--vram", "8"), 1, "Does not fit: needs "),
        (("--gpu", "a100-80gb"), 0, "Fits: needs "),
        ((), 0, "Needs "),
    ],
)
def test_the_first_line_and_the_exit_code_say_whether_it_fits(
    quick_fit: Callable[..., Answer], card: tuple[str, ...], code: int, first: str
) -> None:
    answer = quick_fit("llama-3.2-1b", "--batch", "4", *card)
    assert (answer.code, answer.err) == (code, "")
    assert answer.out.startswith(first)
    as_json = quick_fit("llama-3.2-1b", "--batch", "4", *card, "--json")
    assert as_json.code == code
    assert json.loads(as_json.out)["fits"] is (None if not card else code == 0)


# For people -----------------------------------------------------------------------------------------------------


def test_a_person_is_told_the_parts_the_phase_the_limits_and_what_the_card_shows(
    quick_fit: Callable[..., Answer],
) -> None:
    out = quick_fit("llama-3.2-1b", "--method", "lora", "--length", "2048", "--vram", "24").out
    first, second, *_ = out.splitlines()
    assert re.fullmatch(r"Fits: needs \d+\.\d\d GiB of 23\.52 GiB, \d+\.\d\d GiB to spare\.", first)
    assert second == (
        "llama-3.2-1b, 1 x 2,048 tokens, lora rank 16 in bf16, adamw_torch, sdpa attention, full loss, a card of 24 GiB"
    )
    for part in ("weights", "activations", "logits", "reserved", "context"):
        assert re.search(rf"(?m)^  {part} +[━╌]+ +[\d.]+ (GiB|MiB) +\d+%$", out)
    assert "Peaks in backward: forward " in out
    assert re.search(r"Trains [\d,]+ of 1,235,814,400 parameters \(1\.000%\)", out)
    assert re.search(r"The card will show about [\d.]+ GiB: [\d.]+ GiB allocated, [\d.]+ GiB that torch reserves", out)
    assert re.search(r"Largest batch at 2,048 tokens: \d+\. Longest sequence at batch 1: [\d,]+\.", out)
    assert "What would make it fit" not in out


def test_a_person_is_told_what_the_card_cannot_do(quick_fit: Callable[..., Answer]) -> None:
    assert (
        "Mind: T4 (Turing) has no arithmetic in bf16; torch emulates it, slowly; fp16 is fast there, and has a fused "
        "attention, where that in bf16 takes memory with the square of the length."
    ) in " ".join(quick_fit("gpt2", "--gpu", "t4").out.split())
    assert "fused attention, where" not in quick_fit("gpt2", "--gpu", "t4", "--attention", "eager").out
    assert "Mind:" not in quick_fit("gpt2", "--gpu", "t4", "--dtype", "fp16").out
    assert "Mind:" not in quick_fit("gpt2", "--gpu", "a10").out


def test_what_does_not_fit_comes_with_the_ladder(quick_fit: Callable[..., Answer]) -> None:
    answer = quick_fit("llama-3.1-8b", "--batch", "4", "--length", "4096", "--vram", "24")
    assert answer.code == 1
    before, after = answer.out.split("What would make it fit, cheapest first, each on top of those before:\n")
    assert "Largest batch at 4,096 tokens: none, not even 1." in before
    rungs = re.findall(r"(?m)^ +(\d+)\. +[\d.]+ GiB  (fits|    )  (.+)$", after)
    assert [int(number) for number, _, _ in rungs] == list(range(1, len(rungs) + 1))
    assert [fits for _, fits, _ in rungs[-2:]] == ["fits", "fits"]
    assert not any(fits.strip() for _, fits, _ in rungs[:-2])
    assert len(re.findall(r"(?m)^ +time: .+; quality: .+$", after)) == len(rungs)


def test_a_simulated_answer_that_does_not_fit_ends_with_what_does(fit: Callable[..., Answer], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(SMALL))
    answer = fit(".", "--batch", "64", "--length", "1024", "--vram", "1")
    assert answer.code == 1
    assert answer.out.startswith("Does not fit: needs ")
    assert "Peaks in backward: forward " in answer.out
    assert "  fits  " in answer.out


def test_a_rung_s_options_are_those_of_the_command(quick_fit: Callable[..., Answer]) -> None:
    asked = ["llama-3.1-8b", "--batch", "4", "--length", "4096", "--vram", "24"]
    out = quick_fit(*asked).out
    for options in re.findall(r"(?m)^ +\d+\..+?  (--.+)$", out)[:-1]:
        asked += options.split()
    assert quick_fit(*asked).code == 0


def test_inference_is_weights_and_cache(fit: Callable[..., Answer]) -> None:
    answer = fit("llama-3.1-8b", "--inference", "--batch", "4", "--length", "8192", "--vram", "24")
    assert answer.code == 0
    assert "llama-3.1-8b, 4 x 8,192 tokens, inference in bf16, a card of 24 GiB" in answer.out
    assert re.search(r"(?m)^  kv cache +[━╌]+ +4\.00 GiB", answer.out)
    found = json.loads(fit("llama-3.1-8b", "--inference", "--length", "8192", "--quantisation", "nf4", "--json").out)
    assert found["parts"]["kv_cache"] == GIB
    assert found["parts"]["weights"] < 6 * GIB


def test_a_snippet_opens_with_the_answer_and_is_python(quick_fit: Callable[..., Answer]) -> None:
    answer = quick_fit("llama-3.2-1b", "--method", "lora", "--vram", "24", "--snippet")
    assert answer.code == 0
    compile(answer.out, "snippet", "exec")
    assert answer.out.startswith("# Fits: needs ")
    assert "r=16,\n" in answer.out
    assert 'MODEL = "llama-3.2-1b"  # put the hub id' in answer.out
    found = json.loads(quick_fit("llama-3.2-1b", "--snippet", "--json").out)
    assert "TrainingArguments(" in found["snippet"]


@pytest.mark.parametrize("name", ["fit-sweep.svg", "other.png"])
def test_a_sweep_is_a_table_and_a_plot(quick_fit: Callable[..., Answer], tmp_path: Path, name: str) -> None:
    ranges = ("--sweep", "batch=1..8", "length=512..2048")
    plot = () if name == "fit-sweep.svg" else ("--plot", name)
    answer = quick_fit("llama-3.2-1b", "--method", "lora", "--vram", "8", *ranges, *plot)
    assert (answer.code, answer.err) == (0, "")
    for word in ("batch 1", "batch 8", "512", "2,048", "* does not fit", f"Plot: {name}"):
        assert word in answer.out
    assert (tmp_path / name).stat().st_size > 1000
    if name.endswith("svg"):
        assert "batch 8" in (tmp_path / name).read_text() or "<path" in (tmp_path / name).read_text()


def test_a_sweep_over_batches_alone_is_json_too(quick_fit: Callable[..., Answer], tmp_path: Path) -> None:
    answer = quick_fit("gpt2", "--sweep", "batch=1..4", "--vram", "24", "--json")
    found = json.loads(answer.out)
    assert [(cell["batch"], cell["length"], cell["fits"]) for cell in found] == [(n, 1024, True) for n in (1, 2, 4)]
    assert [cell["peak_bytes"] for cell in found] == sorted(cell["peak_bytes"] for cell in found)
    assert not list(tmp_path.iterdir())
    assert quick_fit("gpt2", "--sweep", "batch=1..4").code == 0


def test_a_plot_that_cannot_be_written_is_one_line(quick_fit: Callable[..., Answer]) -> None:
    for path in ("nowhere/plot.svg", "plot.doc"):
        answer = quick_fit("gpt2", "--sweep", "batch=1..2", "--plot", path)
        assert answer.code == 2
        (line,) = answer.err.splitlines()
        assert line.startswith(f"lab: plot: cannot write {path}: ")


@pytest.mark.parametrize("what", ["models", "methods", "optimizers", "gpus"])
def test_a_list_has_a_line_for_each(fit: Callable[..., Answer], what: str) -> None:
    known: dict[str, Any] = {
        "models": shapes(),
        "methods": pricing.methods(),
        "optimizers": OPTIMIZERS,
        "gpus": GPUS,
    }
    answer = fit("--list", what)
    assert answer.code == 0
    assert {line.split()[0] for line in answer.out.splitlines()} == set(known[what])
    assert {row["name"] for row in json.loads(fit("--list", what, "--json").out)} == set(known[what])


def test_the_library_bundles_what_the_lecture_needs() -> None:
    from lab.memory.architecture import Architecture

    sizes = [Architecture.of(pricing.load_config(name)).parameters() for name in shapes()]
    assert sum(size >= 1e8 for size in sizes) >= 20
    assert max(sizes) > 400e9


# Mistakes -------------------------------------------------------------------------------------------------------

MISTAKES: list[tuple[str, str]] = [
    ("", "no model is given. Give one: lab fit MODEL. See lab fit --list models."),
    ("gpt2 phi-2", "2 models are given: gpt2, phi-2. Give one: "),
    ("gpt-2", "unknown model 'gpt-2'. Did you mean 'gpt2'? Known: "),
    ("./nowhere", "model: there is no file or folder ./nowhere. Correct the path."),
    ("gpt2 --method lroa", "unknown method 'lroa'. Did you mean 'lora'? Known: "),
    ("gpt2 --optimizer adamw_bnb_8bits", "unknown optimizer 'adamw_bnb_8bits'. Did you mean 'adamw_bnb_8bit'? "),
    ("gpt2 --batch 0", "batch is '0'; it must be at least 1. Raise it."),
    ("gpt2 --batch four", "batch is 'four'; it must be a valid integer"),
    ("gpt2 --length 2000", "length: 2000 tokens are more than the model's 1024 positions. Shorten the sequences."),
    ("gpt2 --quantisation nf4", "quantisation: nf4 weights cannot be trained, and method full trains all. "),
    ("gpt2 --method lora --targets q_proj", "unknown target module 'q_proj'. "),
    ("gpt2 --method lora --rank 1000", "rank: 1000 is larger than c_attn, 768 wide. Lower it."),
    ("gpt2 --gpu rtx9090", "unknown gpu 'rtx9090'. Did you mean 'RTX-5090'? "),
    ("gpt2 --vram none", "vram_gib is 'none'; it must be a valid number"),
    ("gpt2 --list models --list shapes", "unknown list 'shapes'. Known: gpus, methods, models, optimizers."),
    ("gpt2 --sweep batch", "sweep: 'batch' is no range. Write batch=1..64 or length=512..8192, or both."),
    ("gpt2 --spec -", "spec: the lines say it all. Drop the model and the other options, but for --quick."),
    ("--spec nowhere.jsonl", "spec: nowhere.jsonl cannot be read: No such file or directory. Correct the path."),
    ("--spec .", "spec: . cannot be read: Is a directory. Correct the path."),
]


@pytest.mark.parametrize(("command", "said"), MISTAKES, ids=[command or "nothing" for command, _ in MISTAKES])
def test_a_mistake_is_one_line_and_exit_code_2(fit: Callable[..., Answer], command: str, said: str) -> None:
    assert fit(*command.split()).mistake().startswith(said)


# The stream -----------------------------------------------------------------------------------------------------


def test_a_stream_answers_every_line_in_order_and_goes_on_after_mistakes(quick_fit: Callable[..., Answer]) -> None:
    good = {"model": "llama-3.2-1b", "method": "lora", "vram_gib": 24}
    answer = quick_fit(
        "--spec",
        "-",
        sent=lines(
            {"id": "first", **good},
            b"{\n",
            b"[1, 2]\n",
            b"\xff\n",
            b"\n",
            b'{"id": NaN}\n',
            b"[" * 100_000 + b"\n",
            {"id": 7, **good, "bach": 4},
            {"id": {"any": "thing"}, **good, "batch": 0},
            {"id": "contradiction", **good, "method": "full", "quantisation": "nf4"},
            {"id": "model", "model": "llama-9"},
            {"id": "config", "config": {"model_type": "bert"}},
            {"id": "card", **good, "gpu": "H900"},
            {"id": "last", **good, "amp": None, "targets": None, "batch": 2},
        ),
    )
    assert (answer.code, answer.err) == (0, "")
    found = [json.loads(line) for line in answer.out.splitlines()]
    assert [row["id"] for row in found] == [
        "first",
        *[None] * 6,
        7,
        {"any": "thing"},
        "contradiction",
        "model",
        "config",
        "card",
        "last",
    ]
    assert [set(row) == {"id", "error"} for row in found] == [False, *[True] * 12, False]
    assert set(found[0]) >= CONTRACT
    assert found[0]["largest_batch"] == found[-1]["largest_batch"] > 2
    errors = [row["error"] for row in found[1:-1]]
    assert errors[0].startswith("line 2 is not JSON: ")
    assert errors[1] == "line 3 holds a list, not an object. Write one object a line."
    assert errors[6] == "bach is not a known key. Did you mean 'batch'?"
    assert all("\n" not in error for error in errors)


def test_a_file_of_lines_is_answered_by_the_simulation(fit: Callable[..., Answer], tmp_path: Path) -> None:
    spec = {"config": SMALL, "length": 128, "vram_gib": 24}
    (tmp_path / "specs.jsonl").write_bytes(lines({"id": 1, **spec}, {"id": 2, **spec, "config": {}}))
    answer = fit("--spec", "specs.jsonl")
    assert answer.code == 0
    first, second = (json.loads(line) for line in answer.out.splitlines())
    assert (first["id"], first["fits"], first["assumptions"]["engine"]) == (1, True, "simulation")
    assert second["error"].startswith("config: model_type is missing. ")


def test_whatever_goes_wrong_the_stream_goes_on(fit: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(workload: Workload, quick: bool = False) -> None:
        raise ZeroDivisionError("two\nlines")

    monkeypatch.setattr(planner, "predict", fail)
    answer = fit("--spec", "-", sent=lines({"id": 1, "config": SMALL}, {"id": 2, "bach": 1}))
    first, second = (json.loads(line) for line in answer.out.splitlines())
    assert first == {"id": 1, "error": "line 1: ZeroDivisionError: two lines"}
    assert second == {"id": 2, "error": "bach is not a known key. Did you mean 'batch'?"}


LAB = [str(Path(sys.executable).with_name("lab")), "fit"]


def test_each_answer_is_there_before_the_next_line_is_sent() -> None:
    with subprocess.Popen([*LAB, "--spec", "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin
        assert process.stdout
        for number in range(3):
            process.stdin.write(lines({"id": number, "bach": 1}))
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["id"] == number
        process.stdin.close()
        assert process.stdout.read() == b""
    assert process.returncode == 0


def test_a_reader_that_leaves_early_is_no_error() -> None:
    sent = lines(*({"id": number, "bach": 1} for number in range(5000)))
    command = f"{' '.join(LAB)} --spec - | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], input=sent, capture_output=True, check=False)
    assert json.loads(done.stdout)["id"] == 0
    assert done.stderr == b""


# Speed ----------------------------------------------------------------------------------------------------------


def launched(*arguments: str) -> tuple[float, list[str]]:
    """Seconds of processor time that the command takes, the best of three, and what it imported of HEAVY."""
    script = f"""
import atexit, json, sys, time
atexit.register(lambda: print(json.dumps([time.process_time(), [m for m in {HEAVY!r} if m in sys.modules]])))
sys.argv = ["lab", "fit", *{arguments!r}]
from lab.cli import main
main()
"""
    runs = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=False
            ).stdout.splitlines()[-1]
        )
        for _ in range(3)
    ]
    return min(seconds for seconds, _ in runs), runs[0][1]


def test_help_is_fast_and_names_every_option_of_the_contract(fit: Callable[..., Answer]) -> None:
    seconds, heavy = launched("--help")
    assert heavy == []
    assert seconds < 0.5
    out = fit("--help").out
    for name in Workload.model_fields:
        if name not in ("config", "device", "vram_gib"):
            assert f"--{name.replace('_', '-')}" in out
    for name in ("--vram", "--quick", "--json", "--spec", "--list", "--sweep", "--plot", "--snippet"):
        assert f"{name} " in out or f"{name}\n" in out


@pytest.mark.parametrize(
    "arguments",
    [
        ("gpt2", "--inference", "--vram", "24"),
        ("gpt2", "--vram", "24", "--quick"),
        ("--list", "models"),
        ("gpt3",),
        ("gpt2", "--optimizer", "adam"),
    ],
    ids=["inference", "quick", "list", "model", "optimizer"],
)
def test_what_needs_no_simulation_imports_no_torch(arguments: tuple[str, ...]) -> None:
    seconds, heavy = launched(*arguments)
    assert heavy == []
    assert seconds < 1
