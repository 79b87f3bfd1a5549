"""Requests from strangers: read within limits, checked, and refused with an error that says what is allowed."""

import asyncio
import base64
import binascii
import json
from collections.abc import Mapping
from typing import Any

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException

from idem import images
from idem.types import Query

FORM_OVERHEAD = 65_536  # bytes of a request beyond its picture and text


class Limits(BaseModel):
    """What one request may ask for."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    max_image_bytes: int = Field(default=20_000_000, ge=1)
    max_pixels: int = Field(default=images.MAX_PIXELS, ge=1)
    max_text: int = Field(default=2_000, ge=1)  # characters
    max_top_k: int = Field(default=100, ge=1)
    max_depth: int = Field(default=100, ge=1)

    @property
    def max_body(self) -> int:
        """Bytes of a request: base64 takes 4 for 3."""
        return self.max_image_bytes * 4 // 3 + 4 * self.max_text + FORM_OVERHEAD


class SearchRequest(BaseModel):
    """image: base64 (or a data: URL) in JSON, a file in a form; text: what the user wrote; at least one of the two.

    depth: how many products the reranker sees (None: the service's own setting).
    """

    model_config = ConfigDict(extra="forbid")
    image: str = ""
    text: str = ""
    top_k: int = Field(default=10, ge=1)
    rerank: bool = True
    depth: int | None = Field(default=None, ge=1)


class ApiError(Exception):
    """An answer other than 200: status, a stable code, a sentence, and headers."""

    def __init__(self, status: int, code: str, message: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


def request_schema() -> dict[str, Any]:
    """OpenAPI's words for the two forms of a search request, which are parsed here and not by FastAPI."""
    schema = SearchRequest.model_json_schema()
    form = {**schema, "properties": {**schema["properties"], "image": {"type": "string", "format": "binary"}}}
    return {"required": True, "content": {"application/json": {"schema": schema}, "multipart/form-data": {"schema": form}}}


def _validated(fields: Mapping[str, Any], limits: Limits) -> SearchRequest:
    try:
        asked = SearchRequest.model_validate(fields)
    except ValidationError as error:
        said = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'body'}: {e['msg']}" for e in error.errors())
        raise ApiError(422, "invalid_request", f"{said}. Allowed fields: {', '.join(SearchRequest.model_fields)}") from error
    for name, found, most in (("top_k", asked.top_k, limits.max_top_k), ("depth", asked.depth or 1, limits.max_depth)):
        if found > most:
            raise ApiError(422, "invalid_request", f"{name} is {found}; allowed are 1 to {most}")
    if len(asked.text) > limits.max_text:
        raise ApiError(422, "invalid_request", f"text has {len(asked.text):,} characters; at most {limits.max_text:,} are allowed")
    return asked


def _unbase64(text: str) -> bytes:
    if text.startswith("data:"):
        text = text.partition(",")[2]
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ApiError(422, "image_not_base64", f"image must be base64: {error}") from error


async def _read_json(request: Request, limits: Limits) -> tuple[SearchRequest, bytes | None]:
    try:
        fields = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, "invalid_json", f"the body is not valid JSON: {error}") from error
    if not isinstance(fields, dict):
        raise ApiError(422, "invalid_request", f"the body must be a JSON object, found {type(fields).__name__}")
    asked = _validated(fields, limits)
    return asked, _unbase64(asked.image) if asked.image else None


async def _read_form(request: Request, limits: Limits) -> tuple[SearchRequest, bytes | None]:
    try:
        async with request.form(max_files=1, max_fields=8) as form:
            upload = form.get("image")
            if isinstance(upload, str) and upload:
                raise ApiError(422, "invalid_request", "image must be a file in a form; send JSON for base64")
            fields = {name: value for name, value in form.items() if name != "image"}
            data = await upload.read() if isinstance(upload, UploadFile) and (upload.filename or upload.size) else None
    except (MultiPartException, HTTPException) as error:
        raise ApiError(400, "invalid_form", f"the form cannot be read: {getattr(error, 'detail', error)}") from error
    return _validated(fields, limits), data


async def read_search(request: Request, limits: Limits, decoders: asyncio.Semaphore) -> tuple[SearchRequest, Query]:
    """The request, with its picture decoded once on a thread, so that no model meets one that it cannot read."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    readers = {"application/json": _read_json, "multipart/form-data": _read_form}
    if kind not in readers:
        raise ApiError(415, "unsupported_content_type", f"content type {kind or 'none'!r}; allowed are {', '.join(readers)}")
    asked, data = await readers[kind](request, limits)
    if data is None and not asked.text.strip():
        raise ApiError(422, "query_empty", "a query needs an image, a text, or both; found neither")
    if data is not None:
        try:
            async with decoders:
                await asyncio.to_thread(images.decode, data, max_pixels=limits.max_pixels, max_bytes=limits.max_image_bytes, draft=64)
        except images.ImageError as error:
            raise ApiError(413 if error.reason == "image_too_many_bytes" else 422, error.reason, str(error)) from error
    return asked, Query(image=data, text=asked.text)
