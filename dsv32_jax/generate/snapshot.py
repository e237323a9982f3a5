"""Detects whether a model was edited in place, by the identity of its attributes."""

import operator
from typing import Any, Protocol

from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.model.context import Options

__all__ = ["Snapshot"]


class Computed(Protocol):
    """The attributes that determine what steps compute: those of a `LanguageModel`."""

    @property
    def model(self) -> nnx.Pytree: ...

    @property
    def options(self) -> Options: ...

    @property
    def config(self) -> ModelConfig: ...


class Snapshot:
    """The options, the config, and the attributes of a module and of every module below it, as they are now.

    Comparing them again costs a fraction of flattening the module: some 20 microseconds for a small model and 150 for
    one of 61 layers. Attributes are compared by identity, so that a copy of the same values counts as an edit.
    """

    def __init__(self, lm: Computed):
        self._model, self._options, self._config = lm.model, lm.options, lm.config
        self._nodes: list[tuple[dict[str, Any], tuple[Any, ...]]] = []
        waiting = [lm.model]
        while waiting:
            attributes = vars(waiting.pop())
            self._nodes.append((attributes, tuple(attributes.values())))
            waiting += [value for value in attributes.values() if isinstance(value, nnx.Pytree)]

    def shows(self, lm: Computed) -> bool:
        """Whether the module is the snapshot's, no attribute in it was replaced, added or removed, and options and
        config are equal to the snapshot's."""
        return (
            lm.model is self._model
            and lm.options == self._options
            and lm.config == self._config
            and all(len(now) == len(then) and all(map(operator.is_, now.values(), then)) for now, then in self._nodes)
        )
