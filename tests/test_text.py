"""Byte-pair encoding of captions, against the library that it uses and by round trips of any text."""

from __future__ import annotations

import json

import pytest
import tokenizers
import torch
from tokenizers import decoders, models, pre_tokenizers, trainers

from genzoo.conditions import ClassLabels, Tokens
from genzoo.errors import UsageError
from genzoo.runs import Run, write_atomically
from genzoo.text import END, PADDING, SPECIAL, TOKENIZER, Tokenizer, encode_texts, read_texts, run_tokenizer

CAPTIONS = [
    f"a {size} {colour} {shape} {place}"
    for size in ("small", "large")
    for colour in ("red", "green", "blue")
    for shape in ("ring", "square")
    for place in ("on the left", "above a circle")
]
STRANGE = ["<pad>", "é", "naïve \t tab", "日本語", "🎉 a", "\n", 'it is "quoted" \\ ${x}', "  two  spaces ", "\0"]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(CAPTIONS, 300, length=40)


def reference(vocabulary: int) -> tokenizers.Tokenizer:
    """The byte-level encoding of the library's own documentation."""
    own = tokenizers.Tokenizer(models.BPE())
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    own.train_from_iterator(
        sorted(CAPTIONS), trainers.BpeTrainer(vocab_size=vocabulary, initial_alphabet=alphabet, show_progress=False)
    )
    return own


def test_merges_and_tokens_are_those_of_the_library(tokenizer):
    own = reference(300 - SPECIAL)
    assert tokenizer.vocabulary == own.get_vocab_size() + SPECIAL <= 300
    found = json.loads(tokenizer.to_json())["encoding"]["model"]["merges"]
    assert found == json.loads(own.to_str())["model"]["merges"] and len(found) == 300 - SPECIAL - 256
    for caption in [*CAPTIONS, *STRANGE]:
        if caption.strip():
            ids = [token + SPECIAL for token in own.encode(caption).ids]
            row = tokenizer.encode([caption])[0].tolist()
            assert row == [*ids, END, *[PADDING] * (40 - len(ids) - 1)]


@pytest.mark.parametrize("text", STRANGE)
def test_any_text_decodes_to_itself(tokenizer, text):
    if not text.strip():
        with pytest.raises(UsageError, match="text: is empty"):
            tokenizer.encode([text])
        return
    assert tokenizer.decode(tokenizer.encode([text])) == [text]


def test_the_text_of_a_special_token_is_no_special_token(tokenizer):
    assert PADDING not in tokenizer.encode(["<pad>" * 6])[0, :8] and END not in tokenizer.encode(["<end>"])[0, :2]


def test_captions_of_training_fill_the_length_and_longer_texts_are_refused_or_cut():
    tokenizer = Tokenizer.train(CAPTIONS, 300)
    tokens = tokenizer.encode(CAPTIONS)
    assert int((tokens != PADDING).sum(1).max()) == tokenizer.length
    long = " and ".join(CAPTIONS)
    with pytest.raises(UsageError, match=rf"tokens, at most {tokenizer.length - 1} are possible"):
        tokenizer.encode([long])
    cut = tokenizer.encode([long], truncate=True)
    assert cut[0, -1] == END and long.startswith(tokenizer.decode(cut)[0])


def test_ten_thousand_words_are_answered_in_one_short_line(tokenizer):
    with pytest.raises(UsageError) as refusal:
        tokenizer.encode(["word " * 10_000])
    assert len(str(refusal.value)) < 200 and "\n" not in str(refusal.value)
    with pytest.raises(UsageError, match="bytes, at most 65,536 are possible"):
        tokenizer.encode(["word " * 100_000])


def test_text_that_is_not_unicode_is_refused(tokenizer):
    with pytest.raises(UsageError, match="is not Unicode text"):
        tokenizer.encode(["\udcff"])


def test_characters_that_no_caption_has_are_named(tokenizer):
    assert tokenizer.unseen(["a red zebra", "é"]) == "zé"
    assert not tokenizer.unseen(CAPTIONS)


def test_the_order_of_the_captions_does_not_matter():
    assert Tokenizer.train(CAPTIONS).sha256 == Tokenizer.train(CAPTIONS[::-1]).sha256


def test_a_tokenizer_survives_its_file(tokenizer):
    again = Tokenizer.from_json(tokenizer.to_json())
    assert again.sha256 == tokenizer.sha256 and again.vocabulary == tokenizer.vocabulary
    assert torch.equal(again.encode(CAPTIONS), tokenizer.encode(CAPTIONS))
    assert again.unseen(["z"]) == "z"


@pytest.mark.parametrize(
    "text",
    ["", "{}", "[1]", '{"length": 5}', '{"length": 1, "characters": "", "encoding": {}}', '{"length": true}', "\0"],
)
def test_a_damaged_file_is_refused(text):
    with pytest.raises(UsageError, match="not a tokenizer of genzoo"):
        Tokenizer.from_json(text)


@pytest.mark.parametrize(("words", "message"), [({"vocabulary": 100}, "at least 258"), ({"length": 1}, "at least 2")])
def test_sizes_that_hold_no_text_are_refused(words, message):
    with pytest.raises(UsageError, match=message):
        Tokenizer.train(CAPTIONS, **words)


@pytest.fixture
def run(tmp_path, tokenizer) -> Run:
    run = Run.create(tmp_path, "ddpm-shapes", {})
    write_atomically(run.path / TOKENIZER, tokenizer.to_json().encode())
    run.update_status(tokenizer_sha256=tokenizer.sha256)
    return run


def test_a_run_keeps_its_tokenizer_by_hash(run, tokenizer):
    assert run_tokenizer(run).sha256 == tokenizer.sha256
    condition = Tokens(tokenizer.length, tokenizer.vocabulary)
    assert torch.equal(encode_texts(run, condition, CAPTIONS), tokenizer.encode(CAPTIONS))
    with pytest.raises(UsageError, match="has no captions"):
        encode_texts(run, ClassLabels(3), CAPTIONS)
    with pytest.raises(UsageError, match="is not the tokenizer of the model"):
        encode_texts(run, Tokens(9, 300), CAPTIONS)
    run.update_status(tokenizer_sha256="0" * 64)
    with pytest.raises(UsageError, match="its SHA-256 is"):
        run_tokenizer(run)
    (run.path / TOKENIZER).unlink()
    with pytest.raises(UsageError, match="was not trained with captions"):
        run_tokenizer(run)


def test_a_file_of_texts_has_a_text_on_each_line(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("a red ring\n\n  a blue square  \r\n")
    assert read_texts(path) == ["a red ring", "a blue square"]
    for content in (b"", b"\n\n", b"\xff\xfe", b"a\n" * 10_001):
        path.write_bytes(content)
        with pytest.raises(UsageError, match="texts="):
            read_texts(path)
    with pytest.raises(UsageError, match="texts="):
        read_texts(tmp_path / "none.txt")
