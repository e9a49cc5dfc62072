"""What a trial says of a method's structure, against what is known of it; and the judges' facts, each with a fault."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

from experiments import method_structure
from lab import structure
from lab.claims import Evidence
from lab.records import Provenance, Record
from lab.runners import execute
from lab.specs import Structure, TrialSpec
from lab.workspace import Workspace
from tests.conftest import RAGGED_TASK as TASK


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(structure, "REPEATS", 3)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def examined(workspace: Workspace, arm: str) -> dict[str, Any]:
    method, options, rate = method_structure.ARMS[arm]
    settings = Structure(
        model="tiny",
        task=TASK,
        method=method,
        method_options=options,
        learning_rate=rate,
        updates=3,
        micro_batch_size=4,
    )
    return execute(settings, workspace).figures


def test_full_fine_tuning_adds_nothing_and_moves_the_base(tiny_workspace: Workspace) -> None:
    found = examined(tiny_workspace, "full")
    assert found["trained_outside"] == found["parameters_total"] == found["parameters_base"]
    assert found["base_moved"] > 0
    assert found["start_distance"] == 0 < found["end_distance"]
    assert found["merges"] == 0


def test_lora_is_of_its_rank_and_merges(tiny_workspace: Workspace) -> None:
    found = examined(tiny_workspace, "lora")
    assert found["rank_smallest"] == found["rank_largest"] == method_structure.RANK < found["rank_possible"]
    assert found["start_distance"] == found["base_moved"] == found["off_distance"] == found["added_still"] == 0
    assert found["merge_error_float32"] < found["merge_error_bfloat16"] < 0.1


def test_virtual_tokens_ask_or_are_seen(tiny_workspace: Workspace) -> None:
    prompt, prefix, encoded = (examined(tiny_workspace, arm) for arm in ("prompt", "prefix", "ptuning-mlp"))
    tokens = method_structure.TOKENS
    assert (prompt["queries_in_front"], prompt["keys_in_front"], prompt["layers_of_own"]) == (tokens, tokens, 0)
    assert (prefix["queries_in_front"], prefix["keys_in_front"]) == (0, tokens)
    assert prefix["layers_of_own"] == prefix["layers"]
    assert (prompt["coupled"], encoded["coupled"]) == (0, 1)
    assert encoded["parameters_stored"] == prompt["parameters_trainable"]


def test_an_adapter_refuses_to_merge_and_dora_trains_the_norms(tiny_workspace: Workspace) -> None:
    assert examined(tiny_workspace, "adapter-pfeiffer")["merges"] == 0
    dora = examined(tiny_workspace, "dora")
    assert dora["magnitude_error"] < 1e-6
    assert min(dora["magnitude_moved"], dora["direction_moved"]) > 0


def test_ranks_and_rescalings_of_known_changes() -> None:
    torch.manual_seed(0)
    weight = torch.randn(12, 9, dtype=torch.float64)
    thin = torch.randn(12, 3, dtype=torch.float64) @ torch.randn(3, 9, dtype=torch.float64)
    assert structure._rank((weight + 1e-3 * thin) - weight) == 3
    assert structure._rank(weight) == 9
    factors = 1 + 0.01 * torch.randn(12, 1, dtype=torch.float64)
    assert structure._scaled(weight, factors * weight) < 1e-9
    assert structure._scaled(weight, weight + 1e-3 * thin) > 0.5


# Judges ---------------------------------------------------------------------------------------------------------


def record(arm: str, seed: int, figures: dict[str, Any]) -> Record:
    method, options, _ = method_structure.ARMS[arm]
    settings = Structure(model="tiny", task=TASK, method=method, method_options=options, updates=1, seed=seed)
    origin: dict[str, Any] = dict.fromkeys(
        ("commit", "code", "environment", "python", "platform", "device", "started"), ""
    )
    origin |= {"dirty": False, "inputs": {}, "versions": {}, "device_memory_bytes": 0, "threads": 1, "seconds": 0.0}
    spec = TrialSpec(experiment="method_structure", name=f"{arm}-seed{seed}", arm=arm, settings=settings)
    return Record(spec=spec, status="ok", figures=figures, provenance=Provenance.model_validate(origin))


GOOD = {
    "trained_outside": 0,
    "base_moved": 0,
    "off_distance": 0.0,
    "added_still": 0,
    "parameters_trainable": 100,
    "parameters_closed_form": 100,
    "end_distance": 0.1,
    "start_distance": 0.0,
    "merges": 1,
    "merge_error_float64": 0.0,
    "merge_error_float32": 1e-7,
    "merge_error_bfloat16": 0.01,
    "rank_smallest": 8,
    "rank_largest": 8,
}


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"rank_largest": 9}, "rank 8"),
        ({"rank_largest": 0}, "rank 8"),
        ({"base_moved": 1e-9}, "base is frozen"),
        ({"trained_outside": 1}, "base is frozen"),
        ({"off_distance": 1e-4}, "comes back"),
        ({"added_still": 1}, "all that it adds is trained"),
        ({"parameters_closed_form": 99}, "closed form"),
        ({"start_distance": 1e-4}, "begins as the base"),
        ({"end_distance": 0.0}, "training changes the output"),
        ({"merge_error_float32": 1e-4}, "merges to rounding"),
        ({"merges": 0}, "merges to rounding"),
    ],
)
def test_each_fact_of_lora_is_caught_when_it_fails(fault: dict[str, Any], said: str) -> None:
    whole = [record("lora", seed, GOOD) for seed in range(3)]
    assert method_structure.judge_lora(Evidence(whole)).verdict == "supported"
    once = method_structure.judge_lora(Evidence([*whole[:2], record("lora", 2, {**GOOD, **fault})]))
    assert once.verdict == "conditional"
    assert said in once.because
    assert "lora-seed2" in once.because
    always = method_structure.judge_lora(Evidence([record("lora", seed, {**GOOD, **fault}) for seed in range(3)]))
    assert always.verdict == "refuted"


def test_adapters_that_are_not_slower_are_no_support() -> None:
    def judged(*latencies: float) -> str:
        records = [
            record(arm, seed, {**GOOD, "merges": 0, "latency": latency})
            for arm in method_structure.ADAPTERS
            for seed, latency in enumerate(latencies)
        ]
        return method_structure.judge_adapter(Evidence(records)).verdict

    assert judged(1.10, 1.11, 1.12) == "supported"
    assert judged(0.9, 1.1, 1.3) == "inconclusive"
    assert judged(0.90, 0.91, 0.92) == "conditional"


def test_a_layer_that_never_changes_has_no_change_of_any_rank(tiny_workspace: Workspace) -> None:
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear)
    assert structure._changes(model, model, model) == {"weights_changed": 0}
