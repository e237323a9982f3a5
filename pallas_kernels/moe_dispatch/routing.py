"""Group-limited routing in one kernel on Hopper: one warp a token, its experts' scores in registers.

Lane l holds experts V l to V l + V - 1, so that a group is a whole number of neighbouring lanes. Scores are compared as
unsigned keys of the same order, ties by the lowest index, so the choice is that of `lax.top_k` on the same scores.

The sigmoid takes the steps of CUDA's `expf` (relative error below 2^-22) and a correctly rounded division: equal logits
get equal scores, and experts differ from the reference's only where two biased scores that are not equal lie within a
few units in the last place.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxlib.mlir import ir

from pallas_kernels import mosaic
from pallas_kernels.moe_dispatch import reference
from pallas_kernels.mosaic import REF, SCALAR, Float, Word

WARPS = 4
"""Of a CTA; each takes a token."""
MASKED = 0x007FFFFF
"""The key of -inf, that of experts in groups which are dropped. The key 0 is below all: an expert that is chosen."""


@dataclasses.dataclass(frozen=True)
class Routing:
    """What the device code is compiled for.

    Attributes:
      tokens: T.
      experts: E, a power of two.
      groups: of consecutive experts, a power of two.
      groups_kept: see the op.
      experts_per_token: see the op.
      normalize: see the op.
      scaling_factor: see the op.
    """

    tokens: int
    experts: int
    groups: int
    groups_kept: int
    experts_per_token: int
    normalize: bool
    scaling_factor: float

    @property
    def values(self) -> int:
        """Experts of a lane."""
        return max(1, self.experts // 32)

    @property
    def lanes(self) -> int:
        """That hold experts."""
        return self.experts // self.values

    @property
    def group_lanes(self) -> int:
        """Lanes of a group."""
        return self.lanes // self.groups


def unsupported(logits: jax.Array, bias: jax.Array, num_groups: int, groups_kept: int, experts_per_token: int):
    """Says which arguments of `route` the kernel does not take, and which it does; None if it takes all."""
    experts = logits.shape[1]
    if experts not in (8, 16, 32, 64, 128, 256):
        return f"logits of shape {logits.shape}; it takes [T, E] with E a power of two from 8 to 256"
    if num_groups not in (1, 2, 4, 8, 16, 32) or 2 * num_groups > experts or not 1 <= groups_kept <= num_groups:
        return f"{groups_kept} of {num_groups} groups; it takes a power of two up to 32, of two experts or more each"
    if not 1 <= experts_per_token <= min(32, experts):
        return f"{experts_per_token} experts per token; it takes 1 to {min(32, experts)}"
    for name, array in (("logits", logits), ("bias", bias)):
        if array.dtype != jnp.float32:
            return f"{name} of dtype {array.dtype}; it takes float32"
    return None


# ---- device code -----------------------------------------------------------------------------------------------


def sigmoid(x: Float) -> Float:
    """1 / (1 + exp(-x))."""
    x = Float.of_bits(x.bits() ^ (1 << 31))
    # exp(x) = 2^n * 2^f: n is taken from the low bits of a sum, with x / ln 2 clipped to what a float holds.
    clipped = mosaic.ptx_float("fma.rn.sat.f32 $0, $1, $2, $3;", x, 0.0057249800302088261, 0.5)
    shifted = mosaic.ptx_float("fma.rm.f32 $0, $1, $2, $3;", clipped, 252.0, 12582913.0)
    fraction = x.times_plus(1.4426950216293335, Float(12583039.0) - shifted)
    fraction = x.times_plus(1.925963033500011079e-08, fraction)
    power = mosaic.ptx_float("ex2.approx.ftz.f32 $0, $1;", fraction)
    return Float(1.0) / (power * Float.of_bits(shifted.bits() << 23) + 1.0)


def key_of(x: Float) -> Word:
    """Returns a word in the order of the floats, NaN on top; there is no -0 here."""
    bits = x.bits()
    return bits ^ (bits.signed_shift_right(31) | (1 << 31))


def float_of(key: Word) -> Float:
    """Returns the inverse of `key_of`."""
    return Float.of_bits(key ^ ((key ^ -1).signed_shift_right(31) | (1 << 31)))


def keep_groups(shapes: Routing, keys: list[Word], lane: Word) -> Word:
    """Returns whether this lane's group is one of the best, by the sum of its two best scores."""
    best, second = keys[0], mosaic.as_word(0)
    for key in keys[1:]:
        second, best = second.max(best.min(key)), best.max(key)
    distance = 1
    while distance < shapes.group_lanes:
        other_best, other_second = (mosaic.shuffle("bfly", x, distance) for x in (best, second))
        second, best = second.max(other_second).max(best.min(other_best)), best.max(other_best)
        distance *= 2
    group_key, group = key_of(float_of(best) + float_of(second)), lane >> (shapes.group_lanes.bit_length() - 1)
    before = mosaic.as_word(0)
    for other in range(shapes.groups):
        key = mosaic.shuffle("idx", group_key, other * shapes.group_lanes)
        before = before + ((key > group_key) | (key.equals(group_key) & (group > other))).to_word()
    return before < shapes.groups_kept


def take_best(keys: list[Word], first: Word) -> Word:
    """Returns the warp's expert of the largest key, the lowest of equal ones; `first` is the lane's first expert."""
    largest = mosaic.warp_reduce("max", functools.reduce(Word.max, keys))
    places = [key.equals(largest).where(first + i, 0x7FFFFFFF) for i, key in enumerate(keys)]
    return mosaic.warp_reduce("min", functools.reduce(Word.min, places))


def route_token(
    shapes: Routing,
    lane: Word,
    token: Word,
    exists: Word,
    logits: ir.Value,
    bias: ir.Value,
    experts: ir.Value,
    weights: ir.Value,
) -> None:
    """Routes one warp's token, between addresses."""
    inside = lane < shapes.lanes
    first, width = lane * shapes.values, min(4, shapes.values)
    at = inside.where(first, 0)
    row = mosaic.offset(logits, token, 4 * shapes.experts)

    def load(address: ir.Value) -> list[Float]:
        words = [
            word
            for i in range(0, shapes.values, width)
            for word in mosaic.load_read_only(mosaic.offset(address, at + i, 4), width)
        ]
        return [Float.of_bits(word) for word in words]

    corrections, loaded = load(bias), load(row)
    scores = [sigmoid(x) for x in loaded]
    keys = [inside.where(key_of(score + b), 0) for score, b in zip(scores, corrections, strict=True)]
    kept = keep_groups(shapes, keys, lane)
    keys = [inside.where(kept.where(key, MASKED), 0) for key in keys]
    expert_of_lane, score_of_lane, total = mosaic.as_word(0), mosaic.as_word(0), Float(0.0)
    for place in range(shapes.experts_per_token):
        expert = take_best(keys, first)
        score = mosaic.as_word(0)
        for i in range(shapes.values):
            taken = expert.equals(first + i)
            score, keys[i] = taken.where(scores[i].bits(), score), taken.where(0, keys[i])
        score = mosaic.shuffle("idx", score, expert >> (shapes.values.bit_length() - 1))
        total = total + Float.of_bits(score)
        here = lane.equals(place)
        expert_of_lane, score_of_lane = here.where(expert, expert_of_lane), here.where(score, score_of_lane)
    weight = Float.of_bits(score_of_lane)
    weight = (weight / total if shapes.normalize else weight) * shapes.scaling_factor
    writes, place = exists & (lane < shapes.experts_per_token), token * shapes.experts_per_token + lane
    mosaic.store_global(mosaic.offset(experts, place, 4), [expert_of_lane], predicate=writes)
    mosaic.store_global(mosaic.offset(weights, place, 4), [weight.bits()], predicate=writes)


def device_route(shapes: Routing):
    """Returns the function of a CTA's tokens, `first` and after."""

    @plgpu.inline_mgpu(arg_types=(REF, REF, REF, REF, SCALAR))
    def route(ctx, logits_gmem, bias_gmem, experts_gmem, weights_gmem, first):
        del ctx
        thread = mosaic.thread_index()
        token = mosaic.scalar(first) + (thread >> 5)
        addresses = map(mosaic.global_address, (logits_gmem, bias_gmem, experts_gmem, weights_gmem))
        route_token(shapes, thread & 31, token.min(shapes.tokens - 1), token < shapes.tokens, *addresses)

    return route


def interpreted_route(shapes: Routing):
    """Returns the twin of `device_route`: token by token, through the reference."""
    choice = (shapes.groups, shapes.groups_kept, shapes.experts_per_token, shapes.normalize, shapes.scaling_factor)

    def route(logits_gmem, bias_gmem, experts_gmem, weights_gmem, first):
        def one(token):
            here = pl.ds(token, 1)
            experts_gmem[here], weights_gmem[here] = reference.route(logits_gmem[here], bias_gmem[...], *choice)

        for i in range(WARPS):
            pl.when(first + i < shapes.tokens)(functools.partial(one, first + i))

    return route


@functools.partial(jax.jit, static_argnames=("shapes", "interpret"))
def route(logits: jax.Array, bias: jax.Array, *, shapes: Routing, interpret: Any = None):
    """Runs the op's kernel on at least one token."""
    body = (interpreted_route if interpret else device_route)(shapes)

    def moe_route(*refs):
        body(*refs, lax.axis_index("cta") * WARPS)

    chosen = (shapes.tokens, shapes.experts_per_token)
    return plgpu.kernel(
        moe_route,
        out_type=(jax.ShapeDtypeStruct(chosen, jnp.int32), jax.ShapeDtypeStruct(chosen, jnp.float32)),
        grid=(-(-shapes.tokens // WARPS),),
        grid_names=("cta",),
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True, reduction_scratch_bytes=0),
        interpret=interpret,
    )(logits, bias)
