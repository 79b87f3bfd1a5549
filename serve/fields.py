"""What the fields of a body may hold: types that pydantic checks, and their words in OpenAPI."""

import re
from datetime import datetime
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    AwareDatetime,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import SkipJsonSchema

MAX_ID = 512  # characters, as the ingest has it
MAX_WORDS = 512  # characters of a category, a language, a role, a style, and of a text to filter by
MAX_CONDITIONS = 32
MAX_VALUES = 1_000
UNFIT = re.compile(r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffd]")


def id_fault(value: str) -> str:
    """What is wrong with an id, "" for nothing: ids are compared to the letter, so they are never cleaned."""
    if not value or value != value.strip():
        return "an id may be neither empty nor begin or end with white space"
    if len(value) > MAX_ID:
        return f"an id may have at most {MAX_ID} characters; found {len(value):,}"
    if found := UNFIT.search(value):
        return f"an id may have no control and replacement characters; found U+{ord(found[0]):04X}"
    return ""


def _id(value: str) -> str:
    if fault := id_fault(value):
        raise ValueError(fault)
    return value


def _box(box: list[float]) -> list[float]:
    left, top, right, bottom = box
    if not (0 <= left < right <= 1 and 0 <= top < bottom <= 1):
        raise ValueError("[left, top, right, bottom] are fractions of the upright picture: 0 <= left < right <= 1, 0 <= top < bottom <= 1")
    return box


def _scalar(value: Any) -> Any:
    if not isinstance(value, str | bool | int | float):
        raise ValueError(f"a text, a number, true or false is wanted here; found {type(value).__name__}")
    if isinstance(value, str) and len(value) > MAX_WORDS:
        raise ValueError(f"at most {MAX_WORDS} characters are allowed; found {len(value):,}")
    return value


def _moment(value: Any) -> Any:
    if not isinstance(value, str | datetime) or (isinstance(value, str) and value[:5].isdigit()):  # seconds or milliseconds, who knows
        raise ValueError("a time is a text of ISO 8601 with its zone, such as 2026-01-31T12:00:00Z")
    return datetime.fromisoformat(value) if isinstance(value, str) else value


def _one(value: Any) -> str:
    return "~object" if isinstance(value, dict | BaseModel) else "~value"


def _kind(value: Any) -> str:
    return "~list" if isinstance(value, list) else _one(value)


Id = Annotated[str, AfterValidator(_id), Field(min_length=1, max_length=MAX_ID)]
Words = Annotated[str, Field(max_length=MAX_WORDS)]
Name = Annotated[str, Field(min_length=1, max_length=128)]
Box = Annotated[list[float], Field(min_length=4, max_length=4), AfterValidator(_box)]
Scalar = Annotated[str | bool | int | float, BeforeValidator(_scalar), WithJsonSchema({"type": ["string", "boolean", "integer", "number"]})]
Scalars = Annotated[list[Scalar], Field(max_length=MAX_VALUES)]
Moment = Annotated[AwareDatetime, BeforeValidator(_moment)]


class Body(BaseModel):
    """The tags of alternatives begin with ~, by which serve.intake leaves them out of messages."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


def _without_default(said: dict[str, Any]) -> None:
    said.pop("default", None)  # which is null, and that is no value


Given = Annotated[Scalar | SkipJsonSchema[None], Field(json_schema_extra=_without_default)]


class Comparison(Body):
    """At least one; all that are given must hold. A value that is missing passes none."""

    eq: Given = None
    ne: Given = None
    lt: Given = None
    lte: Given = None
    gt: Given = None
    gte: Given = None
    among: Annotated[Scalars | SkipJsonSchema[None], Field(json_schema_extra=_without_default)] = Field(default=None, alias="in")

    @model_validator(mode="after")
    def _compares(self) -> "Comparison":
        if not self.model_fields_set or any(getattr(self, name) is None for name in self.model_fields_set):
            raise ValueError("a comparison needs a value for at least one of eq, ne, lt, lte, gt, gte, in; null is none")
        return self


Condition = Annotated[
    Annotated[Scalar, Tag("~value")] | Annotated[Scalars, Tag("~list")] | Annotated[Comparison, Tag("~object")], Discriminator(_kind)
]
Filter = Annotated[dict[Name, Condition], Field(max_length=MAX_CONDITIONS)]


class Pictured(Body):
    """A picture, a text, or both. image: base64 or a data: URL (a http URL is taken as image_url, of which there may be one)."""

    text: str = ""
    image: str = ""
    image_url: str = ""


Entry = Annotated[Annotated[str, Tag("~value")] | Annotated[Pictured, Tag("~object")], Discriminator(_one)]
Entries = Annotated[
    Annotated[str, Tag("~value")] | Annotated[Pictured, Tag("~object")] | Annotated[list[Entry], Field(min_length=1), Tag("~list")],
    Discriminator(_kind),
]
