"""Which URLs may be fetched: read strictly and built anew from their parts, so that no second parser takes one for another.

A host must be listed, and an address public (by IANA's registries) before anything is connected to; serve.fetch does that.
"""

import ipaddress
import re
from dataclasses import dataclass
from typing import Annotated, Literal
from urllib.parse import quote, urljoin, urlsplit

import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from serve.errors import ApiError

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

INVALID, REFUSED, UNREACHABLE, TOO_LARGE = (f"image_url_{why}" for why in ("invalid", "not_allowed", "unreachable", "too_large"))
MAX_URL = 2_048  # characters
DEFAULT_PORTS = {"https": 443, "http": 80}
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
