"""The benchmark of the qwen3-vl backbone runs on a tiny model, and counts FLOPs as torch's own counter does."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import qwen as bench
from benchmarks.tools import qwen_flops, qwen_model


def test_flops_are_those_that_torch_counts() -> None:
    net = bench.model("tiny", torch.device("cpu"), bench.Case("none", 3), 4).float()
    step = bench.step_of(net, bench.Case("none", 3), torch.device("cpu"))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the CPU's fused attention
        step()
    config = net.model.config
    tokens = len(net.turns.before) + len(net.turns.words([bench.TITLE])[0]) + len(net.turns.after_with_image)
    ours = 3 * qwen_flops.of_item(config, tokens=tokens, image_tokens=4, train="none")
    text = config.text_config
    unseen = 3 * 2 * tokens**2 * text.num_hidden_layers * text.num_attention_heads * text.head_dim  # the counter knows no causal half
    assert ours + unseen == pytest.approx(counter.get_total_flops(), rel=1e-3)  # some versions multiply for rotary angles


def test_the_template_has_few_tokens_as_by_the_familys_own_tokenizer() -> None:
    net = bench.model("tiny", torch.device("cpu"), bench.Case("none", 3), 4)
    assert net.tokenizer.convert_ids_to_tokens(net.turns.before) == (
        ["<|im_start|>", "system", "Ċ", "Represent", "Ġthe", "Ġuser", "'s", "Ġinput", ".", "<|im_end|>", "Ċ", "<|im_start|>", "user", "Ċ"]
    )
    assert net.tokenizer.convert_ids_to_tokens(net.turns.after) == ["<|im_end|>", "Ċ", "<|im_start|>", "assistant", "Ċ", "<|EMB|>"]
    assert all(p.dtype == torch.bfloat16 for p in net.model.parameters())


def test_published_sizes_give_the_published_parameters() -> None:
    from transformers import Qwen3VLModel

    with torch.device("meta"):
        made = Qwen3VLModel(qwen_model.architecture("2b", qwen_model.tokenizer()))
    assert sum(p.numel() for p in made.parameters()) == pytest.approx(2.13e9, rel=0.005)  # Qwen3-VL-2B's model card: 2.13 B


def test_a_tiny_run_measures_every_case(tmp_path: Path) -> None:
    out = tmp_path / "figures.json"
    done = subprocess.run([sys.executable, "-m", bench.JOB, "--tiny", "--out", str(out)], capture_output=True, text=True, check=True)
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["ok"]
    assert json.loads(out.read_text())["figures"] == said["figures"]
    assert len(said["cases"]) == 10
    assert all(case["images_per_s"] > 0 for case in said["figures"].values())
    assert said["figures"][bench.TWIN]["largest_difference"] < 0.05
    assert said["figures"][bench.TWIN]["largest_difference_alone"] < 0.05
