"""Images of requests: data URLs, and https from listed hosts. Nothing about them is trusted."""

import base64
import binascii
import http.client
import ipaddress
import queue
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from urllib.parse import urlsplit

from instructblip.serving.config import ServeConfig
from instructblip.serving.decoder import BadImage

_GLOBAL = ipaddress.ip_network("2000::/3")
"""All IPv6 addresses that are given out."""
_NAT64 = ipaddress.ip_network("64:ff9b::/96")


def read_url(url: str, config: ServeConfig, where: str) -> bytes:
    """The image file behind a URL. Raises BadImage, naming ``where`` in the request."""
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        data = _read_data_url(url, config, where)
    elif scheme.startswith("https://"):
        data = fetch(url, config, where)
    else:
        raise BadImage(f"{where}: expected data:image/...;base64,... as the URL of an image")
    if len(data) > config.max_picture_bytes:
        raise BadImage(f"{where}: more than {config.max_picture_bytes} bytes", 413)
    return data


def _read_data_url(url: str, config: ServeConfig, where: str) -> bytes:
    header, comma, content = url.partition(",")
    if not comma or len(header) > 200 or not header.lower().endswith(";base64"):
        raise BadImage(f"{where}: a data URL begins with data:image/...;base64, before its content")
    if len(content) > config.max_picture_bytes * 3:
        raise BadImage(f"{where}: more than {config.max_picture_bytes} bytes", 413)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise BadImage(f"{where}: the content of the data URL is not base64") from None


def fetch(url: str, config: ServeConfig, where: str) -> bytes:
    """The bytes behind an https URL of a listed host, from a public address, without redirects.

    It connects to the address that it checked: a name that resolves elsewhere a moment later gains
    nothing. Raises BadImage.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port or 443
    except ValueError:
        raise BadImage(f"{where}: not a URL") from None
    if host not in config.image_hosts or parts.username is not None:
        raise BadImage(f"{where}: images are not fetched from there; send a data URL", 403)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    deadline = time.monotonic() + config.timeout_s / 2
    data = bytearray()
    try:
        plain = connect(host, port, deadline)
        with plain, _ended_at(deadline, plain):
            connection = http.client.HTTPSConnection(host, port)
            connection.sock = encrypt(plain, host)
            connection.request("GET", path, headers={"User-Agent": "instructblip"})
            response = connection.getresponse()
            if response.status != 200:
                raise BadImage(f"{where}: the image's host answered {response.status}")
            while piece := response.read1(1 << 16):
                data += piece
                if len(data) > config.max_picture_bytes:
                    raise BadImage(f"{where}: more than {config.max_picture_bytes} bytes", 413)
            connection.close()
    except BadImage:
        raise
    except (OSError, http.client.HTTPException, ValueError):
        if time.monotonic() < deadline:
            raise BadImage(f"{where}: the image could not be fetched") from None
    if time.monotonic() >= deadline:
        raise BadImage(f"{where}: the image's host is too slow")
    return bytes(data)


@contextmanager
def _ended_at(deadline: float, connection: socket.socket) -> Iterator[None]:
    """Ends the connection at the deadline: its own timeout begins anew with every byte."""
    other = connection.dup()  # of the same connection, and not taken over by TLS
    timer = threading.Timer(deadline - time.monotonic(), _shut, (other,))
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        timer.join()
        other.close()


def _shut(connection: socket.socket) -> None:
    with suppress(OSError):  # it has ended by itself
        connection.shutdown(socket.SHUT_RDWR)


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """A connection to a public address of ``host``. Raises OSError, also at the deadline."""
    found: queue.SimpleQueue[str | OSError] = queue.SimpleQueue()

    def resolve() -> None:
        try:
            found.put(public_address(host, port))
        except OSError as error:
            found.put(error)

    threading.Thread(target=resolve, daemon=True).start()  # the system's resolver has no timeout
    try:
        address = found.get(timeout=max(0.0, deadline - time.monotonic()))
    except queue.Empty:
        raise TimeoutError(f"{host} was not resolved in time") from None
    if isinstance(address, OSError):
        raise address
    left = max(0.001, deadline - time.monotonic())
    return socket.create_connection((address, port), timeout=left)


def encrypt(plain: socket.socket, host: str) -> ssl.SSLSocket:
    """TLS over a connection to ``host``, whose certificate is verified. Raises OSError."""
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host)


def public_address(host: str, port: int) -> str:
    """An address of ``host``. Raises OSError if any of its addresses is private or reserved."""
    infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = sorted({str(info[4][0]) for info in infos})
    for address in addresses:
        if not _is_public(ipaddress.ip_address(address.split("%")[0])):
            raise OSError("not a public address")
    return addresses[0]


def _is_public(ip: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is one of the public network's, by the IPv4 address in it if it has one.
    Tunnels (6to4, Teredo) are not, since what they end at is unknown."""
    if isinstance(ip, ipaddress.IPv6Address):
        if inner := ip.ipv4_mapped:
            ip = inner
        elif ip in _NAT64:
            ip = ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)
        elif ip not in _GLOBAL or ip.sixtofour or ip.teredo:
            return False
    return ip.is_global and not ip.is_multicast
