"""Which part of every array a device of a mesh has, and one step of the model over all of them.

A device has its own sequences, their tokens, and the blocks of their cache, all numbered from 0, and an equal part of
every layer's routed experts; everything else it has whole. Arrays of all devices lie one behind the other on one axis:
`Batch` fields [devices * T], [devices * S, N] and [devices * R], cache arrays [layers, devices * blocks, ...], logits
[devices * R, V]. The whole step is one `jax.shard_map`, inside which the model's code sees one device's part; only its
layers with experts talk to other devices (`dsv32_jax.model.exchange`).
"""

import math
import re
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from dsv32_jax.errors import UserError
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.context import Batch, Options
from dsv32_jax.model.mesh import MeshShape
from dsv32_jax.model.params import path_name

__all__ = ["bytes_per_device", "over_mesh", "place", "specs_of", "with_shardings"]

EXPERTS = re.compile(r"\bffn\.experts\.(gate|up|down)\b")
"""In the paths of stacked experts, values and scales alike: their first axis counts experts."""


def specs_of(tree: Any, mesh: MeshShape) -> Any:
    """The `PartitionSpec` of every array of a model, a `Batch` or a `KVCache`, in a tree of the same structure.

    Args:
      tree: arrays or their abstract descriptions.
      mesh: the devices.

    Raises:
      UserError: an axis does not divide into equal parts.
    """
    if isinstance(tree, KVCache):
        axis = 1
    elif isinstance(tree, Batch):
        axis = 0
    else:
        return jax.tree_util.tree_map_with_path(lambda path, leaf: _of_parameter(path_name(path), leaf, mesh), tree)
    name = type(tree).__name__
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: _in_parts(f"{name}.{path_name(path)}", leaf, axis, mesh), tree
    )


def _of_parameter(path: str, leaf: Any, mesh: MeshShape) -> PartitionSpec:
    return _in_parts(path, leaf, 0, mesh) if EXPERTS.search(path) else PartitionSpec()


def _in_parts(path: str, leaf: Any, axis: int, mesh: MeshShape) -> PartitionSpec:
    """An axis in equal parts."""
    if leaf.shape[axis] % mesh.size:
        raise UserError(
            f"mesh {mesh}: {path} has {leaf.shape[axis]} in axis {axis}; must be a multiple of {mesh.size} devices"
        )
    return PartitionSpec(*[None] * axis, mesh.axes)


def place(tree: Any, mesh: MeshShape) -> Any:
    """The arrays of a model, a `Batch` or a `KVCache` with each device's part on it."""
    grid, specs = mesh.on_devices(), specs_of(tree, mesh)
    return jax.tree.map(lambda leaf, spec: jax.device_put(leaf, NamedSharding(grid, spec)), tree, specs)


def with_shardings(tree: Any, mesh: MeshShape) -> Any:
    """The abstract arrays of a model, a `Batch` or a `KVCache`, each with its `NamedSharding`."""
    grid, specs = mesh.on_devices(), specs_of(tree, mesh)
    return jax.tree.map(
        lambda leaf, spec: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=NamedSharding(grid, spec)), tree, specs
    )


def bytes_per_device(tree: Any, mesh: MeshShape) -> int:
    """Bytes that one device has of the arrays, abstract or not."""
    specs = jax.tree.leaves(specs_of(tree, mesh), is_leaf=lambda spec: isinstance(spec, PartitionSpec))
    leaves = jax.tree.leaves(tree)
    parts = (1 if spec == PartitionSpec() else mesh.size for spec in specs)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize // part for leaf, part in zip(leaves, parts, strict=True))


def over_mesh(
    one_device: Callable[[Any, Batch, KVCache], tuple[jax.Array, KVCache]],
    options: Options,
    model: Any,
    batch: Batch,
    cache: KVCache,
) -> tuple[jax.Array, KVCache]:
    """A step by the devices of `options.mesh`; without a mesh `one_device(model, batch, cache)` and nothing else.

    Args:
      one_device: gives rows [R, ...] and the cache of one device.
      options: of the run.
      model, batch, cache: of all devices.

    Returns:
      Rows [devices * R, ...] and the cache, of all devices.

    Raises:
      UserError: an axis does not divide into equal parts, or there are fewer devices.
    """
    mesh = options.mesh
    if mesh is None:
        return one_device(model, batch, cache)
    of_cache = specs_of(cache, mesh)
    step = jax.shard_map(
        one_device,
        mesh=mesh.on_devices(),
        in_specs=(specs_of(model, mesh), specs_of(batch, mesh), of_cache),
        out_specs=(PartitionSpec(mesh.axes), of_cache),
        # Proves that what is replicated stays so. The kernel that writes into the cache in place does not take it.
        check_vma=not options.runs_kernels,
    )
    return step(model, batch, cache)
