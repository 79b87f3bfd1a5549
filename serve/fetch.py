"""The picture behind a URL that a stranger gave: fetched from listed hosts alone, and never from inside our own network.

A service that fetches what it is told is a door into the network it stands in (server-side request forgery). So: the URL is
read strictly and built anew from its parts, so that no second parser can take it for another one; its host must be listed; its
name is resolved once, every address it has must be public, and the connection goes to one of those addresses as a literal, so
that a name server that changes its mind changes nothing; TLS checks the certificate against the name all the same. Each
redirect starts from the beginning. Nothing is sent but the request: no cookies, no proxy, no credentials.

Off until `hosts` names some. Beyond these rules an egress firewall is worth having: an address is public here by IANA's
registries, and what a network makes of a public address (its own NAT64 prefix, say) is not to be seen from here.
"""

import asyncio
import ipaddress
import logging
import re
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal
from urllib.parse import quote, urljoin, urlsplit

import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

import idem
from serve.intake import ApiError

log = logging.getLogger(__name__)

Address = ipaddress.IPv4Address | ipaddress.IPv6Address
Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Permit = Callable[[Address], bool]
Connect = Callable[[], httpx.AsyncBaseTransport]

INVALID, REFUSED, UNREACHABLE, TOO_LARGE = (f"image_url_{why}" for why in ("invalid", "not_allowed", "unreachable", "too_large"))
MAX_URL = 2_048  # characters
MAX_TRIED = 3  # addresses of one name
DEFAULT_PORTS = {"https": 443, "http": 80}
REDIRECTS = (301, 302, 303, 307, 308)
AUTHORITY = re.compile(r"(\[[0-9a-f.]*:[0-9a-f:.]+\]|[^\[\]:@%]+)(?::([0-9]{0,5}))?", re.I)
NAME = re.compile(r"(?=.{1,253}$)(?:[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?\.)*[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
NUMBER = re.compile(r"(?:.*\.)?(?:[0-9]+|0x[0-9a-f]*)")  # a host that ends so is an IPv4 address to a browser, or to inet_aton
SAFE = "/%:@!$&'()*+,;=~"  # what a path keeps as it is, beside letters and digits
# Public by ipaddress in one of the Pythons that we run on, and yet special: IANA's registries, and Azure's host (168.63.129.16).
SPECIAL = tuple(map(ipaddress.ip_network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32", "2001::/23", "2002::/16", "3fff::/20")))
UNICAST, NAT64 = ipaddress.ip_network("2000::/3"), ipaddress.ip_network("64:ff9b::/96")
PRIVATE = tuple(map(ipaddress.ip_network, ("10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "fc00::/7")))
METADATA = tuple(map(ipaddress.ip_network, ("fd00:ec2::/32", "fd20:ce::/32")))  # of Amazon and Google, within fc00::/7


def canonical(host: str) -> str:
    """A host in the one form that is compared and resolved: lower case, IDNA, no last dot; a literal address as Python writes it.

    ValueError for what is neither a name nor the plain form of an address: 2130706433, 0x7f.1, 127.1 and 0177.0.0.1 are none.
    """
    if ":" in host:
        return str(ipaddress.IPv6Address(host))
    name = (host if host.isascii() else _idna(host)).lower().removesuffix(".")
    if NUMBER.fullmatch(name):
        return str(ipaddress.IPv4Address(name))
    if not NAME.fullmatch(name):
        raise ValueError("not a host name")
    return name


def _idna(host: str) -> str:
    try:
        return httpx.URL(scheme="https", host=host).raw_host.decode()
    except httpx.InvalidURL as error:
        raise ValueError(str(error)) from error


def _rule(host: str) -> str:
    """A host of the settings: a name, an address, or `*.` and at least two labels."""
    try:
        name = canonical(host.removeprefix("*."))
    except ValueError as error:
        raise ValueError(f"{host!r} is neither a host name, nor *. before one, nor an address: {error}") from error
    if host.startswith("*.") and "." not in name:
        raise ValueError(f"{host!r} allows too much: give a name, or *. before a name with a dot")
    return f"*.{name}" if host.startswith("*.") else name


class FetchSettings(BaseModel):
    """hosts: names, or `*.name` for all below a name (not itself); none switches fetching off.

    timeout_s: of one fetch with everything in it, waiting for its turn as well. at_once: fetches that run, max_bytes of memory
    each. allow_private: addresses of private networks (10/8, 172.16/12, 192.168/16, fc00::/7) as well, still none of this
    machine, of its link, or of a cloud's metadata.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    hosts: tuple[Annotated[str, AfterValidator(_rule)], ...] = ()
    schemes: tuple[Literal["https", "http"], ...] = ("https",)
    ports: tuple[Annotated[int, Field(ge=1, le=65_535)], ...] = (443,)
    max_bytes: int = Field(default=20_000_000, ge=1)
    timeout_s: float = Field(default=3, gt=0, allow_inf_nan=False)
    max_redirects: int = Field(default=0, ge=0, le=3)
    at_once: int = Field(default=8, ge=1)
    allow_private: bool = False

    def lists(self, host: str) -> bool:
        return any(host.endswith(rule[1:]) if rule.startswith("*.") else host == rule for rule in self.hosts)


def is_public(address: Address) -> bool:
    """Whether anybody on the internet reaches the same machine there.

    Of IPv6 only global unicast, without the tunnels that carry an IPv4 address (6to4, Teredo), and NAT64 of a public address:
    IPv4-mapped and -compatible forms are not needed to reach anything.
    """
    if address.version == 6 and address in NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
    if address.version == 6 and address not in UNICAST:
        return False
    return address.is_global and not (address.is_multicast or address.is_reserved or any(address in net for net in SPECIAL))


def permitted(address: Address, *, allow_private: bool = False) -> bool:
    """Whether an address may be connected to; none with a zone (%eth0), which is one of a link."""
    if getattr(address, "scope_id", None):
        return False
    private = any(address in net for net in PRIVATE) and not any(address in net for net in METADATA)
    return is_public(address) or (allow_private and private)


@dataclass(frozen=True)
class Target:
    """A URL that may be asked for. host: canonical; path: with the query, percent-encoded."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == DEFAULT_PORTS[self.scheme] else f"{host}:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.authority}{self.path}"


def shown(url: str) -> str:
    """A URL for an error: without credentials, query and fragment, where signatures are, and not long."""
    return ascii(re.split(r"[?#]", re.sub(r"^([a-z][a-z0-9+.-]*:)?([/\\]*)[^/\\?#]*@", r"\1\2", url, flags=re.I))[0][:200])


def refuse(code: str, url: str, said: str) -> ApiError:
    return ApiError(422, code, f"image_url {shown(url)}: {said}")


def parse(url: str, settings: FetchSettings, base: str = "") -> Target:
    """The parts of a URL, relative to `base`, that the settings allow. ApiError `image_url_invalid` or `image_url_not_allowed`."""
    if len(url) > MAX_URL:
        raise refuse(INVALID, url, f"{len(url):,} characters; at most {MAX_URL:,} are allowed")
    if not url.isprintable() or " " in url or "\\" in url:
        raise refuse(INVALID, url, "spaces, backslashes and control characters are not allowed")
    try:
        parts = urlsplit(urljoin(base, url))
        if parts.scheme not in settings.schemes:
            raise refuse(REFUSED, url, f"the scheme is {parts.scheme!r}; allowed are {', '.join(settings.schemes)}")
        host, port = _place(parts.netloc, DEFAULT_PORTS[parts.scheme])
    except ValueError as error:
        raise refuse(INVALID, url, f"not a URL that can be fetched: {str(error)[:200]}") from error
    if port not in settings.ports:
        raise refuse(REFUSED, url, f"the port is {port}; allowed are {', '.join(map(str, settings.ports))}")
    if not settings.lists(host):
        raise refuse(REFUSED, url, f"the host is {host!r}; allowed are {', '.join(settings.hosts)}")
    query = f"?{quote(parts.query, safe=SAFE + '?')}" if parts.query else ""
    return Target(parts.scheme, host, port, quote(parts.path or "/", safe=SAFE) + query)


def _place(netloc: str, default_port: int) -> tuple[str, int]:
    found = AUTHORITY.fullmatch(netloc)
    if not found:
        raise ValueError("after // must be host or host:port, without user, password or percent signs")
    return canonical(found[1].strip("[]")), int(found[2] or default_port)


def _request(target: Target, address: Address, connect_s: float) -> httpx.Request:
    """To the literal address, in the name of the host: `Host` for HTTP; `sni_hostname` for TLS, which checks the certificate for it."""
    url = httpx.URL(scheme=target.scheme, host=str(address), port=target.port, raw_path=target.path.encode())
    agent = f"idem/{idem.__version__}"
    headers = {"Host": target.authority, "Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": agent, "Connection": "close"}
    return httpx.Request("GET", url, headers=headers, extensions={"sni_hostname": target.host, "timeout": {"connect": connect_s}})


async def _read(target: Target, response: httpx.Response, max_bytes: int) -> bytes:
    if response.status_code != 200:
        raise refuse(UNREACHABLE, target.url, f"the answer has status {response.status_code}; 200 is needed")
    if response.headers.get("content-encoding", "identity").lower() != "identity":
        raise refuse(UNREACHABLE, target.url, "the answer is compressed, though identity was asked for")
    too_large = refuse(TOO_LARGE, target.url, f"more than the {max_bytes:,} bytes that are allowed")
    if int(response.headers.get("content-length", 0)) > max_bytes:
        raise too_large
    data = bytearray()
    async for part in response.aiter_raw():
        if len(data) + len(part) > max_bytes:
            raise too_large
        data += part
    return bytes(data)


class Fetcher:
    """`fetch` for one process. For tests: resolve (host and port to addresses), permit (which of them), connect (what connects).

    Every request has a connection of its own: one kept open would be taken for another name at the same address, unchecked.
    """

    def __init__(
        self, settings: FetchSettings, *, resolve: Resolve | None = None, permit: Permit | None = None, connect: Connect | None = None
    ) -> None:
        self.settings, self.slots = settings, asyncio.Semaphore(settings.at_once)
        self.lookups = ThreadPoolExecutor(settings.at_once, "image-url-names")  # a slow name server keeps its own threads busy
        self.resolve = resolve or self._resolve
        self.permit = permit or partial(permitted, allow_private=settings.allow_private)
        self.connect = connect or partial(httpx.AsyncHTTPTransport, verify=httpx.create_ssl_context(trust_env=False), trust_env=False)

    async def fetch(self, url: str) -> bytes:
        """The bytes behind the URL, whatever they are. ApiError: 422 with one of the four codes above, 503 where no turn came."""
        if not self.settings.hosts:
            raise ApiError(422, REFUSED, "this service fetches no image_url; send the picture itself")
        target, running = parse(url, self.settings), False
        try:
            async with asyncio.timeout(self.settings.timeout_s), self.slots:
                running = True
                return await self._follow(target)
        except TimeoutError as error:
            if not running:
                said = f"{self.settings.at_once} image_urls are being fetched, which is all at once; try again in 1 s"
                raise ApiError(503, "overloaded", said, {"Retry-After": "1"}) from error
            raise refuse(UNREACHABLE, url, f"not fetched within {self.settings.timeout_s:g} s") from error

    async def _follow(self, target: Target) -> bytes:
        for left in range(self.settings.max_redirects, -1, -1):
            found = await self._ask(target)
            if isinstance(found, bytes):
                return found
            if left:
                target = parse(found, self.settings, target.url)
        raise refuse(UNREACHABLE, target.url, f"the answer is a redirect; allowed in a row are {self.settings.max_redirects}")

    async def _ask(self, target: Target) -> bytes | str:
        """The content, or where the answer leads on to."""
        addresses = await self._addresses(target)
        try:
            async with self.connect() as transport, aclosing(await self._open(transport, target, addresses)) as response:
                if response.status_code in REDIRECTS:
                    return response.headers.get("location", "")
                return await _read(target, response, self.settings.max_bytes)
        except (httpx.HTTPError, OSError) as error:
            raise refuse(UNREACHABLE, target.url, f"it gave no answer: {type(error).__name__}") from error

    async def _open(self, transport: httpx.AsyncBaseTransport, target: Target, addresses: Sequence[Address]) -> httpx.Response:
        """The answer of the first address that takes a connection."""
        share_s = self.settings.timeout_s / len(addresses)
        for address in addresses[:-1]:
            try:
                return await transport.handle_async_request(_request(target, address, share_s))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await transport.handle_async_request(_request(target, addresses[-1], share_s))

    async def _addresses(self, target: Target) -> list[Address]:
        """Where the host is: all of it permitted, or nothing."""
        try:
            found = [target.host] if NUMBER.fullmatch(target.host) or ":" in target.host else await self.resolve(target.host, target.port)
            addresses = list(map(ipaddress.ip_address, dict.fromkeys(found)))
        except (OSError, ValueError) as error:
            raise refuse(UNREACHABLE, target.url, "the name of its host is not known") from error
        if forbidden := [address for address in addresses if not self.permit(address)]:
            log.warning("image_url with the host %s refused, which is at %s", target.host, forbidden[0])
            raise refuse(REFUSED, target.url, "the address of its host is not a public one")
        if not addresses:
            raise refuse(UNREACHABLE, target.url, "its host has no address")
        return addresses[:MAX_TRIED]

    async def _resolve(self, host: str, port: int) -> list[str]:
        """The operating system's answer for the name as it stands: the last dot keeps search domains out."""
        look_up = partial(socket.getaddrinfo, f"{host}.", port, type=socket.SOCK_STREAM)
        return [str(entry[4][0]) for entry in await asyncio.get_running_loop().run_in_executor(self.lookups, look_up)]
