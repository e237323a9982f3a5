"""What the device can do, measured in the same run, and how much of it a call reached."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from dsv32_jax.experiments.bench import timer as timing
from dsv32_jax.experiments.bench.peers import Peers
from dsv32_jax.experiments.bench.targets import PeerRow

CEILINGS = ("copy", "bf16", "fp8")
"""Bytes/s of a copy (read and write both counted), FLOP/s of bf16 and of FP8 products."""
TORCH = {
    "copy": PeerRow("torch", "copy", "2 GiB"),
    "bf16": PeerRow("torch", "matmul bf16", "8192^3"),
    "fp8": PeerRow("torch", "matmul fp8 per-tensor", "8192^3"),
}
"""The rows of a peers' file that measure the same."""


def measure(
    timer: timing.Timer,
    peers: Peers,
    tiny: bool = False,
    *,
    kinds: Sequence[str] = CEILINGS,
    side: int | None = None,
    size: int | None = None,
    reads: bool = False,
) -> dict[str, Any]:
    """Each ceiling by each method, and the largest.

    Args:
      timer: of the calls.
      peers: what other libraries reached on this machine.
      tiny: small products and copies, which say nothing of the device.
      kinds: of `CEILINGS`, and "float32", FLOP/s of products in float32.
      side: of the square matrices of a product; default: 8192.
      size: bytes of a copy; default: 2 GiB.
      reads: count a sum of what is read as a copy, too: a CPU gives each result new pages, which takes longer than to
        write it.

    Returns:
      `ceilings`: by `kinds`, the largest rate; None where no method ran.
      `methods`: by ceiling and method, the rate or the error.
      `timer_check`: the methods that run the same library call as PyTorch's rows do: our seconds over theirs.
      `empty_call_seconds`: what the timer says of nothing; no time has it subtracted.
    """
    side = side or (256 if tiny else 8192)
    size = size or (4 if tiny else 2048) * 2**20
    operations = 2 * side**3
    methods: dict[str, dict[str, Any]] = {name: {} for name in kinds}
    medians: dict[tuple[str, str], float] = {}

    def rate(ceiling: str, method: str, f: Callable[..., Any], arguments: Callable[[], tuple], work: int) -> None:
        if ceiling not in kinds:
            return
        try:
            ready = arguments()
            compiled = jax.jit(f).lower(*ready).compile()
            median = statistics.median(timing.seconds(timer, lambda: compiled(*ready)))
        except Exception as error:  # a product that this device lacks leaves the others
            methods[ceiling][method] = {"error": f"{type(error).__name__}: {error}"[:300]}
            return
        medians[ceiling, method] = median
        methods[ceiling][method] = {"seconds": median, "rate": work / median}

    def bytes_() -> tuple:
        return (jax.random.bits(jax.random.key(0), (size,), jnp.uint8),)

    def half() -> tuple:
        return (jax.random.normal(jax.random.key(0), (size // 2,), jnp.bfloat16),)

    def floats() -> tuple:
        return (jax.random.normal(jax.random.key(0), (size // 4,), jnp.float32),)

    def factors(dtype: Any) -> Callable[[], tuple]:
        return lambda: tuple(
            jax.random.normal(jax.random.key(i), (side, side), jnp.bfloat16).astype(dtype) for i in range(2)
        )

    rate("copy", "copy", jnp.copy, bytes_, 2 * size)
    rate("copy", "x + 1", lambda x: x + 1, half, 2 * size)
    if reads:
        rate("copy", "sum", jnp.sum, floats, size)
    rate("float32", "matmul", float32_product, factors(jnp.float32), operations)
    rate("bf16", "matmul", jnp.matmul, factors(jnp.bfloat16), operations)
    rate("fp8", "dot_general", fp8_product, factors(jnp.float8_e4m3fn), operations)
    check = {}
    if not tiny:
        for (ceiling, method), mine in medians.items():
            theirs = peers.seconds(TORCH[ceiling]) if ceiling in TORCH else None
            if theirs is not None and method != "x + 1":
                check[f"{ceiling} ({method})"] = {"seconds": mine, "torch": theirs, "ratio": mine / theirs}
        for ceiling, row in TORCH.items():
            theirs = peers.seconds(row)
            if theirs is not None and ceiling in kinds:
                work = 2 * size if ceiling == "copy" else operations
                methods[ceiling]["torch"] = {"seconds": theirs, "rate": work / theirs}
    ceilings = {
        name: max((entry["rate"] for entry in entries.values() if "rate" in entry), default=None)
        for name, entries in methods.items()
    }
    empty = statistics.median([timer.once(lambda: None, timing.LEAST_SPIN) for _ in range(5)])
    return {"ceilings": ceilings, "methods": methods, "timer_check": check, "empty_call_seconds": empty}


def float32_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b as the model's products in float32 are."""
    return jnp.matmul(a, b, precision="highest")


def fp8_product(a: jax.Array, b: jax.Array) -> jax.Array:
    """a @ b.T, the form that Hopper's FP8 units take."""
    return jax.lax.dot_general(a, b, (((1,), (1,)), ((), ())), preferred_element_type=jnp.bfloat16)


def bound(work: Mapping[str, int], bytes_: int, ceilings: Mapping[str, float | None]) -> tuple[float, str] | None:
    """The least seconds that a call can take, and by what: "compute" or "memory".

    Args:
      work: operations by kind of product ("bf16", "fp8"); they share the tensor cores, so their times add up.
      bytes_: what must cross device memory at least once.
      ceilings: see `measure`.

    Returns:
      None if a ceiling that counts was not measured.
    """
    rates = {kind: rate for kind in (*work, "copy") if (rate := ceilings.get(kind)) is not None}
    if len(rates) <= len(work):
        return None
    compute = sum(operations / rates[kind] for kind, operations in work.items())
    memory = bytes_ / rates["copy"]
    return (compute, "compute") if compute > memory else (memory, "memory")
