"""What launchers/hosts.py runs on each machine before a run: says what is there, and answers what it is asked.

Owns one line of JSON out for each line of JSON in, after SIGN, since a login shell may print lines of its own:

    {}                                          versions, GPUs (none if started with the argument cpu), as the first answer
    {"read": PATH}                              the text of a file of the shared folder
    {"clock": true}                             this machine's time
    {"listen": PORT, "token": T}                binds it (0: any free one), greets who connects, until the end
    {"connect": [ADDRESS…], "port": P, "token": T}   which of them lead to that greeting, and from which interface
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
from launch import count_gpus

from slm import installed

SIGN = "slm-probe "
CONNECT_SECONDS = 3.0


def main() -> int:
    if "cpu" in sys.argv[1:]:
        os.environ["DS_ACCELERATOR"] = "cpu"  # as the ranks will have it
    tell(
        versions=installed.facts(),
        num_gpus=count_gpus(),
        # Where the launcher's machine reached this one (sshd(8)), then what else it could be reached by.
        addresses=list(dict.fromkeys([*os.environ.get("SSH_CONNECTION", "").split()[2:3], *own_addresses()])),
    )
    for line in sys.stdin:
        asked = json.loads(line)
        if "read" in asked:
            tell(**read(asked["read"]))
        elif "clock" in asked:
            tell(time=time.time())
        elif "listen" in asked:
            tell(**listen(asked["listen"], asked["token"]))
        elif "connect" in asked:
            tell(reached=connect(asked["connect"], asked["port"], asked["token"]))
    return 0


def tell(**answer: Any) -> None:
    print(SIGN + json.dumps(answer), flush=True)


def own_addresses() -> list[str]:
    """IPv4 first, without the loopback, which every machine has."""
    found = [a for addresses in psutil.net_if_addrs().values() for a in addresses]
    inet = [a.address for a in found if a.family == socket.AF_INET and not a.address.startswith("127.")]
    inet6 = [a.address for a in found if a.family == socket.AF_INET6 and not a.address.startswith(("fe80:", "::1"))]
    return inet + inet6


def read(path: str) -> dict[str, str]:
    deadline = time.monotonic() + 10  # a network file system may take a moment to show what is new
    while True:
        try:
            return {"text": Path(path).read_text()}
        except OSError as error:
            if time.monotonic() > deadline:
                return {"error": str(error)}
            time.sleep(0.2)


def listen(port: int, token: str) -> dict[str, Any]:
    try:
        if socket.has_dualstack_ipv6():
            server = socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
        else:
            server = socket.create_server(("", port))
    except OSError as error:
        return {"error": error.strerror}

    def serve() -> None:
        while True:
            try:
                other, _ = server.accept()
            except OSError:  # gone again
                continue
            threading.Thread(target=greet, args=(other, token), daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    return {"port": server.getsockname()[1]}


def greet(other: socket.socket, token: str) -> None:
    """Whoever connects, perhaps a scanner of ports, which keeps nobody else waiting."""
    try:
        with other:
            other.settimeout(CONNECT_SECONDS)
            # Should we be the first to close, by a reset: no port of ours is left in TIME_WAIT.
            other.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            other.sendall(token.encode())
            other.recv(1)  # its end
    except OSError:
        pass


def connect(addresses: list[str], port: int, token: str) -> dict[str, str]:
    """The addresses that lead to who says the token, and the interface that the way there begins at."""
    reached = {}
    for address in addresses:
        try:
            with socket.create_connection((address, port), timeout=CONNECT_SECONDS) as other:
                if other.recv(len(token), socket.MSG_WAITALL).decode() == token:
                    reached[address] = interface_of(other.getsockname()[0])
        except OSError:
            pass
    return reached


def interface_of(address: str) -> str:
    for name, addresses in psutil.net_if_addrs().items():
        if any(a.address.partition("%")[0] == address for a in addresses):
            return name
    return ""


if __name__ == "__main__":
    sys.exit(main())
