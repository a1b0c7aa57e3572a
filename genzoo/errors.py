"""Errors that are reported in one line, and how their messages are worded."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# How a constructor says that its arguments do not do, or stumbles over them, as over a network of another kind;
# RuntimeError is torch's word for negative and for giant sizes.
STUMBLES = (TypeError, AttributeError, LookupError, AssertionError)


REFUSALS = (ValueError, RuntimeError, ArithmeticError, MemoryError, *STUMBLES)


class UsageError(ValueError):
    """Something that the user can mend; the message is one line."""

    exit_code = 2


def one_line(error: BaseException | str) -> str:
    """Squeeze a message into one line; of errors that say little without it, with their kind."""
    text = " ".join(str(error).partition("\nException raised from")[0].split())  # torch's own frames
    return (
        f"{type(error).__name__}: {text}" if isinstance(error, (AttributeError, LookupError, AssertionError)) else text
    )


def nearest(word: str, choices: Iterable[str]) -> str:
    """Say which of the choices was probably meant, or list them where none is near."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"choose from {', '.join(choices)}" if 0 < len(choices) <= 20 else "see --help"


def misfit(key: str, error: BaseException) -> UsageError:
    """Blame a key for a trial that failed, or the model where one of its parts stumbled over another."""
    if isinstance(error, STUMBLES):
        return UsageError(f"model: its parts do not fit together: {one_line(error)}")
    return UsageError(f"{key}: {one_line(error)}")
