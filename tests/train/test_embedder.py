import io
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pydantic import BaseModel, ConfigDict
from safetensors.torch import save_file

from idem import manifest
from idem.images import ImageError
from train import backbones
from train.backbones import BackboneConfig
from train.backbones.base import Backbone, computes_bf16
from train.backbones.compact import EMB, Compact, CompactConfig, tokenize
from train.backbones.qwen3vl import Qwen3VLConfig
from train.embedder import Embedder, HistogramEmbedder, by_length

COMPACT = CompactConfig(dim=32, widths=(8, 16, 16, 32), text_dim=16)


def picture(seed: int, size: tuple[int, int] = (70, 50)) -> bytes:
    out = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), np.uint8)).save(out, "PNG")
    return out.getvalue()


def qwen(folder: Path) -> Qwen3VLConfig:
    return Qwen3VLConfig(path=str(folder), dim=32, image_tokens=4, text_length=24, lora_rank=0)


def backbone(kind: str, folder: Path) -> Backbone:
    torch.manual_seed(0)
    return backbones.build(COMPACT if kind == "compact" else qwen(folder))


@pytest.fixture(scope="module", params=["compact", "qwen3-vl"])
def either(request: pytest.FixtureRequest, qwen_folder: Path) -> Embedder:
    return Embedder(backbone(request.param, qwen_folder))


@pytest.fixture(scope="module")
def embedder() -> Embedder:
    torch.manual_seed(0)
    return Embedder(Compact(COMPACT))


def artifact(model: Backbone, folder: Path) -> str:
    made = manifest.Plan(parent=str(folder), kind="embedder", config={"fractions": (0.7, 0.2, 0.1)}, inputs={})
    Path(made.folder).mkdir(parents=True)
    made.write(figures={}, files=model.save(Path(made.folder)))
    return made.folder


def test_vectors_are_the_same_alone_and_in_a_batch(either: Embedder) -> None:
    images = [picture(0), None, picture(2), picture(3), None, picture(5)]
    texts = ["", "a red mug", "mug", "", "mug, very long " * 3, "teapot"]
    together = either.encode(images, texts, batch_size=4)
    alone = np.concatenate([either.encode([i], [t]) for i, t in zip(images, texts, strict=True)])
    assert np.abs(together - alone).max() < 1e-5
    assert np.allclose(np.linalg.norm(together, axis=1), 1, atol=1e-5)
    assert np.abs(together - np.roll(together, 1, 0)).max(1).min() > 1e-3, "six items, six vectors"


def test_batches_hold_texts_of_one_length_and_every_row_once() -> None:
    images, texts = [b"x", None, None, b"x", None], ["long text", "zzz", "a", "", "bb"]
    assert by_length(images, texts, 2) == [[3, 0], [2, 4], [1]]


def test_a_prefix_is_the_renormalised_start_of_the_vector(either: Embedder) -> None:
    whole, half = either.encode([picture(0)], None), either.encode([picture(0)], None, dim=16)
    assert half.shape == (1, 16)
    assert np.allclose(half, whole[:, :16] / np.linalg.norm(whole[:, :16]), atol=1e-6)


def test_what_is_wrong_is_said(either: Embedder) -> None:
    with pytest.raises(ValueError, match="item 1 has neither a picture nor a text"):
        either.encode([picture(0), None], ["", "  "])
    with pytest.raises(ImageError, match="not a picture"):
        either.encode([picture(0), b"nonsense", picture(1)], None, batch_size=1)
    with pytest.raises(ValueError, match=r"not in 1\.\.32"):
        either.encode([picture(0)], None, dim=33)
    with pytest.raises(ValueError, match="unknown precision 'fp8'; allowed are fp32, bf16, int8"):
        Embedder(either.model, precision="fp8")  # pyright: ignore[reportArgumentType]
    assert either.encode([], []).shape == (0, 32)


@pytest.mark.parametrize("kind", ["compact", "qwen3-vl"])
def test_what_is_saved_opens_with_the_same_vectors(kind: str, qwen_folder: Path, tmp_path: Path) -> None:
    model = backbone(kind, qwen_folder)
    folder = artifact(model, tmp_path)
    loaded = Embedder.load(folder, device="cpu")
    assert loaded.fractions == (0.7, 0.2, 0.1)
    assert loaded.id == Path(folder).name
    asked = [picture(0), None], ["", "a red mug"]
    assert np.array_equal(loaded.encode(*asked), Embedder(model).encode(*asked))
    (Path(folder) / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(ValueError, match="is damaged"):
        Embedder.load(folder)


def test_the_weights_it_started_from(qwen_folder: Path, tmp_path: Path) -> None:
    for kind in ("compact", "qwen3-vl"):
        base = shutil.copytree(qwen_folder, tmp_path / "base" / kind)
        model = backbone(kind, base)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        asked = None, ["a red mug"]
        expected = Embedder(model).encode(*asked)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        folder = artifact(model, tmp_path / kind)
        if kind == "compact":
            with pytest.raises(ValueError, match="kept without the weights it started from"):
                Embedder.load(folder, weights="untrained")
            save_file(start, Path(folder) / "untrained.safetensors")
        untrained = Embedder.load(folder, weights="untrained", device="cpu")
        assert untrained.id.endswith("-untrained")
        assert np.array_equal(untrained.encode(*asked), expected)
        assert not np.allclose(Embedder.load(folder, device="cpu").encode(*asked), expected, atol=1e-3)
        shutil.rmtree(base)
    with pytest.raises(ValueError, match="no Qwen3-VL model at"):
        Embedder.load(folder, weights="untrained")


def test_configurations_are_told_apart_by_their_backbone() -> None:
    class Told(BaseModel):
        model_config = ConfigDict(extra="forbid")
        model: BackboneConfig = CompactConfig()

    assert Told().model == CompactConfig()
    assert Told.model_validate({"model": {"side": 64}}).model == CompactConfig(side=64)
    assert Told.model_validate({"model": {"backbone": "qwen3-vl", "image_tokens": 80}}).model == Qwen3VLConfig(image_tokens=80)
    assert Qwen3VLConfig(image_tokens=80).side == 256
    for wrong in (
        {"backbone": "clip"},
        {"lora_rank": 4},
        {"backbone": "qwen3-vl", "widths": [1]},
        {"backbone": "qwen3-vl", "image_tokens": 1},
    ):
        with pytest.raises(ValueError, match="model"):
            Told.model_validate({"model": wrong})


def test_bf16_is_near_where_the_hardware_has_it_and_fp32_elsewhere(qwen_folder: Path) -> None:
    for kind in ("compact", "qwen3-vl"):
        model = backbone(kind, qwen_folder)
        asked = [picture(0), None, picture(1)], ["", "a red mug", "mug"]
        exact, less = Embedder(model).encode(*asked), Embedder(model, precision="bf16").encode(*asked)
        assert np.abs(exact - less).max() < (2e-2 if computes_bf16(torch.device("cpu")) else 1e-7)


def test_int8_is_near_for_qwen_and_refused_for_compact(qwen_folder: Path) -> None:
    model = backbone("qwen3-vl", qwen_folder)
    asked = [picture(i) for i in range(4)] + [None] * 4, ["", "a", "b", "", "a red mug", "mug", "teapot", "spoon"]
    exact = Embedder(model).encode(*asked)
    less = Embedder(backbone("qwen3-vl", qwen_folder), precision="int8").encode(*asked)
    assert (exact * less).sum(1).min() > 0.98
    assert not np.array_equal(exact, less)
    with pytest.raises(ValueError, match="int8 is for a qwen3-vl embedder on the CPU"):
        Embedder(backbone("compact", qwen_folder), precision="int8")


def test_what_only_compact_has_is_named(qwen_folder: Path) -> None:
    reader = Embedder(backbone("qwen3-vl", qwen_folder))
    for ask in (
        lambda: reader.vocabulary,
        lambda: reader.token_shape,
        lambda: reader.tokenize(["a"]),
        lambda: reader.image_tokens(torch.zeros(1)),
    ):
        with pytest.raises(ValueError, match="cannot be had of a Qwen3VL embedder yet"):
            ask()


def test_image_tokens_have_the_promised_shape(embedder):
    tokens = embedder.image_tokens(torch.zeros(2, 48, 48, 3, dtype=torch.uint8))
    assert tuple(tokens.shape) == (2, *embedder.token_shape)


def test_tokens_end_with_the_embedding_token_within_their_length():
    tokens = tokenize(["abc", "ü" * 100, ""], 8)
    assert tuple(tokens.shape) == (3, 8)
    assert [(row == EMB).sum().item() for row in tokens] == [1, 1, 1]
    assert tokens[2, 0] == EMB


def test_text_padding_does_not_change_a_vector(embedder):
    short, long = "mug", "a very long title of a teapot with a handle"
    assert np.allclose(embedder.encode(None, [short]), embedder.encode(None, [short, long])[:1], atol=1e-5)


def test_histogram_twin_sees_colour_alone():
    twin = HistogramEmbedder()
    vectors = twin.encode([picture(0), None])
    assert np.linalg.norm(vectors[0]) == pytest.approx(1, abs=1e-5)
    assert not vectors[1].any()
