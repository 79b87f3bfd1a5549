"""What a saved embedder carries for others: the files of sentence-transformers, and a model card with measured figures."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODULES = (
    ("", "sentence_transformers.models.Transformer"),
    ("1_Pooling", "sentence_transformers.models.Pooling"),
    ("2_Normalize", "sentence_transformers.models.Normalize"),
)


VIDEO = ("patch_size", "temporal_patch_size", "merge_size", "image_mean", "image_std", "size")


def write_for_others(folder: Path, dim: int) -> None:
    """Files by which sentence-transformers opens `folder` as it is: chat template, last token (`<|EMB|>`), L2 norm.

    transformers' whole processor asks for settings of videos too; these are the pictures' own.
    """
    pictures = json.loads((folder / "preprocessor_config.json").read_text())
    videos = {"video_processor_type": "Qwen3VLVideoProcessor", **{key: pictures[key] for key in VIDEO}}
    listed = [{"idx": i, "name": str(i), "path": path, "type": kind} for i, (path, kind) in enumerate(MODULES)]
    last = {"method": "forward", "method_output_name": "last_hidden_state"}
    reads = {"text": last, "image": last, "message": {**last, "format": "structured"}}
    pooling = {"word_embedding_dimension": dim, "pooling_mode_lasttoken": True, "pooling_mode_mean_tokens": False, "include_prompt": True}
    files: dict[str, Any] = {
        "modules.json": listed,
        "sentence_bert_config.json": {
            "transformer_task": "feature-extraction",
            "modality_config": reads,
            "module_output_name": "token_embeddings",
        },
        "config_sentence_transformers.json": {"prompts": {}, "default_prompt_name": None, "similarity_fn_name": "cosine"},
        "1_Pooling/config.json": pooling,
        "video_preprocessor_config.json": videos,
    }
    for name, told in files.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(told, indent=2))


def model_card(figures: Mapping[str, Any], config: Mapping[str, Any]) -> str:
    """README.md of a finished embedder: what it is, how it is opened, what was measured (`figures` by name), how it was made (`config`).

    Figures that are tables of their own become one row an entry; `config` is the backbone's, as `model_dump` gives it.
    """
    kind = config.get("backbone", "compact")
    base = f"base_model: {config['path']}\n" if kind == "qwen3-vl" and not config["path"].startswith((".", "/", "~")) else ""
    library = "sentence-transformers" if kind == "qwen3-vl" else "idem"
    head = (
        f"---\nlicense: apache-2.0\nlibrary_name: {library}\npipeline_tag: sentence-similarity\n{base}tags: [product-search, idem]\n---\n"
    )
    opened = 'Embedder.load(".").encode(images, texts, dim=...)' if kind == "compact" else 'Embedder.load(".") or SentenceTransformer(".")'
    rows = "\n".join(f"| {name} | {value} |" for name, value in _flat(figures)) or "| nothing was measured | |"
    made = "\n".join(f"| {name} | {value} |" for name, value in _flat(config))
    return (
        f"{head}# Idem embedder ({kind})\n\n"
        "Pictures and texts of products to one space, where the very same product is nearest. Vectors are L2-normalised and may be cut "
        f"to a prefix and normalised again.\n\nOpen with `{opened}`.\n\n"
        f"## Measured\n| what | figure |\n|---|---|\n{rows}\n\n## Made with\n| setting | value |\n|---|---|\n{made}\n"
    )


def _flat(told: Mapping[str, Any], above: str = "") -> list[tuple[str, Any]]:
    """Entries of nested tables, named by their path."""
    found: list[tuple[str, Any]] = []
    for name, value in told.items():
        path = f"{above}.{name}" if above else str(name)
        found += _flat(value, path) if isinstance(value, Mapping) else [(path, str(value).replace("|", "\\|"))]
    return found
