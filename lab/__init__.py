"""A reproducible experiment lab for fine-tuning large language models on one GPU.

The library knows no claim: it builds models and data, runs trials, keeps records, measures memory and does the
statistics. What is claimed, and what would refute it, is in `experiments/`.
"""

__version__ = "0.1.0"
