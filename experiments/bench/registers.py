"""What ptxas says of every kernel configuration: `python -m experiments.bench.registers`, on a GPU.

Registers a thread, stack and spills, in `experiments/results/kernel_registers.json`. Spills in an inner loop are the
first thing to look for in a slow kernel.
"""

import contextlib
import dataclasses
import os
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.results import RESULTS, environment, write_json
from pallas_kernels.cache_format import index_block_bytes, record_bytes
from pallas_kernels.cache_write import mosaic_gpu as cache_write
from pallas_kernels.configs import CONFIGS
from pallas_kernels.indexer_logits import mosaic_gpu as indexer_logits
from pallas_kernels.matmul import FP8_BLOCK, INT4, INT8, PLAIN, few_rows, few_rows_swiglu, many_rows, many_rows_swiglu
from pallas_kernels.matmul.swiglu import Result
from pallas_kernels.moe_dispatch import planning
from pallas_kernels.sparse_mla import mosaic_gpu as sparse_mla
from pallas_kernels.sparse_mla.config import FP8
from pallas_kernels.top_k import mosaic_gpu as top_k

RESULT = RESULTS / "kernel_registers.json"
DUMP = "MOSAIC_GPU_DUMP_PTXAS"
SPILLS = re.compile(r"^\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", re.MULTILINE)
REGISTERS = re.compile(r"Used (\d+) registers")
SERIALISED = re.compile(r"\(C75(?:10|12)\)")
"""ptxas' warnings that it waits after each product; C7519, which every kernel has, is harmless."""


def programs() -> Iterator[tuple[str, Any, Callable[..., Any], list[Any]]]:
    """(op, config, function, what it takes) of every configuration that an op can choose."""
    of = jax.ShapeDtypeStruct
    fp8_rows, fp8_keys = of((1, 8, 64, record_bytes(512, 64)), jnp.uint8), of((1, 8, index_block_bytes(128)), jnp.uint8)
    layer = of((), jnp.int32)

    for config in CONFIGS["sparse_mla"]:
        fp8 = config.registers == FP8.registers

        def attend(queries, kv, layer, slots, lengths, config=config):
            return sparse_mla.sparse_mla(queries, kv, layer, slots, lengths, 0.1, config=config)

        kv = fp8_rows if fp8 else of((1, 8, 64, 576), jnp.bfloat16)
        tokens = [of((3, 128, 576), jnp.bfloat16), kv, layer, of((3, 2048), jnp.int32), of((3,), jnp.int32)]
        yield "sparse_mla", config, attend, tokens

    for config in CONFIGS["indexer_logits"]:

        def scores(*arrays, config=config):
            return indexer_logits.indexer_logits(*arrays, config=config)

        count = of((12,), jnp.int32)
        queries = [of((12, 64, 128), jnp.float8_e4m3fn), of((12, 64), jnp.float32)]
        yield "indexer_logits", config, scores, [*queries, fp8_keys, layer, of((12, 8), jnp.int32), count, count]

    for config in CONFIGS["top_k"]:

        def select(scores, lengths, config=config):
            return top_k.top_k(scores, 2048, lengths=lengths, config=config)

        yield "top_k", config, select, [of((3, 65536), jnp.float32), of((3,), jnp.int32)]

    for config in CONFIGS["cache_write"]:

        def write(*arguments, config=config):
            return cache_write.cache_write(
                *arguments, eps=(1e-6, 1e-6), quantize_latent=True, scale_fmt="ue8m0", config=config
            )

        projections = (of((3, 576), jnp.bfloat16), of((3, 128), jnp.bfloat16))
        of_norms = tuple(of((n,), jnp.float32) for n in (512, 128, 128))
        angles = (of((3, 32), jnp.float32),) * 2
        caches = (fp8_rows, fp8_keys, of((1,), jnp.int32), of((3,), jnp.int32))
        yield "cache_write", config, write, [*caches, projections, of_norms, angles]

    quantised = Result(quantized=True, scale_fmt="ue8m0", scales_by_group=True)
    for config in CONFIGS["many_rows"]:

        def products(x, row_scales, weights, weight_scales, experts, used, dense_x, dense_weights, config=config):
            tiles, stage = (experts, used), FP8_BLOCK.many_rows
            fp8 = many_rows.matmul(x, row_scales, weights, weight_scales, *tiles, stage=stage, config=config)
            bf16 = many_rows.matmul(dense_x, None, dense_weights, None, stage=PLAIN.many_rows, config=config)
            pairs = (weights, weights), (weight_scales, weight_scales)
            swiglu = many_rows_swiglu.swiglu(
                x, row_scales, *pairs, *tiles, stage=stage, config=config, result=quantised
            )
            return fp8, bf16, swiglu

        fp8, bf16 = jnp.float8_e4m3fn, jnp.bfloat16
        rows = [of((256, 512), fp8), of((4, 256), jnp.float32)]
        weights = [of((3, 512, 512), fp8), of((3, 4, 4), jnp.float32), of((2,), jnp.int32), of((), jnp.int32)]
        yield "many_rows", config, products, [*rows, *weights, of((256, 512), bf16), of((512, 512), bf16)]

    for config in CONFIGS["many_rows_int8"]:

        def int8_products(x, x_scales, weights, scales, experts, used, config=config):
            stage = INT8.many_rows
            dense = many_rows.matmul(x, x_scales, weights[0], scales[0], stage=stage, config=config)
            tiles = experts, used
            return dense, many_rows.matmul(x, x_scales, weights, scales, *tiles, stage=stage, config=config)

        rows = [of((256, 512), jnp.int8), of((256,), jnp.float32)]
        weights = [of((3, 512, 512), jnp.int8), of((3, 512), jnp.float32), of((2,), jnp.int32), of((), jnp.int32)]
        yield "many_rows_int8", config, int8_products, [*rows, *weights]

    for config in CONFIGS["few_rows"]:

        def few_rows_products(
            x, x_scales, weight, scales, int8_x, int8_x_scales, int8_weight, int8_scales, config=config
        ):
            fp8 = few_rows.matmul(x, x_scales, weight, scales, stage=FP8_BLOCK.few_rows, config=config)
            int8 = int8_x, int8_x_scales, int8_weight, int8_scales
            return fp8, few_rows.matmul(*int8, stage=INT8.few_rows, config=config)

        rows = [of((config.tile, 512), fp8), of((config.tile, 4), jnp.float32)]
        int8_rows = [of((config.tile, 512), jnp.int8), of((config.tile,), jnp.float32)]
        weight, int8_weight = (of((512, 512), dtype) for dtype in (fp8, jnp.int8))
        arrays = [*rows, weight, of((4, 4), jnp.float32), *int8_rows, int8_weight, of((512,), jnp.float32)]
        yield "few_rows", config, few_rows_products, arrays

    for config in CONFIGS["few_rows_swiglu"]:

        def gate_and_up(x, x_scales, gate, up, scales, config=config):
            pairs = (gate, up), (scales, scales)
            by_row = dataclasses.replace(quantised, scales_by_group=False)
            stage = FP8_BLOCK.few_rows
            return few_rows_swiglu.swiglu(x, x_scales, *pairs, None, None, stage=stage, config=config, result=by_row)

        x = [of((config.tile, 512), fp8), of((config.tile, 4), jnp.float32)]
        yield "few_rows_swiglu", config, gate_and_up, [*x, *[of((512, 512), fp8)] * 2, of((4, 4), jnp.float32)]

    for config in CONFIGS["few_rows_int4"]:

        def int4_product(x, values, scales, config=config):
            return few_rows.matmul(x, None, values, scales, stage=INT4.few_rows, config=config)

        weights = [of((512, 256), jnp.uint8), of((4, 512), jnp.uint32)]
        yield "few_rows_int4", config, int4_product, [of((config.tile, 512), jnp.bfloat16), *weights]

    for config in CONFIGS["moe_dispatch"]:

        def plan(experts, valid, config=config):
            return planning.make_plan(experts, valid, num_experts=256, tile=8, config=config)

        yield "moe_dispatch", config, plan, [of((5, 8), jnp.int32), of((5,), jnp.bool_)]


def parsed(report: str) -> list[dict[str, Any]]:
    """Kernels of a report of ptxas, in order."""
    spills, registers = SPILLS.findall(report), REGISTERS.findall(report)
    return [
        {
            "registers": int(used),
            "stack_bytes": int(stack),
            "spill_store_bytes": int(stores),
            "spill_load_bytes": int(loads),
            "products_serialised": bool(SERIALISED.search(report)),
        }
        for used, (stack, stores, loads) in zip(registers, spills, strict=True)
    ]


@contextlib.contextmanager
def captured() -> Iterator[Callable[[], str]]:
    """What anybody, compilers too, writes to standard output and error meanwhile."""
    with tempfile.TemporaryFile() as file:
        sys.stdout.flush()
        sys.stderr.flush()
        saved = [os.dup(descriptor) for descriptor in (1, 2)]
        for descriptor in (1, 2):
            os.dup2(file.fileno(), descriptor)

        def text() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield text
        finally:
            for descriptor, copy in zip((1, 2), saved, strict=True):
                os.dup2(copy, descriptor)
                os.close(copy)


def main() -> None:
    """The command."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--out", type=Path, default=RESULT)
    out = parser.parse_args().out
    if jax.default_backend() != "gpu":
        parser.error("needs a GPU: only its compiler tells")
    os.environ[DUMP] = "1"
    rows = []
    for op, config, function, shapes in programs():
        arrays = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), shapes)
        with captured() as report:
            jax.block_until_ready(jax.jit(function)(*arrays))
            kernels = parsed(report())
        rows.append({"op": op, "config": dataclasses.asdict(config), "kernels": kernels})
        for kernel in kernels:
            print(f"{op:<15} {kernel['registers']:>3} registers, spills {kernel['spill_load_bytes']} bytes", flush=True)
    write_json(out, {**environment(), "rows": rows})


if __name__ == "__main__":
    command_line.run(main)
