"""The qwen3-vl backbone: any local folder or hub name of the Qwen3-VL family, through transformers.

Queries and documents alike go through one chat template (chat_template.jinja, METHOD.md section 2) with causal attention; the
embedding is the last layer's hidden state at `<|EMB|>`, L2-normalised. Shapes: B items, L tokens, S pixels a side, D = hidden size.
transformers is imported when a model is opened, not with this file.
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from train.backbones import lora
from train.backbones.base import Backbone, Inputs
from train.backbones.squares import Squares, normalise
from train.backbones.turns import EMB, TEMPLATE, Turns, row_order
from train.export import write_for_others

CELL = 32  # pixels of a side that one image token stands for: patches of 16, merged two by two
OURS = "idem"  # the key of config.json that holds what transformers does not know
STARTS_AS = "<|endoftext|>"  # where the family's embedding models pool, so that training starts from what they learnt
EMBEDDINGS = "language_model.embed_tokens.weight"
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Qwen3VLConfig(BaseModel):
    """What decides the model; `dim` must be the hidden size of the model at `path`, a folder or a hub name.

    image_tokens: at most so many a picture. text_length: tokens of the text, without the template's. dtype: of the weights as
    they are kept (adapters and the row of `<|EMB|>` are float32 always); computing in bf16 is the caller's autocast.
    lora_rank 0 trains all weights. gradient_checkpointing computes activations twice to hold fewer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    backbone: Literal["qwen3-vl"] = "qwen3-vl"
    path: str = "Qwen/Qwen3-VL-Embedding-2B"
    dim: Annotated[int, Field(ge=8)] = 2048
    image_tokens: Annotated[int, Field(ge=4, le=4096)] = 64
    text_length: Annotated[int, Field(ge=1)] = 96
    dtype: Literal["fp32", "bf16"] = "fp32"
    lora_rank: Annotated[int, Field(ge=0)] = 16
    lora_alpha: Annotated[float, Field(gt=0)] = 32.0
    lora_modules: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    freeze_vision: bool = False
    gradient_checkpointing: bool = True

    @property
    def side(self) -> int:
        """Pixels a side: the largest square within the budget of image tokens."""
        return CELL * math.isqrt(self.image_tokens)


class Qwen3VL(Backbone):
    """`model` is transformers' Qwen3VLModel (without the language head, which nothing here needs), `image_processor` its Pil one."""

    config: Qwen3VLConfig

    def __init__(self, config: Qwen3VLConfig, model: Any, tokenizer: Any, image_processor: Any) -> None:
        super().__init__()
        found = model.config.text_config.hidden_size
        if found != config.dim:
            raise ValueError(f"dim {config.dim} was asked of the model at {config.path}, whose hidden size is {found}; it must be that")
        self.config, self.dim, self.side = config, config.dim, config.side
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        image_processor.size = dict.fromkeys(("shortest_edge", "longest_edge"), config.side**2)  # as many pixels for others, too
        start = _add_token(model, tokenizer)
        self.turns = Turns(tokenizer, cells=config.side // CELL, length=config.text_length)
        self.squares = Squares(model.visual, config.side)
        self.emb = nn.Parameter(start.float().clone())
        if config.lora_rank:
            skip = "visual." if config.freeze_vision else ""
            lora.adapt(model, config.lora_modules, config.lora_rank, config.lora_alpha, skip=skip)
        if config.gradient_checkpointing:
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable  # its name before 5.23
            enable({"use_reentrant": False})
        self.train_only(images=True, texts=True)
        self.train()

    def layers(self) -> list[nn.Module]:
        return [*self.model.visual.blocks, *self.model.language_model.layers]

    def collate(self, pixels: Tensor | None, image_rows: np.ndarray, texts: Sequence[str], text_rows: np.ndarray, count: int) -> Inputs:
        image_rows = np.asarray(image_rows if pixels is not None else [], np.int64)
        made = self.turns.lay_out(texts, np.asarray(text_rows, np.int64), image_rows, count)
        if pixels is not None and len(image_rows):
            made["pixels"] = row_order(image_rows, pixels)
        return made

    def forward(self, inputs: Inputs, count: int) -> Tensor:
        ids, at = inputs["ids"], inputs["at"]
        assert len(ids) == count
        x = self.model.language_model.embed_tokens(ids)
        x = torch.where((ids == self.turns.emb)[..., None], self.emb.to(x.dtype), x)
        seen, deep = None, None
        if "pixels" in inputs:
            told = self.image_processor
            tokens, deep = self.squares(self.model.visual, normalise(inputs["pixels"], told.image_mean, told.image_std))
            seen = ids == self.turns.image
            x = x.masked_scatter(seen[..., None], tokens.to(x.dtype))
        hidden = self.model.language_model(
            inputs_embeds=x,
            position_ids=inputs["positions"],
            visual_pos_masks=seen,
            deepstack_visual_embeds=deep,
            use_cache=False,
        ).last_hidden_state
        return F.normalize(hidden[torch.arange(count, device=ids.device), at].float(), dim=1)

    def train_only(self, *, images: bool, texts: bool) -> None:
        """The language model reads every item, so texts or none, it is trained; the tower only where there are pictures."""
        tower = images and not self.config.freeze_vision
        for name, parameter in self.model.named_parameters():
            trained = lora.MARK in name if self.config.lora_rank else True
            parameter.requires_grad_(trained and (tower or not name.startswith("visual.")))

    def state_for_checkpoint(self) -> dict[str, Tensor]:
        """With adapters: these and the row of `<|EMB|>`; the frozen weights are at `config.path`."""
        state = super().state_for_checkpoint()
        return {k: v for k, v in state.items() if lora.MARK in k or k == "emb"} if self.config.lora_rank else state

    def save(self, folder: Path) -> list[str]:
        """A folder that this project, transformers and sentence-transformers open; adapters are merged into the weights."""
        folder.mkdir(parents=True, exist_ok=True)
        before = set(folder.iterdir())
        state = lora.merged_state(self.model)
        state[EMBEDDINGS] = state[EMBEDDINGS].clone()
        state[EMBEDDINGS][self.turns.emb] = self.emb.detach().to(state[EMBEDDINGS].dtype)
        self.model.save_pretrained(folder, state_dict={name: value.contiguous() for name, value in state.items()})
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        told = json.loads((folder / "config.json").read_text())
        told[OURS] = self.config.model_copy(update={"lora_rank": 0}).model_dump()
        (folder / "config.json").write_text(json.dumps(told, indent=2))
        write_for_others(folder, self.dim)
        written = set(folder.iterdir()) - before | {folder / "config.json"}
        return sorted(str(p.relative_to(folder)) for top in written for p in ([top] if top.is_file() else top.rglob("*")) if p.is_file())

    @classmethod
    def build(cls, config: Qwen3VLConfig) -> "Qwen3VL":
        """The pretrained model at `config.path`. ValueError where there is none of the family."""
        return cls(config, *_open(config.path, config))

    @classmethod
    def load(cls, folder: Path) -> "Qwen3VL":
        """What `save` wrote: the same vectors to the last bit."""
        config = Qwen3VLConfig(**json.loads((folder / "config.json").read_text())[OURS])
        return cls(config, *_open(str(folder), config))


def _open(place: str, config: Qwen3VLConfig) -> tuple[Any, Any, Any]:
    """Model, tokenizer and image processor from a folder or a hub name."""
    from transformers import AutoConfig, AutoModel, AutoTokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    try:
        kind = AutoConfig.from_pretrained(place).model_type
        if kind != "qwen3_vl":
            raise ValueError(f"the model at {place} is a {kind}; the qwen3-vl backbone takes qwen3_vl")
        model = AutoModel.from_pretrained(place, dtype=DTYPES[config.dtype], attn_implementation="sdpa")
        tokenizer = AutoTokenizer.from_pretrained(place)
        pictures = Qwen2VLImageProcessorPil.from_pretrained(place)
    except OSError as error:
        raise ValueError(f"no Qwen3-VL model at {place!r}: neither a folder of one nor a hub name that can be reached ({error})") from error
    vision = model.config.vision_config
    if (vision.patch_size * vision.spatial_merge_size, pictures.patch_size, pictures.merge_size) != (CELL, 16, 2):
        raise ValueError(f"the model at {place} does not see {CELL} x {CELL} pixels a token, as this backbone expects")
    tokenizer.chat_template = TEMPLATE
    tokenizer.padding_side = "right"
    _no_closing_token(tokenizer)
    return model, tokenizer, pictures


def _no_closing_token(tokenizer: Any) -> None:
    """The family's embedders end every text by <|endoftext|>; behind `<|EMB|>` it would be what others pool at."""
    from tokenizers.processors import ByteLevel

    tokenizer.backend_tokenizer.post_processor = ByteLevel(trim_offsets=False)


def _add_token(model: Any, tokenizer: Any) -> Tensor:
    """The embedding row of `<|EMB|>`, which is added, with room in the matrix, if the tokenizer does not know it."""
    from tokenizers import AddedToken

    new = EMB not in tokenizer.get_vocab()
    if new:
        tokenizer.add_tokens([AddedToken(EMB, special=True, normalized=False)], special_tokens=True)
    at = tokenizer.convert_tokens_to_ids(EMB)
    if at >= model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = model.get_input_embeddings().weight.detach()
    if new:
        rows[at] = rows[tokenizer.convert_tokens_to_ids(STARTS_AS)]
    return rows[at]
