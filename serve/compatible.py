"""Embeddings as OpenAI's clients ask for them, and rerankings as Cohere's and Jina's do; both also of pictures."""

import base64
from collections.abc import Sequence
from typing import Annotated, Literal

import numpy as np
from fastapi import Depends, FastAPI, Request

from idem.types import Document, Query, Ranking
from serve.access import Admit, Needs
from serve.backend import Backend
from serve.bodies import EmbeddingsRequest, RerankRequest
from serve.described import POSTED, body, errors
from serve.errors import ApiError, at, invalid
from serve.fields import Pictured
from serve.flow import PartError
from serve.intake import Limits, read_json, require_at_most, require_short, validated
from serve.pictures import Pictures, Room
from serve.replies import Embedding, EmbeddingsResponse, Ranked, RankedText, RerankMeta, RerankResponse, Usage

BYTES_A_TOKEN, TOKENS_A_PICTURE = 4, 64


def usage(texts: Sequence[str], pictures: int) -> Usage:
    """An estimate: the gateway lives without the models, and with them without their tokenizers."""
    tokens = sum(-(-len(text.encode()) // BYTES_A_TOKEN) for text in texts) + pictures * TOKENS_A_PICTURE
    return Usage(prompt_tokens=tokens, total_tokens=tokens)


def shortened(vector: np.ndarray, dimensions: int | None) -> np.ndarray:
    """The first so many of (dim,) float32, normalised again. ApiError 422 where there are not so many, or all of them are zero."""
    if dimensions is None:
        return np.asarray(vector, np.float32)
    require_at_most("dimensions", dimensions, len(vector))
    prefix = np.asarray(vector[:dimensions], np.float32)
    length = float(np.linalg.norm(prefix))
    if not length:
        raise invalid(f"the first {dimensions} of {len(vector)} dimensions are all zero; ask for more")
    return prefix / np.float32(length)


def encoded(vector: np.ndarray, form: Literal["float", "base64"]) -> list[float] | str:
    return vector.tolist() if form == "float" else base64.b64encode(vector.astype("<f4").tobytes()).decode()


def vectors_of(found: Sequence[np.ndarray | str], dimensions: int | None) -> list[np.ndarray]:
    """ApiError 422 names the input that could not be embedded; PartError for what are no numbers."""
    vectors = []
    for number, vector in enumerate(found):
        if isinstance(vector, str):
            raise ApiError(422, "query_unusable", f"input.{number}: {vector}")
        if not np.isfinite(vector).all():
            raise PartError("the embedder gives vectors that are not finite")
        vectors.append(shortened(vector, dimensions))
    return vectors


def ranked(ranking: Ranking, documents: Sequence[Document], *, top_n: int, returned: bool) -> list[Ranked]:
    """PartError where nothing could be judged: there is no r to tell."""
    if ranking.degraded:
        raise PartError("the reranker could not judge these documents in time, or at all")
    return [
        Ranked(
            index=i,
            relevance_score=round(ranking.relevance[i], 6),
            document=RankedText(text=documents[i].text) if returned else None,
        )
        for i in ranking.order[:top_n]
    ]


async def queries_of(sent: Sequence[str | Pictured], pictures: Pictures, most: int, room: Room, place: str) -> list[Query]:
    """One after the other, so that a request of many pictures leaves decoders to others. ApiError names the input that is of no use."""
    queries = []
    for number, each in enumerate(sent):
        with at(f"{place}.{number}"):
            entry = entry_of(each, most)
            queries.append(await pictures.query(entry, room=room))
    return queries


def entry_of(sent: str | Pictured, most: int) -> Pictured:
    """ApiError 422 for a text of more than `most` characters."""
    entry = Pictured(text=sent) if isinstance(sent, str) else sent
    require_short("text", entry.text, most)
    return entry


def add(app: FastAPI, backend: Backend, limits: Limits, pictures: Pictures, *, admit: Admit | None) -> None:
    needs = Needs("search", admit)

    @app.post("/v1/embeddings", openapi_extra=body(EmbeddingsRequest), responses=errors(*POSTED))
    async def embeddings(request: Request, tenant: Annotated[str, Depends(needs)]) -> EmbeddingsResponse:
        """A vector for each input, as OpenAI's API has it; inputs may also be objects with a picture, a text, or both."""
        asked = validated(EmbeddingsRequest, await read_json(request, limits.max_many_body))
        inputs = asked.input if isinstance(asked.input, list) else [asked.input]
        require_at_most("the number of inputs", len(inputs), limits.max_inputs)
        queries = await queries_of(inputs, pictures, limits.max_text, pictures.room(), "input")
        vectors = vectors_of(await backend.embed(tenant, queries), asked.dimensions)
        return EmbeddingsResponse(
            data=[Embedding(index=i, embedding=encoded(vector, asked.encoding_format)) for i, vector in enumerate(vectors)],
            model=backend.release,
            usage=usage([query.text for query in queries], sum(query.image is not None for query in queries)),
        )

    @app.post("/v2/rerank", include_in_schema=False, name="rerank_v2", response_model_exclude_none=True)
    @app.post("/v1/rerank", openapi_extra=body(RerankRequest), responses=errors(*POSTED), response_model_exclude_none=True)
    async def rerank(request: Request, tenant: Annotated[str, Depends(needs)]) -> RerankResponse:
        """Documents by how likely they are the very same product as the query. Also at /v2/rerank, where Cohere's client asks."""
        asked = validated(RerankRequest, await read_json(request, limits.max_many_body))
        require_at_most("the number of documents", len(asked.documents), limits.max_documents)
        room = pictures.room()
        with at("query"):
            query = await pictures.query(entry_of(asked.query, limits.max_text), room=room)
        sent = await queries_of(asked.documents, pictures, limits.max_document_text, room, "documents")
        documents = [Document(item_id=str(i), text=each.text, image=each.image, score=0.0) for i, each in enumerate(sent)]
        ranking = await backend.rerank(tenant, query, documents)
        everything = [query, *sent]
        return RerankResponse(
            id=request.state.request_id,
            model=backend.release,
            results=ranked(ranking, documents, top_n=asked.top_n or len(documents), returned=bool(asked.return_documents)),
            usage=usage([each.text for each in everything], sum(each.image is not None for each in everything)),
            meta=RerankMeta(),
        )
