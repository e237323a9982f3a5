"""Products of a few bfloat16 rows with four-bit weights on Hopper: the weights are read once, as they are stored.

As in `few_rows.py` the weights are the large operand, D^T = W X^T, and stream through shared memory. Each of a CTA's
four warpgroups takes one of the four groups of 128 of a stage: it turns the four-bit values into bfloat16 in the
registers that wgmma reads its first operand from (exact: integers from -15 to 15), multiplies, and scales what comes
out. At an item's end the four sums are added up in a fixed order.

A thread loads 16 bytes of a row at once, 32 neighbours along K; wgmma wants others of it. Any order of K will do if the
tokens have the same: `arrange` puts theirs so.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic.gpu import utils as mgu

from pallas_kernels import mosaic, tuning
from pallas_kernels.mosaic import REF, SCALAR, Float, SharedWords, Word, integer
from pallas_kernels.quant_matmul import few_rows_tile as device
from pallas_kernels.quant_matmul.few_rows_tile import layout_of, pack, unpack
from pallas_kernels.quant_matmul.int4 import GROUP, unpack_int4
from pallas_kernels.quant_matmul.weight_stream import stream
from pallas_kernels.wgmma import SWIZZLE, SWIZZLED, descriptor, finish, first_row, floats

GROUPS = 4
"""Of a stage, and warpgroups of a CTA."""
STRIP = 64
"""Rows of the weight that a CTA takes at a time."""
TILES = (8, 16, 32)
"""Tokens that a tile can have."""
VALUE_BYTES = STRIP * 128
"""Of the values of two groups."""
BIASED = 0x43004300
"""A pair of bfloat16: 128, whose lowest seven bits count ones."""


def permute(x: jax.Array) -> jax.Array:
    """[..., 128] of a group in the kernel's order of K."""
    parts = x.reshape(*x.shape[:-1], 4, 4, 2, 2, 2)  # lane of a quad, word, half of a word, nibble of the half
    order = (1, 3, 4, 0, 2)
    first = x.ndim - 1
    return parts.transpose(*range(first), *(first + i for i in order)).reshape(x.shape)


def arrange(x: jax.Array, tile: int) -> jax.Array:
    """bfloat16 [M, K] as the kernel reads it: [K / 64, tile, 64], with zeros for rows that are not there."""
    x = jnp.pad(x, ((0, tile - x.shape[0]), (0, 0)))
    return permute(x.reshape(tile, -1, GROUP)).reshape(tile, -1, 64).transpose(1, 0, 2)


def scale_words(scales: jax.Array, zeros: jax.Array) -> jax.Array:
    """uint32 [K / 128, N]: the scale's bits above those of 128 + zero as bfloat16. Once for a weight.

    Args:
      scales: bfloat16 [N, K / 128].
      zeros: uint8 [N, K / 128], up to 15.
    """
    high = lax.bitcast_convert_type(scales, jnp.uint16).astype(jnp.uint32)
    return ((high << 16) | (zeros.astype(jnp.uint32) + (BIASED & 0xFFFF))).T


# ---- a warpgroup's part of a stage -------------------------------------------------------------------------------


def pairs_of(word: Word, zero: Word) -> list[Word]:
    """Eight values of a word as pairs of bfloat16, less `zero` (a pair): nibbles i and i + 4."""
    found = []
    for i in range(4):
        biased = ((word >> (4 * i)) & 0x000F000F) | BIASED
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
    """A function of a warpgroup: the sums, and the product of its group in a stage.

    Its arguments:
      values: bytes [stages, 2 * 64, 128] in shared memory: 64 rows of two groups, twice.
      x: bfloat16 [stages, 8, tile, 64] there, in the kernel's order.
      words: [stages, 4, 64] there, see `scale_words`.
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
        row = first_row(thread)
        # 16 bytes of a row of 128, swizzled by the row's lowest three bits.
        piece = (((warpgroup & 1) << 2) + (thread & 3)) ^ ((thread & 31) >> 2)
        first = (slot * 2 + (warpgroup >> 1)) * VALUE_BYTES + row * 128 + (piece << 4)
        own = SharedWords(mosaic.shared_address(values) + first)
        own_words = SharedWords(words).part((slot * GROUPS + warpgroup) * STRIP + row)
        right = descriptor(mosaic.shared_address(x) + (slot * GROUPS + warpgroup) * (2 * config.tile * 128))

        loaded = [own.load_many(8 * 32 * i, 4) for i in range(2)]  # rows r and r + 8
        scales = [own_words.load(8 * i) for i in range(2)]
        zeros = [(word & 0xFFFF) * 0x10001 for word in scales]
        left: list[Word] = []
        for upper, lower in zip(*loaded, strict=True):
            a, b = pairs_of(upper, zeros[0]), pairs_of(lower, zeros[1])
            for i in (0, 2):
                left += [a[i], b[i], a[i + 1], b[i + 1]]
        product = finish(start_product(left, right, config.tile), flying=0)
        factors = [Float.of_bits(word & -65536) for word in scales]
        added = [
            Float(p).times_plus(factors[i // 2 % 2], total)
            for i, (p, total) in enumerate(zip(product, unpack(sums), strict=True))
        ]
        return pack(added, layout)

    return stage


def stage_twin(config: tuning.FewRowsInt4):
    """`stage_function` for the interpreter."""

    def stage(values, x, words, sums, slot, warpgroup):
        both = values[slot, pl.ds((warpgroup // 2) * STRIP, STRIP), :]
        right = x[slot, pl.ds(2 * warpgroup, 2), :, :].astype(jnp.float32)
        word = words[slot, warpgroup, :]
        # Ordinary loads, which the next copy into the slot must not overtake.
        plgpu.commit_smem()
        own = jnp.where(warpgroup % 2 == 0, both[:, :64], both[:, 64:])
        zeros = (word & 0xFFFF).astype(jnp.float32) - (BIASED & 0xFFFF)
        scales = lax.bitcast_convert_type(word & jnp.uint32(0xFFFF0000), jnp.float32)
        left = permute(unpack_int4(own).astype(jnp.float32)) - zeros[:, None]
        product = jnp.dot(left, right.transpose(0, 2, 1).reshape(GROUP, config.tile), precision="highest")
        return sums + (product * scales[:, None]).reshape(-1)

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


def body(x, values, words, out, value_s, x_s, word_s, scratch, full, free, merged, *, config, columns, interpret):
    """See the module. `merged`: every warpgroup has stored its sums, or is done with the others'."""
    rows = out.shape[1]
    add_stage = (stage_twin if interpret else stage_function)(config)
    put, get = ((scratch_twin if interpret else scratch_function)(config, load=load) for load in (False, True))
    write = (device.store_twin if interpret else device.store_function)(config, *out.shape, out.dtype)

    def load(slot, expert, token, row, step):
        del expert, token
        for i in range(2):
            plgpu.copy_gmem_to_smem(
                values.at[pl.ds(row, STRIP), pl.ds((2 * step + i) * 128, 128)],
                value_s.at[slot, pl.ds(i * STRIP, STRIP)],
                full.at[slot],
            )
        plgpu.copy_gmem_to_smem(x.at[pl.ds(step * 8, 8)], x_s.at[slot], full.at[slot])
        plgpu.copy_gmem_to_smem(
            words.at[pl.ds(step * GROUPS, GROUPS), pl.ds(row, STRIP)], word_s.at[slot], full.at[slot]
        )

    def meet():
        plgpu.barrier_arrive(merged)
        plgpu.barrier_wait(merged)

    def store(sums, token, row, warpgroup):
        pl.when(warpgroup > 0)(lambda: put(scratch, sums, warpgroup - 1))
        meet()

        @pl.when(warpgroup == 0)
        def _():
            total = lax.fori_loop(0, GROUPS - 1, lambda i, total: get(scratch, total, i), sums)
            write(out, total, token, row, warpgroup)

        meet()

    stream(
        config,
        strips=rows // STRIP,
        steps=columns // (GROUP * GROUPS),
        plan=(),
        load=load,
        start=lambda: device.zeros(config),
        add=lambda sums, slot, step, warpgroup: add_stage(value_s, x_s, word_s, sums, slot, warpgroup),
        store=store,
        barriers=(full, free),
    )


def unsupported(x: jax.Array, values: jax.Array) -> str | None:
    """What the kernel does not take of x [M, K] and values [N, K / 2]; None if it takes all."""
    rows, columns = values.shape[0], values.shape[1] * 2
    if x.dtype != jnp.bfloat16:
        return f"x of dtype {x.dtype}; it takes bfloat16"
    if not 1 <= x.shape[0] <= TILES[-1]:
        return f"x of shape {x.shape}; it takes 1 to {TILES[-1]} rows"
    if rows % STRIP or columns % (GROUP * GROUPS):
        return f"weights of shape ({rows}, {columns}); it takes N in multiples of {STRIP} and K in multiples of 512"
    return None


def matmul(
    x: jax.Array,
    values: jax.Array,
    words: jax.Array,
    *,
    dtype: Any = jnp.bfloat16,
    interpret: Any = None,
    config: tuning.FewRowsInt4 | None = None,
) -> jax.Array:
    """x W^T, summed in float32; for what is not `unsupported`.

    Args:
      x: bfloat16 [M, K].
      values: uint8 [N, K / 2], see `quantize_int4`.
      words: uint32 [K / 128, N], see `scale_words`.
      dtype: of the result, bfloat16 or float32.
      interpret: parameters of the interpreter.
      config: for measurements; the default is the choice of `tuning`.

    Returns:
      [M, N].
    """
    tokens, rows, columns = x.shape[0], values.shape[0], values.shape[1] * 2
    config = config or tuning.few_rows_int4(next(tile for tile in TILES if tile >= tokens))
    kernel = plgpu.kernel(
        functools.partial(body, config=config, columns=columns, interpret=interpret is not None),
        out_type=jax.ShapeDtypeStruct((tokens if interpret is None else config.tile, rows), dtype),
        scratch_types=(
            plgpu.SMEM((config.stages, 2 * STRIP, 128), values.dtype, transforms=SWIZZLE),
            plgpu.SMEM((config.stages, 2 * GROUPS, config.tile, 64), x.dtype, transforms=SWIZZLE),
            plgpu.SMEM((config.stages, GROUPS, STRIP), words.dtype),
            plgpu.SMEM((GROUPS - 1, 64 * config.tile), jnp.float32),
            plgpu.Barrier(num_arrivals=4, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=GROUPS, num_barriers=config.stages),
            plgpu.Barrier(num_arrivals=GROUPS),
        ),
        grid=(config.ctas,),
        grid_names=("cta",),
        num_threads=GROUPS,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    return kernel(arrange(x, config.tile), values, words)[:tokens]
