"""The backbones behind one interface (`train.backbones.base.Backbone`), chosen by the `backbone` of their configuration."""

import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import Discriminator, Tag
from safetensors.torch import load_file

from train.backbones.base import Backbone
from train.backbones.compact import Compact, CompactConfig
from train.backbones.qwen3vl import OURS, Qwen3VL, Qwen3VLConfig


def _kind(told: Any) -> str:
    return told.get("backbone", "compact") if isinstance(told, dict) else told.backbone


BackboneConfig = Annotated[
    Annotated[CompactConfig, Tag("compact")] | Annotated[Qwen3VLConfig, Tag("qwen3-vl")],
    Discriminator(_kind),
]
"""A field of this type takes the table of either backbone; compact where `backbone` is missing."""


def build(config: BackboneConfig) -> Backbone:
    """Where training starts: compact with fresh weights, qwen3-vl with the pretrained ones at `config.path`."""
    return Qwen3VL.build(config) if isinstance(config, Qwen3VLConfig) else Compact(config)


def load(folder: Path) -> Backbone:
    """What `Backbone.save` wrote into `folder`. ValueError where it is not one of ours."""
    told = _told(folder)
    return Qwen3VL.load(folder) if OURS in told else Compact.load(folder)


def untrained(folder: Path) -> Backbone:
    """The backbone of `load(folder)` with the weights it started from: kept beside it (compact), or the model it was tuned from.

    ValueError where these are no longer there.
    """
    told = _told(folder)
    if OURS in told:
        return Qwen3VL.build(Qwen3VLConfig(**told[OURS]))
    weights = folder / "untrained.safetensors"
    if not weights.exists():
        raise ValueError(f"the embedder in {folder} was kept without the weights it started from ({weights.name})")
    model = Compact(CompactConfig(**told))
    model.load_state_dict(load_file(weights))
    return model


def _told(folder: Path) -> dict[str, Any]:
    try:
        told = json.loads((folder / "config.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"no backbone in {folder}: its config.json cannot be read ({error})") from error
    if not isinstance(told, dict):
        raise ValueError(f"no backbone in {folder}: its config.json holds no table")
    return told
