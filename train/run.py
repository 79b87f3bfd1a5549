"""Fits the embedder: items in, an embedder with its prototypes out; on Ray, which shards the prototypes over workers, or --local."""

import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from idem import job, manifest, storage
from idem.config import Table
from pipelines.items import open_items
from train.local import pick_device, train_here
from train.publish import publish
from train.selection import Selection
from train.settings import LoopConfig
from train.texts import TextSource

LOCAL = ("train.local=true", "without Ray, in this process: on one GPU (train.use_gpu) or on the CPU")
PLACES = {
    "workers",
    "local",
    "use_gpu",
    "max_failures",
    "cache_mb",
    "decoders",
    "stream_rows",
    "keep_checkpoint",
}  # where a run happens, not what it comes to


class TrainConfig(Table):
    """`fractions`: shares of the training families for embedder, reranker and calibration (METHOD.md section 7).

    `assignments`: a parquet file of ASSIGNMENTS (idem.schema) to take labels from; "" takes the items' product_id. `start_from`: the
    folder of a checkpoint of an earlier run, perhaps on fewer items; prototypes are known again by their product, the schedules begin
    anew, but for a `warm_up` that was over there, and labels that were changed there are taken for the very same rows alone. A run
    keeps its last checkpoint for that under embedder/checkpoints/ where `keep_checkpoint` is set.
    """

    workers: Annotated[int, Field(ge=1, le=1024)] = 2
    use_gpu: bool = False
    local: bool = False
    fractions: tuple[float, float, float] = (0.7, 0.2, 0.1)
    assignments: str = ""
    texts: tuple[TextSource, ...] = ()  # what else is said of products, beside the items' titles
    start_from: str = ""
    keep_checkpoint: bool = False
    held_back: Annotated[int, Field(ge=0)] = 300  # pictures of the calibration fold that the training curve is measured on
    cache_mb: Annotated[int, Field(ge=0)] = 1024  # decoded pictures a worker keeps
    stream_rows: Annotated[int, Field(ge=1)] = 20_000  # rows from which Ray Data decodes a stream; below, starting it takes longer
    decoders: Annotated[int, Field(ge=1)] = 1  # CPUs beside the workers' own that decode what is streamed
    max_failures: Annotated[int, Field(ge=0)] = 2
    loop: LoopConfig = LoopConfig()

    def model_post_init(self, _: Any) -> None:
        if min(self.fractions) < 0 or self.fractions[0] == 0 or abs(sum(self.fractions) - 1) > 1e-6:
            raise ValueError(f"fractions are shares of embedder (above 0), rerank and calibrate that sum to 1; found {self.fractions}")
        self.loop.divides(1 if self.local else self.workers)

    def selection(self, uri: str, version: int) -> Selection:
        return Selection(uri, version, fractions=self.fractions, held_back=self.held_back, assignments=self.assignments, texts=self.texts)


def run(config: TrainConfig, parent: str = "") -> dict[str, Any]:
    """Train the embedder, or find it trained. A run that was cut off goes on, also on another number of workers.

    parent: folder in which it is published, that of the root's embedders where it is empty.
    """
    layout = storage.Layout(config.root)
    parent = parent or layout.embedder
    items = open_items(layout.items)
    inputs = {"items": items.id}
    if config.assignments:
        if not Path(config.assignments).is_file():
            raise ValueError(f"there is no file of assignments at {config.assignments} (train.assignments)")
        inputs["assignments"] = manifest.checksum(config.assignments).sha256[:16]
    inputs |= {
        f"texts/{i}": manifest.checksum(source.file).sha256[:16] for i, source in enumerate(config.texts) if Path(source.file).is_file()
    }
    if config.start_from:
        if not (Path(config.start_from) / "manifest.json").is_file():
            raise ValueError(f"there is no finished checkpoint at {config.start_from} (train.start_from)")
        inputs["start"] = manifest.checksum(storage.join(config.start_from, "manifest.json")).sha256[:16]
    made = manifest.Plan(parent=parent, kind="embedder", config=config.settings(), inputs=inputs)
    if before := made.finished():
        return {**before.figures, "skipped": True}
    selection = config.selection(layout.items, items.version)
    storage.require_free(config.root, 200 << 20)
    settings = {name: value for name, value in config.settings().items() if name not in PLACES}
    settings["loop"]["head"].pop("folder")  # a place as well
    name = manifest.fingerprint("training", settings, inputs)
    checkpoints = storage.local_path(storage.join(parent, "checkpoints")).absolute()
    try:
        if config.local:
            device = pick_device(config.use_gpu)
            corpus = selection.corpus(config.cache_mb)
            folder = train_here(config.loop, corpus, checkpoints / name, device=device, start_from=config.start_from)
        else:
            from train import ray_run  # a machine without Ray can train with --local

            folder = ray_run.fit(config, selection, str(Path(layout.items).absolute()), items.version, checkpoints=checkpoints, name=name)
    except FloatingPointError as error:
        raise ValueError(f"{error}. Checkpoints are kept in {checkpoints / name}") from error
    figures, files = publish(folder, storage.local_path(made.folder), selection, config.loop)
    made.write(figures=figures, files=files)
    if not config.keep_checkpoint:
        shutil.rmtree(checkpoints / name, ignore_errors=True)
    return figures


if __name__ == "__main__":
    sys.exit(job.main("train.run", "train", TrainConfig, run, switches={"--local": LOCAL}))
