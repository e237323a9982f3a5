"""The routing plan in one kernel on Hopper: a stable counting sort of the choices by expert, in one cluster of CTAs.

Each warp takes a run of consecutive choices and counts them by expert in shared memory, 32 at a time: lanes with the
same expert find each other by a match, so that no atomic decides an order. Sums over the warps, the CTAs and then the
experts give every (warp, expert) its first row, and the choices go to their rows.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir

from pallas_kernels import mosaic
from pallas_kernels.moe_dispatch import reference
from pallas_kernels.moe_dispatch.config import PlanConfig
from pallas_kernels.mosaic import REF, SCALAR, SharedWords, Word

MOST_EXPERTS, MOST_CHOICES = 256, 2**20


@dataclasses.dataclass(frozen=True)
class Planning:
    """What the device code is compiled for.

    Attributes:
      tokens: T.
      choices: K, of a token.
      experts: E.
      tile: rows of a tile.
      tiles: of the plan.
      warpgroups: of a CTA.
      cluster: CTAs.
    """

    tokens: int
    choices: int
    experts: int
    tile: int
    tiles: int
    warpgroups: int
    cluster: int

    @property
    def count(self) -> int:
        """Choices of all tokens."""
        return self.tokens * self.choices

    @property
    def rows(self) -> int:
        """P."""
        return self.tile * self.tiles

    @property
    def threads(self) -> int:
        """Of a CTA."""
        return 128 * self.warpgroups

    @property
    def all_threads(self) -> int:
        """Of the cluster."""
        return self.threads * self.cluster

    @property
    def warps(self) -> int:
        """Of a CTA."""
        return 4 * self.warpgroups

    @property
    def slots(self) -> int:
        """Counters of a warp: whole lanes of experts."""
        return -(-self.experts // 32) * 32

    @property
    def batch(self) -> int:
        """Choices of a lane whose loads are in flight together."""
        return min(8, -(-self.count // self.all_threads))

    @property
    def batches(self) -> int:
        """Of a warp."""
        return -(-self.count // (self.all_threads * self.batch))

    @property
    def shared_words(self) -> int:
        """The counters of all warps; by expert, choices in this CTA, in earlier ones, and in all, the CTA's first row,
        and the end of the tiles.
        """
        return (self.warps + 5) * self.slots


def unsupported(experts: jax.Array, num_experts: int) -> str | None:
    """Says which arguments of `make_plan` the kernel does not take, and which it does; None if it takes all."""
    if experts.dtype != jnp.int32 or experts.size > MOST_CHOICES:
        return f"experts {experts.dtype} {experts.shape}; it takes int32 [T, K] of at most {MOST_CHOICES} choices"
    if num_experts > MOST_EXPERTS:
        return f"{num_experts} experts; it takes at most {MOST_EXPERTS}"
    return None


# ---- device code -----------------------------------------------------------------------------------------------


class Planner:
    """One lane's view of the arrays, and the steps of the plan. `barrier()` must stand between the steps."""

    def __init__(
        self,
        shapes: Planning,
        rank: Word,
        shared: SharedWords,
        experts: ir.Value,
        valid: ir.Value,
        row_token: ir.Value,
        tile_expert: ir.Value,
        token_row: ir.Value,
    ):
        self.shapes = shapes
        self.thread = mosaic.thread_index()
        self.lane, self.warp = self.thread & 31, self.thread >> 5
        self.rank, self.cluster_thread = rank, rank * shapes.threads + self.thread
        self.experts, self.valid = experts, valid
        self.row_token, self.tile_expert, self.token_row = row_token, tile_expert, token_row
        self.all_counts, slots = shared, shapes.slots
        self.counts = shared.part(self.warp * slots)
        self.of_cta, self.earlier, self.sizes, self.first_rows, self.tile_ends = (
            shared.part((shapes.warps + i) * slots) for i in range(5)
        )

    def each_batch(self, body: Callable[[list[Word]], None]) -> None:
        """`body` for the lane's choices, some at a time, in the warp's order."""
        width = 32 * self.shapes.batch

        def one(i: Word) -> None:
            start = ((self.cluster_thread >> 5) * self.shapes.batches + i) * width + self.lane
            body([start + 32 * j for j in range(self.shapes.batch)])

        mosaic.loop(0, self.shapes.batches, 1, [], one)

    def load(self, array: ir.Value, places: list[Word], last: int) -> list[Word]:
        """Returns a word of each place, or of the last one beyond it; all loads before their uses."""
        return [mosaic.load_global(mosaic.offset(array, place.min(last), 4))[0] for place in places]

    def clear(self) -> None:
        """Counters to 0 and all rows to padding."""
        for i in range(0, self.shapes.slots, 32):
            self.counts.store(self.lane + i, 0)
        rows = self.shapes.rows

        def four(i: Word) -> None:
            mosaic.store_global(mosaic.offset(self.row_token, i, 16), [-1] * 4)

        mosaic.loop(self.cluster_thread, rows // 4, self.shapes.all_threads, [], four)
        left = rows % 4
        if left:
            last = mosaic.offset(self.row_token, self.cluster_thread + (rows - left), 4)
            mosaic.store_global(last, [-1], predicate=self.cluster_thread < left)
        mosaic.ptx("bar.warp.sync 0xffffffff;")

    def count(self) -> None:
        """Counts of this warp's choices by expert; `token_row` takes the place of each among them, or -1."""
        shapes, below = self.shapes, (mosaic.as_word(1) << self.lane) - 1

        def batch(places: list[Word]) -> None:
            experts = self.load(self.experts, places, shapes.count - 1)
            valid = self.load(self.valid, [place // shapes.choices for place in places], shapes.tokens - 1)
            for place, expert, is_valid in zip(places, experts, valid, strict=True):
                exists = place < shapes.count
                used = exists & (expert < shapes.experts) & is_valid.differs(0)
                safe = used.where(expert, 0)
                peers = mosaic.ptx_word("match.any.sync.b32 $0, $1, 0xffffffff;", used.where(expert, -1))
                earlier, before = peers & below, self.counts.load(safe)
                mosaic.ptx("bar.warp.sync 0xffffffff;")
                self.counts.store(safe, before + peers.bit_count(), predicate=used & earlier.equals(0))
                mosaic.ptx("bar.warp.sync 0xffffffff;")
                rank = used.where(before + earlier.bit_count(), -1)
                mosaic.store_global(mosaic.offset(self.token_row, place, 4), [rank], predicate=exists)

        self.each_batch(batch)

    def sum_over_warps(self) -> None:
        """Counts become the numbers of choices of the CTA's earlier warps."""
        shapes = self.shapes

        def expert(e: Word) -> None:
            before = mosaic.as_word(0)
            for first in range(0, shapes.warps, 16):
                places = [e + warp * shapes.slots for warp in range(first, min(first + 16, shapes.warps))]
                for place, count in [(place, self.all_counts.load(place)) for place in places]:
                    self.all_counts.store(place, before)
                    before = before + count
            self.of_cta.store(e, before)

        mosaic.loop(self.thread, shapes.slots, shapes.threads, [], expert)

    def sum_over_ctas(self) -> None:
        """Numbers of choices of earlier CTAs, and of all."""

        def expert(e: Word) -> None:
            before = size = mosaic.as_word(0)
            for other in range(self.shapes.cluster):
                [count] = self.of_cta.load_of_peer(e, 1, other) if self.shapes.cluster > 1 else [self.of_cta.load(e)]
                before = before + (self.rank > other).where(count, 0)
                size = size + count
            self.earlier.store(e, before)
            self.sizes.store(e, size)

        mosaic.loop(self.thread, self.shapes.slots, self.shapes.threads, [], expert)

    def sum_over_experts(self) -> None:
        """This CTA's first rows, and the ends of tiles, by one warp."""
        each, tile = self.shapes.slots // 32, self.shapes.tile

        def scan() -> None:
            first = self.lane * each
            tiles = [(self.sizes.load(first + i) + (tile - 1)) // tile for i in range(each)]
            lane_tiles = mosaic.total(tiles)
            end = mosaic.warp_prefix_sum(lane_tiles, self.lane) - lane_tiles
            for i in range(each):
                self.first_rows.store(first + i, end * tile + self.earlier.load(first + i))
                end = end + tiles[i]
                self.tile_ends.store(first + i, end)

        mosaic.when(self.thread < 32, scan)

    def write_tiles(self) -> None:
        """The expert of each tile: the number of experts whose tiles end before it, by bisection."""
        slots = self.shapes.slots

        def one(tile: Word) -> None:
            expert, step = mosaic.as_word(0), 1 << (slots.bit_length() - 1)
            while step:
                further = expert + step
                ended = (further <= slots) & (self.tile_ends.load((further - 1).min(slots - 1)) <= tile)
                expert, step = ended.where(further, expert), step // 2
            mosaic.store_global(mosaic.offset(self.tile_expert, tile, 4), [expert.min(self.shapes.experts - 1)])

        mosaic.loop(self.cluster_thread, self.shapes.tiles, self.shapes.all_threads, [], one)

    def write_rows(self) -> None:
        """Every choice to its row."""
        shapes = self.shapes

        def batch(places: list[Word]) -> None:
            experts = self.load(self.experts, places, shapes.count - 1)
            ranks = self.load(self.token_row, places, shapes.count - 1)
            for place, expert, rank in zip(places, experts, ranks, strict=True):
                used = (place < shapes.count) & rank.differs(-1)
                safe = used.where(expert, 0)
                row = self.first_rows.load(safe) + self.counts.load(safe) + rank
                mosaic.store_global(mosaic.offset(self.token_row, place, 4), [row], predicate=used)
                token = place // shapes.choices
                mosaic.store_global(mosaic.offset(self.row_token, row, 4), [token], predicate=used)

        self.each_batch(batch)

    def plan(self) -> None:
        """All steps."""
        all_meet = mosaic.cluster_barrier if self.shapes.cluster > 1 else mosaic.barrier
        self.clear()
        self.count()
        mosaic.barrier()
        self.sum_over_warps()
        all_meet()
        self.sum_over_ctas()
        mosaic.barrier()
        self.sum_over_experts()
        mosaic.barrier()
        self.write_tiles()
        self.write_rows()
        if self.shapes.cluster > 1:
            mosaic.cluster_barrier()  # nobody leaves while others may read its counters


def device_plan(shapes: Planning):
    """Returns the function by which all CTAs make the plan; `rank` is that of one."""

    @plgpu.inline_mgpu(arg_types=(*[REF] * 6, SCALAR))
    def plan(ctx, experts_gmem, valid_gmem, row_token_gmem, tile_expert_gmem, token_row_gmem, shared_smem, rank):
        del ctx
        addresses = map(
            mosaic.global_address, (experts_gmem, valid_gmem, row_token_gmem, tile_expert_gmem, token_row_gmem)
        )
        Planner(shapes, mosaic.scalar(rank), SharedWords(shared_smem), *addresses).plan()

    return plan


def interpreted_plan(shapes: Planning):
    """Returns the twin of `device_plan`, by the reference."""

    def plan(experts_gmem, valid_gmem, row_token_gmem, tile_expert_gmem, token_row_gmem, shared_smem, rank):
        del shared_smem

        @pl.when((rank == 0) & (lax.axis_index("warpgroup") == 0))
        def _():
            plan = reference.make_plan(experts_gmem[...], valid_gmem[...] != 0, shapes.experts, shapes.tile)
            row_token_gmem[...], tile_expert_gmem[...], token_row_gmem[...] = (
                plan.row_token,
                plan.tile_expert,
                plan.token_row,
            )

    return plan


@functools.partial(jax.jit, static_argnames=("num_experts", "tile", "config", "interpret"))
def make_plan(
    experts: jax.Array, valid: jax.Array, *, num_experts: int, tile: int, config: PlanConfig, interpret: Any = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the arrays of the op's plan, of at least one choice."""
    tokens, choices = experts.shape
    tiles = reference.tiles_of_plan(experts.size, num_experts, tile)
    shapes = Planning(tokens, choices, num_experts, tile, tiles, config.warpgroups, config.cluster)
    plan = (interpreted_plan if interpret else device_plan)(shapes)

    clusters: Any = {} if config.cluster == 1 else {"cluster": (config.cluster,), "cluster_names": ("rank",)}

    def moe_plan(*refs):
        plan(*refs, lax.axis_index("rank" if clusters else "cta"))

    return plgpu.kernel(
        moe_plan,
        out_type=(
            jax.ShapeDtypeStruct((shapes.rows,), jnp.int32),
            jax.ShapeDtypeStruct((tiles,), jnp.int32),
            jax.ShapeDtypeStruct(experts.shape, jnp.int32),
        ),
        scratch_types=[plgpu.SMEM((shapes.shared_words,), jnp.uint32)],
        grid=(1,),
        grid_names=("cta",),
        **clusters,
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(experts, valid.astype(jnp.int32))
