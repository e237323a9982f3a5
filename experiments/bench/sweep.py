"""Other tile sizes than the tuned ones: `python -m experiments.bench.sweep SHAPE...`, on a GPU.

Shapes are named as those of `quant_matmul` are, and may be others: 32x2240x7168 are 32 rows times a weight [2240, 7168]
in FP8, int8-32x2240x7168 and int4-32x2240x7168 the same in other schemes. For each shape every candidate is compiled,
compared with the reference's result, and timed. Results, the fastest first, are in `--out`; what wins by more than the
spread belongs into `pallas_kernels/tuning/`.
"""

import argparse
import dataclasses
import functools
import itertools
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.bench import timer as timing
from dsv32_jax.experiments.bench.cases import made
from dsv32_jax.experiments.bench.matmuls import build, inputs
from dsv32_jax.experiments.results import environment, write_json
from dsv32_jax.generate.compiling import all_at_once
from pallas_kernels import tuning
from pallas_kernels.quant_matmul import few_rows, few_rows_int4, few_rows_int8, many_rows
from pallas_kernels.quantize import quantize_int8
from pallas_kernels.shapes import SHAPES, QuantMatmul

NAME = re.compile(r"(?:(int8|int4)-)?(\d+)x(\d+)x(\d+)")
BUSY = 0.84
"""Least number of items, of as many as there would be if every CTA had as many as the busiest."""
DIFFERENCE = 4e-3
"""Root mean square, relative, from the reference: sums in another order, rounded to bfloat16."""


def shape_of(name: str) -> QuantMatmul:
    """By its name: an optional scheme, tokens, the weight's N and K."""
    match = NAME.fullmatch(name)
    if match is None:
        raise argparse.ArgumentTypeError(f"{name} is not like 32x2240x7168, int8-32x2240x7168 or int4-32x2240x7168")
    tokens, columns, depth = map(int, match.groups()[1:])
    return QuantMatmul(name=name, scheme=match[1] or "fp8_block", tokens=tokens, columns=columns, depth=depth)


def fitting(make: Callable[[int, int], Any], items: int, most: int) -> Iterator[Any]:
    """`make(stages, ctas)` for one CTA on a multiprocessor and for several, each with as many stages as fit."""
    for together in range(1, most + 1):
        ctas = together * tuning.SMS
        if items < BUSY * -(-items // ctas) * ctas:
            continue
        for stages in range(12, 1, -1):
            try:
                config = make(stages, ctas)
            except ValueError:
                continue
            if config.shared_bytes + 1024 <= (tuning.SHARED_BYTES + 1024) // together:
                yield config
                break


def few_rows_candidates(tile: int, columns: int, depth: int, tiles: int = 1) -> list[Any]:
    """Strips of most heights, in all the ways to take them that keep the multiprocessors busy."""
    many = tile >= 64
    heights = range(32, 72, 8) if many else (16, 32, 40, 48, 56, 64)
    if tile == 128:  # also as two tiles, next to each other
        found = few_rows_candidates(64, columns, depth, 2)
    else:
        found = []
    ways = [(count, 1, *way) for count, *way in itertools.product((1, 2, 3), heights, (1, 2, 4), (1, 2))]
    if many:  # also with the tokens split in two, for one or two parts of a strip; in clusters only tall ones
        split = itertools.product((1, 2), heights, (1, 2), (1, 2, 4))
        ways += [
            (2 * count, 2, own, blocks, cluster) for count, own, blocks, cluster in split if cluster == 1 or own >= 48
        ]
    for warpgroups, token_parts, own, blocks, cluster in ways:
        if depth % (128 * blocks) or (blocks == 4 if many else warpgroups > 1 or cluster > 1 or blocks == 1):
            continue
        if tiles > 1 and (cluster > 1 or token_parts > 1):
            continue
        alone = token_parts > 1 and cluster > 1  # on a multiprocessor, so that there are not too many candidates
        how = {"warpgroups": warpgroups, "token_parts": token_parts, "blocks": blocks, "cluster": cluster}
        rows = own * (warpgroups // token_parts)

        def make(stages, ctas, how=how, rows=rows):
            return tuning.FewRows(tile=tile, rows=rows, stages=stages, ctas=ctas, **how)

        items = -(-columns // rows) * tiles
        found += [c for c in fitting(make, items, (1 if alone else 2) if many else 3) if c.stages * c.blocks >= 4]
    return found


def few_rows_int4_candidates(tile: int, columns: int, depth: int) -> list[Any]:
    """The same for four-bit weights."""
    found: list[Any] = []
    for rows, deep in itertools.product((16, 24, 32, 40, 48, 56, 64), (1, 2)):
        if depth % (512 * deep):
            continue

        def make(stages, ctas, rows=rows, deep=deep):
            return tuning.FewRowsInt4(tile=tile, rows=rows, depth=deep, stages=stages, ctas=ctas)

        found += fitting(make, -(-columns // rows), 2)
    return found


def many_rows_candidates(int8: bool) -> list[Any]:
    """Tiles of 128 rows, divided either way, in narrow and wide groups."""
    return [
        tuning.ManyRowsMatmul(by_rows=by_rows, group=group, cluster=cluster)
        for by_rows, group, cluster in itertools.product((False, True) if int8 else (False,), (8, 16, 32), (1, 2))
    ]


def programs(shape: QuantMatmul) -> tuple[tuple[Any, ...], Callable[..., jax.Array], Any, list[Any]]:
    """Inputs, `f(*inputs, config=)`, the tuned configuration, and the candidates."""
    x, weight = made(lambda key: inputs(shape, key, shape.tokens, (shape.columns, shape.depth)))
    few, columns = shape.tokens <= few_rows.TILES[-1], shape.columns
    if shape.scheme == "int4":
        tile = min(few_rows.tile_for(shape.tokens), few_rows_int4.TILES[-1])
        tuned: Any = tuning.few_rows_int4(tile, columns, 1, shape.depth)
        return (x, *weight), few_rows_int4.matmul, tuned, few_rows_int4_candidates(tile, columns, shape.depth)
    rows = quantize_int8(x) if shape.scheme == "int8" else x
    if few:
        tile = few_rows.tile_for(shape.tokens)
        function = few_rows_int8.matmul if shape.scheme == "int8" else few_rows.matmul
        candidates = few_rows_candidates(tile, columns, shape.depth)
        return (*rows, *weight), function, tuning.few_rows(tile, columns, 1, shape.depth), candidates
    tuned = tuning.many_rows_matmul(shape.tokens, columns, int8=shape.scheme == "int8")
    scales = rows[1] if shape.scheme == "int8" else rows[1].T
    candidates = many_rows_candidates(shape.scheme == "int8")
    return (rows[0], scales, *weight), many_rows.many_rows_matmul, tuned, candidates


def sweep(shape: QuantMatmul, timer: timing.Timer, clusters: bool, deadline: float) -> list[dict[str, Any]]:
    """A row for each configuration, the fastest first; the tuned one says so."""
    arguments, function, tuned, candidates = programs(shape)
    configs = [c for c in tuning.distinct([tuned], candidates) if clusters or getattr(c, "cluster", 1) == 1]

    def compile_one(config: Any) -> Any:
        try:
            return jax.jit(function, static_argnames="config").lower(*arguments, config=config).compile()
        except Exception as error:  # a configuration that does not compile is a result too
            return f"{type(error).__name__}: {error}"[:200]

    compiled = all_at_once(functools.partial(compile_one, config) for config in configs)
    expected = build(shape, "reference").run()
    rows = []
    for config, program in zip(configs, compiled, strict=True):
        row: dict[str, Any] = {"config": dataclasses.asdict(config), "tuned": config == tuned}
        rows.append(row)
        if isinstance(program, str):
            row["error"] = program
            continue
        if time.monotonic() > deadline:
            row["error"] = "not begun in time"
            continue
        poison = jax.block_until_ready(jnp.full((shape.tokens, shape.columns), jnp.nan, jnp.bfloat16))
        del poison
        row["difference"] = float(difference(program(*arguments), expected))
        if not row["difference"] <= DIFFERENCE:
            row["error"] = f"a result that differs by {row['difference']:.2g}"
            continue
        row["seconds"] = timing.summary(timing.seconds(timer, functools.partial(program, *arguments)))
    return sorted(rows, key=lambda row: row["seconds"]["median"] if "seconds" in row else float("inf"))


@jax.jit
def difference(got: jax.Array, expected: jax.Array) -> jax.Array:
    """The root mean square of the error, over that of what is expected."""
    wanted = expected.astype(jnp.float32)
    return jnp.sqrt(((got.astype(jnp.float32) - wanted) ** 2).sum() / (wanted**2).sum())


def line_of(row: dict[str, Any]) -> str:
    """One configuration."""
    config = " ".join(f"{name}={value}" for name, value in row["config"].items())
    time = f"{row['seconds']['median'] * 1e6:9.2f} us" if "seconds" in row else row["error"]
    return f"  {time}{' *' if row['tuned'] else '  '} {config}"


def main() -> None:
    """The command."""
    parser = command_line.parser(__doc__)
    measured = ", ".join(shape.name for shape in SHAPES["quant_matmul"])
    parser.add_argument("shapes", nargs="+", type=shape_of, metavar="SHAPE", help=f"of quant_matmul: {measured}")
    parser.add_argument("--clusters", action="store_true", help="also CTAs that copy for each other")
    parser.add_argument("--show", type=int, default=4, help="configurations a shape, that are printed")
    parser.add_argument("--seconds", type=float, default=600, help="after which nothing more is measured")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    if jax.default_backend() != "gpu":
        parser.error("needs a GPU")
    deadline = time.monotonic() + arguments.seconds
    timer, _ = timing.device_timer()
    content: dict[str, Any] = {**environment(), "timer": timer.name, "shapes": {}}
    for shape in arguments.shapes:
        rows = sweep(shape, timer, arguments.clusters, deadline)
        content["shapes"][shape.name] = rows
        write_json(arguments.out, content)
        tuned = next(row for row in rows if row["tuned"])
        print(f"{shape.name}: {len(rows)} configurations, {sum('error' in row for row in rows)} failed", flush=True)
        shown = rows[: arguments.show]
        for line in map(line_of, shown if tuned in shown else [*shown, tuned]):
            print(line, flush=True)


if __name__ == "__main__":
    command_line.run(main)
