"""For each op and shape: random inputs on the device, the compiled call, and what it must do at least."""

import contextlib
import dataclasses
import functools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.experiments.bench.shapes import Attention
from pallas_kernels.cache_format import index_block_bytes, pack_record, record_bytes, to_bytes
from pallas_kernels.cache_write import KeyNorms, cache_write
from pallas_kernels.cache_write import config as cache_write_config
from pallas_kernels.cache_write.shapes import CacheWrite
from pallas_kernels.index_select import index_select
from pallas_kernels.index_select.shapes import IndexSelect
from pallas_kernels.indexer_logits import config as indexer_logits_config
from pallas_kernels.indexer_logits import indexer_logits
from pallas_kernels.indexer_logits.shapes import IndexerLogits
from pallas_kernels.named_shape import Shape
from pallas_kernels.paging import BLOCK_SIZE, physical_slots
from pallas_kernels.sparse_mla import config as sparse_mla_config
from pallas_kernels.sparse_mla import sparse_mla
from pallas_kernels.sparse_mla.shapes import SparseMLA
from pallas_kernels.top_k import config as top_k_config
from pallas_kernels.top_k import top_k
from pallas_kernels.top_k.shapes import TopK

LAYERS, LAYER = 2, 1
"""Of the caches, and the one that is used: a call that copied its layer would show it."""
SCALE = 0.1352337789
"""Of attention scores at the model's own YaRN settings."""
REFERENCE_TOKENS = 256
"""A reference that gathers or scores in float32 runs on so many tokens of a prefill; its time is scaled."""


@dataclasses.dataclass
class Case:
    """One call, compiled, with its inputs on the device.

    Attributes:
      run: makes the call and returns its arrays; nothing compiles in it.
      work: operations by kind of product ("bf16", or "fp8" also for int8, which is as fast), a multiplication and an
        addition counted as two.
      bytes: what must cross device memory at least once.
      dtype: of the inputs that weigh most.
      backend: what the op ran on: "mosaic_gpu" or "reference".
      memory: bytes of temporaries and of outputs.
      tokens: how many the call handled; of a reference fewer than the shape's.
      name: of a reference, what it is.
    """

    run: Callable[[], Any]
    work: dict[str, int]
    bytes: int
    dtype: str
    backend: str
    memory: dict[str, int]
    tokens: int
    name: str = "plain jax.numpy"


@dataclasses.dataclass
class Program:
    """A compiled function, whether a kernel of ours is in it, and the memory that it asks for."""

    call: Callable[..., Any]
    backend: str
    memory: dict[str, int]


Programs = dict[Any, Program]
"""By function and shapes of the arguments; of one case, where a function's name says which one it is."""
COMPILED: ContextVar[Programs | None] = ContextVar("COMPILED", default=None)


@contextlib.contextmanager
def compiled(programs: Programs) -> Iterator[None]:
    """Within, `compile_` in this thread keeps what it compiles in `programs`, and takes what is there already."""
    token = COMPILED.set(programs)
    try:
        yield
    finally:
        COMPILED.reset(token)


def compile_(f: Callable[..., Any], *arguments: Any, donate: tuple[int, ...] = ()) -> Program:
    """Compiles a function for arguments of these shapes."""
    programs = COMPILED.get()
    avals = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), arguments)
    leaves, structure = jax.tree.flatten(avals)
    name = f.__module__, f.__qualname__, structure, tuple((x.shape, x.dtype) for x in leaves)
    if programs is not None and name in programs:
        return programs[name]
    lowered = jax.jit(f, donate_argnums=donate).lower(*avals)
    executable = lowered.compile()
    stats: Any = executable.memory_analysis()
    memory = {"temporary": stats.temp_size_in_bytes, "output": stats.output_size_in_bytes}
    program = Program(executable, "mosaic_gpu" if "mosaic_gpu" in lowered.as_text() else "reference", memory)
    if programs is not None:
        programs[name] = program
    return program


def only_shapes() -> bool:
    """Whether this runs in `jax.eval_shape`, where no array is made."""
    return isinstance(jnp.zeros(()), jax.core.Tracer)


def made(f: Callable[[Iterator[jax.Array]], Any]) -> Any:
    """Inputs, `f(keys of random numbers)`, by one program that `compile_` keeps like the call itself."""

    @functools.wraps(f)
    def inputs(key: jax.Array) -> Any:
        return f(iter(jax.random.split(key, 16)))

    key = jax.random.key(0)
    if not only_shapes():
        return compile_(inputs, key).call(key)
    if COMPILED.get() is not None:
        compile_(inputs, key)
    return inputs(key)


def once(f: Callable[..., Program]) -> Any:
    """`functools.cache`, with which a second thread that asks for the same waits for the first."""
    cached, guard = functools.cache(f), threading.Lock()
    locks: defaultdict[Any, threading.Lock] = defaultdict(threading.Lock)

    @functools.wraps(f)
    def call(*arguments: Any) -> Program:
        with guard:
            own = locks[arguments]
        with own:
            return cached(*arguments)

    call.cache_clear = cached.cache_clear  # type: ignore[attr-defined]
    return call


def build(shape: Shape, backend: str = "auto") -> Case:
    """The op itself at this shape.

    Args:
      shape: of any op.
      backend: of the op.
    """
    return BUILDERS[type(shape)](shape, backend)


def build_reference(shape: Shape) -> Case:
    """The specification of the op, of fewer tokens where all would take too long (see `REFERENCE_TOKENS`)."""
    if (
        isinstance(shape, SparseMLA | IndexerLogits | IndexSelect)
        and shape.sequences == 1
        and shape.tokens > REFERENCE_TOKENS
    ):
        shape = dataclasses.replace(shape, tokens=REFERENCE_TOKENS)
    return build(shape, "reference")


def config(shape: Shape) -> dict[str, Any]:
    """The tile sizes that the op's kernels take at this shape."""
    match shape:
        case SparseMLA() | Attention():
            heads = -(-shape.heads // 64)
            chosen: Any = sparse_mla_config.choose_config(shape.tokens, heads, shape.chosen, fp8=shape.cache == "fp8")
        case IndexerLogits() | IndexSelect():
            chosen = indexer_logits_config.choose_config(shape.tokens, shape.sequences)
        case TopK():
            chosen = top_k_config.choose_config(shape.tokens, shape.context)
        case CacheWrite():
            chosen = cache_write_config.CONFIG
        case _:
            return {}
    return dataclasses.asdict(chosen)


# ---- inputs ----------------------------------------------------------------------------------------------------


def keys(shape: Shape) -> Any:
    """Keys of random numbers, one after another."""
    return iter(jax.random.split(jax.random.key(0), 16))


def normal(key: jax.Array, dims: tuple[int, ...], dtype: Any = jnp.bfloat16) -> jax.Array:
    """Standard normal; FP8 is rounded from bfloat16."""
    if dtype == jnp.float8_e4m3fn:
        return jax.random.normal(key, dims, jnp.bfloat16).astype(dtype)
    return jax.random.normal(key, dims, dtype)


def block_tables(key: jax.Array, sequences: int, context: int) -> jax.Array:
    """Every block of the cache once, in random order: int32 [sequences, context / 64]."""
    blocks = sequences * context // BLOCK_SIZE
    return jax.random.permutation(key, jnp.arange(blocks, dtype=jnp.int32)).reshape(sequences, -1)


def last_tokens(tokens: int, context: int, sequences: int) -> tuple[jax.Array, jax.Array]:
    """Sequence and position int32 [tokens] of the last tokens of each sequence."""
    each = tokens // sequences
    positions = jnp.tile(context - each + jnp.arange(each, dtype=jnp.int32), sequences)
    return jnp.repeat(jnp.arange(sequences, dtype=jnp.int32), each), positions


def visible(tokens: int, context: int, sequences: int) -> int:
    """Pairs of a token and a key that it may see."""
    each = tokens // sequences
    return sequences * (each * (context - each) + each * (each + 1) // 2)


def chosen_positions(key: jax.Array, tokens: int, context: int, chosen: int) -> jax.Array:
    """Different random positions for each token, in random order: int32 [tokens, chosen]."""

    @jax.jit
    def some(row_keys: jax.Array) -> jax.Array:
        draw = jax.vmap(lambda row_key: jax.random.uniform(row_key, (context,)))
        return jax.lax.top_k(draw(row_keys), chosen)[1].astype(jnp.int32)

    row_keys = jax.random.split(key, tokens)
    rows = max(1, min(tokens, 2**26 // context))
    return jnp.concatenate([some(row_keys[start : start + rows]) for start in range(0, tokens, rows)])


def latent_cache(key: jax.Array, blocks: int, latent: int, rope: int, form: str) -> jax.Array:
    """[LAYERS, blocks, 64, latent + rope] in bfloat16, or uint8 records for "fp8"."""
    if form == "bf16":
        return normal(key, (LAYERS, blocks, BLOCK_SIZE, latent + rope)) / 8

    def block(block_key: jax.Array) -> jax.Array:
        values = normal(block_key, (BLOCK_SIZE, latent + rope)) / 8
        return pack_record(values[:, :latent], values[:, latent:], "ue8m0")

    def fill(key: jax.Array) -> jax.Array:
        block_keys = jax.random.split(key, LAYERS * blocks)
        return jax.lax.map(block, block_keys, batch_size=min(1024, LAYERS * blocks))

    return jax.jit(fill)(key).reshape(LAYERS, blocks, BLOCK_SIZE, record_bytes(latent, rope))


def index_cache(key: jax.Array, blocks: int, dim: int) -> jax.Array:
    """FP8 index keys: uint8 [LAYERS, blocks, 64 * (dim + 4)]."""

    def block(block_key: jax.Array) -> jax.Array:
        value_key, scale_key = jax.random.split(block_key)
        values = normal(value_key, (BLOCK_SIZE * dim,), jnp.float8_e4m3fn)
        return jnp.concatenate([to_bytes(values), to_bytes(jax.random.uniform(scale_key, (BLOCK_SIZE,)) + 0.5)])

    def fill(key: jax.Array) -> jax.Array:
        block_keys = jax.random.split(key, LAYERS * blocks)
        return jax.lax.map(block, block_keys, batch_size=min(4096, LAYERS * blocks))

    return jax.jit(fill)(key).reshape(LAYERS, blocks, index_block_bytes(dim))


# ---- ops -------------------------------------------------------------------------------------------------------


def sparse_mla_work(shape: SparseMLA | Attention) -> int:
    """Operations of scores and of weighted values."""
    return 2 * shape.tokens * shape.heads * shape.chosen * (2 * shape.latent + shape.rope)


def row_bytes(shape: SparseMLA | Attention) -> int:
    """Of one cached latent."""
    return record_bytes(shape.latent, shape.rope) if shape.cache == "fp8" else 2 * (shape.latent + shape.rope)


def sparse_mla_bytes(shape: SparseMLA | Attention) -> int:
    """Queries, slots, output, log-sum-exp, and each cached row once, however many tokens chose it."""
    rows = min(shape.tokens * shape.chosen, shape.sequences * shape.context)
    a_token = shape.heads * (2 * (2 * shape.latent + shape.rope) + 4) + 4 * shape.chosen
    return rows * row_bytes(shape) + shape.tokens * a_token


def indexer_bytes(shape: IndexerLogits | IndexSelect) -> int:
    """Queries, head weights and index keys."""
    return shape.tokens * shape.heads * (shape.dim + 4) + shape.sequences * shape.context * (shape.dim + 4)


def build_sparse_mla(shape: SparseMLA, backend: str) -> Case:
    key = keys(shape)
    tables = block_tables(next(key), shape.sequences, shape.context)
    kv = latent_cache(next(key), tables.size, shape.latent, shape.rope, shape.cache)
    queries = normal(next(key), (shape.tokens, shape.heads, shape.latent + shape.rope)) / 8
    sequence, _ = last_tokens(shape.tokens, shape.context, shape.sequences)
    slots = physical_slots(chosen_positions(next(key), shape.tokens, shape.context, shape.chosen), sequence, tables)

    lengths = jnp.full(shape.tokens, shape.chosen, jnp.int32)

    def op(queries, kv, slots, lengths):
        return sparse_mla(queries, kv, LAYER, slots, scale=SCALE, rope_dim=shape.rope, lengths=lengths, backend=backend)

    program = compile_(op, queries, kv, slots, lengths)
    return Case(
        run=lambda: program.call(queries, kv, slots, lengths),
        work={"bf16": sparse_mla_work(shape)},
        bytes=sparse_mla_bytes(shape),
        dtype="bfloat16" + (" queries, FP8 cache" if shape.cache == "fp8" else ""),
        backend=program.backend,
        memory=program.memory,
        tokens=shape.tokens,
    )


def indexer_inputs(shape: IndexerLogits | IndexSelect) -> tuple[jax.Array, ...]:
    """Queries, head weights, cache, block tables, sequence and positions."""
    key = keys(shape)
    tables = block_tables(next(key), shape.sequences, shape.context)
    index = index_cache(next(key), tables.size, shape.dim)
    queries = normal(next(key), (shape.tokens, shape.heads, shape.dim), jnp.float8_e4m3fn)
    weights = normal(next(key), (shape.tokens, shape.heads), jnp.float32)
    return queries, weights, index, tables, *last_tokens(shape.tokens, shape.context, shape.sequences)


def build_indexer(shape: IndexerLogits | IndexSelect, backend: str) -> Case:
    arguments = indexer_inputs(shape)
    pairs = visible(shape.tokens, shape.context, shape.sequences)

    def op(queries, weights, index, tables, sequence, positions):
        where = (queries, weights, index, LAYER, tables, sequence, positions)
        if isinstance(shape, IndexSelect):
            return index_select(*where, k=shape.chosen, backend=backend)
        return indexer_logits(*where, backend=backend)

    program = compile_(op, *arguments)
    written = 4 * (shape.tokens * shape.chosen if isinstance(shape, IndexSelect) else pairs)
    return Case(
        run=lambda: program.call(*arguments),
        work={"fp8": 2 * pairs * shape.heads * shape.dim},
        bytes=indexer_bytes(shape) + written,
        dtype="float8_e4m3fn",
        backend=program.backend,
        memory=program.memory,
        tokens=shape.tokens,
    )


def build_top_k(shape: TopK, backend: str) -> Case:
    scores = normal(next(keys(shape)), (shape.tokens, shape.context), jnp.float32)
    program = compile_(lambda scores: top_k(scores, shape.chosen, backend=backend), scores)
    return Case(
        run=lambda: program.call(scores),
        work={},
        bytes=4 * shape.tokens * (shape.context + shape.chosen),
        dtype="float32",
        backend=program.backend,
        memory=program.memory,
        tokens=shape.tokens,
        name="lax.top_k",
    )


def build_cache_write(shape: CacheWrite, backend: str) -> Case:
    key = keys(shape)
    blocks = -(-shape.tokens // BLOCK_SIZE)
    slots = jax.random.permutation(next(key), jnp.arange(blocks * BLOCK_SIZE, dtype=jnp.int32))[: shape.tokens]
    angle = 2 * jnp.pi * jax.random.uniform(next(key), (shape.tokens, shape.rope // 2))
    new = (
        slots,
        normal(next(key), (shape.tokens, shape.latent + shape.rope)),
        normal(next(key), (shape.tokens, shape.dim)),
        (1 + normal(next(key), (shape.latent,)) / 8, 1 + normal(next(key), (shape.dim,)) / 8),
        normal(next(key), (shape.dim,)) / 8,
        (jnp.cos(angle), jnp.sin(angle)),
    )
    caches = [
        latent_cache(next(key), blocks, shape.latent, shape.rope, "fp8"),
        index_cache(next(key), blocks, shape.dim),
    ]

    def op(kv, index, slots, kv_a, index_key, weights, bias, angles):
        latent_weight, index_weight = weights
        norms = KeyNorms(latent_weight, index_weight, bias, 1e-6, 1e-6)
        return cache_write(
            kv, index, LAYER, slots, kv_a, index_key, norms, angles, quantize_latent=True, backend=backend
        )

    program = compile_(op, *caches, *new, donate=(0, 1))

    def run() -> Any:
        caches[:] = program.call(*caches, *new)  # in place: the caches are donated
        return caches

    read = 2 * (shape.latent + shape.rope + shape.dim) + 4 * shape.rope + 4
    written = record_bytes(shape.latent, shape.rope) + shape.dim + 4
    return Case(
        run=run,
        work={},
        bytes=shape.tokens * (read + written),
        dtype="bfloat16 to FP8",
        backend=program.backend,
        memory=program.memory,
        tokens=shape.tokens,
    )


BUILDERS: dict[type[Shape], Callable[[Any, str], Case]] = {
    SparseMLA: build_sparse_mla,
    IndexerLogits: build_indexer,
    IndexSelect: build_indexer,
    TopK: build_top_k,
    CacheWrite: build_cache_write,
}
