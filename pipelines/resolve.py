"""Which records stay, which product belongs where, and which pictures were seen before: pure, one bucket of keys at a time.

What is known of a record is a dict with the fields of its key, `unit` (its place in the plan) and, for rows that the table
holds already, `address` (Lance's row address). Verdicts say what to do with which row; pipelines.revise does it.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.keys import BANDS
from pipelines.records import SETTLED, family_and_split, settle

Key = Mapping[str, Any]
COMPARED = 4096  # pictures that share a band of their hash and are compared, first come first

VERDICTS = pa.schema(
    [
        pa.field("row", pa.int64()),  # of the unit's items, or of the fragment; -1: all rows of `product_id`
        pa.field("product_id", pa.string()),
        pa.field("reason", pa.string()),  # the row goes: to the rejects if it is new, away if it was there
        pa.field("message", pa.string()),
        pa.field("family_id", pa.string()),  # this and the next: what they must be; null for as they are
        pa.field("id_split", pa.string()),
        pa.field("duplicate_of", pa.string()),
        pa.field("near_duplicate_of", pa.string()),
        pa.field("rank", pa.int64()),  # of several that a row looks like, the one with the lowest counts
    ]
)
UNCHANGED = "unchanged"  # a reason that is none: the table holds the very same record


@dataclass(frozen=True, slots=True)
class Verdict:
    """`unit` or `address` says where the row is; the other fields are those of VERDICTS."""

    unit: int = -1
    address: int = -1
    row: int = -1
    product_id: str | None = None
    reason: str | None = None
    message: str | None = None
    family_id: str | None = None
    id_split: str | None = None
    duplicate_of: str | None = None
    near_duplicate_of: str | None = None
    rank: int = 0


@dataclass(frozen=True)
class Resolved:
    """Verdicts on a bucket and what to count: names are those of the figures."""

    verdicts: list[Verdict]
    counts: dict[str, int]


def _age(key: Key) -> tuple[bool, int, int, int]:
    """Sorts the records of one item: a higher version is later, without versions the order of the source counts."""
    version = key["version"]
    return version is not None, version or 0, key["unit"], key["source_row"]


def _outdated(newest: Key, there: Key) -> bool:
    return None not in (newest["version"], there["version"]) and newest["version"] < there["version"]


def _loser(key: Key, winner: Key, told: str) -> Verdict:
    same = key["record_hash"] == winner["record_hash"]
    reason = "duplicate_id" if same else "superseded"
    what = "the very same record" if same else "another record"
    return Verdict(unit=key["unit"], row=key["row"], reason=reason, message=f"{what} with the item_id {key['item_id']!r} {told}")


def winners(ids: Iterable[Key], there: Mapping[str, Key]) -> Resolved:
    """One record an item: the last, or the one with the highest version. `there`: by item_id, the rows that the table holds.

    A tombstone (row -1) that wins takes the item away. Counts: inserted, updated, unchanged, removed, conflicting_ids.
    """
    groups: dict[str, list[Key]] = defaultdict(list)
    for key in ids:
        groups[key["item_id"]].append(key)
    verdicts: list[Verdict] = []
    counts: dict[str, int] = dict.fromkeys(("inserted", "updated", "unchanged", "removed", "conflicting_ids"), 0)
    for item_id, found in groups.items():
        found.sort(key=_age)
        newest, old = found[-1], there.get(item_id)
        stays = old if old and _outdated(newest, old) else newest
        told = f"has version {stays['version']}, this one {newest['version']}" if stays is old else _told(newest)
        losers = found if stays is old else found[:-1]
        verdicts += [_loser(key, stays, told) for key in losers if key["row"] >= 0]
        counts["conflicting_ids"] += len({key["record_hash"] for key in found if key["row"] >= 0}) > 1
        if stays is old:
            continue
        if newest["row"] < 0:
            counts["removed"] += old is not None
        elif old and old["record_hash"] == newest["record_hash"] and old["version"] == newest["version"]:
            counts["unchanged"] += 1
            verdicts.append(Verdict(unit=newest["unit"], row=newest["row"], reason=UNCHANGED))
            continue
        else:
            counts["updated" if old else "inserted"] += 1
        if old:
            verdicts.append(Verdict(address=old["address"], reason="replaced"))
    return Resolved(verdicts, counts)


def _told(newest: Key) -> str:
    where = f"row {newest['source_row']} of {newest['file']}"
    return f"is taken away by {where}" if newest["row"] < 0 else f"comes in {where}"


def settled(said: Iterable[Key], there: Mapping[str, Sequence[Key]], unseen_fraction: float) -> tuple[Resolved, list[tuple[str, str]]]:
    """One family and one split a product, whatever its records say. `there`: by product_id, the rows that the table holds.

    What this run says goes before what is there, so that a seller can put a family right; but once unseen stays unseen.
    Also gives (family, split) of each product. Counts: products, products_train, products_unseen, split_conflicts.
    """
    groups: dict[str, list[Key]] = defaultdict(list)
    for key in said:
        groups[key["product_id"]].append(key)
    verdicts: list[Verdict] = []
    places: list[tuple[str, str]] = []
    counts: dict[str, int] = dict.fromkeys(("products", "products_train", "products_unseen", "split_conflicts"), 0)
    for product_id, found in groups.items():
        rows = there.get(product_id, ())
        found.sort(key=lambda key: (key["unit"], key["source_row"]))
        answers = dict.fromkeys([tuple(key[f] for f in SETTLED) for key in found] + [_published(row) for row in rows])
        answer = settle(answers)
        family, split = family_and_split(product_id, answer, unseen_fraction)
        for key in found:
            if family_and_split(product_id, key, unseen_fraction) != (family, split):
                verdicts.append(Verdict(unit=key["unit"], product_id=product_id, family_id=family, id_split=split))
        for row in rows:
            if (row["family_id"], row["id_split"]) != (family, split):
                verdicts.append(Verdict(address=row["address"], family_id=family, id_split=split))
        counts["products"] += 1
        counts["products_train"] += split == "train"
        counts["products_unseen"] += split == "dev_unseen"
        counts["split_conflicts"] += len({told[SETTLED.index("id_split")] for told in answers} - {""}) > 1
        places.append((family, split))
    return Resolved(list(dict.fromkeys(verdicts)), counts), places


def _published(row: Key) -> tuple[str, ...]:
    """What a row of the table says of SETTLED; a family that is the product's own name was a fallback, not told."""
    return "" if row["family_id"] == row["product_id"] else row["family_id"], "", row["id_split"]


def alike(pictures: Iterable[Key], there: Iterable[Key], distance: int) -> Resolved:
    """Items whose content, or whose picture's perceptual hash up to `distance` bits, came with another item before.

    `there`: rows of the table with one of these content or perceptual hashes. At most BANDS - 1 bits are found for sure.
    """
    assert distance < BANDS
    same: dict[str, list[Key]] = defaultdict(list)
    near: dict[tuple[int, int], list[Key]] = defaultdict(list)
    old = list(there)
    looks: dict[int, Key] = {}
    for key in old:
        same[key["content_hash"]].append(key)
        if key["phash"] is not None:
            looks.setdefault(key["phash"], key)
    for key in pictures:
        if key["band"] == 0:
            same[key["content_hash"]].append(key)
        else:
            near[key["band"], (key["phash"] >> (16 * (key["band"] - 1))) & 0xFFFF].append(key)
    verdicts = [verdict for keys in same.values() if len(keys) > 1 for verdict in _repeats(keys)]
    for keys in near.values():
        verdicts += _close(keys, looks, distance)
    return Resolved(verdicts, {})


def _order(key: Key) -> tuple[int, int]:
    return key["unit"], key["source_row"]


def _repeats(keys: list[Key]) -> list[Verdict]:
    keys.sort(key=_order)
    first = keys[0]["item_id"]
    return [
        Verdict(unit=key["unit"], row=key["row"], duplicate_of=first) for key in keys[1:] if key["unit"] >= 0 and key["item_id"] != first
    ]


def _close(keys: list[Key], looks: Mapping[int, Key], distance: int) -> list[Verdict]:
    """Each picture beside the earliest that it looks like; those of equal content are told by _repeats."""
    keys.sort(key=_order)
    verdicts = []
    earliest: dict[int, Key] = {}
    for key in keys:
        if len(earliest) < COMPARED:
            earliest.setdefault(key["phash"], key)
    firsts = list(earliest.values())
    known = np.fromiter((key["phash"] for key in firsts), np.int64, len(firsts))
    for key in keys if len(keys) > 1 or looks else ():
        first = looks.get(key["phash"])
        if first is None:
            near = np.bitwise_count(np.bitwise_xor(known, key["phash"]).view(np.uint64)) <= distance
            first = firsts[int(near.argmax())] if near.any() else key
        if first["item_id"] != key["item_id"] and first["content_hash"] != key["content_hash"]:
            rank = first["unit"] << 32 | first["source_row"] if first["unit"] >= 0 else -1
            verdicts.append(Verdict(unit=key["unit"], row=key["row"], near_duplicate_of=first["item_id"], rank=rank))
    return verdicts
