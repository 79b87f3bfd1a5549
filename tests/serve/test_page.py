"""The page in a real browser, over the gateway in this process; skipped where no Chromium is installed."""

import base64
import hashlib
import json
import re
import shutil
import subprocess
import time
from pathlib import Path

import httpx
import pytest
import websockets.sync.client
from fastapi.testclient import TestClient

from serve.api import create_gateway
from serve.flow import PartError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"),
    *("--disable-component-update", "--disable-sync", "--window-size=1200,1000"),
]
UNTIL_IDLE = "--virtual-time-budget=8000"
in_browser = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")


@pytest.fixture
def address(backend, listening) -> str:
    return listening(create_gateway(backend, depth=3))


def browse(url: str, folder: Path, *arguments: str) -> str:
    command = [str(CHROMIUM), *FLAGS, UNTIL_IDLE, f"--user-data-dir={folder / 'profile'}", *arguments, url]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def test_the_page_is_allowed_its_own_code_and_nothing_from_elsewhere(backend):
    reply = TestClient(create_gateway(backend)).get("/")
    policy = reply.headers["content-security-policy"]
    assert "unsafe" not in policy
    assert policy.startswith("default-src 'none'")
    for tag in ("style", "script"):
        body = re.search(rf"<{tag}>(.*?)</{tag}>", reply.text, re.DOTALL)
        assert body
        assert base64.b64encode(hashlib.sha256(body[1].encode()).digest()).decode() in policy
    assert "http:" not in reply.text
    assert "https:" not in reply.text
    assert reply.headers["x-content-type-options"] == "nosniff"


@in_browser
def test_a_search_shows_pictures_scores_and_what_reranking_moved(address, tmp_path):
    dom = browse(f"{address}/?q=red", tmp_path, "--dump-dom")
    assert dom.count('<div class="title">') == 5
    assert "5 products, best first." in dom
    assert "▲ 2 by reranking" in dom
    assert "▼ 2 by reranking" in dom
    assert "75.0 %" in dom
    assert "&lt;b&gt;" in dom, "a title is text, never markup"
    assert "<span>no picture</span>" not in dom
    assert re.search(r"<li>rerank \d+ ms</li>", dom)
    assert "release test-release" in dom


@in_browser
def test_a_chosen_photo_is_searched_with(address, backend, colour_shop, tmp_path):
    photo = tmp_path / "mine.png"
    photo.write_bytes(colour_shop.pictures["blue/1"])
    command = [str(CHROMIUM), *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", "--remote-debugging-port=0", address]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as browser:
        try:
            with websockets.sync.client.connect(_page_socket(tmp_path / "profile", address)) as page:
                ready = "document.readyState === 'complete' && document.getElementById('file') !== null"
                _until(lambda: _tell(page, "Runtime.evaluate", expression=ready)["result"]["value"])
                file = _tell(page, "Runtime.evaluate", expression="document.getElementById('file')")["result"]["objectId"]
                _tell(page, "DOM.setFileInputFiles", objectId=file, files=[str(photo)])
                shown = _until(lambda: _tell(page, "Runtime.evaluate", expression="results.innerText")["result"]["value"])
        finally:
            browser.terminate()
    assert backend.asked[0][0].image == photo.read_bytes()
    assert "a blue thing" in shown


def _page_socket(profile: Path, address: str) -> str:
    """The debugger's address of the one page, once the browser has opened it."""
    port = int(_until(lambda: (profile / "DevToolsActivePort").exists() and (profile / "DevToolsActivePort").read_text().split()[0]))

    def found():
        pages = httpx.get(f"http://127.0.0.1:{port}/json/list").json()
        return next((page["webSocketDebuggerUrl"] for page in pages if page["url"].startswith(address)), None)

    return _until(found)


def _tell(page, method: str, **parameters):
    page.send(json.dumps({"id": 1, "method": method, "params": parameters}))
    while True:
        reply = json.loads(page.recv(timeout=30))
        if reply.get("id") == 1:
            return reply["result"]


def _until(found, seconds: float = 60):
    end = time.monotonic() + seconds
    while not (value := found()):
        assert time.monotonic() < end, f"nothing within {seconds} s"
        time.sleep(0.1)
    return value


@in_browser
def test_an_error_is_shown_in_words(address, backend, tmp_path):
    backend.fault = PartError("no shard answered; asked were shard-0, shard-1")
    dom = browse(f"{address}/?q=red", tmp_path, "--dump-dom")
    assert "no shard answered" in dom
    assert 'class="bad"' in dom
    assert '<div class="title">' not in dom


@in_browser
def test_the_page_can_be_pictured(address, tmp_path):
    picture = tmp_path / "page.png"
    browse(f"{address}/?q=red", tmp_path, f"--screenshot={picture}")
    assert picture.stat().st_size > 10_000
