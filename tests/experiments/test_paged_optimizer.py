"""The judge of paging on made-up records: parameters or state, disk or host memory, under pressure that is real or not."""

from __future__ import annotations

from typing import Any

import pytest

from experiments import paged_optimizer
from lab.claims import Evidence, Verdict, judge
from lab.params import Profile
from lab.records import Record
from lab.specs import Paging, TrialSpec
from lab.study import Study
from tests.conftest import ROOT
from tests.test_records import make_record

CLAIM = paged_optimizer.EXPERIMENT.claims[0]
GIB = float(2**30)

# State in host memory, as bitsandbytes' source leads one to expect; and parameters on a disk, as the claim says.
HOST: dict[str, float] = {
    "survived": 1.0,
    "parameters_bytes": 4 * GIB,
    "parameters_away_bytes": 0.0,
    "state_bytes": 2.1 * GIB,
    "state_paged_bytes": 2 * GIB,
    "expected_state_bytes": 2 * GIB,
    "unseen_bytes": 1 * GIB,
    "displaced_bytes": 1 * GIB,
    "allocated_bytes": 5 * GIB,
    "driver_bytes": 7 * GIB,
    "filled_bytes": 60 * GIB,
    "read_bytes": 0.0,
    "written_bytes": 0.0,
    "swapped_bytes": 0.0,
    "host_bytes": 1 * GIB,
    "resident_bytes": 0.0,
    "opened_files": 0.0,
    "seconds_per_update": 2.0,
}
DISK = {**HOST, "parameters_away_bytes": 2 * GIB, "displaced_bytes": 0.0, "written_bytes": 8 * GIB, "host_bytes": 0.0}
FREE = {**HOST, "unseen_bytes": 2 * GIB, "displaced_bytes": 0.0, "host_bytes": 0.0, "seconds_per_update": 0.5}


def made_up_figures(spec: TrialSpec) -> dict[str, Any]:
    """What the trials of this experiment leave, for tests that judge every claim."""
    return {"control-disk": DISK, "free": FREE}.get(spec.arm, HOST)


def runs(arm: str, figures: dict[str, float], room: float | None = None, repeats: int = 3) -> list[Record]:
    found = []
    for repeat in range(repeats):
        settings = Paging(model="llama-3.2-1b", optimizer="paged_adamw_8bit", room=room, seed=repeat)
        name = f"{arm}-{room}-{repeat}".lower()
        spec = TrialSpec(experiment="paged_optimizer", name=name, arm=arm, settings=settings)
        # Repeats differ by a little, as measured ones do.
        figures = {**figures, "written_bytes": figures["written_bytes"] * (1 + 0.01 * repeat)}
        found.append(make_record(spec, figures=figures))
    return found


def records(first: dict[str, float] = HOST, second: dict[str, float] = HOST, repeats: int = 3) -> list[Record]:
    return [
        *runs("free", FREE),
        *runs("paged", first, 0.1, repeats),
        *runs("paged", second, 0.5, repeats),
        *runs("unpaged", {**HOST, "survived": 0.0}, 0.1),
        *runs("control-disk", DISK),
    ]


def verdict(found: list[Record]) -> Verdict:
    return judge(paged_optimizer.EXPERIMENT, CLAIM, "gpu", "gpu", found, len(found))


def test_state_in_host_memory_refutes_and_parameters_on_a_disk_would_not() -> None:
    found = verdict(records())
    assert found.verdict == "refuted"
    assert (found.effect, found.low, found.high, found.n) == (0, 0, 0, 3)
    assert found.control == "half of the parameters in files: supported, all of the state in host memory: refuted"
    assert "with room for 10% of the state 0.00 GiB of parameters and 1.00 GiB of state lie elsewhere" in found.because
    assert "0.00 GiB were written, 0.00 GiB swapped, and host memory fell by 1.00 GiB" in found.because
    assert (
        "on a card that is not filled 0.00 GiB of 2.00 GiB are away, torch counts 5.00 GiB and the driver 7.00"
        in found.because
    )
    assert (
        "an update takes 4.0 times as long on the filled one; 6 of 6 paged runs end; 0 of 3 unpaged ones"
        in found.because
    )


def test_parameters_on_a_disk_support_and_host_memory_would_not() -> None:
    found = verdict(records(DISK, DISK))
    assert found.verdict == "supported"
    assert found.low is not None
    assert found.low > 3
    assert "all of the state in host memory: refuted" in found.control


@pytest.mark.parametrize(
    "half",
    [
        {**HOST, "written_bytes": 1 * GIB},  # the state, to a disk
        {**DISK, "written_bytes": 0.0},  # parameters, to host memory
    ],
    ids=["state on a disk", "parameters in host memory"],
)
def test_half_of_the_statement_is_not_the_statement(half: dict[str, float]) -> None:
    assert verdict(records(half, half)).verdict == "refuted"


def test_swap_is_a_disk() -> None:
    swapped = {**DISK, "written_bytes": 0.0, "swapped_bytes": 2 * GIB}
    assert verdict(records(swapped, swapped)).verdict == "supported"


def test_it_may_depend_on_the_pressure() -> None:
    found = verdict(records(DISK, HOST))
    assert found.verdict == "conditional"
    assert "refuted" in found.control


def test_a_card_that_nothing_leaves_says_nothing_of_where_to() -> None:
    found = verdict(records(FREE, FREE))
    assert found.verdict == "inconclusive"
    assert "with room for 10% of the state too little left the card to say where it goes" in found.because
    assert verdict(records(HOST, FREE)).verdict == "refuted"


def test_the_share_has_to_lie_clear_of_a_half() -> None:
    near = {**DISK, "written_bytes": 1 * GIB}  # 50 to 51 %
    assert verdict(records(near, near)).verdict == "inconclusive"
    assert verdict(records(DISK, near)).verdict == "inconclusive"


def test_one_run_decides_nothing() -> None:
    assert verdict(records(repeats=1)).verdict == "inconclusive"


def test_repeats_that_disagree_on_parameters_do_not_decide() -> None:
    found = records(DISK, DISK)
    odd = next(r for r in found if r.spec.arm == "paged")
    odd.figures |= {"parameters_away_bytes": 0.0, "displaced_bytes": 2 * GIB}
    assert verdict(found).verdict == "inconclusive"


def test_the_plot_shows_where_the_bytes_lie_over_the_room() -> None:
    lines = paged_optimizer.place_lines(Evidence(records()))
    assert lines["state on the card"].x == [10.0, 50.0, 100.0]
    assert lines["state on the card"].y == [1.0, 1.0, 2.0]
    assert lines["written to a disk"].y == [0.0, 0.0, 0.0]


def test_free_and_filled_cards_paged_and_unpaged_are_tried_as_often_as_told() -> None:
    params = paged_optimizer.Params(
        model="llama-3.2-1b", precision="bf16", batch=1, length=64, updates=2, repeats=2, rooms=(0.5, 0.1)
    )
    sizes = {"train": 1, "validation": 1, "test": 1}
    profile = Profile.model_validate({"device": "cuda", "threads": 1, "tiny": {}, "data": sizes})
    specs = paged_optimizer.trials(params, profile)
    assert [s.name for s in specs[:5]] == [
        "free-0",
        "paged-room0.5-0",
        "paged-room0.1-0",
        "unpaged-room0.1-0",
        "control-disk-0",
    ]
    assert len(specs) == 10
    settings = [s.settings for s in specs]
    assert all(isinstance(s, Paging) and s.device == "cuda" and s.precision == "bf16" for s in settings)
    assert {s.settings.seed for s in specs if isinstance(s.settings, Paging)} == {0, 1}


@pytest.mark.parametrize("profile", ["smoke", "cpu", "full"])
def test_without_a_card_it_is_not_run_and_says_so(profile: str) -> None:
    study = Study.load(profile, ROOT)
    assert study.plan(study.registry.experiment("paged_optimizer")) == []
    found = [v for v in study.verdicts if v.claim == "paged-adamw-pages"]
    assert [(v.tier, v.verdict, v.because) for v in found] == [
        ("gpu", "not run", f"the profile {profile} plans no trial of it")
    ]
