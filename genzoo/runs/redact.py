"""Blots keys, tokens and passwords out of whatever a run, a report or a log would keep.

A file outlives the account that wrote it, and is handed on. What is secret is known by any of four signs:

    its name     ``api_key``, ``password``, ``clientSecret``, ``token``, in settings and in texts such as "key=value"
    its address  the user and password of a URL, and parameters of its query that let somebody in, such as ``sig=``
    its shape    ``ghp_...``, ``hf_...``, ``AKIA...``, a JSON web token, a private key, and others that services publish
    its value    those of environment variables with such names, and what was found by name or address in one's own
                 settings, wherever they turn up again

Numbers, booleans and null are no secrets, whatever their names. Everything that is harmless is given back as it is.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple
from urllib.parse import quote

MARK = "[redacted]"
LEAST = 8  # letters that a secret has if it is looked for by its value: shorter ones are words of a sentence

# How the names of secrets end: words in lower case with _ between them, see _words.
_SECRET = re.compile(
    r"(password|passwd|passphrase|passcode|secret|credential)s?$"
    r"|(^|_)(pwd|pw|creds|jwt|cookie|bearer|authorization|auth|secret_id)$"
    r"|(^|_)(db|database|user|login|admin|root|my|mysql|pg|redis|smtp|imap|mail|email|ftp|ssh|proxy|http)_?pass$|^pass$"
    r"|(api|access|secret|private|auth|account|storage|service|client|shared|master|deploy|license|signing|encryption"
    r"|ssh|webhook|subscription)_?keys?(_id|_pem|_base64)?$"
    r"|(api|access|auth|oauth|refresh|session|security|id|bearer|hf|hub|github|gitlab|git|wandb|bot|user|personal)_?tokens?$"
    r"|(github|gitlab|azure|git)_pat$"
)
# ``token`` alone is secret, but the vocabulary of sequences is not: ``pad_token: <pad>``.
_TOKEN = re.compile(
    r"(^|_)(?<!pad_)(?<!eos_)(?<!bos_)(?<!unk_)(?<!sep_)(?<!cls_)(?<!end_)(?<!mask_)(?<!stop_)(?<!next_)(?<!null_)"
    r"(?<!text_)(?<!class_)(?<!start_)(?<!image_)(?<!empty_)(?<!begin_)(?<!pixel_)(?<!prefix_)(?<!special_)token$"
)
_VARIABLE = re.compile(r"(^|_)key$|_pat$|pass$")  # further ones of the environment, unless their values are words
_QUERY = re.compile(r"(^|_)(key|sig|signature|credential|hmac|access_?key_?id|pass|ticket|session|sid)$")
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|[0-9]+")
_PLAIN = re.compile(r"[a-z]+([ _./:-][a-z]+)*")  # words, which keys of settings and names of metrics are made of
_NUMBER = re.compile(
    r"['\"]?([+-]?(\d[\d_]*\.?\d*|\.\d+)(e[+-]?\d+)?|[+-]?(inf|nan)|true|false|null|none)?['\"]?", re.I
)

_SHAPES = re.compile(
    r"""-----BEGIN[ ][A-Z ]*PRIVATE[ ]KEY-----.*?(?:-----END[ ][A-Z ]*PRIVATE[ ]KEY-----|\Z)
    |(?<![A-Za-z0-9])(?:
        gh[pousr]_[A-Za-z0-9]{16,} | github_pat_\w{16,} | glpat-[\w-]{16,} | hf_[A-Za-z0-9]{16,}
        | wandb_v\d_\w{16,} | npm_[A-Za-z0-9]{30,} | pypi-[\w-]{30,} | dop_v1_[0-9a-f]{32,}
        | sk-(?=[\w-]*\d)[\w-]{16,} | [rs]k_(?:live|test)_\w{16,} | xox[a-z]-[\w-]{10,} | xapp-[\w-]{10,}
        | A[KS]IA[A-Z0-9]{16} | AIza[\w-]{30,} | ya29\.[\w-]{16,} | SG\.[\w-]{16,}\.[\w-]{16,}
        | eyJ[\w-]{6,}\.[\w-]{4,}(?:\.[\w-]*)?
    )
    |(?P<before>\b[Bb]earer\s+|\b[Aa]uthorization\W+[Bb]asic\s+)[\w.~+/=-]{8,}
    |(?P<wandb>\b(?i:api[ _-]?key)\W+)[0-9a-f]{40}""",
    re.VERBOSE | re.DOTALL,
)
# Path turns // into /. A password may hold what does not belong into one, but a port is none.
_USERINFO = re.compile(r"\b([A-Za-z][A-Za-z0-9+.-]*:/{1,3})([^\s/?#\"'<>]+|[^\s/@:\"'<>]+:(?!\d+[/?#])[^\s\"'<>]+)@")
_PARAMETER = re.compile(r"([?&#;]|&amp;)([\w.~-]+)=([^&#;\s\"'<>]+)")
_KEY = re.compile(r"([A-Za-z][\w.-]*)(?:\\*[\"'])?(\s*[=:]\s*)")
_VALUE = re.compile(
    r"""(?P<quote>"|')(?P<quoted>(?:(?!(?P=quote))[^\\]|\\.)*)(?P=quote)
    |(?P<escaped>\\+["'])(?P<inner>.*?)(?P=escaped)
    |(?P<bare>[^\s,;&}\])"'|]*[^\s,;&}\])"'|:.])""",
    re.VERBOSE | re.DOTALL,
)

_remembered: set[str] = set()


class _Known(NamedTuple):
    """What is looked for by its value: in texts, and in the keys of mappings, where a word is no secret."""

    in_text: re.Pattern[str] | None
    in_key: re.Pattern[str] | None


def redact(value: Any) -> Any:
    """Replace every secret in plain types by ``[redacted]``; what holds none is returned itself.

    Args:
        value: a text, or mappings and lists of texts and numbers.
    """
    return _redact(value, _known(), set())


def redact_words(words: Iterable[str]) -> list[str]:
    """Replace the secrets in the words of a command line, where all that follows ``password=`` is the password."""
    known = _known()
    return [_redact_word(word, known, set()) for word in words]


def remember(config: Any, words: Iterable[str] = ()) -> None:
    """Keep in mind the secrets of one's own settings, so that they are blotted out of messages that quote them too.

    Args:
        config: plain types.
        words: of a command line.
    """
    found: set[str] = set()
    known = _Known(None, None)
    _redact(config, known, found)
    for word in words:
        _redact_word(word, known, found)
    _remembered.update(secret for secret in found if len(secret) >= LEAST and MARK not in secret)


# Names


@lru_cache(4096)
def _words(name: str) -> str:
    """Write the last part of ``logger.clientSecret2`` as ``client_secret``."""
    words = [word.lower() for word in _WORD.findall(name.rpartition(".")[2])]
    while words and words[-1].isdigit():
        words.pop()
    return "_".join(words)


@lru_cache(4096)
def _is_secret(name: str) -> bool:
    words = _words(name)
    return bool(_SECRET.search(words) or _TOKEN.search(words))


def _is_number(text: str) -> bool:
    return _NUMBER.fullmatch(text.strip()) is not None


# Values


def _of_environment() -> tuple[str, ...]:
    return tuple(value for name, value in os.environ.items() if len(value) >= LEAST and _is_variable(name, value))


@lru_cache(4096)
def _is_variable(name: str, value: str) -> bool:
    if name == "PWD" or (os.path.isabs(value) and os.path.exists(value)):  # where a secret lies is none
        return False
    return _is_secret(name) or (_VARIABLE.search(_words(name)) is not None and not _PLAIN.fullmatch(value))


def _known() -> _Known:
    return _compiled(_of_environment(), frozenset(_remembered))


@lru_cache(64)
def _compiled(environment: tuple[str, ...], remembered: frozenset[str]) -> _Known:
    values = {*environment, *remembered}
    return _Known(_any_of(values), _any_of(value for value in values if not _PLAIN.fullmatch(value)))


def _any_of(values: Iterable[str]) -> re.Pattern[str] | None:
    """Look for any of some values, also as it is written in JSON, Python, a shell, a URL or on one line."""
    written = {
        form
        for value in values
        for form in (
            value,
            value.strip(),
            " ".join(value.split()),
            repr(value)[1:-1],
            json.dumps(value)[1:-1],
            value.replace("'", "'\"'\"'"),
            quote(value),
            quote(value, safe=""),
        )
        if len(form) >= LEAST
    }
    # The longest first: one may hold another.
    return re.compile("|".join(map(re.escape, sorted(written, key=len, reverse=True)))) if written else None


# Texts and what holds them


def _redact(value: Any, known: _Known, found: set[str], secret: bool = False) -> Any:
    """Redact plain types and collect what was found by its name or address; under a secret name every text is one."""
    if isinstance(value, str):
        return _redact_text(value, known, found, secret)
    if isinstance(value, dict):
        secret = secret and "_target_" not in value  # an object, of which its arguments' names say more
        entries = [
            (
                _redact_key(key, known),
                _redact(entry, known, found, secret or (isinstance(key, str) and _is_secret(key))),
            )
            for key, entry in value.items()
        ]
        same = all(new is old and entry is value[old] for (new, entry), old in zip(entries, value, strict=True))
        return value if same else dict(entries)
    if isinstance(value, list | tuple):
        items = [_redact(item, known, found, secret) for item in value]
        return value if all(new is old for new, old in zip(items, value, strict=True)) else type(value)(items)
    return value


def _redact_key(key: Any, known: _Known) -> Any:
    blotted = _blot_key(key, known.in_key) if isinstance(key, str) else key
    return key if blotted == key else blotted


def _redact_text(text: str, known: _Known, found: set[str], secret: bool = False) -> str:
    if secret and text.strip():
        found.add(text)
        return MARK
    blotted, secrets = _blot(text, known.in_text)
    if secrets:
        found.update(secrets)
    return text if blotted == text else blotted


def _redact_word(word: str, known: _Known, found: set[str]) -> str:
    key, sign, value = word.partition("=")
    if not sign or _is_number(value):
        return _redact_text(word, known, found)
    value = _redact_text(value, known, found, secret=_is_secret(key.lstrip("+~-")))
    return f"{_redact_text(key, known, found)}={value}"


@lru_cache(4096)
def _blot_key(key: str, known: re.Pattern[str] | None) -> str:
    return _SHAPES.sub(_keep_before, known.sub(MARK, key) if known else key)


@lru_cache(4096)  # a report of many runs reads the same few words again and again
def _blot(text: str, known: re.Pattern[str] | None) -> tuple[str, tuple[str, ...]]:
    """Blot a text, and return also what was found by name or address."""
    found: list[str] = []

    def userinfo(match: re.Match[str]) -> str:
        scheme, user = match.groups()
        if ":" not in user and not scheme.lower().startswith(("http", "ftp")):  # ssh://git@...
            return match[0]
        found.extend([user, user.partition(":")[2]])
        return f"{scheme}{MARK}@"

    def parameter(match: re.Match[str]) -> str:
        mark, name, value = match.groups()
        if not (_is_secret(name) or _QUERY.search(_words(name))):
            return match[0]
        found.append(value)
        return f"{mark}{name}={MARK}"

    if known:
        text = known.sub(MARK, text)
    text = _SHAPES.sub(_keep_before, text)
    if "@" in text:
        text = _USERINFO.sub(userinfo, text)
    if "=" in text:
        text = _PARAMETER.sub(parameter, text)
    if "=" in text or ":" in text:
        text = _blot_assigned(text, found)
    return text, tuple(found)


def _keep_before(match: re.Match[str]) -> str:
    return f"{match['before'] or match['wandb'] or ''}{MARK}"


def _blot_assigned(text: str, found: list[str]) -> str:
    """Blot what follows ``password=`` and ``'api_key': `` in a text."""
    parts, end = [], 0
    for key in _KEY.finditer(text):
        value = _VALUE.match(text, key.end())
        if key.start() < end or value is None or not _is_secret(key[1]):
            continue
        said = next(said for said in (value["quoted"], value["inner"], value["bare"]) if said is not None)
        # "logger.token: expected a name" is prose.
        prose = key[2].strip() == ":" != key[2] and value["bare"] is not None
        if _is_number(said) or (prose and len(said) < 20 and not re.search(r"\d", said)):
            continue
        if said != MARK.rstrip("]"):  # a bracket ends a value
            found.append(said)
            parts += [text[end : key.end()], value[0].replace(said, MARK)]
            end = value.end()
    return "".join([*parts, text[end:]])
