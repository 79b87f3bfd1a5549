import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from idem import containers, images


def drawn(width: int = 40, height: int = 30) -> Image.Image:
    patches = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(patches).resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def decoded(data: bytes) -> np.ndarray:
    return np.asarray(images.decode(data)).astype(int)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_pictures_are_turned_upright_as_pillow_would(kind: str, orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(drawn(), kind, exif=exif)
    assert images.examine(data).orientation == orientation
    expected = ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB")
    assert np.array_equal(np.asarray(images.decode(data)), np.asarray(expected))


@pytest.mark.parametrize("order", ["<", ">"])
def test_the_orientation_is_read_in_both_byte_orders(order: str) -> None:
    mark = b"II*\0" if order == "<" else b"MM\0*"
    entries = struct.pack(f"{order}HHIHH", 0x010F, 2, 4, 0x4142, 0) + struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 6, 0)
    exif = b"Exif\0\0" + mark + struct.pack(f"{order}IH", 8, 2) + entries + bytes(4)
    assert images.examine(encoded(drawn(), "JPEG", exif=exif)).orientation == 6


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_becomes_white(mode: str) -> None:
    clear = drawn().convert("RGBA")
    clear.putalpha(0)
    assert decoded(encoded(clear.convert(mode), "PNG")).min() == 255
    clear.putalpha(255)
    assert np.array_equal(decoded(encoded(clear, "PNG")), np.asarray(drawn()))


def test_half_transparency_is_mixed_with_white() -> None:
    half = drawn().convert("RGBA")
    half.putalpha(128)
    expected = np.asarray(drawn()) * (128 / 255) + 255 * (127 / 255)
    assert np.abs(decoded(encoded(half, "PNG")) - expected).max() <= 1


def test_sixteen_bits_become_eight_without_clipping() -> None:
    deep = (np.arange(256, dtype=np.uint16) * 257).reshape(16, 16)
    assert np.array_equal(decoded(encoded(Image.fromarray(deep), "PNG"))[..., 0], np.arange(256).reshape(16, 16))


def test_transparency_of_sixteen_bits_becomes_white() -> None:
    deep = np.full((8, 8), 1000, np.uint16)
    deep[:4] = 5000
    pixels = decoded(encoded(Image.fromarray(deep), "PNG", transparency=1000))
    assert pixels[7, 7].tolist() == [255, 255, 255]
    assert pixels[0, 0].tolist() == [5000 >> 8] * 3


def test_adobes_inverted_cmyk_is_not_a_negative() -> None:
    data = encoded(drawn().convert("CMYK"), "JPEG", quality=95)
    assert b"Adobe" in data
    assert np.abs(decoded(data) - np.asarray(drawn())).mean() < 12


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_all_that_is_handed_on(kind: str) -> None:
    first, later = drawn(), [Image.new("RGB", (40, 30), colour) for colour in ("red", "blue", "lime")]
    moving = encoded(first, kind, save_all=True, append_images=later)
    container = images.examine(moving)
    assert len(container.data) < len(moving)
    assert getattr(Image.open(io.BytesIO(container.data)), "n_frames", 1) == 1
    assert np.array_equal(decoded(moving), np.asarray(Image.open(io.BytesIO(moving)).convert("RGB")))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_plain_file_is_its_own_container(kind: str) -> None:
    data = encoded(drawn(), kind)
    container = images.examine(data)
    assert container.data is data
    assert container.sound
    assert (container.format, container.size) == (kind, (40, 30))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_small_profile_stays_and_other_metadata_goes(kind: str) -> None:
    profile = bytes(36) + b"acsp" + bytes(400)
    exif = Image.Exif()
    exif[0x010F] = "Maker"
    data = encoded(drawn(), kind, icc_profile=profile, exif=exif)
    container = images.examine(data)
    assert container.sound
    assert b"Maker" not in container.data
    assert Image.open(io.BytesIO(container.data)).info["icc_profile"] == profile


def test_interlaced_pixels_are_counted_pass_by_pass() -> None:
    def fills(width: int, height: int, spare: int) -> bool:
        sizes = [(-(-(width - x) // dx), -(-(height - y) // dy)) for x, y, dx, dy in containers._PASSES]
        rows = b"".join((b"\0" + bytes(3 * w)) * h for w, h in sizes if w > 0 and h > 0)
        header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 1)
        parts = ((b"IHDR", header), (b"IDAT", zlib.compress(rows + bytes(spare))), (b"IEND", b""))
        chunks = (struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in parts)
        data = b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
        Image.open(io.BytesIO(data)).load()
        return containers.pixels_fill(images.examine(data))

    assert all(fills(width, height, 0) for width in (1, 2, 5, 8, 9) for height in (1, 3, 4, 17))
    assert not fills(5, 5, 1)


LIMITED = {
    "pixels": ({"max_pixels": 100}, "image_too_many_pixels", "40 x 30 pixels; at most 100 "),
    "bytes": ({"max_bytes": 9}, "image_too_many_bytes", "at most 9 "),
}


@pytest.mark.parametrize("name", LIMITED)
@pytest.mark.parametrize("read", [images.examine, images.open_header, images.decode])
def test_limits_are_those_of_the_caller(read, name: str) -> None:
    limits, reason, message = LIMITED[name]
    with pytest.raises(images.ImageError, match=message) as caught:
        read(encoded(drawn(), "PNG"), **limits)
    assert caught.value.reason == reason


def test_a_limit_above_pillows_own_does_not_make_it_warn() -> None:
    with pytest.raises(images.ImageError, match=f"at most {Image.MAX_IMAGE_PIXELS:,} are allowed"):
        images.examine(b"GIF89a" + struct.pack("<HHB", 50_000, 50_000, 0) + bytes(9), max_pixels=10**12)


@pytest.mark.parametrize(
    ("data", "seems"),
    [
        (b"%PDF-1.4", "PDF"),
        (b"BM" + bytes(60), "BMP"),
        (b"\0\0\0\x1cftypavif", "AVIF"),
        (b"\0\0\0\x1cftypheix", "HEIC"),
        (b"\0\0\0\x1cftypisom", "MP4"),
        (b" \n<svg width='1'>", "SVG"),
        (b"\xef\xbb\xbf<HTML>", "HTML"),
        (b"<?xml version='1.0'?><a/>", "XML"),
        (b'{"error": 404}', "JSON"),
        (b"an apple", ""),
    ],
)
def test_what_is_no_picture_is_named(data: bytes, seems: str) -> None:
    assert images.kind(data) == seems
    with pytest.raises(images.ImageError, match=f"is {seems}, first bytes" if seems else r"\(first bytes") as caught:
        images.examine(data)
    assert caught.value.reason == "image_unreadable"


def test_a_batch_squeezes_pictures_and_greys_what_is_missing() -> None:
    made = images.batch([encoded(drawn(), "JPEG"), None, b""], 8)
    assert (made.shape, made.dtype) == ((3, 8, 8, 3), np.uint8)
    assert made[0].std() > 10
    assert (made[1:] == 128).all()
    assert images.batch([], 8).shape == (0, 8, 8, 3)
