"""Fetching images of allowed hosts: never from private addresses, nor after a redirect to another host."""

from __future__ import annotations

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Collection
from urllib.parse import SplitResult, urljoin, urlsplit

from metamorph.serving.errors import ApiError


MAX_REDIRECTS = 3
_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK = 2**16

Resolve = Callable[[str, int], str]
"""The address of a host and port to connect to."""


def fetch_image(
    url: str, hosts: Collection[str], *, max_bytes: int, timeout: float, resolve: Resolve | None = None
) -> bytes:
    """The content of an http(s) URL of one of `hosts`, or of its subdomains if the host begins with a dot.

    `timeout` seconds are for all of it. `resolve` finds the address, by default a public one. Whatever is wrong is an
    [`ApiError`].
    """
    end = time.monotonic() + timeout
    for _ in range(MAX_REDIRECTS + 1):
        address = _checked(url, hosts)
        try:
            content, location = _get(address, max_bytes, end, resolve or public_address)
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            raise ApiError(f"the image at {address.hostname} cannot be fetched: {error}", code="image_fetch") from error
        if location is None:
            return content
        url = urljoin(url, location)
    raise ApiError(f"the image at {address.hostname} needs more than {MAX_REDIRECTS} redirects", code="image_fetch")


def public_address(host: str, port: int) -> str:
    """The first address of a host; an `OSError` unless all of them are public."""
    found = [str(entry[4][0]) for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
    if not all(ipaddress.ip_address(each.partition("%")[0]).is_global for each in found):
        raise OSError("its address is not public")
    return found[0]


def _checked(url: str, hosts: Collection[str]) -> SplitResult:
    try:
        address = urlsplit(url)
        host, port = (address.hostname or "").lower(), address.port
    except ValueError as error:
        raise ApiError(f"{url[:60]!r} is not a URL: {error}", code="image_url") from error
    if address.scheme not in ("http", "https"):
        raise ApiError("images are data: URLs, or http(s) URLs of allowed hosts", code="image_url")
    is_allowed = any(host == each or (each.startswith(".") and host.endswith(each)) for each in hosts)
    if not is_allowed or port not in (None, 80, 443):
        allowed = f"only from {', '.join(sorted(hosts))}, at the usual ports" if hosts else "send a data: URL"
        raise ApiError(f"images are not fetched from {address.netloc[:60]}: {allowed}", code="image_url")
    return address


def _get(address: SplitResult, max_bytes: int, end: float, resolve: Resolve) -> tuple[bytes, str | None]:
    """The content, or where it has moved. The connection is to the address that was checked."""
    is_https, host = address.scheme == "https", address.hostname or ""
    port = address.port or (443 if is_https else 80)
    connection = http.client.HTTPConnection(host, port, timeout=_left(end))
    connection.sock = socket.create_connection((resolve(host, port), port), timeout=_left(end))
    try:
        if is_https:
            connection.sock = ssl.create_default_context().wrap_socket(connection.sock, server_hostname=host)
        path = f"{address.path or '/'}{'?' if address.query else ''}{address.query}"
        connection.request("GET", path, headers={"Host": host, "Accept": "image/*", "User-Agent": "metamorph"})
        response = connection.getresponse()
        if response.status in _REDIRECTS and (location := response.headers["Location"]):
            return b"", location
        if response.status != 200:
            raise OSError(f"status {response.status}")
        content = bytearray()
        while chunk := response.read1(_CHUNK):
            content += chunk
            if len(content) > max_bytes:
                raise OSError(f"it has more than {max_bytes} bytes")
            if connection.sock is not None:
                connection.sock.settimeout(_left(end))
        return bytes(content), None
    finally:
        connection.close()


def _left(end: float) -> float:
    left = end - time.monotonic()
    if left <= 0:
        raise TimeoutError("it takes too long")
    return left
