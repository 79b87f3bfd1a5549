"""Bind what was made into a release: items version, embedder, reranker or none, and index, in one manifest written last.

Paths in it are relative to the root of the run, so that the folder of a run may be moved. A release never changes once
written; rolling back is pointing `root/releases/CURRENT` at an older one.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idem import manifest, storage
from idem.config import Table
from pipelines.items import open_items

KIND = "release"
FOLDED = "folded.json"  # beside the change log: for each id of items the last change that they hold
BOUND = ("embedder", "index", "reranker")  # the reranker may be absent


class ReleaseConfig(Table):
    """name: folder below root/releases; empty takes the first 12 digits of the fingerprint of what is bound."""

    name: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """A verified release. Paths are absolute; reranker is None where retrieval order is served as it is; folded: the
    last change of the change log (index.changes) that the items hold."""

    name: str
    id: str
    items: str
    items_version: int
    embedder: str
    reranker: str | None
    index: str
    folded: int = 0

    @classmethod
    def open(cls, path: str) -> "Release":
        """The release at `path`, its folder or root/releases for the current one, verified down to every file it binds.

        ValueError names each artifact that is missing, damaged or another than the one bound.
        """
        folder = _folder(path)
        made = manifest.read(str(folder), kind=KIND)
        root = folder.parent.parent
        if found := _faults(root, made):
            raise ValueError(f"the release {folder.name} at {folder} cannot be used: " + "; ".join(found))
        bound = {kind: str(root / made.config[kind]) if made.config[kind] else None for kind in BOUND}
        assert bound["embedder"]
        assert bound["index"]
        return cls(
            name=folder.name,
            id=made.id,
            items=str(root / made.config["items"]),
            items_version=made.config["items_version"],
            embedder=bound["embedder"],
            reranker=bound["reranker"],
            index=bound["index"],
            folded=made.config.get("folded", 0),
        )


def _folder(path: str) -> Path:
    """The folder of a release given by itself or by the folder above, whose CURRENT is followed."""
    if not storage.is_local(path):
        raise ValueError(f"a release is opened from a local disk, found {path}; python -m index.release pull brings it there")
    folder = storage.local_path(path).absolute()
    if (folder / manifest.NAME).exists() or not (folder / manifest.POINTER).exists():
        return folder
    return Path(manifest.current(str(folder), kind=KIND))


def _faults(root: Path, made: manifest.Manifest) -> list[str]:
    found = _items_faults(root / made.config["items"], made)
    for kind in BOUND:
        if made.config[kind]:
            found += _bound_faults(kind, root / made.config[kind], made)
    return found


def _bound_faults(kind: str, folder: Path, made: manifest.Manifest) -> list[str]:
    try:
        bound = manifest.read(str(folder), kind=kind)
    except ValueError as error:
        return [str(error)]
    if bound.id != made.inputs[kind]:
        return [f"the {kind} at {folder} has id {bound.id}, {made.inputs[kind]} was bound"]
    if manifest.checksum(str(folder / manifest.NAME)).sha256 != made.config["manifests"][kind]:
        return [f"{folder / manifest.NAME} does not match the checksum that was bound"]
    return manifest.damaged(str(folder), bound)


def _items_faults(folder: Path, made: manifest.Manifest) -> list[str]:
    """Items gain versions after a release: the bound one must still be there, the same and as long as it was."""
    version = made.config["items_version"]
    try:
        items = open_items(str(folder), version=version)
    except (ValueError, OSError) as error:
        return [str(error)]
    if items.id != made.inputs["items"]:
        return [f"version {version} of the items at {folder} has id {items.id}, {made.inputs['items']} was bound"]
    rows, expected = items.count(), made.figures["items"]
    return [] if rows == expected else [f"version {version} of the items at {folder} has {rows} rows, {expected} were bound"]


def _bindings(layout: storage.Layout) -> dict[str, tuple[str, manifest.Manifest]]:
    """Folder and manifest of each current artifact, checked to belong together: the index and the reranker are of that embedder."""
    kinds = [kind for kind in BOUND if kind != "reranker" or storage.exists(storage.join(layout.reranker, manifest.POINTER))]
    folders = {kind: manifest.current(getattr(layout, kind), kind=kind) for kind in kinds}
    bound = {kind: (folder, manifest.read(folder, kind=kind)) for kind, folder in folders.items()}
    embedder = bound["embedder"][1].id
    for kind in kinds[1:]:
        made_with = bound[kind][1].inputs.get("embedder")
        if made_with != embedder:
            raise ValueError(
                f"the {kind} {bound[kind][1].id} was made with embedder {made_with}, the current one is {embedder}: make it again"
            )
    return bound


def _publish(parent: str, name: str, wanted: dict[str, Any]) -> bool:
    """Write the release and point CURRENT at it; False where it is there already. ValueError where its name is taken by another."""
    folder = storage.join(parent, name)
    known = storage.exists(storage.join(folder, manifest.NAME))
    identity = manifest.fingerprint(KIND, wanted["config"], wanted["inputs"])
    if known and (there := manifest.read(folder, kind=KIND)).id != identity:
        raise ValueError(
            f"the release {name} binds something else (id {there.id}, now {identity}): releases never change, choose another name"
        )
    if not known:
        manifest.write(folder, kind=KIND, **wanted)
    Release.open(folder)  # what cannot be opened must not become current
    storage.write_bytes(storage.join(parent, manifest.POINTER), name.encode())
    return not known


def _folded(layout: storage.Layout, items_id: str) -> int:
    """The last change that these items hold, as index.compact has noted; 0 for none."""
    path = storage.join(layout.changes, FOLDED)
    return json.loads(storage.read_bytes(path)).get(items_id, 0) if storage.exists(path) else 0


def run(config: ReleaseConfig) -> dict[str, Any]:
    """Bind the current artifacts of the run. ValueError where one is missing or was made with another embedder."""
    if "/" in config.name or config.name.startswith("."):
        raise ValueError(f"a release name is one folder name without a dot in front, found {config.name!r}")
    layout = storage.Layout(config.root)
    bound = _bindings(layout)
    index = bound["index"][1]
    items = open_items(layout.items, version=int(index.inputs["items_version"]))
    paths = {kind: f"{kind}/{bound[kind][1].id}" if kind in bound else None for kind in BOUND}
    sums = {kind: manifest.checksum(storage.join(folder, manifest.NAME)).sha256 for kind, (folder, _) in bound.items()}
    folded = _folded(layout, items.id)
    wanted = {
        "config": {"items": "items", "items_version": items.version, **paths, "manifests": sums, **({"folded": folded} if folded else {})},
        "inputs": {"items": index.inputs["items"], **{kind: made.id for kind, (_, made) in bound.items()}},
        "figures": {"items": items.count()},
    }
    name = config.name or manifest.fingerprint(KIND, wanted["config"], wanted["inputs"])[:12]
    items.keep(f"release-{name}")  # so that no upkeep of the items removes what the release has bound
    written = _publish(layout.releases, name, wanted)
    return {"release": name, "items_version": items.version, "folded": folded, **paths, **({} if written else {"skipped": True})}


if __name__ == "__main__":
    from index import registry  # which opens releases itself

    sys.exit(registry.main(sys.argv[1:]))
