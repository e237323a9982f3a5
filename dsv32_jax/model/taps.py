"""Which of a step's values a caller wants to see, and what is to be computed of them on the device."""

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from dsv32_jax.errors import UserError
from dsv32_jax.model.parts import accepted, identity, signature, title

__all__ = ["Reduction", "Taps"]

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

    def _key(self) -> Any:
        return frozenset((pattern, None if f is None else identity(f)) for pattern, f in self.requests)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Taps) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    @staticmethod
    def of(requests: Mapping[str, Reduction]) -> "Taps":
        """From a mapping; raises UserError for a pattern that is no text or a reduction that is no function."""
        for pattern, reduction in requests.items():
            if not isinstance(pattern, str):
                raise UserError(f"tap {pattern!r}: must be a text, such as 'layers.*.attn.topk'")
            if reduction is not None:
                if not callable(reduction):
                    raise UserError(f"tap {pattern!r}: {reduction!r} is no function; give one, or None for the value")
                try:
                    identity(reduction)
                    signature(reduction)
                except UserError as error:
                    raise UserError(f"tap {pattern!r}: {error}") from error
        return Taps(tuple(requests.items()))

    def asks(self, name: str) -> bool:
        """Whether somebody wants to see this value."""
        return any(fnmatch.fnmatchcase(name, pattern) for pattern, _ in self.requests)

    def reduced(self, name: str, value: Any, details: Mapping[str, Any]) -> Any:
        """What is asked for of a value; raises UserError where two requests ask for different things."""
        reductions = {reduction for pattern, reduction in self.requests if fnmatch.fnmatchcase(name, pattern)}
        if len(reductions) > 1:
            patterns = [pattern for pattern, _ in self.requests if fnmatch.fnmatchcase(name, pattern)]
            raise UserError(f"tap {name!r}: {' and '.join(map(repr, patterns))} ask for different reductions of it")
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
                    f"tap {name!r}: {title(reduction)} wants {one.name}, which does not belong to this value"
                )
        try:
            result = reduction(value, **accepted(reduction, details))
        except Exception as error:
            error.add_note(f"in the reduction of tap {name!r}")
            raise
        leaves = jax.tree.leaves(result, is_leaf=lambda leaf: leaf is None)
        if not leaves or not all(isinstance(leaf, jax.Array) for leaf in leaves):
            raise UserError(f"tap {name!r}: {title(reduction)} gave {result!r}; must be arrays, made by jax.numpy")
        return result

    def check_all_met(self, names: Iterable[str]) -> None:
        """Raises UserError for a pattern that none of the step's names meets."""
        known = list(names)
        for pattern, _ in self.requests:
            if not fnmatch.filter(known, pattern):
                close = difflib.get_close_matches(pattern, known, n=3, cutoff=0.5)
                hint = f"; did you mean {', '.join(close)}?" if close else "; `m.tap_names()` lists the names"
                raise UserError(f"tap {pattern!r}: no value of a step has such a name{hint}")


DETAILS = {
    "row_token": "int32 [P], the token of each row of a routing plan, -1 for padding; of the experts' inputs alone",
    "tile_expert": "int32 [tiles], the expert of each tile of P / tiles rows; likewise",
    "num_experts": "int, how many experts there are; likewise",
}
"""What a reduction gets beside the value if it names it."""
