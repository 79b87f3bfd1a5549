"""What FAISS's kinds of index have in common for us: search parameters, joining, and the vectors that they store.

An index is a shell of a few kinds: a refine step (IndexRefine) around a transform (IndexPreTransform) around lists (IVF), a graph
(HNSW) or plain codes. Each function here walks that shell once.
"""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import faiss
import numpy as np

PROBED = (0.5, 8.0)  # share ** -0.5 times as many lists, eight times at most
COARSE = 4  # of so many times the wanted by their bytes, the best by their own codes are as good as the best of all
BYTES_AT_ONCE = 16  # FAISS has fast code for dimensions that are a multiple of it
NOT_TRAINED = ("IndexFlat", "IndexFlatIP", "IndexFlatL2")


def lists_of(factory: str) -> int:
    """How many lists a FAISS factory asks for, 0 where it has none."""
    found = re.search(r"IVF(\d+)", factory)
    return int(found[1]) if found else 0


def layers(index: Any) -> Iterator[Any]:
    """The index and what is inside it, outermost first, each as its own class."""
    while True:
        index = faiss.downcast_index(index)
        yield index
        if isinstance(index, faiss.IndexRefine):
            index = index.base_index
        elif isinstance(index, faiss.IndexPreTransform):
            index = index.index
        else:
            return


@contextmanager
def clustered_on_gpus(index: Any) -> Iterator[None]:
    """While it lasts, an index that is trained finds its lists on the GPUs that this FAISS can use, if any: k-means is most of training."""
    ivf = next((layer for layer in layers(index) if isinstance(layer, faiss.IndexIVF)), None)
    if ivf is None or not faiss.get_num_gpus():
        yield
        return
    finds = faiss.index_cpu_to_all_gpus(faiss.IndexFlat(ivf.d, ivf.metric_type))  # FAISS keeps no reference to it
    ivf.clustering_index = finds
    try:
        yield
    finally:
        ivf.clustering_index = None


def parameters(index: Any, wanted: int, spare: int, selector: Any = None, share: float = 1.0) -> Any:
    """To search an index as it is set for `wanted` and `spare` more, among the rows that `selector` lets through, `share` of all (0 to 1).

    The spare ones are not refined for: a refine step takes k_factor times `wanted` from the index below it, as FAISS does for `wanted`.
    The nearest of a few rows are farther away than the nearest of all, so lists are probed more (PROBED); a graph is walked 1 / share as
    far, because its walk counts the rows that it may not return.
    """
    index, settings = faiss.downcast_index(index), faiss_parameters
    if selector is None and not isinstance(index, faiss.IndexRefine):
        return None
    if isinstance(index, faiss.IndexRefine):
        below = wanted * index.k_factor
        inner = parameters(index.base_index, wanted, spare, selector, share)
        return settings("IndexRefineSearchParameters", k_factor=max(1.0, below / (wanted + spare)), base_index_params=inner)
    if isinstance(index, faiss.IndexPreTransform):
        return settings("SearchParametersPreTransform", index_params=parameters(index.index, wanted, spare, selector, share))
    if isinstance(index, faiss.IndexIVF):
        probed = index.nprobe * min(PROBED[1], share ** -PROBED[0])
        return settings("IVFSearchParameters", nprobe=min(index.nlist, round(probed)), sel=selector)
    if isinstance(index, faiss.IndexHNSW):
        return settings("SearchParametersHNSW", efSearch=round(index.hnsw.efSearch / share), sel=selector)
    return settings("SearchParameters", sel=selector)


def faiss_parameters(kind: str, **fields: Any) -> Any:
    """FAISS's search parameters of that name; its constructors take fields that type checkers do not see."""
    return getattr(faiss, kind)(**{name: value for name, value in fields.items() if value is not None})


def _codes(index: Any) -> Any:
    """The plain codes that an index ranks by in the end, by themselves an index; None where they are in lists or transformed."""
    for layer in layers(index):
        if isinstance(layer, faiss.IndexRefine):
            return faiss.downcast_index(layer.refine_index)
        if isinstance(layer, faiss.IndexPreTransform):
            return None
        if isinstance(layer, faiss.IndexHNSW):
            return faiss.downcast_index(layer.storage)
        if isinstance(layer, faiss.IndexFlat | faiss.IndexScalarQuantizer):
            return layer
    return None


def compact(index: Any, rows: np.ndarray) -> Any:
    """A small index of `rows` (m,) alone, by a copy of their codes, for what may be mapped from a file larger than memory. None where the
    index has no such codes.

    An index that promises exact answers keeps its promise; of any other the rows are compared as bytes first.
    """
    source, outer = _codes(index), faiss.downcast_index(index)
    if isinstance(source, faiss.IndexScalarQuantizer):
        small = faiss.IndexScalarQuantizer(source.d, source.sq.qtype, source.metric_type)
        small.sq, small.is_trained = source.sq, True
    elif isinstance(source, faiss.IndexFlat):
        small = faiss.IndexFlat(source.d, source.metric_type)
    else:
        return None
    every = faiss.rev_swig_ptr(source.codes.data(), source.ntotal * source.code_size).reshape(source.ntotal, source.code_size)
    small.add_sa_codes(np.take(every, rows, axis=0))
    exact = isinstance(outer, faiss.IndexFlat | faiss.IndexScalarQuantizer)
    return small if exact or small.d % BYTES_AT_ONCE else BytesFirst.of(small)


@dataclass(frozen=True, slots=True)
class BytesFirst:
    """COARSE times as many as are wanted are found by their signed bytes, in a fifth of the time that fp16 takes; `own` then ranks them.

    FAISS compares bytes with a query cut to whole numbers, so both are stretched to fill a byte: that changes no order of inner products.
    """

    first: Any
    own: Any

    @classmethod
    def of(cls, own: Any) -> "BytesFirst":
        first = faiss.IndexScalarQuantizer(own.d, faiss.ScalarQuantizer.QT_8bit_direct_signed, faiss.METRIC_INNER_PRODUCT)
        first.add(_stretched(own.reconstruct_n(0, own.ntotal), None))
        return cls(first, own)

    def search(self, vectors: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Scores (n, k) and rows (n, k) of the k best for each of `vectors` (n, dim), best first; k is at most the number of rows."""
        found = self.first.search(_stretched(vectors, 1), min(COARSE * k, self.own.ntotal))[1]
        scores = np.empty(found.shape, np.float32)
        for i, rows in enumerate(found):
            scores[i] = self.own.reconstruct_batch(rows) @ vectors[i]
        order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return np.take_along_axis(scores, order, 1), np.take_along_axis(found, order, 1)


def _stretched(vectors: np.ndarray, axis: int | None) -> np.ndarray:
    """Vectors (n, dim) as whole numbers up to 127, each by its own largest (axis 1) or all by one."""
    largest = np.abs(vectors).max(axis=axis, keepdims=True, initial=0.0)
    return np.rint(vectors * (127 / np.maximum(largest, 1e-12)))


def _trained(index: Any) -> list[np.ndarray] | None:
    """What training has left in an index, to tell whether two have the same; None for kinds that cannot be joined."""
    index = faiss.downcast_index(index)
    kind = [np.frombuffer(type(index).__name__.encode(), np.uint8)]
    if isinstance(index, faiss.IndexRefine):
        parts = [_trained(index.base_index), _trained(index.refine_index)]
        return None if None in parts else [*kind, *(array for part in parts if part for array in part)]
    if isinstance(index, faiss.IndexIVF):
        codebooks = [faiss.vector_to_array(index.pq.centroids)] if hasattr(index, "pq") else []
        scalars = [faiss.vector_to_array(index.sq.trained)] if hasattr(index, "sq") else []
        return [*kind, faiss.serialize_index(index.quantizer), *codebooks, *scalars]
    if isinstance(index, faiss.IndexScalarQuantizer):
        return [*kind, faiss.vector_to_array(index.sq.trained)]
    return kind if type(index).__name__ in NOT_TRAINED else None


def joinable(indexes: Sequence[Any]) -> bool:
    """May these be one index? They may where they were trained once, and their kind keeps lists or plain codes."""
    first, *others = [_trained(index) for index in indexes]
    return first is not None and all(
        other is not None and len(other) == len(first) and all(map(np.array_equal, first, other)) for other in others
    )


def join(into: Any, other: Any) -> None:
    """Move the vectors of `other` behind those of `into`, numbered on; `other` is empty then. Only what is `joinable`."""
    into, other = faiss.downcast_index(into), faiss.downcast_index(other)
    if isinstance(into, faiss.IndexRefine):
        join(into.base_index, other.base_index)
        join(into.refine_index, other.refine_index)
        into.ntotal = into.base_index.ntotal
    elif isinstance(into, faiss.IndexIVF):
        _move_whole_blocks(into, other)
        into.merge_from(other, into.ntotal)
    else:
        into.merge_from(other)


def _move_whole_blocks(into: Any, other: Any) -> None:
    """Append, of `other`, the fast-scan lists that FAISS 1.15 appends wrongly.

    Where a list holds a multiple of block_size vectors (its number of bytes, where that of vectors was meant), BlockInvertedLists
    copies as many blocks as the whole list will have, past the end of both. Such a list gets its last vector anew, with those of `other`.
    """
    lists, more = (faiss.downcast_InvertedLists(index.invlists) for index in (into, other))
    if not isinstance(lists, faiss.BlockInvertedLists):
        return
    for number in range(lists.nlist):
        size, added = lists.list_size(number), more.list_size(number)
        if size and added and size % lists.block_size == 0:
            last = faiss.rev_swig_ptr(lists.get_ids(number), size)[-1:]
            ids = np.concatenate([last, faiss.rev_swig_ptr(more.get_ids(number), added) + into.ntotal])
            codes = [_code(lists, number, size - 1), *(_code(more, number, i) for i in range(added))]
            blocks = np.zeros(-(-len(codes) // lists.n_per_block) * lists.block_size, np.uint8)
            for i, code in enumerate(codes):
                lists.packer.pack_1_c(faiss.swig_ptr(code), i, faiss.swig_ptr(blocks))
            lists.resize(number, size - 1)
            lists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(blocks))
            more.resize(number, 0)


def _code(lists: Any, number: int, place: int) -> np.ndarray:
    code = np.empty(lists.packer.code_size, np.uint8)
    lists.packer.unpack_1_c(lists.get_codes(number), place, faiss.swig_ptr(code))
    return code
