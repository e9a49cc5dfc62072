"""What a trial says of a method's structure, against what is known of it; and the judges' facts, each with a fault."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from experiments import method_structure
from lab import structure
from lab.claims import Evidence, Finding
from lab.records import Provenance, Record
from lab.runners import execute
from lab.specs import Structure, TrialSpec
from lab.workspace import Workspace
from tests.conftest import RAGGED_TASK as TASK


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, one_thread: None) -> None:
    monkeypatch.setattr(structure, "REPEATS", 3)


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


SEEDS = range(3)
TOKENS, RANK, HIGH = method_structure.TOKENS, method_structure.RANK, method_structure.HIGH
IN_FRONT = {"queries_in_front": TOKENS, "keys_in_front": TOKENS, "layers_of_own": 0, "layers": 4}
MERGED = {"rescale_error": 0.5, "magnitude_moved": 0.01, "direction_moved": 0.01, "latency": 1.2}

HONEST: dict[str, dict[str, Any]] = {
    "adapter": GOOD | {"merges": 0, "latency": 1.1},
    "prompt": GOOD | IN_FRONT | {"merges": 0, "coupled": 0, "parameters_stored": 100},
    "prefix": GOOD
    | {"merges": 0, "queries_in_front": 0, "keys_in_front": TOKENS, "layers_of_own": 4, "layers": 4}
    | {"parameters_stored": 100},
    "ptuning": GOOD | IN_FRONT | {"merges": 0, "coupled": 1, "parameters_stored": 10},
    "lora": GOOD | MERGED,
    "ia3": GOOD | MERGED | {"weights_changed": 12, "layers": 4, "rescale_error": 1e-15},
    "mora": GOOD | MERGED | {"rank_smallest": HIGH * RANK, "rank_largest": 64},
    "dora": GOOD | MERGED | {"latency": 2.0, "magnitude_moved": 0.03, "magnitude_error": 0.0},
}
"""By method what a record says of one that is what its definition says."""

JUDGED = {
    "adapter": (method_structure.judge_adapter, method_structure.ADAPTERS),
    "prompt": (method_structure.judge_prompt, ("prompt",)),
    "prefix": (method_structure.judge_prefix, method_structure.PREFIXES),
    "ptuning": (method_structure.judge_ptuning, method_structure.PTUNINGS),
    "lora": (method_structure.judge_lora, ("lora",)),
    "ia3": (method_structure.judge_ia3, ("ia3",)),
    "mora": (method_structure.judge_mora, method_structure.MORAS),
    "dora": (method_structure.judge_dora, ("dora",)),
}

FROZEN: list[tuple[dict[str, Any], str]] = [
    ({"base_moved": 1e-9}, "base is frozen"),
    ({"trained_outside": 1}, "base is frozen"),
    ({"off_distance": 1e-4}, "comes back"),
    ({"added_still": 1}, "all that it adds is trained"),
    ({"parameters_closed_form": 99}, "closed form"),
    ({"end_distance": 0.0}, "training changes the output"),
]
IDENTITY: list[tuple[dict[str, Any], str]] = [({"start_distance": 1e-4}, "begins as the base")]
MERGES: list[tuple[dict[str, Any], str]] = [
    ({"merges": 0}, "merges to rounding"),
    ({"merge_error_float64": 1e-4}, "merges to rounding"),
    ({"merge_error_float32": 1e-4}, "merges to rounding"),
    ({"merge_error_bfloat16": 0.12, "end_distance": 10.0}, "merges to rounding"),
    ({"merge_error_bfloat16": 0.05, "end_distance": 0.1}, "merges to rounding"),
]
AS_INPUT: list[tuple[dict[str, Any], str]] = [
    ({"queries_in_front": 0}, "tokens pass through every layer"),
    ({"keys_in_front": TOKENS - 1}, "tokens pass through every layer"),
]
FAULTS: dict[str, list[tuple[dict[str, Any], str]]] = {
    "adapter": [*FROZEN, *IDENTITY, ({"merges": 1}, "cannot be merged")],
    "prompt": [
        *FROZEN,
        *AS_INPUT,
        ({"layers_of_own": 1}, "tokens pass through every layer"),
        ({"coupled": 0.5}, "numbers of its own"),
        ({"parameters_stored": 99}, "all are stored"),
    ],
    "prefix": [
        *FROZEN,
        ({"layers_of_own": 3}, "keys of its own"),
        ({"keys_in_front": TOKENS - 1}, "keys of its own"),
        ({"queries_in_front": TOKENS}, "keeps its place"),
        ({"parameters_stored": 101}, "projection is trained and not stored"),
    ],
    "ptuning": [
        *FROZEN,
        *AS_INPUT,
        ({"coupled": 0.5}, "moves every virtual token"),
        ({"parameters_stored": 100}, "less is stored than trained"),
    ],
    "lora": [*FROZEN, *IDENTITY, *MERGES, ({"rank_largest": 9}, "rank 8"), ({"rank_largest": 0}, "rank 8")],
    "ia3": [
        *FROZEN,
        *IDENTITY,
        *MERGES,
        ({"weights_changed": 11}, "three weights of a layer"),
        ({"rescale_error": 1e-3}, "factors of its rows or columns"),
        ({"rescale_error": None}, "factors of its rows or columns"),
    ],
    "mora": [
        *FROZEN,
        *IDENTITY,
        *MERGES,
        ({"parameters_trainable": 110, "parameters_closed_form": 110}, "LoRA's number of parameters"),
        ({"rank_smallest": HIGH * RANK - 1}, "changes by rank"),
        ({"rank_smallest": None}, "changes by rank"),
    ],
    "dora": [
        *FROZEN,
        *IDENTITY,
        *MERGES,
        ({"magnitude_error": 1e-3}, "magnitudes that it trains"),
        ({"magnitude_error": None}, "magnitudes that it trains"),
        ({"magnitude_moved": 0.0}, "have both moved"),
        ({"direction_moved": 0.0}, "have both moved"),
    ],
}


def judged(method: str, fault: dict[str, Any], faulty: int = 1) -> Finding:
    """What the method's judge says if the last seeds of its last arm, so many, have this fault; LoRA beside it is honest."""
    judge, arms = JUDGED[method]
    honest = dict.fromkeys(arms, HONEST[method])
    if method != "lora":
        honest["lora"] = HONEST["lora"]
    records = [
        record(arm, seed, figures | (fault if arm == arms[-1] and seed >= len(SEEDS) - faulty else {}))
        for arm, figures in honest.items()
        for seed in SEEDS
    ]
    return judge(Evidence(records))


@pytest.mark.parametrize(("method", "fault", "said"), [(m, *fault) for m, faults in FAULTS.items() for fault in faults])
def test_each_fact_of_a_method_is_noticed_when_it_fails(method: str, fault: dict[str, Any], said: str) -> None:
    assert judged(method, {}).verdict == "supported"
    once = judged(method, fault)
    # Whether the projection is stored is told from all records together.
    assert once.verdict == ("refuted" if "projection" in said else "conditional")
    (reason,) = [reason for reason in once.because.split("; ") if said in reason]
    assert reason.startswith("not so that ")
    assert f"{JUDGED[method][1][-1]}-seed2" in reason or "projection" in said
    if len(JUDGED[method][1]) == 1:
        assert judged(method, fault, faulty=len(SEEDS)).verdict == "refuted"


@pytest.mark.parametrize("method", ["lora", "ia3", "mora", "dora"])
def test_a_merge_that_does_nothing_is_noticed_where_training_changed_less_than_bf16_rounds(method: str) -> None:
    judge, arms = JUDGED[method]
    little = {"end_distance": 0.05}
    honest = Evidence([record(a, seed, HONEST[method] | little) for a in arms for seed in SEEDS])
    beside = [] if method == "lora" else [record("lora", seed, HONEST["lora"]) for seed in SEEDS]
    assert judge(Evidence([*honest.records, *beside])).verdict == "supported"
    assert judge(Evidence([*method_structure.merging_nothing(honest).records, *beside])).verdict == "refuted"


@pytest.mark.parametrize(
    ("dora", "verdict"),
    [
        ({"latency": 1.1}, "conditional"),
        ({"latency": 1.2 * 1.01}, "supported"),
        ({"magnitude_moved": 0.009}, "conditional"),
        ({"magnitude_moved": 0.02, "direction_moved": 0.021}, "conditional"),
    ],
)
def test_dora_is_slower_than_lora_and_moves_magnitudes_further_for_a_turn(dora: dict[str, Any], verdict: str) -> None:
    assert judged("dora", dora, faulty=len(SEEDS)).verdict == verdict


def test_a_time_of_dora_that_spreads_over_lora_s_decides_nothing() -> None:
    assert judged("dora", {"latency": 1.1}).verdict == "inconclusive"


def test_adapters_that_are_not_slower_are_no_support() -> None:
    def verdict(*latencies: float) -> str:
        records = [
            record(arm, seed, {**GOOD, "merges": 0, "latency": latency})
            for arm in method_structure.ADAPTERS
            for seed, latency in enumerate(latencies)
        ]
        return method_structure.judge_adapter(Evidence(records)).verdict

    assert verdict(1.10, 1.11, 1.12) == "supported"
    assert verdict(0.9, 1.1, 1.3) == "inconclusive"
    assert verdict(0.90, 0.91, 0.92) == "conditional"


def test_a_layer_that_never_changes_has_no_change_of_any_rank(tiny_workspace: Workspace) -> None:
    linear = nn.Linear(4, 4)
    model = nn.Sequential(linear)
    assert structure._changes(model, model, model) == {"weights_changed": 0}
