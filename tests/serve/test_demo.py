"""The demo's plan, its guards, and its children, without Ray: no process may outlive it."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from idem import config
from idem.memory import MemoryWatch, tree_mb
from serve import demo
from serve.children import Child, JobFailed

ROAD = [
    "pipelines.catalog",
    "pipelines.ingest",
    "train.run",
    "index.run",
    "index.candidates",
    "train.rerank_run",
    "index.release",
    "serve.run",
    "serve.measure",
    "serve.report",
]
ENDPOINT = demo.Endpoint(root="r", host="0.0.0.0", port=8123)


@pytest.fixture
def jobs(tmp_path):
    """Writes modules that stand for jobs; the environment in which `python -m` finds them."""

    def write(**bodies):
        for name, body in bodies.items():
            (tmp_path / f"{name}.py").write_text(textwrap.dedent(body))
        return {**os.environ, "PYTHONPATH": str(tmp_path)}

    return write


def gone(pid, seconds=5.0):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_the_road_in_its_order_and_a_catalogue_of_ones_own_is_not_drawn(tmp_path):
    assert [stage.job for stage in demo.plan(catalog=None, endpoint=ENDPOINT)] == ROAD
    own = demo.plan(catalog=str(tmp_path / 'odd "name".parquet'), endpoint=ENDPOINT)
    assert [stage.job for stage in own] == ROAD[1:]
    assert [stage.job for stage in own if stage.background] == ["serve.run"]


def test_settings_reach_the_tables_of_the_run_file(tmp_path):
    (tmp_path / "run.toml").write_text('root = "r"\n')
    source = str(tmp_path / 'odd "name".parquet')
    settings = [setting for stage in demo.plan(catalog=source, endpoint=ENDPOINT) for setting in stage.settings]

    class Ingest(config.Table):
        source: str

    class Evaluate(config.Table):
        url: str

    assert config.load(str(tmp_path / "run.toml"), "ingest", Ingest, settings).source == source
    assert config.load(str(tmp_path / "run.toml"), "evaluate", Evaluate, settings).url == "http://127.0.0.1:8123"


def test_a_port_in_use_and_a_catalogue_without_parquet_are_said_at_once(tmp_path):
    (tmp_path / "run.toml").write_text(f'root = "{tmp_path}"\n')
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=rf"cannot listen on port {port} of 127.0.0.1 \(Address already in use\); .*serve\.port="):
            demo.require_port("127.0.0.1", port)
        assert demo.main([str(tmp_path / "run.toml"), "--port", str(port)]) == 2
    demo.require_port("127.0.0.1", port)
    with pytest.raises(ValueError, match="there is no parquet"):
        demo.require_catalog(str(tmp_path))


def test_too_little_disk_is_said_before_anything_starts(tmp_path, monkeypatch, capsys):
    (tmp_path / "run.toml").write_text(f'root = "{tmp_path / "root"}"\n')
    monkeypatch.setattr(demo, "NEEDED_BYTES", 1 << 60)
    monkeypatch.setattr(demo, "require_port", lambda host, port: None)
    assert demo.main([str(tmp_path / "run.toml")]) == 2
    assert "too little disk" in capsys.readouterr().err


def test_a_job_is_heard_out_and_its_failure_keeps_code_and_sentence(jobs):
    env = jobs(
        good="""
            print("chatter")
            print('{"job": "good", "ok": true, "made": 3}')
        """,
        bad="""
            import sys
            print('{"job": "bad", "ok": false, "error": "column image is missing"}')
            sys.exit(2)
        """,
        silent="import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
    )
    assert Child("good", [], env).result()["made"] == 3
    with pytest.raises(JobFailed, match="bad failed: column image is missing") as caught:
        Child("bad", [], env).result()
    assert caught.value.code == 2
    with pytest.raises(JobFailed, match="exit code 137") as caught:
        Child("silent", [], env).result()
    assert caught.value.code == 137


STUBBORN = """
    import signal, subprocess, sys, time
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    below = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    print('{"below": %d}' % below.pid, flush=True)
    time.sleep(600)
"""


def test_a_child_that_will_not_end_is_made_to_with_all_below_it(jobs, monkeypatch):
    monkeypatch.setattr("serve.children.PATIENCE_S", 0.2)
    child = Child("stubborn", [], jobs(stubborn=STUBBORN))
    until = time.monotonic() + 20
    while not child.figures and time.monotonic() < until:
        time.sleep(0.05)
    below = child.figures["below"]
    child.stop()
    child.stop()
    assert gone(child.pid)
    assert gone(below)


def test_stages_are_noted_and_a_failing_one_stops_the_road(jobs, tmp_path):
    env = jobs(
        first="""print('{"ok": true, "skipped": true}')""",
        second="""
            import sys
            print('{"ok": false, "error": "no"}')
            sys.exit(1)
        """,
    )
    with MemoryWatch(0.05) as watch:
        road = demo.Road("run.toml", str(tmp_path), [], env, watch)
        todo = [demo.Stage(job=job, title=job) for job in ("first", "second", "never")]
        with pytest.raises(JobFailed, match="second failed: no"):
            demo.travel(road, todo, ENDPOINT)
    assert [(stage.job, stage.skipped) for stage in road.noted().stages] == [("first", True)]
    assert road.noted().peak_mb > 1


def test_a_port_that_was_taken_meanwhile_is_said_before_the_service_starts(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as taken, MemoryWatch() as watch:
        road = demo.Road("run.toml", str(tmp_path), [], {}, watch)
        endpoint = demo.Endpoint(root="r", port=taken.getsockname()[1])
        with pytest.raises(ValueError, match="cannot listen"):
            demo.travel(road, [demo.Stage(job="service", title="Start", background=True)], endpoint)
    assert not road.children


@pytest.mark.parametrize(("host", "url"), [("::1", "http://[::1]:80"), ("::", "http://[::1]:80"), ("here", "http://here:80")])
def test_the_address_of_the_service(host, url):
    assert demo.Endpoint(root="r", host=host, port=80).url == url


def test_a_service_that_ends_before_it_is_ready_is_told_in_its_own_words(jobs):
    env = jobs(service="""import sys; print('{"ok": false, "error": "no release"}'); sys.exit(2)""")
    with pytest.raises(JobFailed, match="service failed: no release"):
        demo.wait_ready("http://127.0.0.1:9", Child("service", [], env))


def test_memory_of_the_tree_counts_a_child():
    before = tree_mb()
    body = "import time; held = bytearray(256 << 20); print('up', flush=True); time.sleep(60)"
    child = subprocess.Popen([sys.executable, "-c", body], stdout=subprocess.PIPE)
    try:
        child.stdout.readline()
        assert tree_mb() > before + 192  # what others on this machine map with us moves our share by some tens
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
