"""Redaction of keys, tokens and passwords in runs, reports and logs: secrets are replaced by ``[redacted]``.

Redacted are strings under secret-looking names (``api_key``, ``clientSecret``, ``password``, ``hf_token``), also in strings
such as ``password=...``; user and password of a URL, and keys in its query; tokens of published formats (``_SHAPES``); and
the values of environment variables and settings with such names, wherever they occur.

Not redacted are numbers, booleans and null under any name, special tokens of a vocabulary (``pad_token``), and secrets under
neutral names, such as ``note=hunter2``. Values of less than 8 characters are not searched for in other strings.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any
from urllib.parse import quote

MARK = "[redacted]"
LEAST = 8  # shortest value that is searched for in other strings

# Ends of names, in lower case with _ between words.
_SECRET = re.compile(
    r"(password|passwd|passphrase|secret|credential)s?$|(^|_)(pwd|authorization|pat|token)$"
    r"|(^|(^|_)(db|user|smtp|ftp|admin)_?)pass$|(access|auth|refresh|session|api)_?tokens?$"
    r"|(api|access|secret|private|auth|account|client|service|ssh|signing|encryption|deploy|wandb)_?keys?(_id)?$"
)
_VOCABULARY = re.compile(
    r"(^|_)(pad|eos|bos|unk|sep|cls|mask|class|start|stop|begin|end|next|null|empty|text|image|pixel|prefix|special)_token$"
)
_VARIABLE = re.compile(r"(^|_)(key|pass)$")  # further environment variables, if the value has a digit
_NUMBER = re.compile(r"[+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)|true|false|null|none|", re.I)
_SHAPES = re.compile(
    r"""-----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)
    |(?<![A-Za-z0-9])(?:
        gh[pousr]_[A-Za-z0-9]{16,} | github_pat_\w{16,} | glpat-[\w-]{16,} | hf_[A-Za-z0-9]{16,} | wandb_v\d_\w{16,}
        | sk-(?=[\w-]*\d)[\w-]{16,} | [rs]k_(?:live|test)_\w{16,} | xox[a-z]-[\w-]{10,} | A[KS]IA[A-Z0-9]{16}
        | AIza[\w-]{30,} | npm_[A-Za-z0-9]{30,} | pypi-[\w-]{30,} | eyJ[\w-]{6,}\.[\w-]{4,}(?:\.[\w-]*)?
    )
    |(?P<before>\b[Bb]earer\s+|\b[Aa]uthorization\W+[Bb]asic\s+)[\w.~+/=-]{8,}
    |(?P<wandb>\b(?i:api[ _-]?key)\W+)[0-9a-f]{40}""",
    re.VERBOSE | re.DOTALL,
)
# A user without a password is not a secret (ssh://git@host). A path turns // into /.
_URL = re.compile(r"\b((?:https?|ftps?|[a-z][a-z0-9+.-]*(?=:/+[^\s/@]*:)):/{1,3})[^\s/\"'<>]+@", re.I)
_QUERY = re.compile(r"([?&;](?:[\w-]*[_-])?(?:key|sig|signature|credential|AWSAccessKeyId)=)[^&#;\s\"'<>]+", re.I)
# A name before "=", or before ":" followed by no prose: after a blank, a quoted string or a word with a digit.
_NAME = re.compile(r"""(?<![\w.-])([\w.-]++)(?:\\?["'])?(?:\s*=\s*|:(?!\s)|\s*:\s+(?=\\?["']|[^\s,;&]*\d))""")
_VALUE = re.compile(r"""(\\?["'])(?P<quoted>.*?)\1|(?P<bare>[^\s,;&}\])"'|]*[^\s,;&}\])"'|:.])""", re.DOTALL)

_remembered: set[str] = set()


def redact(value: Any) -> Any:
    """Redact all secrets in plain types."""
    return _walk(value, _secrets_pattern(), set())


def redact_words(words: Iterable[str]) -> list[str]:
    """Redact the arguments of a command line, where all characters after ``password=`` are the password."""
    return [_word(word, set()) for word in words]


def remember(config: Any, words: Iterable[str] = ()) -> None:
    """Register the secrets of a configuration and a command line, to redact them in all strings, such as error messages."""
    found: set[str] = set()
    _walk(config, _any_of(frozenset()), found)
    for word in words:
        _word(word, found)
    _remembered.update(value for value in found if len(value) >= LEAST and MARK not in value)


def _walk(value: Any, secrets: re.Pattern[str], found: set[str], secret: bool = False) -> Any:
    """Redact secrets, and collect the values under secret names in ``found``."""
    if isinstance(value, str) and secret and value.strip():
        found.add(value)
        return MARK
    if isinstance(value, str):
        return _text(value, secrets)
    if isinstance(value, dict):
        secret = secret and "_target_" not in value  # the arguments of an object have names of their own
        return {_shapes(key): _walk(entry, secrets, found, secret or _is_secret(key)) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return type(value)([_walk(item, secrets, found, secret) for item in value])
    return value


def _word(word: str, found: set[str]) -> str:
    key, sign, value = word.partition("=")
    if not sign or not _is_secret(key) or _NUMBER.fullmatch(value):
        return _text(word, _secrets_pattern())
    found.add(value)
    return f"{key}={MARK}"


@lru_cache(4096)
def _is_secret(name: Any) -> bool:
    """Whether the last part of a name such as ``logger.clientSecret`` denotes a secret."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[-\s]+", "_", str(name).rpartition(".")[2]).lower().strip("+~_0123456789")
    return bool(_SECRET.search(words)) and not _VOCABULARY.search(words)


def _secrets_pattern() -> re.Pattern[str]:
    of_environment = {v for name, v in os.environ.items() if len(v) >= LEAST and _is_secret_variable(name, v)}
    return _any_of(frozenset(of_environment | _remembered))


@lru_cache(4096)
def _is_secret_variable(name: str, value: str) -> bool:
    if name == "PWD" or os.path.exists(value):  # a path is not a secret
        return False
    return _is_secret(name) or bool(_VARIABLE.search(name.lower()) and re.search(r"\d", value))


@lru_cache(64)
def _any_of(values: frozenset[str]) -> re.Pattern[str]:
    """Pattern of any of some values, also escaped for Python, JSON and URLs; longest first, one may contain another."""
    forms = {form for v in values for form in (v, repr(v)[1:-1], json.dumps(v)[1:-1], quote(v), quote(v, safe=""))}
    return re.compile("|".join(map(re.escape, sorted(forms, key=len, reverse=True))) or "(?!)")


def _shapes(text: Any) -> Any:
    if not isinstance(text, str):
        return text
    return _SHAPES.sub(lambda match: f"{match['before'] or match['wandb'] or ''}{MARK}", text)


@lru_cache(4096)  # reports of many runs repeat strings
def _text(text: str, secrets: re.Pattern[str]) -> str:
    text = _URL.sub(rf"\1{MARK}@", _shapes(secrets.sub(MARK, text)))
    text, parts, end = _QUERY.sub(rf"\1{MARK}", text), [], 0
    for name in _NAME.finditer(text):
        if name.start() < end or not _is_secret(name[1]) or not (value := _VALUE.match(text, name.end())):
            continue
        group = "bare" if value["quoted"] is None else "quoted"
        if not _NUMBER.fullmatch(value[group]) and not value[group].startswith(MARK[:-1]):
            parts += [text[end : value.start(group)], MARK]
            end = value.end(group)
    return "".join([*parts, text[end:]])
