"""DeepSeek-V3.2-Exp in JAX: `load` a checkpoint, and read, change and measure the model."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dsv32_jax.language_model import LanguageModel as LanguageModel
    from dsv32_jax.loading import load as load

__version__ = "0.1.0"
__all__ = ["LanguageModel", "load"]


def __getattr__(name: str) -> Any:
    # Late, so that `import dsv32_jax.config` does not import jax and every library beside it.
    if name == "load":
        from dsv32_jax.loading import load

        return load
    if name == "LanguageModel":
        from dsv32_jax.language_model import LanguageModel

        return LanguageModel
    raise AttributeError(f"module 'dsv32_jax' has no attribute {name!r}")
