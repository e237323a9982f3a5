"""Where a step calls its parts and shows its values: one object that lives while a step is traced."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax

from dsv32_jax.errors import UserError
from dsv32_jax.model.checks import check_contract, check_result
from dsv32_jax.model.parts import DEFAULTS, INSIDE, MODEL_PARTS, Parts, accepted, names, title
from dsv32_jax.model.taps import NO_PATCHES, Patches, Taps

__all__ = ["Seams"]


class Seams:
    """The parts and the taps of one step. Names of values and scopes are the model's own: "layers.3.attn.topk".

    Args:
      parts: what the step calls.
      taps: what is to be seen of it.
      check: check the values that replaced parts give, not only their shapes.
      patches: what is to be changed in it.

    Attributes:
      values: what the taps asked for, by name, once the step is traced.
      details: what belongs to every value, see `taps.DETAILS`.
    """

    def __init__(
        self,
        parts: Parts | None = None,
        taps: Taps | None = None,
        check: bool = False,
        patches: Patches | None = None,
    ):
        self.parts = parts or MODEL_PARTS
        self.taps = taps or Taps()
        self.check = check
        self.patches = patches or NO_PATCHES
        self.values: dict[str, Any] = {}
        self.details: dict[str, Any] = {}
        self.names: list[str] = []
        self.patchable: list[str] = []
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
        """Shows a value that is there to be looked at alone to whoever asked for it.

        Args:
          name: of the value, within the scope.
          value: an array, or a function of nothing that computes it only if it is wanted.
          details: for functions of it, see `taps.DETAILS`.

        Raises:
          UserError: somebody wants to change it.
        """
        path = self.path(name)
        if self.patches.asks(path):
            raise UserError(
                f"patch {path!r}: with these options the step looks at this value alone and does not go on with it"
            )
        self._show(path, value, details)

    def value(self, name: str, value: Any, **details: Any) -> Any:
        """Shows a value that the step goes on with, as `tap` does.

        Returns:
          `value`, or, where somebody wants to change it, what it is changed to.

        Raises:
          UserError: that has another shape or dtype.
        """
        path = self.path(name)
        self.patchable.append(path)
        if self.patches.asks(path):
            value = self.patches.patched(path, value() if callable(value) else value, self.details | details)
        self._show(path, value, details)
        return value

    def _show(self, path: str, value: Any, details: Mapping[str, Any]) -> None:
        self.names.append(path)
        if self.taps.asks(path):
            value = value() if callable(value) else value
            self.values[path] = self.taps.reduced(path, value, {**self.details, **details})

    def is_patched(self, *values: str) -> bool:
        """Whether somebody wants to change one of these values; names within the scope."""
        return any(self.patches.asks(self.path(value)) for value in values)

    def composes(self, fused: str, *values: str, patched: str | None = None) -> bool:
        """Whether a fused op runs in its composed form, from parts; never where it is replaced as a whole.

        Args:
          fused: its name.
          values: names, within the scope, that exist in the composed form alone.
          patched: the name of a value that exists in the fused form, too, but is there to be looked at alone.

        Returns:
          True where a part inside it is replaced, or somebody wants to see or change one of the values.
        """
        if fused in self.parts.replaced:
            return False
        seen = any(self.taps.asks(self.path(value)) for value in values)
        return seen or self.parts.replace_any(INSIDE[fused]) or self.is_patched(*values, *filter(None, (patched,)))

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
        """Raises UserError for a replaced part that the step never called and a patch of a value that it does not have:
        they would change nothing unseen."""
        self.patches.check_all_met(self.patchable)
        for part in self.parts.replaced.keys() - self._called:
            raise UserError(
                f"part {part} is replaced by {title(self.parts.replaced[part])}, and no step with this config and "
                "these options calls it"
            )
