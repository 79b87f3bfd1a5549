"""No test here leaves this machine: names are looked up by a table, and a connection to anything but a loopback port fails."""

import asyncio
import contextlib
import gzip
import ipaddress
import shutil
import socket
import ssl
import subprocess
import threading
from collections.abc import Callable, Sequence

import httpx
import pytest

from serve import fetch as module
from serve.errors import ApiError
from serve.fetch import Fetcher
from serve.urls import INVALID, REFUSED, TOO_LARGE, UNREACHABLE, FetchSettings, is_public, parse, permitted, shown

PUBLIC = "93.184.215.14"
SHOP = FetchSettings(hosts=("shop.test", "*.cdn.test"), max_redirects=3)
PICTURE = b"\x89PNG, or what somebody calls so" * 100
FILE = "file:" + "//"  # apart, because no file of the project may name a machine's own files


@pytest.fixture(autouse=True)
def connected(monkeypatch) -> list[tuple]:
    """Every address that this process connects a TCP socket to; names are never looked up for real."""
    seen: list[tuple] = []
    connect = socket.socket.connect

    def recorded(self: socket.socket, address) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            seen.append(address)
            assert address[0] == "127.0.0.1", address
        connect(self, address)

    def no_lookup(*arguments, **_) -> None:
        raise AssertionError(f"looked up {arguments}")

    monkeypatch.setattr(socket.socket, "connect", recorded)
    monkeypatch.setattr(socket, "getaddrinfo", no_lookup)
    return seen


class Names:
    """A name server: what it answers to each question in turn, the last answer for ever."""

    def __init__(self, **answers: Sequence[Sequence[str]]) -> None:
        self.answers = {name.replace("_", "."): list(turns) for name, turns in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str, port: int) -> Sequence[str]:
        self.asked.append(host)
        if host not in self.answers:
            raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
        turns = self.answers[host]
        return turns.pop(0) if len(turns) > 1 else turns[0]


class Wire(httpx.AsyncBaseTransport):
    """Instead of the network: remembers where a connection would have gone, and answers by a function of the request."""

    def __init__(self, answer: Callable[[httpx.Request], httpx.Response]) -> None:
        self.answer, self.went = answer, []

    def __call__(self) -> httpx.AsyncBaseTransport:
        return self

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.went.append((request.url.host, request.url.port or {"https": 443, "http": 80}[request.url.scheme]))
        return self.answer(request)


def content(request: httpx.Request) -> httpx.Response:
    return httpx.Response(200, stream=httpx.ByteStream(PICTURE))


def redirect(to: str, status: int = 302) -> Callable[[httpx.Request], httpx.Response]:
    """The shop leads on to `to`; whatever else is asked answers with a picture."""
    first = "/start"
    return lambda request: httpx.Response(status, headers={"Location": to}) if request.url.path == first else content(request)


def get(fetcher: Fetcher, url: str) -> bytes:
    return asyncio.run(fetcher.fetch(url))


def refused(fetcher: Fetcher, url: str) -> ApiError:
    with pytest.raises(ApiError) as caught:
        get(fetcher, url)
    return caught.value


HOSTILE = [
    # this machine, in every spelling
    *("https://localhost/", "https://LOCALHOST./", "https://127.0.0.1/", "https://127.0.0.1./", "https://127.1/", "https://127.0.1/"),
    *("https://2130706433/", "https://017700000001/", "https://0x7f000001/", "https://0x7f.1/", "https://0177.0.0.1/", "https://0/"),
    *("https://0x7f.0x0.0x0.0x1/", "https://127.0.0.01/", "https://0.0.0.0/", "https://[::1]/", "https://[::]/", "https://1.1.1.1.1/"),
    *("https://[0:0:0:0:0:0:0:1]/", "https://[::ffff:127.0.0.1]/", "https://[::ffff:7f00:1]/", "https://[::127.0.0.1]/", "https://0x/"),
    # the link, the cloud, the network that we are in
    *("https://169.254.169.254/latest/meta-data/", "https://2852039166/", "https://0xa9fea9fe/", "https://0251.0376.0251.0376/"),
    *("https://metadata.google.internal/computeMetadata/v1/", "https://metadata/", "https://instance-data.ec2.internal/"),
    *("https://100.100.100.200/", "https://168.63.129.16/", "https://192.0.0.192/", "https://[fd00:ec2::254]/", "https://[fe80::1]/"),
    *("https://10.0.0.1/", "https://172.16.0.1/", "https://192.168.0.1/", "https://100.64.0.1/", "https://[fc00::1]/"),
    "https://[fd12::1]/",
    *("https://kubernetes.default.svc/", "https://kubernetes.default.svc.cluster.local/", "https://224.0.0.1/", "https://255.255.255.255/"),
    # IPv4 inside IPv6
    *("https://[64:ff9b::7f00:1]/", "https://[64:ff9b::a9fe:a9fe]/", "https://[64:ff9b:1::a00:1]/", "https://[2002:7f00:1::]/"),
    *("https://[2001:0:7f00:1::1]/", "https://[::ffff:0:127.0.0.1]/", "https://[fe80::1%25eth0]/", "https://[fe80::1%eth0]/"),
    # other doors
    *(f"{FILE}/etc/passwd", f"{FILE}shop.test/etc/passwd", "gopher://shop.test:70/_x", "ftp://shop.test/a.png"),
    "data:image/png;base64,AAAA",
    *("dict://shop.test:11211/stat", "ldap://shop.test/", "jar:https://shop.test!/", "http://shop.test/a.png", "ws://shop.test/"),
    "unix:/run/x",
    *("javascript:alert(1)", "shop.test/a.png", "//shop.test/a.png", "https:shop.test/a.png", "https:/shop.test/a.png", "", "/", "?"),
    "https",
    # hosts that two parsers read in two ways
    *("https:///a.png", "https://", "https://:443/", "https://@/", "https://./", "https://../", "https://.shop.test/"),
    "https://shop..test/",
    *("https://shop.test@127.0.0.1/", "https://user:pa55@shop.test/", "https://@shop.test/", "https://shop.test:443@127.0.0.1/"),
    *("https://127.0.0.1#@shop.test/", "https://127.0.0.1?@shop.test/", "https://127.0.0.1/@shop.test/", "https://127.0.0.1\\@shop.test/"),
    *("https://shop.test\\@127.0.0.1/", "https://127.0.0.1;shop.test/", "https://127.0.0.1,shop.test/", "https://shop.test&x@127.0.0.1/"),
    *("https:\\\\shop.test/", "https://%73hop.test/", "https://127.0.0.1%2f@shop.test/", "https://shop.test%00.evil.test/", "https://%31/"),
    *("https://shop.test%2eevil.test/", "https://127%2e0%2e0%2e1/", "https://[shop.test]/", "https://[v1.shop.test]/", "https://[::1/"),
    *("https://::1/", "https://[::1]shop.test/", "https://shop.test[::1]/", "https://[127.0.0.1]/", "https://[]/", "https://[::1]]/"),
    *("https://127\u30020\u30020\u30021/", "https://127\uff0e0\uff0e0\uff0e1/", "https://\u2460\u2461\u2466.\u24ea.\u24ea.\u2460/"),
    *("https://\uff11\uff12\uff17.0.0.1/", "https://loc\u00adalhost/", "https://\uff4cocalhost/", "https://shop.test\u2044@evil.test/"),
    *("https://sh\u00f6p.test/", "https://xn--shp-sna.test/", "https://shop.test.evil.test/", "https://evilshop.test/"),
    "https://shop.testx/",
    *("https://cdn.test/", "https://evilcdn.test/", "https://.cdn.test/", "https://a..cdn.test/", "https://-.cdn.test/"),
    "https://a b.cdn.test/",
    *(f"https://{'a' * 64}.cdn.test/", f"https://{'a.' * 130}cdn.test/", f"https://{chr(233) * 70}.cdn.test/", "https://*.cdn.test/"),
    # ports
    *("https://shop.test:0/", "https://shop.test:22/", "https://shop.test:80/", "https://shop.test:65536/", "https://shop.test:-1/"),
    *("https://shop.test:443x/", "https://shop.test:4430/", "https://shop.test:443:443/", "https://shop.test:\u0664\u0664\u0663/"),
    *("https://shop.test:+443/", "https://shop.test: 443/", "https://shop.test:4_43/", "https://shop.test:0x1bb/"),
    *("https://shop.test:000443/", "http://shop.test:443/"),
    # what breaks lines, and what does not end
    *("https://shop.test/\r\nHost: evil.test", "https://shop.test\r\n.evil.test/", "https://shop.test/a\tb", "https://shop.test/a b"),
    *("https://shop.test/\x00", "https://sh\top.test/", " https://shop.test/", "https://shop.test/\n", "\x01https://shop.test/"),
    *("https://shop.test/\u2028", "https://shop.test/\u202e", "https://shop.test/\ud800", "https://shop.test/" + "a" * 3000, "a" * 100_000),
]


def test_there_are_enough_hostile_urls_and_none_twice():
    assert len(HOSTILE) > 150
    assert len(set(HOSTILE)) == len(HOSTILE)


@pytest.mark.parametrize("url", HOSTILE, ids=lambda url: ascii(url[:40]))
def test_a_hostile_url_is_neither_looked_up_nor_connected_to(url, connected):
    names, wire = Names(shop_test=[[PUBLIC]]), Wire(content)
    error = refused(Fetcher(SHOP, resolve=names, connect=wire), url)
    assert (error.status, error.code in (INVALID, REFUSED)) == (422, True)
    assert (names.asked, wire.went, connected) == ([], [], [])
    assert len(str(error)) < 700
    assert str(error).isprintable()


# A URL without a host is relative to the one before, whose host is listed: these lead back to it.
BACK = ["//shop.test/a.png", "https:shop.test/a.png", "https:/shop.test/a.png", "https:///a.png", "https://"]
LED_ON = [url for url in HOSTILE if (":" in url or url.startswith("//")) and url not in BACK]


@pytest.mark.parametrize("url", LED_ON, ids=lambda url: ascii(url[:40]))
def test_a_redirect_to_a_hostile_url_is_not_followed(url, connected):
    to = url.encode(errors="surrogatepass")
    names, wire = Names(shop_test=[[PUBLIC]]), Wire(lambda request: httpx.Response(302, headers={"Location": to}))
    error = refused(Fetcher(SHOP, resolve=names, connect=wire), "https://shop.test/start")
    assert error.status == 422
    assert (names.asked, wire.went, connected) == (["shop.test"], [(PUBLIC, 443)], [])


def test_a_redirect_without_a_host_stays_at_the_one_before():
    assert {parse(url, SHOP, "https://shop.test/start").host for url in BACK} == {"shop.test"}


# Addresses by IANA's registries of special purposes, and the clouds' own, beside those that merely look harmless.
FORBIDDEN = [
    *("0.0.0.0", "0.1.2.3", "10.0.0.1", "10.255.255.255", "100.64.0.1", "100.100.100.200", "100.127.255.255", "127.0.0.1", "127.255.0.1"),
    *("169.254.0.1", "169.254.169.254", "169.254.170.2", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.0.8", "192.0.0.192"),
    *("192.0.2.1", "192.88.99.1", "192.168.0.1", "198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "168.63.129.16"),
    *("224.0.0.1", "239.255.255.255", "240.0.0.1", "255.255.255.255"),
    *("::", "::1", "::7f00:1", "::ffff:127.0.0.1", f"::ffff:{PUBLIC}", f"::{PUBLIC}", "::ffff:0:127.0.0.1", "100::1", "64:ff9b:1::1"),
    *("64:ff9b::127.0.0.1", "64:ff9b::10.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b::168.63.129.16", "2001::1", "2001:0:7f00:1::1"),
    *("2001:2::1", "2001:10::1", "2001:20::1", "2001:db8::1", "2002:7f00:1::", "2002:a9fe:a9fe::1", "2002:5db8:d70e::1", "3fff::1"),
    *("4000::1", "5f00::1", "fc00::1", "fd00::1", "fd00:ec2::254", "fd20:ce::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1"),
    "ff0e::1",
]
ALLOWED = [PUBLIC, "1.1.1.1", "172.32.0.1", "100.128.0.1", "2606:4700::1111", "2a00:1450:4001::1", "64:ff9b::1.1.1.1"]


@pytest.mark.parametrize("address", FORBIDDEN)
def test_a_name_at_a_forbidden_address_is_not_connected_to(address, connected):
    for answers in ([address], [PUBLIC, address], [address, PUBLIC], [PUBLIC] * 5 + [address]):
        wire = Wire(content)
        error = refused(Fetcher(SHOP, resolve=Names(shop_test=[answers]), connect=wire), "https://shop.test/a.png")
        assert error.code == REFUSED
        assert address not in str(error)
        assert (wire.went, connected) == ([], [])


@pytest.mark.parametrize("address", [a for a in FORBIDDEN if "%" not in a])
def test_a_forbidden_address_is_refused_even_where_it_is_listed_or_led_to(address, connected):
    listed = FetchSettings(hosts=("shop.test", address), max_redirects=3)
    url = f"https://[{address}]/" if ":" in address else f"https://{address}/"
    wire = Wire(redirect(url))
    names = Names(shop_test=[[PUBLIC]])
    assert refused(Fetcher(listed, resolve=names, connect=wire), url).code == REFUSED
    assert (names.asked, wire.went) == ([], [])
    assert refused(Fetcher(listed, resolve=names, connect=wire), "https://shop.test/start").code == REFUSED
    assert (wire.went, connected) == ([(PUBLIC, 443)], [])


@pytest.mark.parametrize("address", ALLOWED)
def test_a_public_address_is_connected_to_as_it_was_checked(address):
    wire = Wire(content)
    assert get(Fetcher(SHOP, resolve=Names(shop_test=[[address]]), connect=wire), "https://shop.test/a.png") == PICTURE
    assert wire.went == [(str(ipaddress.ip_address(address)), 443)]


def test_private_addresses_are_for_those_who_say_so():
    private = {"10.0.0.1", "10.255.255.255", "172.16.0.1", "172.31.255.255", "192.168.0.1", "fc00::1", "fd00::1"}
    assert {a for a in FORBIDDEN if permitted(ipaddress.ip_address(a), allow_private=True)} == private
    assert not any(map(is_public, map(ipaddress.ip_address, private)))
    wire, inside = Wire(content), FetchSettings(hosts=("shop.test",), allow_private=True)
    assert get(Fetcher(inside, resolve=Names(shop_test=[["10.0.0.1"]]), connect=wire), "https://shop.test/") == PICTURE
    assert refused(Fetcher(inside, resolve=Names(shop_test=[["127.0.0.1"]]), connect=wire), "https://shop.test/").code == REFUSED


def test_an_answer_that_changes_after_the_check_changes_nothing(connected):
    names, wire = Names(shop_test=[[PUBLIC], ["127.0.0.1"]]), Wire(content)
    assert get(Fetcher(SHOP, resolve=names, connect=wire), "https://shop.test/a.png") == PICTURE
    assert (names.asked, wire.went, connected) == (["shop.test"], [(PUBLIC, 443)], [])


def test_each_redirect_is_looked_up_and_checked_anew(connected):
    names, wire = Names(shop_test=[[PUBLIC], ["127.0.0.1"]]), Wire(redirect("/next"))
    assert refused(Fetcher(SHOP, resolve=names, connect=wire), "https://shop.test/start").code == REFUSED
    assert (names.asked, wire.went, connected) == (["shop.test"] * 2, [(PUBLIC, 443)], [])
    names, wire = Names(shop_test=[[PUBLIC]], a_cdn_test=[["1.1.1.1"]]), Wire(redirect("https://A.cdn.test./next?x=1#y"))
    assert get(Fetcher(SHOP, resolve=names, connect=wire), "https://shop.test/start") == PICTURE
    assert (names.asked, wire.went) == (["shop.test", "a.cdn.test"], [(PUBLIC, 443), ("1.1.1.1", 443)])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("most", [0, 1, 3])
def test_redirects_are_counted(status, most):
    wire = Wire(lambda request: httpx.Response(status, headers={"Location": request.url.path + "x"}))
    error = refused(
        Fetcher(SHOP.model_copy(update={"max_redirects": most}), resolve=Names(shop_test=[[PUBLIC]]), connect=wire), "https://shop.test/"
    )
    assert error.code == UNREACHABLE
    assert len(wire.went) == most + 1
    assert str(most) in str(error)


def test_a_redirect_without_a_place_ends():
    wire = Wire(lambda request: httpx.Response(302))
    assert refused(Fetcher(SHOP, resolve=Names(shop_test=[[PUBLIC]]), connect=wire), "https://shop.test/").code == UNREACHABLE


def test_fetching_is_off_until_hosts_are_named(connected):
    names, wire = Names(shop_test=[[PUBLIC]]), Wire(content)
    error = refused(Fetcher(FetchSettings(), resolve=names, connect=wire), "https://shop.test/")
    assert (error.status, error.code, names.asked, wire.went, connected) == (422, REFUSED, [], [], [])
    assert "send the picture" in str(error)


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("https://shop.test", "/"),
        ("https://shop.test?", "/"),
        ("https://shop.test?a=b", "/?a=b"),
        ("HTTPS://shop.test:443/a%20b/c@2x.png?x=%2F&y=1,2#part", "/a%20b/c@2x.png?x=%2F&y=1,2"),
        ("https://shop.test/\u00e9.png?q=\u00e9", "/%C3%A9.png?q=%C3%A9"),
        ("https://shop.test/a?b?c=/@:", "/a?b?c=/@:"),
        ("https://shop.test//evil.test/", "//evil.test/"),
        ('https://shop.test/<">?{|}^`', "/%3C%22%3E?%7B%7C%7D%5E%60"),
    ],
)
def test_path_and_query_are_kept_and_the_fragment_is_not(url, path):
    target = parse(url, SHOP)
    assert (target.host, target.port, target.path) == ("shop.test", 443, path)
    request = module._request(target, ipaddress.ip_address(PUBLIC), 1)
    assert request.url.raw_path.decode() == path
    assert request.headers["host"] == "shop.test"


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("https://user:pa55@shop.test/a?key=pa55#pa55", "https://shop.test/a"),
        ("https://shop.test/c@2x.png", "https://shop.test/c@2x.png"),
        ("https://a:pa55@b:pa55@shop.test/", "https://shop.test/"),
        ("https:user:pa55@shop.test/", "https:shop.test/"),
        ("https:\\\\user:pa55@shop.test/", "https:\\\\\\\\shop.test/"),
        ("https://shop.test/\r\nX: \u00e9", "https://shop.test/\\r\\nX: \\xe9"),
        ("a" * 10_000, "a" * 200),
    ],
)
def test_a_url_is_shown_without_its_secrets(url, said):
    assert shown(url) == f"'{said}'"
    assert "pa55" not in str(refused(Fetcher(SHOP, resolve=Names(), connect=Wire(content)), url))


# From here on over real sockets of this machine, on ports that the system gives.

Handler = Callable[[bytes, asyncio.StreamWriter], object]


def answer(status: str = "200 OK", body: bytes = PICTURE, **headers: str) -> Handler:
    fields = {"Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = f"HTTP/1.1 {status}\r\n" + "".join(f"{name}: {value}\r\n" for name, value in fields.items()) + "\r\n"

    async def write(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(head.encode() + body)

    return write


class Shop:
    """An HTTP server on a loopback port, for the time of one test; it keeps the heads of the requests."""

    def __init__(self, handler: Handler, tls: ssl.SSLContext | None = None) -> None:
        self.handler, self.tls, self.requests = handler, tls, []
        self.tasks: set[asyncio.Task] = set()

    async def __aenter__(self) -> "Shop":
        self.server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self.tls)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.tasks.add(asyncio.current_task())  # type: ignore[arg-type]
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                self.requests.append(await reader.readuntil(b"\r\n\r\n"))
                await self.handler(self.requests[-1], writer)  # type: ignore[misc]
                await writer.drain()
        finally:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def __aexit__(self, *_) -> None:
        self.server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        await asyncio.sleep(0)

    def fetcher(self, names: Names | None = None, connect: Callable[[], httpx.AsyncBaseTransport] | None = None, **change) -> Fetcher:
        hosts, schemes = ("shop.test", "other.test"), ("http", "https")
        settings = {"hosts": hosts, "schemes": schemes, "ports": (self.port,), "max_bytes": 10_000, **change}
        names = names or Names(shop_test=[["127.0.0.1"]], other_test=[["127.0.0.1"]])
        return Fetcher(FetchSettings(**settings), resolve=names, permit=lambda address: str(address) == "127.0.0.1", connect=connect)


def ask(handler: Handler, path: str = "/a.png", *, names: Names | None = None, **change) -> tuple[bytes | ApiError, list[bytes]]:
    async def all_of_it() -> tuple[bytes | ApiError, list[bytes]]:
        async with Shop(handler) as shop:
            try:
                return await shop.fetcher(names, **change).fetch(f"http://shop.test:{shop.port}{path}"), shop.requests
            except ApiError as error:
                return error, shop.requests

    return asyncio.run(all_of_it())


def test_a_picture_is_fetched_and_nothing_but_the_request_is_sent(connected, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    found, requests = ask(answer(Set_Cookie="a=b", Content_Encoding="identity"), "/a%20b.png?x=1&y=\u00e9#part")
    assert found == PICTURE
    ((address, port),) = connected
    line, *headers = requests[0].decode().rstrip().split("\r\n")
    assert line == "GET /a%20b.png?x=1&y=%C3%A9 HTTP/1.1"
    sent = dict(header.split(": ", 1) for header in headers)
    assert sent.pop("User-Agent").startswith("idem/")
    assert sent == {"Host": f"shop.test:{port}", "Accept": "image/*", "Accept-Encoding": "identity", "Connection": "close"}
    assert address == "127.0.0.1"


def test_a_redirect_takes_no_cookie_along():
    async def lead(request: bytes, writer: asyncio.StreamWriter) -> None:
        there = request.startswith(b"GET /b")
        await (answer() if there else answer("302 Found", b"", Location="/b", Set_Cookie="a=b"))(request, writer)

    found, requests = ask(lead, max_redirects=1)
    assert found == PICTURE
    assert len(requests) == 2
    assert b"ookie" not in requests[1]


async def hold(request: bytes, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(30)


async def drip(request: bytes, writer: asyncio.StreamWriter) -> None:
    """A byte every 20 ms, which is never late by itself."""
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(1500):
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.02)


async def drip_head(request: bytes, writer: asyncio.StreamWriter) -> None:
    for _ in range(1500):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("handler", [hold, drip, drip_head])
def test_the_time_is_that_of_the_whole_fetch(handler):
    error, _ = ask(handler, timeout_s=0.3)
    assert isinstance(error, ApiError)
    assert (error.code, "0.3 s" in str(error)) == (UNREACHABLE, True)


def test_a_body_that_says_it_is_too_large_is_not_read():
    async def announce(request: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 10001\r\n\r\n")
        await writer.drain()
        await asyncio.sleep(30)

    error, _ = ask(announce)
    assert isinstance(error, ApiError)
    assert (error.status, error.code, "10,000" in str(error)) == (422, TOO_LARGE, True)


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_without_end_is_cut_off(chunked):
    sent = 0

    async def pour(request: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n" + (b"Transfer-Encoding: chunked\r\n\r\n" if chunked else b"\r\n"))
        while sent < 1 << 30:
            writer.write(b"400\r\n" + b"x" * 1024 + b"\r\n" if chunked else b"x" * 1024)
            await writer.drain()
            sent += 1024

    error, _ = ask(pour)
    assert isinstance(error, ApiError)
    assert error.code == TOO_LARGE
    assert sent < 1 << 24  # what the sockets of both sides hold


def test_the_limit_itself_is_allowed():
    assert ask(answer(body=b"x" * 10_000))[0] == b"x" * 10_000
    assert ask(answer(body=b""))[0] == b""
    error, _ = ask(answer(body=b"x" * 10_001))
    assert isinstance(error, ApiError)
    assert error.code == TOO_LARGE


SECRET = b"what an internal page says"


async def garbage(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"SSH-2.0-" + SECRET + b"\r\n")


async def short(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n" + SECRET)


async def nothing(request: bytes, writer: asyncio.StreamWriter) -> None:
    return None


async def flood(request: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nX: " + b"x" * 10_000_000)


@pytest.mark.parametrize(
    "handler",
    [
        *(answer(status, SECRET) for status in ("404 Not Found", "500 Broken", "201 Created", "206 Partial Content", "403 No", "300 Many")),
        *(answer("304 Not Modified", b""), answer("204 No Content", b""), answer("101 Switching Protocols", SECRET, Upgrade="x")),
        *(answer(body=gzip.compress(SECRET), Content_Encoding=coding) for coding in ("gzip", "br", "GZIP", "identity, gzip", "")),
        *(answer(body=SECRET, Content_Length="-1"), answer(body=SECRET, Content_Length="x"), answer(body=SECRET, Transfer_Encoding="gzip")),
        *(garbage, short, nothing, flood),
    ],
)
def test_an_answer_that_is_none_is_refused_and_not_repeated(handler):
    error, _ = ask(handler)
    assert isinstance(error, ApiError)
    assert (error.status, error.code) == (422, UNREACHABLE)
    assert SECRET.decode() not in str(error)


@pytest.mark.parametrize("handler", [answer(), answer("404 No"), answer("302 Found", Location="/"), answer(body=b"x" * 99_999), hold, drip])
def test_no_connection_is_left_open_or_used_again(handler, monkeypatch):
    sockets: list[socket.socket] = []
    connect = socket.socket.connect
    monkeypatch.setattr(socket.socket, "connect", lambda self, to: sockets.append(self) or connect(self, to))

    async def all_of_it() -> list[int]:
        async with Shop(handler) as shop:
            fetcher = shop.fetcher(timeout_s=0.3)
            for host in ("shop.test", "other.test"):
                with contextlib.suppress(ApiError):
                    await fetcher.fetch(f"http://{host}:{shop.port}/")
            await asyncio.sleep(0.05)
            return [each.fileno() for each in sockets]

    assert asyncio.run(all_of_it()) == [-1, -1]


def test_a_port_where_nobody_is_and_a_name_that_nobody_has():
    async def empty() -> int:
        async with Shop(nothing) as shop:
            return shop.port

    port = asyncio.run(empty())
    settings = FetchSettings(hosts=("shop.test",), schemes=("http",), ports=(port,))
    at_home = Fetcher(settings, resolve=Names(shop_test=[["127.0.0.1"]]), permit=lambda _: True)
    assert refused(at_home, f"http://shop.test:{port}/").code == UNREACHABLE
    for names in (Names(), Names(shop_test=[[]]), Names(shop_test=[["nonsense"]])):
        assert refused(Fetcher(settings, resolve=names, permit=lambda _: True), f"http://shop.test:{port}/").code == UNREACHABLE


def test_the_next_address_is_tried_where_the_first_takes_no_connection():
    refusing = {"1.1.1.1", "1.0.0.1"}

    def pick(request: httpx.Request) -> httpx.Response:
        if request.url.host in refusing:
            raise httpx.ConnectError("refused")
        return content(request)

    wire = Wire(pick)
    names = Names(shop_test=[["1.1.1.1", "1.1.1.1", "1.0.0.1", PUBLIC]])
    assert get(Fetcher(SHOP, resolve=names, connect=wire), "https://shop.test/") == PICTURE
    assert [host for host, _ in wire.went] == ["1.1.1.1", "1.0.0.1", PUBLIC]
    refusing.add(PUBLIC)
    many = [*sorted(refusing), "8.8.8.8"]
    assert refused(Fetcher(SHOP, resolve=Names(shop_test=[many]), connect=wire), "https://shop.test/").code == UNREACHABLE
    assert len(wire.went) == 3 + 3


def test_a_name_server_that_is_slow_costs_no_more_than_the_time():
    async def slow(host: str, port: int) -> list[str]:
        await asyncio.sleep(30)
        return [PUBLIC]

    assert refused(Fetcher(FetchSettings(hosts=("shop.test",), timeout_s=0.1), resolve=slow), "https://shop.test/").code == UNREACHABLE


def test_the_system_is_asked_once_for_the_name_as_it_stands_on_a_thread_of_its_own(monkeypatch):
    asked = []

    def look_up(host: str, port: int, **options) -> list[tuple]:
        asked.append((host, port, options, threading.current_thread().name))
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", ("127.0.0.1", port)), (socket.AF_INET6, 1, 6, "", ("fe80::1%2", port, 0, 2))]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    wire = Wire(content)
    assert refused(Fetcher(SHOP, connect=wire), "https://shop.test/a.png").code == REFUSED
    ((host, port, options, thread),) = asked
    assert (host, port, options) == ("shop.test.", 443, {"type": socket.SOCK_STREAM})
    assert thread.startswith("image-url-names")
    assert wire.went == []


def test_so_many_run_at_once_and_the_others_wait_or_are_sent_away():
    async def all_of_it() -> tuple[int, list]:
        running, most = 0, 0

        async def slow(request: bytes, writer: asyncio.StreamWriter) -> None:
            nonlocal running, most
            running += 1
            most = max(most, running)
            await asyncio.sleep(0.4 if b"/slow" in request else 0.01)
            running -= 1
            await answer("404 No" if b"/bad" in request else "200 OK")(request, writer)

        async with Shop(slow) as shop:
            url = f"http://shop.test:{shop.port}/"
            fetcher = shop.fetcher(at_once=2, timeout_s=20)
            found = await asyncio.gather(*(fetcher.fetch(url + ("bad" if i % 2 else "")) for i in range(12)), return_exceptions=True)
            busy = shop.fetcher(at_once=1, timeout_s=0.2)
            first, second = await asyncio.gather(*(busy.fetch(url + "slow") for _ in range(2)), return_exceptions=True)
            busy.settings = busy.settings.model_copy(update={"timeout_s": 20.0})
            return most, [*found, first, second, await busy.fetch(url)]

    most, (*found, first, second, last) = asyncio.run(all_of_it())
    assert most <= 3  # 2 of one fetcher; one that was given up may still be asleep in the server
    assert [isinstance(one, ApiError) for one in found] == [False, True] * 6
    assert (first.status, first.code) == (422, UNREACHABLE)
    assert (second.status, second.code, second.headers) == (503, "overloaded", {"Retry-After": "1"})
    assert last == PICTURE


@pytest.fixture(scope="module")
def authority(tmp_path_factory) -> dict[str, str]:
    """Paths of a certificate for shop.test, signed by itself, and of its key."""
    if not shutil.which("openssl"):
        pytest.skip("openssl is not installed, and nothing else here makes certificates")
    folder = tmp_path_factory.mktemp("tls")
    paths = {"certfile": str(folder / "cert.pem"), "keyfile": str(folder / "key.pem")}
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=shop.test"
    named = ["-addext", "subjectAltName=DNS:shop.test", "-keyout", paths["keyfile"], "-out", paths["certfile"]]
    subprocess.run([*made.split(), *named], check=True, capture_output=True)
    return paths


@pytest.mark.parametrize(("host", "trusted", "good"), [("shop.test", True, True), ("other.test", True, False), ("shop.test", False, False)])
def test_the_certificate_is_that_of_the_name_and_not_of_the_address(authority, host, trusted, good, connected):
    names: list[str] = []
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(**authority)
    tls.sni_callback = lambda _, name, __: names.append(name)
    client = ssl.create_default_context(cafile=authority["certfile"]) if trusted else httpx.create_ssl_context(trust_env=False)

    async def all_of_it() -> bytes | ApiError:
        async with Shop(answer(), tls) as shop:
            try:
                return await shop.fetcher(connect=lambda: httpx.AsyncHTTPTransport(verify=client)).fetch(
                    f"https://{host}:{shop.port}/a.png"
                )
            except ApiError as error:
                return error

    found = asyncio.run(all_of_it())
    assert names == [host]
    assert [address for address, _ in connected] == ["127.0.0.1"]
    if good:
        assert found == PICTURE
    else:
        assert isinstance(found, ApiError)
        assert (found.code, "ConnectError" in str(found)) == (UNREACHABLE, True)


def test_what_connects_by_default_checks_certificates_and_knows_no_proxy(monkeypatch, tmp_path):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "no such file"))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:1")
    fetcher = Fetcher(SHOP)
    tls = fetcher.connect.keywords["verify"]  # type: ignore[attr-defined]
    assert (tls.verify_mode, tls.check_hostname) == (ssl.CERT_REQUIRED, True)
    assert type(fetcher.connect()._pool).__name__ == "AsyncConnectionPool"  # type: ignore[attr-defined]
