"""Calls of `cache_write` with NaN in every slot, so that whatever is not written stays recognisable."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np

from pallas_kernels.cache_format import index_block_bytes, read_index_keys, read_latents, record_bytes
from pallas_kernels.cache_write import KeyNorms, cache_write
from tests import numpy_model

BLOCK, LAYERS, EPS = 64, 2, 1e-6
FLOATS = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16}


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of the op; `index_form` and `kv_form` are "float32", "bfloat16" or "fp8"."""

    name: str
    kv: np.ndarray
    index: np.ndarray
    layer: int
    slots: np.ndarray
    kv_a: np.ndarray
    index_key: np.ndarray
    latent_weight: np.ndarray
    index_weight: np.ndarray
    index_bias: np.ndarray
    angle: np.ndarray
    quantize_latent: bool
    scale_fmt: str | None

    @property
    def angles(self) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin."""
        return np.cos(self.angle).astype(np.float32), np.sin(self.angle).astype(np.float32)

    @property
    def arguments(self) -> tuple:
        """Arrays, as `run` takes them."""
        weights = (self.latent_weight, self.index_weight, self.index_bias)
        return (self.kv, self.index, self.slots, self.kv_a, self.index_key, *weights, *self.angles)

    @property
    def written(self) -> np.ndarray:
        """Rows of the batch that reach the cache."""
        return (self.slots >= 0) & (self.slots < self.kv.shape[1] * BLOCK)

    @property
    def rope_dim(self) -> int:
        """Features of the rope key."""
        return 2 * self.angle.shape[1]


def run(case: Case, backend: str, arguments: tuple | None = None, layer: int | jax.Array | None = None):
    """`cache_write` of the case; of `arguments` in place of its own where they are given."""
    kv, index, slots, kv_a, index_key, *weights, cos, sin = arguments or map(jnp.asarray, case.arguments)
    return cache_write(
        kv,
        index,
        case.layer if layer is None else layer,
        slots,
        kv_a,
        index_key,
        KeyNorms(*weights, EPS, EPS),
        (cos, sin),
        quantize_latent=case.quantize_latent,
        scale_fmt=case.scale_fmt,
        backend=backend,
    )


def case(
    name: str,
    slots: np.ndarray | list[int],
    *,
    blocks: int,
    kv_form: str = "fp8",
    index_form: str = "fp8",
    dtype: str = "bfloat16",
    weights: tuple[str, str, str] = ("float32",) * 3,
    layer: int = 0,
    quantize_latent: bool = True,
    scale_fmt: str | None = "ue8m0",
    dims: tuple[int, int, int] = (512, 64, 128),
    seed: int = 0,
) -> Case:
    """Random tokens, whose sizes differ by powers of e, into caches of NaN.

    Args:
      name: of the case.
      slots: of the tokens.
      blocks: of the cache.
      kv_form: of the latent rows.
      index_form: of the index keys.
      dtype: of the projections.
      weights: dtypes of latent weight, index weight and index bias.
      layer: where to write.
      quantize_latent: see the op.
      scale_fmt: see the op.
      dims: latent, rope and index width.
      seed: of the numbers.
    """
    latent, rope, dim = dims
    rng = np.random.default_rng(seed)
    slots = np.asarray(slots, np.int32)
    sizes = np.exp(2 * rng.standard_normal((len(slots), 1)))
    if kv_form == "fp8":
        kv = np.full((LAYERS, blocks, BLOCK, record_bytes(latent, rope)), 0xFF, np.uint8)
    else:
        kv = np.full((LAYERS, blocks, BLOCK, latent + rope), np.nan, FLOATS[kv_form])
    if index_form == "fp8":
        index = np.full((LAYERS, blocks, index_block_bytes(dim)), 0xFF, np.uint8)
    else:
        index = np.full((LAYERS, blocks, BLOCK, dim), np.nan, FLOATS[index_form])
    latent_weight, index_weight, index_bias = (FLOATS[form] for form in weights)
    return Case(
        name,
        kv,
        index,
        layer,
        slots,
        (sizes * rng.standard_normal((len(slots), latent + rope))).astype(FLOATS[dtype]),
        (sizes * (rng.standard_normal((len(slots), dim)) + 0.5)).astype(FLOATS[dtype]),
        (1 + 0.3 * rng.standard_normal(latent)).astype(latent_weight),
        (1 + 0.3 * rng.standard_normal(dim)).astype(index_weight),
        (0.2 * rng.standard_normal(dim)).astype(index_bias),
        rng.uniform(0, 2 * np.pi, (len(slots), rope // 2)),
        quantize_latent,
        scale_fmt,
    )


def scattered(tokens: int, blocks: int, seed: int = 0) -> np.ndarray:
    """Slots in random order, first and last included, some -1, and with five tokens or more one beyond the cache."""
    rng = np.random.default_rng(seed)
    middle = 1 + rng.permutation(blocks * BLOCK - 2)
    slots = np.concatenate([[blocks * BLOCK - 1, 0], middle])[:tokens].astype(np.int32)
    slots[3:tokens:5] = -1
    slots[4:5] = blocks * BLOCK
    return slots


def tiny() -> list[Case]:
    """One of each form, for the interpreter."""
    return [
        case("FP8", scattered(6, 2), blocks=2, layer=1),
        case(
            "bfloat16, several warpgroups",
            scattered(19, 2),
            blocks=2,
            kv_form="bfloat16",
            index_form="bfloat16",
            weights=("bfloat16", "float32", "float32"),
            scale_fmt=None,
        ),
        case("FP8 rows beside bfloat16 keys", [-1, 70], blocks=2, index_form="bfloat16", quantize_latent=False),
    ]


def real() -> list[Case]:
    """What a GPU is asked for."""
    cases = []
    for form in ("fp8", "bfloat16"):
        for scale_fmt in ("ue8m0", None):
            for quantize_latent in (False, True):
                name = f"{form}, scales {scale_fmt}, latent {'quantised' if quantize_latent else 'as it is'}"
                how = {"kv_form": form, "scale_fmt": scale_fmt, "quantize_latent": quantize_latent}
                cases.append(case(name, scattered(4096, 100), blocks=100, layer=len(cases) % 2, seed=len(cases), **how))
    bfloat16 = ("bfloat16",) * 3
    cases.append(case("bfloat16 keys", scattered(700, 20), blocks=20, index_form="bfloat16", weights=bfloat16))
    cases.append(case("many tokens", scattered(20011, 400), blocks=400, layer=1))
    for tokens in (1, 7):
        cases.append(case(f"tokens {tokens}", scattered(tokens, 3), blocks=3, layer=1))
    cases.append(case("padding alone", np.full(9, -1), blocks=2))
    return cases


# ---- what must hold ------------------------------------------------------------------------------------------------


def stored(case: Case, kv, index) -> tuple[np.ndarray, np.ndarray]:
    """Latent rows and index keys of the written slots, dequantised: float32 [W, latent + rope] and [W, dim]."""
    table, slots = jnp.arange(case.kv.shape[1])[None], case.slots[case.written]
    rows = read_latents(jnp.asarray(kv), case.layer, table, case.rope_dim, jnp.float32)
    keys, scales = read_index_keys(jnp.asarray(index), case.layer, table)
    keys = keys.astype(jnp.float32) if scales is None else keys.astype(jnp.float32) * scales[..., None]
    return np.asarray(rows)[0, slots], np.asarray(keys)[0, slots]


def expected(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """What `stored` would be without rounding and without FP8, in float64."""
    latent, rope = np.split(case.kv_a[case.written].astype(float), [len(case.latent_weight)], axis=-1)
    latent = numpy_model.rms_norm(latent, case.latent_weight.astype(float), EPS)
    angle = case.angle[case.written]
    rows = np.concatenate([latent, numpy_model.rope_interleaved(rope, angle)], -1)
    key = case.index_key[case.written].astype(float)
    key = numpy_model.layer_norm(key, case.index_weight.astype(float), case.index_bias.astype(float), EPS)
    front = numpy_model.rope_half(key[:, : case.rope_dim], angle)
    key = np.concatenate([front, key[:, case.rope_dim :]], -1)
    return rows, key @ numpy_model.hadamard(key.shape[-1])


def relative_rms(got: np.ndarray, wanted: np.ndarray) -> float:
    """Root of the mean square error, as a part of the root mean square."""
    if not wanted.size:
        return 0.0
    error = got.astype(np.float64) - wanted
    return float(np.sqrt((error**2).mean() / (np.asarray(wanted, np.float64) ** 2).mean()))


def touched(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """uint8 views of kv and index in which a byte is 1 if it belongs to a written slot."""
    slots, blocks = case.slots[case.written], case.kv.shape[1]
    kv = np.zeros(as_bytes(case.kv).shape, np.uint8).reshape(LAYERS, blocks * BLOCK, -1)
    kv[case.layer, slots] = 1
    index = np.zeros(as_bytes(case.index).shape, np.uint8)
    if case.index.dtype == np.uint8:
        values = index[case.layer, :, : -BLOCK * 4].reshape(blocks, BLOCK, -1).copy()
        scales = index[case.layer, :, -BLOCK * 4 :].reshape(blocks, BLOCK, 4).copy()
        for part in (values, scales):
            part[slots // BLOCK, slots % BLOCK] = 1
        index[case.layer] = np.concatenate([values.reshape(blocks, -1), scales.reshape(blocks, -1)], -1)
    else:
        index.reshape(LAYERS, blocks * BLOCK, -1)[case.layer, slots] = 1
    return kv.reshape(as_bytes(case.kv).shape), index


def as_bytes(x) -> np.ndarray:
    """Any array as uint8, its last axis in bytes."""
    return np.ascontiguousarray(np.asarray(x)).view(np.uint8)


def check_untouched(case: Case, kv, index) -> None:
    """Every byte of other slots and of other layers is what it was."""
    for got, before, mine in zip((kv, index), (case.kv, case.index), touched(case), strict=True):
        np.testing.assert_array_equal(as_bytes(got)[mine == 0], as_bytes(before)[mine == 0])


def check_against_reference(case: Case, kv, index) -> None:
    """The kernel's caches against the reference's: sums in another order may move a value to its neighbour, rarely."""
    check_untouched(case, kv, index)
    reference = run(case, "reference")  # not jitted: within one program XLA may drop a rounding to bfloat16
    for got, wanted, mine in zip((kv, index), reference, touched(case), strict=True):
        same = as_bytes(got)[mine == 1] == as_bytes(wanted)[mine == 1]
        assert same.size == 0 or same.mean() >= 0.999, same.mean()
    for got, wanted in zip(stored(case, kv, index), stored(case, *reference), strict=True):
        assert np.isfinite(got).all()
        assert relative_rms(got, wanted) <= 2e-3
        # One step of e4m3 is at most an eighth of the value.
        assert (np.abs(got - wanted) <= np.abs(wanted) / 7 + 1e-3 * np.abs(wanted).max(initial=0)).all()
