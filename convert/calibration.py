"""Statistics of the inputs of each linear of a model, over a text."""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from dsv32_jax.common.progress import progress_bar
from dsv32_jax.common.units import human
from dsv32_jax.convert.finite import check_all_finite, check_statistics
from dsv32_jax.convert.statistics import Statistics, of_inputs
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.memory import available_bytes
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache
from dsv32_jax.model.model import Batch, DeepseekV32, Options, StepContext
from dsv32_jax.model.params import is_linear, named_parameters, replace_parameters
from dsv32_jax.model.taps import Taps
from pallas_kernels.matmul import dense


def calibrate(lm: LanguageModel, windows: Iterable[Sequence[int]]) -> dict[str, Statistics]:
    """Returns statistics by the path of each linear, the MTP layer's among them if there is one.

    The model runs unquantised in float32, without absorption, so that kv_b has inputs, too. The MTP layer gets each
    token of a window but the last, with the token after it.

    Args:
      lm: the model; all its linears are dequantised at once, in memory.
      windows: ids of one length, at least 2; each is a text of its own.

    Raises:
      UserError: there is too little memory, or a weight or a statistic is NaN or infinite.
    """
    parameters = named_parameters(lm.model)
    check_all_finite(parameters, lm.model.config)
    linears = {path: leaf for path, leaf in parameters.items() if is_linear(path)}
    # Linears in float32, and twice the moments: those of a window, and the sum.
    needed = sum(
        4 * math.prod(leaf.shape) + 8 * math.prod(leaf.shape[:-2]) * leaf.shape[-1] ** 2 for leaf in linears.values()
    )
    free, memory_name = available_bytes()
    if needed > free:
        raise UserError(
            f"calibration: linears in float32 and the second moments of their inputs take {human(needed)}, and there "
            f"are {human(free)} of {memory_name}; quantise without it, or use a machine with more"
        )
    parameters |= {path: dense(leaf, jnp.float32) for path, leaf in linears.items()}
    model = replace_parameters(lm.model, parameters)
    options = dataclasses.replace(lm.options, compute_dtype="float32", act_quant=False, absorb=False, cache_dtype=None)
    total: dict[str, Statistics] = {}
    layers = lm.config.num_hidden_layers + lm.config.has_mtp
    all_windows = list(windows)
    with progress_bar("calibrating", len(all_windows), "windows") as advance:
        for window in all_windows:
            ids = np.asarray(window, np.int32)
            positions = np.arange(len(ids), dtype=np.int32)
            table = np.arange(-(-len(ids) // BLOCK_SIZE), dtype=np.int32)[None]
            batch = Batch(*map(jnp.asarray, (ids, positions, positions, 0 * positions, table, positions[:1])))
            cache = KVCache.create(lm.config, table.size, options, layers=layers)
            total = jax.block_until_ready(_summed(model, batch, cache, total, options))
            advance(1)
    check_statistics(total)
    return total


@partial(jax.jit, static_argnames="options", donate_argnames="total")
def _summed(
    model: DeepseekV32, batch: Batch, cache: KVCache, total: dict[str, Statistics], options: Options
) -> dict[str, Statistics]:
    """`total` and the statistics of one window, summed."""
    inputs = {f"{path}.input": path for path in named_parameters(model) if is_linear(path)}
    seams = options.seams(Taps.of(dict.fromkeys(inputs, of_inputs)))
    states, cache = model.states(batch, cache, options, seams)
    if model.mtp is not None:
        arrays = {name: getattr(batch, name)[:-1] for name in ("ids", "positions", "slots", "sequence")}
        ctx = StepContext(model.config, options, dataclasses.replace(batch, **arrays), seams)
        model.mtp(states[:-1], batch.ids[1:], cache, ctx, batch.logit_rows)
    return {
        path: seams.values[name] + total[path] if path in total else seams.values[name] for name, path in inputs.items()
    }


def windows_of(lm: LanguageModel, text: str, length: int = 1024, max_windows: int = 32) -> list[list[int]]:
    """Windows of a text as ids for `calibrate`.

    Returns:
      Whole windows of `length` tokens from the text's beginning, at most `max_windows`; a shorter text is one window.

    Raises:
      UserError: the text is empty, or the checkpoint has no tokenizer.
    """
    if lm.tokenizer is None:
        raise UserError("calibration: the checkpoint has no tokenizer.json, which a text needs")
    ids = lm.tokenizer.encode(text, bos=True)
    length = min(length, lm.config.max_position_embeddings, len(ids))
    if length < 2:
        raise UserError("calibration: the text is empty")
    return [ids[at : at + length] for at in range(0, len(ids) - length + 1, length)][:max_windows]
