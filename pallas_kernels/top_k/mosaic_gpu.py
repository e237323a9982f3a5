"""Exact top-k of long rows on Hopper with one read of the scores.

Each CTA takes rows in turn. A row streams through a ring of TMA copies, which run ahead into the next rows; what is
above a threshold from a sample becomes a candidate (`streaming.py`), and at the end of the row a selection in shared
memory cuts the candidates to exactly k (`selection.py`). Few rows: the CTAs of a cluster take a row's chunks in turn.

Those two files are device code that the interpreter cannot run. Their twin, `InterpretedSteps`, stands for all steps of
a row: the ring of copies, the lengths and the order of rows and chunks are checked for races, the selection is not.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import llvm

from pallas_kernels.backend import without_gradient
from pallas_kernels.mosaic import (
    INT32,
    REF,
    SCALAR,
    SharedWords,
    Word,
    barrier,
    global_address,
    i32,
    integer,
    load_global,
    loop,
    offset,
    scalar,
    splat,
    thread_index,
)
from pallas_kernels.top_k.config import INTERPRETED, Config, choose_config
from pallas_kernels.top_k.selection import BINS, NEGATIVE_INFINITY, SCRATCH_WORDS
from pallas_kernels.top_k.streaming import NO_HISTOGRAM, Progress, Streaming

LANE_ROW = 256
"""Scores in a row of a TMA box: the most there can be. A row of scores is a whole number of these."""


class DeviceSteps:
    """The steps of a row on the GPU, run by all threads of the CTA.

    Refs: `scores` [T, L / 256, 256] and `out` [T, k] in device memory; the ring, the candidates, the histogram and the
    scratch words in shared memory. `progress` is a `Progress`, word by word.
    """

    def __init__(self, config: Config, row_length: int, k: int):
        streaming = functools.partial(Streaming, config, row_length)
        threads = config.warpgroups * 128
        vectors = config.sample // (4 * threads)
        layout = plgpu.Layout.WG_STRIDED((vectors * 512,), vec_size=4)

        @plgpu.inline_mgpu(arg_types=(REF, REF))
        def start(ctx, histogram_smem, scratch_smem):
            """Zeros, once."""
            for ref, words in (
                (histogram_smem, BINS * (1 if config.cluster == 1 else 2)),
                (scratch_smem, SCRATCH_WORDS),
            ):
                loop(thread_index(), words, threads, [], lambda i, ref=ref: SharedWords(ref).store(i, 0))
            barrier()

        @plgpu.inline_mgpu(
            arg_types=(REF,) * 4 + (SCALAR, SCALAR),
            return_type=plgpu.ShapeDtypeStruct((vectors * 512,), jnp.int32, layout=layout),
        )
        def load_sample(ctx, scores_gmem, candidates_smem, histogram_smem, scratch_smem, row, length):
            """Starts the loads of a row's sample; each thread has the bits of its part."""
            address = offset(global_address(scores_gmem), scalar(row), 4 * row_length)
            places = streaming(candidates_smem, histogram_smem, scratch_smem).sample_places(scalar(length))
            registers = [vector(load_global(offset(address, place, 4), 4)) for place in places]
            return mgpu.FragmentedArray(
                _registers=np.array(registers, dtype=object), _layout=layout.to_mgpu(), _is_signed=True
            )

        @plgpu.inline_mgpu(arg_types=(REF,) * 3 + (layout, SCALAR), return_type=(INT32, INT32))
        def first_threshold(ctx, candidates_smem, histogram_smem, scratch_smem, sample, length):
            """(threshold, shift) of a row from its sample."""
            words = [Word(llvm.extractelement(x, i32(i))) for x in sample.registers.flat for i in range(4)]
            threshold = streaming(candidates_smem, histogram_smem, scratch_smem).first_threshold(
                words, scalar(length), k
            )
            return tuple(splat(x) for x in threshold)

        @plgpu.inline_mgpu(arg_types=(REF,) * 4 + (SCALAR,) * 8, return_type=(INT32,) * 4)
        def take(ctx, ring_smem, candidates_smem, histogram_smem, scratch_smem, slot, first, length, step, *progress):
            """Takes the candidates of the chunk in a slot, which starts at position `first` -> progress."""
            device = streaming(candidates_smem, histogram_smem, scratch_smem)
            slot, first, length, step = map(scalar, (slot, first, length, step))
            chunk = SharedWords(ring_smem).part(slot * config.chunk + device.thread * 4)
            scores: list[Word] = []
            for i in range(0, config.per_thread, 4):
                scores += chunk.load_many(device.score_distance(i), 4)
            after = device.absorb(scores, first, length, step, Progress(*map(scalar, progress)), k)
            return tuple(splat(x) for x in after)

        @plgpu.inline_mgpu(arg_types=(REF,) * 5 + (SCALAR,) * 9)
        def finish(
            ctx,
            scores_gmem,
            out_gmem,
            candidates_smem,
            histogram_smem,
            scratch_smem,
            row,
            to_row,
            length,
            rank,
            threshold,
            *progress,
        ):
            """Writes the row's k best into `to_row`; `threshold` is what it started with."""
            row, to_row, length, rank, threshold = map(scalar, (row, to_row, length, rank, threshold))
            source = offset(global_address(scores_gmem), row, 4 * row_length)
            to = offset(global_address(out_gmem), to_row, 4 * k)
            device = streaming(candidates_smem, histogram_smem, scratch_smem)
            device.finish(source, to, length, Progress(*map(scalar, progress)), threshold, rank, k)

        self.start, self.load_sample, self.first_threshold = start, load_sample, first_threshold
        self.take, self.finish = take, finish


def vector(words: list[Word]) -> ir.Value:
    """Returns words as a vector, which is how an array's registers hold them."""
    value = llvm.mlir_undef(ir.VectorType.get((len(words),), integer(32)))
    for i, word in enumerate(words):
        value = llvm.insertelement(value, word.value, i32(i))
    return value


class InterpretedSteps:
    """The twin of `DeviceSteps`: no first threshold, and candidates that are always in order, best first.

    The first half of the candidates_smem' words are keys, the second half positions.
    """

    def __init__(self, config: Config, row_length: int, k: int):
        self.config, self.k = config, k

    def start(self, histogram_smem, scratch_smem):
        pass

    def load_sample(self, scores_gmem, candidates_smem, histogram_smem, scratch_smem, row, length):
        return length

    def first_threshold(self, candidates_smem, histogram_smem, scratch_smem, sample, length):
        return jnp.int32(NEGATIVE_INFINITY), jnp.int32(NO_HISTOGRAM)

    def take(
        self,
        ring_smem,
        candidates_smem,
        histogram_smem,
        scratch_smem,
        slot,
        first,
        length,
        step,
        count,
        counted,
        threshold,
        shift,
    ):
        capacity, chunk = self.config.capacity, self.config.chunk
        scores = ring_smem[slot].reshape(-1)
        plgpu.commit_smem()  # read, so the next copy may come
        bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
        keys = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
        at = first + jnp.arange(chunk, dtype=jnp.int32)
        fresh = ~jnp.isnan(scores) & (keys > threshold.astype(jnp.uint32)) & (at < length)
        exists = jnp.concatenate([jnp.arange(capacity) < count, fresh])
        keys = jnp.where(exists, jnp.concatenate([candidates_smem[:capacity], keys]), 0)
        at = jnp.concatenate([candidates_smem[capacity:], at.astype(jnp.uint32)])
        descending, at = lax.sort((~keys, at), num_keys=2)
        candidates_smem[:capacity], candidates_smem[capacity:] = ~descending[:capacity], at[:capacity]
        count = exists.sum(dtype=jnp.int32)
        full = count > capacity
        last = lax.bitcast_convert_type(~descending[self.k - 1], jnp.int32)
        return jnp.where(full, self.k, count), counted, jnp.where(full, last, threshold), shift

    def finish(
        self,
        scores_gmem,
        out_gmem,
        candidates_smem,
        histogram_smem,
        scratch_smem,
        row,
        to_row,
        length,
        rank,
        threshold,
        count,
        *progress,
    ):
        at = candidates_smem[self.config.capacity :][: self.k].astype(jnp.int32)
        out_gmem[to_row] = jnp.where(jnp.arange(self.k) < count, at, -1)


def body(*refs: Any, config: Config, rows: int, row_length: int, k: int, ctas: int, steps: Any) -> None:
    """The kernel: every CTA's rows, chunk by chunk. Lengths and output may be those of more rows: see `Part`."""
    scores_gmem, *operands, out_gmem, ring_smem, candidates_smem, histogram_smem, scratch_smem, full_bar = refs
    lengths_gmem, part_gmem = (*operands, None, None)[:2]
    memory = candidates_smem, histogram_smem, scratch_smem
    cluster, chunk, box = config.cluster, config.chunk, config.chunk // LANE_ROW
    warpgroup, cta = lax.axis_index("warpgroup"), lax.axis_index("cta")
    rank = lax.axis_index("rank") if cluster > 1 else cta * 0

    def in_round(i: jax.Array) -> jax.Array:
        """This CTA's place in a round of rows: there and back, so that a slope in their lengths evens out."""
        return jnp.where(lax.rem(i, jnp.int32(2)) == 1, ctas - 1 - cta, cta)

    first_row = cta * 0 if part_gmem is None else part_gmem[0] * rows
    whole_rounds, rest = divmod(rows, ctas)
    count = whole_rounds + (in_round(cta * 0 + whole_rounds) < rest).astype(jnp.int32)

    def row_of(i: jax.Array) -> jax.Array:
        """This CTA's row number i, or its last one."""
        i = lax.min(i, count - 1)
        return i * ctas + in_round(i)

    def length_of(i: jax.Array) -> jax.Array:
        if lengths_gmem is None:
            return i * 0 + row_length
        return lax.clamp(jnp.int32(0), lengths_gmem[first_row + row_of(i)], jnp.int32(row_length))

    def chunks_of(i: jax.Array) -> jax.Array:
        """Chunks of the row that this CTA takes, at least one."""
        chunks = lax.div(length_of(i) + (chunk - 1), jnp.int32(chunk))
        return lax.max(lax.div(chunks - rank + (cluster - 1), jnp.int32(cluster)), jnp.int32(1))

    def copy(slot: jax.Array, i: jax.Array, step: jax.Array) -> None:
        """Starts the copy of a chunk of row number i, if there is such a row."""

        @pl.when(jnp.logical_and(warpgroup == 0, i < count))
        def _():
            at = pl.ds((step * cluster + rank) * box, box)
            plgpu.copy_gmem_to_smem(scores_gmem.at[row_of(i), at], ring_smem.at[slot], full_bar.at[slot])

    def following(i: jax.Array, step: jax.Array, chunks: jax.Array) -> tuple[jax.Array, ...]:
        """Returns the chunk after one, as (row number, step, chunks of that row)."""
        last = step + 1 >= chunks
        i = jnp.where(last, i + 1, i)
        return i, jnp.where(last, 0, step + 1), lax.cond(last, lambda: chunks_of(i), lambda: chunks)

    steps.start(histogram_smem, scratch_smem)
    zero = cta * 0
    ahead: Any = (zero, zero, chunks_of(zero))
    for slot in range(config.stages):
        copy(jnp.int32(slot), *ahead[:2])
        ahead = following(*ahead)
    sample = steps.load_sample(scores_gmem, *memory, row_of(zero), length_of(zero))

    def one_row(i: jax.Array, state: Any) -> Any:
        slot, *ahead, sample = state
        length = length_of(i)
        threshold, shift = steps.first_threshold(*memory, sample, length)

        def one_chunk(step: jax.Array, state: Any) -> Any:
            slot, *ahead, count, counted, threshold, shift = state
            plgpu.barrier_wait(full_bar.at[slot])
            first = (step * cluster + rank) * chunk
            progress = steps.take(ring_smem, *memory, slot, first, length, step, count, counted, threshold, shift)
            copy(slot, *ahead[:2])
            return (jnp.where(slot == config.stages - 1, 0, slot + 1), *following(*ahead), *progress)

        state = (slot, *ahead, i * 0, i * 0, threshold, shift)
        slot, *ahead, _count, _counted, _threshold, _shift = state = lax.fori_loop(0, chunks_of(i), one_chunk, state)
        sample = steps.load_sample(scores_gmem, *memory, row_of(i + 1), length_of(i + 1))  # arrives during the rest
        row = row_of(i)
        steps.finish(scores_gmem, out_gmem, *memory, row, first_row + row, length, rank, threshold, *state[4:])
        return (slot, *ahead, sample)

    lax.fori_loop(0, count, one_row, (zero, *ahead, sample))


class Part(NamedTuple):
    """Which part of a longer list the rows of a call are.

    Attributes:
      number: int32 [], counted in parts of as many rows as the call has.
      out: int32 [rows of all parts, k], where the part's rows are written, in place.
    """

    number: jax.Array
    out: jax.Array


@functools.partial(jax.jit, static_argnames=("k", "config", "interpret"))
def top_k(
    scores: jax.Array,
    k: int,
    *,
    lengths: jax.Array | None = None,
    part: Part | None = None,
    config: Config | None = None,
    interpret: Any = None,
) -> jax.Array:
    """See `pallas_kernels.top_k`. Rows that are not a multiple of 256 long are copied into rows that are.

    With `part`, `lengths` are those of all parts' rows, and so is what is returned.
    """
    rows, length = scores.shape
    if rows == 0:
        return jnp.zeros((0, k), jnp.int32)
    padding = -length % LANE_ROW if length else LANE_ROW
    if padding:
        scores = jnp.pad(scores, ((0, 0), (0, padding)), constant_values=-jnp.inf)
    if config is None:
        config = INTERPRETED if interpret else choose_config(rows, length)
    if part:
        operands = (lengths, part.number.reshape(1))
        run = launch((rows, length + padding), k, (), config, interpret)
        return pl.run_state(lambda out: run(box(scores), *operands, out))(part.out)
    run = launch((rows, length + padding), k, jax.ShapeDtypeStruct((rows, k), jnp.int32), config, interpret)
    kernel = without_gradient(lambda scores, *lengths: run(box(scores), *lengths), "top_k")
    return kernel(scores, *(() if lengths is None else (lengths,)))


def box(scores: jax.Array) -> jax.Array:
    """Returns rows as the copies take them: [T, L / 256, 256]."""
    return scores.reshape(scores.shape[0], -1, LANE_ROW)


def launch(shape: tuple[int, int], k: int, out_type: Any, config: Config, interpret: Any) -> Callable[..., Any]:
    """Returns the kernel on rows of a multiple of 256 scores."""
    rows, row_length = shape
    ctas = min(rows, config.ctas)
    steps = (InterpretedSteps if interpret else DeviceSteps)(config, row_length, k)
    histograms = 1 if config.cluster == 1 else 2
    clusters: Any = {} if config.cluster == 1 else {"cluster": (config.cluster,), "cluster_names": ("rank",)}
    return plgpu.kernel(
        functools.partial(body, config=config, rows=rows, row_length=row_length, k=k, ctas=ctas, steps=steps),
        out_type=out_type,
        scratch_types=(
            plgpu.SMEM((config.stages, config.chunk // LANE_ROW, LANE_ROW), jnp.float32),
            plgpu.SMEM((2 * config.capacity,), jnp.uint32),
            plgpu.SMEM((histograms * BINS,), jnp.uint32),
            plgpu.SMEM((SCRATCH_WORDS,), jnp.uint32),
            plgpu.Barrier(num_barriers=config.stages),
        ),
        grid=(ctas,),
        grid_names=("cta",),
        **clusters,
        num_threads=config.warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=interpret,
        kernel_name="top_k",
    )
