"""A slow, long and lossy link between two network namespaces, in user space (Linux, root).

    nsenter --net=... python -m bench.link DEVICE PID PEER --bytes-per-s 1e6 --delay-s .05 --loss-ratio .01

Two tunnels are joined: DEVICE here, PEER in the namespace of process PID. Each packet waits until those before it are
sent at the link's rate, then travels for the delay; some are lost. It says ``ready`` and runs until it is killed. The
kernel's own ``netem`` does the same where a kernel has it, which those of small virtual machines often do not; a link
of some megabytes a second costs a few percent of a core here.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import random
import select
import struct
import subprocess
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Final

MAX_BACKLOG_S: Final = 0.4
"""A packet that would have to wait longer for its turn is dropped, as by the kernel's token bucket."""
MAX_PACKET_BYTES: Final = 65536
TUNSETIFF: Final = 0x400454CA
IFF_TUN, IFF_NO_PI = 0x0001, 0x1000


@dataclass
class Lane:
    """One direction of a link: what of it is under way.

    Attributes
    ----------
    bytes_per_s : at which packets are sent, one after the other.
    delay_s : from a packet's last byte sent to its arrival.
    loss_ratio : of packets that are lost, each by itself.
    draw : uniform numbers in [0, 1).
    """

    bytes_per_s: float
    delay_s: float
    loss_ratio: float
    draw: random.Random
    free_s: float = 0.0
    under_way: deque[tuple[float, bytes]] = field(default_factory=deque)

    def send(self, packet: bytes, now_s: float) -> None:
        """Take a packet that came in at ``now_s``."""
        starts_s = max(now_s, self.free_s)
        if starts_s - now_s > MAX_BACKLOG_S:
            return
        self.free_s = starts_s + len(packet) / self.bytes_per_s
        if self.draw.random() >= self.loss_ratio:
            self.under_way.append((self.free_s + self.delay_s, packet))

    def arrived(self, now_s: float) -> list[bytes]:
        """Packets that have come to the other end by ``now_s``, in the order in which they were sent."""
        packets = []
        while self.under_way and self.under_way[0][0] <= now_s:
            packets.append(self.under_way.popleft()[1])
        return packets

    def next_s(self) -> float:
        """When the next packet arrives; infinite if none is under way."""
        return self.under_way[0][0] if self.under_way else float("inf")


def open_tunnel(name: str) -> int:
    """File descriptor of a new tunnel device; it is gone when that is closed."""
    tunnel = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(tunnel, TUNSETIFF, struct.pack("16sH", name.encode(), IFF_TUN | IFF_NO_PI))
    return tunnel


def relay(lanes: dict[int, tuple[Lane, int]]) -> None:
    """Carry packets for ever: of each tunnel the lane that leaves it, and the tunnel at that one's end."""
    while True:
        wait_s = min(lane.next_s() for lane, _ in lanes.values()) - time.monotonic()
        readable, _, _ = select.select(list(lanes), [], [], max(0.0, wait_s) if wait_s < float("inf") else None)
        now_s = time.monotonic()
        for tunnel in readable:
            lanes[tunnel][0].send(os.read(tunnel, MAX_PACKET_BYTES), now_s)
        for lane, end in lanes.values():
            for packet in lane.arrived(now_s):
                with suppress(OSError):  # a device that is not up yet loses it, as on any link
                    os.write(end, packet)


def main() -> None:
    """Join two namespaces."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("device")
    parser.add_argument("pid", type=int)
    parser.add_argument("peer")
    parser.add_argument("--bytes-per-s", type=float, required=True)
    parser.add_argument("--delay-s", type=float, default=0.0)
    parser.add_argument("--loss-ratio", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0, help="of what is lost")
    link = parser.parse_args()
    near, far = open_tunnel(link.device), open_tunnel(link.peer)
    subprocess.run(["ip", "link", "set", link.peer, "netns", str(link.pid)], check=True)
    there, back = (
        Lane(link.bytes_per_s, link.delay_s, link.loss_ratio, random.Random(2 * link.seed + way)) for way in (0, 1)
    )
    print("ready", flush=True)
    relay({near: (there, far), far: (back, near)})


if __name__ == "__main__":
    main()
