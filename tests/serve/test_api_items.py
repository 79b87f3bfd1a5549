"""Items and events that are put through the interface, and reading them back."""

import base64
import hashlib
import io
from datetime import UTC, datetime, timedelta
from urllib.parse import quote

import numpy as np
import pyarrow as pa
import pytest
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from idem import images, schema
from serve import rows
from serve.api import create_gateway
from serve.bodies import ItemBody
from serve.intake import Limits

LIMITS = Limits(max_image_bytes=200_000, max_events=4, max_item_side=64)
ITEM = {"product_id": "teapot", "title": "Red  te\u0301a\npot\u200b"}


@pytest.fixture
def client(backend) -> TestClient:
    return TestClient(create_gateway(backend, limits=LIMITS), raise_server_exceptions=False)


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, kind, **options)
    return stream.getvalue()


def put(client: TestClient, item_id: str = "a", **fields):
    return client.put(f"/v1/items/{quote(item_id)}", json={**ITEM, **fields})


def error_of(reply, status: int, code: str) -> str:
    assert reply.status_code == status, reply.text
    assert reply.json()["error"]["code"] == code
    return reply.json()["error"]["message"]


def test_a_whole_item_is_put(client, backend, colour_shop):
    picture = colour_shop.pictures["red/0"]
    fields = {"image": base64.b64encode(picture).decode(), "lang": "pt_BR", "version": 7, "category": " pots ", "style": "studio"}
    reply = put(client, "shop/red pot #1?%", **fields, attributes={"price": 24.5, "stock": 3, "new": True, "seller": "x"})
    assert reply.json() == {"request_id": reply.headers["x-request-id"], "item_id": "shop/red pot #1?%", "sequence": 1}
    (row,) = backend.changes[0].to_pylist()
    assert backend.changes[0].schema.remove(len(schema.ITEMS)).equals(schema.ITEMS)
    title = "Red t\u00e9a pot"
    expected = {
        **{"item_id": "shop/red pot #1?%", "product_id": "teapot", "family_id": "teapot", "category": "pots", "title": title},
        **{"lang": "pt-br", "image": picture, "mime": "image/png", "width": 24, "height": 24, "role": "catalog", "style": "studio"},
        **{"id_split": "", "split": "", "source_file": "api", "source_row": 0, "version": 7, "phash": None, "record_hash": None},
        **{"content_hash": hashlib.sha256(picture + b"\0" + title.encode()).hexdigest()},
        **{"duplicate_of": None, "near_duplicate_of": None, "run": None},
        **{"attributes": {"price": 24.5, "stock": 3, "new": True, "seller": "x"}},
    }
    assert row == expected


def test_a_text_is_enough_for_an_item(client, backend):
    assert put(client).status_code == 200
    assert backend.changes[0].schema.equals(schema.ITEMS)
    assert backend.changes[0]["image"].to_pylist() == [None]
    error_of(put(client, title=" \u200b "), 422, "item_empty")


@pytest.mark.parametrize(
    ("picture", "kind", "options", "kept", "size"),
    [
        (Image.new("RGB", (64, 32), "red"), "PNG", {}, True, (64, 32)),
        (Image.new("RGB", (64, 32), "red"), "JPEG", {"quality": 80}, True, (64, 32)),
        (Image.new("RGB", (640, 320), "red"), "JPEG", {}, False, (64, 32)),
        (Image.new("RGBA", (20, 10), (200, 30, 30, 255)), "PNG", {}, False, (20, 10)),
        (Image.new("RGB", (20, 10), "red"), "GIF", {}, False, (20, 10)),
    ],
)
def test_pictures_are_kept_as_they_are_where_that_is_safe(picture, kind, options, kept, size):
    data = encoded(picture, kind, **options)
    made, mime, found = rows.normalized(data, 64)
    assert (made == data) is kept
    assert found == images.decode(made).size == size
    assert mime == f"image/{kind.lower() if kept else 'jpeg'}"
    assert np.asarray(images.decode(made)).mean((0, 1))[0] > 190


def test_what_a_camera_writes_beside_the_picture_does_not_stay():
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "the place where it was taken"
    made, _, size = rows.normalized(encoded(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif), 64)
    assert size == (20, 40)
    assert b"the place" not in made
    del exif[0x0112]
    made, _, _ = rows.normalized(encoded(Image.new("RGB", (40, 20), "red"), "JPEG", exif=exif), 64)
    assert b"the place" not in made


@pytest.mark.parametrize(
    ("item_id", "said"),
    [
        ("x" * 513, "512"),
        ("a\x00b", "U+0000"),
        ("a\nb", "U+000A"),
        ("a\ufffdb", "U+FFFD"),
        (" a", "white space"),
        ("a ", "white space"),
        ("", "empty"),
    ],
)
def test_ids_that_cannot_stand(client, backend, item_id, said):
    for reply in (put(client, item_id), client.delete(f"/v1/items/{quote(item_id)}"), client.get(f"/v1/items/{quote(item_id)}")):
        assert said in error_of(reply, 422, "invalid_item_id")
    assert backend.changes == []


def test_an_id_that_is_not_utf_8_is_refused(client):
    error_of(client.delete("/v1/items/%ED%A0%80"), 422, "invalid_item_id")
    error_of(client.get("/v1/items/%FF/image"), 422, "invalid_item_id")


@pytest.mark.parametrize("item_id", ["a/image", "/image", "%2e%2e/a", "a/%2e", "%2e"])
def test_ids_that_no_url_leads_back_to(client, backend, item_id):
    error_of(client.put(f"/v1/items/{item_id}", json=ITEM), 422, "invalid_item_id")
    assert backend.changes == []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(item_id=st.text(min_size=1, max_size=20))
def test_every_id_that_is_taken_arrives_to_the_letter(client, backend, item_id):
    reply = client.put(f"/v1/items/{quote(item_id, safe='/').replace('.', '%2E')}", json=ITEM)
    if reply.status_code == 200:
        assert reply.json()["item_id"] == item_id
        assert backend.changes[-1]["item_id"].to_pylist() == [item_id]
    else:
        error_of(reply, 422, "invalid_item_id")


@pytest.mark.parametrize(
    "fields",
    [
        {"product_id": ""},
        {"product_id": "a\x07"},
        {"family_id": " "},
        {"lang": "no language!"},
        {"id_split": "test"},
        {"version": 1.5},
        {"attributes": {"a": [1]}},
        {"attributes": {"a": None}},
        {"attributes": {f"a{i}": 1 for i in range(33)}},
        {"title": "x" * 1_001},
        {"category": "x" * 513},
        {"content_hash": "x"},
    ],
    ids=str,
)
def test_items_that_are_refused(client, backend, fields):
    message = error_of(put(client, **fields), 422, "invalid_request")
    assert next(iter(fields)) in message
    assert backend.changes == []


def test_pictures_of_items_are_checked(client, backend):
    error_of(put(client, image="no base64!"), 422, "image_not_base64")
    cut = encoded(Image.effect_noise((200, 200), 90), "PNG")[:9_000]
    error_of(put(client, image=base64.b64encode(cut).decode()), 422, "image_undecodable")
    error_of(put(client, image_url="https://a/b"), 422, "image_url_not_allowed")
    assert backend.changes == []


def test_attributes_take_their_types_from_the_values():
    table = rows.item_row("a", ItemBody(product_id="p", title="t", attributes={"n": 1, "x": 1.5, "b": True, "s": "t"}), None, max_side=64)
    kinds = {field.name: field.type for field in table.schema.field("attributes").type}
    assert kinds == {"n": pa.int64(), "x": pa.float64(), "b": pa.bool_(), "s": pa.string()}


def test_an_item_is_deleted_known_or_not(client, backend):
    reply = client.delete("/v1/items/a/b")
    assert (reply.status_code, reply.json()["item_id"], reply.json()["sequence"]) == (200, "a/b", 1)
    assert client.delete("/v1/items/a/image").status_code == 200
    assert backend.changes == [["a/b"], ["a/image"]]


EVENT = {"query_id": "r-1", "item_id": "red/0", "kind": "click", "time": "2026-01-31T12:00:00.5+02:00"}


def test_events_become_rows(client, backend):
    before = datetime.now(UTC)
    reply = client.post("/v1/feedback", json={"events": [EVENT, {**EVENT, "kind": "purchase", "time": None}]})
    assert reply.status_code == 202
    assert (reply.json()["taken"], reply.json()["refused"]) == (2, [])
    (table,) = backend.events
    assert table.schema.equals(schema.EVENTS)
    first, second = table.to_pylist()
    assert first == {"time": datetime(2026, 1, 31, 10, 0, 0, 500_000, UTC), "kind": "click", "query_id": "r-1", "item_id": "red/0"}
    assert before <= second["time"] <= datetime.now(UTC)


def test_an_event_that_is_wrong_does_not_take_the_others_with_it(client, backend):
    late = (datetime.now(UTC) + timedelta(days=2)).isoformat()
    reply = client.post("/v1/feedback", json={"events": [{**EVENT, "time": late}, EVENT, {**EVENT, "kind": "look"}, 7]})
    assert reply.status_code == 202
    assert reply.json()["taken"] == 1
    assert [each["index"] for each in reply.json()["refused"]] == [0, 2, 3]
    assert backend.events[0].num_rows == 1


@pytest.mark.parametrize(
    "said", ["2026-01-31T12:00:00", "2026-01-31", "yesterday", 1_769_860_800, "1769860800", "1969-12-31T23:59:59Z", "", True]
)
def test_times_that_are_none(client, backend, said):
    assert "time" in error_of(client.post("/v1/feedback", json={"events": [{**EVENT, "time": said}]}), 422, "invalid_request")
    assert backend.events == []


def test_how_many_events(client, backend):
    for events in ([], [EVENT] * 5, "x"):
        error_of(client.post("/v1/feedback", json={"events": events}), 422, "invalid_request")
    assert backend.events == []
