"""What serve.sdk's clients send and how they read the answer; neither waits nor connects."""

import base64
import email.utils
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar
from urllib.parse import quote

import httpx
import numpy as np
from pydantic import BaseModel, ValidationError

from serve.replies import BatchResponse, Changed, EmbeddingsResponse, FeedbackResponse, RerankResponse, SearchResponse

T = TypeVar("T")
M = TypeVar("M", bound=BaseModel)
R = TypeVar("R")

Source = str | Path | bytes  # a picture: where its file is, or its bytes
RETRIED = (429, 503)
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 8.0  # where the service does not say how long


class IdemError(Exception):
    """The service refused, failed, or did not answer (status 0, code "unreachable"). code is stable, the message is for people."""

    def __init__(self, status: int, code: str, message: str, request_id: str = "") -> None:
        super().__init__(f"{status} {code}: {message}" + (f" (request {request_id})" if request_id else ""))
        self.status, self.code, self.message, self.request_id = status, code, message, request_id


class Ask(TypedDict, total=False):
    """One search: image or image_url, text, or both. crop: (left, top, right, bottom) as fractions of the upright picture.

    filter: column to a value, a list of values, or {"gte": 10, "lt": 20}; min_score: the least relevance of a result.
    """

    image: Source | None
    image_url: str
    text: str
    top_k: int
    rerank: bool
    depth: int
    crop: Sequence[float]
    filter: Mapping[str, Any]
    min_score: float
    release: str


class Shown(TypedDict, total=False):
    """A picture, a text, or both, to embed or to rank."""

    image: Source
    image_url: str
    text: str


class ItemFields(TypedDict, total=False):
    """A whole item beside its id; product_id, and a title or a picture, have to be there (serve.bodies.ItemBody)."""

    product_id: str
    family_id: str
    category: str
    title: str
    image: Source
    image_url: str
    lang: str
    role: str
    style: str
    id_split: str
    version: int
    attributes: Mapping[str, str | bool | int | float]


class Happened(TypedDict, total=False):
    """What somebody did with the answer whose request_id is query_id; time: with its zone, now if not given."""

    query_id: str
    item_id: str
    kind: Literal["click", "purchase"]
    time: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """vectors: (n, dim) float32, L2-normalised, in the order of the inputs; model: the release that embedded."""

    vectors: np.ndarray
    model: str
    tokens: int


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One request, and what its answer is read as."""

    method: str
    path: str
    body: Any
    read: Callable[[bytes], T]


def plain(fields: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON has it: pictures in base64, times in ISO 8601, None left out."""
    told = {name: value for name, value in fields.items() if value is not None}
    for name, value in told.items():
        if name == "image":
            data = value if isinstance(value, bytes) else Path(value).read_bytes()
            told[name] = base64.b64encode(data).decode()
        elif isinstance(value, datetime):
            told[name] = value.isoformat()
        elif name == "crop":
            told[name] = list(value)
    return told


def _entry(shown: str | Shown) -> str | dict[str, Any]:
    return shown if isinstance(shown, str) else plain(shown)


def reply(model: type[M]) -> Callable[[bytes], M]:
    return model.model_validate_json


def search(ask: Ask) -> Call[SearchResponse]:
    return Call("POST", "/v1/search", plain(ask), reply(SearchResponse))


def search_batch(asks: Sequence[Ask]) -> Call[BatchResponse]:
    return Call("POST", "/v1/search:batch", [plain(ask) for ask in asks], reply(BatchResponse))


def embed(inputs: Sequence[str | Shown], dimensions: int | None) -> Call[Embedded]:
    def read(data: bytes) -> Embedded:
        said = EmbeddingsResponse.model_validate_json(data)
        rows = [np.frombuffer(base64.b64decode(str(each.embedding)), "<f4") for each in said.data]
        return Embedded(vectors=np.stack(rows).astype(np.float32), model=said.model, tokens=said.usage.total_tokens)

    body = plain({"input": [_entry(each) for each in inputs], "encoding_format": "base64", "dimensions": dimensions})
    return Call("POST", "/v1/embeddings", body, read)


def rerank(query: str | Shown, documents: Sequence[str | Shown], top_n: int | None) -> Call[RerankResponse]:
    body = plain({"query": _entry(query), "documents": [_entry(each) for each in documents], "top_n": top_n})
    return Call("POST", "/v1/rerank", body, reply(RerankResponse))


def put(item_id: str, fields: ItemFields) -> Call[Changed]:
    return Call("PUT", _item(item_id), plain(fields), reply(Changed))


def delete(item_id: str) -> Call[Changed]:
    return Call("DELETE", _item(item_id), None, reply(Changed))


def feedback(events: Sequence[Happened]) -> Call[FeedbackResponse]:
    return Call("POST", "/v1/feedback", {"events": [plain(event) for event in events]}, reply(FeedbackResponse))


def _item(item_id: str) -> str:
    return f"/v1/items/{quote(item_id, safe='/')}"


def refused(response: httpx.Response) -> IdemError:
    """The error of an answer, whoever on the way gave it."""
    try:
        said = response.json()["error"]
        return IdemError(response.status_code, str(said["code"]), str(said["message"]), str(said["request_id"]))
    except (ValueError, KeyError, TypeError):
        return IdemError(response.status_code, "unexpected_answer", response.text[:200])


def understood(call: Call[R], response: httpx.Response) -> R:
    """What was answered. IdemError for an error, and for an answer of another service."""
    if not response.is_success:
        raise refused(response)
    try:
        return call.read(response.content)
    except (ValidationError, ValueError) as error:
        raise IdemError(response.status_code, "unexpected_answer", f"the answer cannot be read: {error}") from error


def wait_s(response: httpx.Response, attempt: int, left_s: float) -> float | None:
    """Seconds until the next attempt (numbered from 0), None where there is to be none: another error, or it would come too late."""
    if response.status_code not in RETRIED:
        return None
    waited = min(FIRST_WAIT_S * 2**attempt, LONGEST_WAIT_S)
    if said := response.headers.get("retry-after", ""):
        with suppress(ValueError):
            waited = float(said) if said[0].isdigit() else email.utils.parsedate_to_datetime(said).timestamp() - time.time()
    return max(waited, 0.0) if waited <= left_s else None
