"""The routes that read and change a catalogue: its items, and what people did with answers."""

import asyncio
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import Depends, FastAPI, Request, Response
from starlette.convertors import Convertor, register_url_convertor

from serve import rows
from serve.access import Admit, Needs
from serve.backend import Backend
from serve.bodies import Event, FeedbackRequest, ItemBody
from serve.described import ANY, POSTED, body, errors
from serve.errors import ApiError, invalid
from serve.fields import id_fault
from serve.intake import Limits, read_json, require_at_most, validated
from serve.pictures import Pictures
from serve.replies import Changed, FeedbackResponse, Item, Refused

PICTURE = "/image"  # behind an item's id; so an id that ends with it could not be read back
PICTURE_BODY: dict[int | str, dict[str, Any]] = {
    200: {"description": "The picture.", "content": {f"image/{kind}": {} for kind in ("jpeg", "png", "webp")}}
}


class IdConvertor(Convertor[str]):
    """All there is in a URL. Starlette's `path` stops at line feeds, and would take "a" where the id is "a\\n"."""

    regex = "(?s:.*)"

    def convert(self, value: str) -> str:
        return value

    def to_string(self, value: str) -> str:
        return value


def image_url(item_id: str) -> str:
    return f"/v1/items/{quote(item_id, safe='/')}{PICTURE}"


def require_id(item_id: str) -> str:
    """ApiError 422 `invalid_item_id`."""
    if fault := id_fault(item_id):
        raise ApiError(422, "invalid_item_id", fault)
    return item_id


def require_new_id(item_id: str) -> str:
    """As `require_id`, and that a URL with this id leads back to it."""
    require_id(item_id)
    if item_id.endswith(PICTURE) or {".", ".."} & set(item_id.split("/")):
        raise ApiError(422, "invalid_item_id", f"an id may not end with {PICTURE}, nor have . or .. between slashes; found {item_id!r}")
    return item_id


def add(app: FastAPI, backend: Backend, limits: Limits, pictures: Pictures, *, admit: Admit | None) -> None:
    register_url_convertor("id", IdConvertor())
    _add_reading(app, backend, admit)
    _add_changing(app, backend, limits, pictures, admit)
    _add_feedback(app, backend, limits, admit)


def _add_reading(app: FastAPI, backend: Backend, admit: Admit | None) -> None:
    needs = Needs("search", admit)
    # What only some may see is kept by their own browser alone.
    kept = {"Cache-Control": f"{'private' if admit else 'public'}, max-age=3600"}

    @app.get("/v1/items/{item_id:id}/image", response_class=Response, responses={**errors(*ANY, 422), **PICTURE_BODY})
    async def picture(item_id: str, tenant: Annotated[str, Depends(needs)]) -> Response:
        """The picture of an item, as it was normalised."""
        found = await backend.picture(tenant, require_id(item_id))
        if found is None:
            raise ApiError(404, "image_not_found", f"no item {item_id!r} with a picture in release {backend.release}")
        return Response(found.data, media_type=found.mime, headers=kept)

    @app.get("/v1/items/{item_id:id}", responses=errors(*ANY, 422), response_model_exclude_unset=True)
    async def item(item_id: str, tenant: Annotated[str, Depends(needs)]) -> Item:
        """What is known of an item. Ids may have slashes."""
        found = await backend.item(tenant, require_id(item_id))
        if found is None:
            raise ApiError(404, "item_not_found", f"no item {item_id!r} in release {backend.release}")
        return Item(**{**found, "image_url": image_url(item_id)})


def _add_changing(app: FastAPI, backend: Backend, limits: Limits, pictures: Pictures, admit: Admit | None) -> None:
    needs = Needs("write", admit)

    @app.put("/v1/items/{item_id:id}", openapi_extra=body(ItemBody), responses=errors(*POSTED))
    async def put_item(item_id: str, request: Request, tenant: Annotated[str, Depends(needs)]) -> Changed:
        """Put a whole item, in place of the one with this id if there is one. It is kept once this is answered, and found soon after."""
        require_new_id(item_id)
        sent = validated(ItemBody, await read_json(request, limits.max_body))
        picture = await pictures.of(sent.shown())
        async with pictures.decoders:
            row = await asyncio.to_thread(rows.item_row, item_id, sent, picture, max_side=limits.max_item_side)
        return Changed(request_id=request.state.request_id, item_id=item_id, sequence=await backend.put(tenant, row))

    @app.delete("/v1/items/{item_id:id}", responses=errors(*ANY, 422, 501))
    async def delete_item(item_id: str, request: Request, tenant: Annotated[str, Depends(needs)]) -> Changed:
        """Delete an item, known or not."""
        sequence = await backend.delete(tenant, [require_id(item_id)])
        return Changed(request_id=request.state.request_id, item_id=item_id, sequence=sequence)


def _add_feedback(app: FastAPI, backend: Backend, limits: Limits, admit: Admit | None) -> None:
    needs = Needs("write", admit)  # later models learn from it

    @app.post("/v1/feedback", status_code=202, openapi_extra=body(FeedbackRequest), responses=errors(*POSTED))
    async def feedback(request: Request, tenant: Annotated[str, Depends(needs)]) -> FeedbackResponse:
        """Clicks and purchases. Each event is taken or refused by itself; where none can be taken the request is refused."""
        sent = await read_json(request, limits.max_feedback_body)
        if not isinstance(sent, dict) or set(sent) != {"events"} or not isinstance(sent["events"], list):
            raise invalid('the body must be {"events": [...]} and nothing else')
        require_at_most("the number of events", len(sent["events"]), limits.max_events)
        taken, refused = sifted(sent["events"], datetime.now(UTC))
        if not taken:
            raise invalid(f"none of {len(refused)} events can be taken; the first: {refused[0].message}")
        await backend.feedback(tenant, rows.event_rows(taken))
        return FeedbackResponse(request_id=request.state.request_id, taken=len(taken), refused=refused)


def sifted(sent: list[Any], now: datetime) -> tuple[list[tuple[Event, datetime]], list[Refused]]:
    """Events that can be taken, each with its time, and what is wrong with the others."""
    taken: list[tuple[Event, datetime]] = []
    refused: list[Refused] = []
    for index, fields in enumerate(sent):
        try:
            event = validated(Event, fields)
            taken.append((event, rows.moment(event, now)))
        except ApiError as error:
            refused.append(Refused(index=index, message=str(error)))
    return taken, refused
