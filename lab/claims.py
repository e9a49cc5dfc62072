"""Claims and verdicts. A claim is a function from evidence to a verdict; this module knows no particular one.

An experiment module ends with `EXPERIMENT = Experiment(...)`. `discover` imports every module of a package and
collects them.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

from lab.errors import LabError, unknown
from lab.params import Profile, Section, parse
from lab.plots import Plot
from lab.records import Record
from lab.specs import Plan, templates
from lab.statistics import Answer, Interval

VerdictName = Literal["supported", "refuted", "conditional", "inconclusive", "not run"]
Tier = Literal["sim", "cpu", "gpu"]


class Evidence:
    """The records of one experiment, and of those that it reads, under one profile; and ways to pick from them."""

    def __init__(self, records: Iterable[Record]):
        self.records = list(records)

    def __len__(self) -> int:
        return len(self.records)

    def select(self, arm: str | None = None, **settings: Any) -> list[Record]:
        """The successful records of an arm whose settings have these values, in the order of their seeds.

        Raises:
            LabError: there is none, so that a judge never works on nothing.
        """
        found = [r for r in self.records if r.status == "ok" and self._matches(r, arm, settings)]
        if not found:
            wanted = ", ".join([f"arm {arm}"] * (arm is not None) + [f"{k} {v}" for k, v in settings.items()])
            raise MissingEvidence(f"no successful record with {wanted}")
        return self._in_order(found)

    def attempts(self, arm: str) -> list[Record]:
        """The records of an arm, those that gave no result too: what a sweep's rate is chosen from.

        Raises:
            LabError: there is none.
        """
        found = [r for r in self.records if r.spec.arm == arm]
        if not found:
            raise MissingEvidence(f"no record with arm {arm}")
        return self._in_order(found)

    def has(self, arm: str | None = None, **settings: Any) -> bool:
        """Whether `select` would find something."""
        return any(r.status == "ok" and self._matches(r, arm, settings) for r in self.records)

    def replace(self, arm: str, by: str) -> Evidence:
        """Evidence in which copies of the records of the arm `by` stand in for those of `arm`: a planted fault.

        Raises:
            MissingEvidence: there is no record of `by`.
        """
        moved = [r.model_copy(update={"spec": r.spec.model_copy(update={"arm": arm})}) for r in self.select(by)]
        return Evidence([r for r in self.records if r.spec.arm != arm] + moved)

    def with_figures(self, change: Callable[[Record], Mapping[str, float | None]]) -> Evidence:
        """Evidence in which each record has the figures that `change` gives it beside or in place of its own.

        For controls: a planted fault, or a known answer. A record for which `change` gives {} stays as it is, and so does
        that of a trial that did not succeed: `change` is not asked.
        """
        return Evidence(
            r.model_copy(update={"figures": {**r.figures, **change(r)}}) if r.status == "ok" else r
            for r in self.records
        )

    @property
    def unsuccessful(self) -> list[Record]:
        """The records of trials that ran out of memory, diverged or failed."""
        return [r for r in self.records if r.status != "ok"]

    @staticmethod
    def _in_order(found: Iterable[Record]) -> list[Record]:
        return sorted(found, key=lambda r: (r.setting("seed") or 0, r.spec.name))

    @staticmethod
    def _matches(record: Record, arm: str | None, settings: Mapping[str, Any]) -> bool:
        if arm is not None and record.spec.arm != arm:
            return False
        return all(record.setting(name) == value for name, value in settings.items())


class MissingEvidence(LabError):
    """A judge asked for records that are not there; the verdict is then `not run` or `inconclusive`."""


DECIDED: tuple[VerdictName, ...] = ("supported", "refuted", "conditional")

UNFIT = (LabError, ValueError, LookupError, ArithmeticError)
"""What a judge runs into on part of the evidence: no such record or figure, an unpaired seed, a division by nothing."""


@dataclass(frozen=True)
class Finding:
    """What a judge concludes from the evidence: the verdict, its number with the interval, and why."""

    verdict: VerdictName
    effect: float | None
    low: float | None
    high: float | None
    unit: str
    n: int
    because: str
    records: tuple[str, ...] = ()
    flips: str = ""
    """The condition under which the rule changes its truth, with units, where the judge has found one."""

    @classmethod
    def of(cls, verdict: VerdictName, interval: Interval, unit: str, because: str, flips: str = "") -> Finding:
        """A finding whose number is an interval."""
        return cls(verdict, interval.estimate, interval.low, interval.high, unit, interval.n, because, flips=flips)


def over_regimes(holds: Iterable[bool]) -> VerdictName:
    """`supported` if a claim holds in every regime, `refuted` if in none, `conditional` otherwise."""
    holds = list(holds)
    return "supported" if all(holds) else "conditional" if any(holds) else "refuted"


def over_answers(answers: Iterable[Answer]) -> VerdictName:
    """The verdict over cells: `conditional` if the claim holds in one and not in another, `inconclusive` if none decides it."""
    given = set(answers)
    if {"yes", "no"} <= given:
        return "conditional"
    if given == {"yes"}:
        return "supported"
    return "refuted" if given == {"no"} else "inconclusive"


@dataclass(frozen=True)
class Cell:
    """One regime of a claim: what was found there, and whether the claim holds there."""

    name: str
    interval: Interval
    answer: Answer


def in_words(title: str, cells: Sequence[Cell], form: Callable[[Interval], str]) -> str:
    """The cells by answer, each with its interval in the form given."""
    parts = []
    for answer in ("yes", "no", "undecided"):
        found = [f"{c.name} {form(c.interval)}" for c in cells if c.answer == answer]
        parts += [f"{answer}: {', '.join(found)}"] if found else []
    return f"{title} ({'; '.join(parts)})"


@dataclass(frozen=True)
class Control:
    """Evidence with a fault planted in it, or with the answer known, and what a judge that can be trusted says of it."""

    change: Callable[[Evidence], Evidence]
    gives: VerdictName | tuple[VerdictName, ...]
    needs: tuple[str, ...] = ()
    """Arms without whose records it is `not run`; `change` may ask for others."""

    @property
    def given(self) -> tuple[VerdictName, ...]:
        """The verdicts that are right."""
        return (self.gives,) if isinstance(self.gives, str) else self.gives


@dataclass(frozen=True)
class Claim:
    """A statement that can be wrong, with everything that was fixed before its evidence."""

    id: str
    statement: str
    lecture: str
    tiers: tuple[Tier, ...]
    threshold: str
    scope: str
    judge: Callable[[Evidence], Finding]
    controls: Mapping[str, Control]
    """By name: planted faults, and evidence with the answer known. Each must be judged as it declares."""
    advice: Mapping[str, str]
    """One line for someone with one GPU, by verdict: while the evidence does not decide, too."""
    stated: Mapping[str, VerdictName] = field(default_factory=dict)
    """The verdict that the committed evidence gave, by profile, and under `sim` that of the sim tier in any profile; a
    test compares, so that a change is noticed."""


@dataclass(frozen=True)
class Experiment:
    """One file under `experiments/`: the claims of a family and the trials that they need."""

    name: str
    title: str
    params: type[Section]
    trials: Callable[[Any, Profile], Plan]
    claims: tuple[Claim, ...]
    plots: tuple[Plot, ...] = ()
    reads: tuple[str, ...] = ()
    """Other experiments whose records the judges see too."""

    def plan(self, profile: Profile, where: str) -> Plan:
        """What this experiment wants under a profile ([] where the profile leaves it out)."""
        raw = profile.experiments().get(self.name)
        if raw is None:
            return []
        specs = self.trials(parse(self.params, raw, f"{where}.{self.name}"), profile)
        names = [name for item in specs for name in sorted({spec.name for spec in templates([item])})]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise LabError(
                f"experiments/{self.name}.py: two trials are called '{repeated[0]}'. Give each its own name."
            )
        return specs


@dataclass(frozen=True)
class Verdict:
    """A claim's verdict under one profile, as `lab verdicts --json` prints it."""

    claim: str
    experiment: str
    tier: str
    profile: str
    verdict: VerdictName
    effect: float | None
    low: float | None
    high: float | None
    unit: str
    n: int
    threshold: str
    scope: str
    advice: str
    because: str
    control: str
    unsuccessful: int
    records: tuple[str, ...] = ()
    flips: str = ""
    """The condition that the judge has found; "" where it names none. `lab explain` prints it."""


@dataclass(frozen=True)
class Registry:
    """All experiments, by name."""

    experiments: Mapping[str, Experiment]

    @cached_property
    def claims(self) -> dict[str, tuple[Experiment, Claim]]:
        """Every claim with its experiment, by id.

        Raises:
            LabError: two experiments claim the same id.
        """
        found: dict[str, tuple[Experiment, Claim]] = {}
        for experiment in self.experiments.values():
            for claim in experiment.claims:
                if claim.id in found:
                    raise LabError(f"claim '{claim.id}' is in two experiments. Give each its own id.")
                found[claim.id] = (experiment, claim)
        return found

    def experiment(self, name: str) -> Experiment:
        """The experiment called `name`."""
        if name not in self.experiments:
            raise unknown("experiment", name, self.experiments)
        return self.experiments[name]

    def check_profile(self, profile: Profile, where: str) -> None:
        """Every section of the profile belongs to an experiment, and is right.

        Raises:
            LabError: a key that nobody knows, or a wrong value.
        """
        for name in profile.experiments():
            if name not in self.experiments:
                known = [*Profile.model_fields, *self.experiments]
                raise unknown("key", name, known, f"{where}: ")
            self.experiments[name].plan(profile, where)


def discover(package: str = "experiments") -> Registry:
    """Import every module of `package` that has an EXPERIMENT; in the order of the lecture."""
    try:
        root = importlib.import_module(package)
    except ModuleNotFoundError:
        raise LabError(
            f"no package '{package}' here. Run lab in the folder of the study (where {package}/ is)."
        ) from None
    found = {}
    for info in pkgutil.iter_modules(root.__path__):
        experiment = getattr(importlib.import_module(f"{package}.{info.name}"), "EXPERIMENT", None)
        if experiment is not None:
            found[experiment.name] = experiment
    return Registry(dict(sorted(found.items(), key=lambda item: (min(c.lecture for c in item[1].claims), item[0]))))


def in_tier(records: Iterable[Record], tier: Tier) -> list[Record]:
    """The records that are evidence for the sim tier, or for that of the device."""
    return [record for record in records if (record.spec.tier == "sim") == (tier == "sim")]


def judge(
    experiment: Experiment, claim: Claim, profile: str, tier: Tier, records: list[Record], planned: int
) -> Verdict:
    """The verdict of a claim on one tier's records of a profile, and what the same judge says of its controls.

    A verdict stands only if the controls show that the check can be trusted; they run where nothing is decided, too.
    """
    records = in_tier(records, tier)
    evidence = Evidence(records)
    control = "not run"
    if tier not in claim.tiers:
        finding = _no_finding("not run", f"this claim has no {tier} tier")
    elif not records:
        nothing = f"nothing has been measured under the profile {profile}"
        finding = _no_finding("not run", nothing if planned else f"the profile {profile} plans no trial of it")
    else:
        finding = _find(claim, evidence)
        answers = judge_controls(claim, evidence)
        control = ", ".join(f"{name}: {answer}" for name, answer in answers.items()) or "none"
        fault = distrust(claim, finding.verdict, answers)
        if fault and finding.verdict in DECIDED:
            finding = _no_finding("inconclusive", f"the check is not to be trusted ({fault})")
    missing = planned - len(records)
    because = finding.because + (f"; {missing} of {planned} trials are missing" if records and missing > 0 else "")
    return Verdict(
        claim=claim.id,
        experiment=experiment.name,
        tier=tier,
        profile=profile,
        verdict=finding.verdict,
        effect=finding.effect,
        low=finding.low,
        high=finding.high,
        unit=finding.unit,
        n=finding.n,
        threshold=claim.threshold,
        scope="; ".join([claim.scope, *_measured_on(records)]),
        advice=_advice(claim, finding.verdict),
        because=because,
        control=control,
        unsuccessful=len(evidence.unsuccessful),
        records=finding.records or tuple(f"{r.spec.experiment}/{r.spec.name}" for r in records),
        flips=finding.flips,
    )


def _advice(claim: Claim, verdict: VerdictName) -> str:
    """The line for a verdict; one that a judge was not written to give leaves a person where nothing is decided, and so
    does one that was not run."""
    return claim.advice.get(verdict, claim.advice["inconclusive"])


def judge_controls(claim: Claim, evidence: Evidence) -> dict[str, VerdictName]:
    """What the claim's judge says of each of its controls; `not run` where a control's own records are missing."""
    return {name: _find(claim, evidence, control).verdict for name, control in claim.controls.items()}


def distrust(claim: Claim, verdict: VerdictName, answers: Mapping[str, VerdictName]) -> str:
    """Why the answers to a claim's controls do not let its verdict stand; "" if they do.

    Every control whose own records are there must be judged as it declares. Among them must be a planted fault, and one that
    is judged otherwise than the evidence: a fault alone says nothing of `refuted`, a known answer alone nothing of a fault.
    """
    ran = {name: answer for name, answer in answers.items() if answer != "not run"}
    for name, answer in ran.items():
        given = claim.controls[name].given
        if answer not in given:
            return f"control {name} gave {answer}, should give {' or '.join(given)}"
    if not any(answer in ("refuted", "conditional") for answer in ran.values()):
        return "no planted fault could be tried"
    if all(answer in (verdict, "inconclusive") for answer in ran.values()):
        return f"every control gave {verdict} too"
    return ""


def _find(claim: Claim, evidence: Evidence, control: Control | None = None) -> Finding:
    """Judge the evidence, or what a control makes of it; evidence that is missing or odd is a finding and no crash."""
    if control is not None:
        try:
            for arm in control.needs:
                evidence.select(arm)
            evidence = control.change(evidence)
        except UNFIT as error:
            return _no_finding("not run", _reason(error))
    try:
        return claim.judge(evidence)
    except UNFIT as error:
        return _no_finding("inconclusive", _reason(error))


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, (LabError, ValueError)) else f"{type(error).__name__}: {error}"


def _no_finding(verdict: VerdictName, because: str) -> Finding:
    return Finding(verdict, None, None, None, "", 0, because)


def _measured_on(records: list[Record]) -> list[str]:
    """Device and versions, for the scope."""
    if not records:
        return []
    origin = records[0].provenance
    devices = sorted({r.provenance.device for r in records})
    versions = ", ".join(f"{n} {origin.versions[n]}" for n in ("torch", "transformers", "peft") if n in origin.versions)
    return [f"{' and '.join(devices)}, {origin.threads} threads", versions]
