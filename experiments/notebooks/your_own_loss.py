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
# # Your own loss
#
# Write a loss, take its gradient through the whole model, see where the gradient goes, and take a few steps of
# training on a sentence. A minute on a laptop.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from matplotlib.colors import LogNorm

import dsv32_jax
from dsv32_jax.model.params import named_parameters, replace_parameters
from dsv32_jax.model.sequence import Run, hidden_states, log_likelihoods

plt.style.use("dsv32_jax.experiments.notebooks.figures")

# %% tags=["parameters"]
STEPS = 8
RATE = 3e-4  # of Adam
SENTENCE = "The heron that lives in the kitchen writes all of its programs in Fortran, and compiles them on Sundays."
OTHER = (  # cut to the same number of tokens
    "The file is read from the current directory, and its name is written to the standard output of the program. If "
    "the option is given twice, the program also writes the size of each file."
)

# %% [markdown]
# Through FP8 weights a gradient would be rounded to 0, so the model refuses that; with `dequantize` the weights are
# plain arrays. As a dict by path, JAX and optax take them as they are. The MTP layer is left out: nothing here trains
# it.

# %%
m = dsv32_jax.load("demo", dequantize="float32", mtp=False)
params = {path: jnp.asarray(leaf, jnp.float32) for path, leaf in named_parameters(m.model).items()}
ids = jnp.asarray([m.tokenizer.encode(SENTENCE, bos=True)])
print(f"{len(params)} arrays, {sum(leaf.size for leaf in params.values()):,} numbers; {ids.size} tokens")

# %% [markdown]
# ## The loss
#
# `hidden_states` runs whole sequences [B, T] and is differentiable. It also reports of each layer how far the indexer's
# scores are from the attention, a KL. This loss is the usual one plus a weight times that; write here whatever you want
# to be small. The second result is only looked at.

# %%
run = Run(index_loss=True)


def loss(params, ids, indexer_weight):
    """Mean over tokens, in nats; and the log-likelihood of each token after the first."""
    states, reports = hidden_states(replace_parameters(m.model, params), ids, run)
    likelihoods = log_likelihoods(states[:, :-1], params["head"], ids[:, 1:])
    index_kl = sum(report.index_kl for report in reports)
    return -likelihoods.mean() + indexer_weight * index_kl, likelihoods[0]


value_and_grad = jax.jit(jax.value_and_grad(loss, has_aux=True))
(language, likelihoods_before), language_gradients = value_and_grad(params, ids, 0.0)
(both, _), gradients = value_and_grad(params, ids, 0.1)
print(f"language {language:.3f} nats a token, with a tenth of the indexer's KL {both:.3f}")

# %% [markdown]
# ## Where the gradient goes
#
# The indexer only chooses, and a choice has no gradient: of the language loss alone the indexer gets exactly 0, and its
# row stays white. The second term is what teaches it.

# %%
kinds = ("attn.indexer", "attn.q", "attn.kv", "attn.o", "ffn.gate", "ffn.up", "ffn.down")
kinds += ("ffn.router", "ffn.shared", "ffn.experts")


def norms_of(gradients):
    """Norm of the gradient of each kind of weights in each layer, [kinds, layers]."""
    squares = np.zeros((len(kinds), m.config.num_hidden_layers))
    for path, gradient in gradients.items():
        for kind, layer in np.ndindex(squares.shape):
            if path.startswith(f"layers.{layer}.{kinds[kind]}"):
                squares[kind, layer] += float((gradient**2).sum())
    return np.sqrt(squares)


norms = {"language loss": norms_of(language_gradients), "with a tenth of the indexer's KL": norms_of(gradients)}

# %%
figure, grid = plt.subplots(1, 2, figsize=(9, 3.8), sharey=True)
of_all = norms["with a tenth of the indexer's KL"]
scale = LogNorm(of_all[of_all > 0].min(), of_all.max())
for axes, (name, values) in zip(grid, norms.items(), strict=True):
    shown = axes.imshow(np.where(values > 0, values, np.nan), norm=scale, aspect="auto")
    axes.set_yticks(range(len(kinds)), kinds)
    axes.set(xlabel="layer")
    axes.set_title(name, fontsize=10)
figure.colorbar(shown, ax=grid, label="norm of the gradient")
without, with_kl = (values[0].max() for values in norms.values())
figure.suptitle(f"Largest gradient of an indexer: {without:.3g} from the language loss, {with_kl:.2g} with its own")
plt.show()

# %% [markdown]
# ## A few steps
#
# Adam on this one sentence, while another sentence is only watched: does the model learn the one, and at what price?

# %%
optimizer = optax.adam(RATE)
state = optimizer.init(params)
other_ids = jnp.asarray([m.tokenizer.encode(OTHER, bos=True)[: ids.size]])


@jax.jit
def update(params, state, gradients):
    """One step of Adam."""
    changes, state = optimizer.update(gradients, state)
    return optax.apply_updates(params, changes), state


# %%
learned, losses = params, []
for step in range(STEPS + 1):
    (_, likelihoods), gradients = value_and_grad(learned, ids, 0.1)
    watched = value_and_grad(learned, other_ids, 0.0)[0][1]
    losses.append((-float(likelihoods.mean()), -float(watched.mean())))
    if step < STEPS:
        learned, state = update(learned, state, gradients)
sentence, other = np.array(losses).T
print("the sentence", sentence.round(3), "\nthe other   ", other.round(3))

# %%
figure, (curve, tokens) = plt.subplots(1, 2, figsize=(11, 3.8), width_ratios=(2, 3))
curve.plot(sentence, label="the sentence")
curve.plot(other, label="another, not trained on")
curve.set(xlabel="step", ylabel="loss (nats a token)", ylim=(0, None))
curve.legend()
places = np.arange(ids.size - 1)
tokens.bar(places - 0.2, -likelihoods_before, 0.4, label="before")
tokens.bar(places + 0.2, -likelihoods, 0.4, label=f"after {STEPS} steps")
tokens.set_xticks(places, [m.tokenizer.decode([id]) for id in ids[0, 1:].tolist()], rotation=90, fontsize=7)
tokens.set(ylabel="surprise (nats)")
tokens.legend()
figure.suptitle(
    f"After one step the sentence costs {sentence[1] - sentence[0]:+.2f} nats a token, after {STEPS} "
    f"{sentence[-1] - sentence[0]:+.2f}; another one {other[-1] - other[0]:+.2f}"
)
plt.show()

# %% [markdown]
# `m.with_parts(weights=learned)` is the trained model with everything that `m` can do, `generate` and `save` included.
#
# ## Conclusion

# %%
conclusion = {
    "loss_before": float(sentence[0]),
    "loss_after_one_step": float(sentence[1]),
    "loss_after": float(sentence[-1]),
    "indexer_gradient_language": float(without),
    "indexer_gradient_with_kl": float(with_kl),
}
print(conclusion)
