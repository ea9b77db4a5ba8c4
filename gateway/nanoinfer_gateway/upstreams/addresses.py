"""Where upstreams are: the forms of an address, and what they resolve to now.

`HOST:PORT` and `dns:///HOST:PORT` are looked up; `ipv4:A:PORT`, `ipv6:[A]:PORT` and `unix:PATH` are
taken as they stand.
"""

import asyncio
import ipaddress
import re
import socket
from collections.abc import Sequence

_LITERAL = ("ipv4:", "ipv6:", "unix:")
_HOST_AND_PORT = re.compile(r"\[?(?P<host>[^\[\]/\s]+?)\]?:(?P<port>\d{1,5})")


def check(address: str) -> str:
    """Return the address, or raise ValueError where it has none of the forms."""
    if not address.startswith(_LITERAL):
        _split(address)
    return address


async def resolve(addresses: Sequence[str]) -> frozenset[str]:
    """Look all addresses up and return one target a replica.

    A name with IPv4 and IPv6 addresses counts with the former alone, since both belong to the same
    replica. Raises OSError where a look-up fails.
    """
    targets = await asyncio.gather(*[_resolve_one(address) for address in addresses])
    return frozenset().union(*targets)


async def _resolve_one(address: str) -> frozenset[str]:
    if address.startswith(_LITERAL):
        return frozenset([address])
    host, port = _split(address)
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    families = {family for family, *_ in found}
    family = socket.AF_INET if socket.AF_INET in families else socket.AF_INET6
    return frozenset(_target(entry[4][0], port) for entry in found if entry[0] == family)


def _target(host: str | int, port: int) -> str:
    ip = ipaddress.ip_address(host)
    return f"ipv4:{ip}:{port}" if ip.version == 4 else f"ipv6:[{ip}]:{port}"


def _split(address: str) -> tuple[str, int]:
    match = _HOST_AND_PORT.fullmatch(address.removeprefix("dns:///"))
    if match is None or not 0 < int(match["port"]) < 65536:
        raise ValueError(f"{address!r} is not HOST:PORT, dns:///HOST:PORT, ipv4:, ipv6: or unix:")
    return match["host"], int(match["port"])
