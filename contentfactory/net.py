"""HTTP to addresses that a user gave: only public ones, whatever a name resolves to and wherever a redirect leads.

The check sits where the connection is made: a name is resolved once, every address that it has must be public, and the
connection goes to the address that was checked. So neither a second, different answer of the name server nor a redirect
gets around it.
"""

import ipaddress
import re
import socket
import ssl
import time
from collections.abc import Iterable
from typing import Any

import httpcore
import httpx

from contentfactory.errors import InputError, TransientError

_MAPPED = (
    ipaddress.ip_network("64:ff9b::/96"),  # NAT64
    ipaddress.ip_network("64:ff9b:1::/48"),  # NAT64, local use
    ipaddress.ip_network("2002::/16"),  # 6to4
    ipaddress.ip_network("2001::/32"),  # Teredo
    ipaddress.ip_network("::ffff:0:0/96"),  # IPv4-mapped
)
MAX_REDIRECTS = 3
MAX_ADDRESSES = 4
"""Addresses of one name that are tried: a name may have hundreds, each worth a connection's time."""
_NUMERIC = re.compile(r"0x[0-9a-f]*|\d+", re.I)


def is_public(address: str) -> bool:
    """Whether an IP address belongs to the public internet: not loopback, private, link-local, CGNAT, multicast, reserved,
    nor an IPv6 form that carries an IPv4 address inside.
    """
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(ip, ipaddress.IPv6Address) and any(ip in network for network in _MAPPED):
        return False
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


def resolve(host: str, port: int, *, allow_private: bool = False) -> list[str]:
    """The addresses of a host.

    Raises:
        InputError: If one of them is not public.
        TransientError: If the name does not resolve now.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except UnicodeError:
        raise InputError(f"host {host!r} is no valid name", code="bad_url") from None
    except socket.gaierror as error:
        raise TransientError(f"host {host!r} does not resolve: {error.strerror}", code="dns") from None
    addresses = list(dict.fromkeys(str(info[4][0]) for info in found))
    if not allow_private:
        for address in addresses:
            if not is_public(address):
                raise InputError(f"host {host!r} has the address {address}, which is not public", code="address_refused")
    return addresses


class _TimedStream(httpcore.NetworkStream):
    """A connection that ends at a fixed moment, however steadily it drips: time-outs of single reads never add up to one."""

    def __init__(self, inner: httpcore.NetworkStream, end: float) -> None:
        self._inner = inner
        self._end = end

    def _left(self, timeout: float | None) -> float:
        left = self._end - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the time for the whole request is over")
        return left if timeout is None else min(left, timeout)

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        return self._inner.read(max_bytes, self._left(timeout))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._inner.write(buffer, self._left(timeout))

    def close(self) -> None:
        self._inner.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _TimedStream(self._inner.start_tls(ssl_context, server_hostname, self._left(timeout)), self._end)

    def get_extra_info(self, info: str) -> Any:
        return self._inner.get_extra_info(info)


class _CheckedBackend(httpcore.NetworkBackend):
    """Connects only to addresses that passed the check, until a fixed moment."""

    def __init__(self, allow_private: bool, end: float) -> None:
        self._inner = httpcore.SyncBackend()
        self._allow_private = allow_private
        self._end = end

    def connect_tcp(
        self, host: str, port: int, timeout: float | None = None, local_address: str | None = None, socket_options: Iterable[Any] | None = None
    ) -> httpcore.NetworkStream:
        last: Exception | None = None
        for address in resolve(host, port, allow_private=self._allow_private)[:MAX_ADDRESSES]:
            left = self._end - time.monotonic()
            if left <= 0:
                raise httpcore.ConnectTimeout("the time for the whole request is over")
            wait = left if timeout is None else min(left, timeout)
            try:
                stream = self._inner.connect_tcp(address, port, timeout=wait, local_address=local_address, socket_options=socket_options)
                return _TimedStream(stream, self._end)
            except (httpcore.ConnectError, httpcore.ConnectTimeout) as error:
                last = error
        raise last or httpcore.ConnectError(f"no address of {host} answers")

    def connect_unix_socket(self, path: str, timeout: float | None = None, socket_options: Iterable[Any] | None = None) -> httpcore.NetworkStream:
        raise httpcore.ConnectError("unix sockets are not allowed")

    def sleep(self, seconds: float) -> None:
        self._inner.sleep(seconds)


def client(
    *, timeout_s: float, allow_private: bool = False, follow_redirects: bool = True, total_s: float | None = None
) -> httpx.Client:
    """An HTTP client for addresses of users: no proxy of the environment, no cookies kept, redirects rechecked.

    Args:
        timeout_s: For connecting and for each read, seconds.
        allow_private: Whether private addresses are allowed (a closed test network).
        follow_redirects: Whether up to `MAX_REDIRECTS` redirects are followed.
        total_s: The client is of use for so many seconds from now; connections end then. Without a bound where left out.
    """
    end = time.monotonic() + total_s if total_s is not None else float("inf")
    transport = httpx.HTTPTransport(trust_env=False)
    # httpx has no public way to set the network backend of its pool; httpcore documents it for its own.
    transport._pool = httpcore.ConnectionPool(
        ssl_context=httpx.create_ssl_context(), network_backend=_CheckedBackend(allow_private, end), max_connections=10
    )
    return httpx.Client(
        transport=transport,
        timeout=httpx.Timeout(timeout_s, connect=min(10.0, timeout_s)),
        follow_redirects=follow_redirects,
        max_redirects=MAX_REDIRECTS,
        trust_env=False,
        headers={"user-agent": "contentfactory", "accept-encoding": "identity"},
        event_hooks={"request": [_check_request]},
    )


def _check_request(request: httpx.Request) -> None:
    """A redirect's address is no better than a user's; other schemes are refused by httpx."""
    if request.url.scheme in ("http", "https"):
        check_url(str(request.url))


def check_url(url: str) -> httpx.URL:
    """Parse an address.

    Raises:
        InputError: If it is not http(s), has no host, carries credentials, names a port of another service, or writes an
            IPv4 address in one of its odd forms.
    """
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, ValueError) as error:
        raise InputError(f"address {url[:200]!r} is malformed: {error}", code="bad_url") from None
    if parsed.scheme not in ("http", "https"):
        raise InputError(f"address {url[:200]!r} has the scheme {parsed.scheme!r}; allowed: http, https", code="bad_url")
    if not parsed.host:
        raise InputError(f"address {url[:200]!r} has no host", code="bad_url")
    if parsed.userinfo:
        raise InputError("an address must not carry a user name or password", code="bad_url")
    if parsed.port is not None and parsed.port not in (80, 443) and not 1024 <= parsed.port <= 65535:
        raise InputError(f"address {url[:200]!r} names port {parsed.port}; allowed: 80, 443, and 1024 to 65535", code="bad_url")
    # 2130706433, 0x7f.1 and 0177.0.0.1 are 127.0.0.1 to a resolver, and something else to whoever reads them.
    if ":" not in parsed.host and _NUMERIC.fullmatch(parsed.host.rstrip(".").rpartition(".")[2]):
        try:
            ipaddress.IPv4Address(parsed.host)
        except ValueError:
            raise InputError(f"address {url[:200]!r} has a host that is neither a name nor a plain IP address", code="bad_url") from None
    return parsed
