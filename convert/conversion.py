"""Converts checkpoints from one layout to the other: streamed layer by layer, resumable."""

import dataclasses
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dsv32_jax import __version__
from dsv32_jax.common.progress import progress_bar
from dsv32_jax.common.reading import present
from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.companions import companions, copy_files, with_dtype, write_config, write_json
from dsv32_jax.convert.finite import check_finite, check_loaded
from dsv32_jax.convert.huggingface import INDEX, SHARD_BYTES, SINGLE, HFReader, HFWriter, plan_shards
from dsv32_jax.convert.orbax import DESCRIPTION, PARAMS, OrbaxReader, OrbaxWriter, Placement, groups_of, shards_or_plan
from dsv32_jax.convert.stored import stored_parameters
from dsv32_jax.convert.unfinished import new_directory, refuse_unfinished, unfinished
from dsv32_jax.errors import UserError
from dsv32_jax.model.model import DeepseekV32, abstract_model
from dsv32_jax.model.params import named_parameters, replace_parameters
from pallas_kernels.matmul import QTensor

OTHER = {"hf": "orbax", "orbax": "hf"}
"""The layouts, each with the one that it is converted to."""
PROVENANCE = "dsv32_jax_quantization"
"""The field of config.json that says how a quantised checkpoint came to be."""
KEPT_FLOAT32 = (".router_bias", ".indexer.k_norm_weight", ".indexer.k_norm_bias")
"""Parameters that stay as they are when all others become bfloat16: choices depend on these."""


def checkpoint_kind(directory: str | os.PathLike[str]) -> str:
    """ "hf" or "orbax".

    Raises:
      UserError: neither, or a conversion that was interrupted.
    """
    directory = Path(directory)
    refuse_unfinished(directory)
    if present(directory / DESCRIPTION):
        return "orbax"
    if present(directory / INDEX) or present(directory / SINGLE):
        return "hf"
    raise UserError(f"{directory}: no checkpoint; it has none of {INDEX}, {SINGLE}, {DESCRIPTION}")


def load_hf(
    directory: str | os.PathLike[str],
    config: ModelConfig | None = None,
    placement: Placement | None = None,
    *,
    dequantize: str | None = None,
    mtp: bool = True,
) -> DeepseekV32:
    """Loads the model of a Hugging Face checkpoint; each parameter goes to its device as soon as it is read.

    Args:
      directory: has config.json and safetensors.
      config: that of the directory where None.
      placement: sharding by parameter path; everything on the first device where None.
      dequantize: "float32" or "bfloat16": what quantised weights become, each as soon as it is read.
      mtp: False leaves out the multi-token prediction layer, whether or not the files have one.

    Raises:
      UserError: `HFReader` refuses the files, or a parameter would spoil the result unseen, see `check_loaded`.
    """
    directory = Path(directory)
    refuse_unfinished(directory)
    config = config_to_load(directory, config, mtp)
    reader = HFReader(directory, config, mtp=mtp)
    parameters = {}
    paths = list(named_parameters(abstract_model(config)))
    with progress_bar(f"loading {directory.name}", sum(nbytes(reader.describe(path)) for path in paths)) as advance:
        for path in paths:
            leaf = reader.read(path)
            check_loaded(path, leaf, config)
            advance(nbytes(leaf))
            placed = jax.tree.map(jnp.asarray, leaf) if placement is None else jax.device_put(leaf, placement(path))
            parameters[path] = dequantized_if(placed, dequantize)
    return assembled(config, parameters, dequantize)


def load_orbax(
    directory: str | os.PathLike[str],
    config: ModelConfig | None = None,
    placement: Placement | None = None,
    *,
    dequantize: str | None = None,
    mtp: bool = True,
) -> DeepseekV32:
    """Loads the model of a converted checkpoint; arguments and errors are those of `load_hf`."""
    directory = Path(directory)
    refuse_unfinished(directory)
    config = config_to_load(directory, config, mtp)
    reader = OrbaxReader(directory, config, mtp=mtp)
    parameters: dict[str, Any] = {}
    paths = list(reader.parameters)
    with progress_bar(f"loading {directory.name}", sum(nbytes(reader.describe(path)) for path in paths)) as advance:
        for group in groups_of(paths):
            leaves = reader.read_group(group, placement)
            for path, leaf in leaves.items():
                check_loaded(path, leaf, config)
            advance(sum(map(nbytes, leaves.values())))
            parameters |= {path: dequantized_if(leaf, dequantize) for path, leaf in leaves.items()}
    return assembled(config, parameters, dequantize)


def dequantized_if(leaf: Any, dequantize: str | None) -> Any:
    """The parameter, as a plain array of dtype `dequantize` where it is quantised and that is not None."""
    return leaf.dequantize(dequantize) if dequantize and isinstance(leaf, QTensor) else leaf


def assembled(config: ModelConfig, parameters: dict[str, Any], dequantize: str | None) -> DeepseekV32:
    """The model of a config and its parameters; with `dequantize` its config has no quantisation."""
    if dequantize:
        config = config.replace(quantization_config=None)
    return replace_parameters(abstract_model(config), parameters)


def config_to_load(directory: Path, config: ModelConfig | None, mtp: bool) -> ModelConfig:
    """`config`, or the directory's where None; without the MTP layer where `mtp` is False."""
    config = config or ModelConfig.from_hf(directory)
    return config if mtp else config.replace(num_nextn_predict_layers=0)


@dataclasses.dataclass(frozen=True)
class Change:
    """A change of a checkpoint's parameters while it is rewritten.

    Attributes:
      config: of the new checkpoint.
      leaf: (path, parameter as it is read) -> parameter as it is written.
      stored: the same function of abstract parameters.
      identity: JSON-able; an interrupted run is resumed only where it is the same.
    """

    config: ModelConfig
    leaf: Callable[[str, Any], Any]
    stored: Callable[[str, Any], Any]
    identity: dict[str, Any]


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], to: str | None = None, dtype: str | None = None
) -> str:
    """Writes `source` (either layout) to `target` in the layout `to`.

    The files are written to `target` + ".partial", which is renamed at the end. A run after an interruption resumes
    where that stopped, unless the source or the arguments have changed: then it begins anew. One process or thread at a
    time can write a target. Tokenizer, templates, licences, cards and code are copied, see
    `dsv32_jax.convert.companions.COPIED`; config.json describes the new files.

    Args:
      source: a checkpoint directory.
      target: must not exist.
      to: "orbax" or "hf"; the layout that the source does not have where None.
      dtype: None keeps every value and type; "bf16" dequantises and makes all but the router's bias and the indexer's
        key norm bfloat16.

    Returns:
      The layout that was written.

    Raises:
      UserError: bad arguments, a bad source, a weight that is NaN or infinite, a target that cannot be written, or one
        that somebody else is writing.
    """
    if dtype not in (None, "bf16", "bfloat16"):
        raise UserError(f"--dtype {dtype}: must be bf16 (or left out, to keep every type)")
    return rewrite(source, target, to, (lambda config: None) if dtype is None else to_bfloat16)


def rewrite(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str | None,
    change_of: Callable[[ModelConfig], Change | None],
) -> str:
    """Converts with a change that `change_of` makes from the source's config; None keeps every value and file."""
    source = Path(source)
    if to not in (*OTHER, None):
        raise UserError(f"--to {to}: must be orbax or hf")
    if not source.is_dir():
        raise UserError(f"{source}: no such directory")
    kind = checkpoint_kind(source)
    to = to or OTHER[kind]
    files = file_states(source)
    config = ModelConfig.from_hf(source)
    with new_directory(target) as locked_target:
        change = change_of(config)
        reader: Any = HFReader(source, config) if kind == "hf" else OrbaxReader(source, config)
        paths = list(stored_parameters(config))
        leaves = {path: reader.describe(path) for path in paths}
        new_config, change_identity = config, None
        if change is not None:
            leaves = {path: change.stored(path, leaf) for path, leaf in leaves.items()}
            new_config, change_identity = with_dtype(change.config, leaves), change.identity
        shards = shards_or_plan(reader.shards, new_config, leaves)

        def to_write(path: str, leaf: Any) -> Any:
            check_finite(path, leaf, config)
            if change is None:
                return leaf
            changed = change.leaf(path, leaf)
            if changed is not leaf:  # what fits into one type may be infinite in another
                check_finite(path, changed, new_config)
            return changed

        identity = {
            "source": str(source.resolve()),
            "files": files,
            "to": to,
            "change": change_identity,
            "version": __version__,
        }
        with unfinished(locked_target, identity) as work:
            index_metadata = reader.index_metadata if change is None else None
            writer: Any = (
                OrbaxWriter(work, leaves, shards, index_metadata)
                if to == "orbax"
                else HFWriter(work, new_config, shards, index_metadata)
            )
            with progress_bar(f"converting {source.name}", sum(map(nbytes, leaves.values()))) as advance:
                for group, members in groups_of(paths).items():
                    size = sum(nbytes(leaves[path]) for path in members)
                    if group not in work.done:
                        whole = {} if kind == "hf" else reader.read_group(group)
                        read = ((path, whole.pop(path) if path in whole else reader.read(path)) for path in members)
                        writer.write_group(group, ((path, to_write(path, leaf)) for path, leaf in read))
                        work.finish(group)
                    advance(size)
            copy_files(source, work.directory, None if change is None else new_config)
            if shards is reader.shards and (source / INDEX).exists():
                shutil.copyfile(source / INDEX, work.directory / INDEX)
            if file_states(source) != files:
                raise UserError(f"{source}: was changed while it was read; convert it again")
    return to


def export_model(
    model: DeepseekV32,
    directory: str | os.PathLike[str],
    *,
    tokenizer_files: str | os.PathLike[str] | None = None,
    generation_config: Mapping[str, Any] | None = None,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Writes a model in memory as a Hugging Face checkpoint.

    Args:
      model: with concrete parameters; its config is written as config.json, with the dtype that they have.
      directory: must not exist.
      tokenizer_files: a directory whose tokenizer, generation settings and other companions are copied, see
        `dsv32_jax.convert.companions.COPIED`.
      generation_config: written as generation_config.json instead of the one of `tokenizer_files`.
      shard_bytes: the most that a file holds; a larger tensor has a file of its own.

    Raises:
      UserError: `directory` exists, cannot be written or is being written by somebody else, a weight is NaN or
        infinite or has another shape than the config says, or `tokenizer_files` has no tokenizer any more.
    """
    if tokenizer_files is not None and not (Path(tokenizer_files) / "tokenizer.json").is_file():
        raise UserError(f"tokenizer_files {tokenizer_files}: has no tokenizer.json")
    leaves = named_parameters(model)
    config = with_dtype(model.config, leaves)
    shapes = {path: tuple(leaf.shape) for path, leaf in stored_parameters(config).items()}
    for path in shapes | leaves:
        shape = tuple(leaves[path].shape) if path in leaves else "not there"
        if shape != shapes.get(path):
            raise UserError(f"{path}: is {shape}; by the config it must be {shapes.get(path, 'absent')}")
    with new_directory(directory) as locked_target, unfinished(locked_target, None) as work:
        writer = HFWriter(work, config, plan_shards(config, leaves, shard_bytes), None)
        for group, members in groups_of(list(leaves)).items():
            for path in members:
                check_finite(path, leaves[path], config)
            writer.write_group(group, ((path, leaves[path]) for path in members))
        if tokenizer_files is None:
            write_config(work.directory, config)
        else:
            copy_files(Path(tokenizer_files), work.directory, config)
        if generation_config is not None:
            write_json(work.directory / "generation_config.json", generation_config)


def to_bfloat16(config: ModelConfig) -> Change:
    """The change that makes all parameters but `KEPT_FLOAT32` bfloat16."""

    def leaf(path: str, value: Any) -> Any:
        if path.endswith(KEPT_FLOAT32):
            return value
        if not isinstance(value, QTensor):
            return np.asarray(value).astype(ml_dtypes.bfloat16)
        out = np.empty(value.shape, ml_dtypes.bfloat16)
        for at in np.ndindex(value.shape[:-2]):
            out[at] = matrix(value, at).dequantize(jnp.bfloat16)
        return out

    def stored(path: str, value: Any) -> Any:
        return value if path.endswith(KEPT_FLOAT32) else jax.ShapeDtypeStruct(value.shape, jnp.bfloat16)

    plain = config.replace(quantization_config=None, unknown=without_provenance(config))
    return Change(plain, leaf, stored, {"dtype": "bf16"})


def without_provenance(config: ModelConfig) -> tuple[tuple[str, str], ...]:
    """The config's unknown fields but `PROVENANCE`, which tells how its weights were quantised."""
    return tuple((name, text) for name, text in config.unknown if name != PROVENANCE)


def matrix(leaf: Any, at: tuple[int, ...]) -> Any:
    """One matrix of a stacked weight, quantised or not.

    One expert at a time: in float32 all of them take four times the room.
    """
    return jax.tree.map(lambda array: jnp.asarray(array[at]), leaf)


def nbytes(leaf: Any) -> int:
    """Bytes of a parameter or of a whole model, concrete or abstract."""
    return sum(int(np.prod(part.shape)) * np.dtype(part.dtype).itemsize for part in jax.tree.leaves(leaf))


def file_states(source: Path) -> dict[str, list[int]]:
    """Size and times of the files that a conversion reads, by name: they show whether a file has changed."""
    # Not all files below the source: the target may be among them, and it changes.
    names = (INDEX, DESCRIPTION, *(path.name for path in source.glob("*.safetensors")))
    files = {*companions(source), *(source / name for name in names), *(source / PARAMS).rglob("*")}
    states = {str(path.relative_to(source)): path.stat() for path in sorted(files) if path.is_file()}
    return {name: [state.st_size, state.st_mtime_ns, state.st_ctime_ns] for name, state in states.items()}
