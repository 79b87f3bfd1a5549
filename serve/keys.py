"""API keys: who asks, what they may do, how much of it, and whose catalogue it is about.

    python -m serve.keys new --scopes search write --tenant default --file keys.json

prints a key once, as `key` of its JSON line, and appends its hash to the file. Without a file the service is open: everybody
is tenant "default" with every scope. A running gateway takes up a changed file within a second; one that cannot be read is
logged and the keys before it stay, so take a key back by deleting its entry, never the file.

A key is `idem_<id>_<secret>` with 256 random bits of secret. Its SHA-256 is enough to store: slow, salted hashes (argon2,
bcrypt) are for passwords, which can be guessed, and one on every request would be a way to bring the gateway down.

Scopes are apart: `write` does not let a feed search, `admin` has all. Pace and quota are counted in memory: each replica of the
gateway counts for itself, so N replicas admit up to N times as much, and a restart begins the day anew.
"""

import argparse
import fcntl
import hashlib
import hmac
import json
import logging
import os
import secrets
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError

from idem import job
from serve.intake import ApiError
from serve.quota import Allowance, Meter

log = logging.getLogger(__name__)

Scope = Literal["search", "write", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
TENANT = "default"
RECHECK_S = 1.0  # between two looks at the file
LONGEST = 200  # characters of a key that is looked at
NOBODY = "0" * 64  # the hash that an unknown id is compared with
COMMAND = "serve.keys"
NEW = f"python -m {COMMAND} new --scopes admin --tenant {TENANT} --file"


class Key(Allowance):
    """One entry of the file. sha256: of the whole key, `idem_<id>_<secret>`; tenant: the name of its lineage of releases."""

    id: str = Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    scopes: tuple[Scope, ...] = Field(min_length=1)
    tenant: str = Field(default=TENANT, pattern=r"^[a-z0-9][a-z0-9_-]{0,62}$")

    def may(self, scope: Scope) -> bool:
        return scope in self.scopes or "admin" in self.scopes


@dataclass(frozen=True, kw_only=True)
class Admitted:
    """Who asks: key_id is "" where the service is open; scopes is what it may do, with admin's spelt out."""

    key_id: str
    tenant: str
    scopes: frozenset[Scope]


OPEN = Admitted(key_id="", tenant=TENANT, scopes=frozenset(SCOPES))


class Unauthorized(ApiError):
    """401: no key, or none of ours, without a word on which part is wrong."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(401, code, f"{message}; send the header Authorization: Bearer idem_<id>_<secret>", {"WWW-Authenticate": "Bearer"})


class Forbidden(ApiError):
    """403: a key without the scope."""

    def __init__(self, key: Key, scope: Scope) -> None:
        super().__init__(403, "scope_missing", f"this needs the scope {scope!r}; the key {key.id} has {', '.join(key.scopes)}")


def read(path: Path) -> dict[str, Key]:
    """The keys of a file by id. ValueError says what is wrong with it, and repeats nothing that may be a secret."""
    try:
        keys = TypeAdapter(tuple[Key, ...]).validate_python(json.loads(path.read_text()))
    except OSError as error:
        raise ValueError(f"the key file {path} cannot be read: {error.strerror}; make it with: {NEW} {path}") from error
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'file'}: {e['msg']}" for e in error.errors(include_input=False))
        raise ValueError(f"the key file {path}: {said}. It is a list of objects with {', '.join(Key.model_fields)}") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the key file {path} is not valid JSON: {error}; make a new one with: {NEW} {path}") from None
    if len(found := {key.id: key for key in keys}) < len(keys):
        raise ValueError(f"the key file {path} names an id twice: {len(keys)} entries, {len(found)} ids")
    return found


class Keys:
    """The keys of a service: `admit` is called once a request, from one thread. now: seconds since 1970.

    ValueError at the start where the file is missing, broken or empty. A file that is emptied later admits nobody.
    """

    def __init__(self, path: str = "", *, now: Callable[[], float] = time.time) -> None:
        self.path, self.now = Path(path) if path else None, now
        self.checked, self.said, self.stamp = now(), "", _stamp(self.path) if self.path else None
        self.keys = read(self.path) if self.path else {}
        self.meters: dict[str, Meter] = {}
        if self.path and not self.keys:
            raise ValueError(f"the key file {path} has no key, so nobody could ask; make one with: {NEW} {path}")

    def admit(self, header: str | None, scope: Scope) -> Admitted:
        """Who asks, by the Authorization header. Unauthorized, Forbidden or TooMany, in this order; what is refused is not counted."""
        if self.path is None:
            return OPEN
        now = self.now()
        self._refresh(self.path, now)
        key = self._known(header)
        if not key.may(scope):
            raise Forbidden(key, scope)
        self.meters.setdefault(key.id, Meter(key, now)).take(key.id, key, now)
        return Admitted(key_id=key.id, tenant=key.tenant, scopes=frozenset(s for s in SCOPES if key.may(s)))

    def _known(self, header: str | None) -> Key:
        """The key of a header; an id that nobody has costs the same hash and the same comparison as a wrong secret."""
        if not header:
            raise Unauthorized("key_missing", "this service needs a key")
        scheme, _, token = header.partition(" ")
        token = token.strip() if scheme.lower() == "bearer" and len(header) <= LONGEST else ""
        key = self.keys.get(token.partition("_")[2].partition("_")[0])
        given = hashlib.sha256(token.encode(errors="replace")).hexdigest()
        same = hmac.compare_digest(given, key.sha256 if key else NOBODY)
        if key is None or not same:
            raise Unauthorized("key_unknown", "the key is not one of this service")
        return key

    def _refresh(self, path: Path, now: float) -> None:
        """Take up a changed file; log one that cannot be read, once, and keep the keys from before."""
        if abs(now - self.checked) < RECHECK_S:
            return
        self.checked, stamp = now, _stamp(path)
        if stamp == self.stamp:
            return
        try:
            self.keys = read(path)
        except ValueError as error:  # tried again at the next look: it may be the disk and not the file
            if str(error) != self.said:
                log.error("keeping the %d keys from before: %s", len(self.keys), error)
            self.said = str(error)
            return
        self.stamp, self.said = stamp, ""
        self.meters = {name: meter for name, meter in self.meters.items() if name in self.keys}
        log.info("the key file %s has changed: %d keys", path, len(self.keys))


def _stamp(path: Path) -> tuple[int, int, int] | None:
    """What changes with the file, None where there is none; taken before reading, so that no change goes unseen."""
    with suppress(OSError):
        return (found := path.stat()).st_mtime_ns, found.st_size, found.st_ino


@contextmanager
def _locked(folder: Path) -> Iterator[int]:
    """The descriptor of a folder that one command at a time may change."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


def _write(path: Path, keys: Sequence[Key], folder: int) -> None:
    """The whole file at once or not at all, readable by its owner alone, as mkstemp makes it."""
    descriptor, made = tempfile.mkstemp(dir=path.parent, prefix=".keys-")
    try:
        with os.fdopen(descriptor, "w") as stream:
            stream.write(json.dumps([key.model_dump() for key in keys], indent=1) + "\n")
            stream.flush()
            os.fsync(descriptor)
        Path(made).replace(path)
        os.fsync(folder)
    except BaseException:
        Path(made).unlink(missing_ok=True)
        raise


def new(file: str, fields: dict[str, Any]) -> dict[str, Any]:
    """Make a key and append it to `file`, which is made where it is missing. The secret is in what is returned, and nowhere else."""
    path, name = Path(file).resolve(), fields.get("id") or secrets.token_hex(6)
    secret = f"idem_{name}_{secrets.token_urlsafe(32)}"
    try:
        key = Key(**{**fields, "id": name, "sha256": hashlib.sha256(secret.encode()).hexdigest()})
    except ValidationError as error:
        raise ValueError("; ".join(f"--{e['loc'][0]}: {e['msg']}" for e in error.errors(include_input=False))) from None
    with _locked(path.parent) as folder:
        known = read(path) if path.exists() else {}
        if key.id in known:
            raise ValueError(f"{path} has a key with the id {key.id!r} already; its ids are {', '.join(known)}")
        _write(path, [*known.values(), key], folder)
    return {"key": secret, **key.model_dump(exclude={"sha256"}), "file": str(path), "keys": len(known) + 1}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m {COMMAND}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    told = made.add_subparsers(required=True).add_parser("new", help="make a key, print it once, and append its hash to the file")
    told.add_argument("--file", required=True, help="the key file (JSON)")
    told.add_argument("--scopes", nargs="+", choices=SCOPES, required=True, help="what it may do; admin has all")
    told.add_argument("--tenant", default=TENANT, help="whose releases it is about")
    told.add_argument("--id", help="a public name for logs: a-z, 0-9 and -; random if left out")
    for name, said in {"rate": "requests a second", "burst": "requests at once", "daily": "requests a day, UTC"}.items():
        told.add_argument(f"--{name}", type=float, default=Key.model_fields[name].default, help=f"{said} (%(default)s)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    arguments = vars(parser().parse_args(argv))
    return job.guarded(COMMAND, lambda: new(arguments.pop("file"), arguments))


if __name__ == "__main__":
    sys.exit(main())
