"""Images with captions as data sets."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from genzoo.conditions import Tokens
from genzoo.data.dataset import CaptionChecker, DataError, DataSet, Split
from genzoo.text import Tokenizer


def captioned(
    train: tuple[Tensor, Sequence[str]],
    test: tuple[Tensor, Sequence[str]],
    validation: tuple[Tensor, Sequence[str]] | None = None,
    *,
    vocabulary: int = 1024,
    length: int | None = None,
    checker: CaptionChecker | None = None,
    notes: Sequence[str] = (),
) -> DataSet:
    """Build a data set of images whose conditions are the tokens of their captions.

    Args:
        train, test, validation: images, uint8 (N, C, H, W), and their captions.
        vocabulary: largest number of tokens of the byte-pair encoding, which is learned from the training captions.
        length: tokens of a caption, the end included; None for those of the longest training caption. Longer captions are cut.
        checker: of images and captions.
        notes: of the reader.

    Raises:
        DataError: for an empty caption, and without training images.
    """
    notes = list(notes)
    if not len(train[0]):
        raise DataError("data: no training images with captions")
    groups = {"training": train, "test": test, **({"validation": validation} if validation else {})}
    for split in groups.values():
        assert len(split[0]) == len(split[1])
        if any(not caption.strip() for caption in split[1]):
            raise DataError("data: an empty caption")
    tokenizer = Tokenizer.train(train[1], vocabulary, length)
    splits = {}
    for name, (x, captions) in groups.items():
        splits[name] = Split(x, y := tokenizer.encode(captions, truncate=True))
        cut = sum(found != caption for found, caption in zip(tokenizer.decode(y), captions, strict=True))
        if cut:
            notes.append(f"{cut} {name} captions have more than {tokenizer.length - 1} tokens and were cut")
    return DataSet(
        splits["training"],
        splits["test"],
        validation=splits.get("validation"),
        levels=256,
        notes=tuple(notes),
        conditions=Tokens(tokenizer.length, tokenizer.vocabulary),
        tokenizer=tokenizer,
        checker=checker,
    )
