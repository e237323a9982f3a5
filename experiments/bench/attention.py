"""The whole attention op of one layer, and the best dense attention that stock JAX has for the same work.

Ours: scores of the indexer, selection, attention over what was chosen. Queries of both are projected already, keys are
in the cache. The dense sides get their inputs in the form they like best (expanded keys and values, padded values,
contiguous latents); making it is not timed.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp

from dsv32_jax.experiments.bench import cases
from dsv32_jax.experiments.bench.cases import LAYER, SCALE, Case, compile_, normal
from dsv32_jax.experiments.bench.shapes import Attention
from pallas_kernels.index_select import index_select
from pallas_kernels.paging import physical_slots
from pallas_kernels.sparse_mla import sparse_mla

VALUE_DIM, NOPE_DIM = 128, 128
"""Of one head in the expanded form; its keys are nope and rope, 192 wide."""
LONGEST_OF_ALL_HEADS = 32768
"""Tokens of which 128 heads, 192 wide, have less than 2^31 elements."""
config = cases.config


def power_of_two(number: int) -> int:
    """The smallest that is not less."""
    return 1 << (number - 1).bit_length()


def build(shape: Attention, backend: str) -> Case:
    """The sparse op. A prefill goes through the tokens in chunks, each seeing a block table no longer than it needs.

    All chunks share one set of queries, which is far larger than L2; positions, and so the keys, are their own.
    """
    key = cases.keys(shape)
    tables, kv, index = caches(shape, key)
    chunk = min(shape.tokens, shape.chunk)
    queries = normal(next(key), (chunk, shape.heads, shape.latent + shape.rope)) / 8
    index_queries = normal(next(key), (chunk, shape.index_heads, shape.dim), jnp.float8_e4m3fn)
    weights = normal(next(key), (chunk, shape.index_heads), jnp.float32)
    calls = []
    for start in range(0, shape.tokens, chunk):
        seen = shape.context if shape.kind != "prefill" else start + chunk
        width = min(power_of_two(seen), shape.context) // cases.BLOCK_SIZE
        sequence, positions = cases.last_tokens(chunk, seen, shape.sequences)
        arguments = (queries, index_queries, weights, kv, index, tables[:, :width], sequence, positions)
        avals = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in arguments)
        calls.append((sparse_program(avals, shape.chosen, shape.rope, backend), arguments))

    def run() -> Any:
        out = None
        for program, arguments in calls:
            out = program.call(*arguments)
        return out

    pairs = cases.visible(shape.tokens, shape.context, shape.sequences)
    last = calls[-1][0]  # its context is the longest, and so its memory the largest
    return Case(
        run=run,
        work={"bf16": chosen_work(shape), "fp8": 2 * pairs * shape.index_heads * shape.dim},
        bytes=attention_bytes(shape),
        dtype="bfloat16 queries, " + ("FP8 cache" if shape.cache == "fp8" else "bfloat16 cache") + ", FP8 index keys",
        backend=last.backend,
        memory=last.memory,
        tokens=shape.tokens,
    )


def caches(shape: Attention, key: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Block tables, latents and index keys."""
    blocks = max(shape.room, shape.sequences * shape.context) // cases.BLOCK_SIZE
    used = shape.sequences * shape.context // cases.BLOCK_SIZE
    tables = cases.block_tables(next(key), 1, blocks * cases.BLOCK_SIZE)[0, :used].reshape(shape.sequences, -1)
    kv = cases.latent_cache(next(key), blocks, shape.latent, shape.rope, shape.cache)
    return tables, kv, cases.index_cache(next(key), blocks, shape.dim)


@cases.once
def sparse_program(avals: tuple[jax.ShapeDtypeStruct, ...], chosen: int, rope: int, backend: str) -> cases.Program:
    """The op compiled for one chunk; prompts of different lengths share what they have in common."""

    def op(queries, index_queries, weights, kv, index, tables, sequence, positions):
        selected = select(chosen, index_queries, weights, index, tables, sequence, positions, backend)
        slots = physical_slots(selected, sequence, tables)
        lengths = jnp.minimum(positions + 1, selected.shape[1])  # the selection returns present keys first
        return sparse_mla(queries, kv, LAYER, slots, scale=SCALE, rope_dim=rope, lengths=lengths, backend=backend)[0]

    return compile_(op, *avals)


def select(chosen: int, index_queries, weights, index, tables, sequence, positions, backend: str) -> jax.Array:
    """Logical positions int32 [T, K] of the chosen keys."""
    k = min(chosen, tables.shape[1] * cases.BLOCK_SIZE)
    return index_select(index_queries, weights, index, LAYER, tables, sequence, positions, k=k, backend=backend)


def chosen_work(shape: Attention) -> int:
    """Operations of sparse attention: the first tokens of a prompt see fewer keys than they may choose."""
    short = min(shape.chosen, shape.tokens) if shape.kind == "prefill" else 0
    keys = short * (short + 1) // 2 + (shape.tokens - short) * min(shape.chosen, shape.context)
    return 2 * keys * shape.heads * (2 * shape.latent + shape.rope)


def attention_bytes(shape: Attention) -> int:
    """Queries of both kinds, the output, and each cached row and index key once."""
    rows = min(shape.tokens * shape.chosen, shape.sequences * shape.context)
    a_token = shape.heads * 2 * (2 * shape.latent + shape.rope) + shape.index_heads * (shape.dim + 4)
    keys = rows * cases.row_bytes(shape) + shape.sequences * shape.context * (shape.dim + 4)
    return shape.tokens * a_token + keys


# ---- what stands beside it -------------------------------------------------------------------------------------


def build_reference(shape: Attention) -> Case:
    """The best that stock JAX has for this kind."""
    return {"prefill": causal_flash, "decode": absorbed_einsum, "masked": masked_dense}[shape.kind](shape)


def causal_flash(shape: Attention) -> Case:
    """Causal attention of every head's own keys and values; cuDNN on a GPU, values padded to the keys' width.

    Long prompts go in groups of heads, one call after another: an array of all heads would pass 2^31 elements. The
    groups share arrays, which are far larger than L2.
    """
    gpu = jax.default_backend() == "gpu"
    width = NOPE_DIM + shape.rope
    groups = max(1, shape.context // LONGEST_OF_ALL_HEADS)
    key = cases.keys(shape)
    q, k, v = (normal(next(key), (1, shape.context, shape.heads // groups, width)) for _ in range(3))
    v = v.at[..., VALUE_DIM:].set(0)

    def dense(q, k, v):
        implementation: Literal["cudnn"] | None = "cudnn" if gpu else None
        return jax.nn.dot_product_attention(q, k, v, scale=SCALE, is_causal=True, implementation=implementation)

    program = compile_(dense, q, k, v)
    pairs = cases.visible(shape.tokens, shape.context, 1)

    def run() -> Any:
        return [program.call(q, k, v) for _ in range(groups)]

    return Case(
        run=run,
        work={"bf16": 2 * pairs * shape.heads * (width + VALUE_DIM)},
        bytes=2 * shape.context * shape.heads * (2 * width + 2 * VALUE_DIM),
        dtype="bfloat16",
        backend="reference",
        memory={**program.memory, "output": groups * program.memory["output"]},
        tokens=shape.tokens,
        name=f"dense causal attention, {'cuDNN' if gpu else 'XLA'} through jax.nn, values padded to {width}",
    )


def absorbed_einsum(shape: Attention) -> Case:
    """Dense attention of one token of each sequence over its contiguous bfloat16 latents.

    The second product takes whole rows and drops the rope part afterwards: slicing first would copy the cache.
    """
    key = cases.keys(shape)
    width = shape.latent + shape.rope
    queries = normal(next(key), (shape.tokens, shape.heads, width)) / 8
    latents = normal(next(key), (shape.sequences, shape.context, width)) / 8

    def dense(queries, latents):
        scores = jnp.einsum("thd,tld->thl", queries, latents, preferred_element_type=jnp.float32) * SCALE
        weights = jax.nn.softmax(scores, axis=-1).astype(latents.dtype)
        return jnp.einsum("thl,tld->thd", weights, latents)[..., : shape.latent]

    program = compile_(dense, queries, latents)
    return Case(
        run=lambda: program.call(queries, latents),
        work={"bf16": 2 * shape.tokens * shape.context * shape.heads * (2 * shape.latent + shape.rope)},
        bytes=2 * shape.sequences * shape.context * width,
        dtype="bfloat16",
        backend="reference",
        memory=program.memory,
        tokens=shape.tokens,
        name="dense absorbed einsum over bfloat16 latents",
    )


def masked_dense(shape: Attention) -> Case:
    """The official demo's prefill: all scores, minus infinity where a key was not chosen, softmax, all values.

    Its selection is by our kernels, so that only the form of the attention differs.
    """
    key = cases.keys(shape)
    tables = cases.block_tables(next(key), 1, shape.context)
    index = cases.index_cache(next(key), tables.size, shape.dim)
    index_queries = normal(next(key), (shape.tokens, shape.index_heads, shape.dim), jnp.float8_e4m3fn)
    weights = normal(next(key), (shape.tokens, shape.index_heads), jnp.float32)
    width = NOPE_DIM + shape.rope
    q = normal(next(key), (shape.tokens, shape.heads, width))
    k = normal(next(key), (shape.context, shape.heads, width))
    v = normal(next(key), (shape.context, shape.heads, VALUE_DIM))
    sequence, positions = cases.last_tokens(shape.tokens, shape.context, 1)

    def dense(q, k, v, index_queries, weights, index, tables, sequence, positions):
        chosen = select(shape.chosen, index_queries, weights, index, tables, sequence, positions, "auto")
        rows = jnp.arange(shape.tokens)[:, None]
        columns = jnp.where(chosen < 0, shape.context, chosen)
        mask = jnp.full((shape.tokens, shape.context), -jnp.inf, q.dtype).at[rows, columns].set(0, mode="drop")
        scores = jnp.einsum("shd,thd->sht", q, k) * jnp.asarray(SCALE, q.dtype) + mask[:, None]
        shares = jax.nn.softmax(scores.astype(jnp.float32), axis=-1).astype(q.dtype)
        return jnp.einsum("sht,thd->shd", shares, v)

    arguments = (q, k, v, index_queries, weights, index, tables, sequence, positions)
    program = compile_(dense, *arguments)
    return Case(
        run=lambda: program.call(*arguments),
        work={"bf16": 2 * shape.tokens * shape.context * shape.heads * (width + VALUE_DIM)},
        bytes=2 * shape.heads * (shape.tokens + shape.context) * (width + VALUE_DIM),
        dtype="bfloat16",
        backend="reference",
        memory=program.memory,
        tokens=shape.tokens,
        name="all scores, a mask of what our kernels chose, softmax (the official demo's form)",
    )
