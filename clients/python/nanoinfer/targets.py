"""Addresses of gateways: their form, and what is wrong with one that gRPC would not understand.

gRPC takes `http://host:50051` for a name to look up and a host without a port for its port 443; the
error that follows names neither mistake.
"""

import re

DEFAULT_PORT = 50051
_FORM = f"a target is HOST:PORT, such as 127.0.0.1:{DEFAULT_PORT}"
_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>[^/?#]*)(?P<path>.*)", re.DOTALL)
# what gRPC resolves by itself or hands on; their addresses have forms of their own
_RESOLVED = re.compile(r"(unix|unix-abstract|vsock|ipv4|ipv6|xds|google-c2p|passthrough):.+")
_SECURE = ("https", "grpcs")


def check_target(target: str) -> None:
    """Raises ValueError, with what to write instead, for a target that cannot be meant."""
    if not target:
        raise ValueError(f"target is empty: {_FORM}")
    if not target.isprintable() or " " in target:
        raise ValueError(f"target {target!r} holds blanks or control characters: {_FORM}")
    if _RESOLVED.fullmatch(target):
        return
    address = re.sub(r"^dns:(///|//[^/]*/)?", "", target)
    if url := _URL.fullmatch(address):
        raise ValueError(_about_url(target, **url.groupdict()))
    host, colon, port = address.rpartition(":")
    if address.count(":") > 1 and not re.fullmatch(r"\[[^\[\]]+\](:\d*)?", address):
        brackets = f"an IPv6 address stands in brackets, such as [::1]:{DEFAULT_PORT}"
        raise ValueError(f"target {target!r}: {brackets if _hexadecimal(address) else _FORM}")
    if "/" in address:
        raise ValueError(f"target {target!r} has a path: {_FORM}")
    if not colon or "]" in port or not port:
        name = address.rstrip(":")
        raise ValueError(f"target {target!r} has no port: write {name}:{DEFAULT_PORT}")
    if not host:
        raise ValueError(f"target {target!r} has no host: write 127.0.0.1:{port}")
    if not (port.isascii() and port.isdecimal() and 0 < int(port) < 65536):
        raise ValueError(f"target {target!r}: the port is a number from 1 to 65535")


def _about_url(target: str, scheme: str, rest: str, path: str) -> str:
    known_port = re.search(r":\d+$", rest)
    address = rest.rpartition("@")[2] or "127.0.0.1"
    address = address if known_port else f"{address}:{DEFAULT_PORT}"
    message = f"target {target!r} is a URL, and gRPC takes none: write {address}"
    if scheme.lower() in _SECURE:
        message += " (TLS: Client(..., credentials=grpc.ssl_channel_credentials()))"
    return message


def _hexadecimal(address: str) -> bool:
    return re.fullmatch(r"[0-9A-Fa-f:.%\[\]]+", address) is not None
