"""Which of a step's values a caller wants to see, or to change, and what is to be computed of them on the device."""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import jax
import jax.numpy as jnp

from dsv32_jax.errors import UserError
from dsv32_jax.model.parts import accepted, identity, signature, title

__all__ = ["NO_PATCHES", "Patches", "Reduction", "Taps", "operands_of"]

Reduction = Callable[..., Any] | None


@dataclass(frozen=True, eq=False)
class Taps:
    """Names of values, and a reduction for each; hashable, a static argument of a jitted step.

    Attributes:
      requests: (pattern, reduction) pairs. A pattern is a name or has wildcards ("layers.*.attn.topk"), see `fnmatch`.
        A reduction is a function of the value and, by name, of what belongs to it (`DETAILS`), and runs in the step;
        None stands for the value itself.
    """

    requests: tuple[tuple[str, Reduction], ...] = ()

    KIND: ClassVar[str] = "tap"
    """What messages call a request."""
    NONE: ClassVar[str] = "for the value"
    """What None asks for."""
    OF: ClassVar[str] = "of a step"
    """Which values have names."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(pattern for pattern, _ in self.requests)})"

    def _key(self) -> Any:
        return frozenset((pattern, None if f is None else identity(f)) for pattern, f in self.requests)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Taps) and type(self) is type(other) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @classmethod
    def of(cls, requests: Mapping[str, Reduction]) -> Self:
        """From a mapping; raises UserError for a pattern that is no text or a reduction that is no function."""
        for pattern, reduction in requests.items():
            if not isinstance(pattern, str):
                raise UserError(f"{cls.KIND} {pattern!r}: must be a text, such as 'layers.*.attn.topk'")
            if reduction is not None:
                if not callable(reduction):
                    raise UserError(
                        f"{cls.KIND} {pattern!r}: {reduction!r} is no function; give one, or None {cls.NONE}"
                    )
                try:
                    identity(reduction)
                    signature(reduction)
                except UserError as error:
                    raise UserError(f"{cls.KIND} {pattern!r}: {error}") from error
        return cls(tuple(requests.items()))

    def asks(self, name: str) -> bool:
        """Whether somebody wants to see this value."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in self.requests)

    def reduced(self, name: str, value: Any, details: Mapping[str, Any]) -> Any:
        """What is asked for of a value; raises UserError where two requests ask for different things."""
        reductions = {reduction for pattern, reduction in self.requests if fnmatch.fnmatchcase(name, pattern)}
        if len(reductions) > 1:
            patterns = [pattern for pattern, _ in self.requests if fnmatch.fnmatchcase(name, pattern)]
            raise UserError(f"{self.KIND} {name!r}: {' and '.join(map(repr, patterns))} have different functions of it")
        (reduction,) = reductions
        if reduction is None:
            return value
        missing = [
            one
            for one in list(signature(reduction).parameters.values())[1:]
            if one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)
        ]
        for one in missing:
            if one.name not in details:
                raise UserError(
                    f"{self.KIND} {name!r}: {title(reduction)} wants {one.name}, which does not belong to this value "
                    "and is no operand"
                )
        try:
            result = reduction(value, **accepted(reduction, details))
        except Exception as error:
            error.add_note(f"in the function of {self.KIND} {name!r}")
            raise
        leaves = jax.tree.leaves(result, is_leaf=lambda leaf: leaf is None)
        if not leaves or not all(isinstance(leaf, jax.Array) for leaf in leaves):
            raise UserError(
                f"{self.KIND} {name!r}: {title(reduction)} gave {result!r}; must be arrays, made by jax.numpy"
            )
        return result

    def check_all_met(self, names: Iterable[str]) -> None:
        """Raises UserError for a pattern that none of the step's names meets."""
        known = list(names)
        for pattern, _ in self.requests:
            if not fnmatch.filter(known, pattern):
                close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
                hint = f"; did you mean {', '.join(close)}?" if close else "; `m.tap_names()` lists the names"
                raise UserError(f"{self.KIND} {pattern!r}: no value {self.OF} has such a name{hint}")


class Patches(Taps):
    """Names of values, and a function for each that gives what the step goes on with instead; hashable as `Taps` are.

    A function of the value and, by name, of what belongs to it (`DETAILS`) gives an array of the same shape and dtype.
    """

    KIND = "patch"
    NONE = "for no patch"
    OF = "that a step goes on with"

    def patched(self, name: str, value: jax.Array, details: Mapping[str, Any]) -> jax.Array:
        """What the step goes on with; raises UserError where it has another shape or dtype than the value."""
        result = self.reduced(name, value, details)
        if not isinstance(result, jax.Array) or (result.shape, result.dtype) != (value.shape, value.dtype):
            given = " and ".join(f"{leaf.dtype} {list(leaf.shape)}" for leaf in jax.tree.leaves(result))
            raise UserError(f"patch {name!r}: gave {given}; must be {value.dtype} {list(value.shape)}, as the value is")
        return result


NO_PATCHES = Patches()
DETAILS = {
    "positions": "int32 [T], the position of each token in its sequence, -1 for padding; of every value",
    "row_token": "int32 [P], the token of each row of a routing plan, -1 for padding; of the experts' inputs alone",
    "tile_expert": "int32 [tiles], the expert of each tile of P / tiles rows; likewise",
    "num_experts": "int, how many experts there are; likewise",
}
"""What a function gets beside the value if it names it."""


def operands_of(operands: Mapping[str, Any], requests: Iterable[Taps]) -> dict[str, jax.Array]:
    """The arrays that a caller has for the functions of these requests.

    Raises:
      UserError: one is no array or number, has the name of a detail, or is named by no function.
    """
    functions = [function for taps in requests for _, function in taps.requests if function is not None]
    named = {name for function in functions for name in list(signature(function).parameters)[1:]}
    arrays = {}
    for name, value in operands.items():
        if name in DETAILS:
            raise UserError(f"operand {name!r}: has the name of what belongs to a value; choose another")
        if name not in named:
            raise UserError(f"operand {name!r}: no function of a tap or patch has a parameter of that name")
        try:
            arrays[name] = jnp.asarray(value)
        except (TypeError, ValueError) as error:
            raise UserError(f"operand {name!r}: {type(value).__name__}; must be an array or a number") from error
    return arrays
