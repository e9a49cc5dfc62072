"""The experiments: one file per family of claims. Each reads top to bottom: claim, threshold, trials, judgement."""
