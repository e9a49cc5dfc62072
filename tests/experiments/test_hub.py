"""The judge of a pinned revision, on made-up records: what refutes, what is unnoticed, and a main that never moves."""

from __future__ import annotations

from typing import Any

import pytest

from experiments import hub
from lab.claims import Evidence, judge
from lab.params import Profile
from lab.records import Record
from lab.specs import HubDownloads, TrialSpec
from tests.test_records import make_record

CLAIM = hub.EXPERIMENT.claims[0]
FACTS = [name for figures in [*hub.CORE.values(), hub.MOVED, *hub.FAULTS.values()] for name in figures]
CORE = [name for figures in hub.CORE.values() for name in figures]
AT = [2.0 * hub.MIB, 12.0 * hub.MIB, 22.0 * hub.MIB]


def made_up_figures(spec: TrialSpec) -> dict[str, Any]:
    """What a trial leaves in which every fact holds but for the fault that is planted in it."""
    assert isinstance(spec.settings, HubDownloads)
    found: dict[str, Any] = dict.fromkeys([*FACTS, "wire_verified", "cache_verified", "sound_verified"], 1.0)
    if spec.settings.fault == "ignores-revisions":
        found |= {"pinned_cold_equal": 0.0, "pinned_warm_equal": 0.0}
    if spec.settings.fault == "never-moves":
        found |= dict.fromkeys(hub.MOVED, 0.0)
    return found | {
        "killed_bytes_again": 3.0 * hub.MIB,
        "broken_at_bytes": AT,
        "resumed_at_bytes": [0.0, 10.0 * hub.MIB, 20.0 * hub.MIB],
    }


def record(arm: str = "loopback", seed: int = 0) -> Record:
    fault: Any = arm if arm in ("ignores-revisions", "never-moves") else None
    endpoint: Any = "public" if arm == "public" else "loopback"
    settings = HubDownloads(fault=fault, seed=seed, endpoint=endpoint)
    spec = TrialSpec(experiment="hub", name=f"{arm}-{seed}", arm=arm, settings=settings)
    made = made_up_figures(spec)
    series: Any = {name: value for name, value in made.items() if isinstance(value, list)}
    return make_record(spec, figures={n: v for n, v in made.items() if n not in series}, series=series)


def changed(figures: dict[str, float], seed: int = 0) -> Record:
    """A record of the loopback hub with these figures in place of its own."""
    made = record(seed=seed)
    return make_record(made.spec, figures=made.figures | figures, series=made.series)


PLANTED = [record("ignores-revisions"), record("never-moves")]


def verdict(*found: Record) -> Any:
    return judge(hub.EXPERIMENT, CLAIM, "cpu", "cpu", [*found, *PLANTED], len(found) + len(PLANTED))


def test_it_is_supported_where_every_pin_gives_the_same_and_every_fault_is_noticed() -> None:
    found = verdict(record(), record(seed=1))
    assert (found.verdict, found.effect) == ("supported", 1.0)
    assert "a hub that ignores revisions: refuted, a main that never moves: inconclusive" in found.control
    assert "up to 2 MiB are sent again, and 3 MiB (25% that had arrived) after the download was killed" in found.because


@pytest.mark.parametrize("fact", CORE)
def test_one_pinned_load_that_differs_refutes(fact: str) -> None:
    found = verdict(record(), changed({fact: 0.0}, seed=1))
    assert found.verdict == "refuted"
    assert found.effect < 1
    assert "nothing to find fault with: supported" in found.control


@pytest.mark.parametrize(("regime", "facts"), hub.FAULTS.items())
def test_a_fault_that_passes_unnoticed_makes_it_conditional(regime: str, facts: tuple[str, ...]) -> None:
    found = verdict(record(), changed({facts[0]: 0.0}, seed=1))
    assert found.verdict == "conditional"
    assert f"no error and other bytes when {regime}" in found.because
    assert "comparing with the hub's hashes finds every bit turned over" in found.because
    assert "does not find" in verdict(changed({"wire_noticed": 0.0, "wire_verified": 0.0})).because


def test_a_client_that_starts_from_nothing_is_told_and_makes_it_conditional() -> None:
    killed = verdict(record(), changed({"killed_bytes_again": float(hub.KILLED_AT)}, seed=1))
    assert killed.verdict == "conditional"
    assert "12 MiB (all that had arrived) after the download was killed" in killed.because
    assert killed.because.endswith("; not so that a killed download is gone on with")
    made = record(seed=1)
    series = {**made.series, "resumed_at_bytes": [0.0] * len(AT)}
    from_nothing = verdict(record(), make_record(made.spec, figures=made.figures, series=series))
    assert from_nothing.verdict == "conditional"
    assert from_nothing.because.endswith("; not so that a broken connection is gone on with")
    assert "nothing to find fault with: supported" in from_nothing.control


@pytest.mark.parametrize("fact", hub.MOVED)
def test_where_main_does_not_move_nothing_is_shown(fact: str) -> None:
    found = verdict(changed({fact: 0.0}))
    assert found.verdict == "inconclusive"
    assert "main did not move" in found.because


def test_the_public_hub_can_refute_and_one_that_was_not_reached_is_counted() -> None:
    facts = dict.fromkeys([*CORE, *hub.MOVED], 1.0)
    reached = make_record(record("public").spec, figures=facts)
    assert verdict(record(), reached).verdict == "supported"
    other = make_record(record("public").spec, figures=facts | {"cold_bytes_equal": 0.0})
    assert verdict(record(), other).verdict == "refuted"
    failed = make_record(record("public").spec, status="failed", figures={}, message="the public hub does not give it")
    found = verdict(record(), failed)
    assert (found.verdict, found.unsuccessful) == ("supported", 1)


def test_what_is_kept_of_a_broken_download_lies_under_what_had_arrived() -> None:
    lines = hub.resumed_lines(Evidence([record()]))
    assert list(lines["arrived"].y) == [2, 12, 22]
    assert list(lines["kept"].y) == [0, 10, 20]


def test_the_public_hub_is_asked_only_where_the_profile_names_repositories() -> None:
    sizes = {"train": 1, "validation": 1, "test": 1}
    profile = Profile.model_validate({"device": "cpu", "threads": 2, "tiny": {}, "data": sizes})
    params = hub.Params(seeds=2, large_mib=(4,))
    names = ["loopback-seed0", "loopback-seed1", "ignores-revisions", "never-moves"]
    assert [spec.name for spec in hub.trials(params, profile)] == names
    named = params.model_copy(update={"public": hub.Public(model="a/b", data_set="c/d")})
    assert [spec.name for spec in hub.trials(named, profile)] == [*names, "public"]
