"""What a study asks of a card, on cards that are made up: no GPU is needed to say what one would hold."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from lab import records
from lab.cards import GIB, usable_bytes
from lab.device import Card
from lab.forecast import SIMULATED_SECONDS, START_SECONDS, Forecast, print_forecast
from lab.specs import (
    Checkpointing,
    Inference,
    Memory,
    Paging,
    Plan,
    Rlhf,
    Simulation,
    Speed,
    Sweep,
    Timing,
    Training,
    TrialSpec,
)
from lab.study import Study
from lab.workspace import Workspace
from tests.conftest import ROOT
from tests.test_records import make_record

GPU = Study.load("gpu", ROOT)
H100 = Card.named("H100-80GB")
SMALL = Card("a made-up card", 8 * GIB, 8 * GIB)


def spec(settings: Any, name: str = "a", **changes: Any) -> TrialSpec:
    return TrialSpec(experiment="e", name=name, arm="a", settings=settings, **changes)


def memory(model: str = "llama-3.2-1b", **changes: Any) -> TrialSpec:
    return spec(Memory.model_validate({"model": model, "length": 512, "device": "cuda", **changes}))


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path, "gpu")


def forecast(card: Card, workspace: Workspace) -> Forecast:
    return Forecast(card, workspace, GPU.profile)


# Memory ---------------------------------------------------------------------------------------------------------


def test_a_prediction_is_that_of_lab_fit(workspace: Workspace) -> None:
    from lab.planner import answer
    from lab.pricing import read_spec

    asked = {"model": "llama-3.2-1b", "method": "lora", "dtype": "bf16", "batch": 4, "length": 512, "rank": 8}
    expected = answer(read_spec({**asked, "gpu": "H100-80GB"}), quick=True).prediction.peak_bytes
    found = forecast(H100, workspace).peak(memory(method="lora", precision="bf16", batch=4))
    assert found is not None
    assert found.quick
    assert found.peak_bytes == expected


def test_a_trial_that_does_not_fit_says_prediction_and_room(workspace: Workspace) -> None:
    short = forecast(SMALL, workspace).shortfall(memory())  # full fine-tuning in fp32: 16 bytes a parameter and more
    assert short is not None
    assert 16 * 1.23e9 < short.predicted_bytes < 40 * GIB
    room = usable_bytes(8 * GIB, quick=True) / GIB
    predicted = f"{short.predicted_bytes / GIB:.1f}"
    assert short.message == f"not run: lab fit predicts {predicted} GiB, and a made-up card has {room:.1f} GiB for it"
    assert forecast(H100, workspace).shortfall(memory()) is None
    assert forecast(SMALL, workspace).shortfall(memory(method="qlora", precision="bf16")) is None


def test_what_others_hold_of_a_card_is_no_room(workspace: Workspace) -> None:
    full = Card("a card", 80 * GIB, 8 * GIB)
    assert forecast(full, workspace).shortfall(memory()) is not None


def test_a_trial_that_is_to_find_the_limit_runs_whatever_is_predicted(workspace: Workspace) -> None:
    paging = spec(Paging(model="llama-3.1-8b", length=512, batch=8))
    found = forecast(SMALL, workspace)
    assert found.peak(paging) is not None
    assert found.shortfall(paging) is None


def test_what_needs_no_card_or_cannot_be_priced_has_no_peak_and_runs(workspace: Workspace) -> None:
    found = forecast(SMALL, workspace)
    simulated = spec(Simulation(model="llama-3.1-70b", device="cuda"), tier="sim")
    aligned = spec(Rlhf(model="smol", task="family", updates=2, trainer="dpo", device="cuda"))
    impossible = memory(length=10**7)
    for each in (simulated, aligned, impossible):
        assert found.peak(each) is None
        assert found.shortfall(each) is None


@pytest.mark.parametrize(
    "settings",
    [
        Checkpointing(model="llama-3.2-1b", precision="bf16", layers=4, batch=2, length=256, device="cuda"),
        Inference(model="llama-3.2-1b", precision="bf16", batch=8, length=512, device="cuda"),
        Speed(model="llama-3.2-1b", method="lora", batch=2, length=512, device="cuda"),
        Memory(model="llama-3.2-1b", precision="bf16-master", length=512, device="cuda"),
        Memory(model="llama-3.2-1b", updates=0, device="cuda"),
        Training(model="smol", task="family", updates=4, device="cuda"),
        Training(model="tiny", task="family", updates=4, device="cuda"),
    ],
    ids=lambda settings: f"{settings.kind}-{settings.model}",
)
def test_every_way_to_use_a_card_has_a_peak_of_at_least_its_weights(settings: Any, workspace: Workspace) -> None:
    peak = forecast(H100, workspace).peak(spec(settings))
    assert peak is not None
    least = {"llama-3.2-1b": 0.4e9, "smol": 135e6 * 16, "tiny": 16 * 5e5}[settings.model]
    assert least < peak.peak_bytes < 40 * GIB


def test_more_layers_less_quantisation_and_a_copy_in_fp32_take_more(workspace: Workspace) -> None:
    found = forecast(H100, workspace)

    def bytes_of(settings: Any) -> int:
        peak = found.peak(spec(settings))
        assert peak is not None
        return peak.peak_bytes

    shape: dict[str, Any] = {"model": "llama-3.2-1b", "precision": "bf16", "length": 512, "device": "cuda"}
    assert bytes_of(Checkpointing(**shape, layers=2)) < bytes_of(Checkpointing(**shape))
    assert bytes_of(Inference(**shape)) < bytes_of(Inference(**shape, quantisation="nf4"))  # the base lies beside it
    assert bytes_of(Memory(**shape)) < bytes_of(Memory(**{**shape, "precision": "bf16-master"}))


def test_two_runs_that_are_compared_lie_on_the_card_together(workspace: Workspace) -> None:
    one = Training(model="smol", task="family", updates=4, device="cuda")
    found = forecast(H100, workspace)
    alone, both = found.peak(spec(one)), found.peak(spec(Timing(first=one, second=one)))
    assert alone is not None
    assert both is not None
    assert both.peak_bytes == 2 * alone.peak_bytes


# Time -----------------------------------------------------------------------------------------------------------


def test_time_goes_by_records_of_this_card_where_there_are_some(workspace: Workspace) -> None:
    for place, seconds in enumerate((10.0, 20.0)):
        record = make_record(memory().model_copy(update={"name": f"a{place}"}), device=H100.name, seconds=seconds)
        records.write_record(record, workspace.root / "results" / "gpu-h100")
    elsewhere = make_record(memory().model_copy(update={"name": "b"}), device="Another card", seconds=1000.0)
    records.write_record(elsewhere, workspace.root / "results" / "gpu-other")
    found = forecast(H100, workspace)
    assert found.seconds(memory(batch=4)) == (15.0, True)
    by_rule, measured = found.seconds(memory(method="lora"))
    assert not measured
    assert by_rule > START_SECONDS


def test_the_rule_counts_operations_and_a_faster_card_takes_less(workspace: Workspace) -> None:
    slow, fast = (forecast(Card.named(name), workspace) for name in ("RTX-3090", "H100-80GB"))
    heavy = spec(Speed(model="llama-3.1-8b", batch=8, length=1024, device="cuda"))
    assert slow.seconds(heavy)[0] > 5 * fast.seconds(heavy)[0]
    operations = 6 * 8.03e9 * 8 * 1024 * 2 * 4 * 6
    assert fast.seconds(heavy)[0] == pytest.approx(START_SECONDS + operations / (0.3 * 989.4e12), rel=0.01)
    assert fast.seconds(spec(Simulation(model="llama-3.1-70b"), tier="sim")) == (SIMULATED_SECONDS, False)


# The whole profile ----------------------------------------------------------------------------------------------


def rows(card: Card, workspace: Workspace, *names: str) -> Iterator[Any]:
    plans = {name: GPU.plan(GPU.registry.experiment(name)) for name in names}
    return forecast(card, workspace).rows(plans)


def test_a_sweep_counts_its_trials_at_every_rate(workspace: Workspace) -> None:
    def training(seed: int) -> TrialSpec:
        settings = Training(model="tiny", task="family", updates=4, seed=seed, device="cuda")
        return spec(settings, name=f"seed{seed}")

    plan: Plan = [Sweep(rates=(1e-3, 1e-2), tried=(training(0),), then=(training(0), training(1))), memory()]
    (row,) = forecast(H100, workspace).rows({"mine": plan})
    assert (row.experiment, row.trials, row.unfit, row.setup) == ("mine", 4, (), "a")


def test_on_a_small_card_some_trials_of_the_profile_do_not_fit_and_are_named(workspace: Workspace) -> None:
    (none,) = rows(SMALL, workspace, "speed")
    assert len(none.unfit) == none.trials
    (row,) = rows(Card.sized(16), workspace, "speed")
    assert row.trials > len(row.unfit) > 0
    assert {"pair-full-llama-3.1-8b-seed0", "pair-lora-llama-3.1-8b-seed0"} <= set(row.unfit)
    assert not {name for name in row.unfit if "0.5b" in name and "prompt" in name}
    (large,) = rows(H100, workspace, "speed")
    assert large.unfit == ()
    assert large.seconds > row.seconds


def test_the_forecast_is_printed_with_the_card_each_experiment_and_the_total(workspace: Workspace) -> None:
    text = io.StringIO()
    found = list(rows(SMALL, workspace, "speed", "grad_accumulation"))
    print_forecast(SMALL, found, Console(file=text, width=200, no_color=True))
    lines = text.getvalue().splitlines()
    assert lines[0].startswith("a made-up card: 8.0 GiB, of which a predicted peak may take 7.1 GiB")
    assert [line.split()[0] for line in lines[1:5]] == ["experiment", "speed", "grad_accumulation", "in"]
    assert f"{found[0].trials + found[1].trials}" in lines[4]
    assert "0 of" in lines[5]
    assert "its peak is not known here" in " ".join(lines[5:])
    assert "recorded as out of memory" in " ".join(lines[5:])


def test_the_forecast_of_the_whole_profile_is_there_at_once(workspace: Workspace) -> None:
    import time

    started = time.perf_counter()
    found = list(rows(H100, workspace, *GPU.registry.experiments))
    assert time.perf_counter() - started < 60
    assert {row.experiment for row in found} == set(GPU.profile.experiments())
    assert json.dumps([row.unfit for row in found])
