"""Keys from raw projections into the cache in one pass, on Hopper: one warp a token, nothing in shared memory.

Lane l holds latents 16 l to 16 l + 15 (8 lanes are one FP8 group), rope pair l, and index features 4 l to 4 l + 3. Sums
and maxima cross lanes by shuffles, the Hadamard transform is seven butterflies, and every value is rounded where the
reference rounds it. The caches are Refs, hence aliased: only the slots' bytes move. The layer is data, so that all
layers of a model share one kernel.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax

from pallas_kernels import mosaic, rowwise
from pallas_kernels.cache_format import index_block_bytes, pack_rows, record_bytes, to_bytes
from pallas_kernels.cache_write import reference
from pallas_kernels.cache_write.config import Config
from pallas_kernels.mosaic import REF, SCALAR, Float, Word
from pallas_kernels.mosaic.fp8 import group_maximum, power_of_two, quantize
from pallas_kernels.paging import BLOCK_SIZE
from pallas_kernels.quantize.reference import FP8_MAX, GROUP, SMALLEST_AMAX
from pallas_kernels.quantize.reference import quantize as reference_quantize

LATENT, ROPE, DIM = 512, 64, 128
HADAMARD_ENTRY = float(np.asarray(DIM**-0.5, jnp.bfloat16))
"""Of the matrix in bfloat16, but for its sign."""
WARPS = 4
"""Of a warpgroup."""


def unsupported(kv, index, kv_a, index_key, norms: reference.KeyNorms, angles) -> str | None:
    """Says which arguments of `cache_write` the kernel does not take, and which it does; None if it takes all."""
    if (norms.latent_weight.shape[0], 2 * angles[0].shape[1], index_key.shape[1]) != (LATENT, ROPE, DIM):
        return (
            f"kv_a of shape {kv_a.shape} and index_key of shape {index_key.shape}; it takes [T, {LATENT} + {ROPE}] and "
            f"[T, {DIM}]"
        )
    for name, array, dtypes in (
        ("kv_a", kv_a, ("bfloat16",)),
        ("index_key", index_key, ("bfloat16",)),
        ("kv", kv, ("bfloat16", "uint8")),
        ("index", index, ("bfloat16", "uint8")),
        ("cos", angles[0], ("float32",)),
        ("sin", angles[1], ("float32",)),
        ("latent_weight", norms.latent_weight, ("bfloat16", "float32")),
        ("index_weight", norms.index_weight, ("bfloat16", "float32")),
        ("index_bias", norms.index_bias, ("bfloat16", "float32")),
    ):
        if array.dtype not in map(jnp.dtype, dtypes):
            return f"{name} of dtype {array.dtype}; it takes {' or '.join(dtypes)}"
    return None


@dataclasses.dataclass(frozen=True)
class Shapes:
    """What the device code is compiled for.

    Attributes:
      tokens: T.
      layers: of the cache.
      blocks: of a layer.
      fp8_rows: latent rows are FP8 records, else bfloat16.
      fp8_keys: index keys are FP8, else bfloat16.
      float32_weights: of the latent weight, index weight and index bias: float32, else bfloat16.
      eps: of the latent's norm and of the index key's.
      quantize_latent: see the op.
      scale_fmt: see the op.
      each: tokens that a warp takes.
    """

    tokens: int
    layers: int
    blocks: int
    fp8_rows: bool
    fp8_keys: bool
    float32_weights: tuple[bool, bool, bool]
    eps: tuple[float, float]
    quantize_latent: bool
    scale_fmt: str | None
    each: int

    @property
    def row_bytes(self) -> int:
        """Of a latent row."""
        return record_bytes(LATENT, ROPE) if self.fp8_rows else 2 * (LATENT + ROPE)

    @property
    def block_bytes(self) -> int:
        """Of a block of index keys."""
        return index_block_bytes(DIM) if self.fp8_keys else 2 * BLOCK_SIZE * DIM


# ---- device code: FP8 ------------------------------------------------------------------------------------------


def fake_quantize(words: list[Word], lanes: int, scale_fmt: str | None) -> list[Word]:
    """Returns packed bfloat16 values rounded to what FP8 holds."""
    values, scale = quantize(words, lanes, scale_fmt)
    return mosaic.pack_bf16([x * scale for x in mosaic.unpack_e4m3(values)])


def quantize_twice(words: list[Word], lanes: int, scale_fmt: str | None) -> tuple[list[Word], Float]:
    """`quantize(fake_quantize(words))`.

    With scales that are powers of two the values stay what they are, unless the largest became 224: then half the scale
    holds twice the values.
    """
    if scale_fmt is None:
        return quantize(fake_quantize(words, lanes, scale_fmt), lanes, scale_fmt)
    largest = group_maximum(words, lanes).max(SMALLEST_AMAX)
    scale, inverse = power_of_two(largest * float(np.float32(1 / FP8_MAX)))
    values = mosaic.pack_e4m3([x * inverse for x in mosaic.unpack_bf16(words)])
    halved = (largest * inverse).at_most(232)  # the tie between 224 and 240 is rounded to even
    values = mosaic.branch(halved, lambda: mosaic.pack_e4m3([x + x for x in mosaic.unpack_e4m3(values)]), values)
    return values, scale * Float.of_bits(halved.where(0x3F000000, 0x3F800000))


# ---- device code: one token ------------------------------------------------------------------------------------


class Writer:
    """One lane's view of the arrays, and the steps of a token."""

    def __init__(self, shapes: Shapes, slots, layer, kv_a, index_key, weights, cos, sin, kv, index):
        self.shapes = shapes
        self.lane = mosaic.thread_index() & 31
        self.slots, self.kv_a, self.index_key, self.cos, self.sin, self.kv, self.index = map(
            mosaic.global_address, (slots, kv_a, index_key, cos, sin, kv, index)
        )
        [self.layer] = mosaic.load_read_only(mosaic.global_address(layer))
        self.latent_weight, self.index_weight, self.index_bias = (
            self.weights(mosaic.global_address(ref), count, is_float32)
            for ref, count, is_float32 in zip(weights, (16, 4, 4), shapes.float32_weights, strict=True)
        )

    def weights(self, address, count: int, is_float32: bool) -> list[Float]:
        """Returns the `count` weights of this lane's features."""
        size = 4 if is_float32 else 2
        words = mosaic.load_read_only(mosaic.offset(address, self.lane, count * size), count * size // 4)
        return [Float.of_bits(word) for word in words] if is_float32 else mosaic.unpack_bf16(words)

    def load(self, token: Word) -> list[Word]:
        """What a token needs from memory: its slot, 8 words of latents, a rope pair, 2 words of index features, and
        cos and sin of the rope pair.
        """
        load, lane = mosaic.load_global, self.lane
        row = mosaic.offset(self.kv_a, token, 2 * (LATENT + ROPE))
        turns = [mosaic.offset(address, token, 2 * ROPE) for address in (self.cos, self.sin)]
        return [
            *load(mosaic.offset(self.slots, token, 4)),
            *load(mosaic.offset(row, lane, 32), 8),
            *load(mosaic.offset(row, lane + LATENT // 2, 4)),
            *load(mosaic.offset(mosaic.offset(self.index_key, token, 2 * DIM), lane, 8), 2),
            *[word for turn in turns for word in load(mosaic.offset(turn, lane, 4))],
        ]

    def feature_angles(self, token: Word) -> list[list[Float]]:
        """cos and sin of the index features, which the rope pairs' loads have brought near; of no use past the rope."""
        pair = (self.lane & (ROPE // 8 - 1)) << 2
        turns = [mosaic.offset(address, token, 2 * ROPE) for address in (self.cos, self.sin)]
        words = [mosaic.load_read_only(mosaic.offset(turn, pair, 4), 4) for turn in turns]
        return [[Float.of_bits(word) for word in four] for four in words]

    def write(self, token: Word, exists: Word, loaded: list[Word]) -> None:
        """A token into the caches, if it exists and has a slot. No branch: a warp's shuffles must stay together."""
        slot, latent, rope, key = loaded[0], loaded[1:9], loaded[9], loaded[10:12]
        cos, sin = map(Float.of_bits, loaded[12:])
        exists = exists & (slot < self.shapes.blocks * BLOCK_SIZE) & (self.layer < self.shapes.layers)
        block = self.layer * self.shapes.blocks + (slot >> 6)
        row = mosaic.offset(self.kv, (block << 6) + (slot & 63), self.shapes.row_bytes)
        self.write_row(row, self.normed_latent(latent, loaded), self.rotated_pair(rope, cos, sin), exists)
        keys = self.keys(key, *self.feature_angles(token))
        self.write_key(mosaic.offset(self.index, block, self.shapes.block_bytes), slot & 63, keys, exists)

    def normed_latent(self, latent: list[Word], loaded: list[Word]) -> list[Word]:
        """Returns the latents after RMSNorm, once all that was loaded is there."""
        values = mosaic.unpack_bf16(latent)
        square = mosaic.zero_after([*loaded, self.layer])
        for x in values:
            square = x.times_plus(x, square)
        factor = (mosaic.warp_sum(square) * (1 / LATENT) + self.shapes.eps[0]).reciprocal_sqrt()
        return mosaic.pack_bf16([x * factor * w for x, w in zip(values, self.latent_weight, strict=True)])

    @staticmethod
    def rotated_pair(rope: Word, cos: Float, sin: Float) -> Word:
        """Returns the rope key's pair, of neighbours, turned."""
        first, second = mosaic.unpack_bf16([rope])
        [word] = mosaic.pack_bf16([first * cos - second * sin, first * sin + second * cos])
        return word

    def keys(self, key: list[Word], cosines: list[Float], sines: list[Float]) -> list[Word]:
        """Returns the index features after LayerNorm, rotation of the halves of the first `rope`, and Hadamard."""
        values = mosaic.unpack_bf16(key)
        mean = mosaic.warp_sum(sum(values, Float(0.0))) * (1 / DIM)
        values = [x - mean for x in values]
        square = Float(0.0)
        for x in values:
            square = x.times_plus(x, square)
        factor = (mosaic.warp_sum(square) * (1 / DIM) + self.shapes.eps[1]).reciprocal_sqrt()
        normed = mosaic.pack_bf16(
            [x * factor * w + b for x, w, b in zip(values, self.index_weight, self.index_bias, strict=True)]
        )
        # Features 4 l + j and 4 (l + 8) + j are a pair: the lower one is first * cos - second * sin.
        others = mosaic.unpack_bf16([mosaic.shuffle("bfly", word, ROPE // 8) for word in normed])
        sign = (self.lane & (ROPE // 8)).equals(0).where(1 << 31, 0)
        rotated = mosaic.pack_bf16(
            [
                x * cos + other * Float.of_bits(sin.bits() ^ sign)
                for x, other, cos, sin in zip(mosaic.unpack_bf16(normed), others, cosines, sines, strict=True)
            ]
        )
        in_rope = self.lane < ROPE // 4
        return self.hadamard([in_rope.where(a, b) for a, b in zip(rotated, normed, strict=True)])

    def hadamard(self, words: list[Word]) -> list[Word]:
        """Transforms 4 features a lane: two butterflies in the lane, five across lanes."""
        a, b, c, d = mosaic.unpack_bf16(words)
        a, b, c, d = a + b, a - b, c + d, c - d
        values = [a + c, b + d, a - c, b - d]
        for distance in (1, 2, 4, 8, 16):
            sign = Float.of_bits((self.lane & distance).equals(0).where(0x3F800000, 0xBF800000))
            others = [Float.of_bits(mosaic.shuffle("bfly", x.bits(), distance)) for x in values]
            values = [x.times_plus(sign, other) for x, other in zip(values, others, strict=True)]
        return mosaic.pack_bf16([x * HADAMARD_ENTRY for x in values])

    def write_row(self, row, latent: list[Word], rope: Word, exists: Word) -> None:
        """A latent row of either form at its address."""
        lane, store = self.lane, functools.partial(mosaic.store_global, predicate=exists)
        if self.shapes.fp8_rows:
            convert = quantize_twice if self.shapes.quantize_latent else quantize
            values, scale = convert(latent, 8, self.shapes.scale_fmt)
            store(mosaic.offset(row, lane, 16), values)
            scale_at = mosaic.offset(row, (lane >> 3) + LATENT // 4, 4)
            store(scale_at, [scale.bits()], predicate=exists & (lane & 7).equals(0))
            store(mosaic.offset(row, lane + (LATENT + 4 * (LATENT // GROUP)) // 4, 4), [rope])
        else:
            if self.shapes.quantize_latent:
                latent = fake_quantize(latent, 8, self.shapes.scale_fmt)
            store(mosaic.offset(row, lane << 1, 16), latent[:4])
            store(mosaic.offset(row, (lane << 1) + 1, 16), latent[4:])
            store(mosaic.offset(row, lane + LATENT // 2, 4), [rope])

    def write_key(self, block, place: Word, key: list[Word], exists: Word) -> None:
        """An index key of either form at its place in a block."""
        lane, store = self.lane, functools.partial(mosaic.store_global, predicate=exists)
        if self.shapes.fp8_keys:
            [values], scale = quantize(key, 32, self.shapes.scale_fmt)
            store(mosaic.offset(block, (place << 5) + lane, 4), [values])
            scale_at = mosaic.offset(block, place + BLOCK_SIZE * DIM // 4, 4)
            store(scale_at, [scale.bits()], predicate=exists & lane.equals(0))
        else:
            store(mosaic.offset(block, (place << 5) + lane, 8), key)


def device_write(shapes: Shapes):
    """Returns the function of a warpgroup's tokens, `first` and after. One warp takes every fourth."""

    @plgpu.inline_mgpu(arg_types=(*[REF] * 11, SCALAR))
    def write(
        ctx,
        slots_gmem,
        layer_gmem,
        kv_a_gmem,
        index_key_gmem,
        latent_weight_gmem,
        index_weight_gmem,
        index_bias_gmem,
        cos_gmem,
        sin_gmem,
        kv_gmem,
        index_gmem,
        first,
    ):
        del ctx
        weights = (latent_weight_gmem, index_weight_gmem, index_bias_gmem)
        writer = Writer(
            shapes, slots_gmem, layer_gmem, kv_a_gmem, index_key_gmem, weights, cos_gmem, sin_gmem, kv_gmem, index_gmem
        )
        first = mosaic.scalar(first) + ((mosaic.thread_index() >> 5) & 3)

        def at(i: Word | int) -> tuple[Word, Word]:
            """Returns the warp's i-th token, the last one in place of one that does not exist; whether it exists."""
            token = first + mosaic.as_word(i) * WARPS
            return token.min(shapes.tokens - 1), token < shapes.tokens

        def one(i: Word | int, *loaded: Word) -> list[Word]:
            following = writer.load(at((mosaic.as_word(i) + 1).min(shapes.each - 1))[0]) if shapes.each > 1 else []
            writer.write(*at(i), list(loaded))
            return following

        loaded = writer.load(at(0)[0])
        if shapes.each == 1:
            one(0, *loaded)
        else:
            mosaic.loop(0, shapes.each, 1, loaded, one)

    return write


def butterflies(x: jax.Array) -> jax.Array:
    """`rowwise.hadamard` of bfloat16 [1, DIM] without a matrix, which a kernel's body cannot hold."""
    sums = x.astype(jnp.float32)
    for distance in (1, 2, 4, 8, 16, 32, 64):
        pairs = sums.reshape(-1, 2, distance)
        sums = jnp.stack([pairs[:, 0] + pairs[:, 1], pairs[:, 0] - pairs[:, 1]], axis=1)
    return (sums.reshape(x.shape) * HADAMARD_ENTRY).astype(x.dtype)


def interpreted_write(shapes: Shapes):
    """Returns the twin of `device_write`: token by token, through the reference's functions."""

    def write(
        slots_gmem,
        layer_gmem,
        kv_a_gmem,
        index_key_gmem,
        latent_weight_gmem,
        index_weight_gmem,
        index_bias_gmem,
        cos_gmem,
        sin_gmem,
        kv_gmem,
        index_gmem,
        first,
    ):
        norms = reference.KeyNorms(latent_weight_gmem[...], index_weight_gmem[...], index_bias_gmem[...], *shapes.eps)

        def one(token):
            here = pl.ds(token, 1)
            slot, angles = slots_gmem[token], (cos_gmem[here], sin_gmem[here])
            latent, rope_key = reference.latents(
                kv_a_gmem[here], norms.latent_weight, norms.latent_eps, angles, shapes.quantize_latent, shapes.scale_fmt
            )
            row = pack_rows(latent, rope_key, kv_gmem.dtype, shapes.scale_fmt)
            key = rowwise.layer_norm(index_key_gmem[here], norms.index_weight, norms.index_bias, norms.index_eps)
            key = butterflies(rowwise.rope_leading(key, *angles))

            @pl.when((slot >= 0) & (slot < shapes.blocks * BLOCK_SIZE) & (layer_gmem[0] < shapes.layers))
            def _():
                block, place = slot // BLOCK_SIZE, slot % BLOCK_SIZE
                kv_gmem[layer_gmem[0], block, pl.ds(place, 1)] = row
                if not shapes.fp8_keys:
                    index_gmem[layer_gmem[0], block, pl.ds(place, 1)] = key
                    return
                values, scale = reference_quantize(key, shapes.scale_fmt, DIM)
                index_gmem[layer_gmem[0], block, pl.ds(place * DIM, DIM)] = to_bytes(values)[0]
                index_gmem[layer_gmem[0], block, pl.ds(BLOCK_SIZE * DIM + place * 4, 4)] = to_bytes(scale)[0]

        for i in range(WARPS * shapes.each):
            pl.when(first + i < shapes.tokens)(functools.partial(one, first + i))

    return write


@functools.partial(jax.jit, static_argnames=("eps", "quantize_latent", "scale_fmt", "config", "interpret"))
def cache_write(
    kv: jax.Array,
    index: jax.Array,
    layer: jax.Array,
    slots: jax.Array,
    projections: tuple[jax.Array, jax.Array],
    weights: tuple[jax.Array, jax.Array, jax.Array],
    angles: tuple[jax.Array, jax.Array],
    *,
    eps: tuple[float, float],
    quantize_latent: bool,
    scale_fmt: str | None,
    config: Config,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Runs the op's kernel on at least one token.

    Args:
      kv, index, slots, quantize_latent, scale_fmt: see the op.
      layer: int32 [1].
      projections: kv_a and index_key.
      weights: latent weight, index weight and index bias.
      angles: cos and sin.
      eps: of the latent's norm and of the index key's.
      config: how the work is divided.
      interpret: parameters of Pallas' interpreter, or None.
    """
    shapes = Shapes(
        tokens=slots.shape[0],
        layers=kv.shape[0],
        blocks=kv.shape[1],
        fp8_rows=kv.dtype == jnp.uint8,
        fp8_keys=index.dtype == jnp.uint8,
        float32_weights=tuple(weight.dtype == jnp.float32 for weight in weights),
        eps=eps,
        quantize_latent=quantize_latent,
        scale_fmt=scale_fmt,
        each=config.tokens,
    )
    write = (interpreted_write if interpret else device_write)(shapes)

    def cache_write(*refs):
        warpgroup = lax.axis_index("cta") * config.warpgroups + lax.axis_index("warpgroup")
        write(*refs, warpgroup * (WARPS * config.tokens))

    kernel = plgpu.kernel(
        cache_write,
        out_type=(),
        grid=(-(-shapes.tokens // config.cta_tokens),),
        grid_names=("cta",),
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )
    inputs = (slots, layer, *projections, *weights, *angles)
    return pl.run_state(lambda caches: kernel(*inputs, *caches))((kv, index))
