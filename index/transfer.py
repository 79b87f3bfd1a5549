"""Carry a release from one root to another, such as a bucket: `python -m index.release push RUN TO` and `pull RUN FROM`.

Everything the release binds goes first, each file once, its checksum told while it is copied; then the release, then CURRENT. So a
reader there sees the old release or the new one, whole, and a transfer that was cut off goes on where it was.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs
from tqdm import tqdm

from idem import manifest, storage, streams
from index.release import BOUND, KIND, Release
from pipelines.items import open_items

BLOCK = 8 << 20
AT_ONCE = 8  # files, each by a thread that waits for the network most of the time
VERSIONS, TAGS = "_versions", "_refs"  # of a Lance dataset


@dataclass(frozen=True, slots=True)
class File:
    """`path` below both roots, of so many bytes; sha256 where it is known beforehand."""

    path: str
    bytes: int
    sha256: str = ""


def bound_files(root: str, made: manifest.Manifest) -> list[File]:
    """The files of the artifacts that a release of `root` binds. ValueError for an artifact that is not the one that was bound."""
    found = []
    for kind in BOUND:
        if not (path := made.config[kind]):
            continue
        bound, data = manifest.read(storage.join(root, path), kind=kind), storage.read_bytes(storage.join(root, path, manifest.NAME))
        if (digest := hashlib.sha256(data).hexdigest()) != made.config["manifests"][kind] or bound.id != made.inputs[kind]:
            raise ValueError(f"the {kind} at {storage.join(root, path)} is not the one that was bound")
        found += [File(f"{path}/{name}", file.bytes, file.sha256) for name, file in bound.files.items()]
        found.append(File(f"{path}/{manifest.NAME}", len(data), digest))
    return found


def items_files(root: str, path: str) -> list[File]:
    """The files of the items' dataset below `root`, of whatever version: none ever changes. Versions are listed first and come last, so
    that all they name is among the others."""
    versions = [file for file in _listed(root, path) if _names_others(file)]
    return [file for file in _listed(root, path) if not _names_others(file) and f"/{TAGS}/" not in file.path] + versions


def _listed(root: str, path: str) -> list[File]:
    filesystem, base = storage.open_filesystem(root)
    infos = filesystem.get_file_info(pyarrow.fs.FileSelector(f"{base}/{path}", recursive=True))
    files = [info for info in infos if info.type == pyarrow.fs.FileType.File]
    return [File(info.path[len(base) + 1 :], info.size) for info in sorted(files, key=lambda info: info.path)]


def _names_others(file: File) -> bool:
    return f"/{VERSIONS}/" in file.path or file.path.endswith(f"/{manifest.NAME}")


def missing(files: Sequence[File], root: str) -> list[File]:
    """Those that are not below `root`, or not whole. In an object store whatever is there is whole (`_copied`)."""
    filesystem, base = storage.open_filesystem(root)
    sizes: dict[str, int] = {}
    for folder in sorted({file.path.rsplit("/", 1)[0] for file in files}):
        with suppress(FileNotFoundError):
            infos = filesystem.get_file_info(pyarrow.fs.FileSelector(f"{base}/{folder}"))
            sizes |= {info.path[len(base) + 1 :]: info.size for info in infos if info.type == pyarrow.fs.FileType.File}

    def whole(file: File) -> bool:
        known = file.sha256 and storage.is_local(root)
        return sizes.get(file.path) == file.bytes and (not known or manifest.checksum(storage.join(root, file.path)).sha256 == file.sha256)

    return [file for file in files if not whole(file)]


def _blocks(uri: str) -> Iterator[bytes]:
    with streams.open_stream(uri) as stream:
        while block := stream.read(BLOCK):
            yield block


def _copied(file: File, source: str, target: str) -> int:
    """Copy one file, whole or not at all; its size. ValueError where it is not what it should be."""
    uri, digest, size = storage.join(source, file.path), hashlib.sha256(), 0
    filesystem, path = storage.open_filesystem(storage.join(target, file.path))
    written = path
    if storage.is_local(target):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        written = f"{path}.partial"
    # An object is there once its stream is closed, and would be for a damaged one too: then the copy is removed again.
    with storage.reaching(target), filesystem.open_output_stream(written, compression=None) as stream:
        for block in _blocks(uri):
            stream.write(block)
            digest.update(block)
            size += len(block)
    if size != file.bytes or (file.sha256 and digest.hexdigest() != file.sha256):
        filesystem.delete_file(written)
        raise ValueError(f"{uri} is damaged: " + (f"{size} bytes, expected {file.bytes}" if size != file.bytes else "its checksum differs"))
    if written != path:
        Path(written).replace(path)
    return size


def carry(source: str, target: str, name: str = "") -> dict[str, Any]:
    """Make the release `name` of the root `source` ("": its current one) the current one of the root `target`; what was copied.

    ValueError names what is damaged or missing; what is current at the target stays so.
    """
    releases = storage.Layout(source).releases
    folder = storage.join(releases, name) if name else manifest.current(releases, kind=KIND)
    name = folder.rsplit("/", 1)[1]
    made = manifest.read(folder, kind=KIND)
    there = storage.join(storage.Layout(target).releases, name)
    if storage.exists(storage.join(there, manifest.NAME)) and manifest.read(there, kind=KIND).id != made.id:
        raise ValueError(f"the release {name} at {target} binds something else: releases never change, choose another name")
    copied = 0
    for files in (bound_files(source, made), items_files(source, made.config["items"])):
        for last in (False, True):  # what names other files comes after them
            copied += _all(missing([file for file in files if _names_others(file) is last], target), source, target)
    open_items(storage.join(target, made.config["items"]), version=made.config["items_version"]).keep(f"release-{name}")
    storage.write_bytes(storage.join(there, manifest.NAME), storage.read_bytes(storage.join(folder, manifest.NAME)))
    if storage.is_local(target):
        Release.open(there)  # what cannot be opened must not become current
    storage.write_bytes(storage.join(storage.Layout(target).releases, manifest.POINTER), name.encode())
    return {"release": name, "to": target, "bytes": copied}


def _all(files: Sequence[File], source: str, target: str) -> int:
    with (
        ThreadPoolExecutor(AT_ONCE) as pool,
        tqdm(total=sum(file.bytes for file in files), desc="copy", unit="B", unit_scale=True, disable=not files) as bar,
    ):
        for size in pool.map(lambda file: _copied(file, source, target), files):
            bar.update(size)
    return sum(file.bytes for file in files)
