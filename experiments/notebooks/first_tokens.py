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
# # First tokens
#
# Load a small DeepSeek-V3.2 that ships with the package, let it write, watch it write, ask how surprised it is by a
# text, and look at the shapes of what is inside. A minute on a laptop; the first call of each kind compiles its
# program, which is most of that minute.

# %%
import matplotlib.pyplot as plt
import numpy as np

import dsv32_jax

plt.style.use("dsv32_jax.experiments.notebooks.figures")

# %% tags=["parameters"]
MODEL = "demo"  # or a directory with a checkpoint
OPTIONS = {}  # of `load`, for instance {"attention": "dense"}
NEW_TOKENS = 32

# %%
m = dsv32_jax.load(MODEL, **OPTIONS)
print(m)

# %% [markdown]
# ## Write
#
# A prompt is a text, a list of texts, or token ids; several are decoded together, and what one receives does not depend
# on the others. The same seed gives the same tokens; `temperature=0` is greedy.

# %%
prompt = "To install a package on Debian, you"
sampling = {"max_new_tokens": NEW_TOKENS, "temperature": 0.7, "top_p": 0.9, "seed": 1}
generation = m.generate(prompt, **sampling)
print(f"{prompt}|{generation.texts[0]}")
print("ended by:", generation.finish_reasons[0], "(stop: the model ended; length: no more tokens were asked for)")
print("tokens:", generation.tokens.dtype, generation.tokens.shape, "prompts, max_new_tokens; -1 after the end")

# %% [markdown]
# `stream` makes the same tokens, one piece at a time: its row, its token, and the text that it completes.

# %%
streamed = []
for piece in m.stream(prompt, **sampling):
    streamed.append(piece.token)
    print(piece.text, end="·")
is_same = generation.tokens[0, : len(streamed)].tolist() == streamed
print("\n\nthe same tokens as generate's:", is_same)

# %% [markdown]
# ## Score
#
# `score` gives the log-likelihood of every token after those before it, in nats. Its negative in bits is the surprise.
# Where does it sit? Look at beginnings and ends of words.

# %%
text = "A package manager reads a list of packages, finds those that a new package depends on, and unpacks their files."
ids = m.tokenizer.encode(text, bos=True)
score = m.score([ids])
shuffled = [ids[0], *np.random.default_rng(0).permutation(ids[1:]).tolist()]
perplexity_shuffled = m.score([shuffled]).perplexity
print(f"{len(ids)} tokens, log_likelihoods {score.log_likelihoods.shape}: one fewer, the first has nothing before it")
print(f"perplexity {score.perplexity:.1f}; of the same tokens in a random order {perplexity_shuffled:.0f}")

# %%
bits = -score.log_likelihoods[0] / np.log(2)
most_first = np.sort(bits)[::-1].cumsum()
half = int((most_first < most_first[-1] / 2).sum()) + 1

figure, axes = plt.subplots(figsize=(9, 3.2))
axes.bar(range(len(bits)), bits, color=np.where(bits >= np.sort(bits)[-half], "#D55E00", "#0072B2"))
axes.set_xticks(range(len(bits)), [m.tokenizer.decode([id]) for id in ids[1:]], rotation=90, fontsize=8)
axes.set(xlabel="token", ylabel="surprise (bits)", xlim=(-1, len(bits)))
axes.set_title(f"{half} of {len(bits)} tokens (orange) hold half of the surprise")
plt.show()

# %% [markdown]
# ## Shapes
#
# The names of the config are those of `config.json`. `tap_names` lists every value inside a step that can be looked
# at, with its dtype and its shape for 8 tokens; `m.probe(text, {name: None})` gives the value itself.

# %%
for name in ("num_hidden_layers", "hidden_size", "num_attention_heads", "kv_lora_rank", "index_topk", "vocab_size"):
    print(f"{name:20} {getattr(m.config, name)}")
print()
layer = f"layers.{m.config.num_hidden_layers - 1}."
for name, shape in m.tap_names().items():
    if name.startswith(layer) or not name.startswith("layers."):
        print(f"{name:35} {shape}")

# %% [markdown]
# The cache holds two things of each token and layer: one latent row, from which every head's key and value are made,
# and one key of the indexer. They lie in blocks of 64 tokens; here each row is a record of bytes or of floats, as the
# options say.

# %%
from dsv32_jax.model.cache import KVCache

cache = KVCache.create(m.config, 4, m.options)
for name, array in (("kv", cache.kv), ("index", cache.index)):
    print(f"{name:6} {array.dtype} {array.shape}: layers, blocks, ...")

# %% [markdown]
# What that saves is seen at the size of the real model. Beside its cache stands what keys and values of every head
# would take in bfloat16.

# %%
from dsv32_jax.config.model_config import PRESETS
from dsv32_jax.generate.memory import cache_bytes_per_token

real = PRESETS["671b"]
head_width = real.qk_nope_head_dim + real.qk_rope_head_dim + real.v_head_dim
every_head = 2 * real.num_hidden_layers * real.num_attention_heads * head_width
latent = cache_bytes_per_token(real)
smaller, smallest = every_head / latent["bfloat16"], every_head / min(latent.values())
sizes = {"keys and values, bfloat16": every_head} | latent

figure, axes = plt.subplots()
bars = axes.barh(list(sizes), [size / 1000 for size in sizes.values()], color=["#D55E00"] + 4 * ["#0072B2"])
axes.bar_label(bars, fmt="%.0f kB", padding=3)
axes.set(xlabel="cache of a token (kB), all layers of the 671B model")
axes.set_title(f"Latent rows take {smaller:.0f} times less than keys and values of every head, {smallest:.0f} in FP8")
axes.invert_yaxis()
plt.show()

# %% [markdown]
# ## Conclusion

# %%
conclusion = {
    "streamed_equals_generated": is_same,
    "perplexity": score.perplexity,
    "perplexity_shuffled": perplexity_shuffled,
    "cache_saving": smallest,
}
print(conclusion)
