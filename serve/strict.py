"""JSON from strangers, read by the letter of RFC 8259 and within limits.

Python's own reader takes NaN and Infinity, numbers beyond any type, keys that are there twice (the last one counts), and halves of
surrogate pairs, on which the first encoder after it breaks. All of them are refused here.
"""

import json
import math
import re
from typing import Any

from serve.errors import ApiError

MAX_DEPTH = 16
MAX_PARTS = 400_000  # commas and opening brackets; an empty list of two bytes takes sixty in memory
SHOWN = 60  # characters of what a message repeats
SURROGATE = re.compile("[\ud800-\udfff]")


def loads(data: bytes) -> Any:
    """The value of a body. ApiError 400 `invalid_json` or `invalid_text` says what is wrong with it."""
    if (parts := sum(map(data.count, (b",", b"[", b"{")))) > MAX_PARTS:
        raise _invalid(f"it has {parts:,} commas and opening brackets; at most {MAX_PARTS:,} are allowed")
    try:
        value = json.loads(data.decode(), parse_int=_integer, parse_float=_number, parse_constant=_constant, object_pairs_hook=_object)
    except RecursionError as error:
        raise _too_deep() from error
    except ValueError as error:  # of UTF-8 and of JSON
        raise _invalid(str(error)) from error
    _check(value)
    return value


def require_text(text: str) -> None:
    """ApiError 400 `invalid_text` where a text holds half of a surrogate pair, which no encoding has a place for."""
    if not text.isascii() and SURROGATE.search(text):
        raise ApiError(400, "invalid_text", "a text has half of a surrogate pair (U+D800 to U+DFFF alone), which is no character")


def _invalid(said: str) -> ApiError:
    return ApiError(400, "invalid_json", f"the body is not valid JSON: {said}")


def _too_deep() -> ApiError:
    return _invalid(f"it is nested too deep; at most {MAX_DEPTH} brackets within one another are allowed")


def _integer(digits: str) -> int:
    if len(digits) > 20 or not -(2**63) <= int(digits) < 2**63:
        raise _invalid(f"the number {digits[:SHOWN]} does not fit into 64 bits")
    return int(digits)


def _number(digits: str) -> float:
    if not math.isfinite(number := float(digits)):
        raise _invalid(f"the number {digits[:SHOWN]} is too large")
    return number


def _constant(name: str) -> float:
    raise _invalid(f"{name} is not a number of JSON")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise _invalid(f"the key {twice[:SHOWN]!r} is there twice in one object")
    return made


def _check(value: Any) -> None:
    """Texts and depth, without recursion: readers differ in how deep they go themselves."""
    waiting = [(value, 1)]
    while waiting:
        found, depth = waiting.pop()
        if isinstance(found, str):
            require_text(found)
        elif isinstance(found, dict | list):
            if depth > MAX_DEPTH:
                raise _too_deep()
            if isinstance(found, dict):
                waiting += [(key, 0) for key in found]
            waiting += [(each, depth + 1) for each in (found.values() if isinstance(found, dict) else found)]
