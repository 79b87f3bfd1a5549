"""What OpenAPI tells beyond what FastAPI sees: bodies that are read by serve.intake, their examples, errors, and who may ask."""

import json
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.routing import APIRoute
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serve.access import Needs
from serve.bodies import BatchRequest, EmbeddingsRequest, FeedbackRequest, ItemBody, RerankRequest, SearchRequest
from serve.intake import AS_JSON, FORM, JSON, LONGEST_MS
from serve.replies import ErrorReply

BODIES: Sequence[type[BaseModel]] = (SearchRequest, BatchRequest, EmbeddingsRequest, RerankRequest, ItemBody, FeedbackRequest)
REF = "#/components/schemas/{model}"
FORM_NAME = "SearchForm"
KEY = "key"  # name of the security scheme

ERRORS = {
    400: "The body is not JSON by the letter, or not a form.",
    401: "A key is needed, and there is none or an unknown one.",
    403: "The key lacks the scope that this needs.",
    404: "There is no such item, or the release is not served.",
    413: "The body or a picture is too large.",
    415: "The body is of another content type.",
    422: "The body can be read, but not used: what is wrong with it, and what is allowed.",
    429: "The key has asked too often; Retry-After says when to come again.",
    500: "A fault of the service.",
    501: "This service cannot do that.",
    503: "A part is overloaded or down; Retry-After says when to come again.",
    504: "The time of the request was over.",
}
ANY = (401, 403, 404, 429, 500, 503)  # wherever a tenant is needed
POSTED = (*ANY, 400, 413, 415, 422, 501, 504)
RETRY = {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 0}}}  # of 429 and 503
WAIT: dict[str, Any] = {
    "name": "X-Timeout-Ms",
    "in": "header",
    "description": "After so many milliseconds an answer is of no use any more.",
    "schema": {"type": "integer", "minimum": 1, "maximum": LONGEST_MS},
}


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    told: dict[int | str, dict[str, Any]] = {code: {"model": ErrorReply, "description": ERRORS[code]} for code in sorted(set(codes))}
    for code in {429, 503} & set(codes):
        told[code]["headers"] = RETRY
    return told


def examples(model: type[BaseModel]) -> list[Any]:
    extra = model.model_config.get("json_schema_extra")
    assert isinstance(extra, dict)
    found = extra["examples"]
    assert isinstance(found, list)
    return found


def body(model: type[BaseModel], *, form: bool = False, waits: bool = False) -> dict[str, Any]:
    """The request's body for `openapi_extra`. form: it may come as one, too; waits: the header of WAIT is read."""
    content: dict[str, Any] = {JSON: {"schema": {"$ref": REF.format(model=model.__name__)}, "examples": _numbered(examples(model))}}
    if form:
        texts = [{**each, **{name: json.dumps(each[name]) for name in AS_JSON if name in each}} for each in examples(model)]
        content[FORM] = {"schema": {"$ref": REF.format(model=FORM_NAME)}, "examples": _numbered(texts)}
    said: dict[str, Any] = {"requestBody": {"required": True, "content": content}}
    return {**said, "parameters": [WAIT]} if waits else said


def _numbered(values: Sequence[Any]) -> dict[str, Any]:
    return {f"example-{number}": {"value": value} for number, value in enumerate(values, 1)}


def _schemas() -> dict[str, Any]:
    """Of all bodies, by name; the form has the same fields, of which some are texts and one is a file."""
    made = models_json_schema([(model, "validation") for model in BODIES], ref_template=REF)[1]["$defs"]
    search = made[SearchRequest.__name__]
    fields = {**search["properties"], "image": {"type": "string", "format": "binary", "title": "Image"}}
    for name in AS_JSON:
        fields[name] = {"type": "string", "contentMediaType": JSON, "contentSchema": search["properties"][name], "title": name.title()}
    form = {**{key: value for key, value in search.items() if key != "examples"}, "properties": fields, "title": FORM_NAME}
    return {**made, FORM_NAME: form}


def _scopes(app: FastAPI) -> dict[tuple[str, str], str]:
    """(path, method) to the scope that is needed there."""
    found = {}
    for route in app.routes:
        if isinstance(route, APIRoute):
            for needs in (dependency.call for dependency in route.dependant.dependencies):
                if isinstance(needs, Needs):
                    found |= {(route.path_format, method.lower()): needs.scope for method in route.methods or ()}
    return found


def describe(app: FastAPI, *, keys: bool) -> None:
    """Replace the document that FastAPI makes. keys: whoever asks has to show one."""

    def document() -> dict[str, Any]:
        if app.openapi_schema is None:
            made = get_openapi(title=app.title, version=app.version, description=app.description, routes=app.routes)
            made.setdefault("components", {}).setdefault("schemas", {}).update(_schemas())
            if keys:
                made["components"]["securitySchemes"] = {KEY: {"type": "http", "scheme": "bearer"}}
            for (path, method), scope in _scopes(app).items():
                if (operation := made["paths"].get(path, {}).get(method)) is not None:
                    operation["x-scope"] = scope
                    operation |= {"security": [{KEY: []}]} if keys else {}
            app.openapi_schema = made
        return app.openapi_schema

    app.openapi = document
