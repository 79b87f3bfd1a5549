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
from train.course import Course, Looks
from train.labelling import mapping
from train.loop import Trainer

MANIFEST, STATE, OPTIMIZER, NEIGHBOURS = "manifest.json", "state.json", "optimizer.safetensors", "neighbours.safetensors"
MODEL, NAMES, ROWS = "model.safetensors", "names.json", "rows.safetensors"
KEPT = 2  # checkpoints
BEST = "best"  # folder of what is published, as it was when it looked best, where the run has patience
PARTIAL = "partial-"  # begins the name of a folder that is being written
log = logging.getLogger(__name__)


def save(trainer: Trainer, folder: Path) -> None:
    """Write this worker's files, and on worker 0 what all share, then the manifest. On all workers at once, into one folder or into
    folders whose files are put together afterwards."""
    parallel.share_buffers(trainer.model)  # worker 0's are kept, so all go on with them
    names = _published(trainer, folder)
    optimizer = parallel.optimizer_state(trainer.model, trainer.optimizer)
    if trainer.rank == 0:
        near = {} if trainer.similar is None else {"similar": torch.from_numpy(np.ascontiguousarray(trainer.similar))}
        save_file(optimizer, folder / OPTIMIZER)
        save_file(near, folder / NEIGHBOURS)
        (folder / STATE).write_text(json.dumps({**trainer.course.state(), "rows": trainer.rows_id}))
        names += [OPTIMIZER, NEIGHBOURS, STATE]
    names += _best(trainer, folder)
    said = {name: _checksum(folder / name) for name in names}
    everyone = parallel.everyones(said, trainer.device)  # every worker's files are there
    if trainer.rank == 0:
        files = {name: told for part in everyone for name, told in part.items()}
        (folder / MANIFEST).write_text(json.dumps({"kind": "checkpoint", "step": trainer.course.step, "files": files}, indent=1))


def _published(trainer: Trainer, folder: Path) -> list[str]:
    """Backbone, prototypes (this worker's rows, and the names of all), and who belongs to them: what becomes the artifact."""
    names = trainer.head.save(folder)
    weights = {name: parallel.whole(value) for name, value in trainer.model.state_for_checkpoint().items()}
    if trainer.rank == 0:
        save_file(weights, folder / MODEL)
        save_file(trainer.labelling.tensors(), folder / ROWS)
        (folder / NAMES).write_text(json.dumps(list(trainer.corpus.names)))
        names += [MODEL, ROWS, NAMES]
    return names


def _best(trainer: Trainer, folder: Path) -> list[str]:
    """The best so far goes along with every checkpoint: from what there is now, if that is it, else from what was kept."""
    if not trainer.config.patience or trainer.course.looks.step < 0:
        return []
    kept = trainer.folder / BEST
    if trainer.course.looks.step == trainer.course.step:
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir()
        _published(trainer, kept)
    if not kept.exists():
        return []
    shutil.copytree(kept, folder / BEST, dirs_exist_ok=True)
    return [f"{BEST}/{path.name}" for path in sorted(kept.iterdir())]


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
    partial = parent / f"{PARTIAL}{trainer.course.step:09d}"
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


def begin(trainer: Trainer, parent: Path, start_from: str = "") -> None:
    """Go on from the newest whole checkpoint below `parent`; where there is none, take up what the one at `start_from` has learnt.

    The schedules then begin anew, at the margin if it had come so far. ValueError, on all workers, where no checkpoint is whole.
    """

    def newest() -> str:
        for left in parent.glob(f"{PARTIAL}*"):
            shutil.rmtree(left)
        return str(newest_good(found(parent)) or "")

    if before := parallel.by_worker_0(newest, trainer.device):
        _take(trainer, Path(before), anew=False)
    elif start_from:
        parallel.by_worker_0(
            lambda: _whole(Path(start_from), "choose another start_from, or none to train from the beginning"), trainer.device
        )
        _take(trainer, Path(start_from), anew=True)


def restore(trainer: Trainer, folder: Path) -> None:
    """Put the trainer where the checkpoint stands, on any number of workers, with prototypes added, removed or merged.

    ValueError, on all workers, names what is damaged or does not fit. Rows of prototypes that stay are taken bit for bit.
    """
    parallel.by_worker_0(lambda: _whole(folder, "go on from another one"), trainer.device)
    _take(trainer, folder, anew=False)


def _whole(folder: Path, advice: str) -> None:
    if found := damage(folder):
        raise ValueError(f"the checkpoint at {folder} cannot be used: {'; '.join(found)}; {advice}")


def _take(trainer: Trainer, folder: Path, *, anew: bool) -> None:
    """What a checkpoint that was found whole holds; `anew` for a run of its own. What is of other rows is made anew."""
    own = trainer.model.state_for_checkpoint()
    weights = load_file(folder / MODEL)
    trainer.model.load_checkpoint({k: parallel.like(v, own[k]) if k in own else v for k, v in weights.items()})
    parallel.load_optimizer(trainer.model, trainer.optimizer, load_file(folder / OPTIMIZER))
    state = json.loads((folder / STATE).read_text())
    earlier, same = Course.resumed(state), state["rows"] == trainer.rows_id
    trainer.course = Course.after(earlier, trainer.config.warm_up) if anew else earlier
    _take_labels(trainer, load_file(folder / ROWS), same=same)
    _take_prototypes(trainer, folder)
    if anew:
        trainer.head.rejuvenate()
    _take_neighbours(trainer, load_file(folder / NEIGHBOURS), same=same and not anew)
    if not same:
        trainer.course.looks = Looks()  # the best of other rows is not this run's
    elif (folder / BEST).exists() and trainer.config.patience and trainer.rank == 0 and not anew:
        shutil.copytree(folder / BEST, trainer.folder / BEST, dirs_exist_ok=True)


def _take_labels(trainer: Trainer, kept: dict[str, Tensor], *, same: bool) -> None:
    """None are kept as long as they are those that were given."""
    if not same and trainer.course.stage == "margin":
        trainer.purge()
    elif same and kept:
        trainer.labelling.set(kept["labels"].numpy(), kept["weights"].numpy())


def _take_prototypes(trainer: Trainer, folder: Path) -> None:
    """New ones start from their centroids where the head is what is trained."""
    old, new = json.loads((folder / NAMES).read_text()), list(trainer.corpus.names)
    rows = None if old == new else mapping(old, new)
    if rows is not None and (rows < 0).any() and trainer.course.stage == "margin":
        trainer.head.start_from(trainer.centroids())
    trainer.head.restore(folder, rows)


def _take_neighbours(trainer: Trainer, kept: dict[str, Tensor], *, same: bool) -> None:
    """Of the very prototypes and backbone that they were looked up for; else, they are looked up anew."""
    if same and (kept or not trainer.similar_share()):
        trainer.similar = kept["similar"].numpy() if kept else None
    elif trainer.course.stage == "margin":
        trainer.mine()
