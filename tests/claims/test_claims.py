"""The claims as tests: each is judged on the committed evidence, under every profile that has some."""

from __future__ import annotations

import json
from dataclasses import asdict
from statistics import fmean

import pytest

from experiments.in_context import table as in_context_table
from experiments.optimizers import table as optimizer_table
from experiments.training_cost import quality_memory_time
from lab.claims import Evidence, Experiment, distrust, in_tier, judge_controls
from lab.progress import markdown_row
from lab.study import OTHER_CODE, Study, elsewhere, tidy
from lab.sweeps import at_best
from tests.conftest import ROOT

CPU = Study.load("cpu", ROOT)
REGISTRY = CPU.registry
PROFILES = [name for name in ("cpu", "full") if (ROOT / "results" / name).is_dir()]
PROFILES += elsewhere(ROOT / "results", CPU.params)


@pytest.fixture(scope="module", params=PROFILES)
def study(request: pytest.FixtureRequest) -> Study:
    return Study.load(request.param, ROOT)


def skip_what_has_not_run(study: Study, experiment: Experiment) -> None:
    """An experiment without evidence under a profile says so, and is left out."""
    if not study.evidence(experiment.name)[0]:
        verdicts = {verdict.verdict for verdict in study.verdicts if verdict.experiment == experiment.name}
        judged = any(study.tier in claim.tiers or claim.tiers == ("gpu",) for claim in experiment.claims)
        assert verdicts == ({"not run"} if judged else set())  # of another machine what is simulated is not judged
        pytest.skip(f"{experiment.name} has not run under the profile {study.workspace.profile}")


@pytest.mark.parametrize("claim_id", list(REGISTRY.claims))
def test_the_committed_evidence_gives_the_stated_verdict(claim_id: str, study: Study) -> None:
    experiment, claim = REGISTRY.claims[claim_id]
    profile = study.workspace.profile
    renew = f"Renew it: make study PROFILE={profile}"
    skip_what_has_not_run(study, experiment)
    reads = [name for name in experiment.reads if study.evidence(name)[0]]  # one that has not run says so itself
    reasons = [reason for name in (experiment.name, *reads) for reason in study.stale(REGISTRY.experiment(name))]
    # The others take hours: what earlier code has measured stays, and FINDINGS.md names it.
    if study.workspace.label != "cpu":
        reasons = [reason for reason in reasons if not reason.endswith(OTHER_CODE)]
    assert not reasons, f"results/{profile}/{experiment.name} is stale: {'; '.join(reasons[:3])}. {renew}"
    for verdict in [verdict for verdict in study.verdicts if verdict.claim == claim_id]:
        if verdict.tier not in study.tiers:  # only a GPU can show it
            assert verdict.verdict == "not run"
            continue
        stated = claim.stated.get("sim" if verdict.tier == "sim" else profile)
        if study.workspace.device and (stated is None or study.tier == "cpu"):
            continue  # nobody promises how far a lent GPU comes, nor that another processor finds the same
        assert verdict.verdict == stated, (
            f"{claim_id}, tier {verdict.tier}: stated {stated}, judged {verdict.verdict}: effect {verdict.effect} "
            f"[{verdict.low}, {verdict.high}] {verdict.unit}, n = {verdict.n}, threshold: {verdict.threshold}; "
            f"{verdict.because}. {renew}"
        )


@pytest.mark.parametrize("claim_id", list(REGISTRY.claims))
def test_every_control_is_judged_as_it_declares_and_a_planted_fault_otherwise_than_the_evidence(
    claim_id: str, study: Study
) -> None:
    experiment, claim = REGISTRY.claims[claim_id]
    skip_what_has_not_run(study, experiment)
    for tier in [tier for tier in study.tiers if tier in claim.tiers]:
        evidence = Evidence(in_tier(study.all_evidence(experiment), tier))
        answers = judge_controls(claim, evidence)
        if {*answers.values()} == {"not run"}:
            missing = [name for name in experiment.reads if not study.evidence(name)[0]]
            assert missing or study.workspace.device, f"{claim_id}: no control can be tried on its evidence"
            pytest.skip(f"{claim_id}: what its controls need has not run under {study.workspace.profile}")
        verdict = claim.judge(evidence).verdict
        if study.workspace.device and study.tier == "gpu" and verdict == "inconclusive":
            pytest.skip(f"{claim_id}: what has come from this GPU so far decides nothing")
        fault = distrust(claim, verdict, answers)
        assert not fault, f"{claim_id}, tier {tier}, is {verdict}: {fault}"


@pytest.mark.parametrize("claim_id", list(REGISTRY.claims))
def test_the_records_of_a_claim_name_one_digest_of_each_model(claim_id: str, study: Study) -> None:
    experiment, _ = REGISTRY.claims[claim_id]
    found: dict[str, dict[str, str]] = {}
    for record in study.all_evidence(experiment):
        for name in record.spec.models():
            digest = record.provenance.inputs.get(name, "")
            found.setdefault(name, {}).setdefault(digest, f"{record.spec.experiment}/{record.spec.name}")
    mixed = {name: digests for name, digests in found.items() if len(digests) > 1}
    assert not mixed, f"{claim_id} compares what started from different weights: {mixed}"


@pytest.mark.parametrize("claim_id", list(REGISTRY.claims))
def test_every_record_says_where_it_comes_from(claim_id: str, study: Study) -> None:
    experiment, _ = REGISTRY.claims[claim_id]
    for record in study.evidence(experiment.name)[0]:
        origin = record.provenance
        assert not origin.dirty, f"{record.spec.name} was measured from a dirty tree"
        assert not origin.synthetic, f"{record.spec.name} is synthetic"
        assert len(origin.commit) == 40
        assert origin.driver or not (study.tier == "gpu" and origin.device_memory_bytes)
        assert origin.versions["torch"] != "absent"


def test_evidence_is_there_for_the_default_profile() -> None:
    assert "cpu" in PROFILES, "results/cpu is missing. Measure it: make study"


def test_the_written_verdicts_are_those_of_the_records(study: Study) -> None:
    folder = study.workspace.results
    written = json.loads((folder / "verdicts.json").read_text())
    judged = json.loads(json.dumps(tidy([asdict(verdict) for verdict in study.verdicts])))
    other = [row["claim"] for row in judged if row not in written] + [
        row["claim"] for row in written if row not in judged
    ]
    assert not other, (
        f"{folder}/verdicts.json says otherwise of {', '.join(dict.fromkeys(other))}. Run: dvc repro verdicts"
    )


def test_the_findings_name_what_earlier_code_has_measured(study: Study) -> None:
    lines = (ROOT / "FINDINGS.md").read_text(encoding="utf-8").splitlines()
    name, earlier = study.workspace.label, study.by_other_code()
    found = [line for line in lines if line.startswith(f"- Earlier code, profile `{name}`: ")]
    wanted = [f"- Earlier code, profile `{name}`: {', '.join(earlier)}"] if earlier else []
    assert found == wanted, f"FINDINGS.md should say: {wanted or 'nothing'}"


@pytest.mark.parametrize(("page", "profile"), [("README.md", "cpu"), ("FINDINGS.md", "full")])
def test_the_pages_show_the_verdicts_of_their_profile(page: str, profile: str) -> None:
    lines = (ROOT / page).read_text(encoding="utf-8").splitlines()
    missing = [row for row in map(markdown_row, Study.load(profile, ROOT).verdicts) if row not in lines]
    rows = "\n".join(missing)
    assert not missing, f"{page} lacks rows. Print them: lab verdicts --profile {profile} --markdown\n{rows}"


def test_the_readme_shows_the_methods_side_by_side() -> None:
    study = Study.load("cpu", ROOT)
    evidence = Evidence(study.all_evidence(REGISTRY.experiment("training_cost")))
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for method, line in quality_memory_time(evidence).items():
        best = at_best(evidence.attempts(f"tiny-{method}"))
        kept, bits = (fmean(r.figure(name) for r in best) for name in ("recall", "general_bits_per_byte"))
        rate = best[0].setting("learning_rate")
        assert line.area is not None
        row = f"| {method} | {rate:g} | {line.x[0]:.1f} | {line.area[0]:.2f} | {line.y[0]:.2f} | {kept:.2f} | {bits:.2f} |"
        assert row in readme, f"README.md has no row '{row}'"


def test_the_findings_show_the_methods_on_both_processors() -> None:
    findings = (ROOT / "FINDINGS.md").read_text(encoding="utf-8")
    found: dict[str, list[str]] = {}
    for name in ("cpu", "cpu-epyc"):
        evidence = Evidence(Study.load(name, ROOT).evidence("peft_vs_full")[0])
        for arm in dict.fromkeys(r.spec.arm for r in evidence.records if r.spec.arm != "tiny-base"):
            best = at_best(evidence.attempts(arm))
            scores = [fmean(r.figure(figure) for r in best) for figure in ("test_accuracy", "recall")]
            cells = [f"{best[0].setting('learning_rate'):g}", *(f"{score:.2f}" for score in scores)]
            found.setdefault(arm.removeprefix("tiny-"), []).extend(cells)
    assert len(found) == 10
    for method, cells in found.items():
        row = " | ".join([f"| {method}", *cells]) + " |"
        assert row in findings, f"FINDINGS.md has no row '{row}'"


def test_the_readme_shows_the_methods_on_smollm2() -> None:
    evidence = Evidence(Study.load("full", ROOT).evidence("peft_vs_full")[0])
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    arms = {r.spec.arm for r in evidence.records if r.spec.arm.startswith("smol-")} - {"smol-base"}
    assert len(arms) == 10
    for arm in arms:
        best = at_best(evidence.attempts(arm))
        names = ("test_accuracy", "recall", "general_bits_per_byte")
        accuracy, kept, bits = (fmean(r.figure(name) for r in best) for name in names)
        rate = best[0].setting("learning_rate")
        row = f"| {arm.removeprefix('smol-')} | {rate:g} | {accuracy:.2f} | {kept:.2f} | {bits:.2f} |"
        assert row in readme, f"README.md has no row '{row}'"


def test_the_findings_show_every_optimizer_that_runs() -> None:
    evidence = Evidence(in_tier(Study.load("cpu", ROOT).evidence("optimizers")[0], "cpu"))
    findings = (ROOT / "FINDINGS.md").read_text(encoding="utf-8")
    lines = optimizer_table(evidence)
    assert "\n" + "\n".join(lines) + "\n\n" in findings, "FINDINGS.md's table of optimizers should be:\n" + "\n".join(
        lines
    )


def test_the_findings_show_every_number_of_worked_examples() -> None:
    lines = in_context_table(Evidence(Study.load("cpu", ROOT).evidence("in_context")[0]))
    findings = (ROOT / "FINDINGS.md").read_text(encoding="utf-8")
    table = "\n".join(lines)
    assert "\n" + table + "\n\n" in findings, f"FINDINGS.md's table of worked examples should be:\n{table}"


def test_the_readme_shows_every_peak_that_was_measured_and_predicted() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found, _ = Study.load("cpu", ROOT).evidence("peak_memory")
    peaks = {record.spec.name: int(record.figure("peak_bytes")) for record in found if "peak_bytes" in record.figures}
    measured = {n.removeprefix("measured-"): peak for n, peak in peaks.items() if n.startswith("measured-")}
    assert measured
    for name, peak in measured.items():
        predicted = peaks[f"predicted-{name}"]
        row = f"| {name} | {peak:,} | {predicted:,} | {100 * (predicted / peak - 1):.4f} % |"
        assert row in readme, f"README.md has no row '{row}'"
    assert readme.count("| llama-") == len(measured)
