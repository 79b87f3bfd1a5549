"""The page at `/`: one file without anything from elsewhere, and the policy that holds browsers to it."""

import base64
import hashlib
import re
from pathlib import Path
from typing import NamedTuple

COMMON_HEADERS = {"X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer", "X-Frame-Options": "DENY"}


class Page(NamedTuple):
    html: str
    headers: dict[str, str]


def load() -> Page:
    """The page and its headers: its own inline style and script are allowed by their hashes, and nothing else is."""
    html = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    style, script = (_hashes(html, tag) for tag in ("style", "script"))
    policy = (
        f"default-src 'none'; connect-src 'self'; img-src 'self' blob: data:; style-src {style}; script-src {script}; "
        "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
    )
    return Page(html, {"Content-Security-Policy": policy, "Cache-Control": "no-cache"})


def _hashes(html: str, tag: str) -> str:
    bodies = re.findall(rf"<{tag}[^>]*>(.*?)</{tag}>", html, flags=re.DOTALL)
    return " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()}'" for body in bodies)
