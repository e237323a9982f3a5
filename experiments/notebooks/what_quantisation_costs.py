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
# # What quantisation costs
#
# The same weights in bfloat16, FP8, INT8 and INT4: how many bytes they take, what that does to the model's
# predictions, and which layer pays. INT4 also rounded with regard to its inputs (GPTQ). A few minutes on a laptop.

# %%
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import dsv32_jax
from dsv32_jax.convert.calibration import calibrate
from dsv32_jax.convert.quantization import quantize_model, uniform
from dsv32_jax.experiments.studies import held_out
from dsv32_jax.experiments.studies.quantization.measure import Ruler, dequantised, megabytes
from dsv32_jax.model.sequence import Run
from pallas_kernels.matmul import dense

plt.style.use("dsv32_jax.experiments.notebooks.figures")

# %% tags=["parameters"]
LENGTH = 512  # tokens of a window; a multiple of 4 windows is read
WINDOWS = 8
CALIBRATION = 4  # windows of other text that INT4 is calibrated on; 0 leaves that out

# %% [markdown]
# The demo ships in FP8, in blocks of 128 × 128 with one scale each. In bfloat16 it is exactly the same model, since the
# scales are powers of two, so bfloat16 is the base. `quantize_model` takes a scheme for each linear; `uniform` says the
# same for all. Embedding, head, router and norms stay as they are.

# %%
m = dsv32_jax.load("demo")
base = quantize_model(m.model, uniform(m.model, "bf16"))
models = {"bfloat16": base, "FP8": m.model}
models |= {name: quantize_model(base, uniform(base, name.lower())) for name in ("INT8", "INT4")}
sizes = {name: megabytes(model) for name, model in models.items()}
for name, size in sizes.items():
    print(f"{name:10} linears {size['linears']:5.1f} MB, the rest {size['rest']:.1f} MB")

# %% [markdown]
# ## One weight
#
# The weights lie on the steps of FP8, which grow with the value: see how far apart large ones are. INT8 has equal steps
# in a row, INT4 in a group of 128, so that their error is the same for small weights and for large ones.

# %%
plain = {name: np.asarray(dense(model.layers[3].attn.o, jnp.float32)) for name, model in models.items()}
print("layers.3.attn.o:", plain["bfloat16"].shape)

figure, grid = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
for axes, name in zip(grid, ("INT8", "INT4"), strict=True):
    row, rounded = plain["bfloat16"][0], plain[name][0]
    axes.plot(row, rounded - row, ".", markersize=3)
    axes.set(xlabel="weight in bfloat16")
    axes.set_title(f"{name}: rms error {np.std(rounded - row) / np.std(row):.1%} of the weights'")
grid[0].set(ylabel="error of rounding")
plt.show()

# %% [markdown]
# ## Calibration
#
# Plain rounding takes each weight to its nearest step. `calibrate` runs some text through the model and sums the second
# moments of what each linear gets; with them, INT4 is rounded column by column, and the columns that follow make up
# for the error so far. The text is none of those that the models are measured on.

# %%
windows = held_out.windows(m.tokenizer, LENGTH, WINDOWS + CALIBRATION)
ids, others = windows[:WINDOWS], windows[WINDOWS:]
if CALIBRATION:
    models["INT4, calibrated"] = quantize_model(base, uniform(base, "int4"), calibrate(m, others))
    sizes["INT4, calibrated"] = megabytes(models["INT4, calibrated"])

# %% [markdown]
# ## What it costs
#
# A `Ruler` keeps the base's predictions and compares others with them: perplexity of held-out text, and the KL of the
# next token's distribution in nats. Only weights are quantised here, but in one row: FP8 as the official code runs it
# quantises activations, index keys and latents too. The FP8 weights alone cost exactly nothing, because the base is
# what they stand for: what FP8 lost was lost when the checkpoint was made.

# %%
ruler = Ruler(dequantised(base), ids, keep=True)
costs = {name: ruler.measure(dequantised(model)) for name, model in models.items()}
costs["FP8, activations too"] = ruler.measure(m.model, Run(act_quant=True))
sizes["FP8, activations too"] = sizes["FP8"]
for name, cost in costs.items():
    numbers = f"perplexity {cost['perplexity']:7.3f}  KL {cost['kl']:.1e}  same token {cost['top1_agreement']:.1%}"
    print(f"{name:20} {numbers}")

# %%
quantised = [name for name in costs if costs[name]["kl"] > 0]
figure, axes = plt.subplots(figsize=(8, 3.8))
for name in quantised:
    axes.plot(sizes[name]["linears"], costs[name]["kl"], linestyle="none", markersize=9, label=name)
axes.set(yscale="log", xlabel="linears (MB)", ylabel="KL from bfloat16 (nats a token)", xlim=(0, 16))
axes.legend()
smallest = sizes["INT4"]["linears"] / sizes["bfloat16"]["linears"]
loss = {name: cost["perplexity"] / costs["bfloat16"]["perplexity"] - 1 for name, cost in costs.items()}
calibrated = f", calibrated {loss['INT4, calibrated']:+.1%}" if CALIBRATION else ""
axes.set_title(f"INT4 takes {smallest:.0%} of the bytes for {loss['INT4']:+.1%} perplexity{calibrated}")
plt.show()

# %% [markdown]
# ## Which layer pays
#
# One layer at a time in INT4, all others in bfloat16. The ruler starts at the changed layer: what comes before it is
# the base's.

# %%
schemes = uniform(base, "int4")
by_layer = []
for layer in range(m.config.num_hidden_layers):
    of_layer = {path: scheme for path, scheme in schemes.items() if path.startswith(f"layers.{layer}.")}
    changed = quantize_model(base, of_layer)
    by_layer.append(ruler.measure(dequantised(changed), first=layer)["kl"])

# %%
figure, axes = plt.subplots()
most = int(np.argmax(by_layer))
axes.bar(range(len(by_layer)), by_layer, color=np.where(by_layer == np.max(by_layer), "#D55E00", "#0072B2"))
axes.set(xlabel="layer in INT4", ylabel="KL from bfloat16 (nats a token)")
alone, together = sum(by_layer), costs["INT4"]["kl"]
axes.set_title(
    f"Layer {most} costs most; the layers' costs add up to {alone:.3f} nats, together they cost {together:.3f}"
)
plt.show()

# %% [markdown]
# ## Conclusion

# %%
conclusion = {
    "megabytes": {name: round(size["linears"], 2) for name, size in sizes.items()},
    "kl": {name: cost["kl"] for name, cost in costs.items()},
    "perplexity": {name: cost["perplexity"] for name, cost in costs.items()},
    "sum_of_layers": alone,
}
print(conclusion)
