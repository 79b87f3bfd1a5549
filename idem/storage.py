"""Where a run keeps its artifacts: one folder a stage under one root, which is a local path or an object-store URI."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import pyarrow.fs


def is_local(uri: str) -> bool:
    return "://" not in uri or uri.startswith("file://")


def local_path(uri: str) -> Path:
    """The path behind a local URI; ValueError for any other."""
    if not is_local(uri):
        raise ValueError(f"a local path is needed here, found {uri!r}")
    return Path(uri.removeprefix("file://"))


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def open_filesystem(uri: str) -> tuple[pyarrow.fs.FileSystem, str]:
    """Where `uri` is, and its path there."""
    if is_local(uri):
        return pyarrow.fs.LocalFileSystem(), str(local_path(uri))
    return pyarrow.fs.FileSystem.from_uri(uri)


def exists(uri: str) -> bool:
    filesystem, path = open_filesystem(uri)
    return filesystem.get_file_info(path).type != pyarrow.fs.FileType.NotFound


def read_bytes(uri: str) -> bytes:
    filesystem, path = open_filesystem(uri)
    with filesystem.open_input_stream(path) as stream:
        return stream.read()


def write_bytes(uri: str, data: bytes) -> None:
    """Write all of `data` or nothing: a reader sees the old content or the new, also after a crash."""
    if not is_local(uri):
        filesystem, path = open_filesystem(uri)
        with filesystem.open_output_stream(path) as stream:
            stream.write(data)
        return
    path = local_path(uri)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(path)


def remove_tree(uri: str) -> None:
    """Remove a folder and all below it; nothing happens where there is none."""
    filesystem, path = open_filesystem(uri)
    if filesystem.get_file_info(path).type == pyarrow.fs.FileType.Directory:
        filesystem.delete_dir(path)


def require_free(uri: str, needed_bytes: int) -> None:
    """ValueError unless the disk under a local `uri` has `needed_bytes` free; object stores are not asked."""
    if not is_local(uri):
        return
    folder = local_path(uri).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise ValueError(
            f"too little disk for {uri}: about {needed_bytes / 1e6:,.0f} MB are needed, {free / 1e6:,.0f} MB are free on {folder}"
        )


@dataclass(frozen=True, slots=True)
class Layout:
    """The folders of one run under its root.

    `items` holds one Lance dataset with its own versions. Under each of the others every artifact has a folder of its own,
    named by its id (see idem.manifest), so that making a new one never touches what a release has bound.
    """

    root: str

    @property
    def items(self) -> str:
        return join(self.root, "items")

    @property
    def catalog(self) -> str:
        return join(self.root, "catalog")

    @property
    def embedder(self) -> str:
        return join(self.root, "embedder")

    @property
    def vectors(self) -> str:
        return join(self.root, "vectors")

    @property
    def index(self) -> str:
        return join(self.root, "index")

    @property
    def candidates(self) -> str:
        return join(self.root, "candidates")

    @property
    def reranker(self) -> str:
        return join(self.root, "reranker")

    @property
    def releases(self) -> str:
        return join(self.root, "releases")
