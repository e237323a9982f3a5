"""The devices that run one model together, as a user names them: `--mesh ep=8`."""

import dataclasses

import jax
import numpy as np
from jax.sharding import AxisType, Mesh

from dsv32_jax.common.arguments import integer
from dsv32_jax.errors import UserError

__all__ = ["EXCHANGES", "MeshShape"]

EXCHANGES = ("auto", "gather", "dispatch")
"""How tokens reach the experts of other devices, see `dsv32_jax.model.exchange`."""


@dataclasses.dataclass(frozen=True)
class MeshShape:
    """Devices in a grid; hashable, a part of `Options`.

    Attributes:
      ep: devices of a host, over which the experts of every layer lie in equal parts.
      hosts: with more than one, experts lie over the devices of all hosts.
      exchange: one of `EXCHANGES`; "auto" chooses by size.
    """

    ep: int
    hosts: int = 1
    exchange: str = "auto"

    def __post_init__(self):
        integer("mesh: ep", self.ep, 1)
        integer("mesh: host", self.hosts, 1)
        if self.exchange not in EXCHANGES:
            raise UserError(f"exchange {self.exchange!r} is unknown; it is one of {', '.join(EXCHANGES)}")

    @staticmethod
    def parse(text: str, exchange: str = "auto") -> "MeshShape":
        """The mesh of "ep=8" or "host=2,ep=8"; raises UserError for another text."""
        sizes: dict[str, int] = {}
        for part in text.split(","):
            axis, equals, size = part.strip().partition("=")
            if not equals or axis not in ("host", "ep") or axis in sizes or not size.isdecimal():
                raise UserError(f"mesh {text!r}: {part.strip()!r} is no axis; give ep=8, or host=2,ep=8")
            sizes[axis] = int(size)
        if "ep" not in sizes:
            raise UserError(f"mesh {text!r}: lacks ep, the devices of a host; give ep=8, or host=2,ep=8")
        return MeshShape(sizes["ep"], sizes.get("host", 1), exchange)

    def __str__(self) -> str:
        return f"ep={self.ep}" if self.hosts == 1 else f"host={self.hosts},ep={self.ep}"

    @property
    def axes(self) -> tuple[str, ...]:
        """Names of the mesh's axes: those over which experts, sequences and cache blocks lie."""
        return ("ep",) if self.hosts == 1 else ("host", "ep")

    @property
    def size(self) -> int:
        """Devices of all hosts."""
        return self.hosts * self.ep

    def on_devices(self) -> Mesh:
        """The mesh of JAX's first devices, in their order, which Pallas' remote memory needs.

        Raises:
          UserError: there are fewer devices.
        """
        devices = jax.devices()
        if len(devices) < self.size:
            hint = f"; XLA_FLAGS=--xla_force_host_platform_device_count={self.size} makes so many of a CPU"
            raise UserError(
                f"mesh {self}: needs {self.size} devices, and JAX has {len(devices)}"
                f"{hint if devices[0].platform == 'cpu' else ''}"
            )
        grid = np.array(devices[: self.size]).reshape((self.hosts, self.ep)[-len(self.axes) :])
        return Mesh(grid, self.axes, axis_types=(AxisType.Auto,) * len(self.axes))
