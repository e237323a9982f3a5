"""Which tiles a CTA works on: an equal share of the list of all tiles, run after run.

A run is tokens of one sequence that a CTA takes together, cut at multiples of `config.group` tokens. A tile is a run
times `config.tile_keys` keys; a run has as many tiles as its tokens see keys, but at least one.
"""

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

from pallas_kernels import mosaic
from pallas_kernels.indexer_logits.config import Config
from pallas_kernels.mosaic import REF, SCALAR, Word


def shares(sequence: jax.Array, positions: jax.Array, limit: int, config: Config) -> jax.Array:
    """Where each CTA begins and how much it does: int32 [3, CTAs] of run (its first token), tile in the run, tiles.

    Runs are tokens of the same sequence, cut at multiples of `config.group` tokens; a run has at least one tile.
    """
    count = sequence.shape[0]
    groups = pl.cdiv(count, config.group)
    pad = (0, groups * config.group - count)
    sequence = jnp.pad(sequence, pad, mode="edge").reshape(groups, config.group)
    ends = jnp.pad(jnp.clip(positions + 1, 0, limit), pad).reshape(groups, config.group)
    # Comparisons inside each group are one fusion of XLA's, where segment operations would be several kernels.
    begins = [jnp.ones(groups, bool)] + [sequence[:, i] != sequence[:, i - 1] for i in range(1, config.group)]
    columns = []
    for i in range(config.group):
        same, most = jnp.ones(groups, bool), ends[:, i]
        for j in range(i + 1, config.group):
            same = same & ~begins[j]
            most = jnp.where(same, jnp.maximum(most, ends[:, j]), most)
        columns.append(jnp.where(begins[i], jnp.maximum(pl.cdiv(most, config.tile_keys), 1), 0))
    tiles = jnp.stack(columns, axis=1).reshape(-1)
    through = jnp.cumsum(tiles)
    cta = jnp.arange(config.ctas + 1)
    bounds = through[-1] // config.ctas * cta + through[-1] % config.ctas * cta // config.ctas
    first = bounds[:-1]
    run = (through[None, :] <= first[:, None]).sum(axis=1, dtype=jnp.int32)
    run = jnp.minimum(run, count - 1)
    return jnp.stack([run, first - (through[run] - tiles[run]), bounds[1:] - first]).astype(jnp.int32)


def device_share(count: int, limit: int, config: Config):
    """`share(positions, cta)`: a column of `shares` for runs of one token, found by each warp for itself."""
    chunks = pl.cdiv(count, 32)

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR), return_type=(mosaic.INT32,) * 3)
    def share(ctx, positions, cta):
        del ctx
        cta, lane, base = mosaic.scalar(cta), mosaic.thread_index() & 31, mosaic.global_address(positions)

        def tiles_of(chunk):
            token = lane + 32 * chunk
            (position,) = mosaic.load_global(mosaic.offset(base, token.min(count - 1), 4))
            end = (position + 1).signed_max(0).min(limit)
            tiles = ((end + (config.tile_keys - 1)) // config.tile_keys).max(1)
            return (token < count).where(tiles, 0) if (chunk + 1) * 32 > count else tiles

        tiles = [tiles_of(chunk) for chunk in range(chunks)]
        whole = mosaic.warp_reduce("add", mosaic.total(tiles))
        part, rest = whole // config.ctas, whole % config.ctas
        first = part * cta + rest * cta // config.ctas
        after = part * (cta + 1) + rest * (cta + 1) // config.ctas
        run, before, passed = Word(0), Word(0), Word(0)
        for x in tiles:
            through = mosaic.warp_prefix_sum(x, lane) + before
            done = through <= first
            run = run + mosaic.warp_reduce("add", done.to_word())
            passed = passed.max(mosaic.warp_reduce("max", done.where(through, 0)))
            before = mosaic.shuffle("idx", through, 31)
        return tuple(map(mosaic.splat, (run.min(count - 1), first - passed, after - first)))

    return share


def interpreted_share(count: int, limit: int, config: Config):
    """Returns the twin of `device_share`."""

    def share(positions, cta):
        share_of_cta = shares(jnp.arange(count), positions[...], limit, config)[:, cta]
        return share_of_cta[0], share_of_cta[1], share_of_cta[2]

    return share
