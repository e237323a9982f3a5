"""The rows of an ablation: each changes one thing of the row that it is compared with, in every mode."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.workbench import ablations
from dsv32_jax.experiments.workbench.settings import Setting, description, differences, random_in_scheme
from dsv32_jax.model.context import Options
from dsv32_jax.model.variants import VARIANTS
from pallas_kernels.moe_dispatch import make_plan

CHANGES = {
    "attention": "attention",
    "experts": "parts.experts",
    "quantisation": "schemes",
    "activations": "options.act_quant",
    "layouts": "options.prepare",
    "cache": "blocks",
    "selection": "parts.index_select",
    "topk": "options.index_topk",
    "sharing": "options.index_topk_freq",
}
"""What the rows of a group change, in a description."""


@pytest.fixture(scope="module")
def in_scheme(fp8):
    """`in_scheme(name)`: such a model with its weights in a scheme."""
    return functools.cache(lambda scheme: random_in_scheme(fp8, scheme))


@pytest.fixture
def axes(fp8, monkeypatch):
    monkeypatch.setattr(Options, "runs_kernels", property(lambda _: True))
    found, left_out = ablations.axes_of(fp8, list(ablations.GROUPS))
    assert left_out == {}
    return [*found, ablations.yours(["cache_dtype=bfloat16"], ["index_rope=interleaved"], ["experts=reference"])]


@pytest.mark.parametrize("mode", ablations.MODES)
def test_every_row_changes_one_thing(fp8, in_scheme, axes, mode):
    rows = ablations.plan(axes, mode)
    settings = [row.setting for row in rows]
    runs = [description(each.applied_to_weights(in_scheme(each.scheme)), each.contiguous) for each in settings]
    seen = set()
    for row, runs_of_row in zip(rows, runs, strict=True):
        if row.against is None:
            assert row.name in ("baseline", "as loaded")
            continue
        changed = differences(runs[row.against], runs_of_row)
        assert len(changed) == 1, (row.name, changed)
        if row.group in CHANGES:
            assert changed == [CHANGES[row.group]], row.name
        seen.add(row.group)
    assert seen == {*CHANGES, "kernels", "yours"}
    own = description(fp8)
    last = [runs[number] for number, row in enumerate(rows) if row.step or row.name == "as loaded"][-1]
    assert differences(last, own) == []  # where it ends, or what it takes things from
    if mode != "leave-one-out":
        assert len(differences(runs[0], own)) == 6  # whatever has a way below the model's own


def test_a_cumulative_table_works_up_and_has_the_rest_beside_the_end(axes):
    rows = ablations.plan(axes, "cumulative")
    steps = [row for row in rows if row.step]
    assert [row.against for row in steps] == list(range(len(steps)))
    assert {row.against for row in rows[len(steps) + 1 :]} == {len(steps)}
    assert [row.name for row in steps][:2] == [
        "activations: not quantised -> FP8",
        "attention: masked dense -> dense flash",
    ]


def test_without_kernels_their_groups_are_left_out(fp8):
    axes, left_out = ablations.axes_of(fp8, ["layouts", "kernels", "plan"])
    assert set(left_out) == {"layouts", "kernels"} and "Hopper" in left_out["layouts"]
    (experts,) = axes
    assert [level.name for level in experts.levels] == ["grouped, a plan each", "grouped, one plan", "ours"]
    plain, _ = ablations.axes_of(fp8, ["quantisation", "topk"], others=False)
    assert [(axis.group, len(axis.others)) for axis in plain] == [("quantisation", 0)]


def test_what_is_not_there_is_refused():
    with pytest.raises(UserError, match="group 'speed' is unknown; it is one of attention, experts"):
        ablations.check_groups(["speed"])
    with pytest.raises(UserError, match="group pipelining: not offered"):
        ablations.check_groups(["pipelining"])
    with pytest.raises(UserError, match="mode 'all' is unknown"):
        ablations.plan([], "all")


def test_a_plan_made_for_each_product_is_work_and_the_same_result():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((6, 16)), jnp.float32)
    gate, up, down = (jnp.asarray(rng.standard_normal((4, 16, 16)), jnp.float32) for _ in range(3))
    experts, valid = jnp.asarray(rng.integers(0, 4, (6, 2)), jnp.int32), jnp.arange(6) != 3
    plan = make_plan(experts, valid, 4)

    def by(name: str):
        return lambda x, plan: VARIANTS["experts"][name](x, gate, up, down, plan, quantize_input=False)

    def tile_of_plan(experts, valid):
        """What the reference of a product takes of a plan."""
        return make_plan(experts, valid, 4).tile_expert

    compiled = [
        jax.jit(run).lower(*arguments).compile()
        for run, *arguments in (
            (tile_of_plan, experts, valid),
            (by("apart"), x, plan),
            (by("apart_replanned"), x, plan),
        )
    ]
    one, none, three = (program.as_text().count(" scatter(") for program in compiled)
    assert one > 0 and (none, three) == (0, 3 * one)  # work that the compiler merged would be there once
    _, once, each = compiled
    np.testing.assert_array_equal(once(x, plan), each(x, plan))


def test_settings_of_rows_are_those_of_flags():
    assert Setting.of("x", parts=["experts=apart"]).parts == {"experts": VARIANTS["experts"]["apart"]}
