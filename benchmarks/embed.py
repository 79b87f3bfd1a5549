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
from benchmarks.tools.labelled import Labelled, decode, load, pack
from benchmarks.tools.measuring import aligned, rounded, save, surroundings
from benchmarks.tools.tfidf import scores as tfidf
from benchmarks.tools.trials import Trial, asked_rows, run_all, tasks, text_gallery, text_ndcg
from idem import job

JOB = "benchmarks.embed"
PARTS = ("claim", "noise", "divided", "grocery", "sparse", "text")
SIDE = 48
IMAGES = {"emoji": 1200 * 128, "grocery": 600 * 128}
SHARED: Mapping[str, Any] = {"text_share": 0.0}
# As many settings on each side; the first is the default.
CONTRAST: Mapping[str, Mapping[str, Any]] = {
    "plain": {"lr": 2e-3, "tau": 0.1},
    "sharp": {"lr": 2e-3, "tau": 0.05},
    "mined": {"lr": 2e-3, "tau": 0.05, "warm_up_similar": 0.5},
    "slow": {"lr": 1e-3, "tau": 0.1},
}
STAGES: Mapping[str, Mapping[str, Any]] = {
    "slow": {"lr": 1e-3},
    "plain": {"lr": 2e-3},
    "large": {"lr": 1e-3, "margin_batch": 128},
    "short": {"lr": 1e-3, "warm_up": 0.05},
}
MEASURES = {"purge": 0.12}
TEXTS = {"text_share": 0.3}
SPARSE = {"kind": "sparse", "neighbours": 64, "random": 256}


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
            made += [Trial(name=f"grocery/{side} {seed}", set="grocery", loop=loop) for side, loop in (("contrast", c), ("stages", s))]
        if "sparse" in parts:
            made.append(Trial(name=f"sparse/stages {seed}", loop={**s, "head": SPARSE}))
        if "text" in parts:
            made.append(Trial(name=f"text/stages {seed}", texts=True, loop={**s, **TEXTS}))
        made = [replace(t, seed=seed, loop={"images": images[t.set], **t.loop}) if t.name.endswith(f" {seed}") else t for t in made]
    return made


# What is made of it


def gathered(done: Mapping[str, Mapping[str, Any]], what: str, field: str = "hits") -> dict[str, paired.Hits]:
    """Hits of one side by seed."""
    sides = {name: name.rsplit(" ", 1) for name in done}
    return {sides[name][1]: d[field] for name, d in done.items() if sides[name][0] == what}


def families_of(data: Labelled, which: str) -> dict[str, np.ndarray]:
    rows = asked_rows(data, Trial(name=""))[1]
    return {name: data.fields["family"][rows][queries] for name, queries, _ in tasks(data, rows, which)}


def compared(done: Mapping[str, Mapping[str, Any]], data: Mapping[str, Labelled]) -> list[dict[str, Any]]:
    """Each line of the comparison: points of R@1 of one side minus the other's, its 95 % interval, and whether its bar holds."""
    lines: list[dict[str, Any]] = []

    def line(name: str, ours: str, theirs: str, *, least: float | None = None, low: float | None = None, field: str = "hits") -> None:
        sides = gathered(done, ours, field), gathered(done, theirs)
        seeds = sorted(set(sides[0]) & set(sides[1]))
        if not seeds:
            return
        a, b = ([side[seed] for seed in seeds] for side in sides)
        which = "grocery" if ours.startswith("grocery") else "emoji"
        gain, lower, upper = (100 * x for x in paired.difference(a, b, families_of(data[which], which)))
        holds = [gain >= least] if least is not None else []
        holds += [lower > low] if low is not None else []
        bar = ", ".join(f"{what} {value:g}" for what, value in ((">=", least), ("low >", low)) if value is not None)
        value, peer = (100 * float(np.mean([paired.mean(h) for h in hits])) for hits in (a, b))
        told = {"name": name, "ours": value, "peer": peer, "points": gain, "low": lower, "high": upper, "seeds": len(seeds)}
        lines.append({**told, "bar": bar, "holds": all(holds) if holds else None})

    line("three stages against InfoNCE", "claim/stages", "claim/contrast", least=6, low=0)
    line("half the dimensions against all", "claim/stages", "claim/stages", least=-3, field="hits_half")
    line("sparse against full softmax", "sparse/stages", "claim/stages", low=-2)
    line("measures without noise", "clean/measured", "claim/stages")
    for noise in (0.2, 0.4):
        line(f"{noise:.0%} noise: measures against InfoNCE", f"noise/measured/{noise}", f"noise/contrast/{noise}", least=8)
        line(
            f"{noise:.0%} noise: measures against InfoNCE on the kept",
            f"noise/measured/{noise}",
            f"noise/contrast on kept/{noise}",
            least=0,
        )
        line(f"{noise:.0%} noise: measures off", f"noise/stages/{noise}", "claim/stages")
        line(f"{noise:.0%} noise: measures on", f"noise/measured/{noise}", "claim/stages")
        off, on = ([x["points"] for x in lines if x["name"] == f"{noise:.0%} noise: measures {state}"] for state in ("off", "on"))
        if off and on:
            lines[-1] |= {"bar": f">= {off[0] / 2:.2f}, half of that", "holds": on[0] >= off[0] / 2}
    line("IDs split in two, measures off", "divided/stages", "claim/stages")
    line("IDs split in two, measures on", "divided/measured", "claim/stages", least=-3)
    line("grocery: three stages against InfoNCE", "grocery/stages", "grocery/contrast", least=-3)
    return lines


def about_text(done: Mapping[str, Mapping[str, Any]], data: Labelled) -> list[dict[str, Any]]:
    """nDCG@10 of text queries beside character n-gram TF-IDF of the titles; and what texts cost the pictures."""
    found = [d["text_ndcg"] for d in done.values() if "text_ndcg" in d]
    if not found:
        return []
    products = data.fields["product"][text_gallery(data, asked_rows(data, Trial(name=""))[1])].tolist()
    peer = text_ndcg(data, products, lambda texts: tfidf([data.titles[p] for p in products], texts))
    told = {
        "name": "text queries, nDCG@10 against TF-IDF",
        "ours": float(np.mean(found)),
        "peer": peer,
        "points": float(np.mean(found)) - peer,
    }
    return [{**told, "seeds": len(found), "bar": ">= 0", "holds": told["points"] >= 0}]


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    head = ("comparison", "ours", "peer", "points", "95 %", "seeds", "bar", "")
    said_of = {True: "holds", False: "FAILS", None: ""}
    rows = [
        (
            str(x["name"]),
            *(f"{x[key]:.3f}" if abs(x["ours"]) <= 1 else f"{x[key]:.1f}" for key in ("ours", "peer", "points")),
            f"{x['low']:+.1f} .. {x['high']:+.1f}" if "low" in x else "",
            str(x["seeds"]),
            str(x["bar"]),
            said_of[x["holds"]],
        )
        for x in lines
    ]
    return aligned([head, *rows], left=1)


def trial_table(done: Mapping[str, Mapping[str, Any]]) -> str:
    head = ("trial", "R@1", "half", "by task", "steps", "s", "kept", "right", "right lost")
    rows = [
        (
            name,
            f"{100 * paired.mean(d['hits']):.1f}",
            f"{100 * paired.mean(d['hits_half']):.1f}",
            " ".join(f"{100 * said.count('1') / len(said):.0f}" for said in d["hits"].values()),
            str(d["steps"]),
            f"{d['seconds']:.0f}",
            *(f"{d[key]:.3f}" for key in ("kept", "kept_right", "right_lost")),
        )
        for name, d in done.items()
    ]
    return aligned([head, *rows], left=1)


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
        until = time.monotonic() + (arguments.budget or 10**6)
        how = {"processes": arguments.processes, "device": arguments.device, "until": until, "tell": _tell}
        done: dict[str, dict[str, Any]] = {}
        best = {"contrast": arguments.contrast, "stages": arguments.stages}
        if arguments.search:
            done |= run_all(search(range(arguments.search), images["emoji"]), folders, **how)
            best = {"contrast": chosen(done, "contrast", list(CONTRAST)), "stages": chosen(done, "stages", list(STAGES))}
        final = finals(parts, range(arguments.seeds), best, images)
        done |= run_all(final, folders, **how)
        lines = compared(done, data) + (about_text(done, data["emoji"]) if "text" in parts else [])
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    sys.stderr.write(f"{trial_table(done)}\n\nchosen: {best}\n\n{table(lines)}\n")
    told = {
        "holds": bool(lines) and all(x["holds"] for x in lines if x["holds"] is not None),
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
    parser.add_argument("--contrast", default="plain", choices=list(CONTRAST), help="setting of InfoNCE")
    parser.add_argument("--stages", default="slow", choices=list(STAGES), help="setting of the three stages")
    parser.add_argument("--images", type=int, default=0, help=f"of a trial; by default {IMAGES}")
    parser.add_argument("--processes", type=int, default=2, help="trials at the same time")
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
