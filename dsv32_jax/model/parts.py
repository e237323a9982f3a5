"""The parts of a step that a researcher can replace, each with the signature of a public op.

`m.with_parts(index_select=f)` gives a model whose steps call `f`. A function gets the positional arguments of the op
that it replaces, and of the keyword arguments those that it names: one that needs no `backend` leaves it out.
"""

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from dsv32_jax.errors import UserError
from dsv32_jax.model import products
from pallas_kernels import moe_dispatch, rowwise
from pallas_kernels.cache_write import cache_write
from pallas_kernels.index_select import index_select
from pallas_kernels.indexer_logits import indexer_logits
from pallas_kernels.matmul import grouped_matmul, matmul, silu_product
from pallas_kernels.operators import Operator
from pallas_kernels.sparse_mla import dense_mla, sparse_mla
from pallas_kernels.top_k import top_k

__all__ = ["EXTRAS", "INSIDE", "MODEL_PARTS", "NAMES", "Parts", "accepted"]

Function = Callable[..., Any]


@dataclass(frozen=True, eq=False, repr=False)
class Parts:
    """What a step calls; hashable, a part of `Options`, so that other functions are another program to `jax.jit`.

    Shapes: T tokens, K chosen keys, H heads, D features, E experts, P rows of a routing plan, L positions.

    Attributes:
      index_select: which keys each token attends to: positions int32 [T, any K], see `pallas_kernels.index_select`.
      indexer_logits: the indexer's scores float32 [T, L].
      top_k: positions int32 [T, any K] of the largest scores.
      sparse_mla: attention over the chosen keys: out [T, H, latent] and lse float32 [T, H].
      dense_mla: attention over all keys, where `Options.attention` is "dense"; and the mean probabilities of a trace.
      cache_write: the step's own keys, normalised and rotated, into the cache.
      rms_norm: every RMSNorm of the model (`pallas_kernels.rowwise.rms_norm`).
      rope: the attention's rotation of queries and keys [T, ..., R], neighbouring features in pairs.
      index_rope: the indexer's rotation of queries and keys [T, ..., R], the two halves in pairs.
      matmul: products with linear weights (`pallas_kernels.matmul`): q_a, q_b, kv_a and o, the indexer's q_b and k,
        feed-forward blocks and the shared expert, eh_proj. Not those of the routed experts, of embedding, head, router
        and index head weights, nor kv_b in the absorbed form, where it is two maps by heads.
      swiglu: silu(gate) * up of every feed-forward block and expert.
      route: experts int32 [T, K] and their weights float32 [T, K] from the router's logits [T, E].
      make_plan: the rows of the chosen experts, see `pallas_kernels.moe_dispatch.RoutingPlan`.
      gather_rows: tokens [T, D] -> rows [P, D] of the plan: the dispatch.
      grouped_matmul: rows [P, K] by the weights of their experts (`pallas_kernels.matmul.grouped_matmul`).
      experts: the three products of every expert and what lies between: tokens [T, D] -> rows [P, D].
      combine: rows [P, D] -> float32 [T, D], weighted and summed.
    """

    index_select: Function = index_select
    indexer_logits: Function = indexer_logits
    top_k: Function = top_k
    sparse_mla: Function = sparse_mla
    dense_mla: Function = dense_mla
    cache_write: Function = cache_write
    rms_norm: Function = rowwise.rms_norm
    rope: Function = rowwise.rope_interleaved
    index_rope: Function = rowwise.rope_half_split
    matmul: Function = matmul
    swiglu: Function = silu_product
    route: Function = moe_dispatch.route
    make_plan: Function = moe_dispatch.make_plan
    gather_rows: Function = moe_dispatch.gather_rows
    grouped_matmul: Function = grouped_matmul
    experts: Function = products.experts
    combine: Function = moe_dispatch.combine
    replaced: Mapping[str, Function] = field(init=False)
    """The functions that are not the model's own, by part."""

    def __post_init__(self) -> None:
        functions = {name: unwrapped(getattr(self, name)) for name in NAMES}
        for name, function in functions.items():
            object.__setattr__(self, name, function)
        replaced = {name: f for name, f in functions.items() if f is not DEFAULTS[name]}
        for name, function in replaced.items():
            check_signature(name, function)
        check_reached(replaced)
        object.__setattr__(self, "replaced", replaced)
        object.__setattr__(self, "_key", tuple((name, identity(f)) for name, f in replaced.items()))

    def with_parts(self, functions: Mapping[str, Function | None]) -> "Parts":
        """These parts with others in their place, None for the model's own.

        Raises:
          UserError: a part does not exist, or a function cannot take its place.
        """
        for name in functions:
            check_name(name)
        merged = {**self.replaced, **functions}
        return Parts(**{name: function for name, function in merged.items() if function is not None})

    def replace_any(self, names: Iterable[str]) -> bool:
        """Whether one of these parts is not the model's own."""
        return any(name in self.replaced for name in names)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Parts) and self._key == other._key  # type: ignore[attr-defined]

    def __hash__(self) -> int:
        return hash(self._key)  # type: ignore[attr-defined]

    def __repr__(self) -> str:
        return f"Parts({', '.join(f'{name}={title(function)}' for name, function in self.replaced.items())})"


DEFAULTS: dict[str, Function] = {part.name: part.default for part in fields(Parts) if part.init}  # type: ignore[misc]
NAMES = tuple(DEFAULTS)
"""Of all parts."""

INSIDE: dict[str, tuple[str, ...]] = {
    "index_select": ("indexer_logits", "top_k"),
    "cache_write": ("rms_norm", "rope", "index_rope"),
    "experts": ("gather_rows", "grouped_matmul", "swiglu"),
}
"""Parts that lie inside a fused op: where one of them is replaced, that op runs in its composed form, from parts. The
fused product of a feed-forward block in FP8 (`pallas_kernels.matmul.swiglu`) has `matmul` and `swiglu` inside."""

ONLY_INSIDE = {"index_select": ("indexer_logits", "top_k"), "experts": ("gather_rows", "grouped_matmul")}
"""Those that nothing else calls."""

EXTRAS: dict[str, tuple[str, ...]] = {
    "index_select": ("x", "attention"),
    "route": ("x", "positions"),
}
"""Keyword arguments beyond those of the op, for a function that names them; they are computed only then.

index_select: `x` [T, D], the normalised input of the attention; `attention` float32 [T, L], the probabilities that
dense attention gives each position of the token's sequence, mean over heads.
route: `x` [T, D], the normalised input of the experts; `positions` int32 [T], -1 for padding.
"""


def check_name(name: str) -> None:
    """Raises UserError for a part that does not exist."""
    if name not in NAMES:
        close = difflib.get_close_matches(name, (*NAMES, "weights", "check"), n=3, cutoff=0.5)
        hint = f"did you mean {', '.join(close)}?" if close else f"it is one of {', '.join(NAMES)}"
        raise UserError(f"part {name!r} is unknown; {hint}")


def unwrapped(function: Any) -> Any:
    """The function of an op that is given as its package: `pallas_kernels.top_k` for `pallas_kernels.top_k.top_k`."""
    if isinstance(function, Operator):
        return vars(function).get(function.__name__.rpartition(".")[2], function)
    return function


def signature(function: Function) -> inspect.Signature:
    """A function's signature without what a `functools.partial` binds, which nobody may give again.

    Raises:
      UserError: the function has none that Python can read.
    """
    bound = bound_keywords(function)
    try:
        whole = inspect.signature(function)
    except ValueError as error:
        raise UserError(
            f"{title(function)}: its arguments cannot be read; give a Python function that calls it"
        ) from error
    return whole.replace(parameters=[one for name, one in whole.parameters.items() if name not in bound])


def bound_keywords(function: Function) -> Mapping[str, Any]:
    """The keyword arguments that a `functools.partial` binds; partials of partials are one."""
    return function.keywords if isinstance(function, functools.partial) else {}


def accepted(function: Function, keywords: Mapping[str, Any]) -> dict[str, Any]:
    """The keyword arguments that a function takes: those that it names, or all where it takes any and binds none."""
    parameters = signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        bound = bound_keywords(function)
        return {name: value for name, value in keywords.items() if name not in bound}
    return {name: value for name, value in keywords.items() if name in parameters}


def names(function: Function, keyword: str) -> bool:
    """Whether a function names a keyword argument, which one with **keywords does not."""
    return keyword in signature(function).parameters


def check_signature(part: str, function: Function) -> None:
    """Raises UserError for a function that cannot be called as the part is."""
    if not callable(function):
        raise UserError(f"part {part}: {function!r} is no function")
    function_signature = signature(function)
    identity(function)
    parameters = inspect.signature(DEFAULTS[part]).parameters.values()
    positional = [one.name for one in parameters if one.kind is not one.KEYWORD_ONLY and one.default is one.empty]
    keywords = [one.name for one in parameters if one.name not in positional] + list(EXTRAS.get(part, ()))
    try:
        function_signature.bind(*positional, **accepted(function, dict.fromkeys(keywords)))
    except TypeError as error:
        raise UserError(
            f"part {part}: {title(function)}{function_signature} cannot be called with "
            f"({', '.join(positional)}) and, by name, what it wants of {', '.join(keywords)}: {error}"
        ) from error

    for name in [
        name
        for name, one in function_signature.parameters.items()
        if one.kind is one.KEYWORD_ONLY and name not in keywords
    ]:
        if close := difflib.get_close_matches(
            name, [one for one in keywords if one not in function_signature.parameters], cutoff=0.75
        ):
            raise UserError(
                f"part {part}: {title(function)} names {name!r}, which nobody gives; did you mean {close[0]}?"
            )


def check_reached(replaced: Mapping[str, Function]) -> None:
    """Raises UserError for a part that nobody would call because the op around it is replaced as well."""
    for outer, inner in ONLY_INSIDE.items():
        for name in inner:
            if outer in replaced and name in replaced:
                raise UserError(f"part {name}: {outer} is replaced as well, and only that would call it")


def identity(function: Function) -> Any:
    """What two functions have in common that compute the same: the function, or what a `functools.partial` binds."""
    key: Any = function
    if isinstance(function, functools.partial):
        values = (*function.args, *(value for _, value in sorted(function.keywords.items())))
        # Values that are equal may compute differently: True, 1 and 1.0; 0.0 and -0.0.
        kinds = tuple((type(value), repr(value)) for value in values)
        key = (identity(function.func), function.args, tuple(sorted(function.keywords.items())), kinds)
    try:
        hash(key)
    except TypeError as error:
        raise UserError(
            f"{title(function)}: must be hashable, and binds a value that is not ({error}); bind numbers and texts, or "
            "define a function"
        ) from error
    return key


def title(function: Function) -> str:
    """A function's name for messages: "package.module:function"."""
    if isinstance(function, functools.partial):
        bound = [*map(repr, function.args), *(f"{name}={value!r}" for name, value in function.keywords.items())]
        return f"{title(function.func)}({', '.join(bound)})"
    name = getattr(function, "__qualname__", None)
    return f"{function.__module__}:{name}" if name else repr(function)


MODEL_PARTS = Parts()
"""The model's own."""
