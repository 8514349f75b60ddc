"""Pictures from outside: data URLs, and https from hosts on a list. Nothing of them is trusted."""

import base64
import binascii
import http.client
import io
import ipaddress
import socket
import ssl
import time
import warnings
from urllib.parse import unquote_to_bytes, urlsplit

from PIL import Image

from instructblip.data.images import decode_image
from instructblip.serving.config import ServeConfig

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")


class BadPicture(ValueError):
    """A picture that cannot be taken; ``status`` is the HTTP status that says so."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.status = status


def read_picture(url: str, config: ServeConfig, where: str) -> Image.Image:
    """The picture behind a URL as RGB. Raises BadPicture, naming ``where`` in the request."""
    scheme = url[:8].lower()
    if scheme.startswith("data:"):
        data = _data_of(url, config, where)
    elif scheme.startswith("https://"):
        data = fetch(url, config, where)
    else:
        raise BadPicture(f"{where}: expected data:image/...;base64,... as the URL of a picture")
    return decode_picture(data, config, where)


def _data_of(url: str, config: ServeConfig, where: str) -> bytes:
    header, comma, content = url.partition(",")
    if not comma or len(header) > 200:
        raise BadPicture(f"{where}: a data URL has a comma before its content")
    if len(content) > config.max_picture_bytes * 3:
        raise BadPicture(f"{where}: more than {config.max_picture_bytes} bytes", 413)
    if not header.lower().endswith(";base64"):
        return unquote_to_bytes(content)
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise BadPicture(f"{where}: the content of the data URL is not base64") from None


def decode_picture(data: bytes, config: ServeConfig, where: str) -> Image.Image:
    """The picture in ``data`` as RGB. Raises BadPicture.

    The header is read first: a small file can promise more pixels than there is memory.
    """
    if len(data) > config.max_picture_bytes:
        raise BadPicture(f"{where}: more than {config.max_picture_bytes} bytes", 413)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=FORMATS) as header:
                pixels = header.width * header.height
    except Image.DecompressionBombError:
        raise BadPicture(f"{where}: more than {config.max_pixels} pixels", 413) from None
    except Exception:
        kinds = ", ".join(FORMATS)
        raise BadPicture(f"{where}: not a picture; expected one of {kinds}") from None
    if pixels > config.max_pixels:
        raise BadPicture(f"{where}: more than {config.max_pixels} pixels", 413)
    try:
        return decode_image(data, where)
    except Exception:
        raise BadPicture(f"{where}: the picture is damaged or cut off") from None


def fetch(url: str, config: ServeConfig, where: str) -> bytes:
    """The bytes behind an https URL of a listed host, from a public address, without redirects.

    The address that was checked is the one that is connected to: a name that points elsewhere the
    next moment gains nothing.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").lower(), parts.port or 443
    except ValueError:
        raise BadPicture(f"{where}: not a URL") from None
    if host not in config.image_hosts or parts.username is not None:
        raise BadPicture(f"{where}: pictures are not fetched from there; send a data URL", 403)
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    deadline = time.monotonic() + config.timeout_s / 2
    try:
        connection = http.client.HTTPSConnection(host, port)
        connection.sock = connect(host, port, config.timeout_s / 4)
        connection.request("GET", path, headers={"User-Agent": "instructblip"})
        response = connection.getresponse()
        if response.status != 200:
            raise BadPicture(f"{where}: the picture's host answered {response.status}")
        return _read(response, config, where, deadline)
    except (OSError, http.client.HTTPException, UnicodeError, ValueError) as error:
        if isinstance(error, BadPicture):
            raise
        raise BadPicture(f"{where}: the picture could not be fetched") from None


def _read(
    response: http.client.HTTPResponse, config: ServeConfig, where: str, deadline: float
) -> bytes:
    data = bytearray()
    while piece := response.read(1 << 16):
        data += piece
        if len(data) > config.max_picture_bytes:
            raise BadPicture(f"{where}: more than {config.max_picture_bytes} bytes", 413)
        if time.monotonic() > deadline:
            raise BadPicture(f"{where}: the picture's host is too slow")
    return bytes(data)


def connect(host: str, port: int, timeout: float) -> ssl.SSLSocket:
    """A TLS connection to a public address of ``host``. Raises OSError."""
    address = public_address(host, port)
    plain = socket.create_connection((address, port), timeout=timeout)
    return ssl.create_default_context().wrap_socket(plain, server_hostname=host)


def public_address(host: str, port: int) -> str:
    """An address of ``host``; OSError when any of its addresses is private, local or reserved."""
    found = {str(info[4][0]) for info in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    for address in found:
        ip = ipaddress.ip_address(address.split("%")[0])
        inner = getattr(ip, "ipv4_mapped", None) or ip
        if not inner.is_global or inner.is_multicast:
            raise OSError("not a public address")
    return sorted(found)[0]
