"""How tokens reach experts that lie on other devices of a mesh, and how their sums come back.

Both forms run inside `shard_map`, on the tokens of one device, and give what one device with all experts gives. No
shape depends on the routing, and no token is dropped.

* *gather*: all tokens come to every device, which routes them again (cheaper than to send the routing) and adds up what
  its own experts give: one all-gather and one reduce-scatter.
* *dispatch*: each token goes once to every device that has one of its experts, with its choices: three exchanges of
  rows, and one of their numbers where the backend sends the used rows alone.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property
from typing import Protocol

import jax
import jax.numpy as jnp
from jax import lax

from dsv32_jax.errors import UserError
from dsv32_jax.model.mesh import MeshShape

__all__ = ["Exchange", "form_of"]

Choose = Callable[[jax.Array, jax.Array], tuple[jax.Array, jax.Array]]
"""Tokens [T, D] and positions int32 [T] -> chosen experts int32 [T, K] of all, and their weights float32 [T, K]."""

LEAST_DEVICES, LEAST_TOKENS = 4, 1024
"""From these on, dispatch is chosen. They rest on bytes that are sent, at 8 experts a token of 256 in 8 groups: nearly
every token goes to both of two devices, and to 3.5 others of eight, so that at eight a gather moves twice as much."""
MOST_RAGGED = 8
"""Devices among which XLA's one-shot kernel sends ragged rows; they belong to one process."""


class Sums(Protocol):
    """The weighted sums float32 [T, D] of this device's experts; of a token that is absent, 0."""

    def __call__(self, x: jax.Array, experts: jax.Array, weights: jax.Array, present: jax.Array) -> jax.Array:
        """From tokens [T, D], experts int32 [T, K] counted from 0 on this device (their number for one that is on
        another), float32 weights [T, K] and bool [T]."""
        ...


def form_of(mesh: MeshShape, tokens: int) -> str:
    """The form of the exchange, "gather" or "dispatch", for so many tokens of a device."""
    if mesh.exchange != "auto":
        return mesh.exchange
    large = mesh.size >= LEAST_DEVICES and tokens >= LEAST_TOKENS
    return "dispatch" if large and sends_ragged(mesh) else "gather"


def sends_ragged(mesh: MeshShape) -> bool:
    """Whether used rows alone are sent, on GPUs: elsewhere XLA has no such collective."""
    return mesh.hosts == 1 and mesh.size <= MOST_RAGGED


@dataclasses.dataclass(frozen=True, eq=False)
class Exchange:
    """The exchange of one step on one device, while the step is traced inside `shard_map`.

    Attributes:
      mesh: the devices.
      positions: int32 [T], of this device's tokens; -1 for padding.

    Raises:
      UserError: nothing runs the step over the mesh.
    """

    mesh: MeshShape
    positions: jax.Array

    def __post_init__(self):
        if not set(self.mesh.axes) <= set(jax.sharding.get_abstract_mesh().manual_axes):
            raise UserError(
                f"mesh {self.mesh}: this call runs on one device; take `dsv32_jax.model.model.step`, or options "
                "without a mesh"
            )

    def __call__(self, x: jax.Array, count: int, choose: Choose, sums: Sums) -> jax.Array:
        """float32 [T, D]: the weighted sums of all experts' results, for this device's tokens x [T, D].

        Args:
          x: float [T, D].
          count: experts on each device.
          choose: routes tokens.
          sums: adds up what this device's experts give.
        """
        form = gathered if form_of(self.mesh, len(x)) == "gather" else dispatched
        return form(self, x, count, choose, sums)

    @cached_property
    def all_positions(self) -> jax.Array:
        """int32 [devices * T]: positions of the tokens of all devices, gathered once a step."""
        return lax.all_gather(self.positions, self.mesh.axes, tiled=True)


def gathered(exchange: Exchange, x: jax.Array, count: int, choose: Choose, sums: Sums) -> jax.Array:
    """See `Exchange.__call__`: all tokens come here, and the sums of this device's experts go back."""
    axes, positions = exchange.mesh.axes, exchange.all_positions
    tokens = lax.all_gather(x, axes, tiled=True)
    experts, weights = choose(tokens, positions)
    local = experts - lax.axis_index(axes) * count
    local = jnp.where((local >= 0) & (local < count), local, count)
    partial_sums = sums(tokens, local, weights, positions >= 0)
    return lax.psum_scatter(partial_sums, axes, scatter_dimension=0, tiled=True)


def dispatched(exchange: Exchange, x: jax.Array, count: int, choose: Choose, sums: Sums) -> jax.Array:
    """See `Exchange.__call__`: each token goes to the devices that have one of its experts, once to each."""
    devices, (tokens, width) = exchange.mesh.size, x.shape
    experts, weights = choose(x, exchange.positions)
    peers = jnp.arange(devices)[:, None]
    on_peer = (experts // count == peers[..., None]) & (exchange.positions >= 0)[:, None]  # [devices, T, K]
    sent = on_peer.any(-1)
    row = jnp.where(sent, jnp.cumsum(sent, axis=1) - 1, tokens)  # [devices, T]: among the rows for a peer
    token = jnp.full(sent.shape, tokens).at[peers, row].set(jnp.arange(tokens), mode="drop")  # of each row

    def rows_of(values: jax.Array) -> jax.Array:
        """Values of every token for each peer, [devices, T, ...], in the order of rows; 0 in rows that are not used."""
        index = token.reshape(*token.shape, *[1] * (values.ndim - 2))
        return jnp.take_along_axis(values, index, axis=1, mode="fill", fill_value=0)

    routes = Routes(exchange.mesh, jnp.sum(sent, axis=1, dtype=jnp.int32))
    arrived = routes.send(x.at[token].get(mode="fill", fill_value=0)).reshape(-1, width)
    # Experts and the bits of weights are one array. In unused rows it is 0, which is no expert: they count from 1.
    numbers = jnp.where(on_peer, experts - peers[..., None] * count + 1, 0)
    bits = jnp.where(on_peer, lax.bitcast_convert_type(weights, jnp.int32), 0)
    choices = routes.send(rows_of(jnp.concatenate([numbers, bits], axis=-1)))
    numbers, bits = jnp.split(choices.reshape(-1, choices.shape[-1]), 2, axis=-1)
    local = jnp.where(numbers > 0, numbers - 1, count)
    results = sums(arrived, local, lax.bitcast_convert_type(bits, jnp.float32), (numbers > 0).any(-1))
    back = routes.send_back(results.reshape(devices, tokens, width))
    of_token = jnp.take_along_axis(back, jnp.minimum(row, tokens - 1)[..., None], axis=1)
    return jnp.where(sent[..., None], of_token, 0).sum(0)


@dataclasses.dataclass(frozen=True, eq=False)
class Routes:
    """Moves rows between devices: rows [devices, T, ...], those for or from each peer, of which the first are used.

    Attributes:
      mesh: the devices.
      sizes: int32 [devices], rows that this device sends to each.
    """

    mesh: MeshShape
    sizes: jax.Array

    @cached_property
    def arriving(self) -> jax.Array:
        """int32 [devices]: rows that each device sends here."""
        return lax.all_to_all(self.sizes, self.mesh.axes, 0, 0, tiled=True)

    def send(self, rows: jax.Array) -> jax.Array:
        """What the peers send here; rows that they do not use are 0."""
        return self._move(rows, self.sizes, self.arriving)

    def send_back(self, rows: jax.Array) -> jax.Array:
        """The answers to what this device sent, each in the place of its row; other rows are not to be read."""
        return self._move(rows, self.arriving, self.sizes)

    def _move(self, rows: jax.Array, sends: jax.Array, arrives: jax.Array) -> jax.Array:
        """Rows to every peer, of which it gets so many; those of peer 0 come first."""
        if not sends_ragged(self.mesh):
            return self._whole(rows, sends, arrives)
        return lax.platform_dependent(rows, sends, arrives, cuda=self._used, default=self._whole)

    def _whole(self, rows: jax.Array, sends: jax.Array, arrives: jax.Array) -> jax.Array:
        """All rows are sent."""
        del sends, arrives
        return lax.all_to_all(rows, self.mesh.axes, 0, 0, tiled=True)

    def _used(self, rows: jax.Array, sends: jax.Array, arrives: jax.Array) -> jax.Array:
        """Used rows are sent, in one piece to a peer: XLA's kernel is slow with a piece for each expert."""
        flat = rows.reshape(-1, *rows.shape[2:])
        starts = jnp.arange(self.mesh.size, dtype=jnp.int32) * rows.shape[1]
        at_peers = jnp.full_like(starts, lax.axis_index(self.mesh.axes) * rows.shape[1])
        moved = lax.ragged_all_to_all(
            flat, jnp.zeros_like(flat), starts, sends, at_peers, arrives, axis_name=self.mesh.axes
        )
        return moved.reshape(rows.shape)
