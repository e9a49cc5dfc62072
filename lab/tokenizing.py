"""The trial in which a model reads the same text through its own tokenizer and through others.

Tokens of two tokenizers cannot be compared, bytes of text can: everything is per byte of UTF-8, or per character.
"""

from __future__ import annotations

import functools
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import set_seed

from lab import evaluation
from lab.corpus import KEEPERS_LOG, general_prose, task_examples, train_tokenizer
from lab.data import english_prose
from lab.evaluation import IGNORED, Row
from lab.models import load_model, load_tokenizer
from lab.pages import KOREAN, PAGES
from lab.runners import Outcome
from lab.specs import Tokenizing
from lab.workspace import Workspace

LARGEST = 1536
"""Pieces of a tokenizer that is trained here: as many as the small model's own has, and as its texts give."""

LOG_ENTRIES = 300
"""Entries of keepers' logs that a tokenizer is trained on, beside real prose and the Korean page."""


@dataclass(frozen=True)
class Cut:
    """A way from text to the token ids that a model is given.

    `pieces` are those of the tokenizer that cut the text, in the alphabet of byte-level BPE.
    """

    pieces: Callable[[str], list[str]]
    ids: Callable[[list[str]], list[int]]

    def __call__(self, text: str) -> list[int]:
        """The token ids of a text."""
        return self.ids(self.pieces(text))


def make_cut(name: str, own: Any, seed: int) -> Cut:
    """One of four ways to cut and number a text.

    own: as the model's tokenizer does.
    permuted: cut alike, the ids of ordinary pieces exchanged at random: a right vocabulary, wrongly assigned.
    retrained: cut and numbered by a tokenizer of the same kind and size that was trained on other text.
    borrowed: cut by that tokenizer, numbered by the model's own: the cut alone is foreign. A piece that the model does not
        have is spelt in bytes.
    """
    vocabulary: dict[str, int] = own.get_vocab()
    if name in ("own", "permuted"):
        numbers = dict(vocabulary)
        if name == "permuted":
            ordinary = sorted(set(vocabulary) - set(own.all_special_tokens) - set(own.get_added_vocab()))
            shuffled = random.Random(f"permutation {seed}").sample(ordinary, len(ordinary))
            numbers |= {piece: vocabulary[other] for piece, other in zip(ordinary, shuffled, strict=True)}
        return Cut(own.tokenize, lambda pieces: [numbers[piece] for piece in pieces])
    other = other_tokenizer(min(LARGEST, len(vocabulary)), seed)
    if name == "retrained":
        return Cut(other.tokenize, other.convert_tokens_to_ids)

    def spelt(pieces: list[str]) -> list[int]:
        known = [[piece] if piece in vocabulary else list(piece) for piece in pieces]
        return [vocabulary[part] for parts in known for part in parts]

    return Cut(other.tokenize, spelt)


@functools.lru_cache(maxsize=1)
def other_tokenizer(vocabulary: int, seed: int) -> Any:
    """A byte-level BPE of `vocabulary` pieces of text that is not the model's: keepers' logs, real prose, Korean."""
    log = [example.prompt + example.completion for example in task_examples(KEEPERS_LOG, "train", LOG_ENTRIES, seed)]
    prose = english_prose(12, 3000)
    texts = [*log, *prose, *KOREAN]
    return train_tokenizer(random.Random(f"texts {seed}").sample(texts, len(texts) * 4 // 5), vocabulary)


def read(settings: Tokenizing, workspace: Workspace) -> Outcome:
    """Score the pages, and for a model that was pretrained on stories held-out stories, through each tokenizer.

    Figures, for each of `settings.cuts` and each text (`english`, `korean`, `stories`):
        {cut}_{text}_bits_per_byte: cross-entropy of all tokens over the bytes of the text.
        {cut}_{text}_tokens_per_byte, {cut}_{text}_tokens_per_character: of the scored paragraphs, as the model gets them.
        {cut}_{text}_fallback_share: share of the tokens that are part of a character.
        start_bits_per_byte: of the stories with the model's own tokenizer.
        trained_{cut}_bits_per_byte: of the stories after `settings.updates` of full fine-tuning on other stories from the
            base, with embeddings drawn anew, the same documents in the same order for each; `trained_kept` is the model's own
            tokenizer with its embeddings kept.
    Series:
        {text}_tokens, {text}_characters, {text}_bytes: of every paragraph with the model's own tokenizer.

    Raises:
        LabError: an unknown or unprepared model.
    """
    folder = workspace.model(settings.model)
    own = load_tokenizer(folder)
    load = functools.partial(
        load_model, settings.model, folder, precision=settings.precision, seed=settings.seed, device=settings.device
    )
    model = load()
    outcome = Outcome(tags={"model": settings.model})
    for name, page in PAGES.items():
        outcome.series |= {
            f"{name}_tokens": [len(own.tokenize(text)) for text in page],
            f"{name}_characters": [len(text) for text in page],
            f"{name}_bytes": [len(text.encode()) for text in page],
        }
    texts: dict[str, Sequence[str]] = {name: page[: settings.paragraphs] for name, page in PAGES.items()}
    if settings.model == "tiny":
        texts["stories"] = general_prose(settings.paragraphs, settings.seed, "test")
    for cut_name in settings.cuts:
        cut = make_cut(cut_name, own, settings.seed)
        for name, documents in texts.items():
            figures = cut_figures(cut, documents)
            figures["bits_per_byte"] = bits_per_byte(model, cut, documents, own.eos_token_id)
            outcome.figures |= {f"{cut_name}_{name}_{key}": value for key, value in figures.items()}
    if not settings.updates:
        return outcome
    training = {"kept": "own", "own": "own", "retrained": "retrained"}
    for name, kind in training.items():
        cut = make_cut(kind, own, settings.seed)
        model = load()
        if name != "kept":
            redraw_embeddings(model, settings.seed)
        losses = train(model, cut, own.eos_token_id, settings)
        if not all(map(math.isfinite, losses)):
            outcome.diverged = f"a training loss with the tokenizer '{name}' is not finite"
            return outcome
        outcome.series[f"{name}_train_bits_per_byte"] = losses
        outcome.figures[f"trained_{name}_bits_per_byte"] = bits_per_byte(model, cut, texts["stories"], own.eos_token_id)
    return outcome


def document_row(cut: Cut, text: str, end: int) -> Row:
    """A document behind the end of another, every token of it labelled, so that each byte is counted once."""
    ids = cut(text)
    return Row([end, *ids], [IGNORED, *ids])


def bits_per_byte(model: Any, cut: Cut, documents: Sequence[str], end: int) -> float:
    """What a byte of the documents costs the model when they are cut so."""
    return evaluation.bits_per_byte(model, [document_row(cut, text, end) for text in documents], documents)


def cut_figures(cut: Cut, documents: Sequence[str]) -> dict[str, float]:
    """How many tokens a byte and a character get, and which share of the tokens is a part of a character."""
    tokens = sum(len(cut(text)) for text in documents)
    pieces = [piece for text in documents for piece in cut.pieces(text)]
    return {
        "tokens_per_byte": tokens / sum(len(text.encode()) for text in documents),
        "tokens_per_character": tokens / sum(map(len, documents)),
        "fallback_share": sum(map(is_fragment, pieces)) / len(pieces),
    }


@functools.cache
def _bytes_of_letters() -> dict[str, int]:
    """The byte that each letter of the alphabet of byte-level BPE stands for (Radford et al. 2019)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + place): byte for place, byte in enumerate(others)}


def is_fragment(piece: str) -> bool:
    """Whether a piece of byte-level BPE is no whole text: it begins or ends inside a character."""
    letters = _bytes_of_letters()
    try:
        bytes(letters[letter] for letter in piece).decode()
    except UnicodeDecodeError:
        return True
    except KeyError:  # a special token
        return False
    return False


def redraw_embeddings(model: Any, seed: int) -> None:
    """Give the model embeddings that know no piece, at the scale of its initialisation; a tied head follows."""
    set_seed(seed)
    for layer in {model.get_input_embeddings(), model.get_output_embeddings()}:
        torch.nn.init.normal_(layer.weight, std=model.config.initializer_range)


def train(model: Any, cut: Cut, end: int, settings: Tokenizing) -> list[float]:
    """Train on stories for the settings' updates; the documents of an update do not depend on the cut.

    Returns:
        The loss of each update in bits per byte of its documents.
    """
    stories = general_prose(settings.updates * settings.batch, settings.seed, "train")
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.0)
    losses = []
    model.train()
    for update in range(settings.updates):
        documents = stories[update * settings.batch : (update + 1) * settings.batch]
        rows = [document_row(cut, text, end) for text in documents]
        longest = max(len(row.input_ids) for row in rows)
        ids = torch.tensor([row.input_ids + [end] * (longest - len(row.input_ids)) for row in rows])
        labels = torch.tensor([row.labels + [IGNORED] * (longest - len(row.labels)) for row in rows])
        # Padding comes last and a causal model never looks ahead: no mask is needed.
        loss = model(input_ids=ids.to(settings.device), labels=labels.to(settings.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        tokens = int((labels[:, 1:] != IGNORED).sum())
        size = sum(len(text.encode()) for text in documents)
        losses.append(float(loss.detach()) * tokens / math.log(2) / size)
    return losses
