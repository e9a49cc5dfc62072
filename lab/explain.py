"""The page on one claim that `lab explain` prints."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator

from lab.claims import Experiment, Verdict
from lab.errors import unknown
from lab.progress import effect
from lab.replication import of_others
from lab.study import Study

WIDTH = 100


def page(study: Study, claim_id: str) -> str:
    """Statement, verdict with its figures, plots, scope, where the rule flips, advice and the command that runs it again.

    Raises:
        LabError: there is no such claim.
    """
    claims = study.registry.claims
    if claim_id not in claims:
        raise unknown("claim", claim_id, claims)
    experiment, claim = claims[claim_id]
    found = [verdict for verdict in study.verdicts if verdict.claim == claim_id]
    blocks = [f"{claim_id} (lecture {claim.lecture})\n", *_field("Claim", claim.statement)]
    blocks += _field("Counts as true", claim.threshold)
    for verdict in found:
        blocks += ["\n", *_verdict(study, verdict)]
    if not found:
        blocks += [
            "\n",
            *_field("Verdict", f"not run: the profile {study.workspace.profile} has no {claim.tiers[0]} tier"),
        ]
    return "".join([*blocks, "\n", *_where(study, experiment, found)])


def _verdict(study: Study, verdict: Verdict) -> Iterator[str]:
    """What one tier's records say."""
    yield from _field("Verdict", f"{verdict.verdict}, in the {verdict.tier} tier of the profile {verdict.profile}")
    if verdict.effect is not None:
        yield from _field("Figures", f"{effect(verdict)} (n = {verdict.n})")
    others = [f"{v.profile}: {v.verdict}, {effect(v)} (n = {v.n})" for v in of_others(study, verdict)]
    if others:
        yield from _field("Elsewhere", "; ".join(others))
    yield from _field("Because", verdict.because)
    yield from _field("Where it flips", flips(study, verdict))
    yield from _field("Scope", verdict.scope)
    if verdict.control != "not run":
        yield from _field("Check", f"the same judge on planted faults and known answers says: {verdict.control}")
    if verdict.unsuccessful:
        yield from _field("Beware", f"{verdict.unsuccessful} trials gave no result; the verdict counts them as missing")
    yield from _field("Advice", verdict.advice)


def flips(study: Study, verdict: Verdict) -> str:
    """Where the rule changes its truth: within the evidence of one tier, between two tiers, or nowhere that was measured.

    The condition is the judge's where it has found one. A judge that decides nothing may know a part of it.
    """
    others = [v for v in study.verdicts if v.claim == verdict.claim and v.tier != verdict.tier and v.effect is not None]
    answers = [f"in the {v.tier} tier it is {v.verdict}" for v in others if v.verdict != verdict.verdict]
    if verdict.verdict in ("inconclusive", "not run"):
        known = f"; as far as it goes: {verdict.flips}" if verdict.flips else ""
        return "; ".join([f"not known: the evidence does not decide{known}", *answers])
    if verdict.flips:
        answers.insert(0, verdict.flips)
    elif verdict.verdict == "conditional":
        answers.insert(0, "within what was measured: true in one regime and false in another, both named above")
    return "; ".join(answers) or "nowhere in the regimes that were measured; outside them it was not tried"


def _where(study: Study, experiment: Experiment, found: list[Verdict]) -> Iterator[str]:
    """Plots, records, code and command."""
    root = study.workspace.root
    for path in study.plots(experiment):
        yield from _field("Plot", str(path.relative_to(root)))
    count = sum(len(verdict.records) for verdict in found)
    if count:
        folder = (study.workspace.results / experiment.name).relative_to(root)
        yield from _field("Records", f"{folder} ({count})")
    yield from _field("Source", f"experiments/{experiment.name}.py")
    profile = study.workspace.profile
    planning = study.planning(experiment)
    if profile not in planning:  # what only a card can show, or none
        profile = next((name for name in ("cpu", "full", "gpu") if name in planning), profile)
    if study.has_other_code(experiment):
        yield from _field(
            "Code", "some of the records were measured by earlier code of the lab; run it again for today's"
        )
    if count:  # records that still hold are not measured again
        yield from _field("Run it again", f"rm -r {folder} &&")
    yield from _field("" if count else "Run it again", f"lab study {experiment.name} --profile {profile}")


def _field(name: str, text: str) -> Iterator[str]:
    indent = " " * 16
    yield textwrap.fill(text, WIDTH, initial_indent=f"{name:15} ", subsequent_indent=indent) + "\n"
