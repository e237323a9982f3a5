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
# # What the indexer looks at
#
# In every layer a small indexer scores all earlier positions for each token, and attention sees only the k best of
# them. Which are they? Does it find what dense attention would have looked at, do the layers agree, and what happens
# to a fact that was stated long ago? A few minutes on a laptop.

# %%
from itertools import pairwise

import matplotlib.pyplot as plt
import numpy as np

import dsv32_jax
from dsv32_jax import fidelity
from dsv32_jax.experiments.studies import held_out
from dsv32_jax.experiments.train_demo import evaluate
from dsv32_jax.model import variants

plt.style.use("dsv32_jax.experiments.notebooks.figures")

# %% tags=["parameters"]
TOPK = 256  # positions that a token attends to; the model was trained with 256
WINDOW = 2048  # tokens of a text, a multiple of 64 and more than TOPK
NEEDLES = 4  # texts with a fact hidden in them

# %% [markdown]
# `trace` runs a sequence as one step and keeps what each layer chose (`topk`) and what *dense* attention would have
# looked at (`attention`, mean over heads). Weights are dequantised, so that nothing but the selection is approximate.
# The text is from documents that the model never saw in training.

# %%
m = dsv32_jax.load("demo", dequantize="float32", index_topk=TOPK)
k, layers = TOPK, m.config.num_hidden_layers
ids = held_out.windows(m.tokenizer, WINDOW, NEEDLES)
trace = m.trace(ids[0])
print(trace)

# %% [markdown]
# ## The choice as a picture
#
# Tokens of the text run down, the positions that they may look at run across. The first k tokens see everything; after
# them the indexer must choose, and every row holds k chosen positions.

# %%
chosen = fidelity.membership(trace.topk, WINDOW)  # bool [layers, tokens, positions]
later = np.arange(k, WINDOW)  # tokens that cannot see everything
age = np.arange(WINDOW)[:, None] - np.arange(WINDOW)
far = np.array([(chosen_in_layer & (age >= k))[later].sum() / (k * len(later)) for chosen_in_layer in chosen])
print("share of the choice that lies further back than the last k, by layer:", far.round(3))

# %%
cell = 16
pooled = chosen.reshape(layers, WINDOW // cell, cell, WINDOW // cell, cell).mean((2, 4))
pooled = np.where(np.tri(WINDOW // cell, dtype=bool), pooled, np.nan)  # nobody sees the future
figure, grid = plt.subplots(2, 3, figsize=(10, 6.8), sharex=True, sharey=True)
for layer, axes in enumerate(grid.flat):
    shown = axes.imshow(pooled[layer], vmin=0, vmax=1, cmap="cividis_r", extent=(0, WINDOW, WINDOW, 0))
    axes.set_title(f"layer {layer}: {far[layer]:.0%} beyond the last {k}", fontsize=10)
figure.supxlabel("position looked at (tokens)")
figure.supylabel("token that looks (position)")
figure.colorbar(shown, ax=grid, label=f"share chosen, in squares of {cell} × {cell}", shrink=0.7)
figure.suptitle(f"{far.min():.0%} to {far.max():.0%} of a layer's choice lies beyond the last {k} tokens")
plt.show()

# %% [markdown]
# ## Does it find what attention would look at?
#
# Two measures, over tokens that cannot see everything. *Recall*: how many of the k positions with most dense attention
# the indexer chose. *Mass*: the share of dense attention that falls on the choice. Mass matters more: two positions of
# almost no attention may trade places and nothing changes. Beside it stand the best choice possible and the last k.

# %%
best = np.argpartition(-trace.attention, k - 1, axis=-1)[..., :k]
recent = np.arange(WINDOW)[:, None] - np.arange(k)
recent = np.broadcast_to(np.where(recent >= 0, recent, -1), best.shape)
choices = {"best possible": best, "indexer": trace.topk, f"last {k}": recent}
mass = {  # [layers, tokens]
    name: (trace.attention * fidelity.membership(choice, WINDOW)).sum(-1) for name, choice in choices.items()
}
recall = {name: fidelity.recall(best, choice, WINDOW) for name, choice in choices.items()}
mean_mass = {name: float(share[:, later].mean()) for name, share in mass.items()}
mean_recall = {name: float(share[:, later].mean()) for name, share in recall.items()}
for name in choices:
    print(f"{name:14} mass {mean_mass[name]:.3f}  recall {mean_recall[name]:.3f}")

# %%
edges = np.linspace(k, WINDOW, 9).astype(int)
middles = (edges[1:] + edges[:-1]) / 2
figure, (by_layer, by_position) = plt.subplots(1, 2, figsize=(10, 3.8), sharey=True)
for name, share in mass.items():
    by_layer.plot(range(layers), share[:, later].mean(1), label=name)
    parts = [share[:, low:high].mean() for low, high in pairwise(edges)]
    by_position.plot(middles, parts, label=name)
by_layer.set(xlabel="layer", ylabel="share of dense attention on the choice", ylim=(0, 1.02))
by_position.set(xlabel="position of the token that looks (tokens)")
by_layer.legend(loc="lower left")
figure.suptitle(
    f"{k} positions hold {mean_mass['indexer']:.0%} of dense attention if the indexer chooses them, "
    f"{mean_mass[f'last {k}']:.0%} if they are the last"
)
plt.show()

# %% [markdown]
# ## Do the layers agree?
#
# If two layers choose the same positions, one indexer could serve both: `load(..., index_topk_freq=2)` does that for
# every two. Here is the share of one layer's choice that another made as well, over tokens that cannot see everything;
# random choices of the same size give the yardstick.

# %%
overlap = np.array([[fidelity.recall(a[later], b[later], WINDOW).mean() for b in trace.topk] for a in trace.topk])
by_chance = float((k / (later + 1)).mean())
neighbours = float(np.diagonal(overlap, 1).mean())

figure, axes = plt.subplots(figsize=(5.6, 4.4))
shown = axes.imshow(overlap, vmin=0, vmax=1)
for (a, b), share in np.ndenumerate(overlap):
    axes.text(b, a, f"{share:.2f}", ha="center", va="center", color="white" if share < 0.5 else "black")
axes.set(xlabel="... that this layer chose too", ylabel="share of this layer's choice ...")
figure.colorbar(shown)
axes.set_title(f"Neighbouring layers share {neighbours:.0%} of their choice, by chance {by_chance:.0%}", fontsize=11)
plt.show()

# %% [markdown]
# ## What a needle looks like
#
# A fact ("The access code of the amber heron is 48213.") and three that resemble it are hidden in a text, and at its
# end stands a question about the first. The model has found it if greedy decoding gives every digit.

# %%
needles = evaluate.needles(m.tokenizer, ids, (WINDOW,), NEEDLES)
needles = [needle for needle in needles if needle.distance > k]
models = {"indexer": m, f"last {k}": m.with_parts(index_select=variants.recent)}


def answers(model, needle):
    """Whether greedy decoding would give every digit."""
    written = model.trace(needle.ids).logits.argmax(-1)[needle.answer - 1 : needle.length - 1]
    return bool((written == needle.ids[needle.answer : needle.length]).all())


rates = {name: float(np.mean([answers(model, needle) for needle in needles])) for name, model in models.items()}
print(f"found, of {len(needles)} needles more than {k} tokens before their question: {rates}")

# %% [markdown]
# When the model is about to write the first digit, where does each layer look? Tokens of the text around the fact, the
# darker the more layers chose them.

# %%
needle = needles[0]
asks = m.trace(needle.ids).topk[:, needle.answer - 1]  # what the last token of the question chose, by layer
chosen_by = fidelity.membership(asks, WINDOW)  # bool [layers, positions]
end = needle.answer - needle.distance  # behind the fact
fact = chosen_by[:, end - 8 : end].mean(1)
finder = int(fact.argmax())
print(f"{needle.distance} tokens later:", m.tokenizer.decode(needle.ids[needle.answer - 26 : needle.answer]))
print("share of the fact's last 8 tokens that a layer chose:", fact.round(2))

# %%
width, size, line, column, pieces = 90, 10, 0, 0, []  # characters of a line, points of a character
for position in range(max(0, end - 110), min(end + 60, needle.length)):
    piece = m.tokenizer.decode([needle.ids[position]]).replace("\n", "¶")
    if column + len(piece) > width:
        line, column = line + 1, 0
    pieces.append((line, column, piece, chosen_by[:, position].mean()))
    column += len(piece)

figure = plt.figure(figsize=(width * 0.602 * size / 72, (line + 3) * 1.6 * size / 72), dpi=110, layout="none")
axes = figure.add_axes((0, 0, 1, (line + 1) / (line + 3)), xlim=(0, width), ylim=(line + 1, 0))
axes.axis("off")
for row, start, piece, share in pieces:
    axes.add_patch(plt.Rectangle((start, row), len(piece), 0.95, color="#E69F00", alpha=share**0.5, linewidth=0))
    axes.text(start, row + 0.72, piece.replace("$", r"\$"), family="monospace", size=size)
others = np.delete(fact, finder).mean()
figure.suptitle(f"Layer {finder} chose {fact[finder]:.0%} of the fact's last tokens, the other layers {others:.0%}")
plt.show()

# %% [markdown]
# ## Conclusion

# %%
conclusion = {
    "mass_best": mean_mass["best possible"],
    "mass_indexer": mean_mass["indexer"],
    "mass_recent": mean_mass[f"last {k}"],
    "recall_indexer": mean_recall["indexer"],
    "recall_recent": mean_recall[f"last {k}"],
    "overlap_of_neighbours": neighbours,
    "overlap_by_chance": by_chance,
    "needles_indexer": rates["indexer"],
    "needles_recent": rates[f"last {k}"],
}
print(conclusion)
