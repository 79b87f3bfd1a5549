"""Requests from strangers: read within limits, checked, and refused with an error that says what is allowed."""

import time
from collections.abc import Mapping
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from idem import images
from serve import strict
from serve.bodies import SearchRequest
from serve.envelope import allow
from serve.errors import ApiError as ApiError  # for those who take it from here
from serve.errors import invalid

T = TypeVar("T", bound=BaseModel)

JSON, FORM = "application/json", "multipart/form-data"
FORM_OVERHEAD = 65_536  # bytes of a request beyond its picture and text
FEW_BYTES = 1_000_000  # of many small texts that are not counted one by one
AS_JSON = ("crop", "filter")  # fields that a form has as texts of JSON
TIMEOUT = "x-timeout-ms"
LONGEST_MS = 600_000
TOLD, SHOWN = 3, 300  # faults in a message, and characters of each


class Limits(BaseModel):
    """What one request may ask for. max_many_bytes, max_many_pixels: all pictures of a request that may have several, together.

    max_item_side: pixels of the longer side of an item's picture, which is made smaller beyond it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_image_bytes: int = Field(default=20_000_000, ge=1)
    max_pixels: int = Field(default=images.MAX_PIXELS, ge=1)
    max_text: int = Field(default=2_000, ge=1)  # characters
    max_top_k: int = Field(default=100, ge=1)
    max_depth: int = Field(default=100, ge=1)
    max_searches: int = Field(default=16, ge=1)
    max_inputs: int = Field(default=2_048, ge=1)
    max_documents: int = Field(default=100, ge=1)
    max_document_text: int = Field(default=20_000, ge=1)  # characters
    max_events: int = Field(default=1_000, ge=1)
    max_many_bytes: int = Field(default=48_000_000, ge=1)
    max_many_pixels: int = Field(default=200_000_000, ge=1)
    max_item_side: int = Field(default=1_024, ge=16, le=16_384)

    @property
    def max_body(self) -> int:
        """Bytes of a request with one picture: base64 takes 4 for 3."""
        return self.max_image_bytes * 4 // 3 + 4 * self.max_text + FORM_OVERHEAD

    @property
    def max_many_body(self) -> int:
        """Bytes of a request with several pictures."""
        return self.max_many_bytes * 4 // 3 + FEW_BYTES

    @property
    def max_feedback_body(self) -> int:
        return self.max_events * 4_096 + FORM_OVERHEAD


def told(error: ValidationError, model: type[BaseModel]) -> str:
    """What is wrong with a body, in few words whatever was sent."""
    faults = error.errors(include_input=False, include_url=False)
    said = [f"{_place(fault['loc'])}: {fault['msg'].removeprefix('Value error, ')}"[:SHOWN] for fault in faults[:TOLD]]
    more = [f"and {len(faults) - TOLD} more"] if len(faults) > TOLD else []
    names = (field.alias or name for name, field in model.model_fields.items())
    return f"{'; '.join([*said, *more])}. Allowed fields: {', '.join(names)}"


def _place(loc: tuple[int | str, ...]) -> str:
    return ".".join(str(each)[: strict.SHOWN] for each in loc if not str(each).startswith("~")) or "body"


def validated(model: type[T], fields: Any, *, converted: bool = False) -> T:
    """The body as its model. ApiError 422 `invalid_request`. converted: texts may stand for numbers, as in a form."""
    if not isinstance(fields, dict):
        raise invalid(f"the body must be a JSON object, found {type(fields).__name__}")
    try:
        return model.model_validate(fields, strict=False if converted else None)
    except ValidationError as error:
        raise invalid(told(error, model)) from error


def require_at_most(name: str, found: int, most: int, least: int = 1) -> None:
    if not least <= found <= most:
        raise invalid(f"{name} is {found:,}; allowed are {least:,} to {most:,}")


def require_short(name: str, text: str, most: int) -> None:
    if len(text) > most:
        raise invalid(f"{name} has {len(text):,} characters; at most {most:,} are allowed")


def kind_of(request: Request, *allowed: str) -> str:
    """Its content type. ApiError 415 where that is none of those allowed."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in allowed:
        raise ApiError(415, "unsupported_content_type", f"content type {kind[:100] or 'none'!r}; allowed are {', '.join(allowed)}")
    return kind


async def read_json(request: Request, most: int) -> Any:
    """A body of at most `most` bytes. ApiError 400, 413 or 415."""
    kind_of(request, JSON)
    allow(request, most)
    return strict.loads(await request.body())


async def read_search(request: Request, limits: Limits) -> tuple[SearchRequest, bytes | None]:
    """The request in either form; of a form also the bytes of its picture, which JSON has within."""
    if kind_of(request, JSON, FORM) == JSON:
        return checked(validated(SearchRequest, await read_json(request, limits.max_body)), limits), None
    allow(request, limits.max_body)
    fields, data = await _read_form(request)
    return checked(validated(SearchRequest, fields, converted=True), limits), data


async def _read_form(request: Request) -> tuple[dict[str, Any], bytes | None]:
    try:
        async with request.form(max_files=1, max_fields=16) as form:
            upload = form.get("image")
            if isinstance(upload, str) and upload:
                raise invalid("image must be a file in a form; send JSON for base64")
            if len(form) < len(pairs := form.multi_items()):
                raise invalid(f"a form has each field once; found {', '.join(sorted(name[: strict.SHOWN] for name, _ in pairs))}")
            fields = {name: _field(name, value) for name, value in pairs if name != "image"}
            data = await upload.read() if isinstance(upload, UploadFile) and (upload.filename or upload.size) else None
    except (MultiPartException, HTTPException) as error:
        raise ApiError(400, "invalid_form", f"the form cannot be read: {getattr(error, 'detail', error)}") from error
    return fields, data


def _field(name: str, value: UploadFile | str) -> Any:
    strict.require_text(name)
    if isinstance(value, UploadFile):
        return value
    strict.require_text(value)
    return strict.loads(value.encode()) if name in AS_JSON and value else value


def checked(asked: SearchRequest, limits: Limits) -> SearchRequest:
    """Held to the limits. ApiError 422."""
    require_at_most("top_k", asked.top_k, limits.max_top_k)
    require_at_most("depth", asked.depth or 1, limits.max_depth)
    require_short("text", asked.text, limits.max_text)
    if asked.min_score is not None and not asked.rerank:
        raise invalid("min_score is a limit of relevance, which only reranking gives: leave rerank on, or min_score out")
    return asked


def deadline(request: Request) -> float | None:
    """time.monotonic() by which the asker has given up, from X-Timeout-Ms, its milliseconds from now. ApiError 422."""
    given = request.headers.get(TIMEOUT)
    if given is None:
        return None
    if not (given.isascii() and given.isdigit() and len(given) < 7 and 1 <= int(given) <= LONGEST_MS):
        raise invalid(f"the header X-Timeout-Ms is {given[: strict.SHOWN]!r}; allowed are 1 to {LONGEST_MS:,} milliseconds")
    return time.monotonic() + int(given) / 1e3


def where_of(asked: SearchRequest) -> Mapping[str, Any] | None:
    """The filter as index.filters reads it."""
    return asked.model_dump(include={"filter"}, by_alias=True, exclude_unset=True).get("filter") or None
