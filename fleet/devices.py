"""Device profiles: what one client's hardware and link can sustain while it trains.

Compute. A data sheet gives a *peak* (cores x clock x floating-point operations per cycle). Training sustains only a
part of it, and that part is what counts here::

    train_flops = peak_fp32_flops * fraction

The fractions are assumptions of this project, one per class of device, chosen at the low end of what is reported:

- GPUs .30. Hobbhahn (Epoch, epochai.org/blog/measure-FLOPs-empirically) measured .30 to .75 on a Tesla P100 for most
  networks, more with large batches; clients train small ones.
- CPUs with sufficient cooling .25. No measurement behind it: convolutions with small batches, and their backward pass,
  stay well below what dense linear algebra reaches.
- Phones .10: no fan, a big.LITTLE mix that one parallel loop cannot use whole, and the phone's other work.

FP32 throughout, because that is what clients train in; tensor cores and INT8 figures ("TOPS") do not apply.
FLOP/cycle and core: 8 for Cortex-A53/A55/A510/A72 (one 128-bit FMA), 16 for A76/A78/A710/A715 (two), 32 for X3 (four),
32 for Tiger Lake with AVX-512 (one 512-bit FMA). WikiChip and Wikipedia, "FLOPS", list the widths of A57 (8), A72, A76
and A78; those of their successors follow from the number of their vector pipes.

Links. Federated clients reach their server through an access network, so the data sheet of a network adapter says
little. Fixed lines: the worldwide median of Ookla's Speedtest in Q3 2023, 83.95 Mbit/s down, 38.32 up. Phones: see
each profile. All of it is meant to be replaced by measurements of your own: a fleet file takes any figure
(``fleet/fleet_file.py``).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite

from fleet.names import FleetError

GIB = 2**30
GPU_FRACTION = 0.30
CPU_FRACTION = 0.25
PHONE_FRACTION = 0.10


@dataclass(frozen=True)
class DeviceProfile:
    """One device.

    Attributes
    ----------
    name : name of the profile.
    train_flops : sustained training throughput, FLOP/s (1 MAC = 2 FLOP).
    memory_bytes : memory of the device, bytes; what the operating system leaves of it is less.
    uplink_bytes_per_s : sustained throughput to the server, bytes/s.
    downlink_bytes_per_s : sustained throughput from the server, bytes/s.
    source : where the figures come from.
    overhead_s : fixed cost of every update, seconds (start of a process, reading data); counted as compute.

    Raises
    ------
    FleetError : a throughput or the memory is not a finite number > 0, or the overhead is not one >= 0.
    """

    name: str
    train_flops: float
    memory_bytes: int
    uplink_bytes_per_s: float
    downlink_bytes_per_s: float
    source: str
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        for field in ("train_flops", "memory_bytes", "uplink_bytes_per_s", "downlink_bytes_per_s"):
            value = getattr(self, field)
            if not (isfinite(value) and value > 0):
                raise FleetError(f"device {self.name!r}: {field} must be a finite number > 0, got {value!r}")
        if not (isfinite(self.overhead_s) and self.overhead_s >= 0):
            raise FleetError(f"device {self.name!r}: overhead_s must be a finite number >= 0, got {self.overhead_s!r}")

    def slowed(self, factor: float, link_factor: float | None = None) -> DeviceProfile:
        """Return this device ``factor`` times slower: compute, overhead, and links unless ``link_factor`` is given.

        With one factor for everything the update time of any work is exactly ``factor`` times as long.

        Raises
        ------
        FleetError : a factor is not a finite number > 0.
        """
        link_factor = factor if link_factor is None else link_factor
        for value in (factor, link_factor):
            if not (isfinite(value) and value > 0):
                raise FleetError(f"device {self.name!r}: a slowdown must be a finite number > 0, got {value!r}")
        if factor == link_factor == 1:
            return self
        links = "" if factor == link_factor else f", links {link_factor:.3g} times"
        return replace(
            self,
            name=f"{self.name} / {factor:.3g}",
            train_flops=self.train_flops / factor,
            uplink_bytes_per_s=self.uplink_bytes_per_s / link_factor,
            downlink_bytes_per_s=self.downlink_bytes_per_s / link_factor,
            overhead_s=self.overhead_s * factor,
            source=f"{self.name}, made {factor:.3g} times slower{links}. {self.source}",
        )


def mbit_per_s(value: float) -> float:
    """Convert Mbit/s to bytes/s."""
    return value * 1e6 / 8


FIXED_LINE = (mbit_per_s(38.32), mbit_per_s(83.95), "link: Ookla Speedtest, median of fixed lines worldwide, Q3 2023")
LINK_4G = (mbit_per_s(11.22), mbit_per_s(35.96), "link: Ookla Speedtest, mobile average worldwide, September 2020")
LINK_4G_EDGE = (
    mbit_per_s(11.22 / 4),
    mbit_per_s(35.96 / 4),
    "link: a quarter of the 2020 mobile average, an assumption",
)
LINK_5G = (mbit_per_s(21.08), mbit_per_s(166.13), "link: Ookla Speedtest, median 5G worldwide, Q3 2021")
LINK_ETHERNET = (mbit_per_s(1000), mbit_per_s(1000), "link: Gigabit Ethernet, nominal")


def _profile(
    name: str, peak_gflops: float, fraction: float, memory_gib: int, link: tuple[float, float, str], peak: str
) -> DeviceProfile:
    up, down, link_source = link
    source = (
        f"compute: {fraction:.0%} (assumed) of the FP32 peak, {peak_gflops:,.0f} GFLOP/s ({peak}); "
        f"memory: data sheet; {link_source}"
    )
    return DeviceProfile(name, peak_gflops * 1e9 * fraction, memory_gib * GIB, up, down, source)


_ALL = (
    _profile("jetson-nano", 235.9, GPU_FRACTION, 4, FIXED_LINE, "NVIDIA data sheet: 128 Maxwell cores x 921.6 MHz x 2"),
    _profile("jetson-tx2", 665.6, GPU_FRACTION, 8, FIXED_LINE, "NVIDIA data sheet: 256 Pascal cores x 1.30 GHz x 2"),
    _profile(
        "jetson-xavier-nx", 844.8, GPU_FRACTION, 8, FIXED_LINE, "NVIDIA data sheet: 384 Volta cores x 1.10 GHz x 2"
    ),
    _profile(
        "jetson-orin-nano",
        1280,
        GPU_FRACTION,
        8,
        FIXED_LINE,
        "NVIDIA data sheet: 1024 Ampere cores x 625 MHz x 2, 8 GB",
    ),
    _profile("raspberry-pi-4", 48, CPU_FRACTION, 4, FIXED_LINE, "4 Cortex-A72 x 1.5 GHz x 8 FLOP/cycle, 4 GB version"),
    _profile(
        "raspberry-pi-5", 153.6, CPU_FRACTION, 8, FIXED_LINE, "4 Cortex-A76 x 2.4 GHz x 16 FLOP/cycle, 8 GB version"
    ),
    _profile(
        "phone-low", 115.2, PHONE_FRACTION, 3, LINK_4G_EDGE, "as Snapdragon 450: 8 Cortex-A53 x 1.8 GHz x 8, CPU only"
    ),
    _profile(
        "phone-mid",
        152,
        PHONE_FRACTION,
        6,
        LINK_4G,
        "as Snapdragon 695: 2 Cortex-A78 x 2.2 GHz x 16 and 6 Cortex-A55 x 1.7 GHz x 8, CPU only",
    ),
    _profile(
        "phone-high",
        329.6,
        PHONE_FRACTION,
        12,
        LINK_5G,
        "as Snapdragon 8 Gen 2: Cortex-X3 x 3.2 GHz x 32, 4 Cortex-A715/A710 x 2.8 GHz x 16, "
        "3 Cortex-A510 x 2.0 GHz x 8, CPU only",
    ),
    _profile(
        "laptop", 307.2, CPU_FRACTION, 16, FIXED_LINE, "as Core i5-1135G7: 4 cores x 2.4 GHz base x 32 FLOP/cycle"
    ),
    _profile("server", 9300, GPU_FRACTION, 16, LINK_ETHERNET, "NVIDIA data sheet: Tesla P100 PCIe, FP32"),
)

PROFILES: dict[str, DeviceProfile] = {profile.name: profile for profile in _ALL}
"""Every named profile."""
