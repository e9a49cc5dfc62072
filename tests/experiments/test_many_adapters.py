"""The judge of one base with many adapters, on made-up records: each fact has a fault, and each control refutes."""

from __future__ import annotations

from typing import Any

import pytest

from experiments import many_adapters
from lab.claims import Evidence, judge
from lab.params import Profile
from lab.records import Record
from lab.specs import Adapters, TrialSpec
from tests.test_records import make_record

CLAIM = many_adapters.EXPERIMENT.claims[0]
GOOD: dict[str, Any] = {
    "reload_distance": 0.0,
    "switch_distance": 0.0,
    "back_distance": 0.0,
    "unswitched_distance": 0.5,
    "merged_distance": 1e-7,
    "adapter_bytes": 300,
    "model_bytes": 4000,
    "own_loss": 1.1,
    "other_loss": 1.4,
    "switch_seconds": 1e-3,
}
APART = {name: value for name, value in GOOD.items() if name != "merged_distance"}


def record(method: str, seed: int, figures: dict[str, Any]) -> Record:
    settings = Adapters(model="tiny", task="a", further_tasks=("b",), method=method, updates=1, seed=seed)
    spec = TrialSpec(experiment="many_adapters", name=f"{method}-seed{seed}", arm=method, settings=settings)
    own = figures["own_loss"] + 0.01 * seed
    return make_record(spec, figures={**figures, "own_loss": own})


def records(seeds: int = 3, **by_method: dict[str, Any]) -> list[Record]:
    return [record(method, seed, figures) for method, figures in by_method.items() for seed in range(seeds)]


def verdict(found: list[Record]) -> Any:
    return judge(many_adapters.EXPERIMENT, CLAIM, "cpu", "cpu", found, len(found))


def test_it_is_supported_where_every_method_serves_and_no_control_is() -> None:
    found = verdict(records(lora=GOOD, prompt=APART))
    assert found.verdict == "supported"
    assert (found.effect, found.n) == (0.075, 6)
    assert "0.29 to 0.29 nats lost by another's adapter; a switch takes up to 1.0 ms" in found.because
    faults = [name for name in CLAIM.controls if name != "nothing to find fault with"]
    assert all(f"{name}: refuted" in found.control for name in faults)


def test_it_can_be_refuted_where_no_method_serves() -> None:
    assert verdict(records(lora=GOOD | {"switch_distance": 0.5})).verdict == "refuted"


def test_adapters_that_learnt_nothing_serve_no_task() -> None:
    alike = GOOD | {"own_loss": 1.0, "other_loss": 1.0, "unswitched_distance": 0.0}
    assert verdict(records(lora=alike)).verdict == "refuted"


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ({"switch_distance": 1e-4}, "not so that the switched base says what the dedicated model says"),
        ({"back_distance": 1e-4}, "not so that the switched base says what the dedicated model says"),
        ({"reload_distance": 1e-4}, "not so that the switched base says what the dedicated model says"),
        ({"merged_distance": 1e-4}, "not so that where it merges, merging keeps the function"),
        ({"merged_distance": None}, "not so that where it merges, merging keeps the function"),
        ({"adapter_bytes": 500}, "not so that a task takes at most 10% of the model's bytes"),
        ({"other_loss": 1.0}, "not so that its own is better"),
    ],
)
def test_each_fact_is_caught_when_it_fails(fault: dict[str, Any], said: str) -> None:
    once = verdict(records(lora={**GOOD, **fault}, ia3=GOOD))
    assert once.verdict == "conditional"
    assert f"lora: {said}" in once.because
    assert "ia3: " not in once.because
    assert many_adapters.judge(Evidence(records(lora={**GOOD, **fault}))).verdict == "refuted"


def test_one_seed_that_fails_is_enough() -> None:
    found = [*records(lora=GOOD, ia3=GOOD)[:-1], record("ia3", 2, {**GOOD, "switch_distance": 1e-4})]
    assert verdict(found).verdict == "conditional"


def test_what_the_seeds_do_not_decide_is_inconclusive() -> None:
    assert verdict(records(seeds=1, lora=GOOD)).verdict == "inconclusive"
    spread = [record("lora", seed, {**GOOD, "other_loss": loss}) for seed, loss in enumerate((0.9, 1.2, 1.6))]
    found = verdict([*spread, *records(ia3=GOOD)])
    assert found.verdict == "inconclusive"
    assert "lora: undecided that its own is better" in found.because
    # What fails anyway is not saved by it.
    both = [*spread, *records(ia3=GOOD, prompt={**GOOD, "adapter_bytes": 4000})]
    assert many_adapters.judge(Evidence(both)).verdict == "conditional"


def test_the_room_of_a_model_for_each_grows_faster() -> None:
    lines = many_adapters.room_lines(Evidence(records(lora=GOOD, prompt=APART)))
    assert list(lines) == ["a model for each", "lora", "prompt"]
    assert lines["a model for each"].y[-1] == pytest.approx(100 * 4000 / 2**20)
    assert lines["lora"].y[-1] == pytest.approx((4000 + 100 * 300) / 2**20)


def test_every_method_is_trained_for_every_seed_on_all_tasks() -> None:
    params = many_adapters.Params(
        model="tiny",
        tasks=("a", "b", "c"),
        seeds=2,
        updates=5,
        micro_batch_size=4,
        questions=10,
        methods={name: many_adapters.MethodParams(learning_rate=0.1) for name in ("lora", "prompt")},
    )
    sizes = {"train": 1, "validation": 1, "test": 1}
    profile = Profile.model_validate({"device": "cpu", "threads": 2, "tiny": {}, "data": sizes})
    specs = many_adapters.trials(params, profile)
    assert [spec.name for spec in specs] == ["lora-seed0", "lora-seed1", "prompt-seed0", "prompt-seed1"]
    assert {spec.threads for spec in specs} == {1}
    assert specs[0].tasks() == ["a", "b", "c"]
