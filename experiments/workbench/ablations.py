"""The changes that `dsv32 ablate` prices: what is worked up from a baseline, and what stands beside it."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.workbench.settings import MIXED, Setting
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.variants import VARIANTS, pinned
from pallas_kernels.matmul import FP8_BLOCK, INT4, INT8

__all__ = ["GROUPS", "MODES", "NOT_OFFERED", "ON_CPU", "ON_GPU", "PREFIXES", "Axis", "Row", "axes_of", "plan", "yours"]

MODES = ("cumulative", "one-at-a-time", "leave-one-out")
SHARES_OF_K = (1 / 8, 1 / 4, 1 / 2, 2)
"""Of the config's index_topk: 256 to 4096 for 2048."""
WITH_KERNELS = ("index_select", "sparse_mla", "cache_write", "matmul", "route", "make_plan", "experts", "combine")
"""Ops that run on the reference alone, one at a time, in the group "kernels"."""
YOURS = "yours"
"""The group of what the command line names."""


@dataclasses.dataclass(frozen=True)
class Level:
    """One way to do a thing.

    Attributes:
      name: for tables.
      setting: what it changes of the model as it was loaded.
      group: the group that offers it, where that is not its axis's own.
    """

    name: str
    setting: Setting
    group: str | None = None


@dataclasses.dataclass(frozen=True)
class Axis:
    """A thing that can be done in several ways.

    Attributes:
      group: the name that the command line takes.
      levels: from the baseline's way to the model's own, which is last.
      others: ways that are no step towards the model's own, each compared with that.
      of_sparse: they mean nothing to a model that attends to all keys.
      needs_kernels: without kernels all of them are the same.
    """

    group: str
    levels: Sequence[Level]
    others: Sequence[Level] = ()
    of_sparse: bool = False
    needs_kernels: bool = False


def changed(**fields: Any) -> Setting:
    """A setting of these `Options`."""
    return Setting(options=fields)


def replaced(part: str, variant: str) -> Setting:
    """A setting of a named variant."""
    return Setting(parts={part: VARIANTS[part][variant]})


def every_axis(m: LanguageModel) -> list[Axis]:
    """All axes, in the order in which a cumulative table works them up."""
    k = m.options.index_topk or m.config.index_topk
    own = Setting()
    dense = {"attention": "dense", "index_topk_freq": 1}

    def dense_by(variant: str) -> Setting:
        return Setting(options=dense, parts={"dense_mla": VARIANTS["dense_mla"][variant]})

    stored = sorted({leaf.scheme.name for leaf in m.weights.values() if hasattr(leaf, "scheme")})
    as_stored = f"{'+'.join(stored) or 'plain'} as stored"
    schemes = {FP8_BLOCK.name: "FP8", INT8.name: "INT8", INT4.name: "INT4", MIXED: "experts INT4, others INT8"}
    axes = [
        Axis(
            "activations",
            [Level("not quantised", changed(act_quant=False)), Level("FP8", own)]
            if m.options.act_quant
            else [Level("-", own)],
        ),
        Axis(
            "attention",
            [
                Level("masked dense", dense_by("materialised")),
                Level("dense flash", dense_by("flash")),
                Level("sparse", own),
            ],
        ),
        Axis(
            "experts",
            [
                Level("a loop", replaced("experts", "tile_by_tile")),
                Level("ragged_dot", replaced("experts", "ragged")),
                Level("grouped, a plan each", replaced("experts", "apart_replanned"), "plan"),
                Level("grouped, one plan", replaced("experts", "apart"), "plan"),
                Level("ours", own),
            ],
        ),
        Axis(
            "quantisation",
            [Level("bf16", Setting(scheme="bf16")), Level(as_stored, own)][not stored :],
            [Level(name, Setting(scheme=scheme)) for scheme, name in schemes.items() if [scheme] != stored],
        ),
        Axis(
            "layouts",
            [Level("as stored", changed(prepare=False)), Level("as kernels take them", own)],
            needs_kernels=True,
        ),
        Axis("cache", [Level("contiguous", Setting(contiguous=True)), Level("blocks", own)]),
        Axis(
            "selection",
            [Level("indexer", own)],
            [Level(name, replaced("index_select", name)) for name in VARIANTS["index_select"]],
            of_sparse=True,
        ),
        Axis(
            "topk",
            [Level(str(k), own)],
            [
                Level(str(size), changed(index_topk=size))
                for size in dict.fromkeys(max(1, int(k * share)) for share in SHARES_OF_K)
                if size <= m.config.max_position_embeddings
            ],
            of_sparse=True,
        ),
        Axis(
            "sharing",
            [Level("every layer chooses", own)],
            [
                Level(f"every {name} layer chooses", changed(index_topk_freq=every))
                for every, name in ((2, "2nd"), (4, "4th"))
                if every <= m.config.num_hidden_layers
            ],
            of_sparse=True,
        ),
        Axis(
            "kernels",
            [Level("auto", own)],
            [
                Level(f"{part} without its kernel", Setting(parts={part: pinned(part, "reference")}))
                for part in WITH_KERNELS
            ],
            needs_kernels=True,
        ),
    ]
    return axes


GROUPS = {
    "attention": "masked dense -> dense flash -> sparse",
    "experts": "a loop -> ragged_dot -> ours",
    "plan": "of the experts: a routing plan for each product -> one plan",
    "quantisation": "bf16 -> as stored; INT8, INT4, mixed beside it",
    "activations": "not quantised -> FP8; the first step, since the indexer's kernels take FP8 alone",
    "layouts": "weights as stored -> as kernels take them (needs kernels)",
    "cache": "each sequence's blocks one after the other -> anywhere",
    "prefixes": "requests in the engine, which share nothing -> their prefixes (a table of its own)",
    "selection": "dense, recent, random, oracle and others in the indexer's place",
    "topk": "an eighth to twice the index_topk: 256 to 4096 for 2048",
    "sharing": "every 2nd or 4th layer chooses for those behind it",
    "kernels": "each op on its reference, one at a time (needs kernels)",
}
"""What the command line can name, and what each holds."""
PREFIXES = "prefixes"
"""The group that is no step of the model; see `dsv32_jax.experiments.workbench.prefixes`."""
NOT_OFFERED = {
    "pipelining": "no switch: a kernel without its copies ahead would be another kernel",
}
"""What one might look for here."""
ON_CPU = ("attention", "experts", "quantisation")
ON_GPU = ("attention", "experts", "plan", "quantisation", "layouts", "cache")
"""Groups where the command line names none, without what stands beside: on a CPU five minutes hold them."""


def axes_of(m: LanguageModel, groups: Sequence[str], others: bool = True) -> tuple[list[Axis], dict[str, str]]:
    """The axes that some groups offer, and why each of the others that were named offers nothing here.

    Args:
      m: the model.
      groups: names of `GROUPS`.
      others: with what stands beside the model's own way.

    Raises:
      UserError: an unknown group.
    """
    check_groups(groups)
    axes, left_out = [], {}
    for axis in every_axis(m):
        last = axis.levels[-1]
        levels = [level for level in axis.levels[:-1] if (level.group or axis.group) in groups]
        beside = list(axis.others) if others and axis.group in groups else []
        if not levels and not beside:
            continue
        if axis.needs_kernels and not m.options.runs_kernels:
            left_out[axis.group] = "needs kernels, which run on a Hopper GPU"
            continue
        axes.append(dataclasses.replace(axis, levels=[*levels, last], others=beside))
    return axes, left_out


def check_groups(groups: Sequence[str]) -> None:
    """Raises UserError for a group that does not exist."""
    for name in groups:
        if name in NOT_OFFERED:
            raise UserError(f"group {name}: not offered ({NOT_OFFERED[name]})")
        if name not in GROUPS:
            raise UserError(f"group {name!r} is unknown; it is one of {', '.join(GROUPS)}")


def yours(sets: Sequence[str], parts: Sequence[str], backends: Sequence[str]) -> Axis:
    """The axis of what the command line names: each flag is a way of its own, beside the model's."""
    named = [("sets", text) for text in sets] + [("parts", text) for text in parts]
    named += [("backends", text) for text in backends]
    levels = []
    for kind, text in named:
        flags: dict[str, Any] = {kind: [text]}
        levels.append(Level(text, Setting.of(text, **flags)))
    return Axis(YOURS, [Level("as loaded", Setting())], levels, of_sparse=True)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
      name: what it changes.
      setting: what runs.
      against: the number of the row that it is compared with, from which it differs in one thing; None for one that
        others are compared with.
      group: of the change.
      step: it is a step from the baseline to the model's own way, and the next row begins there.
    """

    name: str
    setting: Setting
    against: int | None
    group: str | None = None
    step: bool = False


def plan(axes: Sequence[Axis], mode: str) -> list[Row]:
    """The rows of a table.

    Args:
      axes: of `axes_of` and `yours`.
      mode: "cumulative" works the axes up from the baseline, one level at a time, and then compares what stands beside
        with the model's own way; "one-at-a-time" changes one thing of the baseline; "leave-one-out" puts one thing of
        the model as it is back.

    Raises:
      UserError: an unknown mode.
    """
    if mode not in MODES:
        raise UserError(f"mode {mode!r} is unknown; it is one of {', '.join(MODES)}")
    return list({"cumulative": cumulative, "one-at-a-time": one_at_a_time, "leave-one-out": leave_one_out}[mode](axes))


def at(axes: Sequence[Axis], levels: dict[str, Level]) -> Setting:
    """The setting with these levels of some axes, and the model's own of the others."""
    setting = Setting(name="")
    for axis in axes:
        if axis.group in levels:
            setting = setting.merged(levels[axis.group].setting)
    return setting


def title(axis: Axis, before: Level, after: Level) -> str:
    """A row's name."""
    return f"{axis.group}: {after.name}" if axis.group == YOURS else f"{axis.group}: {before.name} -> {after.name}"


def baseline_of(axes: Sequence[Axis]) -> dict[str, Level]:
    """The first level of every axis."""
    return {axis.group: axis.levels[0] for axis in axes}


def cumulative(axes: Sequence[Axis]) -> Iterator[Row]:
    levels = baseline_of(axes)
    number = 0
    yield Row(first_name(axes), at(axes, levels), None)
    for axis in axes:
        for level in axis.levels[1:]:
            name = title(axis, levels[axis.group], level)
            levels = {**levels, axis.group: level}
            yield Row(name, at(axes, levels), number, axis.group, step=True)
            number += 1
    for axis in axes:
        for level in axis.others:
            yield Row(title(axis, axis.levels[-1], level), at(axes, {**levels, axis.group: level}), number, axis.group)


def first_name(axes: Sequence[Axis]) -> str:
    """Of the first row: the baseline, where anything can be worked up from it."""
    return "baseline" if any(len(axis.levels) > 1 for axis in axes) else "as loaded"


def one_at_a_time(axes: Sequence[Axis]) -> Iterator[Row]:
    levels = baseline_of(axes)
    own = {axis.group: axis.levels[-1] for axis in axes}
    yield Row(first_name(axes), at(axes, levels), None)
    number = 0
    elsewhere = [axis for axis in axes if axis.of_sparse and at(axes, levels).options.get("attention") == "dense"]
    for axis in axes:
        if axis not in elsewhere:
            for level in (*axis.levels[1:], *axis.others):
                number += 1
                yield Row(title(axis, axis.levels[0], level), at(axes, {**levels, axis.group: level}), 0, axis.group)
    if elsewhere:  # the baseline attends to all keys, and these would change nothing there
        number += 1
        yield Row("as loaded", at(axes, own), None)
    for axis in elsewhere:
        for level in axis.others:
            yield Row(title(axis, axis.levels[-1], level), at(axes, {**own, axis.group: level}), number, axis.group)


def leave_one_out(axes: Sequence[Axis]) -> Iterator[Row]:
    levels = {axis.group: axis.levels[-1] for axis in axes}
    yield Row("as loaded", at(axes, levels), None)
    for axis in axes:
        for level in (*reversed(axis.levels[:-1]), *axis.others):
            yield Row(title(axis, axis.levels[-1], level), at(axes, {**levels, axis.group: level}), 0, axis.group)
