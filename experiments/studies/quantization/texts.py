"""The held-out text of these measurements, and statistics of the linears' inputs over a part of it.

It has three parts that share no document: to evaluate, to calibrate, and to choose a plan by its sensitivities. Nothing
is fitted to the text of the table.
"""

import dataclasses
import hashlib
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from dsv32_jax.common.files import whole_file
from dsv32_jax.convert.calibration import calibrate
from dsv32_jax.convert.statistics import Statistics
from dsv32_jax.experiments.studies import held_out
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.tokenizer import Tokenizer
from dsv32_jax.model.params import named_parameters

LENGTH, LONGEST, SHORTEST = 1024, 2048, 512
"""Tokens of a window, of the longest context in which a needle is hidden, and of the planning windows: those are run
very often; half of their tokens see more positions than the demo chooses."""
EVALUATION, CALIBRATION, PLANNING = slice(0, 16), slice(16, 32), slice(32, 36)
"""The documents of each part."""
KEPT = Path(".train/quantization")
"""Folder in which statistics are cached between commands: they take minutes."""


@dataclasses.dataclass(frozen=True)
class Texts:
    """int32 [windows, 1024]; `planning` has 512 tokens, and `long`, the evaluation's to hide needles in, 2048."""

    evaluation: np.ndarray
    calibration: np.ndarray
    planning: np.ndarray
    long: np.ndarray

    @staticmethod
    def of(tokenizer: Tokenizer) -> "Texts":
        """From the held-out documents that have `LONGEST` tokens."""
        windows = held_out.windows(tokenizer, LONGEST, PLANNING.stop)
        evaluation, calibration = (windows[part, :LENGTH] for part in (EVALUATION, CALIBRATION))
        return Texts(evaluation, calibration, windows[PLANNING, :SHORTEST], windows[EVALUATION])


def statistics(lm: LanguageModel, windows: np.ndarray, folder: Path = KEPT) -> dict[str, Statistics]:
    """Runs `calibrate`, or reads its results for the same weights and windows from a file."""
    digest = hashlib.sha256(windows.tobytes())
    for leaf in named_parameters(lm.model).values():
        digest.update(np.asarray(leaf.values if hasattr(leaf, "values") else leaf).tobytes())
    file = folder / f"statistics-{digest.hexdigest()[:16]}.npz"
    fields = [field.name for field in dataclasses.fields(Statistics)]
    if not file.exists():
        by_path = calibrate(lm, windows)
        arrays = {
            f"{path}/{name}": np.asarray(getattr(linear, name)) for path, linear in by_path.items() for name in fields
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(file) as temporary, open(temporary, "wb") as out:
            np.savez(out, allow_pickle=False, **arrays)
    with np.load(file) as arrays:
        paths = dict.fromkeys(key.rpartition("/")[0] for key in arrays)
        return {path: Statistics(*(jnp.asarray(arrays[f"{path}/{name}"]) for name in fields)) for path in paths}
