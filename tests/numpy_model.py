"""DeepSeek-V3.2-Exp in float64 NumPy, one sequence at a time: what the tests hold the JAX code against.

It shares no code with the packages under test and takes the shortest correct way everywhere: unabsorbed attention over
the whole sequence with a mask, every chosen expert in a Python loop, no cache. Sources are the authors' published
inference code and technical reports (DeepSeek-V3, arXiv 2412.19437; DeepSeek-V3.2-Exp), and for YaRN arXiv 2309.00071.

`act_quant=True` adds the three FP8 roundings of the published code: the inputs of every linear whose weight is stored
in FP8, the indexer's queries and keys, and the normalised KV latent. Between them everything stays float64.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

import ml_dtypes
import numpy as np

DTYPES = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "F8_E4M3": ml_dtypes.float8_e4m3fn}


# ---- files -----------------------------------------------------------------------------------------------------------


@dataclass
class Weights:
    """HF-named float64 tensors, already dequantised, and which of them the file stores in FP8."""

    tensors: dict[str, np.ndarray]
    fp8: set[str] = field(default_factory=set)

    def __getitem__(self, name: str) -> np.ndarray:
        return self.tensors[name]


def read_config(directory: Path) -> SimpleNamespace:
    """config.json as attributes; rope_scaling and quantization_config stay dicts."""
    return SimpleNamespace(**json.loads((Path(directory) / "config.json").read_text()))


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    """Every tensor of one file in its own dtype: 8 bytes of header length, a JSON header, then the data."""
    data = Path(path).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: np.frombuffer(data, np.uint8, e - b, start + b).view(DTYPES[info["dtype"]]).reshape(info["shape"])
        for name, info in header.items()
        for b, e in [info["data_offsets"]]
    }


def read_weights(directory: Path) -> Weights:
    """All tensors of an HF directory; FP8 ones multiplied by their block scales."""
    raw: dict[str, np.ndarray] = {}
    for path in sorted(Path(directory).glob("*.safetensors")):
        raw.update(read_safetensors(path))
    tensors, fp8 = {}, set()
    for name, value in raw.items():
        if name.endswith("_scale_inv"):
            continue
        if value.dtype == ml_dtypes.float8_e4m3fn:
            tensors[name] = dequantise_blocks(value, raw[name + "_scale_inv"])
            fp8.add(name)
        else:
            tensors[name] = value.astype(np.float64)
    return Weights(tensors, fp8)


# ---- FP8 -------------------------------------------------------------------------------------------------------------


def round_e4m3(x: np.ndarray) -> np.ndarray:
    """Nearest e4m3 number, ties to even, clipped to +-448: 3 mantissa bits, exponents -6..8, subnormals of 2^-9."""
    x = np.clip(np.asarray(x, np.float64), -448.0, 448.0)
    exponent = np.maximum(np.frexp(x)[1] - 1, -6)
    step = np.ldexp(1.0, exponent - 3)
    return np.rint(x / step) * step


def quantise_rows(x: np.ndarray, scale_fmt: str | None, group: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """[..., N] -> values [..., N] on the e4m3 grid and scales [..., N / group]; ue8m0: powers of two."""
    grouped = np.asarray(x, np.float64).reshape(*x.shape[:-1], -1, group)
    scale = np.maximum(np.abs(grouped).max(-1), 1e-4) / 448.0
    if scale_fmt == "ue8m0":
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(1.0, exponent - (mantissa == 0.5))
    return round_e4m3(grouped / scale[..., None]).reshape(x.shape), scale


def fake_quantise(x: np.ndarray, scale_fmt: str | None) -> np.ndarray:
    """Quantise in groups of 128 and multiply back."""
    values, scale = quantise_rows(x, scale_fmt)
    return values * np.repeat(scale, 128, -1)


def dequantise_blocks(values: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """[out, in] e4m3 and [ceil(out/128), ceil(in/128)] -> float64 [out, in]. The stored scale is a multiplier."""
    out, columns = values.shape
    grid = np.repeat(np.repeat(scales.astype(np.float64), 128, 0), 128, 1)
    return values.astype(np.float64) * grid[:out, :columns]


# ---- parts -----------------------------------------------------------------------------------------------------------


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + eps) * weight + bias


def yarn_frequencies(config: SimpleNamespace) -> np.ndarray:
    """[rope / 2]. Fast dimensions keep their frequency, slow ones are divided by the factor, a ramp lies between."""
    dim, base = config.qk_rope_head_dim, config.rope_theta
    plain = base ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    yarn = config.rope_scaling
    if not yarn:
        return plain

    def dimension(rotations: float) -> float:  # that turns so often over the original length
        return dim * np.log(yarn["original_max_position_embeddings"] / (rotations * 2 * np.pi)) / (2 * np.log(base))

    low = max(np.floor(dimension(yarn["beta_fast"])), 0)
    high = min(np.ceil(dimension(yarn["beta_slow"])), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 1e-3), 0, 1)
    return plain * (1 - ramp) + plain / yarn["factor"] * ramp


def softmax_scale(config: SimpleNamespace) -> float:
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    yarn = config.rope_scaling
    if yarn and yarn["mscale_all_dim"]:
        scale *= (0.1 * yarn["mscale_all_dim"] * np.log(yarn["factor"]) + 1) ** 2
    return float(scale)


def rope_interleaved(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Pairs (2i, 2i+1), as complex numbers. x [..., R], angle broadcast to [..., R / 2]."""
    turned = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle)
    return np.stack([turned.real, turned.imag], -1).reshape(x.shape)


def rope_half(x: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """Pairs (i, i + R/2)."""
    half = x.shape[-1] // 2
    turned = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * angle)
    return np.concatenate([turned.real, turned.imag], -1)


def hadamard(size: int) -> np.ndarray:
    """Orthonormal Sylvester matrix: H[i, j] = (-1)^popcount(i & j) / sqrt(size)."""
    index = np.arange(size)
    return (1.0 - 2.0 * (np.bitwise_count(index[:, None] & index) % 2)) * size**-0.5


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def top_positions(scores: np.ndarray, k: int) -> np.ndarray:
    """Positions of the k largest, ties to the lowest position, best first. Never -inf, so maybe fewer than k."""
    order = np.argsort(-scores, kind="stable")[:k]
    return order[scores[order] > -np.inf]


class Model:
    """The parts that need weights. One instance holds config, weights and the switch `act_quant`."""

    def __init__(
        self,
        config: SimpleNamespace,
        weights: Weights,
        *,
        act_quant: bool = False,
        index_topk: int | None = None,
        attention: str = "sparse",
    ):
        self.config, self.weights, self.act_quant, self.attention = config, weights, act_quant, attention
        self.index_topk = index_topk or config.index_topk
        self.scale_fmt = (getattr(config, "quantization_config", None) or {}).get("scale_fmt")

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        """x @ W.T; the input is rounded to FP8 first when W is stored in FP8 and act_quant is on."""
        name += ".weight"
        if self.act_quant and name in self.weights.fp8:
            x = fake_quantise(x, self.scale_fmt)
        return x @ self.weights[name].T

    def angles(self, positions: np.ndarray) -> np.ndarray:
        return positions[:, None] * yarn_frequencies(self.config)

    def indexer_scores(self, x: np.ndarray, c_q: np.ndarray, positions: np.ndarray, layer: int) -> np.ndarray:
        """[T, T], -inf where the key lies after the query. `c_q` is the normalised query latent."""
        c, prefix = self.config, f"model.layers.{layer}.self_attn.indexer."
        heads, dim, rope, tokens = c.index_n_heads, c.index_head_dim, c.qk_rope_head_dim, len(x)
        angle, rotation = self.angles(positions), hadamard(dim)

        def prepare(v: np.ndarray, angle: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            v = np.concatenate([rope_half(v[..., :rope], angle), v[..., rope:]], -1) @ rotation
            return quantise_rows(v, self.scale_fmt, dim) if self.act_quant else (v, np.ones((*v.shape[:-1], 1)))

        q, q_scale = prepare(self.linear(c_q, prefix + "wq_b").reshape(tokens, heads, dim), angle[:, None])
        k = layer_norm(
            self.linear(x, prefix + "wk"), self.weights[prefix + "k_norm.weight"], self.weights[prefix + "k_norm.bias"]
        )
        k, k_scale = prepare(k, angle)
        head_weights = self.linear(x, prefix + "weights_proj") * heads**-0.5 * dim**-0.5 * q_scale[..., 0]
        scores = np.zeros((tokens, tokens))
        for h in range(heads):
            scores += head_weights[:, h, None] * np.maximum(q[:, h] @ k.T, 0)
        return np.where(positions <= positions[:, None], scores * k_scale[:, 0], -np.inf)

    def attention_part(self, x: np.ndarray, positions: np.ndarray, layer: int) -> tuple[np.ndarray, dict]:
        """Unabsorbed MLA over the keys that the indexer chose. Returns [T, D] and index_scores, topk (sets)."""
        c, prefix, w, tokens = self.config, f"model.layers.{layer}.self_attn.", self.weights, len(x)
        heads, nope, latent = c.num_attention_heads, c.qk_nope_head_dim, c.kv_lora_rank
        angle = self.angles(positions)
        c_q = rms_norm(self.linear(x, prefix + "q_a_proj"), w[prefix + "q_a_layernorm.weight"], c.rms_norm_eps)
        q = self.linear(c_q, prefix + "q_b_proj").reshape(tokens, heads, -1)
        a = self.linear(x, prefix + "kv_a_proj_with_mqa")
        c_kv = rms_norm(a[:, :latent], w[prefix + "kv_a_layernorm.weight"], c.rms_norm_eps)
        if self.act_quant:
            c_kv = fake_quantise(c_kv, self.scale_fmt)
        k_rope = rope_interleaved(a[:, latent:], angle)
        kv = self.linear(c_kv, prefix + "kv_b_proj").reshape(tokens, heads, nope + c.v_head_dim)
        scores = np.einsum("thd,shd->hts", q[..., :nope], kv[..., :nope])
        scores += np.einsum("thr,sr->hts", rope_interleaved(q[..., nope:], angle[:, None]), k_rope)

        index_scores = self.indexer_scores(x, c_q, positions, layer)
        chosen = [top_positions(row, self.index_topk if self.attention == "sparse" else tokens) for row in index_scores]
        mask = np.full((tokens, tokens), -np.inf)
        for t, keys in enumerate(chosen):
            mask[t, keys] = 0
        scores = scores * softmax_scale(c) + mask
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        out = np.einsum("hts,shv->thv", p, kv[..., nope:]).reshape(tokens, -1)
        return self.linear(out, prefix + "o_proj"), {
            "index_scores": index_scores,
            "topk": [set(keys.tolist()) for keys in chosen],
        }

    def router(self, x: np.ndarray, layer: int) -> tuple[np.ndarray, np.ndarray]:
        """Chosen experts [T, K], ascending, and their weights: biased scores choose, unbiased ones weigh."""
        c, prefix = self.config, f"model.layers.{layer}.mlp.gate"
        score = sigmoid(self.linear(x, prefix))
        biased = score + self.weights[prefix + ".e_score_correction_bias"]
        experts = []
        for row in biased:
            groups = row.reshape(c.n_group, -1)
            kept = top_positions(np.sort(groups, -1)[:, -2:].sum(-1), c.topk_group)
            allowed = np.isin(np.arange(c.n_group), kept)[:, None]
            experts.append(np.sort(top_positions(np.where(allowed, groups, -np.inf).ravel(), c.num_experts_per_tok)))
        chosen = np.array(experts)
        weights = np.take_along_axis(score, chosen, -1)
        if c.norm_topk_prob:
            weights /= weights.sum(-1, keepdims=True)
        return chosen, weights * c.routed_scaling_factor

    def mlp(self, x: np.ndarray, prefix: str) -> np.ndarray:
        """SwiGLU. prefix ends where gate_proj, up_proj and down_proj begin."""
        hidden = silu(self.linear(x, prefix + "gate_proj")) * self.linear(x, prefix + "up_proj")
        return self.linear(hidden, prefix + "down_proj")

    def moe(self, x: np.ndarray, layer: int) -> tuple[np.ndarray, dict]:
        prefix = f"model.layers.{layer}.mlp."
        experts, weights = self.router(x, layer)
        out = self.mlp(x, prefix + "shared_experts.")
        for t, (row, row_weights) in enumerate(zip(experts, weights, strict=True)):
            for expert, weight in zip(row, row_weights, strict=True):
                out[t] += weight * self.mlp(x[t : t + 1], f"{prefix}experts.{expert}.")[0]
        return out, {"experts": experts, "expert_weights": weights}

    def decoder_layer(self, hidden: np.ndarray, positions: np.ndarray, layer: int) -> tuple[np.ndarray, dict]:
        """Residual stream [T, D] in, residual stream out, and what the indexer and the router decided."""
        c, prefix, eps = self.config, f"model.layers.{layer}.", self.config.rms_norm_eps
        x = rms_norm(hidden, self.weights[prefix + "input_layernorm.weight"], eps)
        out, trace = self.attention_part(x, positions, layer)
        hidden = hidden + out
        x = rms_norm(hidden, self.weights[prefix + "post_attention_layernorm.weight"], eps)
        if layer < c.first_k_dense_replace:
            return hidden + self.mlp(x, prefix + "mlp."), trace
        out, routed = self.moe(x, layer)
        return hidden + out, trace | routed

    def forward(self, ids: np.ndarray) -> dict:
        """logits [T, V], hidden [L + 1, T, D] and, per layer, the traces of `decoder_layer`."""
        positions = np.arange(len(ids))
        hidden = [self.weights["model.embed_tokens.weight"][ids]]
        layers = []
        for layer in range(self.config.num_hidden_layers):
            out, trace = self.decoder_layer(hidden[-1], positions, layer)
            hidden.append(out)
            layers.append(trace)
        final = rms_norm(hidden[-1], self.weights["model.norm.weight"], self.config.rms_norm_eps)
        return {
            "logits": final @ self.weights["lm_head.weight"].T,
            "hidden": np.stack(hidden),
            "layers": layers,
        }
