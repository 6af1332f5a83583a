"""Downloads of images that a client of a server names, without lending the client the server's own network.

A URL may name a machine that only the server can reach: itself, its neighbours, the metadata service of a cloud. So
the address is checked where the connection is made. The name is resolved once, every address it has must be public,
and the connection goes to one of those very addresses: a name that resolves differently a moment later gains nothing.
Redirects come through the same door.
"""

import asyncio
import logging
import socket
from collections.abc import Collection
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address
from urllib.parse import urljoin, urlsplit

import httpcore

logger = logging.getLogger(__name__)

MAX_REDIRECTS = 3

REDIRECTS = (301, 302, 303, 307, 308)

NAT64 = IPv6Network("64:ff9b::/96")
"""Addresses whose last 32 bits are an IPv4 address, which a gateway connects to."""


async def download_image(url: str, allowed_hosts: Collection[str], max_bytes: int, timeout: float) -> bytes:
    """
    Downloads a file from a public address.

    Args:
        url (`str`): begins with `http://` or `https://`.
        allowed_hosts (`Collection` of `str`): hosts, `name` or `name:port` as in URLs (IPv6 in brackets), that may have
            addresses of any kind.
        max_bytes (`int`): most bytes.
        timeout (`float`): seconds for everything, redirects included.

    Returns:
        `bytes`: the file.

    Raises:
        ValueError: if the URL is no such URL, leads to an address that is not public, or the file is too large or not to
            be had in time.
    """
    try:
        return await asyncio.wait_for(_follow(url, allowed_hosts, max_bytes), timeout)
    except (asyncio.TimeoutError, httpcore.TimeoutException) as error:
        raise ValueError(f"The image {url} was not there within {timeout} seconds.") from error
    except (httpcore.NetworkError, httpcore.ProtocolError, httpcore.UnsupportedProtocol, OSError) as error:
        raise ValueError(f"The image {url} cannot be downloaded ({error or type(error).__name__}).") from error


async def _follow(url: str, allowed_hosts: Collection[str], max_bytes: int) -> bytes:
    headers = [("User-Agent", "libra"), ("Accept", "image/*"), ("Accept-Encoding", "identity")]
    async with httpcore.AsyncConnectionPool(network_backend=_PublicNetwork(allowed_hosts)) as pool:
        for _ in range(MAX_REDIRECTS + 1):
            check_url(url)
            async with pool.stream("GET", url, headers=headers) as response:
                if response.status in REDIRECTS:
                    url = urljoin(url, _location(response, url))
                    continue
                if response.status != 200:
                    raise ValueError(f"The image {url} cannot be downloaded: the server answers {response.status}.")
                return await _read(response, url, max_bytes)
    raise ValueError(f"The image is behind more than {MAX_REDIRECTS} redirects; the last one was to {url}.")


def _location(response: httpcore.Response, url: str) -> str:
    for name, value in response.headers:
        if name.lower() == b"location":
            return value.decode("latin-1")
    raise ValueError(f"The image {url} cannot be downloaded: a redirect without a target.")


async def _read(response: httpcore.Response, url: str, max_bytes: int) -> bytes:
    data = bytearray()
    async for chunk in response.aiter_stream():
        data += chunk
        if len(data) > max_bytes:
            raise ValueError(f"The image {url} has more than {max_bytes} bytes, the most this server reads.")
    return bytes(data)


def check_url(url: str) -> None:
    """
    Refuses what is not a plain http(s) URL.

    Raises:
        ValueError: if it has another scheme (`file:` for instance), no host, a user name, or characters beyond ASCII.
    """
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(
            f"An image must be an http(s) URL or a base64 data URI (data:image/png;base64,...), found {url[:100]!r}."
        )
    if parts.username is not None or parts.password is not None:
        raise ValueError(f"The image URL of {parts.hostname} holds a user name; leave it out.")
    if not url.isascii() or not url.isprintable() or " " in url:
        raise ValueError(f"The image URL {url[:100]!r} holds characters that must be percent-encoded.")


class _PublicNetwork(httpcore.AsyncNetworkBackend):
    """Connections as usual, but only to public addresses. TLS still checks the certificate against the host's name."""

    def __init__(self, allowed_hosts: Collection[str]):
        self.allowed_hosts = {host.lower() for host in allowed_hosts}
        self.backend = httpcore.AnyIOBackend()

    async def connect_tcp(self, host, port, timeout=None, local_address=None, socket_options=None):
        addresses = await resolve(host, port)
        if not self._is_allowed(host.lower().strip("[]"), port):
            for address in addresses:
                if not is_public(address):
                    # Not to the client: what names mean inside is the operator's.
                    logger.warning("Refused an image: %s has the address %s, which is not public.", host, address)
                    raise ValueError(
                        f"The image host {host} is not public; this server downloads from public addresses only."
                    )
        return await self.backend.connect_tcp(addresses[0], port, timeout, local_address, socket_options)

    def _is_allowed(self, host: str, port: int) -> bool:
        forms = {host, f"{host}:{port}", f"[{host}]", f"[{host}]:{port}"}
        return not forms.isdisjoint(self.allowed_hosts)

    async def sleep(self, seconds):
        await self.backend.sleep(seconds)


async def resolve(host: str, port: int) -> list[str]:
    """
    All addresses of a host, IPv4 first.

    Raises:
        ValueError: if it has none.
    """
    loop = asyncio.get_running_loop()
    try:
        found = await loop.getaddrinfo(host.strip("[]"), port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ValueError(f"The image host {host} is unknown.") from error
    return [str(entry[4][0]) for entry in sorted(found, key=lambda entry: entry[0] != socket.AF_INET)]


def is_public(address: str) -> bool:
    """
    Whether an address is one that anybody on the internet could reach.

    Args:
        address (`str`): IPv4 or IPv6. Of an IPv6 address that stands for an IPv4 one (mapped, NAT64, 6to4), that one
            decides.

    Returns:
        `bool`: `False` for loopback, private, link-local, shared, multicast, reserved and unspecified addresses.
    """
    ip = _inner(ip_address(address))
    is_site_local = isinstance(ip, IPv6Address) and ip.is_site_local  # long deprecated; Python takes it for global
    return ip.is_global and not (ip.is_multicast or ip.is_reserved or ip.is_unspecified or is_site_local)


def _inner(ip: IPv4Address | IPv6Address) -> IPv4Address | IPv6Address:
    if isinstance(ip, IPv4Address):
        return ip
    if ip in NAT64:
        return IPv4Address(int(ip) & 0xFFFFFFFF)
    return ip.ipv4_mapped or ip.sixtofour or ip
