"""Machines that are network namespaces of this one: own addresses, real traffic over virtual Ethernet, no way out."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence

PATH = os.pathsep.join((os.environ["PATH"], "/usr/sbin", "/sbin"))


def missing() -> str | None:
    """Say why there can be no such machines here, or return None."""
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    for program in ("ip", "unshare", "nsenter"):
        if shutil.which(program, path=PATH) is None:
            return f"there is no {program} (apt-get install iproute2 util-linux)"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        return "this system does not allow network namespaces"
    return None


class Network:
    """A bridge, and for each name a namespace with one end of a cable; to be used as a context.

    The last number of an address is the place of its name, from 1; this machine has 254.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.tag = f"lk{os.getpid() % 10000}"
        self.bridge = f"{self.tag}br"
        self.subnet = f"10.213.{os.getpid() % 250}"

    def address(self, number: int) -> str:
        return f"{self.subnet}.{number}"

    def space(self, name: str) -> str:
        """Return the name of the namespace of a machine, as for `ip netns exec`."""
        return f"{self.tag}-{name}"

    def cable(self, name: str) -> str:
        return f"{self.tag}v{self.names.index(name) + 1}"

    def __enter__(self) -> Network:
        _ip("link", "add", self.bridge, "type", "bridge")
        _ip("address", "add", f"{self.address(254)}/24", "dev", self.bridge)
        _ip("link", "set", self.bridge, "up")
        for number, name in enumerate(self.names, 1):
            space, cable = self.space(name), self.cable(name)
            _ip("netns", "add", space)
            _ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", space)
            _ip("link", "set", cable, "master", self.bridge, "up")
            _ip("-n", space, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
            _ip("-n", space, "link", "set", "eth0", "up")
            _ip("-n", space, "link", "set", "lo", "up")
        return self

    def __exit__(self, *_: object) -> None:
        for name in self.names:
            _ip("link", "delete", self.cable(name), check=False)
            _ip("netns", "delete", self.space(name), check=False)
        _ip("link", "delete", self.bridge, check=False)

    def set_cable(self, name: str, state: str) -> None:
        """Pull the cable of a machine ("down"), or plug it in ("up"). What runs there runs on."""
        _ip("link", "set", self.cable(name), state)


def _ip(*arguments: str, check: bool = True) -> None:
    done = subprocess.run(["ip", *arguments], env={**os.environ, "PATH": PATH}, text=True, capture_output=True)
    assert not check or done.returncode == 0, f"ip {' '.join(arguments)}: {done.stderr}"
