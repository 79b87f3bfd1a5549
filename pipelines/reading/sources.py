"""Files from anyone -> a plan of what to read. No Ray; planning looks at schemas, ids and line ends, never at pictures.

A source is one file, a folder of files of one format, or a Lance dataset. In a folder, files with an image column hold records;
a parquet, jsonl or csv file without one whose product_id is unique describes products, and its attributes are joined to the
records; anything else is named as not read. Where no file has pictures, those with ids and a title hold records.
"""

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.fs

from idem import storage
from pipelines.reading.attributes import is_unique
from pipelines.reading.fields import is_image
from pipelines.reading.heads import Head, kept_type, look, units_of
from pipelines.reading.units import ALLOWED, FORMATS, TABLES, Reading, SourceFile, SourcePlan, Unit, format_of
from pipelines.records import Columns

__all__ = ["Reading", "SourceFile", "SourcePlan", "Unit", "plan_source"]

REQUIRED = ("item_id", "product_id", "image")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Found:
    """A file that could be read. `stamp` changes when it does."""

    uri: str
    name: str
    format: str
    bytes: int
    stamp: tuple[str, int, int]


def _found(uri: str, info: pyarrow.fs.FileInfo, kind: str) -> _Found:
    return _Found(uri=uri, name=info.base_name, format=kind, bytes=info.size, stamp=(info.base_name, info.size, info.mtime_ns))


def _inside(uri: str, *, recursive: bool = False) -> list[pyarrow.fs.FileInfo]:
    filesystem, path = storage.open_filesystem(uri)
    with storage.reaching(uri):
        selector = pyarrow.fs.FileSelector(path, recursive=recursive, allow_not_found=True)
        return sorted(filesystem.get_file_info(selector), key=lambda info: info.path)


def _lance(uri: str) -> list[_Found]:
    name = uri.rstrip("/").rsplit("/", 1)[-1]
    size = sum(info.size or 0 for info in _inside(storage.join(uri, "data"), recursive=True))
    # The newest of its manifests tells: versions alone start again where a dataset is made anew.
    newest = max((info.mtime_ns or 0, info.base_name, info.size or 0) for info in _inside(storage.join(uri, "_versions")))
    return [_Found(uri=uri, name=name, format="lance", bytes=size, stamp=(f"{name}/{newest[1]}", newest[2], newest[0]))]


def _list(uri: str, format: str) -> tuple[list[_Found], str]:
    """The files at `uri` (itself, or directly in that folder) that could be read, by name; and the folder they are in."""
    if format and format not in FORMATS:
        raise ValueError(f"the format {format!r} is unknown; allowed are {', '.join(FORMATS)}")
    filesystem, path = storage.open_filesystem(uri)
    with storage.reaching(uri):
        info = filesystem.get_file_info(path)
    if info.type == pyarrow.fs.FileType.NotFound:
        raise ValueError(f"the source {uri} does not exist; a file or a folder of files is needed ({ALLOWED})")
    folder = uri.rstrip("/").rpartition("/")[0] or ("/" if uri.startswith("/") else ".")
    if info.type == pyarrow.fs.FileType.File:
        if not (kind := format or format_of(info.base_name)):
            raise ValueError(f"the name of {uri} does not say its format; allowed are {ALLOWED}; or say which it is")
        return [_found(uri, info, kind)], folder
    inside = _inside(uri)
    if any(entry.base_name == "_versions" and entry.type == pyarrow.fs.FileType.Directory for entry in inside):
        if format not in ("", "lance"):
            raise ValueError(f"{uri} is a Lance dataset, but the format {format!r} is asked for")
        return _lance(uri), folder
    files = [entry for entry in inside if entry.type == pyarrow.fs.FileType.File and entry.base_name[0] not in "._"]
    known = [_found(storage.join(uri, entry.base_name), entry, format_of(entry.base_name)) for entry in files]
    known = [file for file in known if file.format and (not format or file.format == format or file.format in TABLES)]
    if not any(file.format == format or not format for file in known):
        told = ", ".join(entry.base_name for entry in inside[:20]) + (f" and {len(inside) - 20} more" if len(inside) > 20 else "")
        asked = f"of the format {format}" if format else "of a known format"
        raise ValueError(f"the folder {uri} holds no file {asked}; found {told or 'nothing'}; allowed are {ALLOWED}")
    return known, uri


def _kind(file: _Found, head: Head, columns: Columns, format: str) -> str:
    if head.empty or columns.image in head.names:
        return "records" if not format or file.format == format else "not_read"
    if file.format in TABLES and columns.product_id in head.names and is_unique(file.uri, columns.product_id):
        return "attributes"
    return "not_read"


def _kinds(files: Sequence[_Found], heads: Mapping[str, Head], columns: Columns, format: str) -> dict[str, str]:
    """ "records", "attributes" or "not_read", by URI."""
    if len(files) == 1:
        return {files[0].uri: "records"}
    kinds = {file.uri: _kind(file, heads[file.uri], columns, format) for file in files}
    if any(kinds[file.uri] == "records" and not heads[file.uri].empty for file in files) or "image" in columns.model_fields_set:
        return kinds
    texts = {columns.item_id, columns.product_id, columns.title}
    for file in files:
        if texts <= set(heads[file.uri].names) and (not format or file.format == format):
            kinds[file.uri] = "records"
    return kinds


def _check(file: _Found, head: Head, columns: Columns) -> None:
    """ValueError unless a file of records has what is required, in a usable type."""
    if head.empty and not head.names:
        return
    text_only = columns.image not in head.names and "image" not in columns.model_fields_set and columns.title in head.names
    missing = [f"{columns.get(f)!r} (for {f})" for f in REQUIRED if columns.get(f) not in head.names and not (f == "image" and text_only)]
    if missing:
        exist = f"its columns are {', '.join(head.names) or 'none'}"
        raise ValueError(f"{file.uri} has no column {', '.join(missing)}; {exist}. Name yours in [ingest.columns]")
    for field in Columns.model_fields:
        if head.types is None or (name := columns.get(field)) not in head.names:
            continue
        kind = head.types.field(name).type
        if not is_image(kind) if field == "image" else pa.types.is_nested(kind):
            wanted = "binary, a struct of bytes and path, or paths or URLs as text" if field == "image" else "a plain text or number"
            raise ValueError(f"{file.uri}: column {name!r} (for {field}) is of type {kind}; {wanted} is needed")


def _check_all(uri: str, read: Sequence[_Found], records: Sequence[_Found], heads: Mapping[str, Head], columns: Columns) -> None:
    formats = {file.format: file.name for file in reversed(records)}
    if len(formats) > 1:
        told = ", ".join(f"{name} ({kind})" for kind, name in sorted(formats.items()))
        raise ValueError(f"{uri} holds records in more than one format: {told}; one folder is one format: say which, or split it")
    for file in records:
        _check(file, heads[file.uri], columns)
    exist = {name for file in read for name in heads[file.uri].names}
    unknown = sorted(f"{columns.get(f)!r} (for {f})" for f in columns.model_fields_set if columns.get(f) not in exist)
    if unknown and exist:
        raise ValueError(f"{uri} has no column {', '.join(unknown)}; its columns are {', '.join(sorted(exist))}")


def _kept(uri: str, records: Sequence[_Found], heads: Mapping[str, Head], keep: Sequence[str]) -> pa.DataType | None:
    """The struct of the columns kept for filters: where files differ, the type that holds all, else that of the first."""
    fields: list[pa.Field] = []
    for name in dict.fromkeys(keep):
        types = [kind for file in records if (kind := kept_type(heads[file.uri], file.format, name)) is not None]
        if not types:
            exist = sorted({name for file in records for name in heads[file.uri].names})
            raise ValueError(f"{uri} has no column {name!r} to keep; the columns of its records are {', '.join(exist) or 'none'}")
        try:
            schemas = [pa.schema([pa.field(name, kind)]) for kind in types]
            fields += list(pa.unify_schemas(schemas, promote_options="permissive"))
        except pa.ArrowException:
            fields.append(pa.field(name, types[0]))
    return pa.struct(fields) if fields else None


def _source_file(file: _Found, fingerprint: str, *, done: bool, unit_rows: int) -> tuple[SourceFile, list[Unit]]:
    told = {"uri": file.uri, "name": file.name, "format": file.format, "bytes": file.bytes, "fingerprint": fingerprint}
    made = SourceFile(**told, rows=0)
    # Lines of files that were read before are not counted again.
    units = [] if done and file.format in ("jsonl", "csv") else list(units_of(made, unit_rows))
    return SourceFile(**told, rows=sum(unit.rows for unit in units)), [] if done else units


def plan_source(
    uri: str,
    columns: Columns,
    *,
    format: str = "",
    keep: Sequence[str] = (),
    images: str = "",
    done: Collection[str] = (),
    unit_rows: int = 4096,
) -> SourcePlan:
    """Look at a source and say what would be read; ValueError says what is missing, where, and what there is.

    format: "" where names and contents tell; keep: columns to be kept for filters; images: where relative paths of pictures start,
    "" for the folder of the source; done: fingerprints of files that were read before and are left out.
    """
    found, folder = _list(uri, format)
    heads = {file.uri: look(file.uri, file.format, columns) for file in found}
    kinds = _kinds(found, heads, columns, format)
    read = [file for file in found if kinds[file.uri] != "not_read"]
    records = [file for file in read if kinds[file.uri] == "records"]
    if not records:
        told = "; ".join(f"{file.name}: {', '.join(heads[file.uri].names)}" for file in found)
        raise ValueError(f"no file in {uri} has a column {columns.image!r} (for image). Found {told}")
    _check_all(uri, read, records, heads, columns)
    attributes = [file for file in read if kinds[file.uri] == "attributes"]
    files: list[SourceFile] = []
    units: list[Unit] = []
    for file in records:
        stamps = repr([file.stamp, *(other.stamp for other in attributes)])
        fingerprint = hashlib.sha256(stamps.encode()).hexdigest()[:16]
        made, own = _source_file(file, fingerprint, done=fingerprint in done, unit_rows=unit_rows)
        files.append(made)
        units += own
    if not units and not any(file.fingerprint in done for file in files):
        raise ValueError(f"the catalogue {uri} is empty: {', '.join(file.name for file in files)} holds no rows")
    return SourcePlan(
        uri=uri,
        reading=Reading(
            columns=columns,
            attributes=tuple(file.uri for file in attributes),
            kept=_kept(uri, records, heads, keep),
            images=images or folder,
        ),
        files=tuple(files),
        units=tuple(units),
        not_read=tuple(file.name for file in found if kinds[file.uri] == "not_read"),
    )
