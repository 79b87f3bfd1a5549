"""The releases of one root: told, pointed at, and cleared away.

    python -m index.release publish RUN          binds what is current, and makes it the current release
    python -m index.release list RUN             every release, newest first
    python -m index.release show RUN [NAME]      one release, verified down to every file; without a name the current one
    python -m index.release rollback RUN [NAME]  the named release is current again; without a name the one before
    python -m index.release push RUN TO [NAME]   copies a release to another root, such as s3://bucket/shop, and makes it current there
    python -m index.release pull RUN FROM [NAME] brings the current release of another root here, or the named one, and makes it current
    python -m index.release gc RUN               removes old releases, and the artifacts that nothing binds any more

RUN is a run file. A release never changes: only CURRENT moves, and only to a release that opens.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from idem import config, job, manifest, storage
from index import changes
from index.release import BOUND, KIND, Release, ReleaseConfig, run
from index.transfer import carry
from pipelines.items import open_items

JOB = "index.release"
COLLECTED = ("embedder", "reranker", "index", "vectors")  # kinds of artifacts that `gc` removes


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A release as its manifest tells it, unverified; `bound` is kind to id. Where `fault` says why the manifest cannot be read,
    nothing else is known of it."""

    name: str
    created: str = ""
    current: bool = False
    items_version: int = 0
    folded: int = 0
    bound: Mapping[str, str]
    fault: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A finished artifact: what it was made from (kind to id), and whether it is the one that the next stage takes."""

    kind: str
    id: str
    current: bool
    inputs: Mapping[str, str]


def entries(parent: str) -> list[Entry]:
    """The releases below `parent` (Layout.releases), newest first, those that cannot be read last."""
    folder = storage.local_path(parent)
    current = _current(folder)
    found = [_entry(path.parent, current) for path in folder.glob(f"*/{manifest.NAME}")]
    return sorted(found, key=lambda entry: (entry.created, entry.name), reverse=True)


def _current(folder: Path) -> str:
    """The name that CURRENT gives, "" where nothing is current."""
    pointer = folder / manifest.POINTER
    return pointer.read_text().strip() if pointer.exists() else ""


def _entry(folder: Path, current: str) -> Entry:
    try:
        made = manifest.read(str(folder), kind=KIND)
    except ValueError as error:
        return Entry(name=folder.name, current=folder.name == current, bound={}, fault=str(error))
    bound = {kind: made.inputs[kind] for kind in BOUND if made.config[kind]}
    return Entry(
        name=folder.name,
        created=made.created,
        current=folder.name == current,
        items_version=made.config["items_version"],
        folded=made.config.get("folded", 0),
        bound=bound,
    )


def named(known: Sequence[Entry], name: str) -> Entry:
    """The release of that name, or the current one for ""; ValueError that lists those there are."""
    found = [entry for entry in known if (entry.name == name if name else entry.current)]
    if not found:
        there = ", ".join(entry.name for entry in known) or "none"
        raise ValueError(f"there is no release {name!r}; there are: {there}" if name else f"no release is current; there are: {there}")
    return found[0]


def before(known: Sequence[Entry]) -> Entry:
    """The newest release older than the current one. ValueError where there is none."""
    now = named(known, "")
    older = [entry for entry in known if not entry.fault and (entry.created, entry.name) < (now.created, now.name)]
    if not older:
        raise ValueError(f"there is no release before {now.name} to go back to; there are: {', '.join(entry.name for entry in known)}")
    return older[0]


def needed(bound: Iterable[tuple[str, str]], artifacts: Sequence[Artifact]) -> set[tuple[str, str]]:
    """(kind, id) of `bound` and of all that those were made from."""
    made = {(artifact.kind, artifact.id): artifact for artifact in artifacts}
    found: set[tuple[str, str]] = set()
    waiting = list(bound)
    while waiting:
        one = waiting.pop()
        if one not in found:
            found.add(one)
            waiting += made[one].inputs.items() if one in made else ()
    return found


def garbage(known: Sequence[Entry], artifacts: Sequence[Artifact], keep: int) -> tuple[list[Entry], list[Artifact]]:
    """Releases and artifacts to remove, where the newest `keep` releases and the current one stay, with all they bind and all that
    was made last of each kind, which a next release may bind. ValueError where a release cannot be read: what it binds is not known.
    """
    if keep < 1:
        raise ValueError(f"keep is how many releases stay, at least 1; found {keep}")
    if faulty := [entry.name for entry in known if entry.fault]:
        raise ValueError(f"what the releases {', '.join(faulty)} bind cannot be read, so nothing is removed; remove or repair them first")
    stay = [entry for number, entry in enumerate(known) if number < keep or entry.current]
    roots = [pair for entry in stay for pair in entry.bound.items()]
    used = needed([*roots, *((a.kind, a.id) for a in artifacts if a.current)], artifacts)
    return [entry for entry in known if entry not in stay], [a for a in artifacts if (a.kind, a.id) not in used]


def artifacts(root: str) -> list[Artifact]:
    """What is finished below `root`; an artifact that is being made has no manifest yet and is not among them."""
    found = []
    for kind in COLLECTED:
        folder = storage.local_path(storage.join(root, kind))
        current = _current(folder)
        for path in sorted(folder.glob(f"*/{manifest.NAME}")):
            made = manifest.read(str(path.parent), kind=kind)
            found.append(Artifact(kind=kind, id=path.parent.name, current=path.parent.name == current, inputs=made.inputs))
    return found


# What is typed


def told(known: Sequence[Entry]) -> str:
    """A table for people."""
    head = ("", "release", "made", "items", *BOUND)
    rows = [
        ("*" if e.current else "", e.name, e.created, str(e.items_version), *(e.bound.get(kind, "-") for kind in BOUND))
        if not e.fault
        else ("*" if e.current else "", e.name, e.fault)
        for e in known
    ]
    widths = [max(len(row[i]) for row in [head, *rows] if len(row) == len(head)) for i in range(len(head))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=False)).rstrip() for row in [head, *rows])


def list_all(parent: str, _: argparse.Namespace) -> dict[str, Any]:
    known = entries(parent)
    sys.stderr.write(f"{told(known)}\n" if known else f"no release below {parent}\n")
    return {"releases": [{"name": e.name, "current": e.current, **({"fault": e.fault} if e.fault else {})} for e in known]}


def show(parent: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """ValueError names all that is missing or damaged."""
    entry = named(entries(parent), arguments.name)
    there = Release.open(storage.join(parent, entry.name))
    shown = {"release": there.name, "id": there.id, "made": entry.created, "current": entry.current}
    shown |= {"items_version": there.items_version, "folded": there.folded}
    shown |= {kind: getattr(there, kind) for kind in BOUND}
    sys.stderr.write("\n".join(f"{name:<14} {value if value is not None else '-'}" for name, value in shown.items()) + "\n")
    return shown


def roll_back(parent: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """ValueError, and nothing moves, where the release cannot be opened."""
    known = entries(parent)
    was = next((entry.name for entry in known if entry.current), None)
    entry = named(known, arguments.name) if arguments.name else before(known)
    Release.open(storage.join(parent, entry.name))
    storage.write_bytes(storage.join(parent, manifest.POINTER), entry.name.encode())
    return {"release": entry.name, "before": was}


def collect(parent: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """A release goes before what it binds, so that a run that is cut off leaves none that cannot be opened. Of the change log goes what
    every release that stays has folded in."""
    root = str(storage.local_path(parent).absolute().parent)
    releases, unbound = garbage(entries(parent), artifacts(root), arguments.keep)
    folders = [*(f"releases/{entry.name}" for entry in releases), *(f"{a.kind}/{a.id}" for a in unbound)]
    size = sum(path.stat().st_size for name in folders for path in Path(root, name).rglob("*") if path.is_file())
    verb = "would remove" if arguments.dry_run else "removes"
    sys.stderr.write("".join(f"{verb} {name}\n" for name in folders) + f"{verb} {len(folders)} folders, {size / 1e6:,.1f} MB\n")
    if not arguments.dry_run:
        for entry in releases:
            storage.remove_tree(storage.join(parent, entry.name))
            open_items(storage.Layout(root).items).let_go(f"release-{entry.name}")
        for artifact in unbound:
            storage.remove_tree(storage.join(root, artifact.kind, artifact.id))
        kept = [entry for entry in entries(parent) if not entry.fault]
        if kept and (folder := storage.local_path(storage.Layout(root).changes)).is_dir():
            folders += [f"changes/{name}" for name in changes.forget(folder, min(entry.folded for entry in kept))]
    return {"removed": [] if arguments.dry_run else folders, "bytes": size, **({"would_remove": folders} if arguments.dry_run else {})}


def push(parent: str, arguments: argparse.Namespace) -> dict[str, Any]:
    root = str(storage.local_path(parent).absolute().parent)
    Release.open(storage.join(parent, named(entries(parent), arguments.name).name))
    return carry(root, arguments.other, arguments.name)


def pull(parent: str, arguments: argparse.Namespace) -> dict[str, Any]:
    return carry(arguments.other, str(storage.local_path(parent).absolute().parent), arguments.name)


Verb = Callable[[str, argparse.Namespace], dict[str, Any]]
VERBS: Mapping[str, tuple[Verb | None, str]] = {
    "publish": (None, "bind what is current, and make it the current release"),
    "list": (list_all, "every release, newest first"),
    "show": (show, "one release, verified down to every file"),
    "rollback": (roll_back, "make an earlier release current again"),
    "push": (push, "copy a release to another root, such as a bucket, and make it current there"),
    "pull": (pull, "bring the current or the named release of another root here, and make it current"),
    "gc": (collect, "remove old releases, and artifacts that nothing binds any more"),
}


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog=f"python -m {JOB}", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = made.add_subparsers(dest="verb", required=True)
    for name, (_, said) in VERBS.items():
        verb = verbs.add_parser(name, help=said, description=said)
        verb.add_argument("run", help="run file (TOML)")
        verb.add_argument("--set", action="append", default=[], metavar="table.key=value", help="change one setting of the run file")
        if name in ("push", "pull"):
            verb.add_argument("other", help="root to copy to, or from: a folder or s3://bucket/folder")
        if name in ("show", "rollback", "push", "pull"):
            verb.add_argument("name", nargs="?", default="", help="of the release")
        if name == "gc":
            verb.add_argument("--keep", type=int, default=3, help="newest releases that stay, besides the current one (default: 3)")
            verb.add_argument("--dry-run", action="store_true", help="only say what would go")
    return made


def main(argv: Sequence[str]) -> int:
    """A run file alone is published, as every other job takes it."""
    known = argv and (argv[0] in VERBS or argv[0] in ("-h", "--help"))
    arguments = parser().parse_args(argv if known else ["publish", *argv])

    def act() -> dict[str, Any]:
        said = config.load(arguments.run, "release", ReleaseConfig, arguments.set)
        act = VERBS[arguments.verb][0]
        return run(said) if act is None else act(storage.Layout(said.root).releases, arguments)

    return job.guarded(JOB, act)
