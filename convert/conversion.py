"""Checkpoints from one layout to the other, streamed layer by layer, resumable."""

import dataclasses
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.huggingface import INDEX, SHARD_BYTES, SINGLE, HFReader, HFWriter, plan_shards
from dsv32_jax.convert.orbax import DESCRIPTION, PARAMS, OrbaxReader, OrbaxWriter, Placement, groups_of, shards_or_plan
from dsv32_jax.errors import UserError
from dsv32_jax.files import whole_file
from dsv32_jax.model import DeepseekV32, abstract_model
from dsv32_jax.params import named_parameters, replace_parameters
from dsv32_jax.quant import QTensor

COPIED = ("config.json", "generation_config.json", "tokenizer*", "special_tokens_map.json", "chat_template*", "*.md")
JOURNAL = ".progress.json"
KEPT_FLOAT32 = (".router_bias", ".indexer.k_norm_weight", ".indexer.k_norm_bias")
"""What stays as it is when all else becomes bfloat16: choices hang on these."""


def checkpoint_kind(directory: str | os.PathLike[str]) -> str:
    """ "hf" or "orbax".

    Raises:
      UserError: neither, or a conversion that was interrupted.
    """
    directory = Path(directory)
    refuse_unfinished(directory)
    if (directory / DESCRIPTION).exists():
        return "orbax"
    if (directory / INDEX).exists() or (directory / SINGLE).exists():
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
    """The model of a Hugging Face checkpoint directory; each parameter goes to its device as soon as it is read.

    Args:
      directory: has config.json and safetensors.
      config: that of the directory where None.
      placement: sharding by parameter path; everything on the first device where None.
      dequantize: "float32" or "bfloat16": what quantised weights become, each as soon as it is read.
      mtp: False leaves out the multi-token prediction layer, whether or not the files have one.

    Raises:
      UserError: what `HFReader` finds wrong.
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
            advance(nbytes(leaf))
            placed = jax.tree.map(jnp.asarray, leaf) if placement is None else jax.device_put(leaf, placement(path))
            parameters[path] = as_wanted(placed, dequantize)
    return assembled(config, parameters, dequantize)


def load_orbax(
    directory: str | os.PathLike[str],
    config: ModelConfig | None = None,
    placement: Placement | None = None,
    *,
    dequantize: str | None = None,
    mtp: bool = True,
) -> DeepseekV32:
    """The model of a converted checkpoint; arguments and errors as those of `load_hf`."""
    directory = Path(directory)
    refuse_unfinished(directory)
    config = config_to_load(directory, config, mtp)
    reader = OrbaxReader(directory, config, mtp=mtp)
    parameters: dict[str, Any] = {}
    for group in groups_of(list(reader.parameters)):
        leaves = reader.read_group(group, placement)
        parameters |= {path: as_wanted(leaf, dequantize) for path, leaf in leaves.items()}
    return assembled(config, parameters, dequantize)


def as_wanted(leaf: Any, dequantize: str | None) -> Any:
    """A parameter, as a plain array of a dtype where it is quantised and shall not be."""
    return leaf.dequantize(dequantize) if dequantize and isinstance(leaf, QTensor) else leaf


def assembled(config: ModelConfig, parameters: dict[str, Any], dequantize: str | None) -> DeepseekV32:
    """The model of a config and its parameters, of which none is quantised any more where that was asked for."""
    if dequantize:
        config = config.replace(quantization_config=None)
    return replace_parameters(abstract_model(config), parameters)


def config_to_load(directory: Path, config: ModelConfig | None, mtp: bool) -> ModelConfig:
    """The given config or the directory's, without the MTP layer where that is not wanted."""
    config = config or ModelConfig.from_hf(directory)
    return config if mtp else config.replace(num_nextn_predict_layers=0)


@dataclasses.dataclass(frozen=True)
class Change:
    """What becomes of a checkpoint on its way to another.

    Attributes:
      config: of the new one.
      leaf: a parameter, by path and as it is read -> as it is written.
      stored: the same of abstract parameters.
      identity: JSON-able; an interrupted run goes on only where it is the same.
    """

    config: ModelConfig
    leaf: Callable[[str, Any], Any]
    stored: Callable[[str, Any], Any]
    identity: dict[str, Any]


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], to: str = "orbax", dtype: str | None = None
) -> None:
    """Writes `source` (either layout) to `target` in the layout `to`.

    The work is done in `target` + ".partial", which is renamed at the end; run again after an interruption, it goes on
    where it stopped, unless the source has changed.

    Args:
      source: a checkpoint directory.
      target: must not exist.
      to: "orbax" or "hf".
      dtype: None keeps every value and type; "bf16" dequantises and makes all but the router's bias and the indexer's
        key norm bfloat16.

    Raises:
      UserError: bad arguments, a bad source, or a target that cannot be written.
    """
    if dtype not in (None, "bf16", "bfloat16"):
        raise UserError(f"--dtype {dtype}: must be bf16 (or left out, to keep every type)")
    rewrite(source, target, to, (lambda config: None) if dtype is None else to_bfloat16)


def rewrite(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    change_of: Callable[[ModelConfig], Change | None],
) -> None:
    """`convert` with any change, made from the source's config; None: every value and file stays."""
    source, target = Path(source), Path(target)
    if to not in ("orbax", "hf"):
        raise UserError(f"--to {to}: must be orbax or hf")
    if not source.is_dir():
        raise UserError(f"{source}: no such directory")
    kind = checkpoint_kind(source)
    config = ModelConfig.from_hf(source)
    change = change_of(config)
    reader: Any = HFReader(source, config) if kind == "hf" else OrbaxReader(source, config)
    paths = list(named_parameters(abstract_model(config)))
    leaves = {path: reader.describe(path) for path in paths}
    new_config, asked = config, None
    if change is not None:
        leaves = {path: change.stored(path, leaf) for path, leaf in leaves.items()}
        new_config, asked = change.config, change.identity
    with unfinished(target, identity(source, to, asked)) as (work, done, finish_group):
        shards = shards_or_plan(reader.shards, new_config, leaves)
        writer: Any = (OrbaxWriter if to == "orbax" else HFWriter)(
            *((work, leaves) if to == "orbax" else (work, new_config)),
            shards,
            reader.index_metadata if change is None else None,
        )
        with progress_bar(f"converting {source.name}", sum(map(nbytes, leaves.values()))) as advance:
            for group, members in groups_of(paths).items():
                size = sum(nbytes(leaves[path]) for path in members)
                if group not in done:
                    whole = {} if kind == "hf" else reader.read_group(group)
                    read = ((path, whole.pop(path) if path in whole else reader.read(path)) for path in members)
                    parameters = ((path, leaf if change is None else change.leaf(path, leaf)) for path, leaf in read)
                    if to == "orbax":
                        writer.write_group(group, dict(parameters))
                    else:
                        for path, leaf in parameters:
                            writer.write(path, leaf)
                    finish_group(group)
                advance(size)
        copy_files(source, work, None if change is None else new_config)


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
      model: with concrete parameters; its config is written as config.json.
      directory: must not exist.
      tokenizer_files: a directory whose tokenizer and generation files are copied.
      generation_config: written as generation_config.json instead of the one there.
      shard_bytes: the most that a file holds (of one tensor, more).

    Raises:
      UserError: `directory` exists or cannot be written, or `tokenizer_files` has no tokenizer any more.
    """
    if tokenizer_files is not None and not (Path(tokenizer_files) / "tokenizer.json").is_file():
        raise UserError(f"tokenizer_files {tokenizer_files}: has no tokenizer.json")
    leaves = named_parameters(model)
    with unfinished(Path(directory), None) as (work, _, _):
        writer = HFWriter(work, model.config, plan_shards(model.config, leaves, shard_bytes), None)
        for path, leaf in leaves.items():
            writer.write(path, leaf)
        if tokenizer_files is None:
            write_config(work, model.config)
        else:
            copy_files(Path(tokenizer_files), work, model.config)
        if generation_config is not None:
            write_json(work / "generation_config.json", generation_config)


def to_bfloat16(config: ModelConfig) -> Change:
    """Everything in bfloat16 but `KEPT_FLOAT32`."""

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

    return Change(config.replace(quantization_config=None), leaf, stored, {"dtype": "bf16"})


def matrix(leaf: Any, at: tuple[int, ...]) -> Any:
    """One matrix of a stacked weight, quantised or not.

    One expert at a time: in float32 all of them take four times the room.
    """
    return jax.tree.map(lambda array: jnp.asarray(array[at]), leaf)


def nbytes(leaf: Any) -> int:
    """Bytes of a parameter or of a whole model, concrete or abstract."""
    return sum(int(np.prod(part.shape)) * np.dtype(part.dtype).itemsize for part in jax.tree.leaves(leaf))


def identity(source: Path, to: str, change: dict[str, Any] | None) -> dict[str, Any]:
    """What must be the same for an interrupted conversion to go on: the source's files, and what is asked for."""
    # Not all that is below the source: the target may be there, and it changes.
    files = sorted(path for path in (*source.glob("*"), *(source / PARAMS).rglob("*")) if path.is_file())
    state = {str(path.relative_to(source)): [path.stat().st_size, path.stat().st_mtime_ns] for path in files}
    return {"source": str(source.resolve()), "files": state, "to": to, "change": change}


def refuse_unfinished(directory: Path) -> None:
    """Raises UserError for a directory that `unfinished` is or was working in: its files have room for tensors that
    were never written, and would load as zeros."""
    if (directory / JOURNAL).exists():
        raise UserError(f"{directory}: an unfinished conversion; run the same conversion again to finish it")


@contextmanager
def unfinished(target: Path, source: dict[str, Any] | None) -> Iterator[tuple[Path, set[str], Any]]:
    """A directory to work in, which becomes `target` only if the work ends well.

    Yields the directory, the groups that an interrupted run of the same work had finished, and a function that notes
    one more. Without a `source` nothing is taken up again.
    """
    if target.exists():
        raise UserError(f"{target}: exists; give a path that does not")
    work = target.with_name(target.name + ".partial")
    try:
        journal = json.loads((work / JOURNAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        journal = {}
    try:
        if source is None or journal.get("identity") != json.loads(json.dumps(source)):
            shutil.rmtree(work, ignore_errors=True)
            journal = {"identity": source, "done": []}
        work.mkdir(parents=True, exist_ok=True)

        def write_journal() -> None:
            with whole_file(work / JOURNAL) as part:
                part.write_text(json.dumps(journal), encoding="utf-8")

        def finish_group(group: str) -> None:
            journal["done"].append(group)
            write_journal()

        write_journal()
        yield work, set(journal["done"]), finish_group
        (work / JOURNAL).unlink()
        work.rename(target)
    except OSError as error:
        raise UserError(f"{target}: cannot be written ({error.strerror or error})") from error


def copy_files(source: Path, work: Path, config: ModelConfig | None) -> None:
    """Config, tokenizer, generation and index files, byte for byte; a `config` replaces theirs, without an index."""
    for pattern in (*COPIED, INDEX) if config is None else COPIED:
        for path in source.glob(pattern):
            if path.is_file() and path.name != DESCRIPTION:
                shutil.copyfile(path, work / path.name)
    if config is not None:
        write_config(work, config)


def write_config(directory: Path, config: ModelConfig) -> None:
    """config.json."""
    write_json(directory / "config.json", config.to_hf())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Any]:
    """A bar with bytes, rate and time left on stderr, silent where that is no terminal; yields `advance(bytes)`."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task(title, total=total)
        yield lambda size: progress.advance(task, size)
