"""DeepSeek-V3.2-Exp in JAX: `load` a checkpoint, and read, change and measure the model."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv32_jax.config import ModelConfig as ModelConfig
    from dsv32_jax.engine.engine import Engine as Engine
    from dsv32_jax.engine.request import SamplingParams as SamplingParams
    from dsv32_jax.errors import UserError as UserError
    from dsv32_jax.generate.language_model import LanguageModel as LanguageModel
    from dsv32_jax.generate.loading import load as load
    from dsv32_jax.model.context import Options as Options

__version__ = "0.1.0"
__all__ = ["Engine", "LanguageModel", "ModelConfig", "Options", "SamplingParams", "UserError", "load"]

MODULES = {
    "Engine": "engine.engine",
    "LanguageModel": "generate.language_model",
    "ModelConfig": "config",
    "Options": "model.context",
    "SamplingParams": "engine.request",
    "UserError": "errors",
    "load": "generate.loading",
}


def __getattr__(name: str) -> Any:
    # Late, so that `import dsv32_jax.config` does not import jax and every library beside it.
    if name in MODULES:
        return getattr(importlib.import_module(f"dsv32_jax.{MODULES[name]}"), name)
    raise AttributeError(f"module 'dsv32_jax' has no attribute {name!r}")


def __dir__() -> list[str]:
    """The public names and the modules that are imported, for completion in a notebook."""
    modules = [name for name, value in globals().items() if getattr(value, "__name__", "") == f"{__name__}.{name}"]
    return sorted([*__all__, "__version__", "__doc__", "__path__", *modules])
