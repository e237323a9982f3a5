"""Where a step calls its parts and shows its values: one object that lives while a step is traced."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from dsv32_jax.errors import UserError
from dsv32_jax.model.checks import check_contract, check_result
from dsv32_jax.model.parts import DEFAULTS, INSIDE, MODEL_PARTS, Parts, accepted, names, title
from dsv32_jax.model.taps import Taps

__all__ = ["Seams"]


class Seams:
    """The parts and the taps of one step. Names of values and scopes are the model's own: "layers.3.attn.topk".

    Args:
      parts: what the step calls.
      taps: what is to be seen of it.
      check: check the values that replaced parts give, not only their shapes.

    Attributes:
      values: what the taps asked for, by name, once the step is traced.
    """

    def __init__(self, parts: Parts | None = None, taps: Taps | None = None, check: bool = False):
        self.parts = parts or MODEL_PARTS
        self.taps = taps or Taps()
        self.check = check
        self.values: dict[str, Any] = {}
        self.names: list[str] = []
        self._path: list[str] = []
        self._called: set[str] = set()

    @contextlib.contextmanager
    def scope(self, name: str) -> Iterator[None]:
        """Names inside begin with `name`, here and in profiles."""
        self._path.append(name)
        try:
            with jax.named_scope(name):
                yield
        finally:
            self._path.pop()

    def path(self, name: str) -> str:
        """A name with those of the scopes around it in front."""
        return ".".join([*self._path, name])

    def tap(self, name: str, value: Any, **details: Any) -> None:
        """Shows a value to whoever asked for it.

        Args:
          name: of the value, within the scope.
          value: an array, or a function of nothing that computes it only if it is wanted.
          details: for reductions, see `taps.DETAILS`.
        """
        name = self.path(name)
        self.names.append(name)
        if self.taps.asks(name):
            self.values[name] = self.taps.reduced(name, value() if callable(value) else value, details)

    def composes(self, fused: str, *values: str) -> bool:
        """Whether a fused op runs in its composed form, from parts; never where it is replaced as a whole.

        Args:
          fused: its name.
          values: names, within the scope, that exist in the composed form alone.

        Returns:
          True where a part inside it is replaced, or somebody wants to see one of the values.
        """
        if fused in self.parts.replaced:
            return False
        return self.parts.replace_any(INSIDE[fused]) or any(self.taps.asks(self.path(value)) for value in values)

    def call(
        self, part: str, *arrays: Any, extras: Mapping[str, Callable[[], Any]] | None = None, **keywords: Any
    ) -> Any:
        """What a part gives.

        Args:
          part: its name.
          arrays: the positional arguments of its op.
          extras: what computes each of its `parts.EXTRAS`.
          keywords: the other arguments of its op.

        Raises:
          UserError: the result of a replaced part has another shape or dtype than that of the op.
        """
        self._called.add(part)
        with jax.named_scope(part):
            if part not in self.parts.replaced:
                return DEFAULTS[part](*arrays, **keywords)
            function = self.parts.replaced[part]
            computed = {name: compute() for name, compute in (extras or {}).items() if names(function, name)}
            label = f"part {part} ({title(function)}), {'.'.join(self._path) or 'the step'}"
            try:
                result = function(*arrays, **accepted(function, keywords), **computed)
            except Exception as error:
                error.add_note(f"in {label}")
                raise
            check_result(label, result, lambda: DEFAULTS[part](*arrays, **keywords), part)
            if self.check:
                check_contract(label, part, result, arrays, keywords)
            return result

    def check_all_called(self) -> None:
        """Raises UserError for a replaced part that the step never called, so that it would change nothing unseen."""
        for part in self.parts.replaced.keys() - self._called:
            raise UserError(
                f"part {part} is replaced by {title(self.parts.replaced[part])}, and no step with this config and "
                "these options calls it"
            )
