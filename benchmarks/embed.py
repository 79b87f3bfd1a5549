"""What absolute ID recognition gains over contrastive learning on the same IDs, backbone and number of images; and under noise.

Every figure is of products never trained on. Settings are chosen on families cut from train, as many tried on each side; then
each side trains with its best on all training families, with three seeds. On emoji, drawings of five vendors ask for the Noto
drawing; on grocery, photos ask for five photos a product, and for the catalogue picture. Parts: claim, noise, divided (IDs split
in two), grocery, sparse (KNN-sparse against full softmax), text. A trial of 1,200 x 128 images takes minutes on two cores.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.tools import paired
from benchmarks.tools.labelled import decode, load, pack
from benchmarks.tools.measuring import rounded, save, surroundings
from benchmarks.tools.pool import run_all
from benchmarks.tools.trials import Trial
from benchmarks.tools.verdicts import about_text, compared, table, trial_table
from idem import job

JOB = "benchmarks.embed"
PARTS = ("claim", "noise", "divided", "grocery", "sparse", "text")
SIDE = 48
IMAGES = {"emoji": 1200 * 128, "grocery": 600 * 128}
SEARCHED = 600 * 128  # images of a trial of the search
SHARED: Mapping[str, Any] = {"text_share": 0.0}
# As many settings on each side; the first is the default (docs/decisions/0007 has what else was tried).
CONTRAST: Mapping[str, Mapping[str, Any]] = {
    "slow gentle": {"lr": 1e-3, "tau": 0.1, "augment": 0.6},
    "slow faint": {"lr": 1e-3, "tau": 0.1, "augment": 0.3},
    "gentle": {"lr": 2e-3, "tau": 0.1, "augment": 0.6},
    "slow": {"lr": 1e-3, "tau": 0.1},
    "slower": {"lr": 5e-4, "tau": 0.1},
    "plain": {"lr": 2e-3, "tau": 0.1},
    "mined": {"lr": 2e-3, "tau": 0.05, "warm_up_similar": 0.5},
}
STAGES: Mapping[str, Mapping[str, Any]] = {
    "slow faint long": {"lr": 1e-3, "augment": 0.3, "warm_up": 0.25},
    "slow faint": {"lr": 1e-3, "augment": 0.3},
    "slow gentle": {"lr": 1e-3, "augment": 0.6},
    "slow long": {"lr": 1e-3, "warm_up": 0.25},
    "slow": {"lr": 1e-3},
    "slower": {"lr": 5e-4},
    "plain": {"lr": 2e-3},
}
UNSEARCHED = "slow"  # of both sides, the defaults of train.settings: for photos, which the search knows nothing of
MEASURES = {"purge": 0.12, "relabel": 0.15, "purge_every": 1}
TEXTS = {"text_share": 0.3, "model": {"letters": 0.5, "text_weight": 0.5}}  # names in fifteen languages want more dimensions than titles
SPARSE = {"kind": "sparse", "neighbours": 8, "random": 64}  # of 2,496 IDs, at most 640 enter a step of 64


def contrast(setting: str) -> dict[str, Any]:
    return {**SHARED, "warm_up": 1.0, **CONTRAST[setting]}


def stages(setting: str, **more: Any) -> dict[str, Any]:
    return {**SHARED, **STAGES[setting], **more}


def search(seeds: Sequence[int], images: int) -> list[Trial]:
    """Every setting of both sides, on families cut from train."""
    sides = {"contrast": {s: contrast(s) for s in CONTRAST}, "stages": {s: stages(s) for s in STAGES}}
    return [
        Trial(name=f"search {side} {setting} {seed}", seed=seed, unseen=False, loop={**loop, "images": images})
        for seed in seeds
        for side, settings in sides.items()
        for setting, loop in settings.items()
    ]


def chosen(done: Mapping[str, Mapping[str, Any]], side: str, settings: Sequence[str]) -> str:
    """The setting with the best mean over the seeds of its search."""

    def score(setting: str) -> float:
        return float(np.mean([paired.mean(d["hits"]) for name, d in done.items() if name.startswith(f"search {side} {setting} ")]))

    return max(settings, key=score)


def finals(parts: Sequence[str], seeds: Sequence[int], best: Mapping[str, str], images: Mapping[str, int]) -> list[Trial]:
    """What is asked of products never seen, named "part/side[/amount] seed"."""
    c, s = contrast(best["contrast"]), stages(best["stages"])
    made: list[Trial] = []
    for seed in seeds:
        if set(parts) & {"claim", "noise", "divided", "sparse"}:
            made += [Trial(name=f"claim/contrast {seed}", loop=c), Trial(name=f"claim/stages {seed}", loop=s)]
        if "noise" in parts:
            made.append(Trial(name=f"clean/measured {seed}", loop={**s, **MEASURES}))
            for noise in (0.2, 0.4):
                measured = Trial(name=f"noise/measured/{noise} {seed}", noise=noise, loop={**s, **MEASURES})
                kept = Trial(name=f"noise/contrast on kept/{noise} {seed}", noise=noise, loop=c, labels_of=measured.name)
                made += [measured, replace(measured, name=f"noise/stages/{noise} {seed}", loop=s)]
                made += [replace(measured, name=f"noise/contrast/{noise} {seed}", loop=c), kept]
        if "divided" in parts:
            made.append(Trial(name=f"divided/measured {seed}", divided=0.2, loop={**s, **MEASURES}))
            made.append(Trial(name=f"divided/stages {seed}", divided=0.2, loop=s))
        if "grocery" in parts:
            sides = {"contrast": contrast(UNSEARCHED), "stages": stages(UNSEARCHED)}
            made += [Trial(name=f"grocery/{side} {seed}", set="grocery", loop=loop) for side, loop in sides.items()]
        if "sparse" in parts:
            made.append(Trial(name=f"sparse/stages {seed}", loop={**s, "head": SPARSE}))
        if "text" in parts:
            made.append(Trial(name=f"text/stages {seed}", texts=True, loop={**s, **TEXTS}))
        made = [replace(t, seed=seed, loop={"images": images[t.set], **t.loop}) if t.name.endswith(f" {seed}") else t for t in made]
    return made


def bench(arguments: argparse.Namespace) -> dict[str, Any]:
    """Search, then the parts that are asked for. ValueError for unknown parts and missing sets."""
    parts = arguments.parts.split(",")
    if wrong := sorted(set(parts) - set(PARTS)):
        raise ValueError(f"unknown parts {', '.join(wrong)}; allowed are {', '.join(PARTS)}")
    sets = ["emoji", *(["grocery"] if "grocery" in parts else [])]
    folder = Path(tempfile.mkdtemp(prefix="idem-embed-"))
    try:
        folders = {name: _prepared(arguments, name, folder) for name in sets}
        data = {name: load(path) for name, path in folders.items()}
        images = {name: arguments.images or count for name, count in IMAGES.items()}
        kept = Path(arguments.keep or folder)
        kept.mkdir(parents=True, exist_ok=True)
        until = time.monotonic() + (arguments.budget or 10**6)
        how = {"processes": arguments.processes, "device": arguments.device, "until": until, "tell": _tell}
        done: dict[str, dict[str, Any]] = {}
        best = {"contrast": arguments.contrast, "stages": arguments.stages}
        if arguments.search:
            done |= run_all(search(range(arguments.search), arguments.images or SEARCHED), folders, kept, **how)
            best = {"contrast": chosen(done, "contrast", list(CONTRAST)), "stages": chosen(done, "stages", list(STAGES))}
        final = finals(parts, range(arguments.seeds), best, images)
        done |= run_all(final, folders, kept, **how)
        lines = compared(done, data, parts, asked=arguments.seeds) + (about_text(done, data["emoji"]) if "text" in parts else [])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stderr.write(f"{trial_table(done)}\n\nchosen: {best}\n\n{table(lines)}\n")
    told = {
        "holds": all(x["holds"] for x in lines if x["holds"] is not None),
        "chosen": best,
        "figures": [rounded(x) for x in lines],
        "trials": {name: {k: v for k, v in d.items() if not k.startswith("hits")} | {"R@1": _by_task(d)} for name, d in done.items()},
        **surroundings(JOB, ("torch", "numpy")),
    }
    if not arguments.save:
        return told
    return {**told, "saved": save("embed", told, **({"hardware": arguments.hardware} if arguments.hardware else {}))}


def _prepared(arguments: argparse.Namespace, name: str, folder: Path) -> Path:
    """The set, decoded, from `--packed` where it is there, else from `--data`."""
    packed, made = Path(arguments.packed or folder) / f"{name}.npz", folder / name
    if not packed.exists():
        packed = folder / f"{name}.npz"
        pack(Path(arguments.data), name, packed)
    made.mkdir()
    decode(packed, made, SIDE, arguments.processes)
    return made


def _by_task(figures: Mapping[str, Any]) -> dict[str, float]:
    return {task: round(said.count("1") / len(said), 4) for task, said in figures["hits"].items()}


def _tell(name: str, figures: Mapping[str, Any]) -> None:
    sys.stderr.write(f"{name}: R@1 {100 * paired.mean(figures['hits']):.1f} after {figures['seconds']:.0f} s\n")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog=f"python -m {JOB}", description=__doc__)
    parser.add_argument("--parts", default="claim", help=", ".join(PARTS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--search", type=int, default=0, help="seeds to search settings with; 0 takes --contrast and --stages")
    parser.add_argument("--contrast", default="slow gentle", choices=list(CONTRAST), help="setting of InfoNCE")
    parser.add_argument("--stages", default="slow faint long", choices=list(STAGES), help="setting of the three stages")
    parser.add_argument("--images", type=int, default=0, help=f"of a trial; by default {IMAGES}")
    parser.add_argument("--processes", type=int, default=2, help="trials at the same time")
    parser.add_argument("--keep", default="", help="a folder for trials as they are done: a later call with it goes on from there")
    parser.add_argument("--budget", type=float, default=0, help="seconds after which trials that are not done are left out; 0 for none")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--data", default="../shared/data", help="the folder of the public sets")
    parser.add_argument("--packed", default="", help="a folder with emoji.npz and grocery.npz (benchmarks.tools.labelled)")
    parser.add_argument("--save", action="store_true", help="write benchmarks/results/embed_<hardware>_<date>.json as well")
    parser.add_argument("--hardware", default="", help="what the saved file calls this machine, <cores>cpu by default")
    parser.add_argument("--out", help="write the figures to this file as well (JSON)")
    arguments = parser.parse_args(argv)

    def measured() -> dict[str, Any]:
        told = bench(arguments)
        if arguments.out:
            Path(arguments.out).write_text(json.dumps(told, indent=1) + "\n")
        return told

    return job.guarded(JOB, measured)


if __name__ == "__main__":
    sys.exit(main())
