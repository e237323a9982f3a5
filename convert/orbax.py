"""Reading and writing this project's own checkpoints: Orbax, one item for each unit of streaming."""

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp

from dsv32_jax.common.reading import read_json
from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.huggingface import Shard, plan_shards
from dsv32_jax.convert.names import MTP_PATHS, group_of, undeclared_mtp, without_mtp
from dsv32_jax.convert.stored import may_be_plain, stored_parameters
from dsv32_jax.convert.unfinished import Unfinished
from dsv32_jax.errors import UserError
from pallas_kernels.matmul import SCHEMES, QTensor, scheme_name

DESCRIPTION = "dsv32_checkpoint.json"
PARAMS = "params"
FORMAT = 1

Placement = Callable[[str], jax.sharding.Sharding]
"""The sharding of a parameter by its path."""


def describe(leaf: Any) -> dict[str, Any]:
    """JSON for one parameter: dtype and shape, and those of its scales."""
    if isinstance(leaf, QTensor):
        return {"scheme": leaf.scheme.name, "values": describe(leaf.values), "scales": describe(leaf.scales)}
    return {"dtype": np.dtype(leaf.dtype).name, "shape": list(leaf.shape)}


def abstract(description: dict[str, Any], sharding: jax.sharding.Sharding | None = None) -> Any:
    """The inverse of `describe`, as `jax.ShapeDtypeStruct`s."""
    if "scheme" in description:
        if description["scheme"] not in SCHEMES:
            raise UserError(f"{DESCRIPTION}: scheme {description['scheme']!r} is unknown; convert again")
        scheme = SCHEMES[description["scheme"]]
        return QTensor(abstract(description["values"], sharding), abstract(description["scales"], sharding), scheme)
    return jax.ShapeDtypeStruct(tuple(description["shape"]), np.dtype(description["dtype"]), sharding=sharding)


def groups_of(paths: list[str]) -> dict[str, list[str]]:
    """Paths by the item that holds them, in order."""
    groups: dict[str, list[str]] = {}
    for path in paths:
        groups.setdefault(group_of(path), []).append(path)
    return groups


class OrbaxWriter:
    """A checkpoint in the making, one item after the other."""

    def __init__(
        self,
        work: Unfinished,
        leaves: dict[str, Any],
        shards: dict[str, Shard],
        index_metadata: dict[str, Any] | None,
    ):
        """Keeps the finished items of an earlier run, and removes all other files."""
        self.params = work.directory / PARAMS
        self.params.mkdir(exist_ok=True)
        work.keep({PARAMS})
        work.done = {group for group in work.done if (self.params / group).is_dir()}
        work.keep(work.done, PARAMS)
        self.checkpointer = ocp.Checkpointer(ocp.StandardCheckpointHandler())
        content = {
            "format": FORMAT,
            "parameters": {path: describe(leaf) for path, leaf in leaves.items()},
            "index_metadata": index_metadata,
            "shards": {
                file: {"metadata": shard.metadata, "tensors": [[name, *value] for name, value in shard.tensors.items()]}
                for file, shard in shards.items()
            },
        }
        (work.directory / DESCRIPTION).write_text(json.dumps(content), encoding="utf-8")

    def write_group(self, group: str, parameters: Iterable[tuple[str, Any]]) -> None:
        """Writes all parameters of one unit of streaming; raises OSError."""
        item = (self.params / group).absolute()
        leaves = {path: as_dict(leaf) for path, leaf in parameters}
        try:
            self.checkpointer.save(item, args=ocp.args.StandardSave(leaves), force=True)
        except Exception as error:  # Orbax has several for a disk that is full
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise OSError(None, reason, str(item)) from error


class OrbaxReader:
    """A converted checkpoint, compared with its config before any data is read."""

    def __init__(self, directory: Path, config: ModelConfig, *, mtp: bool = True):
        """Raises UserError for other files, another format, and parameters that do not fit the config.

        Without `mtp` the config has no MTP layer, and the reader passes over one that the files may have.
        """
        self.directory = directory
        content = read_json(directory / DESCRIPTION)
        if content.get("format") != FORMAT:
            raise UserError(
                f"{directory / DESCRIPTION}: format {content.get('format')!r} is not {FORMAT}; convert again"
            )
        if absent := [key for key in ("parameters", "index_metadata", "shards") if key not in content]:
            raise UserError(f"{directory / DESCRIPTION}: has no {' or '.join(absent)}; convert again")
        if not all(isinstance(content[key], dict) for key in ("parameters", "shards")):
            raise UserError(f"{directory / DESCRIPTION}: parameters and shards must be objects; convert again")
        self.parameters: dict[str, Any] = {
            path: leaf for path, leaf in content["parameters"].items() if mtp or not path.startswith(MTP_PATHS)
        }
        self.index_metadata = content["index_metadata"]
        self.shards = {
            file: Shard(shard["metadata"], {name: (dtype, tuple(shape)) for name, dtype, shape in shard["tensors"]})
            for file, shard in content["shards"].items()
        }
        expected = stored_parameters(config)
        problems = []
        if config.has_mtp != any(path.startswith(MTP_PATHS) for path in self.parameters):
            problems.append((without_mtp if config.has_mtp else undeclared_mtp)(MTP_PATHS))
            expected = {path: leaf for path, leaf in expected.items() if not path.startswith(MTP_PATHS)}
        problems += [f"missing {path}" for path in expected if path not in self.parameters]
        problems += [
            f"unexpected {path}" for path in self.parameters if path not in expected and not path.startswith(MTP_PATHS)
        ]
        plain = may_be_plain(config)
        for path in expected:
            if path not in self.parameters:
                continue
            stored, required = abstract(self.parameters[path]), expected[path]
            if stored.shape != required.shape:
                problems.append(f"{path} has shape {list(stored.shape)}, expected {list(required.shape)}")
            if scheme_name(stored) != scheme_name(required) and not (plain and scheme_name(stored) is None):
                stored_scheme, required_scheme = (scheme_name(leaf) or "not quantised" for leaf in (stored, required))
                problems.append(
                    f"{path} is {stored_scheme}, and by config.json's quantization_config {required_scheme}"
                )
        for group in groups_of(list(self.parameters)):
            if not (directory / PARAMS / group).is_dir():
                problems.append(f"missing {PARAMS}/{group}")
        if problems:
            raise UserError(f"{directory} does not fit its config.json: {'; '.join(problems[:20])}")
        self.checkpointer = ocp.Checkpointer(ocp.StandardCheckpointHandler())

    def describe(self, path: str) -> Any:
        """One parameter as it is stored, abstract."""
        return abstract(self.parameters[path])

    def read_group(self, group: str, placement: Placement | None = None) -> dict[str, Any]:
        """Reads the parameters of one unit, to the first device or with the shardings of `placement`."""
        place = placement or (lambda path: jax.sharding.SingleDeviceSharding(jax.devices()[0]))
        leaves = {
            path: abstract(self.parameters[path], place(path)) for path in groups_of(list(self.parameters))[group]
        }
        try:
            arrays = self.checkpointer.restore(
                (self.directory / PARAMS / group).absolute(),
                args=ocp.args.StandardRestore({path: as_dict(leaf) for path, leaf in leaves.items()}),
            )
        except Exception as error:  # Orbax raises a bare Exception for data that it cannot decode
            reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
            raise UserError(f"{self.directory / PARAMS / group}: cannot be read ({reason}); convert again") from error
        return {
            path: QTensor(**arrays[path], scheme=leaf.scheme) if isinstance(leaf, QTensor) else arrays[path]
            for path, leaf in leaves.items()
        }


def as_dict(leaf: Any) -> Any:
    """The arrays of a parameter as Orbax stores them: one, or a QTensor's two."""
    return {"values": leaf.values, "scales": leaf.scales} if isinstance(leaf, QTensor) else leaf


def shards_or_plan(shards: dict[str, Shard], config: ModelConfig, leaves: dict[str, Any]) -> dict[str, Shard]:
    """The files of the source if these leaves still fit them, else a new plan."""
    plan = plan_shards(config, leaves)
    planned_tensors = {name: value for shard in plan.values() for name, value in shard.tensors.items()}
    source_tensors = {name: value for shard in shards.values() for name, value in shard.tensors.items()}
    return shards if source_tensors == planned_tensors else plan
