"""Products of a few bfloat16 rows with four-bit weights on Hopper: the weights are read once, as they are stored.

As in `few_rows.py`, also in the grouped form, the weights are the large operand, D^T = W X^T, and stream through shared
memory. Each of a CTA's four warpgroups takes every fourth group of 128 of a stage: it turns four-bit values into
bfloat16 in the registers that wgmma reads its first operand from (exact: integers from -15 to 15), multiplies, turns
the next group's meanwhile, and scales what comes out. At an item's end the four sums are added up in a fixed order.

A thread loads 16 bytes of a row at once; `int4.py` has stored there what wgmma wants of it.

A tile has 8, 16 or 32 rows. Tiles of more are taken as several of 32 with the same expert, whose weights come from the
second-level cache after the first.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgu
from jaxlib.mlir.dialects import arith

from pallas_kernels import mosaic, tuning
from pallas_kernels.mosaic import REF, SCALAR, Float, SharedWords, Word, integer
from pallas_kernels.mosaic.wgmma import SWIZZLE, SWIZZLED, descriptor, finish, first_row, floats
from pallas_kernels.quant_matmul import few_rows_tile as device
from pallas_kernels.quant_matmul.few_rows_tile import layout_of, pack, unpack
from pallas_kernels.quant_matmul.int4 import BIASED, GROUP, unpack_values
from pallas_kernels.quant_matmul.weight_stream import copy_lines, in_lines, plan_of, stream

WARPGROUPS = 4
"""Of a CTA."""
TILES = (8, 16, 32)
"""Tokens that a tile can have."""
MOST_ROWS = 128
"""That the dense product takes, as so many tiles. With more, the weights are better turned into bfloat16 once."""


# ---- a warpgroup's part of a stage -------------------------------------------------------------------------------


def pairs_of(word: Word, zero: Word) -> list[Word]:
    """Eight values of a word as pairs of bfloat16, less `zero` (a pair): nibbles i and i + 4."""
    found = []
    for i in range(4):
        biased = ((word >> (4 * i)) & 0x000F000F) | (BIASED * 0x10001)
        text = "sub.rn.bf16x2 $0, $1, $2;"
        found.append(Word(mgu.inline_ptx(text, biased.value, zero.value, result_types=integer(32))))
    return found


def start_product(left: list[Word], right: Any, columns: int) -> list[Any]:
    """Starts D[64, columns] = left[64, 128] right[columns, 128]^T of bfloat16; `left` are registers, 4 for 16 of K."""
    count = columns // 2
    names = "{" + ", ".join(f"${i}" for i in range(count)) + "}"
    text = (
        "{ .reg .b64 b; .reg .pred first, later; setp.ne.b32 first, 0, 0; setp.ne.b32 later, 1, 0;\n"
        "wgmma.fence.sync.aligned;\n"
    )
    for k in range(8):
        # 16 of K are 32 bytes of a row of 64 values; the other 64 lie behind all tokens' first ones.
        step = (k // 4) * (columns * 128 >> 4) + 2 * (k % 4)
        operand = "{" + ", ".join(f"${count + 1 + 4 * k + i}" for i in range(4)) + "}"
        text += (
            f"add.s64 b, ${count}, {step};\n"
            f"wgmma.mma_async.sync.aligned.m64n{columns}k16.f32.bf16.bf16 {names}, {operand}, b, "
            f"{'later' if k else 'first'}, 1, 1, 0;\n"
        )
    return floats(text + "wgmma.commit_group.sync.aligned; }", count, right, *left)


def stage_function(config: tuning.FewRowsInt4):
    """A function of a warpgroup: the sums, and the products of its groups in a stage.

    Its arguments:
      values: bytes [stages, groups / 2, rows, 128] in shared memory: a strip's rows of two groups each.
      x: bfloat16 [stages, 2 * groups, tile, 64] there.
      words: [stages, groups, rows] there, see `pack_int4`.
      sums: as `layout_of`; slot: the stage; warpgroup: its number.
    """
    layout = layout_of(config)

    @plgpu.inline_mgpu(
        arg_types=(SWIZZLED, SWIZZLED, REF, layout, SCALAR, SCALAR),
        return_type=plgpu.ShapeDtypeStruct((64 * config.tile,), jnp.float32, layout=layout),
    )
    def stage(ctx, values, x, words, sums, slot, warpgroup):
        del ctx
        slot, warpgroup = map(mosaic.scalar, (slot, warpgroup))
        thread = mosaic.thread_index() & 127
        row = first_row(thread)  # of a strip of less than 64 rows, also those past it, whatever is there
        # 16 bytes of a row of 128, swizzled by the row's lowest three bits.
        piece = (((warpgroup & 1) << 2) + (thread & 3)) ^ ((thread & 31) >> 2)
        group = slot * config.groups + warpgroup
        first = (group >> 1) * (config.rows * 128) + row * 128 + (piece << 4)
        own = SharedWords(mosaic.shared_address(values) + first)
        own_words = SharedWords(words).part(group * config.rows + row)
        right = descriptor(mosaic.shared_address(x) + group * (2 * config.tile * 128))

        def start(which):
            """The warpgroup's `which`-th product, under way, and the factors of its two rows."""
            further = WARPGROUPS * which
            # Rows r and r + 8.
            loaded = [own.load_many(32 * (further // 2 * config.rows + 8 * i), 4) for i in range(2)]
            scales = [own_words.load(further * config.rows + 8 * i) for i in range(2)]
            zeros = [(word & 0xFFFF) * 0x10001 for word in scales]
            left: list[Word] = []
            for upper, lower in zip(*loaded, strict=True):
                a, b = pairs_of(upper, zeros[0]), pairs_of(lower, zeros[1])
                for i in (0, 2):
                    left += [a[i], b[i], a[i + 1], b[i + 1]]
            there = arith.addi(right, mosaic.i64(further * (2 * config.tile * 128) >> 4))
            return start_product(left, there, config.tile), [Float.of_bits(word & -65536) for word in scales]

        total, flying = unpack(sums), start(0)
        for which in range(config.depth):
            (product, factors), more = flying, which + 1 < config.depth
            if more:
                flying = start(which + 1)
            product = finish(product, flying=1 if more else 0)
            total = [Float(p).times_plus(factors[i // 2 % 2], total[i]) for i, p in enumerate(product)]
        return pack(total, layout)

    return stage


def stage_twin(config: tuning.FewRowsInt4):
    """`stage_function` for the interpreter."""

    def stage(values, x, words, sums, slot, warpgroup):
        groups = [WARPGROUPS * which + warpgroup for which in range(config.depth)]
        loaded = [
            (values[slot, group // 2, :, :], x[slot, pl.ds(2 * group, 2), :, :], words[slot, group, :])
            for group in groups
        ]
        # Ordinary loads, which the next copy into the slot must not overtake.
        plgpu.commit_smem()
        for both, right, word in loaded:
            own = jnp.where(warpgroup % 2 == 0, both[:, :64], both[:, 64:])
            zeros = (word & 0xFFFF).astype(jnp.float32) - BIASED
            scales = lax.bitcast_convert_type(word & jnp.uint32(0xFFFF0000), jnp.float32)
            left = unpack_values(own).astype(jnp.float32) - zeros[:, None]
            right = right.astype(jnp.float32).transpose(0, 2, 1).reshape(GROUP, config.tile)
            product = jnp.dot(left, right, precision="highest") * scales[:, None]
            sums = sums + jnp.pad(product, ((0, 64 - config.rows), (0, 0))).reshape(-1)
        return sums

    return stage


def scratch_function(config: tuning.FewRowsInt4, *, load: bool):
    """Stores sums at `part` of scratch, float32 [3, 64 * tile]; or returns `sums` plus those that are there."""
    layout = layout_of(config)
    count = config.tile // 2
    result = {"return_type": plgpu.ShapeDtypeStruct((64 * config.tile,), jnp.float32, layout=layout)} if load else {}

    @plgpu.inline_mgpu(arg_types=(REF, layout, SCALAR), **result)
    def access(ctx, scratch, sums, part):
        del ctx
        own = SharedWords(scratch).part(mosaic.scalar(part) * (128 * count) + (mosaic.thread_index() & 127) * 4)
        sums = unpack(sums)
        for i in range(0, count, 4):
            if load:
                others = own.load_many(128 * i, 4)
                sums[i : i + 4] = [x + Float.of_bits(other) for x, other in zip(sums[i : i + 4], others, strict=True)]
            else:
                words = [x.bits() for x in sums[i : i + 4]]
                mosaic.ptx("st.shared.v4.b32 [$0], {$1, $2, $3, $4};", own.address(128 * i), *words)
        return pack(sums, layout) if load else None

    return access


def scratch_twin(config: tuning.FewRowsInt4, *, load: bool):
    """`scratch_function` for the interpreter."""
    del config

    def access(scratch, sums, part):
        if load:
            return sums + scratch[part, :]
        scratch[part, :] = sums
        return None

    return access


# ---- the kernel --------------------------------------------------------------------------------------------------


def body(*refs, config, rows, columns, grouped, interpret):
    """See the module. `refs`: the tiles' experts and how many are in use (if grouped), the operands, output, scratch.

    rows, columns: N and K of the weights.
    """
    plan, refs = (refs[:2], refs[2:]) if grouped else ((), refs)
    x, values, words, out, value_s, x_s, word_s, scratch, full, free, merged = refs
    add_stage = (stage_twin if interpret else stage_function)(config)
    put, get = ((scratch_twin if interpret else scratch_function)(config, load=load) for load in (False, True))
    write = (device.store_twin if interpret else device.store_function)(config, *out.shape, out.dtype)

    def load(slot, expert, token, row, step):
        copy_lines(values, expert * rows + row, config.groups // 2 * step, value_s.at[slot], full.at[slot])
        copy_lines(x, token, 2 * config.groups * step, x_s.at[slot], full.at[slot])
        groups = pl.ds(expert * (columns // GROUP) + step * config.groups, config.groups)
        plgpu.copy_gmem_to_smem(words.at[groups, pl.ds(row, config.rows)], word_s.at[slot], full.at[slot])

    def meet():
        """Every warpgroup has stored its sums, or is done with the others'."""
        plgpu.barrier_arrive(merged)
        plgpu.barrier_wait(merged)

    def store(sums, token, row, warpgroup):
        pl.when(warpgroup > 0)(lambda: put(scratch, sums, warpgroup - 1))
        meet()

        @pl.when(warpgroup == 0)
        def _():
            total = lax.fori_loop(0, WARPGROUPS - 1, lambda i, total: get(scratch, total, i), sums)
            write(out, total, token, row, warpgroup)

        meet()

    stream(
        config,
        strips=-(-rows // config.rows),
        steps=columns // (GROUP * config.groups),
        plan=plan,
        load=load,
        start=lambda: device.zeros(config),
        add=lambda sums, slot, step, row, warpgroup: add_stage(value_s, x_s, word_s, sums, slot, warpgroup),
        store=store,
        barriers=(full, free),
        tiles=-(-x.shape[0] // config.tile),
    )


def unsupported(x: jax.Array, packed: jax.Array, tile: int | None = None) -> str | None:
    """What the kernel does not take of these arguments; None if it takes all.

    Args:
      x: [M, K].
      packed: [..., N, K / 2].
      tile: rows of a tile of the grouped product; None for the dense one.
    """
    rows, columns = packed.shape[-2], packed.shape[-1] * 2
    if x.dtype != jnp.bfloat16:
        return f"x of dtype {x.dtype}; it takes bfloat16"
    if rows % 64 or columns % (GROUP * WARPGROUPS):
        return f"weights of N and K ({rows}, {columns}); it takes N in multiples of 64 and K in multiples of 512"
    if tile is None and not 1 <= x.shape[0] <= MOST_ROWS:
        return f"x of shape {x.shape}; it takes 1 to {MOST_ROWS} rows"
    if tile is not None and tile not in TILES and (tile == 0 or tile % TILES[-1]):
        return f"tiles of {tile} rows; it takes {', '.join(map(str, TILES))} and multiples of {TILES[-1]}"
    return None


def matmul(
    x: jax.Array,
    packed: jax.Array,
    words: jax.Array,
    *,
    dtype: Any = jnp.bfloat16,
    interpret: Any = None,
    config: tuning.FewRowsInt4 | None = None,
) -> jax.Array:
    """x W^T, summed in float32; for what is not `unsupported`.

    Args:
      x: bfloat16 [M, K].
      packed: uint8 [N, K / 2], see `pack_int4`.
      words: uint32 [K / 128, N], see `pack_int4`.
      dtype: of the result, bfloat16 or float32.
      interpret: parameters of the interpreter.
      config: for measurements; the default is the choice of `tuning`.

    Returns:
      [M, N].
    """
    tokens, rows = x.shape[0], packed.shape[0]
    tile = next((tile for tile in TILES if tile >= tokens), TILES[-1])
    config = config or tuning.few_rows_int4(tile, rows, 1, x.shape[1])
    if interpret is not None:  # rows past the end of x: zeros from the copies, which the interpreter would not take
        x = jnp.pad(x, ((0, -tokens % config.tile), (0, 0)))
    return call((), x, packed[None], words[None], dtype=dtype, interpret=interpret, config=config)[:tokens]


def grouped_matmul(
    x: jax.Array,
    packed: jax.Array,
    words: jax.Array,
    tile_expert: jax.Array,
    used_tiles: jax.Array | None,
    *,
    dtype: Any = jnp.bfloat16,
    interpret: Any = None,
    config: tuning.FewRowsInt4 | None = None,
) -> jax.Array:
    """`matmul` of each tile of rows with the weights of its expert; reads no others.

    Args:
      x: bfloat16 [P, K], in the order of a `RoutingPlan`.
      packed: uint8 [E, N, K / 2].
      words: uint32 [E, K / 128, N].
      tile_expert: int32 [tiles], the expert of each tile of P / tiles rows.
      used_tiles: int32 [], how many tiles hold a row: the first ones; None: all.

    Returns:
      [P, N]; tiles from `used_tiles` on are not written, whatever is in the memory stays there.
    """
    tile = x.shape[0] // tile_expert.shape[0]
    rows, tiles = packed.shape[1], tile_expert.shape[0]
    config = config or tuning.few_rows_int4(min(tile, TILES[-1]), rows, tiles, x.shape[1])
    plan = plan_of(tile_expert, used_tiles, tile // config.tile)
    return call(plan, x, packed, words, dtype=dtype, interpret=interpret, config=config)


@functools.partial(jax.jit, static_argnames=("dtype", "interpret", "config"))
def call(plan, x, packed, words, *, dtype, interpret, config) -> jax.Array:
    """The kernel, with or without a plan (experts of the tiles, how many are used)."""
    existing = packed.shape[1]
    if interpret is not None:  # rows past the end of an expert's, which a strip may have
        missing = (0, -existing % config.rows)
        packed, words = jnp.pad(packed, ((0, 0), missing, (0, 0))), jnp.pad(words, ((0, 0), (0, 0), missing))
    experts, rows, half = packed.shape
    kernel = plgpu.kernel(
        functools.partial(
            body, config=config, rows=rows, columns=2 * half, grouped=bool(plan), interpret=interpret is not None
        ),
        out_type=jax.ShapeDtypeStruct((x.shape[0], rows), dtype),
        scratch_types=(
            plgpu.SMEM((config.stages, config.groups // 2, config.rows, 128), packed.dtype, transforms=SWIZZLE),
            plgpu.SMEM((config.stages, 2 * config.groups, config.tile, 64), x.dtype, transforms=SWIZZLE),
            plgpu.SMEM((config.stages, config.groups, config.rows), words.dtype),
            plgpu.SMEM((WARPGROUPS - 1, 64 * config.tile), jnp.float32),
            plgpu.Barrier(num_arrivals=3, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS),
        ),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
        kernel_name="few_rows_int4",
    )
    packed = in_lines(packed.reshape(experts * rows, half))
    return kernel(*plan, in_lines(x), packed, words.reshape(-1, rows))[:, :existing]
