"""Which network the processes of several machines talk over, where the library would not find it by itself."""

from __future__ import annotations

import os
import socket
import struct

SIOCGIFADDR = 0x8915
"""Linux: ask for the IPv4 address of an interface."""


def choose_interface() -> None:
    """Tell gloo, if nobody has, over which interface this machine reaches the first one; with several machines only.

    gloo takes the address that this machine's own name resolves to: on many that is 127.0.1.1, and the others never
    get through, and names of compute nodes may not resolve at all.
    """
    given = os.environ
    alone = given.get("WORLD_SIZE", "1") == given.get("LOCAL_WORLD_SIZE", given.get("WORLD_SIZE", "1"))
    if alone or "GLOO_SOCKET_IFNAME" in given or "MASTER_ADDR" not in given:
        return
    name = interface_towards(given["MASTER_ADDR"])
    if name is not None:
        given["GLOO_SOCKET_IFNAME"] = name


def interface_towards(host: str) -> str | None:
    """Return the interface with the address from which this machine sends to `host`; None if unknown."""
    import fcntl

    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((host, 9))  # sends nothing: only chooses the way
            own = probe.getsockname()[0]
            for _, name in socket.if_nameindex():
                try:
                    answer = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                except OSError:  # it has no IPv4 address
                    continue
                if socket.inet_ntoa(answer[20:24]) == own:
                    return name
    except OSError:  # no such name, no IPv4, no way there: gloo will say so itself
        return None
    return None
