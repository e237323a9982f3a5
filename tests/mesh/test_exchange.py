"""Both forms of the exchange against plain sums, for any routing."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import PartitionSpec

from dsv32_jax.model import exchange as module
from dsv32_jax.model.exchange import Exchange, form_of
from dsv32_jax.model.mesh import MeshShape

DEVICES, TOKENS, COUNT, CHOICES = 4, 5, 2, 3
EXPERTS = DEVICES * COUNT
FACTORS = np.arange(1, EXPERTS + 1, dtype=np.float32)


def run(mesh: MeshShape, experts: np.ndarray, weights: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """[DEVICES * TOKENS, 2 * CHOICES]: each expert multiplies a token by its factor; a token says where it goes."""
    tokens = np.concatenate([experts, weights], axis=1).astype(np.float32)
    axes = PartitionSpec(mesh.axes)

    def one_device(x, positions, factors):
        def choose(x, positions):
            del positions
            return x[:, :CHOICES].astype(jnp.int32), x[:, CHOICES:]

        def sums(x, experts, weights, present):
            used = present[:, None] & (experts < COUNT)
            return jnp.where(used, weights * factors[jnp.minimum(experts, COUNT - 1)], 0).sum(1)[:, None] * x

        return Exchange(mesh, positions)(x, COUNT, choose, sums)

    over_mesh = jax.shard_map(one_device, mesh=mesh.on_devices(), in_specs=(axes,) * 3, out_specs=axes)
    return np.asarray(jax.jit(over_mesh)(tokens, positions, FACTORS))


def routings() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    mixed = np.stack([rng.choice(EXPERTS, CHOICES, replace=False) for _ in range(DEVICES * TOKENS)])
    home = np.repeat(np.arange(DEVICES), TOKENS)[:, None] * COUNT
    return {
        "mixed": mixed,
        "to two devices": np.tile([5, 4, 0], (len(mixed), 1)),
        "at home": home + np.array([0, 1, 0]),
    }


def emulated_ragged(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """`lax.ragged_all_to_all` by an all-gather, as its documentation says."""
    here = lax.axis_index(axis_name)
    everything = [lax.all_gather(a, axis_name) for a in (operand, input_offsets, send_sizes, output_offsets)]
    numbers = jnp.arange(operand.shape[0])
    for peer, (rows, starts, sizes, targets) in enumerate(zip(*everything, strict=True)):
        used = numbers < jnp.minimum(sizes[here], recv_sizes[peer])
        moved = rows[jnp.minimum(starts[here] + numbers, len(rows) - 1)]
        output = output.at[jnp.where(used, targets[here] + numbers, len(output))].set(moved, mode="drop")
    return output


@pytest.mark.parametrize("form", ["gather", "dispatch", "dispatch of used rows"])
@pytest.mark.parametrize("routing", routings())
def test_sums_are_those_of_all_experts(routing, form, monkeypatch):
    if form == "dispatch of used rows":
        monkeypatch.setattr(module.lax, "ragged_all_to_all", emulated_ragged)
        monkeypatch.setattr(module.lax, "platform_dependent", lambda *arrays, cuda, default: cuda(*arrays))
    experts = routings()[routing]
    rng = np.random.default_rng(1)
    weights = rng.uniform(0.1, 1, experts.shape).astype(np.float32)
    positions = np.where(rng.random(len(experts)) < 0.3, -1, 7).astype(np.int32)
    sums = run(MeshShape(DEVICES, exchange=form.partition(" ")[0]), experts, weights, positions)
    tokens = np.concatenate([experts, weights], axis=1)
    expected = (weights * FACTORS[experts]).sum(1, keepdims=True) * tokens
    np.testing.assert_allclose(sums, np.where(positions[:, None] >= 0, expected, 0), rtol=1e-5)


@pytest.mark.parametrize(
    ("mesh", "tokens", "form"),
    [
        (MeshShape(8), 128, "gather"),
        (MeshShape(8), 4096, "dispatch"),
        (MeshShape(2), 4096, "gather"),
        (MeshShape(8, hosts=2), 4096, "gather"),
        (MeshShape(8, exchange="gather"), 4096, "gather"),
        (MeshShape(2, exchange="dispatch"), 1, "dispatch"),
    ],
)
def test_the_form_is_chosen_by_size_or_by_name(mesh, tokens, form):
    assert form_of(mesh, tokens) == form
