"""Fetches media from the hosts that an operator named, and from nowhere else.

One strict grammar reads an address, and no other parser sees it afterwards: what two parsers could read in two ways
(user information, backslashes, tabs, escaped or full-width characters in a host, short and octal IPv4, zones) is
refused. The host and port must be on the list, whole; only then a name is resolved, once, and the connection goes to
the addresses found, which must all be public, with TLS for the name. One GET, no redirect, no proxy; bytes are counted
while they are read, and one time limit holds for all of it.

Knows addresses and bytes. Must not know what the bytes are (`media.load` tells, by themselves) or who asks. Messages
name no address and nothing that was found on the way.
"""

import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, NamedTuple

import anyio
import httpcore2
import idna

from adaptive_fusion.errors import ConfigError, MediaRefused

Resolve = Callable[[str, int], Awaitable[Sequence[str]]]
"""From a host name and a port to IP addresses as texts."""
MAX_CHARACTERS = 4096
"""Most characters of an address."""
_HEADERS = (
    ("User-Agent", "adaptive-fusion"),
    ("Accept", "image/*, video/*"),
    ("Accept-Encoding", "identity"),
    ("Connection", "close"),
)
_HTTPS = 443
_MOST_TRIED = 4
_ADDRESS = re.compile(
    r"[Hh][Tt][Tt][Pp][Ss]://"  # spelled out: ignoring case, the long s would pass
    r"(?P<host>\[[0-9A-Fa-f:.]{2,45}\]|[^\x00-\x20\x7f/?#@:\\\[\]%]{1,253})"
    r"(?::(?P<port>[1-9][0-9]{0,4}))?"
    r"(?P<target>[/?](?:%[0-9A-Fa-f]{2}|[A-Za-z0-9\-._~:/?\[\]@!$&'()*+,;=])*)?"
)
_LABEL = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")
_ASCII_LOWER = {upper: upper + 32 for upper in range(ord("A"), ord("Z") + 1)}
_Network = ipaddress.IPv4Network | ipaddress.IPv6Network
_NOT_PUBLIC: tuple[_Network, ...] = tuple(
    ipaddress.ip_network(text)
    for text in (
        "168.63.129.16/32",  # Azure's own services for its machines
        "192.0.0.0/24",  # protocols, and a cloud's metadata; older versions of Python call parts of it global
        "192.88.99.0/24",  # relays of 6to4
        "2001::/23",  # Teredo and other protocols
        "2002::/16",  # 6to4: an IPv4 address is inside
        "3fff::/20",  # documentation
    )
)
_UNICAST = ipaddress.IPv6Network("2000::/3")
"""Of IPv6 only this is routed; outside are IPv4 in other clothes (mapped, compatible, NAT64), local and multicast."""
_ISATAP = (0x00005EFE, 0x02005EFE)


class Origin(NamedTuple):
    """A host, lower-case ASCII or the canonical text of an IP address, and a port."""

    host: str
    port: int

    def header(self) -> str:
        """As a Host header has it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == _HTTPS else f"{host}:{self.port}"


class Address(NamedTuple):
    """Where a medium is."""

    origin: Origin
    target: str


def allowed_origins(domains: Iterable[str]) -> frozenset[Origin]:
    """The list of an operator: hosts or IP addresses (IPv6 in brackets), with a port where it is not 443.

    Raises:
        ConfigError: For a pattern, an address with a path, or anything else that is no host.
    """
    if isinstance(domains, str):
        raise ConfigError(f"allowed media domains are the text {domains[:80]!r}; expected a list of hosts")
    found = set()
    for domain in domains:
        address = _read(f"https://{domain}") if isinstance(domain, str) else None
        if address is None or address.target != "/" or domain.endswith(("/", "?")):
            raise ConfigError(
                f"allowed media domain is {str(domain)[:80]!r}; expected a whole host such as media.example.com, "
                "192.0.2.7:8443 or [2001:db8::7]"
            )
        found.add(address.origin)
    return frozenset(found)


def read_address(text: str, allowed: frozenset[Origin]) -> Address:
    """An https address on the list of allowed origins.

    Raises:
        MediaRefused: For anything else, a local path among it.
    """
    if not allowed:
        raise MediaRefused("addresses are not fetched here; expected a data: URL in base64", "address")
    address = _read(text)
    if address is None:
        raise MediaRefused(
            "the address is not one that is read; expected a data: URL in base64 or https://host/path in plain "
            f"characters, of at most {MAX_CHARACTERS}, without user, fragment or backslash",
            "address",
        )
    if address.origin not in allowed:
        raise MediaRefused("the address's host is not one that media are fetched from here", "address")
    return address


def is_public(address: str) -> bool:
    """Whether a text is an IP address of the public internet, with no other address inside."""
    try:
        found = ipaddress.ip_address(address)
    except ValueError:
        return False
    if not found.is_global or found.is_multicast or any(found in network for network in _NOT_PUBLIC):
        return False
    if isinstance(found, ipaddress.IPv6Address):
        return found in _UNICAST and found.scope_id is None and (int(found) >> 32) & 0xFFFFFFFF not in _ISATAP
    return True


class Fetcher:
    """Gets media from allowed origins.

    Args:
        allowed: Hosts and ports, see `allowed_origins`.
        timeout_s: For all of a fetch: names, connection, TLS and reading.
        trust: Certificates that are believed; None takes the system's.
        resolve: Turns a name into addresses.
        network: Opens connections to IP addresses.
    """

    def __init__(
        self,
        allowed: frozenset[Origin],
        *,
        timeout_s: float,
        trust: ssl.SSLContext | None = None,
        resolve: Resolve | None = None,
        network: httpcore2.AsyncNetworkBackend | None = None,
    ) -> None:
        self.allowed, self._timeout_s = allowed, timeout_s
        self._trust = trust if trust is not None else httpcore2.default_ssl_context()
        self._resolve = resolve if resolve is not None else _resolve
        self._network = network if network is not None else httpcore2.AnyIOBackend()

    async def fetch(self, address: Address, most: int, spend: Callable[[int], None] = lambda size: None) -> bytes:
        """The bytes at an address.

        Args:
            address: As `read_address` gives it.
            most: Bytes that are read before it is refused.
            spend: Told of each piece as it comes; may refuse it.

        Raises:
            MediaRefused: If it cannot be had, is larger, takes too long, or the name leads to where no media are.
        """
        if address.origin not in self.allowed:
            raise MediaRefused("the address's host is not one that media are fetched from here", "address")
        try:
            with anyio.fail_after(self._timeout_s):
                return await self._get(address, await self._addresses(address.origin), most, spend)
        except MediaRefused:
            raise
        except (TimeoutError, httpcore2.TimeoutException) as error:
            raise MediaRefused(f"the medium could not be fetched within {self._timeout_s:g} s", "fetch") from error
        except Exception as error:  # what comes over a network can raise anything; it is told nobody
            raise MediaRefused("the medium could not be fetched: the connection failed", "fetch") from error

    async def _addresses(self, origin: Origin) -> Sequence[str]:
        """Where to connect: the literal that the operator allows, or what the name stands for, all of it public."""
        if _is_literal(origin.host):
            return [origin.host]
        found = await self._resolve(origin.host, origin.port)
        named = {host for host, port in self.allowed if port == origin.port and _is_literal(host)}
        if not found or not all(is_public(ip) or ip in named for ip in found):
            raise MediaRefused("the medium could not be fetched: its host has no public address", "fetch")
        return list(dict.fromkeys(found))[:_MOST_TRIED]

    async def _get(self, address: Address, pinned: Sequence[str], most: int, spend: Callable[[int], None]) -> bytes:
        origin = address.origin
        url = httpcore2.URL(
            scheme=b"https", host=origin.host.encode(), port=origin.port, target=address.target.encode()
        )
        headers = [("Host", origin.header()), *_HEADERS]
        network = _Pinned(self._network, pinned, self._timeout_s)
        data = bytearray()
        async with (
            httpcore2.AsyncConnectionPool(ssl_context=self._trust, max_connections=1, network_backend=network) as pool,
            pool.stream("GET", url, headers=headers) as response,
        ):
            _check_response(response.status, response.headers, most)
            async for piece in response.aiter_stream():
                if len(data) + len(piece) > most:
                    raise _too_large(most)
                spend(len(piece))
                data += piece
        return bytes(data)


class _Pinned(httpcore2.AsyncNetworkBackend):
    """Connects to the given addresses in turn, whatever host it is asked for."""

    def __init__(self, network: httpcore2.AsyncNetworkBackend, addresses: Sequence[str], timeout_s: float) -> None:
        self._network, self._addresses, self._timeout_s = network, addresses, timeout_s

    async def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[Any] | None = None,
    ) -> httpcore2.AsyncNetworkStream:
        share_s = self._timeout_s / len(self._addresses)
        for address in self._addresses[:-1]:
            try:
                return await self._network.connect_tcp(address, port, share_s, local_address, socket_options)
            except (httpcore2.ConnectError, httpcore2.ConnectTimeout):
                continue
        return await self._network.connect_tcp(self._addresses[-1], port, share_s, local_address, socket_options)

    async def connect_unix_socket(self, *args: Any, **kwargs: Any) -> httpcore2.AsyncNetworkStream:
        raise httpcore2.ConnectError("media do not come from sockets of this machine")


def _read(text: str) -> Address | None:
    """An address by the one grammar, or None."""
    found = _ADDRESS.fullmatch(text) if len(text) <= MAX_CHARACTERS else None
    host = _host(found["host"]) if found else None
    if found is None or host is None or int(found["port"] or _HTTPS) > 0xFFFF:
        return None
    target = found["target"] or "/"
    return Address(Origin(host, int(found["port"] or _HTTPS)), target if target[0] == "/" else f"/{target}")


def _host(text: str) -> str | None:
    """A host in its canonical form; None for what is none, or for a name that some would read as a number."""
    try:
        if text.startswith("["):
            return str(ipaddress.IPv6Address(text[1:-1]))
        text = text.translate(_ASCII_LOWER)
        if not text.isascii():
            # By IDNA 2008 without mapping: full-width letters, other dots and ligatures are no host.
            text = idna.encode(text, strict=True).decode("ascii")
        labels = text.split(".")
        if len(text) > 253 or not all(map(_LABEL.fullmatch, labels)):
            return None
        return str(ipaddress.IPv4Address(text)) if _NUMBER.fullmatch(labels[-1]) else text
    except ValueError:
        return None


def _is_literal(host: str) -> bool:
    return ":" in host or host.rpartition(".")[2].isdigit()


async def _resolve(host: str, port: int) -> Sequence[str]:
    found = await anyio.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(where[0]) for *_, where in found]


def _check_response(status: int, headers: Iterable[tuple[bytes, bytes]], most: int) -> None:
    """Refuse what is no plain answer of a size that is taken."""
    if 300 <= status < 400:
        raise MediaRefused("the medium could not be fetched: its host redirects, which is not followed", "fetch")
    if status != 200:
        raise MediaRefused(f"the medium could not be fetched: its host answered with status {status}", "fetch")
    for name, value in headers:
        if name.lower() == b"content-encoding" and value.lower() != b"identity":
            raise MediaRefused("the medium could not be fetched: its host sends it compressed unasked", "fetch")
        if name.lower() == b"content-length" and int(value) > most:
            raise _too_large(most)


def _too_large(most: int) -> MediaRefused:
    return MediaRefused(f"the medium is larger than {most / (1 << 20):g} MiB, the most that is read of one", "size")
