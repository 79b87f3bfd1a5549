"""What may be sent: one model a body. JSON is held to the types as they stand here; what a form sends as text is converted.

The limits of one service (how many, how large) are checked in serve.intake; here is what holds for all.
"""

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, RootModel

from serve.fields import MAX_CONDITIONS, Body, Box, Entries, Entry, Filter, Id, Moment, Name, Pictured, Scalar, Words

MAX_TITLE = 1_000  # characters, as the ingest has it

# One red pixel: a picture short enough for an example.
PIXEL = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGM4IScHAAK2AQU0pnWqAAAAAElFTkSuQmCC"


class SearchRequest(Body):
    """What is looked for (an image, a text, or both), how it is answered, and what of the catalogue is considered.

    In a form image is a file, and crop and filter are texts of JSON. depth: how many products the reranker sees (the service's own
    setting where none is given). crop: [left, top, right, bottom] as fractions of the upright picture, 0 to 1. filter: column or
    attribute to a value, a list of values (any of them), or a comparison; all must hold. min_score: results whose relevance is below
    it, or not known, are left out, so that "no such product" is an empty list; where nothing could be reranked none are, and
    `degraded` names min_score. release: the answer must come from this one.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"text": "red teapot with a star", "top_k": 5, "filter": {"category": "kitchen", "price": {"gte": 10, "lt": 40}}},
                {"image": PIXEL, "crop": [0.1, 0.2, 0.9, 0.8], "min_score": 0.5},
            ]
        }
    )
    # In the order in which they are told to those who misspell one.
    image: str = ""
    text: str = ""
    top_k: int = Field(default=10, ge=1)
    rerank: bool = True
    depth: int | None = Field(default=None, ge=1)
    image_url: str = ""
    crop: Box | None = None
    filter: Filter = Field(default_factory=dict)
    min_score: float | None = Field(default=None, ge=0, le=1)
    release: Name | None = None

    def shown(self) -> Pictured:
        """What is looked for."""
        return Pictured(text=self.text, image=self.image, image_url=self.image_url)


class BatchRequest(RootModel[list[SearchRequest]]):
    """Searches, each of which is answered or refused by itself."""

    model_config = ConfigDict(json_schema_extra={"examples": [[{"text": "red teapot", "top_k": 3}, {"image": PIXEL}]]})


class EmbeddingsRequest(Body):
    """As OpenAI's, whose lists of token numbers are not taken, and in addition objects with a picture.

    model: any name; the answer says which release embedded. dimensions: the first so many, normalised again. user: taken, not used.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "idem", "input": ["red teapot", "blue mug"], "encoding_format": "float"},
                {"model": "idem", "input": [{"image": PIXEL, "text": "teapot"}], "dimensions": 64},
            ]
        }
    )
    input: Entries
    model: Name = "idem"
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: int | None = Field(default=None, ge=1)
    user: str | None = None


class RerankRequest(Body):
    """As Cohere's (v1 and v2) and Jina's, and in addition pictures, also as the query.

    model: any name. Taken and not used, because Cohere's clients send them: max_tokens_per_doc, priority, max_chunks_per_doc,
    rank_fields.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"model": "idem", "query": "red teapot", "documents": ["a red teapot", "a blue mug"], "top_n": 1},
                {"query": {"image": PIXEL}, "documents": [{"text": "a red teapot", "image": PIXEL}], "return_documents": True},
            ]
        }
    )
    query: Entry
    documents: Annotated[list[Entry], Field(min_length=1)]
    model: Name | None = None
    top_n: int | None = Field(default=None, ge=1)
    return_documents: bool | None = None
    max_tokens_per_doc: int | None = None
    max_chunks_per_doc: int | None = None
    priority: int | None = None
    rank_fields: list[Literal["text", "image"]] | None = None


class ItemBody(Body):
    """A whole item, which replaces the one of this id: with a title, a picture, or both.

    family_id: near-siblings; the product itself where none is given. version: of the record, where the source counts them.
    id_split: "train" or "dev_unseen" (never trained on); dealt by the next ingest where nothing is said. attributes: to filter by.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"product_id": "teapot-7", "category": "kitchen", "title": "Red teapot", "image": PIXEL, "attributes": {"price": 24.5}}
            ]
        }
    )
    product_id: Id
    title: Annotated[str, Field(max_length=MAX_TITLE)] = ""
    category: Words = ""
    family_id: Id | None = None
    image: str = ""
    image_url: str = ""
    lang: Annotated[str, Field(pattern=r"^([A-Za-z]{2,3}([-_][A-Za-z0-9]{1,8})*)?$", max_length=64)] = ""
    role: Words = "catalog"
    style: Words = ""
    id_split: Literal["", "train", "dev_unseen"] = ""
    version: int | None = None
    attributes: Annotated[dict[Name, Scalar], Field(max_length=MAX_CONDITIONS)] = Field(default_factory=dict)

    def shown(self) -> Pictured:
        """Its picture."""
        return Pictured(image=self.image, image_url=self.image_url)


class Event(Body):
    """What somebody did with an answer. query_id: the request_id of that answer. time: the arrival of this request if not given."""

    query_id: Id
    item_id: Id
    kind: Literal["click", "purchase"]
    time: Moment | None = None


class FeedbackRequest(Body):
    """Each event is taken or refused by itself."""

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [{"events": [{"query_id": "5f2c7d", "item_id": "teapot-7/front", "kind": "click", "time": "2026-01-31T12:00:00Z"}]}]
        }
    )
    events: Annotated[list[Event], Field(min_length=1)]
