"""The indexer's scores on Hopper, from the paged FP8 cache.

Work comes in tiles: some tokens of one sequence (a run) times 64 keys or more; [T, H, keys] never exists. All tiles of
a call form one list, run after run, and each CTA takes an equal share of it, whatever the lengths (`shares.py`). Keys
stream through a ring of TMA copies, two boxes a cache block. While one warpgroup sums over the heads, the products of
the others run (`tile.py`).

Many tokens a sequence: the warpgroups share each tile's keys and take two tokens each. About one token a sequence: they
share the token and take 64 keys each.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from pallas_kernels.indexer_logits.config import Config, choose_config
from pallas_kernels.indexer_logits.shares import device_share, interpreted_share, shares
from pallas_kernels.indexer_logits.tile import (
    COLUMNS,
    DIM,
    HEADS,
    device_fill,
    device_tile,
    interpreted_fill,
    interpreted_tile,
)
from pallas_kernels.mosaic.wgmma import SWIZZLE
from pallas_kernels.paging import BLOCK_SIZE

ROWS = BLOCK_SIZE + 2
"""A cache block as rows of 128 bytes: 64 keys, then their float32 scales."""
LISTED_TOKENS = 1024
"""Up to so many runs of one token, each CTA finds its share of the tiles by itself."""


def quotient(x, by: int):
    """`x // by` of numbers that are not negative."""
    return lax.div(x, jnp.int32(by))


def remainder(x, by: int):
    """`x % by` of numbers that are not negative."""
    return lax.rem(x, jnp.int32(by))


def body(
    which_gmem,
    tables_gmem,
    sequence_gmem,
    positions_gmem,
    queries_gmem,
    weights_gmem,
    cache_gmem,
    *refs,
    config,
    blocks_of_layer,
    fill,
    interpret,
):
    """See the module. `which_gmem` holds the layer and the part; `refs` begin with the parts' shares, if they were
    planned; then come the output and the scratch. A token's number is its place in the part, which is its row of the
    output.
    """
    plan_gmem, scratch = refs[:-8], refs[-8:]
    out_gmem, q_smem, k_smem, scale_smem, q_full_bar, q_free_bar, full_bar, free_bar = scratch
    warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
    count, (sequences, blocks) = out_gmem.shape[0], tables_gmem.shape
    layer, part = which_gmem[0], which_gmem[1]
    first_token, last_row = part * count, queries_gmem.shape[0] // HEADS - 1
    limit, row = blocks * BLOCK_SIZE, out_gmem.shape[1]
    tile_blocks = config.tile_keys // BLOCK_SIZE
    tile_of = (interpreted_tile if interpret else device_tile)(config, row)
    if plan_gmem:
        token, tile, total = (plan_gmem[0][part, i, cta] for i in range(3))
    else:
        token, tile, total = (interpreted_share if interpret else device_share)(count, limit, config)(
            positions_gmem, cta
        )

    def end_of(token):
        """Returns how many keys a token sees."""
        return jnp.clip(positions_gmem[first_token + token] + 1, 0, limit)

    def row_of(token):
        """Returns the first of a token's rows in queries and weights."""
        return jnp.minimum(first_token + token, last_row) * HEADS

    def tiles_up_to(end):
        return jnp.maximum(quotient(end + (config.tile_keys - 1), config.tile_keys), 1)

    def run_at(token):
        """Returns the run that begins with `token`: (token, tokens, sequence, tiles)."""
        length, most, owner = token * 0 + 1, end_of(token), sequence_gmem[first_token + token]
        same = token >= 0
        for i in range(1, config.group):
            other = jnp.minimum(token + i, count - 1)
            in_group = remainder(token, config.group) + i < config.group
            same = same & in_group & (token + i < count) & (sequence_gmem[first_token + other] == owner)
            length = length + same.astype(jnp.int32)
            most = jnp.where(same, jnp.maximum(most, end_of(other)), most)
        return token, length, jnp.clip(owner, 0, sequences - 1), tiles_up_to(most)

    # The first warpgroup also starts all copies. Its cursor (run, tile of the run, segment, number of the tile in the
    # CTA's share, the tile's blocks; a segment is the CTA's part of a run) goes some tiles ahead of the
    # tile that it works on, but not into a segment that needs a slot of queries which the warpgroup itself has not
    # freed. The table is read a tile early, all entries at once, and they are not touched until they are needed: their
    # latency, added to each tile, would bound the kernel.
    first_block = layer * blocks_of_layer

    def blocks_of(owner, tile):
        """Returns entries of the block table; what lies past the tokens is masked: any block will do."""
        return tuple(tables_gmem[owner, jnp.minimum(tile * tile_blocks + i, blocks - 1)] for i in range(tile_blocks))

    def load_queries(token, segment):
        slot = remainder(segment, config.query_slots)

        @pl.when(segment >= config.query_slots)
        def _():
            plgpu.barrier_wait(q_free_bar.at[slot])

        for i in range(config.group):  # those of other runs are loaded too, so that the barrier counts the same
            rows = pl.ds(row_of(jnp.minimum(token + i, count - 1)), HEADS)
            plgpu.copy_gmem_to_smem(
                queries_gmem.at[rows], q_smem.at[slot, pl.ds(i * HEADS, HEADS)], q_full_bar.at[slot]
            )

    def load_keys(number, blocks_of_tile):
        slot = remainder(number, config.stages)

        @pl.when(number >= config.stages)
        def _():
            plgpu.barrier_wait(free_bar.at[slot])

        for i, block in enumerate(blocks_of_tile):
            at = (first_block + jnp.maximum(block, 0)) * ROWS
            keys_at = k_smem.at[slot, pl.ds(i * BLOCK_SIZE, BLOCK_SIZE)]
            plgpu.copy_gmem_to_smem(cache_gmem.at[pl.ds(at, BLOCK_SIZE)], keys_at, full_bar.at[slot])
            plgpu.copy_gmem_to_smem(
                cache_gmem.at[pl.ds(at + BLOCK_SIZE, 2)], scale_smem.at[slot, pl.ds(2 * i, 2)], full_bar.at[slot]
            )

    def load_next(cursor):
        run, tile, segment, number, blocks_of_tile = cursor
        token, length, _, tiles = run

        pl.when((tile == 0) | (number == 0))(lambda: load_queries(token, segment))

        load_keys(number, blocks_of_tile)
        run, tile, segment = lax.cond(
            (tile + 1 == tiles) & (number + 1 < total),
            lambda: (run_at(token + length), tile * 0, segment + 1),
            lambda: (run, tile + 1, segment),
        )
        return run, tile, segment, number + 1, blocks_of(run[2], tile)

    def load_ahead(cursor, segment, number):
        """Starts the copies of every tile up to `number + ahead`."""

        def more(cursor):
            _, _, cursor_segment, next_number, _ = cursor
            wanted = (next_number <= number + config.ahead) & (next_number < total)
            return wanted & (cursor_segment < segment + config.query_slots)

        return lax.cond(warpgroup == 0, lambda: lax.while_loop(more, load_next, cursor), lambda: cursor)

    none = token * 0
    run = run_at(token)
    cursor = load_ahead((run, tile, none, none, blocks_of(run[2], tile)), none, none)

    if fill:
        fill_row = (interpreted_fill if interpret else device_fill)(row)
        workers = config.ctas * config.warpgroups
        # Short of tokens, several warpgroups share a row.
        piece = BLOCK_SIZE * pl.cdiv(blocks, pl.cdiv(2 * workers, count))
        pieces = pl.cdiv(limit, piece)
        first = cta * config.warpgroups + warpgroup

        def fill_piece(i, _):
            item = first + i * workers
            at, begin = quotient(item, pieces), remainder(item, pieces) * piece
            seen = quotient(end_of(at) + (BLOCK_SIZE - 1), BLOCK_SIZE) * BLOCK_SIZE
            fill_row(out_gmem, at, jnp.maximum(begin, seen), jnp.minimum(begin + piece, limit))

        items = jnp.maximum(count * pieces - first + (workers - 1), 0)
        lax.fori_loop(0, quotient(items, workers), fill_piece, None)

    def segment_step(state):
        (token, length, owner, tiles), tile, segment, done, cursor = state
        del owner
        steps = jnp.minimum(tiles - tile, total - done)
        q_slot = remainder(segment, config.query_slots)
        first_of_warpgroup = token if config.split_keys else token + warpgroup * config.tokens
        head_weights, ends = [], []
        for i in range(config.tokens):
            at = jnp.minimum(first_of_warpgroup + i, count - 1)
            rows = pl.ds(row_of(at), HEADS)
            head_weights.append(plgpu.load(weights_gmem.at[rows], layout=COLUMNS, optimized=False))
            ends.append(jnp.where(first_of_warpgroup + i < token + length, end_of(at), 0))
        plgpu.barrier_wait(q_full_bar.at[q_slot])

        def step(i, cursor):
            number = done + i
            cursor = load_ahead(cursor, segment, number)
            slot = remainder(number, config.stages)
            plgpu.barrier_wait(full_bar.at[slot])
            key = (tile + i) * config.tile_keys
            if config.split_keys:
                key = key + warpgroup * (config.blocks * BLOCK_SIZE)
            tile_of(
                q_smem,
                k_smem,
                scale_smem,
                out_gmem,
                tuple(head_weights),
                tuple(ends),
                first_of_warpgroup,
                key,
                q_slot,
                slot,
                warpgroup,
            )
            plgpu.barrier_arrive(free_bar.at[slot])
            return cursor

        cursor = lax.fori_loop(0, steps, step, cursor)
        plgpu.barrier_arrive(q_free_bar.at[q_slot])
        after = run_at(jnp.minimum(token + length, count - 1))
        return after, tile * 0, segment + 1, done + steps, cursor

    start = (run, tile, none, none, cursor)
    segments, done = lax.while_loop(lambda state: state[3] < total, segment_step, start)[2:4]

    @pl.when(warpgroup == 0)
    def _():  # every phase of a barrier is waited for, before its shared memory goes
        def drain(barriers, slots, used):
            first = jnp.maximum(used - slots, 0)
            lax.fori_loop(first, used, lambda i, _: plgpu.barrier_wait(barriers.at[remainder(i, slots)]), None)

        drain(free_bar, config.stages, done)
        drain(q_free_bar, config.query_slots, segments)


def unsupported(queries: jax.Array, index: jax.Array) -> str | None:
    """Says which arguments the kernel does not take, and which it does; None if it takes all."""
    if index.dtype != jnp.uint8:
        return f"index keys of dtype {index.dtype}; it takes the FP8 form of the cache (uint8)"
    if queries.dtype != jnp.float8_e4m3fn:
        return f"queries of dtype {queries.dtype}; it takes float8_e4m3fn"
    if queries.shape[2] != DIM or index.shape[2] != ROWS * DIM:
        return f"queries of shape {queries.shape} with blocks of {index.shape[2]} bytes; it takes keys of width {DIM}"
    if not 1 <= queries.shape[1] <= HEADS:
        return f"queries of shape {queries.shape}; it takes 1 to {HEADS} heads"
    return None


@functools.partial(jax.tree_util.register_dataclass, data_fields=("number", "shares"), meta_fields=("tokens",))
@dataclasses.dataclass(frozen=True)
class Part:
    """One of the equal parts that the tokens of a call are cut into.

    Attributes:
      number: int32 [], which.
      tokens: of a part.
      shares: int32 [parts, 3, CTAs], of each part, see `shares`.
    """

    number: jax.Array
    tokens: int
    shares: jax.Array


def shares_of_parts(sequence: jax.Array, positions: jax.Array, block_tables: jax.Array, tokens: int) -> jax.Array:
    """`Part.shares` of parts of `tokens` tokens, a divisor of T; by the config that `indexer_logits` takes for them."""
    sequences, blocks = block_tables.shape
    config = choose_config(tokens, sequences)
    cut = [x.reshape(-1, tokens) for x in (sequence, positions)]
    return jax.vmap(functools.partial(shares, limit=blocks * BLOCK_SIZE, config=config))(*cut)


def pad_heads(queries: jax.Array, head_weights: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Zero heads up to the 64 of the products."""
    pad = HEADS - queries.shape[1]
    return jnp.pad(queries, ((0, 0), (0, pad), (0, 0))), jnp.pad(head_weights, ((0, 0), (0, pad)))


@functools.partial(jax.jit, static_argnames=("fill", "interpret", "config"))
def indexer_logits(
    queries: jax.Array,
    head_weights: jax.Array,
    index: jax.Array,
    layer: int | jax.Array,
    block_tables: jax.Array,
    sequence: jax.Array,
    positions: jax.Array,
    *,
    fill: bool = True,
    part: Part | None = None,
    interpret: Any = None,
    config: Config | None = None,
) -> jax.Array:
    """See `pallas_kernels.indexer_logits`; for what is not `unsupported`.

    Args:
      fill: without it, blocks of 64 scores that lie wholly past a token's position are not written.
      part: the scores of one part of the tokens alone; `sequence` and `positions` then have whole parts, the last one
        filled up with tokens at position -1.
      config: for measurements; the default is that of `choose_config`.

    Returns:
      float32 [T, N * 64], or [part.tokens, N * 64].
    """
    (tokens, heads, _), (sequences, blocks) = queries.shape, block_tables.shape
    if part:
        tokens = part.tokens
    if tokens == 0 or blocks == 0:
        return jnp.full((tokens, blocks * BLOCK_SIZE), -jnp.inf, jnp.float32)
    config = config or choose_config(tokens, sequences)
    layers, blocks_of_layer, _ = index.shape
    if heads < HEADS:
        queries, head_weights = pad_heads(queries, head_weights)
    # Decode plans inside the kernel, so that it is a single launch. The plan here depends on no layer's data: XLA
    # computes it once for all layers of a step.
    planned = config.group > 1 or tokens > LISTED_TOKENS
    if part:
        plan: tuple[jax.Array, ...] = (part.shares,)
    else:
        plan = (shares(sequence, positions, blocks * BLOCK_SIZE, config)[None],) if planned else ()
    kernel = plgpu.kernel(
        functools.partial(
            body, config=config, blocks_of_layer=blocks_of_layer, fill=fill, interpret=interpret is not None
        ),
        out_type=jax.ShapeDtypeStruct((tokens, blocks * BLOCK_SIZE), jnp.float32),
        scratch_types=(
            plgpu.SMEM((config.query_slots, config.group * HEADS, DIM), queries.dtype, transforms=SWIZZLE),
            plgpu.SMEM((config.stages, config.tile_keys, DIM), jnp.uint8, transforms=SWIZZLE),
            plgpu.SMEM((config.stages, config.tile_keys // BLOCK_SIZE * 2, DIM), jnp.uint8),
            plgpu.Barrier(num_arrivals=config.group, num_barriers=config.query_slots),
            plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.query_slots),
            plgpu.Barrier(num_arrivals=config.tile_keys // BLOCK_SIZE * 2, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=config.warpgroups, num_barriers=config.stages),
        ),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="indexer_logits",
    )
    return kernel(
        jnp.stack([jnp.asarray(layer, jnp.int32).reshape(()), part.number if part else jnp.int32(0)]),
        block_tables,
        sequence,
        positions,
        queries.reshape(-1, DIM),
        head_weights.astype(jnp.float32).reshape(-1),
        index.reshape(layers * blocks_of_layer * ROWS, DIM),
        *plan,
    )
