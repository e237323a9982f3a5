"""The formats of the block cache: what is stored is read back, in each form."""

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels.cache_format import index_block_bytes, read_index_keys, read_latents, record_bytes, store_keys
from tests import numpy_model

LAYERS, BLOCKS, LATENT, ROPE, DIM = 2, 4, 512, 64, 128


def new_tokens(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal((count, n)).astype(np.float32) * 3 for n in (LATENT, ROPE, DIM)]


def empty(form: str):
    if form == "fp8":
        return (
            jnp.full((LAYERS, BLOCKS, 64, record_bytes(LATENT, ROPE)), 0xAB, jnp.uint8),
            jnp.full((LAYERS, BLOCKS, index_block_bytes(DIM)), 0xCD, jnp.uint8),
        )
    dtype = jnp.dtype(form)
    return jnp.full((LAYERS, BLOCKS, 64, LATENT + ROPE), 7, dtype), jnp.full((LAYERS, BLOCKS, 64, DIM), 7, dtype)


SLOTS = np.array([64 * 3 + 63, 5, -1, 64 + 17, 64 * 3], np.int32)
WRITTEN = SLOTS >= 0


@pytest.mark.parametrize("form", ["float32", "bfloat16", "fp8"])
@pytest.mark.parametrize("layer", [0, 1])
def test_round_trip(form, layer):
    kv, index = empty(form)
    latent, rope_key, index_key = new_tokens(len(SLOTS))
    new_kv, new_index = store_keys(kv, index, layer, jnp.asarray(SLOTS), latent, rope_key, index_key)
    table = jnp.arange(BLOCKS)[None]
    rows = np.asarray(read_latents(new_kv, layer, table, ROPE, jnp.float32))[0][SLOTS[WRITTEN]]
    keys, scales = read_index_keys(new_index, layer, table)
    keys = np.asarray(keys[0], np.float32)[SLOTS[WRITTEN]]
    if form == "fp8":
        latent = numpy_model.fake_quantise(latent, "ue8m0")
        rope_key = rope_key.astype(ml_dtypes.bfloat16)
        values, key_scales = numpy_model.quantise_rows(index_key, "ue8m0")
        np.testing.assert_array_equal(keys, values[WRITTEN])
        np.testing.assert_array_equal(np.asarray(scales)[0][SLOTS[WRITTEN]], key_scales[WRITTEN, 0])
    else:
        assert scales is None
        latent, rope_key, index_key = (x.astype(jnp.dtype(form)) for x in (latent, rope_key, index_key))
        np.testing.assert_array_equal(keys, index_key.astype(np.float32)[WRITTEN])
    expected = np.concatenate([latent.astype(np.float32), rope_key.astype(np.float32)], -1)
    np.testing.assert_array_equal(rows, expected[WRITTEN])


def test_fp8_record_layout_is_flashmla_s():
    """Bytes 0-511 values, 512-527 four float32 scales, 528-655 64 bfloat16 rope numbers: 656 for V3.2."""
    assert record_bytes(512, 64) == 656 and index_block_bytes(128) == 64 * 132
    kv, index = empty("fp8")
    latent, rope_key, index_key = new_tokens(1)
    kv, index = store_keys(kv, index, 0, jnp.array([70]), latent, rope_key, index_key)
    record = np.asarray(kv)[0, 1, 6]
    values, scales = numpy_model.quantise_rows(latent, "ue8m0")
    np.testing.assert_array_equal(record[:512].view(ml_dtypes.float8_e4m3fn).astype(float), values[0])
    np.testing.assert_array_equal(record[512:528].view(np.float32), scales[0])
    np.testing.assert_array_equal(record[528:].view(ml_dtypes.bfloat16), rope_key[0].astype(ml_dtypes.bfloat16))
    block = np.asarray(index)[0, 1]
    values, scales = numpy_model.quantise_rows(index_key, "ue8m0")
    np.testing.assert_array_equal(block[6 * 128 : 7 * 128].view(ml_dtypes.float8_e4m3fn).astype(float), values[0])
    np.testing.assert_array_equal(block[64 * 128 + 24 : 64 * 128 + 28].view(np.float32), scales[0])
