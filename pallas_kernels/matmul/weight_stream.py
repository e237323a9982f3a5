"""How the CTAs of a product with few rows read the weights: each of them one stream of stages, across its items.

An item is a strip of weight rows times one tile of tokens, over all of K. Each CTA takes every `ctas`-th item; a ring
of TMA copies runs ahead of the products, also into the next items.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax


def plan_of(tile_expert: jax.Array, used_tiles: jax.Array | None, parts: int = 1) -> tuple[jax.Array, jax.Array]:
    """Returns `plan` of `stream`, int32 [tiles] and [1], each tile taken as so many `parts`."""
    used = tile_expert.shape[0] if used_tiles is None else used_tiles
    experts = tile_expert if parts == 1 else jnp.repeat(tile_expert, parts)
    return experts, jnp.asarray(used * parts, jnp.int32).reshape(1)


def in_lines(matrix: jax.Array) -> jax.Array:
    """Returns [rows, K] as [rows, lines, values]: lines of 128 bytes, which is how `copy_lines` takes them."""
    return matrix.reshape(matrix.shape[0], -1, 128 // matrix.dtype.itemsize)


def copy_lines(matrix_gmem: Any, row: Any, line: Any, lines_smem: Any, barrier: Any) -> None:
    """Starts one copy of the rows from `row` and the lines from `line` of a matrix that is `in_lines`.

    It goes into `lines_smem`, [lines, rows, values]: a line of all rows is an operand of the matrix units. There is one
    copy for all lines, since a multiprocessor starts only one in about 50 ns.
    """
    lines, rows, _ = lines_smem.shape
    part_gmem = matrix_gmem.at[pl.ds(row, rows), pl.ds(line, lines)]
    plgpu.copy_gmem_to_smem(part_gmem, lines_smem.transpose((1, 0, 2)), barrier)


def stream(
    config: Any,
    *,
    strips: int,
    steps: int,
    plan: tuple[Any, ...],
    load: Callable[..., None],
    start: Callable[[], Any],
    add: Callable[..., Any],
    store: Callable[..., None],
    barriers: tuple[Any, Any],
    tiles: int = 1,
) -> None:
    """Works on all items of a CTA; every warpgroup calls it.

    Args:
      config: has `rows` of a strip, tokens of a `tile`, `stages` and `ctas`.
      strips: of the weight.
      steps: stages of an item.
      plan: refs of the tiles' experts and of how many tiles are in use; empty for one weight.
      load: `load(slot, expert, token, row, step)` starts the copies of a stage, which arrive at the first barrier.
      start: the sums that an item begins with.
      add: `add(sums, slot, step, row, warpgroup)` with those of a stage.
      store: `store(sums, token, row, warpgroup)` at an item's end.
      barriers: of the slots: full, and free (an arrival a warpgroup).
      tiles: of one weight. A strip's tiles are taken next to each other, so that it leaves device memory once.
    """
    full_bar, free_bar = barriers
    cta, warpgroup = lax.axis_index("cta"), lax.axis_index("warpgroup")
    used = plan[1][0] if plan else cta * 0 + tiles
    items = lax.div(jnp.maximum(used * strips - cta + (config.ctas - 1), 0), jnp.int32(config.ctas))
    total = items * steps

    def expert_of(item):
        if not plan:
            return item * 0
        return plan[0][jnp.minimum(lax.div(item, jnp.int32(strips)), plan[0].shape[0] - 1)]

    def place_of(item):
        """Returns the first token and the first row."""
        if not plan:
            strip = lax.div(item, jnp.int32(tiles))
            return (item - strip * tiles) * config.tile, strip * config.rows
        return lax.div(item, jnp.int32(strips)) * config.tile, lax.rem(item, jnp.int32(strips)) * config.rows

    # The first warpgroup also starts all copies. Its cursor: the stage's number in the CTA's stream, its place in the
    # item, the item, its expert, and the next item's, which is read an item early and not touched until it is needed.
    def load_next(cursor):
        number, step, item, expert, following = cursor
        slot = lax.rem(number, jnp.int32(config.stages))

        @pl.when(number >= config.stages)
        def _():
            plgpu.barrier_wait(free_bar.at[slot])

        load(slot, expert, *place_of(item), step)
        step, item, expert, following = lax.cond(
            step + 1 == steps,
            lambda: (step * 0, item + config.ctas, following, expert_of(item + 2 * config.ctas)),
            lambda: (step + 1, item, expert, following),
        )
        return number + 1, step, item, expert, following

    def load_up_to(cursor, number):
        """Starts the copies of the stages before `number`."""

        def more(cursor):
            return cursor[0] < jnp.minimum(number, total)

        return lax.cond(warpgroup == 0, lambda: lax.while_loop(more, load_next, cursor), lambda: cursor)

    def item_step(i, cursor):
        item = cta + i * config.ctas

        def step(j, state):
            sums, cursor = state
            number = i * steps + j
            cursor = load_up_to(cursor, number + config.stages)  # refills the slot of `number - 1`
            slot = lax.rem(number, jnp.int32(config.stages))
            plgpu.barrier_wait(full_bar.at[slot])
            sums = add(sums, slot, j, place_of(item)[1], warpgroup)
            plgpu.barrier_arrive(free_bar.at[slot])
            return sums, cursor

        sums, cursor = lax.fori_loop(0, steps, step, (start(), cursor))
        store(sums, *place_of(item), warpgroup)
        return cursor

    first = (cta * 0, cta * 0, cta, expert_of(cta), expert_of(cta + config.ctas))
    lax.fori_loop(0, items, item_step, load_up_to(first, cta * 0 + (config.stages - 1)))

    @pl.when(warpgroup == 0)
    def _():  # every phase of a barrier is waited for, before its shared memory goes
        begin = jnp.maximum(total - config.stages, 0)
        lax.fori_loop(
            begin, total, lambda i, _: plgpu.barrier_wait(free_bar.at[lax.rem(i, jnp.int32(config.stages))]), None
        )
