"""Times weights in each scheme: `python -m experiments.studies.quantization_speed`, on a GPU, at full width.

It times whole decode steps and one mixture-of-experts layer with weights in bfloat16, in each scheme, and mixed:
experts in four bits, all other linears in int8. (`dsv32 bench matmul` times single products.) Weights are random and
made in the types that they are stored in; the weights of one scheme are in memory at a time. A row has, beside the
time, the bytes that must be read, the time that the device needs for them at the bandwidth measured in the same run,
and the ratio of the time in bfloat16 at the same shape to this one.
"""

import contextlib
import dataclasses
import functools
import gc
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.convert.conversion import nbytes
from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.bench import roofline
from dsv32_jax.experiments.bench import timer as timing
from dsv32_jax.experiments.bench.cases import Program, compile_
from dsv32_jax.experiments.bench.cases import normal as standard_normal
from dsv32_jax.experiments.bench.peers import Peers
from dsv32_jax.experiments.bench.run import REST_SECONDS
from dsv32_jax.experiments.results import RESULTS, environment, write_json
from dsv32_jax.experiments.workbench.profile import by_name, profiled
from dsv32_jax.experiments.workbench.random_model import in_schemes, random_parameters, stored_bytes
from dsv32_jax.experiments.workbench.steps import StepShape, random_cache
from dsv32_jax.generate.memory import USABLE, available_bytes
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache
from dsv32_jax.model.model import Batch, DeepseekV32, Options, abstract_model
from dsv32_jax.model.moe import MoE
from dsv32_jax.model.numerics import Numerics
from dsv32_jax.model.params import Init, is_linear, named_parameters
from dsv32_jax.model.prepared import prepared
from dsv32_jax.model.seams import Seams
from dsv32_jax.model.taps import Taps
from pallas_kernels.backend import BACKENDS
from pallas_kernels.cache_format import index_block_bytes, record_bytes

RESULT = RESULTS / "quantization_speed.json"


class Form(NamedTuple):
    """The schemes of a model's linears.

    Attributes:
      experts: of the experts.
      others: of all other linears.
    """

    experts: str
    others: str

    def scheme(self, path: str) -> str:
        """The scheme of the linear at this path."""
        return self.experts if "experts." in path else self.others


FORMS = {
    "bf16": Form("bf16", "bf16"),
    "fp8_block": Form("fp8_block", "fp8_block"),
    "int8": Form("int8", "int8"),
    "int4": Form("int4", "int4"),
    "mixed": Form("int4", "int8"),
}
"""Others are compared with the first."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of the measured calls.

    Attributes:
      config: of the model.
      sequences: of the steps, one token each.
      context: tokens of each sequence, the new one among them.
      tokens: of the mixture-of-experts layer.
    """

    config: ModelConfig
    sequences: tuple[int, ...]
    context: int
    tokens: tuple[int, ...]

    @property
    def blocks(self) -> int:
        """Blocks of the cache."""
        return max(self.sequences) * self.context // BLOCK_SIZE


def full_sizes(layers: int) -> Sizes:
    """The model's real widths."""
    return Sizes(
        config=ModelConfig.full_width(layers),
        sequences=(32, 128),
        context=4096,
        tokens=(1, 32, 128, 512),
    )


def tiny_sizes() -> Sizes:
    """For tests of this program."""
    config = ModelConfig.tiny(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)
    return Sizes(config=config, sequences=(2,), context=128, tokens=(4,))


def layers_for(free: float) -> int:
    """The number of layers of the model: five, two of them with experts, where those fit in bfloat16; else four."""
    sizes = full_sizes(5)
    rows = sizes.config.num_hidden_layers * sizes.blocks * BLOCK_SIZE * sum(row_bytes(sizes.config))
    return 5 if stored_bytes(sizes.config.replace(quantization_config=None)) + rows < USABLE * free else 4


# ---- what is read ----------------------------------------------------------------------------------------------


def row_bytes(config: ModelConfig) -> tuple[int, int]:
    """Bytes of one token in one layer of the FP8 cache: of its latent row, and of its index key."""
    latent = record_bytes(config.kv_lora_rank, config.qk_rope_head_dim)
    return latent, index_block_bytes(config.index_head_dim) // BLOCK_SIZE


def weight_bytes(module: Any, used: Sequence[int]) -> dict[str, int]:
    """Bytes of the parameters that a call reads: `experts`, and `others`, without the embedding.

    Args:
      module: the model or one layer with experts, abstract or not.
      used: experts that some token chose, for each layer that has experts.
    """
    sizes, parameters = {"experts": 0, "others": 0}, named_parameters(module)
    layers = dict.fromkeys(path.rpartition("experts.")[0] for path in parameters if "experts." in path)
    used_of_layer = dict(zip(layers, used, strict=True))
    for path, leaf in parameters.items():
        if "experts." in path:
            sizes["experts"] += nbytes(leaf) // leaf.shape[0] * used_of_layer[path.rpartition("experts.")[0]]
        elif path != "embed":
            sizes["others"] += nbytes(leaf)
    return sizes


def step_bytes(model: Any, used: Sequence[int], sequences: int, context: int) -> dict[str, int]:
    """`weight_bytes` of a decode step with the embedding's rows, and the bytes that it reads from the cache.

    It reads every index key, and as many latent rows as a token attends to.
    """
    config, sizes = model.config, weight_bytes(model, used)
    sizes["others"] += sequences * nbytes(model.embed) // config.vocab_size
    latent, index = row_bytes(config)
    tokens = config.num_hidden_layers * sequences
    return sizes | {"latents": tokens * min(config.index_topk, context) * latent, "index": tokens * context * index}


def experts_used(chosen: jax.Array) -> list[int]:
    """The number of different experts of each layer in int32 [layers, T, K]."""
    return [np.unique(layer).size for layer in np.asarray(chosen)]


# ---- what is called --------------------------------------------------------------------------------------------


def model_in(config: ModelConfig, form: Form) -> DeepseekV32:
    """The abstract model with its linears in the form's schemes."""
    model = abstract_model(config)
    return in_schemes(model, {path: form.scheme(path) for path in named_parameters(model) if is_linear(path)})


def layer_in(config: ModelConfig, form: Form) -> MoE:
    """The abstract mixture-of-experts part of one layer with its linears in the form's schemes."""
    layer = jax.eval_shape(lambda: MoE(config, Init(config, nnx.Rngs(0))))
    linears = [path for path in named_parameters(layer) if is_linear(f".ffn.{path}")]
    return in_schemes(layer, {path: form.scheme(path) for path in linears})


def options_of(backend: str) -> Options:
    """Options of every call: activations of quantised linears, index keys and the cache are quantised."""
    return Options("bfloat16", act_quant=True, backend=backend, cache_dtype="fp8")


CHOSEN = Taps.of({"*experts": None})
"""A tap on the experts that the tokens of each layer chose."""


def numerics_of(backend: str) -> Numerics:
    """Numerics of a layer alone with the settings of `options_of`, and a tap on the chosen experts."""
    return Numerics(act_quant=True, scale_fmt="ue8m0", backend=backend, seams=Seams(taps=CHOSEN))


def step_call(structure: Any, options: Options) -> Callable[..., Any]:
    """`call(leaves of a model, batch, cache)`: logits, the chosen experts int32 [layers, S, K], and the cache."""

    def decode(leaves: list[Any], batch: Batch, cache: KVCache) -> tuple[jax.Array, jax.Array, KVCache]:
        model: DeepseekV32 = jax.tree.unflatten(structure, leaves)
        seams = options.seams(CHOSEN)
        logits, cache = model(batch, cache, options, seams)
        return logits, jnp.stack(list(seams.values.values())), cache

    return decode


def layer_call(structure: Any, config: ModelConfig, backend: str) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`call(leaves of a layer, x [T, D])`: its result [T, D] and the chosen experts int32 [1, T, K]."""

    def layer(leaves: list[Any], x: jax.Array) -> tuple[jax.Array, jax.Array]:
        moe: MoE = jax.tree.unflatten(structure, leaves)
        numerics = numerics_of(backend)
        out = moe(x, jnp.arange(x.shape[0]), config, numerics)
        return out, jnp.stack(list(numerics.seams.values.values()))

    return layer


# ---- the measurement -------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Run:
    """What the parts of the measurement share.

    Attributes:
      sizes: of the measured calls.
      backend: of every op.
      out: the file of results.
      content: of the file.
      timer: times calls.
      forms: those of `FORMS` that are measured.
      deadline: the time, by `time.monotonic`, after which no measurement begins.
      pause: seconds between measurements, see `REST_SECONDS`.
      profile: whether the kernels of each step are recorded.
    """

    sizes: Sizes
    backend: str
    out: Path
    content: dict[str, Any]
    timer: timing.Timer
    forms: Mapping[str, Form]
    deadline: float
    pause: float
    profile: bool = False

    def late(self) -> bool:
        """Whether the deadline has passed."""
        return time.monotonic() > self.deadline

    def compiled(self, calls: Mapping[Any, Callable[[], Program]]) -> dict[Any, Future[Program]]:
        """Compiles all programs of a part, before weights fill the memory: XLA allocates operands to tune products."""
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            return {name: pool.submit(call) for name, call in calls.items()}

    @contextlib.contextmanager
    def row(self, part: str, form: str, shape: dict[str, int]) -> Iterator[dict[str, Any]]:
        """Yields a row to be filled in; an error is recorded in it, and the other rows are still measured."""
        row: dict[str, Any] = {"part": part, "form": form, "shape": shape}
        try:
            yield row
        except Exception as error:
            row["error"] = " ".join(f"{type(error).__name__}: {error}".split())[:500]
        self.content["rows"].append(row)
        self.compare(row)
        write_json(self.out, self.content)
        print(line_of(row), flush=True)
        time.sleep(self.pause)

    def compare(self, row: dict[str, Any]) -> None:
        """Sets the speed relative to bfloat16 at the same part and shape, if both were measured."""
        for other in self.content["rows"]:
            if (other["part"], other["shape"], other["form"]) == (row["part"], row["shape"], "bf16"):
                if "seconds" in row and "seconds" in other:
                    row["times_bf16"] = other["seconds"]["median"] / row["seconds"]["median"]

    def measure(
        self,
        row: dict[str, Any],
        program: Program,
        run: Callable[[], Any],
        bytes_: dict[str, int],
    ) -> None:
        """Times a call that has run before; `bytes_` are the bytes that it reads, by kind."""
        row["seconds"] = timing.summary(timing.seconds(self.timer, run))
        row |= {"backend": program.backend, "memory": program.memory, "bytes": bytes_}
        bound = roofline.bound({}, sum(bytes_.values()), self.content["ceilings"])
        if bound is not None:
            row["bound"] = {"seconds": bound[0], "by": bound[1], "of_time": bound[0] / row["seconds"]["median"]}


def line_of(row: dict[str, Any]) -> str:
    """A row on one line."""
    shape = " ".join(f"{name} {size}" for name, size in row["shape"].items())
    head = f"{row['part']:<8} {shape:<30} {row['form']:<10}"
    if "error" in row:
        return f"{head} failed: {row['error'][:160]}"
    line = f"{head} {row['seconds']['median'] * 1e6:>10.1f} us"
    line += f"  {row['times_bf16']:6.2f} times bf16" if "times_bf16" in row else ""
    line += f"  {row['bound']['of_time']:6.1%} of its {row['bound']['by']} bound" if "bound" in row else ""
    line += f"  experts {row['experts_used']}" if "experts_used" in row else ""
    return line if row["backend"] == "mosaic_gpu" else f"{line}  ({row['backend']})"


def measure_steps(run: Run) -> None:
    """Whole decode steps."""
    sizes, config, options = run.sizes, run.sizes.config, options_of(run.backend)
    prepare = functools.partial(prepared, options=options)
    models = {name: jax.eval_shape(prepare, model_in(config, form)) for name, form in run.forms.items()}
    batches = {count: StepShape(sequences=count, context=sizes.context).batch(config) for count in sizes.sequences}
    cache_shape = KVCache.shapes(config, sizes.blocks, options.cache_form, options.act_quant)

    def program(name: str, sequences: int) -> Program:
        leaves, structure = jax.tree.flatten(models[name])
        call = step_call(structure, options)
        return compile_(call, leaves, batches[sequences], cache_shape, donate=(2,))

    programs = run.compiled({(n, s): functools.partial(program, n, s) for n in run.forms for s in sizes.sequences})
    for name, abstract in models.items():
        operands: list[Any] = []
        for sequences in sizes.sequences:
            if run.late():
                break
            with run.row("step", name, {"sequences": sequences, "context": sizes.context}) as row:
                ready = programs[name, sequences].result()
                if not operands:
                    model = random_parameters(abstract, config.initializer_range)
                    operands = [jax.tree.leaves(model), random_cache(config, sizes.blocks, options)]
                    del model

                def call(ready=ready, sequences=sequences, operands=operands) -> Any:
                    logits, chosen, operands[1] = ready.call(
                        operands[0], batches[sequences], operands[1]
                    )  # donated: in place
                    return logits, chosen

                logits, chosen = jax.block_until_ready(call())
                row["finite"] = bool(jnp.isfinite(logits).all())
                row["experts_used"] = experts_used(chosen)
                bytes_ = step_bytes(abstract, row["experts_used"], sequences, sizes.context)
                run.measure(row, ready, call, bytes_)
                if run.profile:
                    row["kernels"] = by_name(profiled(call))
                del logits, chosen
        operands.clear()
        gc.collect()


def measure_layers(run: Run) -> None:
    """One mixture-of-experts layer."""
    sizes, config = run.sizes, run.sizes.config
    layers = {name: layer_in(config, form) for name, form in run.forms.items()}
    rows = {count: jax.ShapeDtypeStruct((count, config.hidden_size), jnp.bfloat16) for count in sizes.tokens}

    def program(name: str, tokens: int) -> Program:
        leaves, structure = jax.tree.flatten(layers[name])
        return compile_(layer_call(structure, config, run.backend), leaves, rows[tokens])

    programs = run.compiled({(n, t): functools.partial(program, n, t) for n in run.forms for t in sizes.tokens})
    for name, abstract in layers.items():
        leaves: list[Any] = []
        for tokens in sizes.tokens:
            if run.late():
                break
            with run.row("layer", name, {"tokens": tokens}) as row:
                ready = programs[name, tokens].result()
                leaves = leaves or jax.tree.leaves(random_parameters(abstract, config.initializer_range))
                x = standard_normal(jax.random.key(3), rows[tokens].shape)
                call = functools.partial(ready.call, leaves, x)
                result, chosen = jax.block_until_ready(call())
                row["finite"] = bool(jnp.isfinite(result).all())
                row["experts_used"] = experts_used(chosen)
                bytes_ = weight_bytes(abstract, row["experts_used"]) | {"rows": 2 * x.nbytes}
                run.measure(row, ready, call, bytes_)
                del call, result, chosen
        leaves.clear()
        gc.collect()


PARTS = {"step": measure_steps, "layer": measure_layers}
"""The parts, in the order of their measurement."""


def main(argv: Sequence[str] | None = None) -> None:
    """The command."""
    start = time.monotonic()
    parser = command_line.parser(__doc__)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))
    parser.add_argument("--layers", type=int, help="of the model of the steps; default: 5, or 4 if those do not fit")
    parser.add_argument("--backend", choices=BACKENDS, default="auto")
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing further after this time")
    parser.add_argument("--profile", action="store_true", help="record the kernels of each step")
    parser.add_argument("--tiny", action="store_true", help="small shapes, for tests")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args(argv)

    def say(done: str) -> None:
        print(f"{time.monotonic() - start:6.0f} s: {done}", flush=True)

    if arguments.tiny:  # compiling is nearly all of it
        jax.config.update("jax_disable_most_optimizations", True)
    timer, timer_error = timing.device_timer()
    ceilings = roofline.measure(timer, Peers(), arguments.tiny)
    sizes = tiny_sizes() if arguments.tiny else full_sizes(arguments.layers or layers_for(available_bytes()[0]))
    content: dict[str, Any] = {
        **environment(),
        "timer": timer.name,
        "timer_trouble": timer_error,
        "ceilings": ceilings["ceilings"],
        "empty_call_seconds": ceilings["empty_call_seconds"],
        "layers": sizes.config.num_hidden_layers,
        "dense_layers": sizes.config.first_k_dense_replace,
        "forms": {name: form._asdict() for name, form in FORMS.items()},
        "rows": [],
    }
    pause = 0.0 if arguments.tiny else REST_SECONDS
    forms = {name: FORMS[name] for name in arguments.forms}
    deadline = start + arguments.seconds
    run = Run(sizes, arguments.backend, arguments.out, content, timer, forms, deadline, pause, arguments.profile)
    bandwidth = (ceilings["ceilings"]["copy"] or 0) / 1e12
    say(f"{timer.name}; {sizes.config.num_hidden_layers} layers; {bandwidth:.2f} TB/s")
    for part, measure in PARTS.items():
        if part not in arguments.parts:
            continue
        if run.late():
            say(f"{part}: not begun within {arguments.seconds:g} s")
            continue
        measure(run)
        say(f"{part}{', not all of it' if run.late() else ''}")


if __name__ == "__main__":
    command_line.run(main)
