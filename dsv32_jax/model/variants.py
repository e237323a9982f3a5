"""Functions for parts, by name: what the project compares, and what a command line can ask for.

`--part index_select=recent` takes one of these; `--part index_select=package.module:function` takes anybody's own.
"""

import functools
import importlib
import inspect
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.errors import UserError
from dsv32_jax.model.parts import DEFAULTS, check_name
from pallas_kernels import rowwise
from pallas_kernels.backend import BACKENDS
from pallas_kernels.cache_format import unpack_rows
from pallas_kernels.matmul import Weight, dense, grouped_matmul, silu_product
from pallas_kernels.moe_dispatch import RoutingPlan, gather_rows, make_plan
from pallas_kernels.paging import BLOCK_SIZE
from pallas_kernels.sparse_mla import dense_mla
from pallas_kernels.sparse_mla.reference import attend
from pallas_kernels.top_k import top_k

__all__ = ["VARIANTS", "backends_of", "named_part", "parts_of", "pinned"]

# ---- which keys a token attends to: index_select ----


def every_key(queries, head_weights, index, layer, block_tables, sequence, positions):
    """Every visible position: dense attention by way of a selection."""
    everything = jnp.arange(block_tables.shape[1] * BLOCK_SIZE, dtype=jnp.int32)
    return jnp.where(everything <= positions[:, None], everything, -1)


def recent(queries, head_weights, index, layer, block_tables, sequence, positions, *, k):
    """The last k positions: a sliding window."""
    chosen = positions[:, None] - jnp.arange(k, dtype=jnp.int32)
    return jnp.where(chosen >= 0, chosen, -1)


def recent_and_first(queries, head_weights, index, layer, block_tables, sequence, positions, *, k):
    """Position 0, on which attention with nothing to look at rests, and the last ones (StreamingLLM, 2309.17453)."""
    chosen = positions[:, None] - jnp.arange(k, dtype=jnp.int32)
    last = jnp.arange(k) == k - 1
    return jnp.where((positions[:, None] >= k) & last, 0, jnp.where(chosen >= 0, chosen, -1))


def random(queries, head_weights, index, layer, block_tables, sequence, positions, *, k, seed=0, backend="auto"):
    """k visible positions by chance: which ones, only the layer, the position and the seed decide."""
    key = jax.random.fold_in(jax.random.key(seed), layer)
    length = block_tables.shape[1] * BLOCK_SIZE
    of_position = jax.vmap(lambda position: jax.random.uniform(jax.random.fold_in(key, position), (length,)))
    scores = of_position(jnp.maximum(positions, 0))
    return top_k(scores, k, lengths=positions + 1, backend=backend)


def oracle(queries, head_weights, index, layer, block_tables, sequence, positions, *, k, attention, backend="auto"):
    """The k positions that dense attention weighs most, mean over heads: what an indexer could at best know."""
    return top_k(attention, k, lengths=positions + 1, backend=backend)


# ---- attention over the chosen keys: sparse_mla ----


def masked(queries, kv, layer, slots, *, scale, rope_dim, lengths=None):
    """The official demo's form: scores of every row that the cache holds, and a mask of those that were chosen.

    Source: `MLA.forward` in the official `inference/model.py` of DeepSeek-V3.2-Exp; its price grows with the cache.
    """
    rows = unpacked(kv, layer, rope_dim, queries.dtype)
    present = slots >= 0 if lengths is None else jnp.arange(slots.shape[1]) < lengths[:, None]
    tokens = jnp.arange(len(slots))[:, None]
    mask = jnp.zeros((len(slots), len(rows)), bool)
    mask = mask.at[tokens, jnp.where(present, slots, len(rows))].set(True, mode="drop")
    # Rows that nobody chose may hold anything, and 0 * NaN is NaN.
    rows = jnp.where(mask.any(0)[:, None], rows, 0)
    values = rows[:, : queries.shape[2] - rope_dim]

    def of_token(query, seen):
        return attend(query, rows, values, seen, scale)[:2]

    return jax.lax.map(lambda token: of_token(*token), (queries, mask))


def unpacked(kv: jax.Array, layer: Any, rope_dim: int, dtype: jax.typing.DTypeLike) -> jax.Array:
    """All rows of a layer, [blocks * 64, latent + rope]."""
    rows = unpack_rows(kv[layer], rope_dim, dtype)
    return rows.reshape(-1, rows.shape[-1])


# ---- attention over all keys: dense_mla ----


def materialised(queries, context, sequence, positions, *, scale, rope_dim, mean_probabilities=False):
    """All scores of the step at once and a causal mask: what a port of the official demo does before any optimisation.

    Its memory grows with tokens times context; the model's own dense attention works in chunks of tokens.
    """
    if len(context) == 1:
        rows, formula = context[0], ("thd,ld->thl", "thl,ld->thd")
    else:
        rows, formula = context[sequence], ("thd,tld->thl", "thl,tld->thd")
    scores = jnp.einsum(formula[0], queries, rows, precision="highest", preferred_element_type=jnp.float32) * scale
    seen = jnp.arange(context.shape[1]) <= positions[:, None]
    # Padding, of position -1, sees nothing: softmax over nothing would be NaN.
    probabilities = jnp.where(seen[:, None], jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1), 0)
    if mean_probabilities:
        return probabilities.mean(1)
    values = rows[..., : queries.shape[2] - rope_dim]
    return jnp.einsum(formula[1], probabilities.astype(queries.dtype), values, precision="highest")


def flash(
    queries, context, sequence, positions, *, scale, rope_dim, chunk_bytes, mean_probabilities=False
) -> jax.Array:
    """Softmax over blocks of keys with a running maximum and sum: the scores of a context never exist together.

    Source: FlashAttention-2 (2307.08691), algorithm 1. A trace asks for the probabilities themselves; those are the
    op's own.
    """
    if mean_probabilities:
        return dense_mla(
            queries,
            context,
            sequence,
            positions,
            scale=scale,
            rope_dim=rope_dim,
            chunk_bytes=chunk_bytes,
            mean_probabilities=True,
        )
    count, heads, width = queries.shape
    sequences, length, _ = context.shape
    value_dim = width - rope_dim
    bytes_per_key = 4 * count * max(heads, width if sequences > 1 else 0)
    keys = min(length, max(BLOCK_SIZE, chunk_bytes // bytes_per_key // BLOCK_SIZE * BLOCK_SIZE))
    blocks = -(-length // keys)
    padded = jnp.pad(context, ((0, 0), (0, blocks * keys - length), (0, 0)))
    by_block = padded.reshape(sequences, blocks, keys, width).swapaxes(0, 1)
    products = ("thd,kd->thk", "thk,kc->thc") if sequences == 1 else ("thd,tkd->thk", "thk,tkc->thc")

    def product(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
        return jnp.einsum(formula, x, y, precision="highest", preferred_element_type=jnp.float32)

    def add(state: Any, block: Any) -> tuple[Any, None]:
        out, top, total = state
        start, rows = block
        rows = rows[0] if sequences == 1 else rows[sequence]
        seen = start + jnp.arange(keys) <= positions[:, None]
        scores = jnp.where(seen[:, None], product(products[0], queries, rows) * scale, -jnp.inf)
        new_top = jnp.maximum(top, scores.max(-1))
        base = jnp.where(new_top == -jnp.inf, 0, new_top)  # of a token that has seen no key yet
        weights, shrink = jnp.exp(scores - base[..., None]), jnp.exp(top - base)
        added = product(products[1], weights.astype(queries.dtype), rows[..., :value_dim])
        return (out * shrink[..., None] + added, new_top, total * shrink + weights.sum(-1)), None

    start = (
        jnp.zeros((count, heads, value_dim), jnp.float32),
        jnp.full((count, heads), -jnp.inf),
        jnp.zeros((count, heads), jnp.float32),
    )
    (out, _, total), _ = jax.lax.scan(add, start, (jnp.arange(blocks) * keys, by_block))
    return (out / jnp.where(total == 0, 1, total)[..., None]).astype(queries.dtype)


# ---- the experts' products: experts ----


def one_by_one(x: jax.Array, gate: Weight, up: Weight, down: Weight, plan: RoutingPlan) -> jax.Array:
    """Each expert over every row of the plan, one after the other, weights dequantised: the simplest form.

    E times the work of the others; activations are not quantised.
    """
    rows = gather_rows(x, plan, backend="reference")
    expert_of_row = jnp.repeat(plan.tile_expert, plan.tile)

    def add(out: jax.Array, weights: Any) -> tuple[jax.Array, None]:
        number, *expert = weights
        g, u, d = (dense(weight, x.dtype) for weight in expert)
        hidden = jax.nn.silu(rows @ g.T) * (rows @ u.T)
        return jnp.where((expert_of_row == number)[:, None], hidden @ d.T, out), None

    numbers = jnp.arange(gate.shape[0])
    return jax.lax.scan(add, jnp.zeros((len(rows), x.shape[1]), x.dtype), (numbers, gate, up, down))[0]


def tile_by_tile(x: jax.Array, gate: Weight, up: Weight, down: Weight, plan: RoutingPlan) -> jax.Array:
    """The rows of one expert after another, weights dequantised for each tile: the official demo's loop, in the shapes
    that a compiled program needs; activations are not quantised.
    """
    tiles = gather_rows(x, plan, backend="reference").reshape(-1, plan.tile, x.shape[1])

    def one_tile(tile: tuple[jax.Array, jax.Array]) -> jax.Array:
        rows, number = tile
        expert = jax.tree.map(lambda leaf: leaf[number], (gate, up, down))
        g, u, d = (dense(weight, x.dtype) for weight in expert)
        return (jax.nn.silu(rows @ g.T) * (rows @ u.T)) @ d.T

    return jax.lax.map(one_tile, (tiles, plan.tile_expert)).reshape(-1, x.shape[1])


def ragged(x: jax.Array, gate: Weight, up: Weight, down: Weight, plan: RoutingPlan) -> jax.Array:
    """`jax.lax.ragged_dot`, what stock JAX has for it; weights dequantised, activations not quantised."""
    rows = gather_rows(x, plan, backend="reference")
    sizes = jnp.zeros(gate.shape[0], jnp.int32).at[plan.tile_expert].add(plan.tile)

    def product(rows: jax.Array, weight: Weight) -> jax.Array:
        return jax.lax.ragged_dot(rows, jnp.swapaxes(dense(weight, x.dtype), 1, 2), sizes, precision="highest")

    return product(jax.nn.silu(product(rows, gate)) * product(rows, up), down)


def products_apart(
    x: jax.Array,
    gate: Weight,
    up: Weight,
    down: Weight,
    plan: RoutingPlan,
    *,
    quantize_input: bool,
    scale_fmt: str | None = "ue8m0",
    backend: str = "auto",
    replan: bool = False,
) -> jax.Array:
    """The op's own grouped products, one after the other, with nothing between them fused.

    Args:
      x, gate, up, down, plan, quantize_input, scale_fmt, backend: see `dsv32_jax.model.products.experts`.
      replan: make the plan again for each product. It is the same plan: only the work is repeated.
    """

    def plan_after(values: jax.Array) -> RoutingPlan:
        """The plan, or the same one made again from `values` on: a compiler merges work that does not wait for any."""
        if not replan:
            return plan
        nothing = jnp.minimum(jnp.isnan(values[0, 0]).astype(jnp.int32), 0)
        rows = plan.token_row
        experts = jnp.where(rows >= 0, plan.tile_expert[rows // plan.tile] + nothing, 0)
        return make_plan(experts, rows[:, 0] >= 0, gate.shape[0], tile=plan.tile, backend=backend)

    def product(rows: jax.Array, weight: Weight, plan: RoutingPlan) -> jax.Array:
        return grouped_matmul(
            rows,
            weight,
            plan.tile_expert,
            used_tiles=plan.used_tiles,
            quantize_input=quantize_input,
            scale_fmt=scale_fmt,
            backend=backend,
        )

    rows = gather_rows(x, plan, backend=backend)
    gated = product(rows, gate, plan_after(rows))
    raised = product(rows, up, plan_after(gated))
    return product(silu_product(gated, raised), down, plan_after(raised))


VARIANTS: dict[str, dict[str, Callable[..., Any]]] = {
    "index_select": {
        "dense": every_key,
        "recent": recent,
        "recent_and_first": recent_and_first,
        "random": random,
        "oracle": oracle,
    },
    "sparse_mla": {"masked": masked},
    "dense_mla": {"materialised": materialised, "flash": flash},
    "index_rope": {"interleaved": rowwise.rope_interleaved},
    "experts": {
        "one_by_one": one_by_one,
        "tile_by_tile": tile_by_tile,
        "ragged": ragged,
        "apart": products_apart,
        "apart_replanned": functools.partial(products_apart, replan=True),
    },
}
"""By part. index_rope=interleaved is the bug of the first official demo: neighbouring features in pairs, where the
weights were trained for the two halves."""


def named_part(text: str) -> tuple[str, Callable[..., Any]]:
    """The part and the function of "index_select=recent" or "index_select=package.module:function".

    Raises:
      UserError: another form, no such part, variant, module or function.
    """
    part, equals, name = text.partition("=")
    if not equals or not name:
        raise UserError(f"part {text!r}: must be PART=VARIANT or PART=package.module:function")
    check_name(part)
    if ":" in name:
        module, _, function = name.partition(":")
        return part, imported(module, function, part)
    variants = VARIANTS.get(part, {})
    if name not in variants:
        known = f"it is one of {', '.join(variants)}, or" if variants else "it has none; give"
        raise UserError(f"part {part}: variant {name!r} is unknown; {known} package.module:function")
    return part, variants[name]


def parts_of(texts: Iterable[str]) -> dict[str, Any]:
    """Functions by part, of several such texts; raises UserError for a part that is named twice."""
    functions: dict[str, Any] = {}
    for part, function in map(named_part, texts):
        if part in functions:
            raise UserError(f"part {part}: is named twice")
        functions[part] = function
    return functions


def pinned(part: str, backend: str) -> Callable[..., Any]:
    """The op of a part, which runs on this backend or raises, whatever the others run on.

    Raises:
      UserError: there is no such part or backend, or the part has no kernel.
    """
    check_name(part)
    with_kernels = [name for name, op in DEFAULTS.items() if "backend" in inspect.signature(op).parameters]
    if part not in with_kernels:
        raise UserError(
            f"backend {part}={backend}: {part} has no kernel and no choice; those that have one are "
            f"{', '.join(with_kernels)}"
        )
    if backend not in BACKENDS:
        raise UserError(f"backend {part}={backend}: {backend!r} is unknown; it is one of {', '.join(BACKENDS)}")
    return functools.partial(DEFAULTS[part], backend=backend)


def backends_of(texts: Iterable[str]) -> tuple[str | None, dict[str, Callable[..., Any]]]:
    """The backend of all ops, None where no text names it, and functions by part: of "reference", "top_k=reference".

    Raises:
      UserError: as `pinned`; or a part, or the backend of all, is named twice.
    """
    everywhere: str | None = None
    functions: dict[str, Callable[..., Any]] = {}
    for text in texts:
        part, equals, backend = text.partition("=")
        if not equals:
            if everywhere is not None:
                raise UserError(f"backend {text}: {everywhere} is named too; one of them can be that of all ops")
            if text not in BACKENDS:
                raise UserError(f"backend {text!r} is unknown; it is one of {', '.join(BACKENDS)}")
            everywhere = text
            continue
        if part in functions:
            raise UserError(f"backend {text}: {part} is named twice")
        functions[part] = pinned(part, backend)
    return everywhere, functions


def imported(module: str, name: str, part: str) -> Callable[..., Any]:
    """A user's own function; modules in the working directory are found too."""
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.append(here)
    try:
        function: Any = importlib.import_module(module)
        for attribute in name.split("."):
            function = getattr(function, attribute)
    except Exception as error:  # whatever somebody's module raises
        kind = "" if isinstance(error, ImportError | AttributeError) else f"{type(error).__name__}: "
        raise UserError(f"part {part}: {module}:{name} cannot be imported ({kind}{error})") from error
    if not callable(function):
        raise UserError(f"part {part}: {module}:{name} is {function!r}, no function")
    return function
