"""The whole road on a very small shop, as `make demo` walks it: the real engines, child processes and HTTP."""

import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SMALL = (
    "train.loop.minutes=0.2",
    "train.loop.batch=32",
    "rerank.minutes=0.15",
    "rerank.reader_minutes=0.1",
    "rerank.select_queries=40",
    "evaluate.max_queries=30",
    "evaluate.timed=10",
)

pytestmark = [pytest.mark.flow, pytest.mark.timeout(900)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(run: str, root: Path, *arguments: str, settings: tuple[str, ...] = ()) -> list[str]:
    said = (f'root="{root}"', *SMALL, *settings)
    options = [part for setting in said for part in ("--set", setting)]
    return [sys.executable, "-m", "serve.demo", run, *options, "--port", str(free_port()), *arguments]


def walk(run: str, root: Path, *arguments: str, settings: tuple[str, ...] = ()) -> tuple[dict, str]:
    """The demo's JSON line and what it said on standard error, without serving at the end."""
    done = subprocess.run(
        command(run, root, *arguments, "--no-serve", settings=settings),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=850,
        env={**os.environ},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.fixture(scope="module")
def walked(tmp_path_factory) -> tuple[Path, dict, str]:
    root = tmp_path_factory.mktemp("road") / "shop"
    return root, *walk("runs/demo.toml", root, settings=("catalog.products=100", "catalog.photos=3"))


def test_every_stage_leaves_what_it_promises(walked):
    root, said, _ = walked
    assert said["ok"]
    for stage in ("catalog", "embedder", "vectors", "index", "candidates", "reranker"):
        made = (root / stage / "CURRENT").read_text()
        assert (root / stage / made / "manifest.json").exists(), stage
    assert (root / "items" / "manifest.json").exists()
    assert (root / "releases" / "CURRENT").exists()
    assert len(list((root / "index").glob("*/shard-*.faiss"))) == 2
    report = (root / "report.html").read_text()
    assert "<img" in report
    assert not re.search(r"(src|href)=.?https?:", report), "the report needs the network"


def test_the_table_has_every_row_and_every_figure(walked):
    _, said, shown = walked
    assert len(said["measured"]) == 4
    for name, figures in said["measured"].items():
        assert {"R@1", "R@10", "I-HR@1", "I-HR@5", "nDCG@10", "sibling_R@1"} <= set(figures), name
        assert name in shown
    assert said["peak_mb"] > 100


def test_a_second_walk_finds_everything_done(walked):
    root, first, _ = walked
    again, shown = walk("runs/demo.toml", root, settings=("catalog.products=100", "catalog.photos=3"))
    assert shown.count("unchanged, skipped") >= 7
    trained = {"R@1": [m["R@1"] for m in first["measured"].values()]}
    assert trained == {"R@1": [m["R@1"] for m in again["measured"].values()]}


def test_own_records_with_bad_ones_among_them(tmp_path):
    """No id_split, no role, another name for the picture's column; one picture that is none, one empty record, one id twice."""
    rows = []
    for number in range(24):
        colour = np.random.default_rng(number).integers(40, 215, 3)
        for picture in range(3):
            noise = np.random.default_rng((number, picture)).integers(-30, 30, (40, 50, 3))
            out = io.BytesIO()
            Image.fromarray(np.clip(colour + noise, 0, 255).astype(np.uint8)).save(out, "JPEG")
            rows.append(
                {"image_id": f"{number}/{picture}", "product_id": f"p{number}", "photo": out.getvalue(), "title": f"thing {number}"}
            )
    bad = [
        {"image_id": "broken", "product_id": "p1", "photo": b"\xff\xd8\xff nothing", "title": "broken"},
        {"image_id": "empty", "product_id": "p1", "photo": None, "title": None},
        {"image_id": "0/0", "product_id": "p2", "photo": rows[0]["photo"], "title": "twice"},
    ]
    pq.write_table(pa.Table.from_pylist(rows + bad), tmp_path / "own.parquet")
    said, _ = walk(
        "runs/catalog.toml",
        tmp_path / "run",
        "--catalog",
        str(tmp_path / "own.parquet"),
        settings=(
            'ingest.columns.image="photo"',
            "ingest.unseen_fraction=0.4",
            "train.fractions=[0.5, 0.3, 0.2]",
            "rerank.least_queries=2",
        ),
    )
    made = json.loads((tmp_path / "run" / "items" / "manifest.json").read_text())["figures"]
    assert (made["rows"], made["committed"], made["rejected"]) == (75, 72, 3)
    assert {k: v for k, v in made["by_reason"].items() if v} == {"image_undecodable": 1, "empty_record": 1, "superseded": 1}
    assert said["ok"]


def test_ctrl_c_ends_everything(walked):
    """The demo serves until Ctrl-C; then its code is 0 or 130 and nothing that it started is left."""
    root, _, _ = walked
    asked = command("runs/demo.toml", root, settings=("catalog.products=100", "catalog.photos=3"))
    port = asked[asked.index("--port") + 1]
    child = subprocess.Popen(asked, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, start_new_session=True)
    try:
        until = time.monotonic() + 500
        while time.monotonic() < until and child.poll() is None:
            try:
                if httpx.get(f"http://127.0.0.1:{port}/readyz", timeout=2).status_code == 200:
                    break
            except httpx.HTTPError:
                time.sleep(0.5)
        assert child.poll() is None
        assert "<html" in httpx.get(f"http://127.0.0.1:{port}/", timeout=10).text
        family = psutil.Process(child.pid).children(recursive=True)
        assert family
        child.send_signal(signal.SIGINT)
        child.wait(120)
        assert child.returncode in (0, 130)
        _, alive = psutil.wait_procs(family, timeout=20)
        assert not alive, [p.cmdline()[:3] for p in alive]
    finally:
        if child.poll() is None:
            child.kill()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--catalog", "nowhere.parquet"), "there is no parquet"),
        (("--catalog", "{empty}"), "empty"),
        (("--catalog", "{columns}"), "product_id"),
        (("--catalog", "{garbage}"), "garbage.parquet"),
    ],
)
def test_a_catalogue_that_cannot_be_used_is_said_in_a_sentence(tmp_path, arguments, said):
    none = pa.schema([("image_id", pa.string()), ("product_id", pa.string()), ("image", pa.binary())]).empty_table()
    pq.write_table(none, tmp_path / "empty.parquet")
    pq.write_table(pa.table({"image_id": ["a"], "picture": [b"x"]}), tmp_path / "columns.parquet")
    (tmp_path / "garbage.parquet").write_bytes(b"not parquet at all")
    files = {name: str(tmp_path / f"{name}.parquet") for name in ("empty", "columns", "garbage")}
    filled = [a.format(**files) for a in arguments]
    done = subprocess.run(
        command("runs/catalog.toml", tmp_path / "run", *filled, "--no-serve"), cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 2
    line = json.loads(done.stdout.splitlines()[-1])
    assert not line["ok"]
    assert said in line["error"], line["error"]
    assert "Traceback" not in done.stderr
