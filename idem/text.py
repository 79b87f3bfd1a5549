"""Texts from strangers: cleaned where that is safe, refused where it would change what they name."""

import re
import unicodedata
from datetime import UTC, datetime, timedelta

MAX_TITLE = 1000
MAX_TEXT = 512  # characters of an item's texts beside its title
MAX_ID = 512

_PREFIX = 20  # times the wanted length: no more of a text is looked at, for composing megabytes takes seconds
_COMBINING = 64  # the longest sequence that a cut gives way to
_JOINERS = "\u200c\u200d"  # scripts and emoji need them
# They show nothing: soft hyphen, zero-width space, marks and overrides of direction, word joiner, byte order mark.
_INVISIBLE = frozenset(map(chr, (0xAD, 0x61C, 0x200B, 0x200E, 0x200F, *range(0x202A, 0x202F), 0x2060, *range(0x2066, 0x206A), 0xFEFF)))
_BAD_ID = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")
_LANG = re.compile(r"[a-z]{2,3}(-[a-z0-9]{1,8})*")
_INTEGER = re.compile(r"[+-]?[0-9]+")
_MAX_VERSION = 40  # characters; Python takes endless rows of digits for a time
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_INT64 = 2**63


def _shows(c: str) -> bool:
    return c.isspace() or (unicodedata.category(c) not in ("Cc", "Cs") and c not in _INVISIBLE)


def _cut(text: str, most: int) -> str:
    """At most `most` characters, ending before a base character where its marks would be cut off."""
    if len(text) <= most:
        return text
    for end in range(most, max(most - _COMBINING, 0), -1):
        if unicodedata.category(text[end])[0] != "M" and text[end] not in _JOINERS and text[end - 1] != "\u200d":
            return text[:end]
    return text[:most]


def clean(text: str, most: int) -> str:
    """NFC, one space for any run of white space, no characters that control or show nothing, at most `most` characters."""
    if not text:
        return ""
    text = text.strip()[: _PREFIX * most]
    if not text.isprintable():
        text = "".join(filter(_shows, text))
    return _cut(" ".join(unicodedata.normalize("NFC", text).split()), most).rstrip()


def clean_title(title: str) -> str:
    """`clean`, at most MAX_TITLE characters."""
    return clean(title, MAX_TITLE)


def language(tag: str) -> str:
    """A language tag in lower case, "" for what does not look like one (BCP 47: `de`, `pt-br`, `zh-hant-tw`)."""
    tag = tag[:64].strip().lower().replace("_", "-")
    return tag if _LANG.fullmatch(tag) else ""


def id_fault(name: str, value: str) -> tuple[str, str] | None:
    """Reason and message where a stripped id cannot stand: ids are compared to the letter, so they are never cleaned."""
    if not value:
        return "missing_id", f"{name} is null or empty"
    if len(value) > MAX_ID:
        return "bad_id", f"{name} has {len(value):,} characters; at most {MAX_ID} are allowed"
    if found := _BAD_ID.search(value):
        return "bad_id", f"{name} has the character U+{ord(found[0]):04X}; control and replacement characters are not allowed"
    return None


def parse_version(text: str) -> int | None:
    """A whole number as it is, a date or time of ISO 8601 as microseconds since 1970 (UTC where it names no zone), None for "".

    ValueError for anything else, and for what int64 does not hold.
    """
    text = text.strip()
    if not text:
        return None
    try:
        if len(text) > _MAX_VERSION:
            version = _INT64
        elif _INTEGER.fullmatch(text):
            version = int(text)
        else:
            time = datetime.fromisoformat(text)
            version = ((time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        version = _INT64
    if not -_INT64 <= version < _INT64:
        raise ValueError(f"the version is {text[:60]!r}; allowed are whole numbers of 64 bits, and dates and times of ISO 8601")
    return version
