"""Reading and writing checkpoints in the Hugging Face layout, one parameter at a time."""

import dataclasses
import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dsv32_jax.common.fields import shown
from dsv32_jax.common.reading import present, read_json
from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.names import hf_name, is_mtp, mtp_prefix, undeclared_mtp, without_mtp
from dsv32_jax.convert.stored import (
    OFFICIAL,
    TensorSpec,
    decode,
    encode,
    hf_tensors,
    host_qtensor,
    may_be_plain,
    stored_parameters,
    suffixes,
)
from dsv32_jax.convert.tensor_file import DTYPES, NAMES, Entry, Writer, read_header, read_into
from dsv32_jax.convert.unfinished import Unfinished
from dsv32_jax.errors import UserError
from pallas_kernels.matmul import QTensor

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD_BYTES = 5 * 10**9
FLOATS = ("F32", "BF16", "F16")
SCALE_SUFFIX = OFFICIAL["scales"]
LISTED = 20
"""How many problems of a checkpoint one error names."""


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its metadata, and its tensors' dtype and shape by name, in the order of their bytes."""

    metadata: dict[str, str] | None
    tensors: dict[str, tuple[str, tuple[int, ...]]]


class HFReader:
    """A checked checkpoint directory: all headers are read and compared with the config before any data."""

    def __init__(self, directory: Path, config: ModelConfig, *, mtp: bool = True):
        """Raises UserError for a missing, truncated or corrupt shard, and for all tensors that do not fit the config.

        Without `mtp` the config has no MTP layer, and the reader passes over one that the files may have.
        """
        self.directory, self.config = directory, config
        self.passed_over = None if mtp else mtp_prefix(config)
        self.stored = stored_parameters(config)
        self.index_metadata: dict[str, Any] | None = None
        self.shards: dict[str, Shard] = {}
        self.entries: dict[str, tuple[Path, Entry]] = {}
        problems: list[str] = []
        passed_over: list[str] = []
        absent: list[tuple[str, str]] = []
        for file, expected in self.shard_files().items():
            entries, metadata = read_header(directory / file)
            self.shards[file] = Shard(metadata, {name: (e.dtype, e.shape) for name, e in entries.items()})
            for name, entry in entries.items():
                if self.passes_over(name):
                    passed_over.append(name)
                    continue
                if name in self.entries:
                    problems.append(f"{name} is in two shards")
                self.entries[name] = (directory / file, entry)
            absent += [(name, file) for name in sorted((expected or set()) - set(entries))]
        if not is_mtp(passed_over, config):  # a config with one layer too few names another layer by that number
            problems += [f"unexpected {name}" for name in passed_over]
        whole = any(name.startswith(mtp_prefix(config)) for name in self.entries)
        problems += [
            f"{name} is not in {file}, where the index has it"
            for name, file in absent
            if whole or not name.startswith(mtp_prefix(config))
        ]
        problems += self.mismatches(hf_tensors(config, self.stored))
        if problems:
            more = f"; and {len(problems) - LISTED} more" if len(problems) > LISTED else ""
            raise UserError(f"{directory} does not fit its config.json: {'; '.join(problems[:LISTED])}{more}")

    def shard_files(self) -> dict[str, set[str] | None]:
        """Files, and the tensors that the index expects in each (None where there is no index)."""
        if not present(self.directory / INDEX):
            return {SINGLE: None}
        weight_map, self.index_metadata = read_index(self.directory)
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            if not self.passes_over(name):
                files.setdefault(file, set()).add(name)  # type: ignore[union-attr]
        if missing := [file for file in files if not present(self.directory / file)]:
            prefix = mtp_prefix(self.config)
            only_mtp = all(name.startswith(prefix) for file in missing for name in files[file] or ())
            hint = f"; {without_mtp(prefix)}" if self.config.has_mtp and only_mtp else ""
            shards = f"shard{'s' * (len(missing) > 1)} {', '.join(sorted(missing))}"
            raise UserError(f"{self.directory}: missing {shards}{hint}")
        return dict(sorted(files.items()))

    def passes_over(self, name: str) -> bool:
        """Whether a tensor belongs to an MTP layer that the reader passes over."""
        return self.passed_over is not None and name.startswith(self.passed_over)

    def mismatches(self, specs: dict[str, TensorSpec]) -> Iterable[str]:
        """Yields a line for each tensor that is missing, unexpected, misshapen or of a wrong dtype."""
        prefix, mtp_reported = mtp_prefix(self.config), False
        mtp_names = [name for name in self.entries if name.startswith(prefix)]
        if not mtp_names if self.config.has_mtp else is_mtp(mtp_names, self.config):
            yield without_mtp(prefix) if self.config.has_mtp else undeclared_mtp(prefix)
            specs, mtp_reported = {name: spec for name, spec in specs.items() if not name.startswith(prefix)}, True
        for name, spec in specs.items():
            if name not in self.entries:
                weight = self.entries.get(name.removesuffix(SCALE_SUFFIX))
                if spec.part != "scales" or not self.official:
                    yield f"missing {name}"
                elif weight is not None and weight[1].dtype == "F8_E4M3":
                    yield f"missing {name}, the scale of an F8_E4M3 weight"
                continue
            entry = self.entries[name][1]
            if entry.shape != spec.shape:
                yield f"{name} has shape {list(entry.shape)}, expected {list(spec.shape)}"
            allowed = self.allowed(spec)
            if entry.dtype not in allowed:
                hint = " (config.json has no quantization_config)" if self.config.quantization_config is None else ""
                yield f"{name} is {entry.dtype}, expected {' or '.join(allowed)}{hint * (entry.dtype not in FLOATS)}"
        for name in self.entries:
            if mtp_reported and name.startswith(prefix):
                continue
            if name not in specs:
                yield f"unexpected {name}"
            elif specs[name].part == "scales" and self.official:
                weight = self.entries.get(name.removesuffix(SCALE_SUFFIX))
                if weight is not None and weight[1].dtype != "F8_E4M3":
                    yield f"unexpected {name}: its weight is {weight[1].dtype}, not F8_E4M3"
        for path, dtypes in self.dtypes_of_stacks(specs).items():
            if len(dtypes) > 1:
                yield f"{hf_name(path, self.config)} has mixed dtypes {', '.join(sorted(dtypes))}"

    @property
    def official(self) -> bool:
        """Whether the config is of the released form, in which a weight may be plain instead."""
        return may_be_plain(self.config)

    def allowed(self, spec: TensorSpec) -> tuple[str, ...]:
        """The safetensors dtypes that a tensor may have."""
        if spec.part == "array":
            return FLOATS
        if self.official:
            return {"scales": ("F32",), "values": (*FLOATS, "F8_E4M3")}[spec.part]
        exact = NAMES[spec.dtype]
        return FLOATS if spec.part == "scales" and exact == "F32" else (exact,)

    def dtypes_of_stacks(self, specs: dict[str, TensorSpec]) -> dict[str, set[str]]:
        """The dtypes of each stacked parameter's tensors."""
        dtypes: dict[str, set[str]] = {}
        for name, spec in specs.items():
            if spec.expert is not None and spec.part in ("array", "values") and name in self.entries:
                dtypes.setdefault(spec.path, set()).add(self.entries[name][1].dtype)
        return dtypes

    def read(self, path: str) -> np.ndarray | QTensor:
        """Reads one parameter, stacked experts as one array, in the dtype of the file."""
        name = hf_name(path, self.config)
        experts = range(self.config.n_routed_experts) if "{expert}" in name else None
        leaf = self.stored[path]
        if isinstance(leaf, QTensor) and not self.official:
            parts = suffixes(leaf, self.config)
            read = [
                decode(leaf.scheme, {part: self.stack(prefix + suffix, None) for part, suffix in parts.items()})
                for prefix in ([name] if experts is None else [name.format(expert=expert) for expert in experts])
            ]
            return read[0] if experts is None else jax.tree.map(lambda *slices: np.stack(slices), *read)
        first = name.format(expert=0)
        values = self.stack(name, experts)
        if self.entries[first][1].dtype != "F8_E4M3":
            return values
        return host_qtensor(values, self.stack(name + SCALE_SUFFIX, experts))

    def describe(self, path: str) -> Any:
        """One parameter as it is in the files, abstract: `jax.ShapeDtypeStruct` or a QTensor of two."""
        if isinstance(self.stored[path], QTensor) and not self.official:
            return self.stored[path]
        name = hf_name(path, self.config)
        lead = (self.config.n_routed_experts,) if "{expert}" in name else ()
        parts: list[Any] = []
        for suffix in ("", SCALE_SUFFIX):
            if (entry := self.entries.get(name.format(expert=0) + suffix)) is not None:
                parts.append(jax.ShapeDtypeStruct((*lead, *entry[1].shape), DTYPES[entry[1].dtype]))
        if len(parts) == 1:
            return parts[0]
        values, scales = parts
        return QTensor(values, scales)

    def stack(self, name: str, experts: range | None) -> np.ndarray:
        """Reads the tensor, or the tensors of all experts as one array."""
        entry = self.entries[name.format(expert=0)][1]
        if experts is None:
            out = np.empty(entry.shape, DTYPES[entry.dtype])
            read_into(out, *self.entries[name])
            return out
        out = np.empty((len(experts), *entry.shape), DTYPES[entry.dtype])
        for expert in experts:
            read_into(out[expert], *self.entries[name.format(expert=expert)])
        return out


def read_index(directory: Path) -> tuple[dict[str, str], Any]:
    """(file of each tensor, metadata) as the index of a checkpoint has them.

    Raises:
      UserError: the index is malformed, or a value of it is no plain file name.
    """
    index = read_json(directory / INDEX)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError(f"{directory / INDEX}: weight_map is {shown(weight_map)}; it must be {{tensor: file}}")
    for file in weight_map.values():
        if not isinstance(file, str) or not file or Path(file).name != file:
            raise UserError(f"{directory / INDEX}: {shown(file)} is not a file name")
    return weight_map, index.get("metadata")


class HFWriter:
    """A checkpoint in the making: all files are laid out first, then parameters come in any order."""

    def __init__(
        self, work: Unfinished, config: ModelConfig, shards: dict[str, Shard], index_metadata: dict[str, Any] | None
    ):
        """Resumes with the files of an earlier run where all of them have the layout that this run would give them."""
        self.config = config
        self.writers = {
            file: Writer(work.directory / file, shard.tensors, shard.metadata) for file, shard in shards.items()
        }
        if all(writer.is_laid_out() for writer in self.writers.values()):
            work.keep(shards)
        else:
            work.restart()
            for writer in self.writers.values():
                writer.lay_out()
        self.file_of = {name: file for file, shard in shards.items() for name in shard.tensors}
        if set(shards) != {SINGLE}:
            total = sum(
                math.prod(s) * DTYPES[d].itemsize for shard in shards.values() for d, s in shard.tensors.values()
            )
            index = {
                "metadata": index_metadata or {"total_size": total},
                "weight_map": dict(sorted(self.file_of.items())),
            }
            (work.directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")

    def write_group(self, group: str, parameters: Iterable[tuple[str, Any]]) -> None:
        """Writes all parameters of one unit of streaming, and waits until they are on the disk: a crash loses none."""
        files = set()
        for path, leaf in parameters:
            name = hf_name(path, self.config)
            for expert in range(leaf.shape[0]) if "{expert}" in name else (None,):
                matrix = leaf if expert is None else jax.tree.map(lambda x, at=expert: x[at], leaf)
                for suffix, array in encode(matrix, self.config).items():
                    tensor_name = name.format(expert=expert) + suffix
                    self.writers[self.file_of[tensor_name]].write(tensor_name, array)
                    files.add(self.file_of[tensor_name])
        for file in files:
            self.writers[file].sync()


def plan_shards(config: ModelConfig, leaves: dict[str, Any], limit: int = SHARD_BYTES) -> dict[str, Shard]:
    """Distributes parameters (anything with shape and dtype, QTensors included) over files of at most `limit` bytes."""
    files: list[dict[str, tuple[str, tuple[int, ...]]]] = [{}]
    size = 0
    for name, spec in hf_tensors(config).items():
        leaf = leaves[spec.path]
        if spec.part == "scales" and not isinstance(leaf, QTensor):
            continue
        dtype = NAMES[spec.dtype if isinstance(leaf, QTensor) else np.dtype(leaf.dtype).name]
        count = math.prod(spec.shape) * DTYPES[dtype].itemsize
        if size + count > limit and files[-1]:
            files.append({})
            size = 0
        files[-1][name] = (dtype, spec.shape)
        size += count
    if len(files) == 1:
        return {SINGLE: Shard({"format": "pt"}, files[0])}
    return {
        f"model-{number:05d}-of-{len(files):05d}.safetensors": Shard({"format": "pt"}, tensors)
        for number, tensors in enumerate(files, 1)
    }
