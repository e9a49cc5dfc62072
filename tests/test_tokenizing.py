"""Reading text through four tokenizers: each is what it says it is, and every byte is counted."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lab.corpus import general_prose
from lab.models import load_model, load_tokenizer
from lab.pages import ENGLISH, KOREAN
from lab.runners import execute
from lab.specs import Tokenizing
from lab.tokenizing import (
    LARGEST,
    Cut,
    bits_per_byte,
    cut_figures,
    document_row,
    is_fragment,
    make_cut,
    other_tokenizer,
    redraw_embeddings,
    train,
)
from lab.workspace import Workspace

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def own(tiny_workspace: Workspace) -> Any:
    return load_tokenizer(tiny_workspace.model("tiny"))


@pytest.mark.parametrize("text", [ENGLISH[0], KOREAN[0]])
def test_the_own_cut_is_the_tokenizer_itself(own: Any, text: str) -> None:
    assert make_cut("own", own, 0)(text) == own(text, add_special_tokens=False)["input_ids"]


def test_a_permutation_exchanges_ordinary_ids_and_keeps_the_cut_and_the_special_tokens(own: Any) -> None:
    mine, permuted = make_cut("own", own, 0), make_cut("permuted", own, 0)
    text = " ".join(ENGLISH)
    assert permuted.pieces(text) == mine.pieces(text)
    pairs = dict(zip(mine(text), permuted(text), strict=True))
    assert len(set(pairs.values())) == len(pairs)
    assert sum(a == b for a, b in pairs.items()) < len(pairs) / 5
    assert permuted.ids([own.eos_token]) == [own.eos_token_id]
    assert make_cut("permuted", own, 1)(text) != permuted(text)
    assert make_cut("permuted", own, 0)(text) == permuted(text)


@pytest.mark.parametrize("text", [ENGLISH[1], KOREAN[1]])
def test_a_borrowed_cut_says_the_same_text_in_the_models_own_pieces(own: Any, text: str) -> None:
    borrowed = make_cut("borrowed", own, 0)
    assert own.decode(borrowed(text)) == text
    assert borrowed.pieces(text) == other_tokenizer(len(own), 0).tokenize(text)


def test_a_retrained_tokenizer_is_of_the_same_size_and_draws_its_texts_by_the_seed(own: Any) -> None:
    assert len(other_tokenizer(len(own), 0)) == len(own)
    assert max(make_cut("retrained", own, 0)(KOREAN[0])) < len(own)
    first, second = (set(other_tokenizer(LARGEST, seed).get_vocab()) for seed in (0, 1))
    assert len(first) == len(second) == LARGEST
    assert first != second


def test_every_byte_of_a_document_is_counted_once(own: Any, tiny_workspace: Workspace) -> None:
    model = load_model("tiny", tiny_workspace.model("tiny")).eval()
    cut = make_cut("own", own, 0)
    texts = [KOREAN[2], "short"]
    nats = 0.0
    for text in texts:
        ids = [own.eos_token_id, *cut(text)]
        with torch.no_grad():
            logs = model(input_ids=torch.tensor([ids])).logits[0].double().log_softmax(-1)
        nats -= sum(float(logs[place, token]) for place, token in enumerate(ids[1:]))
    expected = nats / math.log(2) / sum(len(text.encode()) for text in texts)
    assert bits_per_byte(model, cut, texts, own.eos_token_id) == pytest.approx(expected, rel=1e-5)
    row = document_row(cut, texts[1], own.eos_token_id)
    assert row.labels[1:] == row.input_ids[1:] == cut(texts[1])


def test_tokens_per_byte_and_character_and_fragments_are_as_counted_by_hand() -> None:
    # The piece of a space and a syllable, a syllable cut in two, and a letter.
    syllable = "".join(chr(ord(c)) for c in "ê°Ģ")
    cut = Cut(lambda _: [f"Ġ{syllable}", syllable[:2], syllable[2], "a"], lambda pieces: list(range(len(pieces))))
    assert cut_figures(cut, [" 가가a"]) == {
        "tokens_per_byte": 0.5,
        "tokens_per_character": 1.0,
        "fallback_share": 0.5,
    }


@pytest.mark.parametrize(
    ("piece", "fragment"), [("Ġthe", False), ("a", False), ("ê°Ģ", False), ("ê°", True), ("Ģ", True), ("<|가|>", False)]
)
def test_a_fragment_is_a_piece_that_is_no_whole_text(piece: str, fragment: bool) -> None:
    assert is_fragment(piece) is fragment


def test_redrawn_embeddings_know_nothing_and_the_rest_stays(tiny_workspace: Workspace) -> None:
    folder = tiny_workspace.model("tiny")
    before, after = load_model("tiny", folder), load_model("tiny", folder)
    redraw_embeddings(after, 0)
    changed = {
        name
        for (name, a), (_, b) in zip(before.named_parameters(), after.named_parameters(), strict=True)
        if not torch.equal(a, b)
    }
    assert changed == {"model.embed_tokens.weight"}
    assert float(after.get_output_embeddings().weight.detach().std()) == pytest.approx(
        after.config.initializer_range, rel=0.05
    )


def test_every_cut_is_trained_on_the_same_documents(
    own: Any, tiny_workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def listening(text: str) -> list[str]:
        seen.append(text)
        return own.tokenize(text)

    settings = Tokenizing(model="tiny", updates=2, batch=3, learning_rate=1e-2)
    model = load_model("tiny", tiny_workspace.model("tiny"))
    losses = train(model, Cut(listening, own.convert_tokens_to_ids), own.eos_token_id, settings)
    assert seen == general_prose(6, 0, "train")
    assert len(losses) == 2
    start = load_model("tiny", tiny_workspace.model("tiny"))
    assert losses[0] == pytest.approx(
        bits_per_byte(start, make_cut("own", own, 0), seen[:3], own.eos_token_id), rel=1e-4
    )


def test_a_trial_leaves_every_figure_and_gives_the_same_again(tiny_workspace: Workspace) -> None:
    settings = Tokenizing(model="tiny", paragraphs=1, updates=1, batch=2, seed=3)
    outcome = execute(settings, tiny_workspace)
    texts = ("english", "korean", "stories")
    for cut in settings.cuts:
        for text in texts:
            for what in ("bits_per_byte", "tokens_per_byte", "tokens_per_character", "fallback_share"):
                assert f"{cut}_{text}_{what}" in outcome.figures
    assert {"trained_kept_bits_per_byte", "trained_own_bits_per_byte", "trained_retrained_bits_per_byte"} <= set(
        outcome.figures
    )
    assert outcome.figures["own_english_tokens_per_byte"] == outcome.figures["permuted_english_tokens_per_byte"]
    assert outcome.figures["own_english_bits_per_byte"] != outcome.figures["permuted_english_bits_per_byte"]
    assert outcome.series["korean_characters"] == [len(text) for text in KOREAN]
    again = execute(settings, tiny_workspace)
    assert (again.figures, again.series) == (outcome.figures, outcome.series)


def test_without_updates_nothing_is_trained(tiny_workspace: Workspace) -> None:
    outcome = execute(Tokenizing(model="tiny", paragraphs=1, cuts=("own", "permuted")), tiny_workspace)
    assert not [name for name in outcome.figures if name.startswith("trained_")]
    assert not [name for name in outcome.figures if name.startswith("borrowed_")]


def test_the_two_pages_have_the_same_paragraphs() -> None:
    assert len(ENGLISH) == len(KOREAN) == 8
    assert all(text.isascii() for text in ENGLISH)
    assert 0.4 < sum(map(len, KOREAN)) / sum(map(len, ENGLISH)) < 0.6
