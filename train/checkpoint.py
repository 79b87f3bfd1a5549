"""A training state on disk: safetensors and JSON, and a manifest with the checksum of each file, written last.

A worker writes its rows of the head, worker 0 the rest, so that workers may come and go. A folder without a manifest is none.
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from train import parallel
from train.course import Course
from train.labelling import PART
from train.loop import Trainer

MANIFEST, STATE, MODEL, OPTIMIZER, ROWS, NAMES = (
    "manifest.json",
    "state.json",
    "model.safetensors",
    "optimizer.safetensors",
    "rows.safetensors",
    "names.json",
)
KEPT = 2  # checkpoints
BEST = "best"  # folder of the weights and prototypes that looked best, where the run has patience
log = logging.getLogger(__name__)


def save(trainer: Trainer, folder: Path) -> None:
    """Write this worker's files, and on worker 0 what all share, then the manifest. On all workers at once, into one folder or into
    folders whose files are put together afterwards."""
    names = _weights(trainer, folder)
    optimizer = {name: parallel.whole(value) for name, value in _optimizer(trainer).items()}
    if trainer.rank == 0:
        save_file(optimizer, folder / OPTIMIZER)
        save_file(_rows(trainer), folder / ROWS)
        (folder / STATE).write_text(json.dumps(trainer.course.state()))
        names += [OPTIMIZER, ROWS, STATE]
    names += _best(trainer, folder)
    said = {name: _checksum(folder / name) for name in names}
    everyone = parallel.everyones(said, trainer.device)  # every worker's files are there
    if trainer.rank == 0:
        files = {name: told for part in everyone for name, told in part.items()}
        (folder / MANIFEST).write_text(json.dumps({"kind": "checkpoint", "step": trainer.course.step, "files": files}, indent=1))


def _weights(trainer: Trainer, folder: Path) -> list[str]:
    """Backbone, names of the prototypes, and this worker's rows of them: what is published."""
    names = trainer.head.save(folder)
    weights = {name: parallel.whole(value) for name, value in trainer.model.state_for_checkpoint().items()}
    if trainer.rank == 0:
        save_file(weights, folder / MODEL)
        (folder / NAMES).write_text(json.dumps(list(trainer.corpus.names)))
        names += [MODEL, NAMES]
    return names


def _best(trainer: Trainer, folder: Path) -> list[str]:
    """The best so far goes along with every checkpoint: from the weights of now, if they are it, else from what was kept of them."""
    if not trainer.config.patience or trainer.course.looks.step < 0:
        return []
    kept = trainer.folder / BEST
    if trainer.course.looks.step == trainer.course.step:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        _weights(trainer, kept)
    if not kept.exists():
        return []
    shutil.copytree(kept, folder / BEST, dirs_exist_ok=True)
    return [f"{BEST}/{path.name}" for path in sorted(kept.iterdir())]


def _optimizer(trainer: Trainer) -> dict[str, Tensor]:
    """State of AdamW by the parameter's name."""
    named = {id(p): name for name, p in trainer.model.named_parameters()}
    return {f"{named[id(p)]}/{key}": value for p, state in trainer.optimizer.state.items() for key, value in state.items()}


def _rows(trainer: Trainer) -> dict[str, Tensor]:
    """What was changed of the rows' labels and weights, and which prototypes are similar, where that was looked up."""
    similar = {} if trainer.similar is None else {"similar": torch.from_numpy(np.ascontiguousarray(trainer.similar))}
    return {**trainer.labelling.tensors(), **similar}


def _checksum(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def damage(folder: Path) -> list[str]:
    """Sentences on what is missing or changed; none for a checkpoint that is whole."""
    try:
        files = json.loads((folder / MANIFEST).read_text())["files"]
    except OSError:
        return [f"{folder / MANIFEST} is missing: it was never finished"]
    except (ValueError, KeyError, TypeError) as error:
        return [f"{folder / MANIFEST} is damaged ({error})"]
    found = []
    for name, told in files.items():
        if not (folder / name).exists():
            found.append(f"{folder / name} is missing")
        elif _checksum(folder / name) != told:
            found.append(f"{folder / name} does not match its checksum {told['sha256'][:12]}")
    return found


def newest_good(folders: Sequence[Path]) -> Path | None:
    """The first whole one of checkpoints given newest first; None where there are none. ValueError where none of them is whole."""
    said = []
    for folder in folders:
        if not (found := damage(folder)):
            return folder
        said.append("; ".join(found))
        log.warning("the checkpoint %s cannot be used: %s", folder, said[-1])
    if said:
        raise ValueError(f"none of the {len(said)} checkpoints is whole: {' | '.join(said)}. Remove {folders[0].parent} to start again")
    return None


def keep(trainer: Trainer, parent: Path) -> Path:
    """Save below `parent`, whole or not at all, and remove all but the newest KEPT; the folder. On all workers at once, on one disk."""
    folder = parent / f"step-{trainer.course.step:09d}"
    partial = parent / f"partial-{trainer.course.step:09d}"
    if trainer.rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    parallel.everyones(0, trainer.device)  # the folder is there
    save(trainer, partial)
    if trainer.rank == 0:
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        for old in found(parent)[KEPT:]:
            shutil.rmtree(old)
    parallel.everyones(0, trainer.device)  # it has its name
    return folder


def found(parent: Path) -> list[Path]:
    """Finished checkpoints below `parent`, newest first, whoever wrote them; whether they are whole is not looked at."""
    return sorted((path.parent for path in parent.glob(f"*/{MANIFEST}")), key=_step, reverse=True)


def _step(folder: Path) -> tuple[int, str]:
    """A manifest that cannot be read goes last: it is damaged, whatever its step."""
    try:
        return int(json.loads((folder / MANIFEST).read_text())["step"]), folder.name
    except (ValueError, KeyError, TypeError):
        return -1, folder.name


def newest_good_of_all(trainer: Trainer, folders: Sequence[Path]) -> Path | None:
    """`newest_good` as worker 0 finds it: all workers must go on from the same. ValueError on all of them alike."""
    folder, error = "", ""
    if trainer.rank == 0:
        try:
            folder = str(newest_good(folders) or "")
        except ValueError as damaged:
            error = str(damaged)
    folder, error = parallel.everyones([folder, error], trainer.device)[0]
    if error:
        raise ValueError(error)
    return Path(folder) if folder else None


def begin(trainer: Trainer, parent: Path, start_from: str = "") -> None:
    """Go on from the newest whole checkpoint below `parent`; where there is none, take up what the one at `start_from` has learnt.

    The schedules then begin anew, at the margin if it had come so far. ValueError where no checkpoint is whole.
    """
    if before := newest_good_of_all(trainer, found(parent)):
        restore(trainer, before)
    elif start_from and (earlier := newest_good_of_all(trainer, [Path(start_from)])):
        restore(trainer, earlier)
        if trainer.course.stage == "margin":
            trainer.course = Course("margin")


def mapping(old: Sequence[str], new: Sequence[str]) -> np.ndarray:
    """(U_new,): the old row of each new prototype by its name, -1 for a new one.

    A prototype split off from a product ("mug#part-1") goes on from the product's row, where it has none itself. One that was
    merged into another is not asked for any more.
    """
    rows = {name: row for row, name in enumerate(old)}
    return np.array([rows.get(name, rows.get(name.rpartition(PART)[0], -1)) for name in new], np.int64)


def restore(trainer: Trainer, folder: Path) -> None:
    """Put the trainer where the checkpoint stands, on any number of workers, with prototypes added, removed or merged.

    ValueError names what is damaged or does not fit. Rows of prototypes that stay are taken bit for bit.
    """
    if trainer.rank == 0 and (found := damage(folder)):
        raise ValueError(f"the checkpoint at {folder} is damaged: {'; '.join(found)}")
    own = trainer.model.state_for_checkpoint()
    weights = load_file(folder / MODEL)
    trainer.model.load_checkpoint({k: parallel.like(v, own[k]) if k in own else v for k, v in weights.items()})
    _restore_optimizer(trainer, load_file(folder / OPTIMIZER))
    old, new = json.loads((folder / NAMES).read_text()), list(trainer.corpus.names)
    trainer.course = Course.resumed(json.loads((folder / STATE).read_text()))
    rows = None if old == new else mapping(old, new)
    if rows is not None and (rows < 0).any() and trainer.course.stage == "margin":
        trainer.head.start_from(trainer.centroids())  # what new prototypes start from; the others are taken from the checkpoint
    trainer.head.restore(folder, rows)
    _restore_rows(trainer, load_file(folder / ROWS), same=old == new)
    if (folder / BEST).exists() and trainer.config.patience and trainer.rank == 0:
        shutil.copytree(folder / BEST, trainer.folder / BEST, dirs_exist_ok=True)


def _restore_optimizer(trainer: Trainer, state: dict[str, Tensor]) -> None:
    named = dict(trainer.model.named_parameters())
    if unknown := sorted({key.rpartition("/")[0] for key in state} - set(named)):
        raise ValueError(f"the checkpoint's optimizer knows {len(unknown)} parameters that the backbone has not, as {unknown[0]}")
    for key, value in state.items():
        name, _, slot = key.rpartition("/")
        trainer.optimizer.state[named[name]][slot] = value if slot == "step" else parallel.like(value, named[name])


def _restore_rows(trainer: Trainer, kept: dict[str, Tensor], *, same: bool) -> None:
    """Labels, weights and neighbours are of the very rows and prototypes that they were written for; for others, they are made anew."""
    if "labels" in kept and same and len(kept["labels"]) == len(trainer.labelling.labels):
        trainer.labelling.set(kept["labels"].numpy(), kept["weights"].numpy())
    if "similar" in kept and same:
        trainer.similar = kept["similar"].numpy()
    elif trainer.course.stage == "margin":
        trainer.purge()
        trainer.mine()
