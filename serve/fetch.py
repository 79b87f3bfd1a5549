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
import socket
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from functools import partial

import httpx

import idem
from serve.errors import ApiError
from serve.urls import NUMBER, REFUSED, TOO_LARGE, UNREACHABLE, Address, FetchSettings, Target, parse, permitted, refuse

log = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
Permit = Callable[[Address], bool]
Connect = Callable[[], httpx.AsyncBaseTransport]

MAX_TRIED = 3  # addresses of one name
REDIRECTS = (301, 302, 303, 307, 308)


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
