"""The model over whole sequences [B, T] at once: what training runs, and ablations of the selection.

`dsv32_jax.model.model.step` reads keys through a block cache, each token its own list. Here the keys of a sequence are
those of the same call and a selection is a mask [B, T, T], so attention is two plain products, and all is
differentiable. The parameters' modules and their arithmetic are those of the step; a test holds the two against each
other.
"""

import dataclasses
from collections.abc import Callable
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache
from dsv32_jax.model.context import Batch, Options, StepContext
from dsv32_jax.model.mla import MLA
from dsv32_jax.model.model import DecoderLayer, DeepseekV32
from dsv32_jax.model.moe import MoE
from dsv32_jax.model.mtp import MTP
from dsv32_jax.model.numerics import Numerics
from dsv32_jax.model.parts import MODEL_PARTS, Parts
from dsv32_jax.model.rope import rope_angles
from dsv32_jax.model.seams import Seams
from pallas_kernels.matmul import dense
from pallas_kernels.quantize import dequantize, quantize

SELECTED = "selected"

SELECTION = ("index_select", "indexer_logits", "top_k")
ATTENTION = ("sparse_mla", "dense_mla", "cache_write")
DISPATCH = ("experts", "make_plan", "gather_rows", "grouped_matmul", "combine")
"""Parts that read the cache or the plan: where one of them is replaced, a layer's selection, attention or experts run
as those of the step, over a cache of these sequences alone."""


@dataclasses.dataclass(frozen=True)
class Run:
    """How a forward pass is computed; hashable.

    Attributes:
      attention: "sparse", or "dense": every visible position.
      index_topk: positions kept; the config's where None.
      compute_dtype: of activations.
      act_quant: FP8 activations, index keys and latents, as in `dsv32_jax.model.context.Options`.
      parts: the functions that the pass calls, as in `Options`; values are not checked.
      index_quant: FP8 index queries and keys (and the inputs of the indexer's linears); as `act_quant` where None.
      index_loss: compute the indexer's loss (KL of its softmax from the attention) in every layer.
      remat: recompute each layer in the backward pass instead of keeping its scores.
    """

    attention: str = "sparse"
    index_topk: int | None = None
    compute_dtype: str = "float32"
    act_quant: bool = False
    parts: Parts = MODEL_PARTS
    index_quant: bool | None = None
    index_loss: bool = False
    remat: bool = False

    def __post_init__(self):
        if self.attention not in ("sparse", "dense"):
            raise UserError(f"attention {self.attention!r} is unknown; it is one of sparse, dense")
        if self.index_loss and self.parts.replace_any(ATTENTION):
            names = " or ".join(ATTENTION)
            raise UserError(f"index_loss needs the attention's probabilities, which a replaced {names} does not give")

    @staticmethod
    def of(options: Options, **changes: Any) -> "Run":
        """What computes as a step with these options does; `changes` are other fields.

        Raises:
          UserError: layers share their selection, values are patched, or several devices run a step, which this form
            has not.
        """
        if options.mesh is not None:
            raise UserError(f"mesh {options.mesh}: the form for whole sequences runs on one device; leave it out")
        if options.patches.requests:
            raise UserError("patches: the form for whole sequences has none; take a model without them")
        if options.index_topk_freq > 1:
            raise UserError("index_topk_freq: the form for whole sequences has an indexer in every layer; set it to 1")
        shared = {field.name for field in dataclasses.fields(Run)} & {
            field.name for field in dataclasses.fields(Options)
        }
        return Run(**{**{name: getattr(options, name) for name in shared}, **changes})


@partial(jax.tree_util.register_dataclass, data_fields=["index_kl", "load", "balance"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class LayerReport:
    """What training wants to know of a layer.

    Attributes:
      index_kl: float32 scalar, KL(attention || softmax of the index scores), mean over tokens; 0 where not asked for.
      load: float32 [E], share of the choices that each expert got; [0] in a dense layer.
      balance: float32 scalar, the sequence-wise balance loss without its factor; 0 in a dense layer.
    """

    index_kl: jax.Array
    load: jax.Array
    balance: jax.Array


@dataclasses.dataclass(frozen=True)
class Sequences:
    """What every layer needs to know of the batch: B sequences of T tokens."""

    config: ModelConfig
    run: Run
    batch: int
    length: int

    @cached_property
    def seams(self) -> Seams:
        """The parts of this pass."""
        return Seams(self.run.parts)

    @cached_property
    def numerics(self) -> Numerics:
        """Of the pass."""
        return self.step(self.run.act_quant).numerics

    @cached_property
    def expanded_numerics(self) -> Numerics:
        """For products that the step has in another form, so that no replaced `matmul` sees them: kv_b and experts."""
        return dataclasses.replace(self.numerics, seams=Seams(self.run.parts.with_parts({"matmul": None})))

    @property
    def index_quant(self) -> bool:
        """Whether index queries and keys are in FP8."""
        return self.run.act_quant if self.run.index_quant is None else self.run.index_quant

    def step(self, act_quant: bool) -> StepContext:
        """The sequences as one step has them, in blocks of a cache one after the other."""
        numbers = jnp.arange(self.batch, dtype=jnp.int32)
        blocks = -(-self.length // BLOCK_SIZE)
        tables = numbers[:, None] * blocks + jnp.arange(blocks, dtype=jnp.int32)
        positions = self.positions
        sequence = jnp.repeat(numbers, self.length)
        slots = sequence * (blocks * BLOCK_SIZE) + positions
        batch = Batch(jnp.zeros_like(positions), positions, slots, sequence, tables, numbers)
        run = self.run
        options = Options(
            run.compute_dtype, act_quant, run.attention, run.index_topk, backend="reference", parts=run.parts
        )
        return StepContext(self.config, options, batch, self.seams)

    def cache(self, layer: int, ctx: StepContext) -> KVCache:
        """An empty cache for their step, which has no layer after this one."""
        return KVCache.create(self.config, ctx.batch.block_tables.size, ctx.options, layers=layer + 1)

    @property
    def positions(self) -> jax.Array:
        """int32 [B * T], of every token."""
        return jnp.tile(jnp.arange(self.length, dtype=jnp.int32), self.batch)

    @property
    def angles(self) -> tuple[jax.Array, jax.Array]:
        """RoPE's, of every token."""
        return rope_angles(self.config, self.positions)

    @property
    def visible(self) -> jax.Array:
        """bool [T, T], key s at or before query t."""
        return jnp.arange(self.length) <= jnp.arange(self.length)[:, None]

    @property
    def k(self) -> int:
        """Positions that a token attends to."""
        return self.run.index_topk or self.config.index_topk

    def split(self, x: jax.Array) -> jax.Array:
        """[B * T, ...] -> [B, T, ...]."""
        return x.reshape(self.batch, self.length, *x.shape[1:])


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def product(formula: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """einsum with a float32 result, whose gradient's products are in the operands' own dtype (and matrix units)."""
    return jnp.einsum(formula, x, y, precision="highest", preferred_element_type=jnp.float32)


def _product_forward(formula, x, y):
    return product(formula, x, y), (x, y)


def _product_backward(formula, operands, gradient):
    pull = jax.vjp(partial(jnp.einsum, formula, precision="highest"), *operands)[1]
    return pull(gradient.astype(jnp.result_type(*operands)))


product.defvjp(_product_forward, _product_backward)


def top_k_mask(scores: jax.Array, visible: jax.Array, k: int) -> jax.Array:
    """bool [..., T]: the k largest visible scores of each row, ties to the lowest position; `pallas_kernels.top_k` as a
    mask, at the cost of 32 counts instead of a sort.

    Args:
      scores: float32 [..., T], finite.
      visible: bool, broadcast to them.
      k: how many; a row with fewer visible keeps them all.
    """
    if k >= scores.shape[-1]:
        return jnp.broadcast_to(visible, scores.shape)
    bits = jax.lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    # Unsigned integers in the order of the floats; 0, below all of them, for what is not visible.
    keys = jnp.where(bits >> 31 == 1, ~bits, bits | jnp.uint32(1 << 31))
    keys = jnp.where(visible, keys, 0)

    def add_bit(n, threshold):
        candidate = threshold | (jnp.uint32(1) << (31 - n).astype(jnp.uint32))
        return jnp.where((keys >= candidate[..., None]).sum(-1) >= k, candidate, threshold)

    threshold = jax.lax.fori_loop(0, 32, add_bit, jnp.zeros(keys.shape[:-1], jnp.uint32))[..., None]
    above, equal = keys > threshold, keys == threshold
    room = k - above.sum(-1, keepdims=True)
    return (above | (equal & (jnp.cumsum(equal, -1) <= room))) & visible


def index_scores(attn: MLA, x: jax.Array, q_latent: jax.Array, seqs: Sequences) -> jax.Array:
    """The indexer's scores, float32 [B, T, T], of every pair (not masked)."""
    indexer, config = attn.indexer, seqs.config
    numerics = dataclasses.replace(seqs.numerics, act_quant=seqs.index_quant)
    queries, weights = indexer.queries(x, q_latent, seqs.angles, config, numerics)
    keys = indexer.keys(x, seqs.angles, numerics)
    if numerics.act_quant:
        keys = dequantize(*quantize(keys, numerics.scale_fmt, group=config.index_head_dim), keys.dtype)
    queries, keys, weights = map(seqs.split, (queries.astype(keys.dtype), keys, weights))

    def add_head(total, head):
        query, weight = head
        return total + weight[..., None] * jax.nn.relu(product("btd,bsd->bts", query, keys)), None

    start = jnp.zeros((seqs.batch, seqs.length, seqs.length), jnp.float32)
    heads = (jnp.moveaxis(queries, 2, 0), jnp.moveaxis(weights, 2, 0))
    return jax.lax.scan(jax.checkpoint(add_head), start, heads)[0]


def selection_mask(scores: jax.Array, seqs: Sequences) -> jax.Array | None:
    """bool [B, T, T] of what each token may attend to by index scores [B, T, T]; None for everything visible."""
    if seqs.run.attention == "dense" or seqs.k >= seqs.length:
        return None
    return kept(top_k_mask(scores, seqs.visible, seqs.k))


def kept(mask: jax.Array) -> jax.Array:
    """A selection, which has no gradient and is not computed again in the backward pass."""
    return checkpoint_name(jax.lax.stop_gradient(mask), SELECTED)


def replaced_selection(
    attn: MLA, x: jax.Array, q_latent: jax.Array, weights: Callable[[], jax.Array], layer: int, seqs: Sequences
) -> jax.Array:
    """bool [B, T, T] of what replaced parts choose, through `MLA.select`.

    Args:
      attn: the layer's attention.
      x: [B * T, D], normalised.
      q_latent: [B * T, q_lora_rank], normalised.
      weights: computes the probabilities of dense attention, mean over heads [B, T, T].
      layer: its number.
      seqs: of the batch.
    """
    ctx = seqs.step(seqs.index_quant)
    width = ctx.context_length

    def padded() -> jax.Array:
        return jnp.pad(weights().reshape(-1, seqs.length), ((0, 0), (0, width - seqs.length)))

    kv_a, index_key = ctx.numerics.matmul(x, attn.kv_a), ctx.numerics.matmul(x, attn.indexer.k)
    cache = attn.write(kv_a, index_key, layer, seqs.cache(layer, ctx), ctx)
    chosen = attn.select(x, q_latent, padded, layer, cache, ctx)
    rows = jnp.arange(len(chosen))[:, None]
    mask = jnp.zeros((len(chosen), width), bool).at[rows, jnp.where(chosen < 0, width, chosen)].set(True, mode="drop")
    return kept(seqs.split(mask)[..., : seqs.length] & seqs.visible)


def attention(attn: MLA, x: jax.Array, layer: int, seqs: Sequences) -> tuple[jax.Array, jax.Array]:
    """MLA with each head's own keys and values (the form of `MLA.unabsorbed`).

    Args:
      attn: the layer's attention.
      x: [B * T, D], normalised.
      layer: its number.
      seqs: of the batch.

    Returns:
      [B * T, D], and the indexer's loss: KL(p || softmax of its scores) over the positions attended to, p the attention
      probabilities summed over heads and normalised (DeepSeek-V3.2-Exp report, section 2.1), mean over tokens.
    """
    config, numerics, run = seqs.config, seqs.numerics, seqs.run
    if run.parts.replace_any(ATTENTION):
        ctx = seqs.step(run.act_quant)
        return attn(x, layer, seqs.cache(layer, ctx), ctx)[0], jnp.float32(0)
    q_latent, q_nope, q_rope = attn.queries(numerics.matmul(x, attn.q_a, "q_a"), seqs.angles, config, numerics)
    latent, rope_key = attn.latents(numerics.matmul(x, attn.kv_a, "kv_a"), seqs.angles, config, numerics)
    expanded = seqs.expanded_numerics.matmul(latent, attn.kv_b, "kv_b").reshape(
        x.shape[0], config.num_attention_heads, -1
    )
    k_nope, values = jnp.split(expanded, [config.qk_nope_head_dim], axis=-1)
    rope_key = jnp.broadcast_to(rope_key[:, None], (*k_nope.shape[:2], rope_key.shape[-1]))
    queries = seqs.split(jnp.concatenate([q_nope, q_rope], axis=-1))
    keys, values = seqs.split(jnp.concatenate([k_nope, rope_key], axis=-1)), seqs.split(values)
    products = product("bthd,bshd->bhts", queries, keys) * config.softmax_scale

    def softmax(mask: jax.Array) -> jax.Array:
        return jax.nn.softmax(jnp.where(mask[:, None], products, -jnp.inf), axis=-1)

    everything = jnp.broadcast_to(seqs.visible, (seqs.batch, seqs.length, seqs.length))
    # Detached: the indexer learns from its own loss alone, and the language loss never reaches it.
    inputs = (jax.lax.stop_gradient(x), jax.lax.stop_gradient(q_latent))
    scores, mask = None, None
    replaced = run.attention == "sparse" and run.parts.replace_any(SELECTION)
    if run.index_loss or (run.attention == "sparse" and seqs.k < seqs.length and not replaced):
        scores = index_scores(attn, *inputs, seqs)
        mask = None if replaced else selection_mask(scores, seqs)
    if replaced:
        mask = replaced_selection(attn, *inputs, lambda: softmax(everything).mean(1), layer, seqs)
    mask = everything if mask is None else mask
    probabilities = softmax(mask)
    if replaced:  # whoever chooses no key at all gets 0, as in the step, and a gradient without NaN
        chosen = mask.any(-1)[:, None, :, None]
        probabilities = jnp.where(chosen, softmax(mask | ~mask.any(-1, keepdims=True)), 0)
    out = product("bhts,bshd->bthd", probabilities.astype(values.dtype), values).astype(values.dtype)
    out = numerics.matmul(out.reshape(x.shape[0], -1), attn.o, "o")
    if not run.index_loss:
        return out, jnp.float32(0)
    assert scores is not None
    target = jax.lax.stop_gradient(probabilities.mean(1))
    log_index = jax.nn.log_softmax(jnp.where(mask, scores, -jnp.inf), axis=-1)
    # p log p is a constant of the gradient, but makes the number a KL: 0 where the indexer knows all.
    terms = jnp.where(target > 0, target * (jnp.log(jnp.where(target > 0, target, 1)) - log_index), 0)
    return out, terms.sum(-1).mean()


def experts(moe: MoE, x: jax.Array, seqs: Sequences) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The MoE layer with every expert computed for every token, weight 0 for those not chosen.

    For a few small experts that is less work on a GPU than moving rows, and its gradient is that of dense products.

    Returns:
      [B * T, D]; load [E]; the balance loss sum_e f_e P_e (V3 report, equations 17 to 20), mean over sequences.
    """
    config, numerics = seqs.config, seqs.numerics
    positions = seqs.positions
    chosen, weights = moe.route(x, positions, config, numerics)
    picked = jax.nn.one_hot(chosen, config.n_routed_experts, dtype=jnp.float32)  # [N, K, E]
    per_expert = (picked * weights[..., None]).sum(1)
    gates, ups, downs = moe.experts.weights
    one_expert = seqs.expanded_numerics

    def one(total, expert):
        gate, up, down, weight = expert
        rows = one_expert.matmul(one_expert.swiglu(x, gate, up), down, "down")
        return total + weight[:, None] * rows.astype(jnp.float32), None

    if seqs.run.parts.replace_any(DISPATCH):
        out = moe(x, positions, config, numerics)
    elif numerics.act_quant:  # the official arithmetic quantises each expert's own hidden rows: one expert at a time
        start = jnp.zeros(x.shape, jnp.float32)
        routed = jax.lax.scan(one, start, (gates, ups, downs, per_expert.T))[0]
        out = (routed + moe.shared(x, numerics).astype(jnp.float32)).astype(x.dtype)
    else:
        gate, up = (jnp.einsum("nd,ewd->new", x, dense(w, x.dtype), precision="highest") for w in (gates, ups))
        hidden = seqs.seams.call("swiglu", gate, up).astype(jnp.float32) * per_expert[..., None]
        routed = product("new,edw->nd", hidden.astype(x.dtype), dense(downs, x.dtype))
        out = (routed + moe.shared(x, numerics).astype(jnp.float32)).astype(x.dtype)

    chosen_share = seqs.split(picked.sum(1)).mean(1) / config.num_experts_per_tok  # [B, E]
    affinity = jax.nn.sigmoid(product("nd,ed->ne", x, moe.router.astype(x.dtype)))
    share = seqs.split(affinity / affinity.sum(-1, keepdims=True)).mean(1)
    balance = (config.n_routed_experts * jax.lax.stop_gradient(chosen_share) * share).sum(-1).mean()
    return out, chosen_share.mean(0), balance


def decoder_layer(
    layer: DecoderLayer, residual: jax.Array, update: jax.Array | None, number: int, seqs: Sequences
) -> tuple[jax.Array, jax.Array, LayerReport]:
    """`DecoderLayer.__call__` over whole sequences: residual and update [B * T, D], and the layer's report."""
    with seqs.seams.scope(f"layers.{number}"):
        return _decoder_layer(layer, residual, update, number, seqs)


def _decoder_layer(
    layer: DecoderLayer, residual: jax.Array, update: jax.Array | None, number: int, seqs: Sequences
) -> tuple[jax.Array, jax.Array, LayerReport]:
    eps, numerics = seqs.config.rms_norm_eps, seqs.numerics
    residual, x = numerics.add_rms_norm(residual, update, layer.attn_norm, eps)
    update, index_kl = attention(layer.attn, x, number, seqs)
    residual, x = numerics.add_rms_norm(residual, update, layer.ffn_norm, eps)
    if isinstance(layer.ffn, MoE):
        update, load, balance = experts(layer.ffn, x, seqs)
    else:
        update, load, balance = layer.ffn(x, numerics), jnp.zeros(0), jnp.float32(0)
    return residual, update, LayerReport(index_kl, load, balance)


def run_layer(layer: DecoderLayer, residual, update, number: int, seqs: Sequences):
    """`decoder_layer`, recomputed in the backward pass where the run says so; what was selected is kept."""
    if not seqs.run.remat:
        return decoder_layer(layer, residual, update, number, seqs)
    policy = None if seqs.run.attention == "dense" else jax.checkpoint_policies.save_only_these_names(SELECTED)
    recomputed = jax.checkpoint(
        lambda layer, residual, update: decoder_layer(layer, residual, update, number, seqs), policy=policy
    )
    return recomputed(layer, residual, update)


def hidden_states(model: DeepseekV32, ids: jax.Array, run: Run) -> tuple[jax.Array, list[LayerReport]]:
    """The states after the final norm [B, T, D] of token ids int32 [B, T], and a report of every layer."""
    seqs = Sequences(model.config, run, *ids.shape)
    residual, update = model.embed[ids.reshape(-1)].astype(run.compute_dtype), None
    reports = []
    for number, layer in enumerate(model.layers):
        residual, update, report = run_layer(layer, residual, update, number, seqs)
        reports.append(report)
    _, x = seqs.numerics.add_rms_norm(residual, update, model.norm, model.config.rms_norm_eps)
    seqs.seams.check_all_called()
    return seqs.split(x), reports


def mtp_states(
    mtp: MTP, embed: jax.Array, config: ModelConfig, states: jax.Array, next_ids: jax.Array, run: Run
) -> tuple[jax.Array, LayerReport]:
    """States [B, T, D] of the MTP module, which predict token t + 2; arguments as in `MTP.__call__`, over sequences.

    Args:
      mtp: the module; its own copies of embedding and head are not read.
      embed: [V, D], the main model's.
      config: the model's.
      states: [B, T, D], what `hidden_states` returns.
      next_ids: int32 [B, T], token t + 1.
      run: how.
    """
    seqs = Sequences(config, run, *next_ids.shape)
    numerics, eps = seqs.numerics, config.rms_norm_eps
    embedded = numerics.rms_norm(embed[next_ids.reshape(-1)].astype(run.compute_dtype), mtp.enorm, eps)
    state = numerics.rms_norm(states.reshape(embedded.shape), mtp.hnorm, eps)
    joined = numerics.matmul(jnp.concatenate([embedded, state], axis=-1), mtp.eh_proj, "eh_proj")
    residual, update, report = run_layer(mtp.layer, joined, None, config.num_hidden_layers, seqs)
    return seqs.split(numerics.add_rms_norm(residual, update, mtp.norm, eps)[1]), report


def log_likelihoods(states: jax.Array, head: jax.Array, targets: jax.Array) -> jax.Array:
    """float32 [B, T]: log softmax(states head^T) at `targets` int32 [B, T]; states [B, T, D], head [V, D]."""
    dtype = jnp.promote_types(states.dtype, head.dtype)
    logits = product("btd,vd->btv", states.astype(dtype), head.astype(dtype))
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, axis=-1)
