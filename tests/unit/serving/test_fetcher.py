"""Media come from allowed hosts alone: hostile addresses open no socket, hostile servers meet limits."""

import asyncio
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpcore2
import pytest
import trustme
from hypothesis import given
from hypothesis import strategies as st

from adaptive_fusion.errors import ConfigError, MediaRefused
from adaptive_fusion.serving.fetcher import Address, Fetcher, Origin, allowed_origins, is_public, read_address

ALLOWED = allowed_origins(["media.example.com", "cdn.example.com:8443", "bücher.example", "203.0.113.9:444"])
HOSTILE = [
    # no https, or no address at all
    "http://media.example.com/a.png", "ftp://media.example.com/a.png", "file:///etc/passwd", "/etc/passwd",
    "//media.example.com/a.png", "https:media.example.com/a.png", "https:/media.example.com/a.png",
    "https:///media.example.com/a.png", "gopher://media.example.com/", "httpſ://media.example.com/a.png",
    "", " ", "media.example.com/a.png", "view-source:https://media.example.com/a.png",
    "blob:https://media.example.com/a.png", "jar:https://media.example.com/a.png!/b", "\\\\media.example.com\\a.png",
    # one parser reads the allowed host, another one something else
    "http://169.254.169.254\\@media.example.com", "https://169.254.169.254\\@media.example.com/a.png",
    "https://media.example.com\\@169.254.169.254/a.png", "https://media.example.com@169.254.169.254/",
    "https://media.example.com:443@169.254.169.254/", "https://169.254.169.254#@media.example.com/",
    "https://169.254.169.254?@media.example.com/", "https://a:b@media.example.com/a.png",
    "https://media.example.com#.evil.example/a.png", "https://media.example.com%2f@evil.example/",
    "https://media.example.com%00.evil.example/", "https://media.example.com;.evil.example/",
    "https://evil.example/https://media.example.com/a.png", "https://media.example.com:443:80/a.png",
    "https://media.example.com:/a.png", "https://media.example.com:0443/a.png", "https://media.example.com:+443/",
    "https://media.example.com:٤٤٣/a.png", "https://media.example.com/a.png\r\nHost: evil.example",
    "https://media.example.com/a b.png", "https://media.example.com/a\\..\\b", "https://media.example.com/a#b",
    "https://media.example.com/%zz", "https://media.example.com/ü.png", "ht\ttps://media.example.com/a.png",
    "https://media.exa\nmple.com/a.png", "https://media.example.com\t/a.png", " https://media.example.com/a.png",
    "https://media.example.com/a.png ", "\x00https://media.example.com/a.png",
    # the host is nearly the allowed one
    "https://media.example.com.evil.example/a.png", "https://evilmedia.example.com/", "https://x.media.example.com/",
    "https://media.example.com./a.png", "https://.media.example.com/", "https://media..example.com/",
    "https://media。example。com/a.png", "https://media．example．com/a.png", "https://ⓜedia.example.com/",
    "https://mediа.example.com/a.png", "https://media.example.com\u200b/a.png", "https://media.example.ⅽom/",
    "https://%6dedia.example.com/a.png", "https://media%2eexample%2ecom/", "https://media_.example.com/",
    "https://xn--media-.example.com/", "https://bu\u0308cher.example/", "https://*.example.com/", "https://example.com/",
    "https://mEdia.example.\u212aom/",
    # the port is another
    "https://media.example.com:8443/a.png", "https://media.example.com:80/", "https://cdn.example.com/a.png",
    "https://media.example.com:99999/", "https://media.example.com:65979/", "https://203.0.113.9/",
    # the machine itself, its neighbours and its keeper, in every spelling
    "https://localhost/", "https://127.0.0.1/", "https://127.1/", "https://2130706433/", "https://0x7f000001/",
    "https://0x7f.0.0.1/", "https://0177.0.0.1/", "https://127.0.0.01/", "https://0/", "https://127.0.0.1.nip.io/",
    "https://[::1]/", "https://[::]/", "https://[::ffff:127.0.0.1]/", "https://[::ffff:7f00:1]/",
    "https://[::127.0.0.1]/", "https://[64:ff9b::7f00:1]/", "https://[fe80::1%25eth0]/", "https://[fe80::1%eth0]/",
    "https://[fd00:ec2::254]/", "https://[v1.fe80]/", "https://[::1", "https://::1/", "https://[media.example.com]/",
    "https://169.254.169.254/latest/meta-data/", "https://metadata.google.internal/", "https://100.100.100.200/",
    "https://①⑥⑨.254.169.254/", "https://169。254。169。254/", "https://１２７.0.0.1/", "https://203.0.113.9.:444/",
    "https://203.0.113.009:444/", "https://0313.0.0161.011:444/", "https://[::ffff:203.0.113.9]:444/",
    "https://media.example.com/" + "a" * 5000, "https://" + "a." * 2000 + "example.com/",
]  # fmt: skip
LOCAL = [
    "0.0.0.0", "10.0.0.5", "100.64.0.1", "100.100.100.200", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.0.0.192",
    "192.0.2.1", "192.168.1.1", "192.88.99.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "168.63.129.16", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1",
    "64:ff9b::808:808", "64:ff9b:1::1", "100::1", "2001::1", "2001:db8::1", "2002:7f00:1::1", "3fff::1", "fc00::1",
    "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1", "2600::5efe:7f00:1", "2600::200:5efe:a00:1",
    "5f00::1", "", "media.example.com", "8.8.8.8/32",
]  # fmt: skip
TRUST = ssl.create_default_context()
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40


class Counting(httpcore2.AsyncNetworkBackend):
    """Opens connections and keeps where to; with `real` False each fails instead."""

    def __init__(self, real: bool = True) -> None:
        self.real, self.opened = real, list[tuple[str, int]]()

    async def connect_tcp(self, host: str, port: int, *rest: Any, **named: Any) -> httpcore2.AsyncNetworkStream:
        self.opened.append((host, port))
        if not self.real:
            raise httpcore2.ConnectError("refused")
        return await httpcore2.AnyIOBackend().connect_tcp(host, port, *rest, **named)


def names(*found: str, asked: list[str] | None = None) -> Callable[[str, int], Awaitable[Sequence[str]]]:
    """A resolver that knows one answer, and keeps what it was asked."""

    async def resolve(host: str, port: int) -> Sequence[str]:
        if asked is not None:
            asked.append(host)
        return found

    return resolve


@pytest.mark.parametrize("url", HOSTILE)
def test_a_hostile_address_opens_no_socket_and_asks_for_no_name(url: str) -> None:
    network, asked = Counting(real=False), list[str]()
    fetcher = Fetcher(ALLOWED, timeout_s=1, trust=TRUST, resolve=names("93.184.216.34", asked=asked), network=network)
    with pytest.raises(MediaRefused) as caught:
        asyncio.run(fetcher.fetch(read_address(url, ALLOWED), 1000))
    assert caught.value.reason == "address" and not network.opened and not asked
    assert not re.search(r"\d+\.\d+\.\d+|example|passwd|evil", str(caught.value))


def test_allowed_addresses_are_read_as_they_are_meant() -> None:
    for url, host, port, target in (
        ("https://media.example.com/a/../b.png?x=1&y=%2F", "media.example.com", 443, "/a/../b.png?x=1&y=%2F"),
        ("HTTPS://MEDIA.Example.COM:443", "media.example.com", 443, "/"),
        ("https://media.example.com?x", "media.example.com", 443, "/?x"),
        ("https://media.example.com/@other.example:80/", "media.example.com", 443, "/@other.example:80/"),
        ("https://cdn.example.com:8443/a", "cdn.example.com", 8443, "/a"),
        ("https://bücher.example/a", "xn--bcher-kva.example", 443, "/a"),
        ("https://xn--bcher-kva.example/a", "xn--bcher-kva.example", 443, "/a"),
        ("https://203.0.113.9:444/a", "203.0.113.9", 444, "/a"),
    ):
        assert read_address(url, ALLOWED) == Address(Origin(host, port), target)
    assert allowed_origins(["[2001:DB8:0::7]:444"]) == {Origin("2001:db8::7", 444)}


@given(st.text() | st.builds("https://{}media.example.com{}".format, st.text(max_size=5), st.text(max_size=9)))
def test_any_text_is_an_allowed_address_or_refused(text: str) -> None:
    try:
        address = read_address(text, ALLOWED)
    except MediaRefused:
        return
    assert address.origin in ALLOWED and address.target.isascii() and address.target.isprintable()
    assert text.lower().startswith("https://media.example.com")


@pytest.mark.parametrize(
    "domain",
    ["*.example.com", "https://example.com", "example.com/a", "a@example.com", "example.com:0", "", "::1", "10.1",
     "example.com.", "example.com/", "example.com?", "exa mple.com", None, 5],
)  # fmt: skip
def test_a_list_of_allowed_hosts_holds_whole_hosts_only(domain: Any) -> None:
    with pytest.raises(ConfigError, match=r"allowed media domain is .*; expected a whole host such as"):
        allowed_origins([domain])
    with pytest.raises(ConfigError, match=r"are the text 'example\.com'; expected a list"):
        allowed_origins("example.com")


def test_a_name_that_leads_to_an_address_which_is_not_public_opens_no_socket() -> None:
    for bad in LOCAL:
        assert not is_public(bad), bad
        for found in ((bad,), ("93.184.216.34", bad), ()):
            network = Counting(real=False)
            fetcher = Fetcher(ALLOWED, timeout_s=1, trust=TRUST, resolve=names(*found), network=network)
            with pytest.raises(MediaRefused, match="no public address"):
                asyncio.run(fetcher.fetch(Address(Origin("media.example.com", 443), "/"), 1000))
            assert not network.opened
    assert is_public("93.184.216.34") and is_public("2606:2800:220:1:248:1893:25c8:1946")


def test_a_name_is_resolved_once_and_its_addresses_are_all_that_is_connected_to() -> None:
    asked, network = list[str](), Counting(real=False)
    found = ("93.184.216.34", "2606:2800:220::1", "93.184.216.34")
    fetcher = Fetcher(ALLOWED, timeout_s=1, trust=TRUST, resolve=names(*found, asked=asked), network=network)
    with pytest.raises(MediaRefused, match="the connection failed"):
        asyncio.run(fetcher.fetch(Address(Origin("cdn.example.com", 8443), "/a"), 1000))
    assert asked == ["cdn.example.com"]
    assert network.opened == [("93.184.216.34", 8443), ("2606:2800:220::1", 8443)]


def test_a_fetcher_goes_nowhere_else_even_if_it_is_told_to() -> None:
    network = Counting(real=False)
    with pytest.raises(MediaRefused) as caught:
        asyncio.run(Fetcher(ALLOWED, timeout_s=1, network=network).fetch(Address(Origin("127.0.0.1", 443), "/"), 9))
    assert caught.value.reason == "address" and not network.opened


# A real TLS server on this machine, whose certificate a test authority has signed.

AUTHORITY = trustme.CA()
Answer = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]


@asynccontextmanager
async def server(answer: Answer) -> AsyncIterator[int]:
    """Serves `answer` for each request's head; gives the port."""
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    AUTHORITY.issue_cert("127.0.0.1", "media.example.com").configure_cert(tls)

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await answer(await reader.readuntil(b"\r\n\r\n"), writer)
        except (ConnectionError, asyncio.IncompleteReadError):
            pass  # the client went away, as it should
        finally:
            writer.close()

    running = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    async with running:
        yield running.sockets[0].getsockname()[1]


def trusting() -> ssl.SSLContext:
    trust = ssl.create_default_context()
    AUTHORITY.configure_trust(trust)
    return trust


def fetched(answer: Answer, most: int = 1 << 20, timeout_s: float = 20, **options: Any) -> bytes:
    """What a fetcher gets from a server with that answer, under the server's literal address."""

    async def run() -> bytes:
        async with server(answer) as port:
            allowed = allowed_origins([f"127.0.0.1:{port}"])
            fetcher = Fetcher(allowed, timeout_s=timeout_s, **{"trust": trusting(), **options})
            return await fetcher.fetch(read_address(f"https://127.0.0.1:{port}/a.png?b=1", allowed), most)

    return asyncio.run(run())


def says(*pieces: bytes, head: str = "200 OK\r\n") -> Answer:
    async def answer(_: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 {head}\r\n".encode() + b"".join(pieces))
        await writer.drain()

    return answer


def test_a_medium_of_an_allowed_literal_is_fetched() -> None:
    heads = []

    async def answer(head: bytes, writer: asyncio.StreamWriter) -> None:
        heads.append(head)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(PICTURE) + PICTURE)

    spent = list[int]()
    assert fetched(answer) == PICTURE
    head = heads[0].decode().lower()
    assert head.startswith("get /a.png?b=1 http/1.1\r\nhost: 127.0.0.1:") and "accept-encoding: identity" in head
    assert "cookie" not in head and "authorization" not in head and not spent


def test_a_name_is_checked_by_tls_though_the_connection_goes_to_an_address() -> None:
    async def run(name: str) -> bytes:
        async with server(says(PICTURE)) as port:
            allowed = allowed_origins([f"{name}:{port}", f"127.0.0.1:{port}"])
            fetcher = Fetcher(allowed, timeout_s=20, trust=trusting(), resolve=names("127.0.0.1"))
            return await fetcher.fetch(read_address(f"https://{name}:{port}/", allowed), 1 << 20)

    assert asyncio.run(run("media.example.com")) == PICTURE
    with pytest.raises(MediaRefused, match="the connection failed"):
        asyncio.run(run("other.example.com"))


def test_a_certificate_that_nobody_vouches_for_is_refused() -> None:
    with pytest.raises(MediaRefused, match="the connection failed"):
        fetched(says(PICTURE), trust=TRUST)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (says(head="302 Found\r\nLocation: http://169.254.169.254/latest/\r\n"), "redirects, which is not followed"),
        (says(head="404 Not Found\r\nContent-Length: 0\r\n"), "answered with status 404"),
        (says(head="206 Partial Content\r\nContent-Length: 0\r\n"), "answered with status 206"),
        (says(b"x", head="200 OK\r\nContent-Encoding: gzip\r\n"), "compressed unasked"),
        (says(head="200 OK\r\nContent-Length: 99999999999999\r\n"), "larger than 1 MiB"),
        (says(b"short", head="200 OK\r\nContent-Length: 100\r\n"), "the connection failed"),
        (says(b"zz\r\n", head="200 OK\r\nTransfer-Encoding: chunked\r\n"), "the connection failed"),
        (says(head="200 OK\r\n" + "X: y\r\n" * 30000), "the connection failed"),
        (says(head="garbage\r\n"), "the connection failed"),
    ],
    ids=range(9),
)
def test_what_is_no_plain_answer_is_refused_without_details(answer: Answer, message: str) -> None:
    with pytest.raises(MediaRefused, match=message) as caught:
        fetched(answer)
    assert not re.search(r"\d+\.\d+\.\d+|https?:|/", str(caught.value))


def test_a_body_without_end_is_cut_while_it_is_read() -> None:
    sent = 0

    async def answer(_: bytes, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(bytes(1 << 16))
            await writer.drain()
            sent += 1 << 16

    with pytest.raises(MediaRefused, match=r"larger than 0\.25 MiB") as caught:
        fetched(answer, most=1 << 18)
    assert caught.value.reason == "size" and sent < 1 << 24  # what fits into the buffers between the two


@pytest.mark.parametrize("slow", ["head", "body"])
def test_a_server_that_drips_meets_the_time_limit(slow: str) -> None:
    async def answer(_: bytes, writer: asyncio.StreamWriter) -> None:
        if slow == "body":
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
        while True:
            writer.write(b"H" if slow == "body" else b"HTTP/1.1 100 Continue\r\n\r\n")
            await writer.drain()
            await asyncio.sleep(0.01)

    with pytest.raises(MediaRefused, match=r"within 0\.3 s"):
        fetched(answer, timeout_s=0.3)


def test_a_name_server_without_an_answer_meets_the_time_limit() -> None:
    async def resolve(host: str, port: int) -> Sequence[str]:
        await asyncio.Event().wait()
        return ()

    fetcher = Fetcher(ALLOWED, timeout_s=0.05, trust=TRUST, resolve=resolve, network=Counting(real=False))
    with pytest.raises(MediaRefused, match=r"within 0\.05 s"):
        asyncio.run(fetcher.fetch(Address(Origin("media.example.com", 443), "/"), 9))
