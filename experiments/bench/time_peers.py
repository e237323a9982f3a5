"""Times of published kernels, for `dsv32 bench --peers`: `python -m experiments.bench.time_peers`.

Needs PyTorch on a Hopper GPU, and of the libraries those that are asked for; nothing else here imports them. Measured
versions: torch 2.11 with CUDA 13, sgl-deep-gemm 0.1.5 (with apache-tvm-ffi 0.1.11), sgl-flash-mla 1.0.0,
flashinfer-python 0.6.3.

Each call is timed as `timer.StampTimer` times ours: L2 is emptied by reading, the launch is hidden behind a spinning
kernel, and the load comes in bursts. Ratios need both files from one machine, one after the other.

DeepGEMM compiles a kernel a shape at its first call. `--compile I N` makes only every N-th call, once and untimed: N
such processes with one `DG_JIT_CACHE_DIR` do that at the same time.
"""

import dataclasses
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.bench.timer import BURST_SECONDS, FEWEST, FLUSH, FLUSH_BYTES
from dsv32_jax.experiments.results import write_json

HEADS, LATENT, ROPE, TOP_K = 128, 512, 64, 2048
INDEX_HEADS, INDEX_DIM = 64, 128
HIDDEN, WIDTH = 7168, 2048
SCALE = 0.1352337789
DENSE = ((24576, 1536), (7168, 16384), (4096, 7168), (7168, 2048), (36864, 7168))
GATE_UP, DOWN = (2 * WIDTH, HIDDEN), (HIDDEN, WIDTH)
TOP_K_SHAPES = ((1, 131072), (64, 32768), (64, 131072), (1024, 32768), (4096, 65536))
SPIN_CYCLES = 2_000_000


@dataclasses.dataclass(frozen=True)
class Call:
    """A library's call: `make()` prepares the inputs and returns what is timed."""

    peer: str
    op: str
    shape: str
    make: Callable[[], Callable[[], Any]]


def seconds(run: Callable[[], Any], flush: Any, repetitions: int = 20) -> list[float]:
    """Device seconds of each repetition; fewer of long calls."""
    import torch

    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = min(repetitions, max(FEWEST, int(BURST_SECONDS / max(time.perf_counter() - begun, 1e-9))))
    times = []
    for _ in range(count):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.amax()
        torch.cuda._sleep(SPIN_CYCLES)
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end) * 1e-3)
    return times


# ---- the calls -------------------------------------------------------------------------------------------------


def of_torch() -> Iterator[Call]:
    """PyTorch: nothing, the ceilings, and dense attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def copy() -> Callable[[], Any]:
        x = torch.empty(2 << 30, dtype=torch.int8, device="cuda")
        y = torch.empty_like(x)
        return lambda: y.copy_(x)

    def product(fp8: bool) -> Callable[[], Any]:
        a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        if not fp8:
            return lambda: a @ b
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device="cuda")
        return lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=torch.bfloat16)

    def attention(length: int) -> Callable[[], Any]:
        q, k = (torch.randn(1, HEADS, length, 192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
        v = torch.randn(1, HEADS, length, 128, device="cuda", dtype=torch.bfloat16)

        def run() -> Any:
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

        return run

    def top_k(tokens: int, length: int) -> Callable[[], Any]:
        scores = torch.randn(tokens, length, device="cuda")
        return lambda: torch.topk(scores, TOP_K, sorted=False)

    yield Call("torch", "empty call", "nothing", lambda: lambda: None)
    yield Call("torch", "copy", "2 GiB", copy)
    yield Call("torch", "matmul bf16", "8192^3", lambda: product(False))
    yield Call("torch", "matmul fp8 per-tensor", "8192^3", lambda: product(True))
    for tokens, length in TOP_K_SHAPES:
        yield Call("torch", "topk 2048", f"T={tokens} L={length}", partial(top_k, tokens, length))
    for length in (2**n for n in range(10, 18)):
        shape = f"{HEADS} heads 192/128 L={length}"
        yield Call("torch", "dense causal MHA cudnn", shape, partial(attention, length))


def of_deep_gemm() -> Iterator[Call]:
    """DeepGEMM: FP8 products, dense and grouped, and the indexer's scores."""
    import deep_gemm
    import torch
    from deep_gemm.utils import math

    def rows(count: int, depth: int) -> tuple[Any, Any]:
        return math.per_token_cast_to_fp8(torch.randn(count, depth, device="cuda"), use_ue8m0=False)

    def weights(experts: int, columns: int, depth: int) -> tuple[Any, Any]:
        values = torch.empty(experts, columns, depth, device="cuda", dtype=torch.float8_e4m3fn)
        scales = torch.empty(experts, -(-columns // 128), -(-depth // 128), device="cuda")
        for i in range(experts):
            values[i], scales[i] = math.per_block_cast_to_fp8(
                torch.randn(columns, depth, device="cuda"), use_ue8m0=False
            )
        return values, scales

    def result(*shape: int) -> Any:
        return torch.empty(*shape, device="cuda", dtype=torch.bfloat16)

    def dense(m: int, n: int, k: int) -> Callable[[], Any]:
        a, (values, scales), out = rows(m, k), weights(1, n, k), result(m, n)
        return lambda: deep_gemm.fp8_gemm_nt(a, (values[0], scales[0]), out)

    def layout(experts: int, m: int) -> Any:
        return (torch.arange(m, device="cuda", dtype=torch.int32) * experts // m).int()

    def grouped(experts: int, m: int, n: int, k: int) -> Callable[[], Any]:
        a, b, out, expert_of_row = rows(m, k), weights(experts, n, k), result(m, n), layout(experts, m)
        return lambda: deep_gemm.m_grouped_fp8_gemm_nt_contiguous(a, b, out, expert_of_row)

    def grouped_bf16(experts: int, m: int, n: int, k: int) -> Callable[[], Any]:
        a, b = (torch.randn(*s, device="cuda", dtype=torch.bfloat16) for s in ((m, k), (experts, n, k)))
        out, expert_of_row = result(m, n), layout(experts, m)
        return lambda: deep_gemm.m_grouped_bf16_gemm_nt_contiguous(a, b, out, expert_of_row)

    def masked(experts: int, used: int, each: int) -> Callable[[], Any]:
        (n, k), room = GATE_UP, 128
        b, (values, scales) = weights(experts, n, k), rows(experts * room, k)
        a = values.view(experts, room, k), scales.view(experts, room, k // 128)
        out, counts = result(experts, room, n), torch.zeros(experts, dtype=torch.int32, device="cuda")
        counts[torch.randperm(experts, device="cuda")[:used]] = each
        return lambda: deep_gemm.m_grouped_fp8_fp4_gemm_nt_masked(a, b, out, counts, each)

    def scores(tokens: int, length: int) -> Callable[[], Any]:
        q = torch.randn(tokens, INDEX_HEADS, INDEX_DIM, device="cuda").to(torch.float8_e4m3fn)
        k = torch.randn(length, INDEX_DIM, device="cuda").to(torch.float8_e4m3fn), torch.rand(length, device="cuda")
        w, start = (
            torch.randn(tokens, INDEX_HEADS, device="cuda"),
            torch.zeros(tokens, dtype=torch.int32, device="cuda"),
        )
        end = torch.arange(length - tokens, length, dtype=torch.int32, device="cuda") + 1
        return lambda: deep_gemm.fp8_mqa_logits(q, k, w, start, end)

    def paged_scores(tokens: int, length: int) -> Callable[[], Any]:
        block, blocks = 64, tokens * length // 64
        q = torch.randn(tokens, 1, INDEX_HEADS, INDEX_DIM, device="cuda").to(torch.float8_e4m3fn)
        cache = torch.randint(0, 100, (blocks, block, 1, INDEX_DIM + 4), dtype=torch.uint8, device="cuda")
        cache.view(blocks, -1)[:, block * INDEX_DIM :] = torch.ones(blocks, block, device="cuda").view(torch.uint8)
        w = torch.randn(tokens, INDEX_HEADS, device="cuda")
        lengths = torch.full((tokens, 1), length, dtype=torch.int32, device="cuda")
        table = torch.arange(blocks, dtype=torch.int32, device="cuda").view(tokens, -1)
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        plan = deep_gemm.get_paged_mqa_logits_metadata(lengths, block, sms)
        return lambda: deep_gemm.fp8_paged_mqa_logits(q, cache, w, lengths, table, plan, length)

    def call(op: str, shape: str, make: Callable[..., Any], *arguments: Any) -> Call:
        return Call("DeepGEMM", op, shape, partial(make, *arguments))

    for m in (1, 16, 128, 4096):
        for n, k in DENSE:
            yield call("quant_matmul fp8_block", f"M={m} N={n} K={k}", dense, m, n, k)
    for experts, m in ((64, 65536), (256, 32768), (256, 65536)):
        for n, k in (GATE_UP, DOWN):
            shape = f"E={experts} M={m} N={n} K={k}"
            yield call("grouped_matmul fp8_block", shape, grouped, experts, m, n, k)
    n, k = GATE_UP
    yield call("grouped_matmul bf16", f"E=64 M=65536 N={n} K={k}", grouped_bf16, 64, 65536, n, k)
    for experts, used, each in ((256, 8, 1), (256, 160, 1), (256, 256, 4), (64, 64, 16)):
        shape = f"E={experts} used={used} rows={each} N={n} K={k}"
        yield call("grouped_matmul fp8 masked", shape, masked, experts, used, each)
    for tokens, length in ((1024, 65536), (4096, 65536), (4096, 131072)):
        shape = f"T={tokens} L={length} heads={INDEX_HEADS}"
        yield call("indexer_logits fp8 prefill", shape, scores, tokens, length)
    for tokens, length in ((1, 131072), (64, 32768), (64, 131072)):
        shape = f"T={tokens} L={length} heads={INDEX_HEADS}"
        yield call("indexer_logits fp8 paged", shape, paged_scores, tokens, length)


def of_flash_mla() -> Iterator[Call]:
    """FlashMLA: sparse attention, of prompts with a bfloat16 cache and of continuations with an FP8 one."""
    import flash_mla
    import torch

    def prefill(tokens: int, length: int) -> Callable[[], Any]:
        q, kv = (
            torch.randn(n, h, LATENT + ROPE, device="cuda", dtype=torch.bfloat16) / 8
            for n, h in ((tokens, HEADS), (length, 1))
        )
        chosen = torch.randint(0, length, (tokens, 1, TOP_K), device="cuda", dtype=torch.int32)
        return lambda: flash_mla.flash_mla_sparse_fwd(q, kv, chosen, SCALE, use_legacy=True)

    def decode(batch: int, length: int) -> Callable[[], Any]:
        q = torch.randn(batch, 1, HEADS, LATENT + ROPE, device="cuda", dtype=torch.bfloat16) / 8
        blocks, block = batch * length // 64, 64
        cache = torch.zeros(blocks, block, 1, 656, dtype=torch.uint8, device="cuda")
        latents = torch.randn(blocks, block, 1, 512, device="cuda").to(torch.float8_e4m3fn)
        cache[..., :512] = latents.view(torch.uint8)
        cache[..., 512:528] = torch.full((blocks, block, 1, 4), 0.125, device="cuda").view(torch.uint8)
        keys = torch.randn(blocks, block, 1, ROPE, device="cuda", dtype=torch.bfloat16)
        cache[..., 528:] = keys.view(torch.uint8)
        first = torch.arange(batch, device="cuda").view(batch, 1, 1) * length
        chosen = (first + torch.randint(0, length, (batch, 1, TOP_K), device="cuda")).int()
        plan, _ = flash_mla.get_mla_metadata()
        arguments = q, cache.view(torch.float8_e4m3fn), None, None, LATENT, plan, None, SCALE, False, True, chosen
        return lambda: flash_mla.flash_mla_with_kvcache(*arguments, use_legacy=True, kv_format="V32")

    def dense_decode(batch: int, length: int) -> Callable[[], Any]:
        q = torch.randn(batch, 1, HEADS, LATENT + ROPE, device="cuda", dtype=torch.bfloat16) / 8
        blocks = batch * length // 64
        cache = torch.randn(blocks, 64, 1, LATENT + ROPE, device="cuda", dtype=torch.bfloat16) / 8
        table = torch.arange(blocks, dtype=torch.int32, device="cuda").view(batch, -1)
        lengths = torch.full((batch,), length, dtype=torch.int32, device="cuda")
        plan, _ = flash_mla.get_mla_metadata()
        arguments = q, cache, table, lengths, LATENT, plan, None, SCALE, True
        return lambda: flash_mla.flash_mla_with_kvcache(*arguments, use_legacy=True)

    for tokens, length in ((4096, 8192), (4096, 65536), (4096, 131072), (1024, 65536)):
        shape = f"T={tokens} L={length} K={TOP_K} H={HEADS}"
        yield Call("FlashMLA", "sparse_mla prefill bf16", shape, partial(prefill, tokens, length))
    for batch in (1, 8, 32, 64, 128):
        shape = f"T={batch} L=32768 K={TOP_K} H={HEADS}"
        yield Call("FlashMLA", "sparse_mla decode fp8 cache", shape, partial(decode, batch, 32768))
        yield Call("FlashMLA", "dense decode bf16", f"T={batch} L=32768 H={HEADS}", partial(dense_decode, batch, 32768))


def of_flash_infer() -> Iterator[Call]:
    """FlashInfer: top-k."""
    import flashinfer
    import torch

    def top_k(tokens: int, length: int) -> Callable[[], Any]:
        scores = torch.randn(tokens, length, device="cuda")
        return lambda: flashinfer.top_k(scores, TOP_K)

    for tokens, length in TOP_K_SHAPES:
        yield Call("FlashInfer", "topk 2048", f"T={tokens} L={length}", partial(top_k, tokens, length))


LIBRARIES = {"torch": of_torch, "flashmla": of_flash_mla, "deepgemm": of_deep_gemm, "flashinfer": of_flash_infer}


# ---- the command -----------------------------------------------------------------------------------------------


def main() -> None:
    """The command."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--only", default=",".join(LIBRARIES), help="libraries, with commas between them")
    parser.add_argument("--ops", default="", help="the beginning of the ops' names, with commas between them")
    parser.add_argument("--compile", type=int, nargs=2, metavar=("I", "N"), help="see above; writes nothing")
    parser.add_argument("--out", type=Path, default=Path("peers.json"))
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := set(names) - set(LIBRARIES):
        parser.error(f"--only {', '.join(sorted(unknown))}: unknown; choose of {', '.join(LIBRARIES)}")
    try:
        import torch
    except ModuleNotFoundError:
        parser.error("needs PyTorch")
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    torch.manual_seed(0)
    begins = tuple(["empty call", *arguments.ops.split(",")] if arguments.ops else [""])
    calls = [call for name in names for call in LIBRARIES[name]() if call.op.startswith(begins)]
    if arguments.compile:
        which, of = arguments.compile
        for call in calls[which::of]:
            call.make()()
            torch.cuda.synchronize()
        return
    flush = torch.zeros(FLUSH_BYTES // 4, dtype=torch.float32, device="cuda")
    content: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "flush": FLUSH,
        "rows": [],
    }
    for call in calls:
        row: dict[str, Any] = {"peer": call.peer, "op": call.op, "shape": call.shape}
        try:
            times = seconds(call.make(), flush)
            row |= {"seconds": statistics.median(times), "min": min(times), "max": max(times)}
        except Exception as error:  # what one library cannot run leaves the others
            row["error"] = f"{type(error).__name__}: {error}"[:300]
        torch.cuda.empty_cache()
        content["rows"].append(row)
        write_json(arguments.out, content)
        shown = f"{row['seconds'] * 1e6:10.1f} us" if "seconds" in row else f"failed: {row['error'][:120]}"
        print(f"{call.peer:<10} {call.op:<28} {call.shape:<44} {shown}", flush=True)


if __name__ == "__main__":
    command_line.run(main)
