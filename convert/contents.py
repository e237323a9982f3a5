"""What the tensor files of a checkpoint hold, read from their headers, whatever its config says."""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsv32_jax.common.reading import present, read_json
from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.companions import config_dtypes, most_of
from dsv32_jax.convert.conversion import checkpoint_kind
from dsv32_jax.convert.huggingface import INDEX, SINGLE, HFReader, read_index
from dsv32_jax.convert.orbax import DESCRIPTION, PARAMS, OrbaxReader, describe
from dsv32_jax.convert.stored import COMPRESSED, IN_A_WORD, OFFICIAL
from dsv32_jax.convert.tensor_file import DTYPES, Entry, read_header
from dsv32_jax.errors import UserError
from pallas_kernels.matmul import INT4, SCHEMES

SCHEME_OF = {scheme.dtypes[0]: scheme.name for scheme in SCHEMES.values()}
"""The scheme of weights by the dtype of their values in memory and in Orbax."""
PACKED = COMPRESSED[INT4].suffixes["packed"]
ADDED = (OFFICIAL["scales"], *(suffix for suffix in COMPRESSED[INT4].suffixes.values() if suffix != PACKED))
"""Suffixes of the names of tensors that belong to a weight."""


class Weight(NamedTuple):
    """A weight as files hold it, stacked experts as one.

    Attributes:
      kind: its scheme, or the dtype of a plain one.
      plain: whether it is a matrix without a scheme.
      tensors: number of its tensors in the Hugging Face layout, one for each expert.
      parameters: number of values, without scales.
      arrays: dtype and bytes of each of its arrays.
    """

    kind: str
    plain: bool
    tensors: int
    parameters: int
    arrays: list[tuple[str, int]]


@dataclasses.dataclass(frozen=True)
class Contents:
    """What the files of a checkpoint hold.

    Attributes:
      layout: "hf" or "orbax".
      parameters: their number; scales do not count.
      bytes_by_dtype: bytes of all arrays.
      weights: "tensors", "parameters" and "bytes" by scheme, or by dtype where there is none.
      disagreements: one line for each contradiction between the files and config.json or the index.
    """

    layout: str
    parameters: int
    bytes_by_dtype: dict[str, int]
    weights: dict[str, dict[str, int]]
    disagreements: list[str]


def contents(directory: Path, config: ModelConfig) -> Contents:
    """Reads what a checkpoint directory holds, and where it differs from its config.

    Raises:
      UserError: no checkpoint, or an unfinished one.
    """
    layout = checkpoint_kind(directory)
    disagreements: list[str] = []
    try:
        (HFReader if layout == "hf" else OrbaxReader)(directory, config)
    except UserError as error:
        disagreements.append(str(error))
    weights = list((hf_weights if layout == "hf" else orbax_weights)(directory, disagreements))
    by_dtype: dict[str, int] = {}
    by_kind: dict[str, dict[str, int]] = {}
    for weight in weights:
        for dtype, size in weight.arrays:
            by_dtype[dtype] = by_dtype.get(dtype, 0) + size
        kind = by_kind.setdefault(weight.kind, {"tensors": 0, "parameters": 0, "bytes": 0})
        kind["tensors"] += weight.tensors
        kind["parameters"] += weight.parameters
        kind["bytes"] += sum(size for _, size in weight.arrays)
    files_dtype = most_of((weight.kind, weight.parameters) for weight in weights if weight.plain)
    for field, dtype in config_dtypes(config).items():
        if files_dtype is not None and str(dtype).removeprefix("torch.") != files_dtype:
            disagreements.append(
                f"config.json: {field} is {dtype}, and the files hold what has no scheme in {files_dtype}"
            )
    return Contents(layout, sum(weight.parameters for weight in weights), by_dtype, by_kind, disagreements)


def hf_weights(directory: Path, disagreements: list[str]) -> Iterator[Weight]:
    """Yields the weights of the files that the index names, or of the only file.

    It skips files that cannot be read: `HFReader` reports those.
    """
    files, metadata = {SINGLE}, None
    if present(directory / INDEX):
        weight_map, metadata = read_index(directory)
        files = set(weight_map.values())
    disagreements += [
        f"{path.name}: is not in {INDEX}, and is never read"
        for path in sorted(directory.glob("*.safetensors"))
        if path.name not in files
    ]
    tensors: dict[str, Entry] = {}
    for file in sorted(files):
        try:
            tensors |= read_header(directory / file)[0]
        except UserError:
            continue
    total = sum(entry.size for entry in tensors.values())
    index_total = metadata.get("total_size") if isinstance(metadata, dict) else None
    if index_total not in (None, total):
        disagreements.append(f"{INDEX}: total_size is {index_total}, and the files hold {total} bytes of tensors")
    parts: dict[str, dict[str, Entry]] = {}
    for name, entry in tensors.items():
        suffix = next((end for end in (PACKED, *ADDED) if name.endswith(end) and belongs(name, end, tensors)), "")
        parts.setdefault(name.removesuffix(suffix), {})[suffix] = entry
    for entries in parts.values():
        values = entries.get("") or entries[PACKED]
        dtype = dtype_of(values)
        kind = INT4.name if PACKED in entries else SCHEME_OF.get(dtype, dtype) if len(entries) > 1 else dtype
        count = math.prod(values.shape) * (IN_A_WORD if PACKED in entries else 1)
        plain = len(entries) == 1 and len(values.shape) > 1
        yield Weight(kind, plain, 1, count, [(dtype_of(entry), entry.size) for entry in entries.values()])


def belongs(name: str, suffix: str, tensors: dict[str, Entry]) -> bool:
    """Whether a tensor is a part of a weight, and not a parameter whose own name ends in the suffix."""
    base = name.removesuffix(suffix)
    return base in tensors or base + PACKED in tensors


def dtype_of(entry: Entry) -> str:
    """NumPy's name of the dtype, or safetensors' where checkpoints of this model do not have that type."""
    return DTYPES[entry.dtype].name if entry.dtype in DTYPES else entry.dtype


def orbax_weights(directory: Path, disagreements: list[str]) -> Iterator[Weight]:
    """Yields the weights of all items from Orbax's metadata, which it compares with this project's description."""
    descriptions = read_json(directory / DESCRIPTION).get("parameters")
    checkpointer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    for item in sorted(path for path in (directory / PARAMS).iterdir() if path.is_dir()):
        try:
            leaves: dict[str, Any] = dict(checkpointer.metadata(item.absolute()).item_metadata.tree)
        except Exception as error:  # Orbax has many for what it cannot read
            disagreements.append(f"{PARAMS}/{item.name}: cannot be read ({type(error).__name__}: {error})"[:200])
            continue
        for path, leaf in leaves.items():
            quantised = isinstance(leaf, dict)
            parts = leaf if quantised else {"array": leaf}
            described = {name: describe(jax.ShapeDtypeStruct(part.shape, part.dtype)) for name, part in parts.items()}
            expected = descriptions.get(path) if isinstance(descriptions, dict) else None
            if expected is not None and any(
                part != (expected if not quantised else expected.get(name)) for name, part in described.items()
            ):
                shown = " and ".join(f"{part['dtype']} {part['shape']}" for part in described.values())
                disagreements.append(f"{path}: is {shown}, and {DESCRIPTION} says otherwise")
            values = parts["values"] if quantised else leaf
            dtype = np.dtype(values.dtype).name
            kind = SCHEME_OF.get(dtype, dtype) if quantised else dtype
            count = math.prod(SCHEMES[kind].shape_of(values) if quantised and kind in SCHEMES else values.shape)
            arrays = [
                (part["dtype"], math.prod(part["shape"]) * np.dtype(part["dtype"]).itemsize)
                for part in described.values()
            ]
            plain = not quantised and len(values.shape) > 1
            yield Weight(kind, plain, math.prod(values.shape[:-2]), count, arrays)
