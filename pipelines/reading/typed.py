"""Formats that know their types (parquet, Arrow IPC, Lance) -> record batches. The rest of what is damaged is told, not guessed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import lance
import pyarrow as pa
import pyarrow.parquet as pq

from idem import storage, streams
from pipelines.reading.fields import STRING, is_any
from pipelines.records import BATCH_ROWS

DAMAGE = (OSError, pa.ArrowException)  # Unreachable, an OSError as well, is to be let through first
LANCE_DAMAGE = (OSError, ValueError, pa.ArrowException)
BUFFER = 4 << 20  # of a column that is read in pieces: a whole chunk of pictures would fill the memory
READ_AHEAD = 64 << 20  # of Lance, which takes 2 GiB otherwise
END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


@contextmanager
def open_parquet(uri: str) -> Iterator[pq.ParquetFile]:
    """The open file; ValueError that names it where its footer, or a part read without looking at damage, is not sound."""
    try:
        with (
            streams.open_random(uri) as raw,
            pq.ParquetFile(raw, buffer_size=BUFFER, pre_buffer=False, page_checksum_verification=True) as file,
        ):
            yield file
    except storage.Unreachable:
        raise
    except DAMAGE as error:
        raise ValueError(f"{uri} cannot be read as parquet: {' '.join(str(error).split())}") from error


def parquet_batches(file: pq.ParquetFile, group: int, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    return file.iter_batches(BATCH_ROWS, row_groups=[group], columns=list(names), use_threads=False)


@contextmanager
def open_arrow(uri: str) -> Iterator[pa.ipc.RecordBatchFileReader | pa.ipc.RecordBatchStreamReader]:
    """A reader of either form of Arrow IPC; ValueError where it has no schema."""
    with streams.open_stream(uri) as stream:
        is_file = stream.read(6) == b"ARROW1"
        stream.seek(0)
        try:
            reader = (pa.ipc.open_file if is_file else pa.ipc.open_stream)(pa.PythonFile(stream, "r"))
        except storage.Unreachable:
            raise
        except DAMAGE as error:
            raise ValueError(f"{uri} cannot be read as Arrow IPC: {' '.join(str(error).split())}") from error
        yield reader


def _checked(batch: pa.RecordBatch, names: Sequence[str]) -> pa.RecordBatch:
    """Its columns of these names; ArrowInvalid where offsets lead out of them, which Arrow itself does not look at."""
    batch = batch.select(list(names))
    for column in batch.columns:
        # As bytes: text that is not UTF-8 is no damage to us.
        (column.cast(pa.large_binary()) if is_any(column.type, STRING) else column).validate(full=True)
    return batch


def _has_end(uri: str) -> bool:
    with streams.open_random(uri) as raw:
        raw.seek(max(0, raw.seek(0, 2) - len(END_OF_STREAM)))
        return raw.read(len(END_OF_STREAM)) in (END_OF_STREAM, END_OF_STREAM[4:])


def arrow_batches(uri: str, names: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """All batches, small; one of DAMAGE is raised after those that could be read."""
    with open_arrow(uri) as reader:
        is_file = isinstance(reader, pa.ipc.RecordBatchFileReader)
        for batch in map(reader.get_batch, range(reader.num_record_batches)) if is_file else reader:
            checked = _checked(batch, names)
            yield from (checked.slice(start, BATCH_ROWS) for start in range(0, batch.num_rows, BATCH_ROWS))
    if not is_file and not _has_end(uri):  # cut off between two batches it reads as if it were whole
        raise pa.ArrowInvalid("it ends without the mark of its end")


def open_lance(uri: str, version: int | None = None) -> lance.LanceDataset:
    """The dataset; ValueError that names it where there is none or its manifest is damaged."""
    try:
        with storage.reaching(uri):
            return lance.dataset(uri, version=version, storage_options=storage.lance_options(uri))
    except storage.Unreachable:
        raise
    except LANCE_DAMAGE as error:
        raise ValueError(f"{uri} cannot be read as a Lance dataset: {' '.join(str(error).split())}") from error


def lance_batches(
    dataset: lance.LanceDataset, uri: str, fragment: int, names: Sequence[str], offset: int, rows: int
) -> Iterator[pa.RecordBatch]:
    """Rows of a fragment from the `offset`-th that is not deleted; one of LANCE_DAMAGE is raised after those that could be read."""
    found = dataset.get_fragment(fragment)
    assert found
    with storage.reaching(uri):
        yield from found.scanner(
            columns=list(names), offset=offset, limit=rows, batch_size=BATCH_ROWS, batch_readahead=2, io_buffer_size=READ_AHEAD
        ).to_batches()


def read_schema(uri: str, kind: str) -> pa.Schema:
    """Of an arrow or lance source; ValueError names it where there is none."""
    if kind == "lance":
        return open_lance(uri).schema
    with open_arrow(uri) as reader:
        return reader.schema


def count_arrow(uri: str) -> int:
    """How many rows there are; 0 for the form of streams, where only reading tells."""
    with open_arrow(uri) as reader:
        if not isinstance(reader, pa.ipc.RecordBatchFileReader):
            return 0
        try:
            return reader.count_rows()
        except storage.Unreachable:
            raise
        except DAMAGE:  # read_unit will come to it, and tell
            return 0
