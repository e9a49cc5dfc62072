"""The stages that make base models: a prepared folder has the model, its tokenizer, and the facts that it knows."""

from __future__ import annotations

from lab import data, evaluation, models, pretraining
from lab.errors import LabError
from lab.params import ModelsSection, Profile, parse
from lab.workspace import Workspace

LEAST_KNOWN = 20
"""Capitals that the real model must know, so that forgetting one moves recall by at most five points."""


def prepare_smol(section: ModelsSection, workspace: Workspace) -> None:
    """The real model, and which of the capitals it knows under two phrasings.

    Raises:
        LabError: it cannot be had, or knows too little to have something to forget.
    """
    folder = workspace.model("smol")
    models.prepare_smol(section, folder, workspace.downloads)
    model, tokenizer = models.load_model("smol", folder), models.load_tokenizer(folder)
    facts = data.capital_facts()
    answers = evaluation.recalls(model, evaluation.fact_rows(tokenizer, facts), facts)
    pretraining.write_facts(folder / pretraining.FACTS_FILE, facts, answers)
    known = sum(pretraining.is_known(answer) for answer in answers)
    print(f"smol: {sum(p.numel() for p in model.parameters()):,} parameters; knows {known} of {len(facts)} capitals")
    if section.source == "embedded" and known < LEAST_KNOWN:
        raise LabError(
            f"smol: knows {known} capitals; at least {LEAST_KNOWN} are needed. Delete {folder} and start again."
        )


def prepare_tiny(profile: Profile, workspace: Workspace) -> None:
    """The small model, pretrained until it knows its facts."""
    import torch

    torch.set_num_threads(profile.threads)
    recipe = tiny_recipe(profile, workspace)
    figures = pretraining.pretrain_tiny(recipe, workspace.model("tiny"))
    print(
        f"tiny: {figures['parameters']:,} parameters; knows {figures['known_share']:.1%} of {figures['facts']} facts "
        f"after {recipe.steps} steps in {figures['train_seconds']:.0f} s"
    )


def tiny_recipe(profile: Profile, workspace: Workspace) -> pretraining.TinyRecipe:
    """The profile's section `tiny`, checked."""
    return parse(pretraining.TinyRecipe, profile.tiny, f"params.yaml: profiles.{workspace.profile}.tiny")
