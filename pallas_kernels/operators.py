"""Packages that are called like the function of their name: `pallas_kernels.top_k(scores, k)`."""

import inspect
import sys
from types import ModuleType
from typing import Any


class Operator(ModuleType):
    """A package `x.op` that holds a function `op`: called, it is that function, and its signature is the function's.

    Importing `x.op` anywhere makes `x.op` the package, so the package itself has to be what is called: then `x.op`
    means one thing, whatever has been imported before.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return _function(self)(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(_function(self))


def _function(package: ModuleType) -> Any:
    function = vars(package).get(package.__name__.rpartition(".")[2])
    if function is None:
        names = [name for name in package.__all__ if inspect.isfunction(getattr(package, name))]
        raise TypeError(f"{package.__name__} is no function; it holds {', '.join(names)}")
    return function


def callable_package(name: str) -> None:
    """Makes an imported package an `Operator`, by its `__name__`."""
    sys.modules[name].__class__ = Operator
