"""The compact backbone: a small convolutional tower and a small causal text model, trained from scratch on two CPU cores.

Shapes: B items, S pixels a side, L tokens, D embedding dimensions, T image tokens of C channels.
The joint embedding of an item is the normalised sum of what its picture and its text say (docs/decisions/0002), so an item
may have either or both. A text says what its character n-grams say, in dimensions of their own (docs/decisions/0006), and in those
of the pictures the hidden state of a causal model at the one added token, as METHOD.md section 2 has it.
"""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from train.backbones.base import Backbone, Inputs

PAD, EMB = 0, 1
FIRST_BYTE = 4
VOCABULARY = FIRST_BYTE + 256


class CompactConfig(BaseModel):
    """Everything that decides the shapes of the weights."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    backbone: Literal["compact"] = "compact"
    side: Annotated[int, Field(ge=32, multiple_of=16)] = 48
    widths: tuple[int, int, int, int] = (32, 64, 128, 256)
    dim: Annotated[int, Field(ge=8)] = 256
    text_dim: int = 128
    text_layers: int = 2
    text_length: int = 48
    ngrams: Annotated[int, Field(ge=1)] = 16384  # buckets that character n-grams are hashed into
    letters: Annotated[float, Field(gt=0, lt=1)] = 0.25  # share of the dimensions that is the n-grams' own
    text_weight: Annotated[float, Field(gt=0)] = 0.3  # of an item's text beside its picture, to begin with

    @property
    def spelt(self) -> int:
        """How many dimensions are the n-grams'."""
        return min(max(1, round(self.letters * self.dim)), self.dim - 1)

    @property
    def lettered(self) -> Tensor:
        """(D,) bool: which dimensions are the n-grams', spread evenly, so that every prefix has its share."""
        step = torch.arange(self.dim + 1) * self.spelt // self.dim
        return step[1:] > step[:-1]


def tokenize(texts: Sequence[str], length: int) -> Tensor:
    """UTF-8 bytes of each text, at most length - 1 of them, then the embedding token: (n, longest) int64, padded with PAD."""
    rows = [[FIRST_BYTE + b for b in text.lower().encode("utf-8", "replace")[: length - 1]] + [EMB] for text in texts]
    longest = max(map(len, rows), default=1)
    return torch.tensor([row + [PAD] * (longest - len(row)) for row in rows], dtype=torch.int64).reshape(len(rows), longest)


def ngrams(texts: Sequence[str], buckets: int, shortest: int = 3, longest: int = 5) -> tuple[Tensor, Tensor]:
    """Hashed character n-grams of each word, its ends marked: (total,) int64 buckets, and where each of the n texts starts in it."""
    found: list[int] = []
    starts: list[int] = []
    for text in texts:
        starts.append(len(found))
        for word in text.lower().split():
            marked = f" {word} "
            for length in range(shortest, longest + 1):
                found += [zlib.crc32(marked[i : i + length].encode("utf-8", "replace")) for i in range(len(marked) - length + 1)]
    return torch.tensor(found, dtype=torch.int64) % buckets, torch.tensor(starts, dtype=torch.int64)


class Lexicon(nn.Module):
    """Texts as weighted sums of their n-grams' vectors: (n, D), L2-normalised.

    Random vectors make it the sketch of a bag of n-grams (Johnson-Lindenstrauss), so that words never seen in training are
    found by their letters from the first step; training moves words of one meaning together. `importance` is the logarithm
    of each bucket's weight; `weigh` sets it to the inverse document frequency in the texts at hand.
    """

    def __init__(self, buckets: int, dim: int) -> None:
        super().__init__()
        # Adam's steps are of one size whatever the weights': at this size a thousand of them can move a vector, and ten cannot.
        self.vectors = nn.Embedding(buckets, dim, _weight=torch.randn(buckets, dim) * 0.04)
        self.importance = nn.Parameter(torch.zeros(buckets))

    def forward(self, found: Tensor, starts: Tensor) -> Tensor:
        weights = self.importance[found].exp()
        return F.normalize(F.embedding_bag(found, self.vectors.weight, starts, mode="sum", per_sample_weights=weights), dim=1)

    @torch.no_grad()
    def weigh(self, texts: Sequence[str]) -> None:
        buckets = len(self.importance)
        documents = torch.zeros(buckets)
        for text in texts:
            documents[ngrams([text], buckets)[0].unique()] += 1
        idf = ((1 + len(texts)) / (1 + documents)).log() + 1
        self.importance.copy_((idf / idf.mean()).log())


class Block(nn.Module):
    """Residual pair of 3 x 3 convolutions; `stride` is taken by the first."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.shortcut = nn.Sequential(pool, nn.Conv2d(inputs, outputs, 1, bias=False)) if inputs != outputs or stride > 1 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class VisionTower(nn.Module):
    """(B, 3, S, S) -> the maps of the last two stages, (B, widths[2], S/8, S/8) and (B, widths[3], S/16, S/16)."""

    def __init__(self, widths: tuple[int, int, int, int]) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, widths[0], 3, 2, 1, bias=False), nn.BatchNorm2d(widths[0]), nn.ReLU())
        self.stages = nn.ModuleList(Block(widths[max(i - 1, 0)], widths[i], 2 if i else 1) for i in range(4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.stem(x)
        for stage in self.stages[:3]:
            x = stage(x)
        return x, self.stages[3](x)


class TextModel(nn.Module):
    """(B, L) tokens -> (B, text_dim): the hidden state at the embedding token under causal attention."""

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        d = config.text_dim
        self.embed = nn.Embedding(VOCABULARY, d, padding_idx=PAD)
        self.position = nn.Parameter(torch.randn(config.text_length, d) * 0.02)
        self.local = nn.Conv1d(d, d, 4)  # the three bytes before and this one: cheap n-grams, robust to typos
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(d, 4, 2 * d, dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
            for _ in range(config.text_layers)
        )
        self.norm = nn.LayerNorm(d)

    def forward(self, tokens_BL: Tensor) -> Tensor:
        x = self.embed(tokens_BL)
        x = x + self.local(F.pad(x.transpose(1, 2), (3, 0))).transpose(1, 2) + self.position[: x.shape[1]]
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], device=x.device, dtype=x.dtype)
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        at = (tokens_BL == EMB).int().argmax(1)
        return self.norm(x[torch.arange(len(x), device=x.device), at])


class Compact(Backbone):
    """Pictures and texts to one space. Rows without a picture or without a text are named by index, not by placeholders."""

    def __init__(self, config: CompactConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.side = config.dim, config.side
        self.vision = VisionTower(config.widths)
        self.pool_norm = nn.BatchNorm1d(2 * config.widths[3])
        self.image_out = nn.Linear(2 * config.widths[3], config.dim - config.spelt, bias=False)
        self.text = TextModel(config)
        self.text_out = nn.Linear(config.text_dim, config.dim - config.spelt, bias=False)
        nn.init.zeros_(self.text_out.weight)  # the letters speak first
        self.lexicon = Lexicon(config.ngrams, config.spelt)
        self.places: Tensor
        self.register_buffer("places", config.lettered.int().argsort(stable=True).argsort(), persistent=False)
        self.text_weight = nn.Parameter(torch.tensor(config.text_weight).log())

    @property
    def token_shape(self) -> tuple[int, int]:
        side = self.config.side // 8
        return side * side, self.config.widths[2] + self.config.widths[3]

    @staticmethod
    def normalise(pixels: Tensor) -> Tensor:
        """(n, S, S, 3) uint8 or (n, 3, S, S) float in 0..1 -> (n, 3, S, S) float around zero, channels last."""
        if pixels.dtype == torch.uint8:
            pixels = pixels.permute(0, 3, 1, 2).float() / 255
        return ((pixels - 0.5) / 0.25).contiguous(memory_format=torch.channels_last)

    def encode_images(self, x: Tensor) -> Tensor:
        _, top = self.vision(x)
        pooled = torch.cat([top.mean((2, 3)), top.amax((2, 3))], 1).float()  # what there is, and how strongly somewhere
        return self._placed(F.normalize(self.image_out(self.pool_norm(pooled)).float(), dim=1))

    def encode_texts(self, tokens_BL: Tensor, found: Tensor, starts: Tensor) -> Tensor:
        return F.normalize(self._placed(self.text_out(self.text(tokens_BL)).float(), self.lexicon(found, starts)), dim=1)

    def _placed(self, meant: Tensor, spelt: Tensor | None = None) -> Tensor:
        """(n, D): what pictures and texts share, and the letters, each in their dimensions."""
        spelt = meant.new_zeros(len(meant), self.config.spelt) if spelt is None else spelt
        return torch.cat([meant, spelt], 1)[:, self.places]

    def image_tokens(self, x: Tensor) -> Tensor:
        """(n, 3, S, S) -> (n, T, C): the last two maps side by side, the coarser one repeated."""
        mid, top = self.vision(x)
        both = torch.cat([mid, F.interpolate(top, size=mid.shape[2:], mode="nearest")], 1)
        return both.flatten(2).transpose(1, 2).float()

    @torch.no_grad()
    def image_head(self) -> tuple[Tensor, Tensor]:
        """Weight (D', 2 W) and bias (D',) that make a picture's vector of the mean and the largest of the last W channels of its
        `image_tokens`; not normalised yet. W is half of the weight's columns."""
        norm = self.pool_norm
        assert norm.running_mean is not None
        assert norm.running_var is not None
        slope = norm.weight / (norm.running_var + norm.eps).sqrt()
        return self.image_out.weight * slope, self.image_out.weight @ (norm.bias - norm.running_mean * slope)

    def collate(self, pixels: Tensor | None, image_rows: np.ndarray, texts: Sequence[str], text_rows: np.ndarray, count: int) -> Inputs:
        made: Inputs = {}
        if pixels is not None and len(image_rows):
            made |= {"pixels": pixels, "image_rows": torch.as_tensor(image_rows)}
        if len(text_rows):
            found, starts = ngrams(texts, self.config.ngrams)
            tokens = tokenize(texts, self.config.text_length)
            made |= {"tokens": tokens, "ngrams": found, "ngram_starts": starts, "text_rows": torch.as_tensor(text_rows)}
        return made

    def forward(self, inputs: Inputs, count: int) -> Tensor:
        total = torch.zeros(count, self.dim, device=self.text_weight.device)
        if "pixels" in inputs:
            total = total.index_add(0, inputs["image_rows"], self.encode_images(self.normalise(inputs["pixels"])))
        if "tokens" in inputs:
            said = self.encode_texts(inputs["tokens"], inputs["ngrams"], inputs["ngram_starts"])
            total = total.index_add(0, inputs["text_rows"], self.text_weight.exp() * said)
        return F.normalize(total, dim=1)

    def hear(self, texts: Sequence[str]) -> None:
        self.lexicon.weigh(texts)

    def train_only(self, *, images: bool, texts: bool) -> None:
        self.vision.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        for module in (self.text, self.text_out, self.lexicon):
            module.requires_grad_(texts)
        for module in (self.vision, self.image_out, self.pool_norm):
            module.requires_grad_(images)
        self.text_weight.requires_grad_(texts)

    def save(self, folder: Path) -> list[str]:
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(self.config.model_dump(), indent=2))
        return ["config.json", "model.safetensors"]

    @classmethod
    def load(cls, folder: Path) -> "Compact":
        """What `save` wrote. ValueError where the weights are not those of the configuration."""
        config = CompactConfig(**json.loads((folder / "config.json").read_text()))
        model = cls(config)
        try:
            model.load_state_dict(load_file(folder / "model.safetensors"))
        except RuntimeError as error:
            raise ValueError(f"the weights in {folder} do not fit its config.json: {error}") from error
        return model
