"""The judge of gradient checkpointing, on made-up records: each part can fail, and each control is told from the claim."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from experiments import checkpointing
from experiments.checkpointing import CARDS, METHODS, SAME, SIMULATED, THEORY, WITH, WITHOUT, largest_batch, room
from lab.claims import Evidence, Verdict, judge
from lab.memory.simulated_trial import simulate_memory
from lab.memory.workload import PHASES
from lab.params import Profile
from lab.records import Record
from lab.specs import Checkpointing, Setup, Simulation, TrialSpec, memory_spec
from lab.workspace import Workspace
from tests.test_records import make_record

CLAIM = checkpointing.EXPERIMENT.claims[0]
MIB = 2**20


def made_up_figures(spec: TrialSpec) -> dict[str, Any]:
    """What a trial leaves, for the tests of all claims."""
    if not isinstance(spec.settings, Checkpointing):
        return {}
    layers = float(spec.settings.layers or 8)
    figures: dict[str, Any] = {"layers": layers, "hidden_bytes": 1000.0}
    figures |= {"with_kept_bytes": 1000 * layers, "without_kept_bytes": 20_000 * layers}
    figures |= {"difference_non_reentrant": 0.0, "difference_reentrant": 0.0}
    figures["difference_unpreserved"] = 0.4 if spec.settings.attention_dropout else 0.0
    figures |= {"without_flops": 3e6, "with_flops": 4e6, "without_seconds": 3.0, "with_seconds": 4.0}
    figures["ratio"] = THEORY[spec.settings.method] + spec.settings.seed / 1000
    return figures


def trial(arm: str, name: str, **settings: Any) -> Record:
    setup = Checkpointing.model_validate({"model": "llama-6m", **settings})
    spec = TrialSpec(experiment="checkpointing", name=f"{arm}-{name}", arm=arm, settings=setup)
    return make_record(spec, figures=made_up_figures(spec))


def peaks(
    method: str, static: float, without: float, with_it: float, model: str = "llama-6m", **more: Any
) -> list[Record]:
    """Peaks of MiB that a batch of 0 takes, and that each sequence adds."""
    found = []
    for arm, each in ((WITHOUT, without), (WITH, with_it)):
        for batch in (1, 8):
            setup = {"model": model, "method": method, "batch": batch, "length": 64, "checkpointing": arm == WITH}
            sim = more.get("sim", False)
            spec = memory_spec("checkpointing", arm, f"{model}-{method}-{batch}", "cpu", sim, **setup)
            peak = (static + each * batch) * MIB
            figures: dict[str, float | None] = {f"peak_{phase}_bytes": peak for phase in PHASES}
            figures |= {"peak_forward_logits_bytes": 0.75 * each * batch * MIB, "steady_bytes": static * MIB}
            found.append(make_record(spec, figures=figures))
    return found


def good(full: tuple[float, float, float] = (10, 8, 2), lora: tuple[float, float, float] = (5, 8, 2)) -> list[Record]:
    found = [*peaks("full", *full), *peaks("lora", *lora)]
    for method in METHODS:
        for seed in range(3):
            found += [
                trial("gradients", f"{method}-{rate}-{seed}", method=method, attention_dropout=rate, seed=seed)
                for rate in (0.0, 0.1)
            ]
            found.append(trial("time", f"{method}-{seed}", method=method, rounds=3, seed=seed))
    return found + [trial("depth", str(layers), layers=layers) for layers in (2, 4, 8)]


def verdict(found: list[Record], tier: Any = "cpu") -> Verdict:
    return judge(checkpointing.EXPERIMENT, CLAIM, "cpu", tier, found, len(found))


def changed(found: list[Record], arm: str, change: Callable[[Record], dict[str, Any]]) -> list[Record]:
    return [r.model_copy(update={"figures": {**r.figures, **change(r)}}) if r.spec.arm == arm else r for r in found]


FAULTS = [name for name in CLAIM.controls if name != "nothing to find fault with"]


def test_it_is_supported_where_every_part_holds_and_no_fault_is() -> None:
    found = verdict(good())
    assert found.verdict == "supported"
    assert "largest batch at least 2 times as large in 8 of 8 cases" in found.because
    assert "8 GB 14 to 59" in found.because  # 128 MiB less 10, by 8 and by 2
    assert "a layer keeps 1 hidden states, 20 without" in found.because
    assert "full 1.33 [" in found.because
    assert all(f"{name}: refuted" in found.control for name in FAULTS)
    assert "nothing to find fault with: supported" in found.control


def test_it_is_refuted_where_no_batch_doubles_and_flawless_records_are_not() -> None:
    found = verdict(good(full=(10, 8, 5), lora=(5, 8, 5)))
    assert found.verdict == "refuted"
    assert "logits take 75% of what a batch adds" in found.because
    assert "nothing to find fault with: supported" in found.control


def test_it_depends_where_a_card_holds_no_sequence_or_the_logits_stay() -> None:
    found = verdict(good(full=(200, 8, 2)))
    assert found.verdict == "conditional"
    assert "largest batch at least 2 times as large in 7 of 8 cases" in found.because
    assert "not one sequence fits either way in 1: llama-6m full at 64 tokens: 8 GB;" in found.because
    assert all(f"{name}: refuted" in found.control for name in FAULTS)
    found = verdict(good(lora=(5, 8, 5)))
    assert found.verdict == "conditional"
    assert "less than that: llama-6m lora at 64 tokens (logits take 75% of what a batch adds): 8 GB" in found.because


def test_it_tells_of_which_setup_the_largest_batch_doubles_on_which_card() -> None:
    found = verdict(good(full=(200, 8, 2), lora=(5, 8, 5)))
    assert found.flips == (
        "llama-6m full at 64 tokens: the largest batch at least doubles on 16, 24, 80 GB, no sequence fits on 8 GB; llama-6m lora "
        "at 64 tokens (logits are 75% of what a sequence adds): it grows by less on 8, 16, 24, 80 GB"
    )
    alike = [*good(full=(200, 8, 2)), *peaks("lora", 200, 8, 2, "llama-3.2-1b")]
    assert verdict(alike).flips.startswith(
        "llama-3.2-1b lora at 64 tokens, llama-6m full at 64 tokens: the largest batch at least doubles on 16, 24, 80 GB, no "
    )
    assert verdict(good()).flips == ""
    assert verdict(good(full=(10, 8, 5), lora=(5, 8, 5))).flips == ""
    # What bytes say stands where the price decides nothing.
    one = [r for r in good(full=(200, 8, 2)) if r.spec.arm != "time" or not r.setting("seed")]
    undecided = verdict(one)
    assert undecided.verdict == "inconclusive"
    assert "no sequence fits on 8 GB" in undecided.flips


def test_a_card_that_takes_a_sequence_only_with_checkpointing_gains_and_counts_in_no_ratio() -> None:
    found = verdict(good(full=(100, 40, 10)))
    assert found.verdict == "supported"
    assert "8 GB 0 to 2" in found.because
    assert found.n == 7


def test_exactly_twice_is_enough() -> None:
    cell = checkpointing.Cell(checkpointing.Setup("m", "full", "full", 1), 8, 3, 6)
    assert cell.holds
    assert not checkpointing.Cell(cell.setup, 8, 3, 5).holds
    assert checkpointing.Cell(cell.setup, 8, 0, 1).holds
    assert not checkpointing.Cell(cell.setup, 8, 0, 0).holds


@pytest.mark.parametrize("way", ["non_reentrant", "reentrant"])
def test_one_gradient_that_differs_refutes(way: str) -> None:
    def apart(size: float) -> list[Record]:
        found = good()
        place = next(i for i, r in enumerate(found) if r.spec.name == "gradients-lora-0.1-2")
        figures = {**found[place].figures, f"difference_{way}": size}
        found[place] = found[place].model_copy(update={"figures": figures})
        return found

    assert verdict(apart(SAME)).verdict == "supported"
    found = verdict(apart(2 * SAME))
    assert found.verdict == "refuted"
    assert "gradients-lora-0.1-2" in found.because


def test_gradients_that_were_not_compared_under_dropout_decide_nothing() -> None:
    without = [r for r in good() if r.spec.arm != "gradients" or not r.setting("attention_dropout")]
    assert verdict(without).verdict == "inconclusive"
    one = [r for r in good() if r.spec.arm != "gradients" or r.setting("method") == "full"]
    assert verdict(one).verdict == "inconclusive"


def test_gradients_that_agree_although_the_random_state_is_lost_decide_nothing() -> None:
    def lost(difference: float) -> list[Record]:
        return changed(good(), "gradients", lambda r: {"difference_unpreserved": difference})

    assert verdict(lost(2 * SAME)).verdict == "supported"
    found = verdict(lost(SAME))
    assert found.verdict == "inconclusive"
    assert "dropout that is drawn anew makes no difference here" in found.because


def test_a_layer_that_keeps_more_than_half_refutes() -> None:
    def kept(share: float) -> list[Record]:
        return changed(good(), "depth", lambda r: {"with_kept_bytes": share * r.figure("without_kept_bytes")})

    assert verdict(kept(0.5)).verdict == "supported"
    assert verdict(kept(0.51)).verdict == "refuted"
    ragged = changed(good(), "depth", lambda r: {"with_kept_bytes": 9000 * r.figure("layers") ** 1.2})
    assert verdict(ragged).verdict == "inconclusive"


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ({"full": (1.3, 1.31, 1.32), "lora": (1.4, 1.41, 1.42)}, "supported"),
        ({"full": (1.6, 1.61, 1.62), "lora": (1.4, 1.41, 1.42)}, "conditional"),
        ({"full": (1.6, 1.61, 1.62), "lora": (1.9, 1.91, 1.92)}, "refuted"),
        ({"full": (1.0, 1.0, 1.0), "lora": (1.0, 1.0, 1.0)}, "refuted"),
        ({"full": (0.9, 1.3, 1.7), "lora": (1.4, 1.41, 1.42)}, "inconclusive"),
    ],
)
def test_the_price_is_more_than_nothing_and_less_than_two_passes(
    ratios: dict[str, tuple[float, ...]], expected: str
) -> None:
    priced = changed(good(), "time", lambda r: {"ratio": ratios[r.setting("method")][r.setting("seed")]})
    assert verdict(priced).verdict == expected


def test_one_trial_decides_no_price() -> None:
    alone = [r for r in good() if r.spec.arm != "time" or not r.setting("seed")]
    assert verdict(alone).verdict == "inconclusive"


def test_the_sim_tier_asks_for_the_batch_limit_alone() -> None:
    static = 6 * 1024
    held = peaks("full", static, 100, 20, "llama-3.2-1b", sim=True)
    found = verdict(held, "sim")
    assert found.verdict == "supported"
    assert "no checkpointing as checkpointing: refuted" in found.control
    assert "the random state lost: not run" in found.control
    bound = peaks("lora", static, 100, 60, "llama-3.2-1b", sim=True)
    assert verdict([*held, *bound], "sim").verdict == "conditional"


def test_a_batch_beyond_those_counted_is_a_bound_where_backward_has_yet_to_bend() -> None:
    def slower(found: list[Record]) -> list[Record]:
        return changed(found, WITH, lambda r: {"peak_backward_bytes": r.figure("peak_backward_bytes") / 2})

    said = verdict(slower(good())).because
    assert "llama-6m full at 64 tokens: 8 GB 14 to at most 59 / 16 GB 30 to at most 123" in said
    assert "at most" not in verdict(good()).because.split(";")[0]
    few = verdict(slower(good(full=(100, 8, 4)))).because
    assert "8 GB 3 to 7 / 16 GB 19 to at most 39" in few  # 7 lies between the batches of 1 and 8


# The arithmetic ---------------------------------------------------------------------------------------------------


def test_the_largest_batch_is_where_the_highest_phase_meets_the_room() -> None:
    points = [(1, (11.0, 30.0)), (5, (15.0, 30.0)), (10, (40.0, 30.0))]
    assert largest_batch(points, 29) == 0
    assert largest_batch(points, 30) == 8  # 15 + 5 x 3 = 30
    assert largest_batch(points, 35) == 9
    assert largest_batch(points, 50) == 12  # beyond the last, by the last line
    assert largest_batch(list(reversed(points)), 50) == 12
    with pytest.raises(ValueError, match="two batches or more, got 1"):
        largest_batch(points[:1], 50)


def test_lines_between_simulated_batches_promise_no_batch_that_does_not_fit_and_miss_few() -> None:
    def phases(batch: int) -> tuple[float, ...]:
        chosen = Simulation.model_validate(
            {**SIMULATED["full"], "model": "llama-3.2-1b", "batch": batch, "length": 1024, "device": "cuda"}
            | {"checkpointing": True}
        )
        figures = simulate_memory(chosen, Workspace(Path("nowhere"), "smoke")).figures
        return tuple(figures[f"peak_{phase}_bytes"] for phase in PHASES)

    points = [(batch, phases(batch)) for batch in (1, 8, 32)]
    for card in (16, 80):
        batch, space = largest_batch(points, room(card, "cuda")), room(card, "cuda")
        assert max(phases(batch)) <= 1.001 * space  # the allocator's rounding puts points beside a line
        assert max(phases(batch + 2)) > space


def test_batches_that_are_missing_on_one_side_are_an_error() -> None:
    found = [
        r for r in good() if not (r.spec.arm == WITH and r.setting("batch") == 8 and r.setting("method") == "lora")
    ]
    with pytest.raises(ValueError, match="llama-6m lora at 64 tokens: not the same batches"):
        checkpointing.cells(Evidence(found))


def test_a_card_is_less_than_its_name_says_and_a_processor_s_a_sixty_fourth() -> None:
    assert room(8, "cpu") == 128 * MIB
    assert 0.8 * 8 * 2**30 < room(8, "cuda") < 8 * 2**30


def test_the_limits_of_time_tell_one_replay_from_two() -> None:
    for method in METHODS:
        once, twice = THEORY[method], 2 * THEORY[method] - 1
        assert checkpointing.MOST_TIME[method] == pytest.approx((once + twice) / 2, abs=1e-9)


def test_the_plots_show_batches_by_card_and_bytes_by_depth() -> None:
    lines = checkpointing.batch_lines(Evidence(good()))
    assert list(lines) == ["llama-6m, without", "llama-6m, with"]
    assert list(lines["llama-6m, with"].x) == list(CARDS)
    assert lines["llama-6m, with"].y[0] == 61
    depth = checkpointing.depth_lines(Evidence(good()))
    assert list(depth[WITHOUT].x) == [2, 4, 8]
    assert depth[WITH].y[0] < depth[WITHOUT].y[0]


# The plan -------------------------------------------------------------------------------------------------------


def plan() -> list[TrialSpec]:
    one = {"model": "llama-6m", "batch": 2, "length": 32}
    params = checkpointing.Params.model_validate(
        {
            "gradients": {**one, "layers": 2, "dropout": 0.1, "seeds": 3},
            "depth": {**one, "layers": [1, 2, 4]},
            "time": {**one, "repeats": 2, "rounds": 3},
            "peaks": {"models": ["llama-6m"], "points": [[1, 32], [4, 32]]},
            "real_scale": {"models": ["llama-3.2-1b"], "points": [[1, 512], [8, 512]]},
        }
    )
    sizes = {"train": 1, "validation": 1, "test": 1}
    profile = Profile.model_validate({"device": "cpu", "threads": 2, "tiny": {}, "data": sizes})
    return checkpointing.trials(params, profile)


def test_every_setup_is_planned_without_and_with() -> None:
    specs = plan()
    assert len({spec.name for spec in specs}) == len(specs)
    pairs = {arm: [s.settings for s in specs if s.arm == arm] for arm in (WITHOUT, WITH)}
    for without, with_it in zip(pairs[WITHOUT], pairs[WITH], strict=True):
        assert isinstance(without, Setup)
        assert isinstance(with_it, Setup)
        assert with_it.checkpointing
        assert with_it == without.model_copy(update={"checkpointing": True})
    assert len([s for s in specs if s.tier == "sim"]) == 3 * 2 * 2


def test_what_is_timed_takes_all_threads_and_dropout_reaches_the_adapter() -> None:
    specs = plan()
    assert {spec.threads for spec in specs if spec.arm == "time"} == {2}
    assert {spec.threads for spec in specs if spec.arm != "time"} == {1}
    rates = {
        (s.settings.method, s.settings.attention_dropout, s.settings.method_options.get("dropout"))
        for s in specs
        if isinstance(s.settings, Checkpointing) and s.arm == "gradients"
    }
    assert rates == {("full", 0.0, None), ("full", 0.1, None), ("lora", 0.0, 0.0), ("lora", 0.1, 0.1)}
