"""What is answered: one model a reply. serve.sdk reads the same models, so nothing heavy is imported here."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class Told(BaseModel):
    """code: stable, for programs. message: for people. request_id: how the log of the service names this request."""

    code: str
    message: str
    request_id: str


class ErrorReply(BaseModel):
    error: Told


class Result(BaseModel):
    """rank and retrieval_rank count from 1; score is a cosine; relevance is P(the very same product), null where not reranked."""

    rank: int
    item_id: str
    product_id: str
    title: str
    category: str
    score: float
    relevance: float | None
    retrieval_rank: int
    image_url: str


class SearchResponse(BaseModel):
    """degraded: parts that failed or came too late, and min_score where it could not be held to; empty for a full answer.

    request_id: what feedback names as query_id. timings_ms: wall time by stage, in the gateway.
    """

    request_id: str
    release: str
    results: list[Result]
    degraded: list[str]
    timings_ms: dict[str, float]


class BatchEntry(BaseModel):
    """status: the one that this search would have had alone; with it an answer or an error."""

    status: int
    answer: SearchResponse | None = None
    error: Told | None = None


class BatchResponse(BaseModel):
    """answers: in the order of the searches."""

    request_id: str
    answers: list[BatchEntry]


class Usage(BaseModel):
    """prompt_tokens, total_tokens: an estimate, a token for 4 bytes of text and 64 for a picture."""

    prompt_tokens: int
    total_tokens: int


class Embedding(BaseModel):
    """embedding: numbers, or base64 of them as little-endian float32."""

    object: Literal["embedding"] = "embedding"
    index: int
    embedding: list[float] | str


class EmbeddingsResponse(BaseModel):
    """data: in the order of the inputs, L2-normalised. model: the release that embedded."""

    object: Literal["list"] = "list"
    data: list[Embedding]
    model: str
    usage: Usage


class RankedText(BaseModel):
    text: str


class Ranked(BaseModel):
    """index: of the document as sent, from 0. relevance_score: r, the calibrated probability of the very same product."""

    index: int
    relevance_score: float
    document: RankedText | None = None


class RerankMeta(BaseModel):
    """What Cohere's clients look for; nothing is billed."""

    api_version: dict[str, str] = Field(default_factory=lambda: {"version": "2"})


class RerankResponse(BaseModel):
    """results: best first in the reranker's own order, which may differ from that of the scores. id: the request_id."""

    id: str
    model: str
    results: list[Ranked]
    usage: Usage
    meta: RerankMeta


class Item(BaseModel):
    """What is known of an item, without its picture. Where to get that: image_url."""

    model_config = ConfigDict(extra="allow")
    item_id: str
    product_id: str = ""
    family_id: str = ""
    category: str = ""
    title: str = ""
    lang: str = ""
    role: str = ""
    style: str = ""
    width: int = 0
    height: int = 0
    image_url: str = ""


class Changed(BaseModel):
    """sequence: the number of this change in the catalogue's log; a release that has folded in this number holds it."""

    request_id: str
    item_id: str
    sequence: int


class Refused(BaseModel):
    """index: of the event as sent, from 0."""

    index: int
    message: str


class FeedbackResponse(BaseModel):
    """taken: how many events. refused: the others, which need not be sent again as they are."""

    request_id: str
    taken: int
    refused: list[Refused]


class Health(BaseModel):
    status: Literal["ok"] = "ok"


class Readiness(BaseModel):
    """parts: whether each answers; ready: whether all do (status 200, else 503)."""

    ready: bool
    parts: dict[str, bool]


class Version(BaseModel):
    """settings: what changes with the settings that answers depend on, beside the release."""

    name: str
    version: str
    release: str
    settings: str
