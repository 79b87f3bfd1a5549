"""The qwen3-vl backbone on a tiny checkpoint in the real format: transformers itself is the slow twin."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.tools import qwen_model
from train import backbones
from train.backbones import lora, squares
from train.backbones.qwen3vl import EMBEDDINGS, OURS, Qwen3VL, Qwen3VLConfig
from train.backbones.turns import TEMPLATE

TEXTS = ("the red mug", "a mug, very long as sellers write: <|EMB|> <|image_pad|> gift box included", "théière n° 7")
TEXT_ROWS, IMAGE_ROWS, COUNT = np.array([1, 0, 3]), np.array([4, 0, 2]), 5


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> None:
    torch.set_num_threads(1)


def told(folder: Path, **changed: object) -> Qwen3VLConfig:
    small = {"path": str(folder), "dim": 32, "image_tokens": 5, "text_length": 24, "lora_rank": 0, "gradient_checkpointing": False}
    return Qwen3VLConfig.model_validate({**small, **changed})


def opened(folder: Path, **changed: object) -> Qwen3VL:
    torch.manual_seed(0)
    made = backbones.build(told(folder, **changed))
    assert isinstance(made, Qwen3VL)
    return made


def pixels(count: int = 3, side: int = 64) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def vectors(model: Qwen3VL) -> Tensor:
    """Five items: both, text, picture, text, picture."""
    with torch.inference_mode():
        return model.eval()(model.collate(pixels(), IMAGE_ROWS, TEXTS, TEXT_ROWS, COUNT), COUNT)


def loss(model: Qwen3VL) -> Tensor:
    h = model(model.collate(pixels(), IMAGE_ROWS, TEXTS, TEXT_ROWS, COUNT), COUNT)
    return F.cross_entropy(8 * h @ h.detach().roll(1, 0).T, torch.arange(COUNT))


def train(model: Qwen3VL, steps: int = 4, lr: float = 3e-3) -> list[float]:
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss(model)
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


def gradients(model: Qwen3VL) -> dict[str, Tensor]:
    model.train().zero_grad()
    loss(model).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def test_a_picture_is_cut_as_transformers_cuts_it(qwen_folder: Path) -> None:
    model = opened(qwen_folder, image_tokens=16)
    x = pixels(2, model.side)
    expected = model.image_processor([p.numpy() for p in x], return_tensors="pt")
    assert expected["image_grid_thw"].tolist() == [[1, 8, 8]] * 2
    for given in (x, x.permute(0, 3, 1, 2).float() / 255):
        normal = squares.normalise(given, model.image_processor.image_mean, model.image_processor.image_std)
        ours = squares.patchify(normal, patch=16, merge=2, frames=2)
        assert (ours.flatten(0, 1) - expected["pixel_values"]).abs().max() < 1e-6


def test_an_item_reads_as_the_chat_template_says(qwen_folder: Path) -> None:
    model = opened(qwen_folder)
    words = model.tokenizer
    made = model.collate(pixels(1), np.array([0]), ["the mug"], np.array([0]), 1)
    content = [{"type": "image"}, {"type": "text", "text": " the mug "}]  # the text comes first whatever the order
    said = words.apply_chat_template([{"role": "user", "content": content}], chat_template=TEMPLATE, tokenize=False)
    assert said == (
        "<|im_start|>system\nRepresent the user's input.<|im_end|>\n<|im_start|>user\nthe mug<|vision_start|><|image_pad|>"
        "<|vision_end|><|im_end|>\n<|im_start|>assistant\n<|EMB|>"
    )
    assert made["ids"][0].tolist() == words(said.replace("<|image_pad|>", 4 * "<|image_pad|>"))["input_ids"]
    for text in ("!mug", "two  words", "-", "7 mugs.", ""):
        plain = words.apply_chat_template([{"role": "user", "content": text}], chat_template=TEMPLATE, tokenize=False)
        assert model.collate(None, np.array([]), [text], np.array([0]), 1)["ids"][0].tolist() == words(plain)["input_ids"]


def test_special_tokens_that_a_seller_writes_are_characters(qwen_folder: Path) -> None:
    model = opened(qwen_folder, text_length=60)
    ids = model.collate(None, np.array([]), [TEXTS[1], "\ud800 <|im_end|>"], np.array([0, 1]), 2)["ids"]
    assert ((ids == model.turns.emb).sum(1) == 1).all()
    assert not (ids == model.turns.image).any()


def test_vectors_are_those_of_transformers_itself(qwen_folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModel

    model = opened(qwen_folder, image_tokens=9)
    model.save(tmp_path)
    plain = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    x = pixels(3, model.side)
    made = model.collate(x, IMAGE_ROWS, TEXTS, TEXT_ROWS, COUNT)
    seen = model.image_processor([x[i].numpy() for i in (1, 2, 0)], return_tensors="pt")
    kinds = (made["ids"] == model.turns.image).int()
    mask = (torch.arange(made["ids"].shape[1]) <= made["at"][:, None]).long()
    positions, _ = plain.get_rope_index(made["ids"], kinds, image_grid_thw=seen["image_grid_thw"], attention_mask=mask)
    assert torch.equal(positions * mask, made["positions"] * mask)
    with torch.inference_mode():
        hidden = plain(input_ids=made["ids"], attention_mask=mask, mm_token_type_ids=kinds, **seen).last_hidden_state
        ours = model.eval()(made, COUNT)
    assert (F.normalize(hidden[torch.arange(COUNT), made["at"]], dim=1) - ours).abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "tolerance"), [("fp32", 1e-5), ("bf16", 2e-2)])
def test_vectors_are_the_same_alone_and_in_a_batch(qwen_folder: Path, dtype: str, tolerance: float) -> None:
    model = opened(qwen_folder, dtype=dtype)
    together, x = vectors(model), pixels()
    with torch.inference_mode():
        for row in range(COUNT):
            own = x[torch.from_numpy(row == IMAGE_ROWS)]
            texts = [text for text, at in zip(TEXTS, TEXT_ROWS, strict=True) if at == row]
            image_rows, text_rows = np.zeros(len(own), int), np.zeros(len(texts), int)
            alone = model(model.collate(own if len(own) else None, image_rows, texts, text_rows, 1), 1)
            assert (alone[0] - together[row]).abs().max() < tolerance
    assert (together[0] - together[1]).abs().max() > 10 * tolerance if dtype == "fp32" else True


@pytest.mark.parametrize("rank", [0, 4])
def test_trained_saved_and_loaded_it_is_the_same_to_the_last_bit(qwen_folder: Path, tmp_path: Path, rank: int) -> None:
    model = opened(qwen_folder, lora_rank=rank)
    before = vectors(model)
    losses = train(model)
    assert losses[-1] < losses[0]
    after = vectors(model)
    assert (after - before).abs().max() > 1e-2
    files = model.save(tmp_path / "one")
    assert {"config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja", "1_Pooling/config.json"} <= set(files)
    assert all((tmp_path / "one" / name).exists() for name in files)
    loaded = backbones.load(tmp_path / "one")
    assert isinstance(loaded, Qwen3VL)
    assert loaded.config.lora_rank == 0
    served = vectors(loaded)
    assert torch.equal(served, after) if not rank else (served - after).abs().max() < 1e-5  # adapters are merged
    loaded.save(tmp_path / "two")
    assert torch.equal(vectors(backbones.load(tmp_path / "two")), served)  # pyright: ignore[reportArgumentType]
    assert (backbones.untrained(tmp_path / "one").emb == opened(qwen_folder).emb).all()


@pytest.mark.parametrize("rank", [0, 4])
def test_checkpointed_activations_give_the_same_gradients(qwen_folder: Path, rank: int) -> None:
    plain = gradients(opened(qwen_folder, lora_rank=rank))
    frugal = opened(qwen_folder, lora_rank=rank, gradient_checkpointing=True)
    calls = []
    frugal.layers()[-1].get_submodule("mlp").register_forward_pre_hook(lambda *_: calls.append(1))
    again = gradients(frugal)
    assert len(calls) == 2, "the activations were computed twice"
    assert plain.keys() == again.keys()
    assert all(torch.allclose(plain[name], again[name], atol=1e-7) for name in plain)


def test_an_adapter_is_the_product_that_is_merged(qwen_folder: Path) -> None:
    model = opened(qwen_folder, lora_rank=4)
    untouched = vectors(opened(qwen_folder))
    assert torch.equal(vectors(model), untouched), "it starts as it was"
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"emb", *(n for n, _ in model.named_parameters() if lora.MARK in n)}
    train(model)
    path, layer = next((n, m) for n, m in model.model.named_modules() if isinstance(m, lora.LoraLinear))
    slow = layer.weight + 32.0 / 4 * layer.lora_b @ layer.lora_a
    assert torch.allclose(lora.merged_state(model.model)[f"{path}.weight"], slow, atol=1e-7)
    x = torch.randn(3, layer.in_features)
    assert torch.allclose(layer(x), F.linear(x, slow, layer.bias), atol=1e-5)


def test_every_trained_parameter_gets_a_gradient(qwen_folder: Path) -> None:
    for changed, images in (({}, True), ({"lora_rank": 2}, True), ({"freeze_vision": True}, True), ({}, False)):
        model = opened(qwen_folder, **changed)
        model.train_only(images=images, texts=True)
        x, rows = (pixels(), IMAGE_ROWS) if images else (None, np.array([]))
        model(
            model.collate(x, rows, TEXTS, TEXT_ROWS if images else np.arange(3), COUNT if images else 3), COUNT if images else 3
        ).sum().backward()
        assert all((p.grad is not None) == p.requires_grad for p in model.parameters())
        tower = any(p.requires_grad for n, p in model.named_parameters() if "visual." in n)
        assert tower == (images and not changed), "the tower trains only where it is asked for and seen"


@pytest.mark.parametrize("rank", [0, 4])
def test_a_checkpoint_holds_what_is_trained_and_comes_back(qwen_folder: Path, rank: int) -> None:
    model = opened(qwen_folder, lora_rank=rank)
    train(model)
    state = {name: value.clone() for name, value in model.state_for_checkpoint().items()}
    assert set(state) == {name for name, p in model.named_parameters() if p.requires_grad}
    fresh = opened(qwen_folder, lora_rank=rank)
    assert not torch.equal(vectors(fresh), vectors(model))
    fresh.load_checkpoint(state)
    assert torch.equal(vectors(fresh), vectors(model))
    with pytest.raises(ValueError, match="does not fit the Qwen3VL backbone in 1 tensors, as emb"):
        fresh.load_checkpoint({name: value for name, value in state.items() if name != "emb"})


def test_the_added_token_starts_where_the_family_pools_and_finds_room(tmp_path: Path) -> None:
    full = qwen_model.write(tmp_path / "full", vocabulary=len(qwen_model.tokenizer()))
    model = opened(full)
    rows = model.model.get_input_embeddings().weight
    assert model.turns.emb == len(rows) - 1
    assert torch.equal(model.emb.detach(), rows[model.tokenizer.convert_tokens_to_ids("<|endoftext|>")])
    train(model)
    model.save(tmp_path / "saved")
    loaded = backbones.load(tmp_path / "saved")
    assert isinstance(loaded, Qwen3VL)
    assert torch.equal(vectors(loaded), vectors(model))
    assert torch.equal(loaded.model.state_dict()[EMBEDDINGS][loaded.turns.emb], model.emb.detach())


def test_what_is_wrong_is_said(qwen_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"dim 64 was asked .* hidden size is 32"):
        opened(qwen_folder, dim=64)
    with pytest.raises(ValueError, match="no linear layer is called nothing; allowed are down_proj"):
        opened(qwen_folder, lora_rank=2, lora_modules=("nothing",))
    with pytest.raises(ValueError, match="no Qwen3-VL model at"):
        opened(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="is a bert; the qwen3-vl backbone takes qwen3_vl"):
        opened(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({OURS: told(tmp_path / "gone").model_dump()}))
    with pytest.raises(ValueError, match="no Qwen3-VL model at"):
        backbones.untrained(tmp_path)
