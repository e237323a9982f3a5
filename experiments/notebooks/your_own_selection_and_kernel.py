# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Your own selection, your own kernel
#
# A part of the model is replaced by a function written here: first the choice of the positions that a token attends
# to, then a kernel. Each is checked, priced beside the model's own part, and timed. A few minutes on a laptop.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax.experimental import pallas as pl

import dsv32_jax
from dsv32_jax.experiments.bench.timer import device_timer
from dsv32_jax.experiments.workbench.cost import alternately, ratio
from dsv32_jax.experiments.workbench.quality import Reference, Texts
from dsv32_jax.experiments.workbench.steps import Step, StepShape
from dsv32_jax.model import variants
from pallas_kernels import indexer_logits
from pallas_kernels.matmul import silu_product

plt.style.use("dsv32_jax.experiments.notebooks.figures")

# %% tags=["parameters"]
TOPK = 256  # positions that a token attends to; the model was trained with 256
WINDOW = 1024  # tokens of a text, more than TOPK
WINDOWS, NEEDLES = 2, 4  # texts to read, and texts with a hidden fact
CONTEXT = 4096  # tokens in the cache of the step that is timed
ROUNDS = 10  # of timing
TIMED = ("indexer", "whole blocks", "last k", "my kernel")  # models whose steps are timed

# %%
m = dsv32_jax.load("demo", dequantize="float32", index_topk=TOPK)
texts = Texts.of(m, length=WINDOW, windows=WINDOWS, needle_windows=NEEDLES)
reference = Reference(m, texts)

# %% [markdown]
# ## A selection
#
# The indexer chooses single positions, wherever they lie. Memory likes neighbours: what if whole blocks of 16 were
# chosen, each by the best score in it? A selection has the signature of `pallas_kernels.index_select` and gives
# positions int32 [T, K], each at most once, none after the token's own, and -1 only behind all others. It may call the
# public ops: here the indexer's scores, which are -inf where a token cannot look.

# %%
BLOCK = 16


def whole_blocks(queries, head_weights, index, layer, block_tables, sequence, positions, *, k):
    """The k / 16 blocks of 16 positions with the best score in them."""
    scores = indexer_logits(queries, head_weights, index, layer, block_tables, sequence, positions)
    tokens, length = scores.shape
    best_of_block = scores.reshape(tokens, -1, BLOCK).max(-1)
    blocks = jax.lax.top_k(best_of_block, min(k, length) // BLOCK)[1]
    chosen = (blocks[:, :, None] * BLOCK + jnp.arange(BLOCK)).reshape(tokens, -1)
    visible = jnp.where(chosen <= positions[:, None], chosen, -1)
    return -jnp.sort(-visible)  # -1 goes to the end


# %% [markdown]
# `with_parts` makes another model, which shares all weights. With `check=True` the values that a part gives are checked
# wherever it is called: that is slow, so once, in one layer on some text, before anything is measured. A selection with
# -1 in between is told so.


# %%
def backwards(*arguments, k):
    """The same in the opposite order: -1 comes first."""
    return whole_blocks(*arguments, k=k)[:, ::-1]


embedded = m.weights["embed"][texts.ids[0, : TOPK // 2]]
for selection in (whole_blocks, backwards):
    try:
        m.with_parts(index_select=selection, check=True).run_layer(0, embedded)
        print(f"{selection.__name__}: keeps the contract")
    except dsv32_jax.UserError as error:
        print(f"{selection.__name__}: {error}")

# %% [markdown]
# ## Its price
#
# Perplexity of held-out text, KL of the next token's distribution from the model as it is, recall of what the indexer
# chose, the share of dense attention that falls on the choice, and facts hidden in a text that are answered.

# %%
models = {"indexer": m}
models["whole blocks"] = m.with_parts(index_select=whole_blocks)
models["last k"] = m.with_parts(index_select=variants.recent)
prices = {name: reference.measure(model) for name, model in models.items()}
for name, price in prices.items():
    needles = f"{price['needles']['answered']} of {price['needles']['of']} needles" if price["needles"] else ""
    numbers = "  ".join(f"{key} {price[key]:.3f}" for key in ("perplexity", "kl", "recall", "attention_mass"))
    print(f"{name:14} {numbers}  {needles}")

# %%
figure, grid = plt.subplots(1, 3, figsize=(10, 2.6), sharey=True)
labels = ("KL (nats a token)", "recall of the indexer's choice", "share of dense attention")
for axes, key, label in zip(grid, ("kl", "recall", "attention_mass"), labels, strict=True):
    bars = axes.barh(list(prices), [price[key] for price in prices.values()], color=["#0072B2", "#D55E00", "#009E73"])
    axes.bar_label(bars, fmt="%.3f", padding=3)
    axes.set(xlabel=label)
    axes.margins(x=0.25)
grid[0].invert_yaxis()
blocks_kl, last_kl = prices["whole blocks"]["kl"], prices["last k"]["kl"]
figure.suptitle(f"{TOPK} positions in blocks of {BLOCK} cost {blocks_kl:.3f} nats, the last {TOPK} {last_kl:.3f}")
plt.show()

# %% [markdown]
# Compare recall and mass. Recall counts positions, whether attention wants them or not; the mass counts attention.
# Which of the two goes with the KL?

# %% [markdown]
# ## A kernel
#
# Between the products of a feed-forward block stands silu(gate) * up, the part `swiglu`. As a Pallas kernel it reads a
# block of rows of each, and writes one. `interpret=True` runs it anywhere, as XLA operations, to get it right; its
# speed says nothing of a kernel. On a GPU leave that out. The project's own kernels are in Mosaic GPU, Pallas' dialect
# for Hopper: `docs/kernels` has a page for each.


# %%
def silu_kernel(gate_ref, up_ref, out_ref):
    """A block of rows: silu(gate) * up in float32, rounded once."""
    gate, up = (ref[...].astype(jnp.float32) for ref in (gate_ref, up_ref))
    out_ref[...] = (gate / (1 + jnp.exp(-gate)) * up).astype(out_ref.dtype)


def silu_product_of_mine(gate, up, rows=64):
    """silu(gate) * up of [M, W] arrays."""
    block = pl.BlockSpec((rows, gate.shape[1]), lambda number: (number, 0))
    call = pl.pallas_call(
        silu_kernel,
        out_shape=jax.ShapeDtypeStruct(gate.shape, gate.dtype),
        grid=(pl.cdiv(len(gate), rows),),
        in_specs=[block, block],
        out_specs=block,
        interpret=True,
    )
    return call(gate, up)


# %% [markdown]
# First against the reference, on values that reach further than the model's, and a number of rows that is no multiple
# of the block's. Then in the model: the KL of the whole model is what its rounding costs.

# %%
gate, up = 20 * jax.random.normal(jax.random.key(0), (2, 64 + 7, 256))
expected, got = silu_product(gate, up), silu_product_of_mine(gate, up)
error = float(jnp.abs(got - expected).max() / jnp.abs(expected).max())
models["my kernel"] = m.with_parts(swiglu=silu_product_of_mine)
prices["my kernel"] = reference.measure(models["my kernel"])
print(f"largest error {error:.1e} of the largest value; KL in the model {prices['my kernel']['kl']:.1e} nats a token")

# %% [markdown]
# ## Time
#
# One decode step on a cache of random keys, compiled once for each model. The steps take turns, so that a machine that
# slows down slows all of them; a difference counts if one is faster in every round. `dsv32 compare` and `dsv32 ablate`
# make tables of all these numbers, also of a function in a file of yours.

# %%
steps = {name: Step(models[name], StepShape(context=CONTEXT)) for name in TIMED}
timer, _ = device_timer()
times = dict(zip(steps, np.array(alternately(timer, list(steps.values()), ROUNDS)), strict=True))
speeds = {name: ratio(times["indexer"], seconds) for name, seconds in times.items() if name != "indexer"}
for name, speed in speeds.items():
    print(f"{name:14} {speed['median']:.2f} times the speed", "in every round" if speed["differs"] else "or the same")

# %%
figure, axes = plt.subplots(figsize=(8, 2.8))
rows = [1000 * seconds for seconds in times.values()]
axes.boxplot(rows, orientation="horizontal", tick_labels=list(times), whis=(0, 100))
axes.set(xlabel=f"decode step, {CONTEXT} tokens in the cache (ms), {jax.devices()[0].device_kind}", xlim=(0, None))
axes.invert_yaxis()
blocks = speeds["whole blocks"]
certain = "" if blocks["differs"] else ", within the spread"
axes.set_title(f"Whole blocks: {blocks['median']:.2f} times the speed of the indexer's choice{certain}")
plt.show()

# %% [markdown]
# ## Conclusion

# %%
conclusion = {
    "kl": {name: price["kl"] for name, price in prices.items()},
    "recall": {name: price["recall"] for name, price in prices.items()},
    "attention_mass": {name: price["attention_mass"] for name, price in prices.items()},
    "perplexity": {name: price["perplexity"] for name, price in prices.items()},
    "kernel_error": error,
    "milliseconds": {name: round(1000 * float(np.median(seconds)), 2) for name, seconds in times.items()},
}
print(conclusion)
