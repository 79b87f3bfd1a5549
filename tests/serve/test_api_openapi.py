"""The OpenAPI document: valid, complete, with an example for every body, and every example is taken."""

import base64
import json
import re

import httpx
import jsonschema
import pytest
from fastapi.openapi.models import OpenAPI
from fastapi.testclient import TestClient

from serve.api import create_gateway


@pytest.fixture
def client(backend) -> TestClient:
    return TestClient(create_gateway(backend))


@pytest.fixture
def document(client) -> dict:
    return client.get("/openapi.json").json()


def operations(document: dict):
    for path, methods in document["paths"].items():
        for method, said in methods.items():
            yield path, method, said


def test_it_is_valid_and_every_reference_leads_somewhere(document):
    OpenAPI.model_validate(document)
    for reference in re.findall(r'"\$ref": "([^"]+)"', json.dumps(document)):
        found = document
        for part in reference.removeprefix("#/").split("/"):
            found = found[part]
        assert found
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_every_route_is_in_it(document):
    there = {(path, method) for path, method, _ in operations(document)}
    asked = {
        *((path, "post") for path in ("/v1/search", "/v1/search:batch", "/v1/embeddings", "/v1/rerank", "/v1/feedback")),
        *(("/v1/items/{item_id}", method) for method in ("get", "put", "delete")),
        *((path, "get") for path in ("/v1/items/{item_id}/image", "/healthz", "/readyz", "/version")),
    }
    assert there == asked
    names = [said["operationId"] for _, _, said in operations(document)]
    assert len(set(names)) == len(names)


def test_every_error_has_the_one_body(document):
    errors = {"schema": {"$ref": "#/components/schemas/ErrorReply"}}
    for path, _, said in operations(document):
        if path.startswith("/v1/"):
            refusals = {code: reply for code, reply in said["responses"].items() if code[0] in "45"}
            assert {"401", "403", "429", "500", "503"} <= set(refusals)
            assert all(reply["content"] == {"application/json": errors} for reply in refusals.values())
            assert said["description"]
    assert "HTTPValidationError" not in document["components"]["schemas"]


def test_every_body_has_examples_that_its_schema_and_the_service_take(document, client, backend):
    bodies = 0
    for path, method, said in operations(document):
        for kind, content in said.get("requestBody", {}).get("content", {}).items():
            bodies += 1
            assert content["examples"], f"{method} {path} as {kind}"
            resolved = {**document, "$ref": content["schema"]["$ref"]}
            for example in (each["value"] for each in content["examples"].values()):
                jsonschema.Draft202012Validator(resolved).validate(example)
                url = path.replace("{item_id}", "teapot-7/front")
                if kind == "application/json":
                    reply = client.request(method, url, json=example)
                else:
                    reply = client.request(method, url, content=form(example), headers={"Content-Type": f"{kind}; boundary=x"})
                # The shop of the tests knows no price, and its vectors are short.
                assert reply.status_code in (200, 202) or re.search("'price'|dimensions is 64", reply.text), reply.text
    assert bodies == 7


def form(fields: dict) -> bytes:
    data = {name: (None, str(value).encode()) for name, value in fields.items() if name != "image"}
    if "image" in fields:
        data["image"] = ("a.png", base64.b64decode(fields["image"]))
    request = httpx.Request("POST", "http://any", files=data, headers={"Content-Type": "multipart/form-data; boundary=x"})
    return request.read()
