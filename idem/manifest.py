"""What made an artifact: manifest.json, written last, so that a folder without one is unfinished by definition.

The id is a fingerprint of what the artifact depends on (kind, configuration, ids of its inputs, version of the
project). A job whose output already carries the id it would write has nothing to do: that is how runs resume.

An artifact lives at <parent>/<id>/, and <parent>/CURRENT names the one made last, which the next stage takes:

    made = manifest.Plan(parent=layout.index, kind="index", config=config.settings(), inputs={"vectors": vectors.id})
    if made.finished():
        return {**made.finished().figures, "skipped": True}
    ... write files below made.folder ...
    made.write(figures={...}, files=[...])
"""

import hashlib
import json
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

import idem
from idem import storage

NAME = "manifest.json"
POINTER = "CURRENT"


class File(BaseModel):
    model_config = ConfigDict(frozen=True)
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """kind: what the artifact is; id: 16 hexadecimal digits; inputs: name to id; files: path below the folder to checksum."""

    model_config = ConfigDict(frozen=True)
    kind: str
    id: str
    config: dict[str, Any] = {}
    inputs: dict[str, str] = {}
    figures: dict[str, Any] = {}
    files: dict[str, File] = {}
    version: str = idem.__version__
    python: str = platform.python_version()
    created: str = ""


def fingerprint(kind: str, config: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """16 hexadecimal digits that change when the kind, the configuration, an input or the project's version does."""
    said = json.dumps([kind, idem.__version__, dict(config), dict(inputs)], sort_keys=True, default=str)
    return hashlib.sha256(said.encode()).hexdigest()[:16]


def checksum(uri: str) -> File:
    digest = hashlib.sha256()
    size = 0
    with storage.local_path(uri).open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
            size += len(block)
    return File(bytes=size, sha256=digest.hexdigest())


def write(
    folder: str,
    *,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, str],
    figures: Mapping[str, Any],
    files: Iterable[str] = (),
) -> Manifest:
    """Write manifest.json into `folder`, with checksums of `files` (paths below it); return what was written."""
    manifest = Manifest(
        kind=kind,
        id=fingerprint(kind, config, inputs),
        config=dict(config),
        inputs=dict(inputs),
        figures=dict(figures),
        files={name: checksum(storage.join(folder, name)) for name in files},
        created=datetime.now(UTC).isoformat(timespec="microseconds"),
    )
    storage.write_bytes(storage.join(folder, NAME), manifest.model_dump_json(indent=2).encode())
    return manifest


def read(folder: str, *, kind: str) -> Manifest:
    """The manifest in `folder`; ValueError where there is none (an unfinished artifact) or it is of another kind."""
    uri = storage.join(folder, NAME)
    if not storage.exists(uri):
        raise ValueError(f"no finished {kind} at {folder}: {NAME} is missing; run the stage that makes it first")
    try:
        manifest = Manifest.model_validate_json(storage.read_bytes(uri))
    except ValueError as error:
        raise ValueError(f"{uri} is damaged: {error}") from error
    if manifest.kind != kind:
        raise ValueError(f"a {kind} was expected at {folder}, found a {manifest.kind}")
    return manifest


def current(parent: str, *, kind: str) -> str:
    """The folder of the artifact that <parent>/CURRENT names; ValueError where nothing was made yet."""
    pointer = storage.join(parent, POINTER)
    if not storage.exists(pointer):
        raise ValueError(f"no finished {kind} below {parent}: run the stage that makes it first")
    return storage.join(parent, storage.read_bytes(pointer).decode().strip())


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An artifact that a job is about to make, or finds made."""

    parent: str
    kind: str
    config: Mapping[str, Any]
    inputs: Mapping[str, str]

    @property
    def id(self) -> str:
        return fingerprint(self.kind, self.config, self.inputs)

    @property
    def folder(self) -> str:
        return storage.join(self.parent, self.id)

    def finished(self) -> Manifest | None:
        """The manifest if this very artifact is there and whole (then also made CURRENT), else None."""
        if not storage.exists(storage.join(self.folder, NAME)):
            return None
        manifest = read(self.folder, kind=self.kind)
        if damaged(self.folder, manifest, deep=False):
            return None
        self._point()
        return manifest

    def write(self, *, figures: Mapping[str, Any], files: Iterable[str] = ()) -> Manifest:
        """Write the manifest, which finishes the artifact, and make it CURRENT."""
        made = write(self.folder, kind=self.kind, config=self.config, inputs=self.inputs, figures=figures, files=files)
        self._point()
        return made

    def _point(self) -> None:
        storage.write_bytes(storage.join(self.parent, POINTER), self.id.encode())


def damaged(folder: str, manifest: Manifest, *, deep: bool = True) -> list[str]:
    """Sentences on files of `manifest` that are missing or changed; `deep` compares checksums, not only sizes."""
    found = []
    for name, expected in manifest.files.items():
        path = Path(storage.local_path(storage.join(folder, name)))
        if not path.exists():
            found.append(f"{path} is missing")
        elif path.stat().st_size != expected.bytes:
            found.append(f"{path} has {path.stat().st_size} bytes, expected {expected.bytes}")
        elif deep and checksum(str(path)) != expected:
            found.append(f"{path} does not match its checksum {expected.sha256[:12]}")
    return found


def verify(folder: str, manifest: Manifest) -> None:
    """ValueError that names every missing or changed file of the artifact."""
    if found := damaged(folder, manifest):
        raise ValueError(f"the {manifest.kind} at {folder} is damaged: " + "; ".join(found))
