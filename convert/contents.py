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
from dsv32_jax.convert.companions import most_of, said_dtypes
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
"""What names of tensors end in that belong to a weight."""


class Weight(NamedTuple):
    """A weight as files hold it, stacked experts as one.

    Attributes:
      kind: its scheme, or of a plain one the dtype.
      plain: whether it is a matrix without a scheme.
      tensors: how many it stands for in the Hugging Face layout.
      parameters: values, without scales.
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
      parameters: their number; scales are none.
      bytes_by_dtype: of all arrays.
      weights: by scheme, and by dtype where they have none: "tensors", "parameters" and "bytes".
      disagreements: one line for each thing that config.json or the index says otherwise.
    """

    layout: str
    parameters: int
    bytes_by_dtype: dict[str, int]
    weights: dict[str, dict[str, int]]
    disagreements: list[str]


def contents(directory: Path, config: ModelConfig) -> Contents:
    """Of a checkpoint directory, and where that differs from its config.

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
    held = most_of((weight.kind, weight.parameters) for weight in weights if weight.plain)
    for field, said in said_dtypes(config).items():
        if held is not None and str(said).removeprefix("torch.") != held:
            disagreements.append(f"config.json: {field} is {said}, and the files hold what has no scheme in {held}")
    return Contents(layout, sum(weight.parameters for weight in weights), by_dtype, by_kind, disagreements)


def hf_weights(directory: Path, disagreements: list[str]) -> Iterator[Weight]:
    """Of the files that the index names, or of the only one; those that cannot be read are left to `HFReader`."""
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
    said = metadata.get("total_size") if isinstance(metadata, dict) else None
    if said not in (None, total):
        disagreements.append(f"{INDEX}: total_size is {said}, and the files hold {total} bytes of tensors")
    parts: dict[str, dict[str, Entry]] = {}
    for name, entry in tensors.items():
        suffix = next((end for end in (PACKED, *ADDED) if name.endswith(end) and belongs(name, end, tensors)), "")
        parts.setdefault(name.removesuffix(suffix), {})[suffix] = entry
    for held in parts.values():
        values = held.get("") or held[PACKED]
        dtype = dtype_of(values)
        kind = INT4.name if PACKED in held else SCHEME_OF.get(dtype, dtype) if len(held) > 1 else dtype
        count = math.prod(values.shape) * (IN_A_WORD if PACKED in held else 1)
        plain = len(held) == 1 and len(values.shape) > 1
        yield Weight(kind, plain, 1, count, [(dtype_of(entry), entry.size) for entry in held.values()])


def belongs(name: str, suffix: str, tensors: dict[str, Entry]) -> bool:
    """Whether a tensor is a part of a weight, and not one that is called so."""
    base = name.removesuffix(suffix)
    return base in tensors or base + PACKED in tensors


def dtype_of(entry: Entry) -> str:
    """As NumPy names it, where it is a type that checkpoints of this model have."""
    return DTYPES[entry.dtype].name if entry.dtype in DTYPES else entry.dtype


def orbax_weights(directory: Path, disagreements: list[str]) -> Iterator[Weight]:
    """Of all items; by Orbax's own metadata, held against what this project wrote beside it."""
    said = read_json(directory / DESCRIPTION).get("parameters")
    checkpointer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
    for item in sorted(path for path in (directory / PARAMS).iterdir() if path.is_dir()):
        try:
            held: dict[str, Any] = dict(checkpointer.metadata(item.absolute()).item_metadata.tree)
        except Exception as error:  # Orbax has many for what it cannot read
            disagreements.append(f"{PARAMS}/{item.name}: cannot be read ({type(error).__name__}: {error})"[:200])
            continue
        for path, leaf in held.items():
            quantised = isinstance(leaf, dict)
            parts = leaf if quantised else {"array": leaf}
            found = {name: describe(jax.ShapeDtypeStruct(part.shape, part.dtype)) for name, part in parts.items()}
            written = said.get(path) if isinstance(said, dict) else None
            if written is not None and any(
                part != (written if not quantised else written.get(name)) for name, part in found.items()
            ):
                shown = " and ".join(f"{part['dtype']} {part['shape']}" for part in found.values())
                disagreements.append(f"{path}: is {shown}, and {DESCRIPTION} says otherwise")
            values = parts["values"] if quantised else leaf
            dtype = np.dtype(values.dtype).name
            kind = SCHEME_OF.get(dtype, dtype) if quantised else dtype
            count = math.prod(SCHEMES[kind].shape_of(values) if quantised and kind in SCHEMES else values.shape)
            arrays = [
                (part["dtype"], math.prod(part["shape"]) * np.dtype(part["dtype"]).itemsize) for part in found.values()
            ]
            plain = not quantised and len(values.shape) > 1
            yield Weight(kind, plain, math.prod(values.shape[:-2]), count, arrays)
