r"""Text as tokens: byte-pair encoding of captions.

A caption is a sequence of bytes, in which the most frequent adjacent pairs are merged into tokens. The merges are learned from
the captions of the training split. Every byte is a token, so that every text is encodable and decodes to itself.

    id 0             padding, after the end
    id 1             end of the text
    id 2, 3, ...     bytes and merges

References:
    Sennrich, Haddow, Birch, "Neural Machine Translation of Rare Words with Subword Units", 2016,
    https://arxiv.org/abs/1508.07909 (section 3.2).
    Radford et al., "Language Models are Unsupervised Multitask Learners", 2019,
    https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf (section 2.2: bytes).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from genzoo.conditions import Condition, Tokens
from genzoo.console import log_stderr
from genzoo.errors import UsageError, one_line
from genzoo.runs import Run, RunError, read_file

if TYPE_CHECKING:
    from tokenizers import Tokenizer as BytePairEncoding

TOKENIZER = "tokenizer.json"  # file of a run
PADDING, END, SPECIAL = 0, 1, 2  # ids, and the number of special tokens
TEXT_BYTES = 2**16  # maximum size of a caption
FILE_BYTES = 2**24  # maximum size of a file of a tokenizer or of texts
TEXTS = 10_000  # maximum number of texts


class Tokenizer:
    """A byte-pair encoding with sequences of fixed length.

    Args:
        encoding: of the library ``tokenizers``, without special tokens.
        length: L, tokens of a sequence, the end included.
        characters: all characters of the training captions.
    """

    def __init__(self, encoding: BytePairEncoding, length: int, characters: str):
        if length < 2:
            raise UsageError(f"data.text_length={length}: at least 2 tokens, one of text and the end")
        self.encoding, self.length, self.characters = encoding, length, frozenset(characters)

    @classmethod
    def train(cls, captions: Iterable[str], vocabulary: int = 1024, length: int | None = None) -> Tokenizer:
        """Learn merges from the captions of a training split.

        Args:
            captions: of the training split; their order does not matter.
            vocabulary: largest number of tokens, at least 258.
            length: tokens of a sequence; None for that of the longest caption.

        Raises:
            UsageError: for a vocabulary smaller than the bytes.
        """
        from tokenizers import Tokenizer as BytePairEncoding
        from tokenizers import decoders, models, pre_tokenizers, trainers

        if vocabulary < 256 + SPECIAL:
            raise UsageError(f"data.vocabulary={vocabulary}: at least {256 + SPECIAL}, of all bytes and special tokens")
        captions = sorted(captions)
        encoding = BytePairEncoding(models.BPE())
        encoding.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        encoding.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocabulary - SPECIAL,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        )
        encoding.train_from_iterator(captions, trainer)
        if length is None:
            length = 1 + max((len(found.ids) for found in encoding.encode_batch(captions)), default=1)
        return cls(encoding, length, "".join(sorted({c for caption in captions for c in caption})))

    @property
    def vocabulary(self) -> int:
        """Number of tokens V, special ones included."""
        return int(self.encoding.get_vocab_size()) + SPECIAL

    def encode(self, captions: Sequence[str], *, truncate: bool = False) -> Tensor:
        """Encode captions, -> (N, L) int64, padded after the end.

        Args:
            captions: the texts.
            truncate: whether a longer caption is cut, in place of an error.

        Raises:
            UsageError: for a caption that is empty, no Unicode text, or longer than L - 1 tokens.
        """
        tokens = torch.full((len(captions), self.length), PADDING)
        for row, caption in zip(tokens, captions, strict=True):
            ids = self._ids(caption)
            if len(ids) >= self.length and not truncate:
                raise UsageError(
                    f"text={_shortened(caption)}: has {len(ids)} tokens, at most {self.length - 1} are possible"
                )
            ids = [*ids[: self.length - 1], END]
            row[: len(ids)] = torch.tensor(ids)
        return tokens

    def _ids(self, caption: str) -> list[int]:
        if not caption.strip():
            raise UsageError("text: is empty")
        try:
            size = len(caption.encode())
        except UnicodeEncodeError as error:
            raise UsageError(f"text={_shortened(caption)}: is not Unicode text: {one_line(error)}") from error
        if size > TEXT_BYTES:
            raise UsageError(f"text={_shortened(caption)}: has {size:,} bytes, at most {TEXT_BYTES:,} are possible")
        return [token + SPECIAL for token in self.encoding.encode(caption).ids]

    def decode(self, tokens: Tensor) -> list[str]:
        """Decode sequences of tokens up to their ends, (N, L) -> N texts."""
        texts = []
        for row in tokens.tolist():
            ids = row[: row.index(END)] if END in row else row
            texts.append(self.encoding.decode([token - SPECIAL for token in ids if token >= SPECIAL]))
        return texts

    def unseen(self, captions: Iterable[str]) -> str:
        """Return the characters that no training caption has, in order and without repetition."""
        return "".join(sorted({c for caption in captions for c in caption} - self.characters))

    def to_json(self) -> str:
        """Serialise to text."""
        own = {"length": self.length, "characters": "".join(sorted(self.characters))}
        return json.dumps({**own, "encoding": json.loads(self.encoding.to_str())}, ensure_ascii=True)

    @classmethod
    def from_json(cls, text: str) -> Tokenizer:
        """Restore from ``to_json``.

        Raises:
            UsageError: for anything else.
        """
        from tokenizers import Tokenizer as BytePairEncoding

        if len(text) > FILE_BYTES:
            raise UsageError(f"tokenizer: has more than {FILE_BYTES:,} characters")
        try:
            found: Any = json.loads(text)
            length, characters = found["length"], found["characters"]
            if type(length) is not int or not isinstance(characters, str) or not 2 <= length <= 2**16:
                raise ValueError("its length or characters are invalid")
            encoding = BytePairEncoding.from_str(json.dumps(found["encoding"]))
        except Exception as error:  # the library raises bare exceptions
            raise UsageError(f"tokenizer: not a tokenizer of genzoo: {one_line(error)}") from error
        return cls(encoding, length, characters)

    @property
    def sha256(self) -> str:
        """SHA-256 of the serialised tokenizer."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def run_tokenizer(run: Run) -> Tokenizer:
    """Load the tokenizer of an (untrusted) run.

    Raises:
        UsageError: for a run without captions, and a damaged or changed file.
    """
    path = run.path / TOKENIZER
    if not path.exists():
        raise UsageError(
            f"text: the model of {run.path} was not trained with captions; train one with data=shapes, data=emoji, or "
            "data=folder with captions, and data.conditional=true"
        )
    try:
        tokenizer = Tokenizer.from_json(read_file(path, FILE_BYTES).decode())
    except (UnicodeDecodeError, RunError) as error:
        raise UsageError(f"{path}: {one_line(error)}") from error
    expected = run.status.get("tokenizer_sha256")
    if tokenizer.sha256 != expected:
        raise UsageError(f"{path}: its SHA-256 is {tokenizer.sha256}, and that of the training {expected}")
    return tokenizer


def encode_texts(run: Run, condition: Condition | None, texts: Sequence[str]) -> Tensor:
    """Encode texts for the model of a run, -> (k, L) int64.

    Args:
        run: with the tokenizer.
        condition: of its model.
        texts: the captions.

    Raises:
        UsageError: for a text that is empty or too long, and a model that has no captions as its condition.
    """
    if not isinstance(condition, Tokens):
        raise UsageError("text: this model has no captions; train one with data=shapes data.conditional=true")
    tokenizer = run_tokenizer(run)
    if tokenizer.vocabulary != condition.vocabulary or tokenizer.length != condition.length:
        raise UsageError(f"{run.path / TOKENIZER}: is not the tokenizer of the model, {condition}")
    y = tokenizer.encode(texts)
    if unseen := tokenizer.unseen(texts):
        log_stderr(f"warning: text: no training caption has the characters {unseen!r}")
    return y


def read_texts(path: Path) -> list[str]:
    """Read a text from each line of a file; empty lines are skipped.

    Raises:
        UsageError: for a missing or empty file, one that is not UTF-8, and more than ``TEXTS`` lines.
    """
    try:
        lines = read_file(path, FILE_BYTES).decode().splitlines()
    except (OSError, RunError, UnicodeDecodeError) as error:
        raise UsageError(f"texts={path}: {one_line(error)}") from error
    texts = [line.strip() for line in lines if line.strip()]
    if not 0 < len(texts) <= TEXTS:
        raise UsageError(f"texts={path}: has {len(texts):,} lines of text, between 1 and {TEXTS:,} are possible")
    return texts


def _shortened(caption: str) -> str:
    return repr(caption if len(caption) <= 60 else f"{caption[:57]}...")
