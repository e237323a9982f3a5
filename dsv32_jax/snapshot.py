"""Whether a model is still what it was: an edit made in place is noticed by the identity of what was replaced."""

import operator
from typing import Any

from flax import nnx

__all__ = ["Snapshot"]


class Snapshot:
    """The attributes of a module and of every module below it, as they are now.

    Comparing them again costs a fraction of flattening the module: some 20 microseconds for a small model and 150 for
    one of 61 layers. What is compared is which objects they are, so that a copy of the same values counts as an edit.
    """

    def __init__(self, model: nnx.Pytree):
        self._model = model
        self._nodes: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        waiting = [model]
        while waiting:
            attributes = vars(waiting.pop())
            self._nodes.append((attributes, tuple(attributes.values())))
            waiting += [value for value in attributes.values() if isinstance(value, nnx.Pytree)]

    def shows(self, model: nnx.Pytree) -> bool:
        """Whether `model` is the very module of the snapshot, and nothing in it was replaced, added or removed."""
        return model is self._model and all(
            len(now) == len(then) and all(map(operator.is_, now.values(), then)) for now, then in self._nodes
        )
