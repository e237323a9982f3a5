"""A warpgroup's part of a tile: products of keys with the heads of some tokens, summed over the heads in registers.

A product is keys (M = 64) times heads of one or two tokens (N = 64 a token), so that the heads of a key lie in one
thread and its quad: ReLU and the weighted sum are two instructions for a head and a key, a few shuffles do the rest.
"""

import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith

from pallas_kernels import mosaic
from pallas_kernels.indexer_logits.config import Config
from pallas_kernels.mosaic import REF, SCALAR, SharedWords, Word
from pallas_kernels.mosaic.wgmma import DIM, SWIZZLED, descriptor, finish, first_row, floats, numbers_of, start_product
from pallas_kernels.paging import BLOCK_SIZE

HEADS = 64
"""Of the products; fewer heads are padded with weights of zero."""
BYTES = 64 * DIM
"""Of one token's queries, or of one block's keys, in shared memory."""
COLUMNS = plgpu.Layout.WGMMA.reduce(0)


def head_sum(product: list[ir.Value], weights: list[ir.Value]) -> list[ir.Value]:
    """Returns sums of relu(product) * weight over a thread's 16 of 64 columns, for both rows of a thread."""
    text = "{ .reg .f32 t, e0, e1, o0, o1;\n" + "".join(f"mov.f32 {x}, 0f00000000;\n" for x in ("e0", "e1", "o0", "o1"))
    for j in range(8):
        for column, parity in enumerate("eo"):
            for row in range(2):
                text += (
                    f"max.f32 t, ${2 + 4 * j + 2 * row + column}, 0f00000000; "
                    f"fma.rn.f32 {parity}{row}, t, ${34 + 2 * j + column}, {parity}{row};\n"
                )
    return floats(text + "add.f32 $0, e0, o0; add.f32 $1, e1, o1; }", 2, *product, *weights)


def of_lane(x: ir.Value, mask: int) -> ir.Value:
    """`x` of the lane whose number differs in `mask`."""
    return floats(f"shfl.sync.bfly.b32 $0, $1, {mask}, 31, 0xffffffff;", 1, x)[0]


def reduce_scatter(values: list[ir.Value], bit: Word, mask: int) -> list[ir.Value]:
    """Adds over two lanes that differ in `mask`; the one whose `bit` is set keeps the second half of the sums."""
    sums: list[ir.Value] = []
    for low, high in zip(values[: len(values) // 2], values[len(values) // 2 :], strict=True):
        send, keep = arith.select(bit.value, low, high), arith.select(bit.value, high, low)
        sums.append(arith.addf(keep, of_lane(send, mask)))
    return sums


def minus_infinity() -> ir.Value:
    """Returns the constant."""
    return mosaic.f32(float("-inf"))


def device_tile(config: Config, row: int):
    """Returns a function of a warpgroup: its part of a tile.

    Its arguments:
      queries: e4m3 [query_slots, group * 64, 128] in shared memory.
      keys, scales: bytes [stages, tile_keys, 128] and [stages, tile_keys / 32, 128] there.
      out: float32 [T, row].
      weights: the heads' float32 [64] for each of the warpgroup's tokens, in COLUMNS.
      ends: how many keys each of them sees; 0 for a token of another run.
      token, key: the first ones of the warpgroup.
      query_slot, slot: where the queries and the keys are.
      warpgroup: its number.

    Stores, for each token, whole blocks of 64 keys as far as the token sees some of them, -inf where it does not.
    """
    tokens, blocks, pairs = config.tokens, config.blocks, max(1, config.tokens // 2)
    rows = 2 if tokens == 4 else 1  # of a block, that a thread stores
    arguments = (SWIZZLED, SWIZZLED, REF, REF, (COLUMNS,) * tokens, (SCALAR,) * tokens, *(SCALAR,) * 5)

    @plgpu.inline_mgpu(arg_types=arguments)
    def tile(ctx, queries, keys, scales, out, weights, ends, token, key, query_slot, slot, warpgroup):
        del ctx
        weights = [numbers_of(x) for x in weights]
        ends = [mosaic.scalar(x) for x in ends]
        token, key, query_slot, slot, warpgroup = map(mosaic.scalar, (token, key, query_slot, slot, warpgroup))
        first_query = query_slot * (config.group * HEADS)
        first_key = slot * config.tile_keys
        if config.split_keys:
            first_key = first_key + warpgroup * (blocks * BLOCK_SIZE)
        else:
            first_query = first_query + warpgroup * (tokens * HEADS)
        query_descriptor = descriptor(mosaic.shared_address(queries) + first_query * DIM)
        key_descriptor = descriptor(mosaic.shared_address(keys) + first_key * DIM)

        # A thread's quad holds rows r and r + 8 of each token; after the sums over the quad, each lane keeps one of its
        # sums, or two (4 tokens), or both lanes that differ in `low` the same one (1 token).
        thread = mosaic.thread_index() & 127
        low, high = thread & 1, (thread >> 1) & 1
        stored_row = first_row(thread)
        end = ends[0]
        if tokens == 2:
            token, end = token + low, low.differs(0).where(ends[1], ends[0])
        if tokens == 4:
            of_pair = [low.differs(0).where(ends[i + 2], ends[i]) for i in range(2)]
            token, end = token + (low << 1) + high, high.differs(0).where(of_pair[1], of_pair[0])
        else:
            stored_row = stored_row + (high << 3)
        row_scales = SharedWords(scales).part(first_key + stored_row)
        address = mosaic.offset(mosaic.offset(mosaic.global_address(out), token, 4 * row), key + stored_row, 4)

        def quad_sum(sums):
            if tokens == 1:
                (x,) = reduce_scatter(sums, high.differs(0), 2)
                return [arith.addf(x, of_lane(x, 1))]
            return reduce_scatter(reduce_scatter(sums, low.differs(0), 1), high.differs(0), 2)

        def store(block, sums, scales):
            start = key + block * BLOCK_SIZE
            stored = start < end
            if tokens == 1:
                stored = Word(arith.andi(stored.value, low.equals(0).value))
            for i, (x, scale) in enumerate(zip(quad_sum(sums), scales, strict=True)):
                visible = start + stored_row + 8 * i < end
                x = arith.select(visible.value, arith.mulf(x, scale), minus_infinity())
                at = arith.addi(address, mosaic.i64(4 * (block * BLOCK_SIZE + 8 * i)))
                mosaic.ptx("st.global.f32 [$0], $1;", at, x, predicate=stored)

        def start(block, pair):
            a = arith.addi(key_descriptor, mosaic.i64(block * BYTES >> 4))
            b = arith.addi(query_descriptor, mosaic.i64(pair * 2 * BYTES >> 4))
            return start_product(a, b, HEADS * min(2, tokens))

        products = [(block, pair) for block in range(blocks) for pair in range(pairs)]
        flying = start(*products[0])
        sums: list[ir.Value] = []
        block_scales: list[ir.Value] = []
        for (block, pair), following in zip(products, [*products[1:], None], strict=True):
            product = flying
            if config.overlap and following:
                flying = start(*following)
            if pair == 0:
                at = [row_scales.address(block * BLOCK_SIZE + 8 * i) for i in range(rows)]
                sums, block_scales = [], [floats("ld.shared.f32 $0, [$1];", 1, x)[0] for x in at]
            product = finish(product, flying=1 if config.overlap and following else 0)
            for i in range(min(2, tokens)):
                sums += head_sum(product[32 * i : 32 * i + 32], weights[2 * pair + i])
            if not config.overlap and following:
                flying = start(*following)
            if pair == pairs - 1:
                store(block, sums, block_scales)

    return tile


def interpreted_tile(config: Config, row: int):
    """Returns the twin of `device_tile`."""
    del row
    tokens, blocks = config.tokens, config.blocks

    def tile(queries, keys, scales, out, weights, ends, token, key, query_slot, slot, warpgroup):
        key_part = warpgroup if config.split_keys else 0
        token_part = 0 if config.split_keys else warpgroup
        q = queries[query_slot, pl.ds(token_part * tokens * HEADS, tokens * HEADS), :].astype(jnp.float32)
        k = keys[slot, pl.ds(key_part * blocks * BLOCK_SIZE, blocks * BLOCK_SIZE), :]
        scale = scales[slot, pl.ds(key_part * blocks * 2, blocks * 2), :]
        # Ordinary loads, which the next copy into the slot must not overtake.
        plgpu.commit_smem()
        k = lax.bitcast_convert_type(k, jnp.float8_e4m3fn).astype(jnp.float32)
        scale = lax.bitcast_convert_type(scale.reshape(-1, 4), jnp.float32)
        for t in range(tokens):
            dots = jnp.dot(k, q[t * HEADS : (t + 1) * HEADS].T, precision="highest")
            scores = (jnp.maximum(dots, 0) * weights[t][None]).sum(axis=1) * scale
            for block in range(blocks):
                start = key + block * BLOCK_SIZE
                part = scores[block * BLOCK_SIZE : (block + 1) * BLOCK_SIZE]
                part = jnp.where(start + jnp.arange(BLOCK_SIZE) < ends[t], part, -jnp.inf)

                @pl.when(start < ends[t])
                def _(start=start, part=part, t=t):
                    out[token + t, pl.ds(start, BLOCK_SIZE)] = part

    return tile


# ---- what lies past a token ------------------------------------------------------------------------------------


def device_fill(row: int):
    """`fill(out, token, begin, end)`: -inf into out[token, begin:end], by a warpgroup; multiples of 64."""

    @plgpu.inline_mgpu(arg_types=(REF, SCALAR, SCALAR, SCALAR))
    def fill(ctx, out, token, begin, end):
        del ctx
        token, begin, end = map(mosaic.scalar, (token, begin, end))
        address = mosaic.offset(mosaic.global_address(out), token, 4 * row)

        def body(column):
            mosaic.store_global(mosaic.offset(address, column, 4), [0xFF800000 - 2**32] * 4)

        mosaic.loop(begin + ((mosaic.thread_index() & 127) << 2), end, 512, [], body)

    return fill


def interpreted_fill(row: int):
    """Returns the twin of `device_fill`."""
    del row

    def fill(out, token, begin, end):
        def block(i, _):
            out[token, pl.ds(begin + i * BLOCK_SIZE, BLOCK_SIZE)] = jnp.full(BLOCK_SIZE, -jnp.inf, jnp.float32)

        lax.fori_loop(0, jnp.maximum(end - begin, 0) // BLOCK_SIZE, block, None)

    return fill
