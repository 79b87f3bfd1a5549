"""A saved qwen3-vl embedder in other hands: transformers, sentence-transformers, and who reads its model card."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from train import backbones
from train.backbones.compact import CompactConfig
from train.backbones.qwen3vl import Qwen3VL, Qwen3VLConfig
from train.backbones.turns import EMB
from train.embedder import Embedder
from train.export import model_card

TEXTS = ["the red mug", "a teapot with a handle, 300 ml"]


@pytest.fixture(scope="module")
def model(qwen_folder: Path) -> Qwen3VL:
    return Qwen3VL.build(Qwen3VLConfig(path=str(qwen_folder), dim=32, image_tokens=4, text_length=60, lora_rank=0))


@pytest.fixture(scope="module")
def saved(model: Qwen3VL, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    model.save(folder)
    return folder


def test_transformers_finds_the_embedding_at_the_last_token(model: Qwen3VL, saved: Path) -> None:
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    words = AutoTokenizer.from_pretrained(saved)
    turns = [[{"role": "user", "content": text}] for text in TEXTS]
    batch = words.apply_chat_template(turns, padding=True, return_dict=True, return_tensors="pt")
    last = batch["attention_mask"].sum(1) - 1
    assert (batch["input_ids"][torch.arange(2), last] == words.convert_tokens_to_ids(EMB)).all()
    generator = Qwen3VLForConditionalGeneration.from_pretrained(saved).eval()
    with torch.inference_mode():
        hidden = generator(**batch, output_hidden_states=True).hidden_states[-1]
    ours = Embedder(model).encode(None, TEXTS)
    assert np.abs(F.normalize(hidden[torch.arange(2), last], dim=1).numpy() - ours).max() < 1e-5


def test_the_tokenizer_adds_nothing_behind_the_embedding_token(saved: Path) -> None:
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(saved)
    assert words(f"mug{EMB}")["input_ids"][-1] == words.convert_tokens_to_ids(EMB), "its base ended every text by <|endoftext|>"


def test_the_files_of_sentence_transformers(saved: Path) -> None:
    modules = json.loads((saved / "modules.json").read_text())
    assert [m["type"].rpartition(".")[2] for m in modules] == ["Transformer", "Pooling", "Normalize"]
    pooling = json.loads((saved / modules[1]["path"] / "config.json").read_text())
    assert pooling["pooling_mode_lasttoken"]
    assert pooling["word_embedding_dimension"] == 32


def test_sentence_transformers_gives_the_same_vectors(model: Qwen3VL, saved: Path) -> None:
    """Seen with sentence-transformers 6.0.1 and torchvision 0.28; neither is installed with this project."""
    pytest.importorskip("torchvision")
    theirs = pytest.importorskip("sentence_transformers").SentenceTransformer(str(saved), device="cpu")
    random = np.random.default_rng(0)
    pictures = [Image.fromarray(random.integers(0, 255, (model.side, model.side, 3), np.uint8)) for _ in TEXTS]
    encoded = []
    for picture in pictures:
        picture.save(stream := io.BytesIO(), "PNG")
        encoded.append(stream.getvalue())
    ours = Embedder(backbones.load(saved))
    assert np.abs(theirs.encode(TEXTS) - ours.encode(None, TEXTS)).max() < 1e-5
    assert np.abs(theirs.encode(pictures) - ours.encode(encoded, None)).max() < 1e-5
    both = [{"text": text, "image": picture} for text, picture in zip(TEXTS, pictures, strict=True)]
    assert np.abs(theirs.encode(both) - ours.encode(encoded, TEXTS)).max() < 1e-5


def test_the_model_card_has_every_figure() -> None:
    card = model_card({"held_R@1": 0.41, "speed": {"images/s": 900}}, Qwen3VLConfig().model_dump())
    assert card.startswith("---\nlicense: apache-2.0\n")
    for line in ("base_model: Qwen/Qwen3-VL-Embedding-2B", "| held_R@1 | 0.41 |", "| speed.images/s | 900 |", "| image_tokens | 64 |"):
        assert line in card.splitlines()
    assert "base_model" not in model_card({}, CompactConfig().model_dump())
