"""Steps of the model over several devices: which device has which sequence, and the batch of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from dsv32_jax.generate.batching import batch_of
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache
from dsv32_jax.model.mesh import MeshShape
from dsv32_jax.model.model import Batch, DeepseekV32, Options, step
from dsv32_jax.model.sharding import place


class Placement:
    """Sequences on devices, each with blocks of its own, numbered from 0 on its device.

    Args:
      devices: their number.
      rows: sequences for which a device has room.
      on: the device of each sequence.
      tokens: of the longest sequence, at its end.
    """

    def __init__(self, devices: int, rows: int, on: Sequence[int], tokens: int):
        self.devices, self.rows, self.on = devices, rows, list(on)
        self.row = [self.on[:i].count(device) for i, device in enumerate(self.on)]
        blocks = -(-tokens // BLOCK_SIZE)
        self.tables = np.arange(self.rows * blocks, dtype=np.int32).reshape(self.rows, blocks)

    def batch(self, pieces: dict[int, tuple[int, Sequence[int]]], tokens: int) -> Batch:
        """One step of all devices, each with room for so many tokens; pieces are (first position, ids) by sequence."""
        parts = []
        for device in range(self.devices):
            ids, sequence = np.zeros((2, tokens), np.int32)
            positions, logit_rows, used = np.full(tokens, -1), np.full(self.rows, -1), 0
            for i, (start, piece) in pieces.items():
                if self.on[i] == device:
                    at = slice(used, used + len(piece))
                    ids[at], sequence[at], positions[at] = piece, self.row[i], np.arange(start, start + len(piece))
                    used, logit_rows[self.row[i]] = at.stop, at.stop - 1
            parts.append(batch_of(ids, positions, sequence, self.tables, logit_rows))
        return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)

    def greedy(self, logits: jax.Array) -> list[int]:
        """The best token of each sequence, from logits [devices * rows, V]."""
        best = np.asarray(logits).reshape(self.devices, self.rows, -1).argmax(-1)
        return [int(best[place]) for place in zip(self.on, self.row, strict=True)]


def greedy_tokens(
    model: DeepseekV32,
    options: Options,
    prompts: Sequence[Sequence[int]],
    new: int,
    on: Sequence[int],
    *,
    tokens: int,
    rows: int,
) -> list[list[int]]:
    """New tokens of every prompt: a step over all prompts, then one for each token, all by one program.

    Args:
      model: on one device.
      options: of the run; `options.mesh` says how many devices.
      prompts, new: what to generate.
      on: the device of each sequence.
      tokens, rows: tokens and sequences for which every device has room.
    """
    mesh = options.mesh
    placement = Placement(mesh.size if mesh else 1, rows, on, max(map(len, prompts)) + new)
    cache = KVCache.create(model.config, placement.devices * placement.tables.size, options)
    if mesh:
        model, cache = place(model, mesh), place(cache, mesh)
    pieces, generated = {i: (0, prompt) for i, prompt in enumerate(prompts)}, []
    for n in range(new):
        batch = placement.batch(pieces, tokens)
        logits, cache = step(model, place(batch, mesh) if mesh else batch, cache, options)
        generated.append(placement.greedy(logits))
        pieces = {i: (len(prompt) + n, [generated[-1][i]]) for i, prompt in enumerate(prompts)}
    return np.transpose(generated).tolist()


def mesh_options(options: Options, ep: int, exchange: str, hosts: int = 1) -> Options:
    """The options over a mesh."""
    return dataclasses.replace(options, mesh=MeshShape(ep, hosts, exchange))
