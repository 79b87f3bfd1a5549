"""What the trials of benchmarks.embed come to: each line of the comparison with its interval and its bar, and tables to read."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.tools import paired
from benchmarks.tools.labelled import Labelled
from benchmarks.tools.measuring import aligned
from benchmarks.tools.tfidf import scores as tfidf
from benchmarks.tools.trials import Trial, asked_rows, tasks, text_gallery, text_ndcg

FIGURES = ("ours", "peer", "points")


def gathered(done: Mapping[str, Mapping[str, Any]], what: str, field: str = "hits", task: str = "") -> dict[str, paired.Hits]:
    """Hits of one side by seed, of all tasks or of one."""
    sides = {name: name.rsplit(" ", 1) for name in done}
    kept = {sides[name][1]: d[field] for name, d in done.items() if sides[name][0] == what}
    return {seed: {name: said for name, said in hits.items() if task in ("", name)} for seed, hits in kept.items()}


def families_of(data: Labelled, which: str) -> dict[str, np.ndarray]:
    rows = asked_rows(data, Trial(name=""))[1]
    return {name: data.fields["family"][rows][queries] for name, queries, _ in tasks(data, rows, which)}


def compared(
    done: Mapping[str, Mapping[str, Any]], data: Mapping[str, Labelled], parts: Sequence[str], *, asked: int
) -> list[dict[str, Any]]:
    """Each line of `parts`: points of R@1 of one side minus the other's, its 95 % interval, and whether its bar holds.

    A line of fewer seeds than were `asked` for, since its trials were not done in time, does not hold.
    """
    lines: list[dict[str, Any]] = []

    def line(
        name: str, ours: str, theirs: str, *, least: float | None = None, low: float | None = None, field: str = "hits", task: str = ""
    ) -> None:
        """Of all tasks, or of one."""
        sides = gathered(done, ours, field, task), gathered(done, theirs, task=task)
        seeds = sorted(set(sides[0]) & set(sides[1]))
        bar = ", ".join(f"{what} {value:g}" for what, value in ((">=", least), ("low >", low)) if value is not None)
        if not seeds:
            lines.append({"name": name, "seeds": 0, "bar": bar, "holds": False})
            return
        a, b = ([side[seed] for seed in seeds] for side in sides)
        which = "grocery" if ours.startswith("grocery") else "emoji"
        families = {name: each for name, each in families_of(data[which], which).items() if task in ("", name)}
        gain, lower, upper = (100 * x for x in paired.difference(a, b, families))
        holds = [gain >= least] if least is not None else []
        holds += [lower > low] if low is not None else []
        holds += [len(seeds) >= asked] if holds else []
        value, peer = (100 * float(np.mean([paired.mean(h) for h in hits])) for hits in (a, b))
        told = {"name": name, "ours": value, "peer": peer, "points": gain, "low": lower, "high": upper, "seeds": len(seeds)}
        lines.append({**told, "bar": bar, "holds": all(holds) if holds else None})

    if "claim" in parts:
        line("three stages against InfoNCE", "claim/stages", "claim/contrast", least=6, low=0)
        line("half the dimensions against all", "claim/stages", "claim/stages", least=-3, field="hits_half")
    if "sparse" in parts:
        line("sparse against full softmax", "sparse/stages", "claim/stages", low=-2)
    if "noise" in parts:
        line("measures without noise", "clean/measured", "claim/stages")
    for share in (0.2, 0.4) if "noise" in parts else ():
        said = f"{share:.0%} noise: measures"
        line(f"{said} against InfoNCE", f"noise/measured/{share}", f"noise/contrast/{share}", least=8)
        line(f"{said} against InfoNCE on the kept", f"noise/measured/{share}", f"noise/contrast on kept/{share}", least=0)
        line(f"{said} off", f"noise/stages/{share}", "claim/stages")
        line(f"{said} on", f"noise/measured/{share}", "claim/stages")
        off, on = lines[-2:]
        if off["seeds"] and on["seeds"]:
            least, whole = off["points"] / 2, min(off["seeds"], on["seeds"]) >= asked
            on |= {"bar": f">= {least:.2f}, half of that", "holds": on["points"] >= least and whole}
    if "divided" in parts:
        line("IDs split in two, measures off", "divided/stages", "claim/stages")
        line("IDs split in two, measures on", "divided/measured", "claim/stages", least=-3)
    if "grocery" in parts:
        line("grocery, photo to photos: three stages against InfoNCE", "grocery/stages", "grocery/contrast", least=-3, task="photo")
        line("grocery, photo to catalogue picture", "grocery/stages", "grocery/contrast", task="catalog")
    return lines


def about_text(done: Mapping[str, Mapping[str, Any]], data: Labelled) -> list[dict[str, Any]]:
    """nDCG@10 of text queries beside character n-gram TF-IDF of the titles; and what texts cost the pictures."""
    name, found = "text queries, nDCG@10 against TF-IDF", [d["text_ndcg"] for d in done.values() if "text_ndcg" in d]
    if not found:
        return [{"name": name, "seeds": 0, "bar": ">= 0", "holds": False}]
    products = data.fields["product"][text_gallery(data, asked_rows(data, Trial(name=""))[1])].tolist()
    peer = text_ndcg(data, products, lambda texts: tfidf([data.titles[p] for p in products], texts))
    told = {"name": name, "ours": float(np.mean(found)), "peer": peer, "points": float(np.mean(found)) - peer}
    return [{**told, "seeds": len(found), "bar": ">= 0", "holds": told["points"] >= 0}]


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    head = ("comparison", *FIGURES, "95 %", "seeds", "bar", "")
    said_of = {True: "holds", False: "FAILS", None: ""}
    rows = [
        (
            str(x["name"]),
            *((f"{x[key]:.3f}" if abs(x["ours"]) <= 1 else f"{x[key]:.1f}") if key in x else "not done" for key in FIGURES),
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
