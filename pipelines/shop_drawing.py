"""Draws the pictures of a product: cut out, for the catalogue, and as users photograph it."""

import io
from functools import lru_cache

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

from pipelines.shop import COLOURS, PALETTES, Colour, Product
from pipelines.shop_shapes import GRIPS, PATTERNS, SHAPES, TRIMS, emblems

OVERSAMPLE = 2  # pictures are drawn at twice their side and reduced, which smooths the edges
MARGIN = 0.92  # room for the handles at the sides
PERIOD = 0.2  # of a pattern, in shares of the side: 9 pixels of a photo at 64 x 64
CAREFUL = 0.6  # of the users photograph on a bright table in good light
INK: Colour = (40, 38, 44)
PAPER: Colour = (252, 248, 238)


def _fitted(points: np.ndarray, item: Product) -> np.ndarray:
    """An outline in the proportions of the product's family."""
    width, height, taper, _ = item.proportions
    x, y = MARGIN * (points[:, 0] - 0.5), MARGIN * (points[:, 1] - 0.53)
    return np.stack([0.5 + x * width * (1 + taper * y), 0.53 + y * height], axis=1)


def _flat(points: np.ndarray, size: int) -> list[float]:
    return (points * size).ravel().tolist()


def _edged(draw: ImageDraw.ImageDraw, points: np.ndarray, fill: Colour, size: int) -> None:
    draw.polygon(_flat(points, size), fill=fill, outline=_darker(fill), width=max(1, size // 90))


def _darker(colour: Colour) -> Colour:
    return colour[0] * 6 // 10, colour[1] * 6 // 10, colour[2] * 6 // 10


def _mask(field: np.ndarray, size: int) -> Image.Image:
    return Image.fromarray(np.broadcast_to(field, (size, size)).astype(np.uint8) * 255)


@lru_cache(maxsize=2)
def _volume(size: int) -> Image.Image:
    """Light from the left over a rounded body, to be multiplied."""
    x, y = np.meshgrid(np.linspace(0, 1, size), np.linspace(0, 1, size))
    shade = 255 * np.clip(1.02 - 0.9 * np.abs(x - 0.4) ** 1.8 - 0.1 * y, 0, 1)
    return Image.fromarray(shade.astype(np.uint8)).convert("RGB")


@lru_cache(maxsize=2)
def _font(pixels: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    return ImageFont.load_default(pixels)


def _handles(draw: ImageDraw.ImageDraw, item: Product, body: np.ndarray, size: int) -> None:
    if item.handle in ("", "none"):
        return
    form, where = item.handle.split()
    out, along = np.concatenate([[(-0.6, -1)], GRIPS[form], [(-0.6, 1)]]).T  # the roots reach behind the body
    (x0, y0), (x1, y1) = body.min(axis=0), body.max(axis=0)
    middle, half = (y0 + y1) / 2, 0.3 * (y1 - y0)
    sides = {
        "side": [(x1 - 0.05 + 0.19 * out, middle + half * along)],
        "pair": [(x1 - 0.05 + 0.19 * out, middle + half * along), (x0 + 0.05 - 0.19 * out, middle + half * along)],
        "top": [(0.5 + 0.62 * (x1 - x0) / 2 * along, y0 + 0.04 - 0.22 * out)],
    }
    colour = item.paints[2]
    for x, y in sides[where]:
        path = _flat(np.stack([x, y], axis=1), size)
        draw.line(path, fill=_darker(colour), width=round(size * 0.07), joint="curve")
        draw.line(path, fill=colour, width=round(size * 0.052), joint="curve")


def _texture(item: Product, body: np.ndarray, size: int) -> Image.Image:
    """What covers the body, (size, size) RGB: base, pattern, trim, emblem, label."""
    base, accent, _ = item.paints
    texture = Image.new("RGB", (size, size), base)
    panel_x, panel_y, radius = SHAPES[item.kind].panel
    (panel_x, panel_y), radius = _fitted(np.array([[panel_x, panel_y]]), item)[0], radius * min(item.proportions[:2])
    x, y = np.meshgrid(np.arange(size) / size, np.arange(size) / size, sparse=True)
    if item.pattern:
        period = PERIOD * item.proportions[3]
        texture.paste(accent, mask=_mask(PATTERNS[item.pattern]((x - panel_x) / period, (y - panel_y) / period), size))
    if item.trim:
        low, high = body.min(axis=0), body.max(axis=0)
        u, v = (2 * x - low[0] - high[0]) / (high[0] - low[0]), (2 * y - low[1] - high[1]) / (high[1] - low[1])
        texture.paste(accent, mask=_mask(TRIMS[item.trim](u, v), size))
    draw = ImageDraw.Draw(texture)
    if item.emblem:
        draw.polygon(_flat(emblems()[item.emblem] * radius + (panel_x, panel_y), size), fill=accent)
    if item.label:
        box = [size * (panel_x - radius), size * (panel_y - radius), size * (panel_x + radius), size * (panel_y + radius)]
        draw.rounded_rectangle(box, radius=size * radius / 4, fill=PAPER, outline=accent, width=max(1, size // 50))
        draw.text(
            (size * panel_x, size * panel_y), item.label, fill=INK, font=_font(round(size * 0.36)), anchor="mm", stroke_width=size // 128
        )
    return texture


def cut_out(item: Product, size: int) -> Image.Image:
    """The product alone, (size, size) RGBA."""
    shape = SHAPES[item.kind]
    body = _fitted(shape.body, item)
    picture = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    draw = ImageDraw.Draw(picture)
    _handles(draw, item, body, size)
    for points, colour in shape.behind:
        _edged(draw, _fitted(points, item), item.paints[colour], size)
    stencil = Image.new("L", (size, size))
    ImageDraw.Draw(stencil).polygon(_flat(body, size), fill=255)
    picture.paste(_texture(item, body, size), mask=stencil)
    draw.polygon(_flat(body, size), outline=_darker(item.paints[0]), width=max(1, size // 90))
    for points, colour in shape.front:
        _edged(draw, _fitted(points, item), item.paints[colour], size)
    shaded = ImageChops.multiply(picture.convert("RGB"), _volume(size))
    shaded.putalpha(picture.getchannel("A"))
    return shaded


def _jpeg(picture: Image.Image, quality: int) -> bytes:
    stream = io.BytesIO()
    picture.save(stream, "JPEG", quality=quality)
    return stream.getvalue()


def catalogue_picture(cut: Image.Image, rng: np.random.Generator) -> bytes:
    """The cut-out on a near-white sheet with a soft shadow, as JPEG of half its side."""
    size = cut.width
    sheet = Image.new("RGB", (size, size), (int(rng.integers(244, 256)),) * 3)
    shadow = Image.new("L", (size // 4, size // 4))
    ImageDraw.Draw(shadow).ellipse([size * 0.045, size * 0.215, size * 0.205, size * 0.243], fill=90)
    sheet.paste((120, 120, 130), mask=shadow.filter(ImageFilter.GaussianBlur(size / 128)).resize((size, size), Image.Resampling.BILINEAR))
    sheet.paste(cut, mask=cut.getchannel("A"))
    return _jpeg(sheet.reduce(OVERSAMPLE), 92)


def _noise(rng: np.random.Generator, across: int, down: int, size: int) -> np.ndarray:
    """Smooth noise in 0..1, (size, size), with as many bumps across and down."""
    coarse = Image.fromarray(rng.integers(0, 256, (down, across), dtype=np.uint8))
    return np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC), np.float32) / 255


def _background(rng: np.random.Generator, size: int, mess: float) -> Image.Image:
    """Cloth, wood, tiles, or a wall behind a table, the paler the less mess: (size, size) RGB."""
    one, two = (np.array(COLOURS[name], np.float32) for name in rng.choice(list(COLOURS), 2, replace=False))
    one = mess * one + (1 - mess) * rng.uniform(225, 255)
    two = one + 0.4 * mess * (two - one) - 12
    y, x = np.mgrid[:size, :size].astype(np.float32) / size
    scene = int(rng.integers(5))
    if scene == 0:
        blend = _noise(rng, 6, 6, size) * 0.7 + _noise(rng, size // 4, size // 4, size) * 0.3
    elif scene == 1:
        blend = _noise(rng, 3, 24, size) if rng.uniform() < 0.5 else _noise(rng, 24, 3, size)
    elif scene == 2:
        pitch, shift = rng.uniform(0.12, 0.35), rng.uniform(0, 1)
        blend = (((x + shift) % pitch < 0.02) | ((y + shift) % pitch < 0.02)).astype(np.float32) + 0.2 * _noise(rng, 8, 8, size)
    elif scene == 3:
        blend = (y + rng.uniform(-0.2, 0.2) * x > rng.uniform(0.45, 0.8)) * 0.8 + 0.2 * _noise(rng, 12, 12, size)
    else:
        blend = np.clip(rng.uniform(-1, 1) * x + rng.uniform(-1, 1) * y + 0.5, 0, 1)
    return Image.fromarray(np.clip(one + (two - one) * blend[..., None], 0, 255).astype(np.uint8))


def _clutter(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int, mess: float) -> None:
    """Other things that lie about, in the colours of the shop."""
    for _ in range(1 + round(5 * mess)):
        palette = PALETTES[rng.integers(len(PALETTES))]
        fill: Colour = COLOURS[palette[rng.integers(3)]]
        centre, reach = rng.uniform(0, 1, 2), rng.uniform(0.1, 0.28)
        form = int(rng.integers(3))
        if form == 0:
            points = list(SHAPES.values())[rng.integers(len(SHAPES))].body * 2 - 1
        elif form == 1:
            points = emblems()["ring"][:40] * rng.uniform(0.4, 1, 2)
        else:
            points = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * rng.uniform(0.15, 1, 2)
        _edged(draw, centre + reach * points @ _turn(rng.uniform(-np.pi, np.pi)), fill, size)


def _turn(angle: float) -> np.ndarray:
    return np.array([(np.cos(angle), np.sin(angle)), (-np.sin(angle), np.cos(angle))])


def _posed(cut: Image.Image, rng: np.random.Generator) -> Image.Image:
    """The cut-out turned by up to 15 degrees, scaled to 0.68-1, sheared a little, and moved; RGBA of the same size."""
    size, scale = cut.width, rng.uniform(0.68, 1)
    forward = _turn(np.deg2rad(rng.uniform(-15, 15))) @ np.array([(scale * rng.uniform(0.9, 1.1), rng.uniform(-0.1, 0.1)), (0, scale)])
    back = np.linalg.inv(forward)
    room = 0.03 + (1 - scale) * 0.4
    target = size * (0.5 + rng.uniform(-room, room, 2))
    offset = size * np.array([0.5, 0.53]) - back @ target
    matrix = (back[0, 0], back[0, 1], offset[0], back[1, 0], back[1, 1], offset[1])
    return cut.transform(cut.size, Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR)


def _occluder(draw: ImageDraw.ImageDraw, rng: np.random.Generator, size: int) -> None:
    """A finger, a price tag or a cable over the margin of the product."""
    angle = rng.uniform(0, 2 * np.pi)
    towards = np.array([np.cos(angle), np.sin(angle)])
    near, far = 0.5 + towards * rng.uniform(0.24, 0.36), 0.5 + towards * 0.9
    form = int(rng.integers(3))
    if form == 0:
        skin = (int(rng.integers(110, 240)), 0, 0)
        fill = (skin[0], skin[0] * 3 // 4, skin[0] * 6 // 10)
        draw.line([*(near * size), *(far * size)], fill=fill, width=round(size * 0.11))
        draw.circle((near * size).tolist(), size * 0.055, fill=fill)
    elif form == 1:
        _edged(draw, near + 0.08 * np.array([(-1, -0.6), (1, -0.6), (1, 0.6), (-1, 0.6)]) @ _turn(angle), PAPER, size)
    else:
        draw.line([*(near * size), *((near + 0.6 * _turn(np.pi / 2) @ towards) * size)], fill=INK, width=round(size * 0.025))


def _lit(picture: Image.Image, rng: np.random.Generator, mess: float) -> Image.Image:
    """Exposure, the colour of the lamp, light falling off to one side, and the noise of a small sensor."""
    size = picture.width
    pixels = np.asarray(picture, np.float32)
    gain = 1 + mess * (rng.uniform(-0.4, 0.25) + rng.uniform(-0.24, 0.24, 3))
    slope, angle = mess * rng.uniform(0, 0.5), rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-1, 1, size, dtype=np.float32)
    fall = 1 + slope * (np.cos(angle) * ramp[None, :] + np.sin(angle) * ramp[:, None])
    pixels = pixels * fall[..., None] * gain.astype(np.float32) + mess * rng.uniform(-5, 30)
    pixels += rng.standard_normal(pixels.shape, dtype=np.float32) * (1 + mess * rng.uniform(0, 9))
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def user_photo(cut: Image.Image, rng: np.random.Generator) -> bytes:
    """The cut-out as a user photographs it, as JPEG of half its side."""
    size = cut.width
    mess = rng.uniform(0, 0.08) if rng.uniform() < CAREFUL else rng.uniform(0.08, 1)
    scene = _background(rng, size, mess)
    draw = ImageDraw.Draw(scene)
    _clutter(draw, rng, size, mess)
    posed = _posed(cut, rng)
    shadow = ImageChops.offset(posed.getchannel("A"), size // 40, size // 30).point(lambda a: a * 0.4)
    scene.paste((20, 18, 24), mask=shadow)
    scene.paste(posed, mask=posed.getchannel("A"))
    for _ in range(rng.integers(0, 3)):
        _occluder(draw, rng, size)
    photo = _lit(scene.reduce(OVERSAMPLE), rng, mess).filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.1) * size / 256))
    return _jpeg(photo, int(rng.integers(35, 86)))
