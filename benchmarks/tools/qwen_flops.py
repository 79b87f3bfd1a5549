"""Floating-point operations of one item through Qwen3-VL, by the sizes in its configuration.

A matrix of m x n costs 2 m n a token; attention 4 s d a token, layer and s tokens it sees, half of that where it is causal.
Backward costs the forward's once for what flows back and once for the weights (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
"""

from typing import Any

TIMES = {"none": (1, 1), "lora": (1, 2), "full": (3, 3)}
"""How often the forward's cost counts, in the tower and in the language model: adapters there leave the tower without backward,
and the frozen weights without their half of it."""


def tower(config: Any, image_tokens: int) -> float:
    """One picture through the vision tower, its mergers included."""
    merge = config.spatial_merge_size**2
    patches, width = image_tokens * merge, config.hidden_size
    cut = 2 * patches * 3 * config.temporal_patch_size * config.patch_size**2 * width
    layer = 2 * (4 * width * width + 2 * width * config.intermediate_size) + 4 * patches * width
    merger = 2 * (merge * width * merge * width + merge * width * config.out_hidden_size)
    return cut + patches * config.depth * layer + image_tokens * merger * (1 + len(config.deepstack_visual_indexes))


def language(config: Any, tokens: int) -> float:
    """`tokens` through the language model, without the vocabulary's head, which an embedder has not."""
    width, heads = config.hidden_size, config.num_attention_heads * config.head_dim
    values = config.num_key_value_heads * config.head_dim
    weights = 2 * width * heads + 2 * width * values + 3 * width * config.intermediate_size
    return tokens * config.num_hidden_layers * (2 * weights + 2 * tokens * heads)


def of_item(config: Any, *, tokens: int, image_tokens: int, train: str) -> float:
    """FLOPs of an item with a picture; `train` is none (encoding), lora or full."""
    seen, read = TIMES[train]
    return seen * tower(config.vision_config, image_tokens) + read * language(config.text_config, tokens)
