"""Qwen3-VL checkpoints with random weights in the family's own format, of any size: the real architecture, no download.

The tokenizer is the family's byte-level one (its splitting rule, its special tokens, its closing <|endoftext|>) with few words.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, Qwen3VLConfig

SPECIAL = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
WORDS = ("system", "Ġuser", "user", "assistant", "Represent", "Ġthe", "'s", "Ġinput", "Ġred", "red", "Ġmug", "Ġml")
"""Those of the chat template and of a title, so that these have about as many tokens as by the family's own merges."""
SIZES: dict[str, dict[str, dict[str, Any]]] = {
    # as published for Qwen3-VL-2B and Qwen3-VL-Embedding-2B
    "2b": {
        "text": {
            "vocab_size": 151_936,
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 262_144,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5_000_000, "mrope_interleaved": True, "mrope_section": [24, 20, 20]},
        },
        "vision": {
            "depth": 24,
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_heads": 16,
            "out_hidden_size": 2048,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [5, 11, 17],
        },
    },
    "tiny": {
        "text": {
            "vocab_size": 384,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 1024,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000, "mrope_interleaved": True, "mrope_section": [4, 2, 2]},
        },
        "vision": {
            "depth": 3,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0, 1],
        },
    },
}


def tokenizer() -> "PreTrainedTokenizerBase":
    """Bytes, WORDS, the special tokens; like the embedding models' own, it ends a text by itself."""
    from transformers import Qwen2Tokenizer

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(dict.fromkeys((word[:i], word[i]) for word in WORDS for i in range(1, len(word))))
    parts = [*letters, *dict.fromkeys("".join(pair) for pair in merges)]
    made = Tokenizer(models.BPE(vocab={part: i for i, part in enumerate(parts)}, merges=merges))
    made.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(SPLIT), behavior="isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    end = SPECIAL[0]
    made.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, made.token_to_id(end))])
    return Qwen2Tokenizer(tokenizer_object=made, eos_token="<|im_end|>", pad_token=end)


def architecture(size: str, words: "PreTrainedTokenizerBase", *, vocabulary: int | None = None) -> "Qwen3VLConfig":
    """The configuration of one of SIZES, with the special tokens where the tokenizer has them."""
    from transformers import Qwen3VLConfig

    def at(token: str) -> int:
        return int(words.convert_tokens_to_ids(token))  # pyright: ignore[reportArgumentType]

    return Qwen3VLConfig(
        text_config={**SIZES[size]["text"], **({"vocab_size": vocabulary} if vocabulary else {})},
        vision_config=SIZES[size]["vision"],
        image_token_id=at("<|image_pad|>"),
        video_token_id=at("<|video_pad|>"),
        vision_start_token_id=at("<|vision_start|>"),
        vision_end_token_id=at("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def picture_settings() -> dict[str, Any]:
    """What the family's preprocessor_config.json says."""
    return {
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "patch_size": 16,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "size": {"longest_edge": 16_777_216, "shortest_edge": 65_536},
    }


def write(folder: Path, size: str = "tiny", *, seed: int = 0, vocabulary: int | None = None) -> Path:
    """A checkpoint of Qwen3VLForConditionalGeneration with random weights: what a hub name or a local folder of the family holds."""
    from transformers import Qwen3VLForConditionalGeneration

    words = tokenizer()
    config = architecture(size, words, vocabulary=vocabulary)
    torch.manual_seed(seed)
    Qwen3VLForConditionalGeneration(config).save_pretrained(folder)
    words.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(picture_settings()))
    video = {**picture_settings(), "video_processor_type": "Qwen3VLVideoProcessor"}
    del video["image_processor_type"]
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video))
    return folder
