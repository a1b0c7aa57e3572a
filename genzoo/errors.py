"""User errors and their one-line messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# Errors of parts that do not fit together, such as a network with another interface.
MISMATCHES = (TypeError, AttributeError, LookupError, AssertionError)
# Errors of constructors with invalid arguments; torch raises RuntimeError for negative and oversized shapes.
BUILD_ERRORS = (ValueError, RuntimeError, ArithmeticError, MemoryError, *MISMATCHES)


class UsageError(ValueError):
    """Invalid input; the message is one line."""

    exit_code = 2


def one_line(error: BaseException | str) -> str:
    """Join a message into one line, prefixed by the type of terse errors such as KeyError."""
    text = " ".join(str(error).partition("\nException raised from")[0].split())  # without torch's C++ frames
    return (
        f"{type(error).__name__}: {text}" if isinstance(error, (AttributeError, LookupError, AssertionError)) else text
    )


def nearest(word: str, choices: Iterable[str]) -> str:
    """Suggest the closest choice, or list the choices if none is close."""
    choices = sorted(choices)
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.6)
    if close:
        return f"did you mean '{close[0]}'?"
    return f"choose from {', '.join(choices)}" if 0 < len(choices) <= 40 else "see --help"


def misfit(key: str, error: BaseException) -> UsageError:
    """Error of a failed trial: of the model if its parts do not fit together, else of a key."""
    if isinstance(error, MISMATCHES):
        return UsageError(f"model: its parts do not fit together: {one_line(error)}")
    return UsageError(f"{key}: {one_line(error)}")
