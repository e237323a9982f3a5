"""Running the model in tests: flat batches of whole or partial sequences, and the golden checkpoints."""

from __future__ import annotations

import contextlib
import functools
import os
import select
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.config import ModelConfig
from dsv32_jax.engine.blocks import BlockTable
from dsv32_jax.fidelity import OF_LAYER, TAPS
from dsv32_jax.generate import batching
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache
from dsv32_jax.model.model import Batch, DeepseekV32, Options, tapped_layer
from dsv32_jax.model.taps import Taps
from pallas_kernels.paging import slots_of
from tests import numpy_model

TEXT = """\
The lighthouse keeper counts the ships that pass in the night. Some carry grain, some carry salt, and some carry only
the wind. When the fog comes in, he lights the lamp and sounds the horn, and he writes down the hour. In the morning
the sea is flat and grey, and the gulls walk along the wall as if they owned it. He drinks his tea, he oils the gears,
and he waits for the boat that brings the letters.
"""

DATA = Path(__file__).parent / "data" / "golden"
EXACT = Options(compute_dtype="float32", act_quant=False)
"""Arithmetic of the float32 oracles."""


def golden_directory(name: str) -> Path:
    """A golden checkpoint's folder, in the tests' data or under $DSV32_GOLDEN; skips the test where it is absent."""
    for place in (DATA, Path(os.environ.get("DSV32_GOLDEN", DATA))):
        if (place / name / "model" / "config.json").is_file():
            return place / name
    pytest.skip(f"golden/{name} is not here; set DSV32_GOLDEN to the folder that has it")


@functools.cache
def load_golden(name: str) -> DeepseekV32:
    """The model of a golden checkpoint, read by the converter's own HF reader."""
    from dsv32_jax import convert

    directory = golden_directory(name) / "model"
    return convert.load_hf(directory, ModelConfig.from_hf(directory))


@functools.cache
def load_oracle(name: str, file: str = "oracle.npz") -> SimpleNamespace:
    """Arrays of an oracle file as attributes."""
    with np.load(golden_directory(name) / file) as arrays:
        return SimpleNamespace(**{key: arrays[key] for key in arrays})


@functools.cache
def numpy_golden(name: str, act_quant: bool = False) -> numpy_model.Model:
    """The float64 NumPy model of a golden checkpoint."""
    directory = golden_directory(name) / "model"
    return numpy_model.Model(
        numpy_model.read_config(directory), numpy_model.read_weights(directory), act_quant=act_quant
    )


class Piece(NamedTuple):
    """Tokens start..start+len(ids) of one sequence, and that sequence's row of the block tables."""

    ids: Sequence[int]
    start: int = 0
    sequence: int = 0


def flat_batch(pieces: Sequence[Piece], tables: np.ndarray, *, padding: int = 0, spread: bool = False) -> Batch:
    """One batch of several pieces, every token's logits wanted.

    Args:
      pieces: what to run.
      tables: int32 [S, N], block tables.
      padding: rows of padding at the end, or with `spread` one after every token.
      spread: mix padding into the batch.
    """
    columns = []
    for piece in pieces:
        positions = np.arange(piece.start, piece.start + len(piece.ids))
        slots = tables[piece.sequence, positions // BLOCK_SIZE] * BLOCK_SIZE + positions % BLOCK_SIZE
        columns.append(np.stack([np.asarray(piece.ids), positions, slots, np.full(len(positions), piece.sequence)]))
    flat = np.concatenate(columns, 1)
    blank = np.array([[0], [-1], [-1], [0]])
    if spread:
        flat = np.stack([flat, np.repeat(blank, flat.shape[1], 1)], -1).reshape(4, -1)
    flat = np.concatenate([flat, np.repeat(blank, padding, 1)], 1).astype(np.int32)
    logit_rows = np.where(flat[1] >= 0, np.arange(flat.shape[1]), -1)
    return Batch(*map(jnp.asarray, flat), jnp.asarray(tables, jnp.int32), jnp.asarray(logit_rows, jnp.int32))


def tables_of(sequences: int, blocks: int, *, spare: int = 0, seed: int | None = None) -> np.ndarray:
    """[S, N] block tables over S * N + spare physical blocks: in order, or with a seed scattered over all of them."""
    count = sequences * blocks
    order = np.arange(count) if seed is None else np.random.default_rng(seed).permutation(count + spare)[:count]
    return order.reshape(sequences, blocks).astype(np.int32)


def slots_of_table(table: BlockTable, start: int, stop: int) -> np.ndarray:
    """Slots of positions start..stop of a sequence, all of which have a place."""
    assert 0 <= start <= stop <= table.length
    return slots_of(np.arange(start, stop), np.zeros(stop - start, np.int32), np.array([table.blocks], np.int32))


LAYER_TAPS = Taps.of(dict.fromkeys(f"layers.*.{name}" for name in OF_LAYER))


def fresh_jit(model: DeepseekV32, batch: Batch, cache: KVCache, options: Options) -> tuple[Any, KVCache, dict]:
    """The model's forward with the values of a trace, compiled anew, so that a monkeypatched part is really used."""

    @jax.jit
    def run(model, batch, cache):
        seams = options.seams(Taps.of(dict.fromkeys(TAPS)))
        logits, cache = model(batch, cache, options, seams)
        return logits, cache, seams.values

    return run(model, batch, cache)


def layer_record(
    model: DeepseekV32, layer: int, hidden: np.ndarray, batch: Batch, cache: KVCache, options: Options
) -> dict[str, np.ndarray]:
    """What a trace holds of one layer alone, by the last part of the names; `hidden` is the stream after it."""
    values = tapped_layer(model, layer, jnp.asarray(hidden), batch, cache, options, LAYER_TAPS)
    return last_names(values)


def last_names(values: dict[str, Any]) -> dict[str, np.ndarray]:
    """Values by the last part of their names."""
    return {name.rpartition(".")[2]: np.asarray(value) for name, value in values.items()}


def forward(model: DeepseekV32, rows: Sequence[Sequence[int]], options: Options = EXACT) -> list[SimpleNamespace]:
    """Whole sequences in one batch. For each: logits [T, V], hidden [L + 1, T, D], layers (dicts of NumPy arrays)."""
    blocks = -(-max(map(len, rows)) // BLOCK_SIZE)
    tables = tables_of(len(rows), blocks)
    batch = flat_batch([Piece(row, 0, n) for n, row in enumerate(rows)], tables)
    cache = KVCache.create(model.config, tables.size, options)
    logits, _, values = jax.tree.map(np.asarray, fresh_jit(model, batch, cache, options))
    layers = [
        last_names({name: value for name, value in values.items() if name.startswith(f"layers.{layer}.")})
        for layer in range(model.config.num_hidden_layers)
    ]
    ends = np.cumsum([len(row) for row in rows])
    results = []
    for end, row in zip(ends, rows, strict=True):
        tokens = slice(end - len(row), end)
        results.append(
            SimpleNamespace(
                logits=logits[tokens],
                hidden=np.stack([values["embedded"][tokens], *(layer["hidden"][tokens] for layer in layers)]),
                layers=[{key: value[tokens] for key, value in layer.items()} for layer in layers],
            )
        )
    return results


@contextlib.contextmanager
def one_shape(tokens: int = 64, blocks: int = 4) -> Iterator[None]:
    """Within it a `LanguageModel` reads every prompt in pieces of so many tokens, and each row owns so many blocks.

    Two programs then serve all prompts that are generated from one by one, where each length would have its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batching, "SMALLEST_CHUNK", tokens)
        patch.setattr(batching, "LARGEST_CHUNK", tokens)
        patch.setattr(batching, "block_tables", lambda rows, *_: tables_of(rows, blocks))
        yield


def times_compiled(function: str, call: Callable[[], Any], caplog: pytest.LogCaptureFixture) -> int:
    """How many programs of a jitted function XLA compiles in a call, in whatever thread."""
    caplog.clear()
    jax.config.update("jax_log_compiles", True)  # the context manager of that name is for one thread
    try:
        call()
    finally:
        jax.config.update("jax_log_compiles", False)
    return sum(f"Finished XLA compilation of jit({function})" in record.message for record in caplog.records)


def as_sets(rows: np.ndarray) -> list[set[int]]:
    """[T, K] indices -> a set for each row, -1 left out."""
    return [{int(i) for i in row if i >= 0} for row in rows]


def read_until(terminal: int, end: bytes, seconds: float = 60) -> bytes:
    """What comes from a file descriptor, to the first occurrence of `end`; fails where that does not come."""
    received = b""
    while end not in received:
        ready, _, _ = select.select([terminal], [], [], seconds)
        assert ready, f"{end!r} did not come: {received!r}"
        received += os.read(terminal, 1)  # no more: what comes afterwards is for the next call
    return received
