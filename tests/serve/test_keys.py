import json
import logging
import re
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from hypothesis import given
from hypothesis import strategies as st

from serve import keys as module
from serve.api import create_gateway
from serve.intake import ApiError
from serve.keys import SCOPES, Forbidden, Keys, Unauthorized, main, new
from serve.quota import DAY_S, Allowance, Meter, TooMany

NOON = 20_000 * DAY_S + DAY_S / 2


class Clock:
    def __init__(self) -> None:
        self.at = NOON

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def file(tmp_path) -> str:
    return str(tmp_path / "keys.json")


def make(file: str, *scopes: str, **fields) -> str:
    """The header of a new key in `file`."""
    return "Bearer " + new(file, {"scopes": scopes or ("search",), **fields})["key"]


def refused(keys: Keys, header: str | None, scope: str = "search") -> ApiError:
    with pytest.raises(ApiError) as caught:
        keys.admit(header, scope)
    return caught.value


def rewrite(file: str, change) -> None:
    entries = json.loads(Path(file).read_text())
    Path(file).write_text(json.dumps(change(entries)))


def test_without_a_file_everybody_may_do_everything():
    for header in (None, "", "Bearer nonsense"):
        admitted = Keys().admit(header, "admin")
        assert (admitted.key_id, admitted.tenant, admitted.scopes) == ("", "default", frozenset(SCOPES))


def test_the_command_prints_the_key_once_and_keeps_its_hash(file, capfd, clock):
    assert main(["new", "--scopes", "search", "write", "--tenant", "shop-1", "--file", file, "--id", "feed", "--rate", "2.5"]) == 0
    out, err = capfd.readouterr()
    told = json.loads(out.splitlines()[-1])
    assert told["ok"]
    assert (told["job"], told["id"], told["tenant"], told["rate"], told["keys"]) == ("serve.keys", "feed", "shop-1", 2.5, 1)
    assert re.fullmatch(r"idem_feed_[\w-]{43}", told["key"])
    secret = told["key"].removeprefix("idem_feed_")
    assert out.count(secret) == 1
    assert secret not in err + Path(file).read_text()
    assert set(json.loads(Path(file).read_text())[0]) == {"id", "sha256", "scopes", "tenant", "rate", "burst", "daily"}
    assert stat.S_IMODE(Path(file).stat().st_mode) == 0o600
    admitted = Keys(file, now=clock).admit(f"Bearer {told['key']}", "write")
    assert (admitted.key_id, admitted.tenant, admitted.scopes) == ("feed", "shop-1", {"search", "write"})


def test_keys_made_at_once_are_all_kept_and_nothing_else_is_left(file, clock):
    with ThreadPoolExecutor(8) as pool:
        headers = list(pool.map(lambda _: make(file), range(16)))
    keys = Keys(file, now=clock)
    assert len({keys.admit(header, "search").key_id for header in headers}) == 16
    assert [path.name for path in Path(file).parent.iterdir()] == ["keys.json"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--id", "feed"], "already"),
        (["--id", "a_b"], "--id"),
        (["--tenant", "../other"], "--tenant"),
        (["--rate", "0"], "--rate"),
        (["--rate", "nan"], "--rate"),
        (["--burst", "1.5"], "--burst"),
        (["--daily", "0"], "--daily"),
    ],
)
def test_the_command_refuses_what_is_no_key(file, capfd, arguments, said):
    make(file, id="feed")
    before = Path(file).read_bytes()
    assert main(["new", "--scopes", "search", "--file", file, *arguments]) == 2
    told = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert not told["ok"]
    assert said in told["error"]
    assert Path(file).read_bytes() == before


def test_the_command_leaves_a_broken_file_alone(file, capfd):
    Path(file).write_text("[{")
    assert main(["new", "--scopes", "search", "--file", file]) == 2
    assert "not valid JSON" in capfd.readouterr().out
    assert Path(file).read_text() == "[{"


def test_a_file_that_cannot_be_replaced_stays_and_no_piece_is_left(file, monkeypatch):
    make(file, id="feed")
    before = Path(file).read_bytes()

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        make(file)
    assert Path(file).read_bytes() == before
    assert [path.name for path in Path(file).parent.iterdir()] == ["keys.json"]


SECRET = "x" * 43


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "cannot be read"),
        ("", "not valid JSON"),
        ("[]", "has no key"),
        ('{"id": "a"}', "list"),
        ("[1]", "0"),
        ("[" * 100_000, "key file"),
        (json.dumps([{"id": "a", "sha256": SECRET, "scopes": ["search"]}]), "sha256"),
        (json.dumps([{"id": "a", "sha256": "0" * 64, "scopes": []}]), "scopes"),
        (json.dumps([{"id": "a", "sha256": "0" * 64, "scopes": ["root"]}]), "'search', 'write' or 'admin'"),
        (json.dumps([{"id": "a", "sha256": "0" * 64, "scopes": ["search"], "key": SECRET}]), "key"),
        (json.dumps([{"id": "a", "sha256": "0" * 64, "scopes": ["search"], "tenant": "../b"}]), "tenant"),
        (json.dumps([{"id": "a", "sha256": "0" * 64, "scopes": ["search"], "rate": 0}]), "rate"),
        (json.dumps([{"id": "a", "sha256": "0" * 64, "scopes": ["search"]}] * 2), "twice"),
    ],
)
def test_a_start_with_a_file_that_is_none_says_what_to_do(file, text, said):
    if text is not None:
        Path(file).write_text(text)
    with pytest.raises(ValueError, match="key file") as caught:
        Keys(file)
    assert said in str(caught.value)
    assert file in str(caught.value)
    assert SECRET not in str(caught.value)
    if text in (None, "", "[]"):
        assert "python -m serve.keys new" in str(caught.value)


def test_who_is_not_known_is_told_the_same_whatever_is_wrong(file, clock):
    header = make(file, id="feed")
    keys = Keys(file, now=clock)
    assert keys.admit(header.replace("Bearer ", "bearer   "), "search").key_id == "feed"
    secret = header.removeprefix("Bearer idem_feed_")
    wrong = [
        *(f"Bearer idem_feed_{secret[:-1]}", f"Bearer idem_feed_{secret}x", f"Bearer idem_other_{secret}", f"Bearer other_feed_{secret}"),
        *(
            f"Basic idem_feed_{secret}",
            f"idem_feed_{secret}",
            f"Bearer {secret}",
            "Bearer",
            "Bearer ",
            "Bearer _",
            "Bearer __",
            "Bearer idem_",
        ),
        *("Bearer idem_feed_", "Bearer idem_feed", "Bearer \xff\u20ac\udcff", "Bearer " + "a" * 100_000, header + " " * 300, "B" * 9),
    ]
    for header in wrong:
        error = refused(keys, header)
        assert isinstance(error, Unauthorized)
        assert (error.status, error.code, error.headers) == (401, "key_unknown", {"WWW-Authenticate": "Bearer"})
        assert secret not in str(error)
    assert len({str(refused(keys, header)) for header in wrong}) == 1
    for header in (None, ""):
        error = refused(keys, header)
        assert (error.status, error.code, error.headers) == (401, "key_missing", {"WWW-Authenticate": "Bearer"})


def test_an_unknown_id_costs_the_same_hash_and_comparison(file, clock, monkeypatch):
    header = make(file, id="feed")
    keys = Keys(file, now=clock)
    compared = []
    compare = module.hmac.compare_digest
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: compared.append((len(a), len(b))) or compare(a, b))
    keys.admit(header, "search")
    for wrong in (header[:-1] + "!", "Bearer idem_nobody_secret", "Bearer nonsense"):
        refused(keys, wrong)
    assert compared == [(64, 64)] * 4


def test_the_hash_of_nobody_lets_nobody_in(file, clock, monkeypatch):
    make(file, id="feed")
    monkeypatch.setattr(module.hmac, "compare_digest", lambda a, b: True)
    assert refused(Keys(file, now=clock), "Bearer idem_nobody_secret").code == "key_unknown"


@pytest.mark.parametrize("scopes", [("search",), ("write",), ("admin",), ("search", "write"), SCOPES])
def test_scopes_are_apart_and_admin_has_all(file, clock, scopes):
    header = make(file, *scopes)
    keys = Keys(file, now=clock)
    allowed = set(SCOPES) if "admin" in scopes else set(scopes)
    for scope in SCOPES:
        if scope in allowed:
            assert keys.admit(header, scope).scopes == allowed
        else:
            error = refused(keys, header, scope)
            assert isinstance(error, Forbidden)
            assert (error.status, error.code) == (403, "scope_missing")
            assert scope in str(error)


def test_the_pace_is_kept_and_what_is_refused_is_not_counted(file, clock):
    header, other = make(file, id="feed", rate=0.5, burst=3, daily=5), make(file, id="other")
    keys = Keys(file, now=clock)
    for _ in range(3):
        keys.admit(header, "search")
    for _ in range(10):
        error = refused(keys, header)
        assert isinstance(error, TooMany)
        assert (error.status, error.code, error.headers) == (429, "rate_exceeded", {"Retry-After": "2"})
        assert refused(keys, header, "write").status == 403
    keys.admit(other, "search")
    clock.at += 0.5
    assert refused(keys, header).headers == {"Retry-After": "2"}  # 1.5 s, rounded up
    clock.at += 1.5
    keys.admit(header, "search")
    clock.at += 2
    keys.admit(header, "search")
    clock.at += 3600
    error = refused(keys, header)
    assert (error.status, error.code) == (429, "quota_exceeded")
    assert error.headers == {"Retry-After": str(DAY_S // 2 - 3604)}
    clock.at += DAY_S // 2 - 3604 - 1
    assert refused(keys, header).headers == {"Retry-After": "1"}
    clock.at += 1
    keys.admit(header, "search")


@given(
    st.floats(0.01, 50), st.integers(1, 5), st.integers(1, 30), st.lists(st.sampled_from((0.0, 0.001, 0.1, 1.0, 7.0, 90.0)), max_size=60)
)
def test_in_no_stretch_of_time_more_is_admitted_than_allowed(rate, burst, daily, gaps):
    allowance, now, taken = Allowance(rate=rate, burst=burst, daily=daily), NOON, []
    meter = Meter(allowance, now)
    for gap in gaps:
        now += gap
        if (wait := meter.spend(allowance, now)) is None:
            taken.append(now)
            continue
        assert wait.seconds >= 1
        assert meter.spend(allowance, now) == wait
        if wait.reason == "rate":
            later = Meter(allowance, now)
            later.tokens, later.used = meter.tokens, meter.used
            assert later.spend(allowance, now + wait.seconds) is None
    assert len(taken) <= daily
    for first, start in enumerate(taken):
        for last, end in enumerate(taken[first:], first):
            assert last - first + 1 <= burst + rate * (end - start) + 1e-3


def test_a_clock_that_is_set_back_neither_fills_nor_blocks():
    allowance = Allowance(rate=1, burst=2)
    meter = Meter(allowance, NOON)
    assert [meter.spend(allowance, NOON) for _ in range(2)] == [None, None]
    assert meter.spend(allowance, NOON - 5000)
    assert meter.spend(allowance, NOON - 4999) is None


def test_keys_come_and_go_without_a_restart(file, clock):
    first = make(file, id="first")
    keys = Keys(file, now=clock)
    keys.admit(first, "search")
    second = make(file, id="second")
    assert refused(keys, second).code == "key_unknown"  # not looked at again so soon
    clock.at += 1
    keys.admit(second, "search")
    assert set(keys.meters) == {"first", "second"}
    rewrite(file, lambda entries: entries[1:])
    clock.at += 1
    assert refused(keys, first).code == "key_unknown"
    assert set(keys.meters) == {"second"}
    rewrite(file, lambda entries: [])
    clock.at += 1
    assert refused(keys, second).code == "key_unknown"
    assert keys.meters == {}


def test_a_file_that_stays_the_same_is_read_once(file, clock, monkeypatch):
    header = make(file, id="feed")
    reads = []
    monkeypatch.setattr(module, "read", lambda path, read=module.read: reads.append(path) or read(path))
    keys = Keys(file, now=clock)
    make(file, id="other")
    for _ in range(5):
        clock.at += 1
        keys.admit(header, "search")
    assert len(reads) == 3  # at the start, by the command that made the other key, and once for the change


def test_changed_limits_hold_at_once_and_reading_again_refills_nothing(file, clock):
    header = make(file, id="feed", rate=0.001, burst=5)
    keys = Keys(file, now=clock)
    for _ in range(5):
        keys.admit(header, "search")
    rewrite(file, lambda entries: [{**entries[0], "burst": 50}])
    clock.at += 1
    assert refused(keys, header).code == "rate_exceeded"
    rewrite(file, lambda entries: [{**entries[0], "rate": 10}])
    clock.at += 1
    for _ in range(10):
        keys.admit(header, "search")
    assert refused(keys, header).code == "rate_exceeded"


@pytest.mark.parametrize("broken", ["", "[{", None])
def test_a_broken_file_keeps_the_keys_from_before_and_is_told_once(file, clock, caplog, broken):
    header = make(file, id="feed")
    good = Path(file).read_text()
    keys = Keys(file, now=clock)
    Path(file).unlink()
    if broken is not None:
        Path(file).write_text(broken)
    for _ in range(5):
        clock.at += 1
        keys.admit(header, "search")
    assert [record.levelno for record in caplog.records] == [logging.ERROR]
    assert "keeping the 1 keys from before" in caplog.text
    Path(file).write_text(good.replace('"feed"', '"other"'))
    clock.at += 1
    assert refused(keys, header).code == "key_unknown"


def test_a_disk_that_fails_once_does_not_hide_a_change(file, clock, monkeypatch):
    first, second = make(file, id="first"), make(file, id="second")
    keys = Keys(file, now=clock)
    rewrite(file, lambda entries: entries[1:])
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_text", lambda self: (_ for _ in ()).throw(OSError(5, "Input/output error")))
        clock.at += 1
        keys.admit(first, "search")
    clock.at += 1
    assert refused(keys, first).code == "key_unknown"
    keys.admit(second, "search")


def test_no_key_is_ever_logged(file, clock, caplog):
    caplog.set_level(logging.DEBUG)
    header = make(file, id="feed", burst=1)
    keys = Keys(file, now=clock)
    keys.admit(header, "search")
    refused(keys, header)
    refused(keys, header + "x")
    make(file, id="other")
    clock.at += 1
    keys.admit(header, "search")
    assert "has changed: 2 keys" in caplog.text
    assert header.removeprefix("Bearer idem_feed_") not in caplog.text


def test_state_is_bounded_by_the_number_of_keys(file, clock):
    header = make(file, id="feed")
    keys = Keys(file, now=clock)
    for number in range(100):
        refused(keys, f"Bearer idem_stranger{number}_secret")
        keys.admit(header, "search")
        clock.at += 1
    assert set(keys.meters) == {"feed"}


def test_the_gateway_answers_with_status_code_and_headers(file, clock, backend):
    header = make(file, id="feed", rate=0.1, burst=1)
    keys = Keys(file, now=clock)
    keys.admit(header, "search")
    client = TestClient(create_gateway(backend))
    for asked, scope, status, name, value in (
        (None, "search", 401, "WWW-Authenticate", "Bearer"),
        (header, "write", 403, "Content-Type", "application/json"),
        (header, "search", 429, "Retry-After", "10"),
    ):
        backend.fault = refused(keys, asked, scope)
        reply = client.post("/v1/search", json={"text": "red"})
        assert (reply.status_code, reply.headers[name]) == (status, value)
        assert reply.json()["error"]["code"] == backend.fault.code
