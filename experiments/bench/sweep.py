"""Other tile sizes than the tuned ones: `python -m experiments.bench.sweep SHAPE...`, on a GPU.

Shapes are named as those of `matmul` are, and may be others: 32x2240x7168 are 32 rows times a weight [2240, 7168]
in FP8, int8-32x2240x7168 and int4-32x2240x7168 the same in other schemes. For each shape every candidate is compiled,
compared with the reference's result, and timed. Results, the fastest first, are in `--out`; what wins by more than the
spread belongs into `pallas_kernels/matmul/config.py`.
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
from dsv32_jax.experiments.bench.matmuls import build, inputs, scheme_of
from dsv32_jax.experiments.results import environment, write_json
from dsv32_jax.generate.compiling import all_at_once
from pallas_kernels.hopper import SHARED_BYTES, SMS
from pallas_kernels.matmul import FP8_BLOCK, INT4, INT8, Product, choose, few_rows, many_rows
from pallas_kernels.matmul.config import TILES, FewRows, FewRowsInt4, ManyRows, distinct
from pallas_kernels.matmul.shapes import Matmul
from pallas_kernels.quantize import quantize_int8
from pallas_kernels.shapes import SHAPES

NAME = re.compile(r"(?:(int8|int4)-)?(\d+)x(\d+)x(\d+)")
BUSY = 0.84
"""Least number of items, of as many as there would be if every CTA had as many as the busiest."""
DIFFERENCE = 4e-3
"""Root mean square, relative, from the reference: sums in another order, rounded to bfloat16."""


def shape_of(name: str) -> Matmul:
    """By its name: an optional scheme, tokens, the weight's N and K."""
    match = NAME.fullmatch(name)
    if match is None:
        raise argparse.ArgumentTypeError(f"{name} is not like 32x2240x7168, int8-32x2240x7168 or int4-32x2240x7168")
    tokens, columns, depth = map(int, match.groups()[1:])
    return Matmul(name=name, scheme=match[1] or FP8_BLOCK.name, tokens=tokens, columns=columns, depth=depth)


def fitting(make: Callable[[int, int], Any], items: int, most: int) -> Iterator[Any]:
    """`make(stages, ctas)` for one CTA on a multiprocessor and for several, each with as many stages as fit."""
    for together in range(1, most + 1):
        ctas = together * SMS
        if items < BUSY * -(-items // ctas) * ctas:
            continue
        for stages in range(12, 1, -1):
            try:
                config = make(stages, ctas)
            except ValueError:
                continue
            if config.shared_bytes + 1024 <= (SHARED_BYTES + 1024) // together:
                yield config
                break


def few_rows_candidates(tile: int, columns: int, depth: int, tiles: int = 1) -> list[Any]:
    """Strips of most heights, in all the ways to take them that keep the multiprocessors busy."""
    many = tile >= 64
    heights = range(32, 72, 8) if many else (16, 32, 40, 48, 56, 64)
    if tile == 128:  # also as two tiles, next to each other
        candidates = few_rows_candidates(64, columns, depth, 2)
    else:
        candidates = []
    ways = [(count, 1, *way) for count, *way in itertools.product((1, 2, 3), heights, (1, 2, 4))]
    if many:  # also with the tokens split in two, for one or two parts of a strip
        ways += [(2 * count, 2, height, blocks) for count, height, blocks in itertools.product((1, 2), heights, (1, 2))]
    for warpgroups, token_parts, height, blocks in ways:
        if depth % (128 * blocks) or (blocks == 4 if many else warpgroups > 1 or blocks == 1):
            continue
        if tiles > 1 and token_parts > 1:
            continue
        way = {"warpgroups": warpgroups, "token_parts": token_parts, "blocks": blocks}
        rows = height * (warpgroups // token_parts)

        def make(stages, ctas, way=way, rows=rows):
            return FewRows(tile=tile, rows=rows, stages=stages, ctas=ctas, **way)

        items = -(-columns // rows) * tiles
        candidates += [c for c in fitting(make, items, 2 if many else 3) if c.stages * c.blocks >= 4]
    return candidates


def few_rows_int4_candidates(tile: int, columns: int, depth: int) -> list[Any]:
    """The same for four-bit weights."""
    candidates: list[Any] = []
    for rows, deep in itertools.product((16, 24, 32, 40, 48, 56, 64), (1, 2)):
        if depth % (512 * deep):
            continue

        def make(stages, ctas, rows=rows, deep=deep):
            return FewRowsInt4(tile=tile, rows=rows, depth=deep, stages=stages, ctas=ctas)

        candidates += fitting(make, -(-columns // rows), 2)
    return candidates


def many_rows_candidates(by_rows: bool) -> list[Any]:
    """Tiles of 128 rows, `by_rows` divided either way, in narrow and wide groups."""
    ways = itertools.product((False, True) if by_rows else (False,), (8, 16, 32))
    return [ManyRows(by_rows=each, group=group) for each, group in ways]


def programs(shape: Matmul) -> tuple[tuple[Any, ...], Callable[..., jax.Array], Any, list[Any]]:
    """Inputs, `f(*inputs, config=)`, the tuned configuration, and the candidates."""
    rows, weight = made(lambda key: inputs(shape, key, shape.tokens, (shape.columns, shape.depth)))
    scheme, columns = scheme_of(shape), shape.columns
    chosen = choose(Product(rows=shape.tokens, columns=columns, depth=shape.depth, scheme=scheme))
    x_scales: Any
    x, x_scales = quantize_int8(rows) if scheme == INT8 else (rows, None) if scheme == INT4 else rows
    if chosen.many:
        x_scales = x_scales.T if scheme == FP8_BLOCK else x_scales
        function = functools.partial(many_rows.matmul, stage=scheme.many_rows)
        candidates = many_rows_candidates(scheme.by_rows)
    else:
        tile = next(tile for tile in TILES if tile >= min(shape.tokens, scheme.few_tiles[-1]))
        function = functools.partial(few_rows.matmul, stage=scheme.few_rows)
        make = few_rows_int4_candidates if scheme == INT4 else few_rows_candidates
        candidates = make(tile, columns, shape.depth)
    return (x, x_scales, weight.values, weight.scales), function, chosen.config, candidates


def sweep(shape: Matmul, timer: timing.Timer, deadline: float) -> list[dict[str, Any]]:
    """A row for each configuration, the fastest first; the tuned one says so."""
    arguments, function, tuned, candidates = programs(shape)
    configs = distinct([tuned], candidates)

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
    measured = ", ".join(shape.name for shape in SHAPES["matmul"])
    parser.add_argument("shapes", nargs="+", type=shape_of, metavar="SHAPE", help=f"of matmul: {measured}")
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
        rows = sweep(shape, timer, deadline)
        content["shapes"][shape.name] = rows
        write_json(arguments.out, content)
        tuned = next(row for row in rows if row["tuned"])
        print(f"{shape.name}: {len(rows)} configurations, {sum('error' in row for row in rows)} failed", flush=True)
        shown = rows[: arguments.show]
        for line in map(line_of, shown if tuned in shown else [*shown, tuned]):
            print(line, flush=True)


if __name__ == "__main__":
    command_line.run(main)
