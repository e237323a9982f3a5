"""The block cache: what is written is read back, in each form, and nothing else changes."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from pallas_kernels import mosaic, tuning
from pallas_kernels.cache_write import (
    KeyNorms,
    cache_write,
    index_block_bytes,
    mosaic_gpu,
    read_index_keys,
    read_latents,
    record_bytes,
    scatter,
)
from tests import numpy_model
from tests.kernels.cases import cache_write as cases

LAYERS, BLOCKS, LATENT, ROPE, DIM = 2, 4, 512, 64, 128


# ---- the forms of the cache --------------------------------------------------------------------------------------


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
    new_kv, new_index = scatter(kv, index, layer, jnp.asarray(SLOTS), latent, rope_key, index_key)
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
    kv, index = scatter(kv, index, 0, jnp.array([70]), latent, rope_key, index_key)
    record = np.asarray(kv)[0, 1, 6]
    values, scales = numpy_model.quantise_rows(latent, "ue8m0")
    np.testing.assert_array_equal(record[:512].view(ml_dtypes.float8_e4m3fn).astype(float), values[0])
    np.testing.assert_array_equal(record[512:528].view(np.float32), scales[0])
    np.testing.assert_array_equal(record[528:].view(ml_dtypes.bfloat16), rope_key[0].astype(ml_dtypes.bfloat16))
    block = np.asarray(index)[0, 1]
    values, scales = numpy_model.quantise_rows(index_key, "ue8m0")
    np.testing.assert_array_equal(block[6 * 128 : 7 * 128].view(ml_dtypes.float8_e4m3fn).astype(float), values[0])
    np.testing.assert_array_equal(block[64 * 128 + 24 : 64 * 128 + 28].view(np.float32), scales[0])


# ---- the op ------------------------------------------------------------------------------------------------------

FLOAT32 = {"kv_form": "float32", "index_form": "float32", "dtype": "float32", "quantize_latent": False}
EXACT = [
    cases.case("real widths", SLOTS, blocks=BLOCKS, **FLOAT32),
    cases.case("other widths", SLOTS, blocks=BLOCKS, layer=1, dims=(48, 16, 32), **FLOAT32),
]


@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_op_matches_numpy(case):
    for got, expected in zip(cases.stored(case, *cases.run(case, "auto")), cases.expected(case), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("case", cases.tiny(), ids=lambda case: case.name)
def test_op_rounds_no_more_than_its_dtypes_do(case):
    """bfloat16 after the norm, the rotation and the Hadamard transform; e4m3 where the form or the option says so."""
    rows, keys = cases.stored(case, *cases.run(case, "reference"))
    expected_rows, expected_keys = cases.expected(case)
    fp8_latent = case.kv.dtype == np.uint8 or case.quantize_latent
    latents = (slice(None), slice(LATENT)), 3e-2 if fp8_latent else 3e-3
    for part, bound in (latents, ((slice(None), slice(LATENT, None)), 3e-3)):
        assert cases.relative_rms(rows[part], expected_rows[part]) <= bound
    assert cases.relative_rms(keys, expected_keys) <= (3e-2 if case.index.dtype == np.uint8 else 4e-3)


def test_a_quantised_latent_holds_what_fp8_can():
    """The bfloat16 cache then has the values of the FP8 record, bit for bit."""
    how = {"blocks": 2, "scale_fmt": "ue8m0", "quantize_latent": True}
    plain, packed = (cases.case("", cases.scattered(30, 2), kv_form=form, **how) for form in ("bfloat16", "fp8"))
    rows, records = (cases.stored(case, *cases.run(case, "auto"))[0] for case in (plain, packed))
    np.testing.assert_array_equal(rows, records)
    unquantised = dataclasses.replace(plain, quantize_latent=False)
    assert (cases.stored(plain, *cases.run(unquantised, "auto"))[0] != rows)[:, :LATENT].mean() > 0.5


@pytest.mark.parametrize("case", [*EXACT, *cases.tiny()], ids=lambda case: case.name)
def test_other_slots_and_other_layers_keep_their_bytes(case):
    cases.check_untouched(case, *cases.run(case, "reference"))


def test_no_tokens():
    case = cases.case("", [], blocks=1)
    for got, before in zip(cases.run(case, "auto"), (case.kv, case.index), strict=True):
        np.testing.assert_array_equal(got, before)


def test_errors_say_what_does_not_fit():
    case = EXACT[0]
    kv, index, slots, kv_a, index_key, *weights, cos, sin = map(jnp.asarray, case.arguments)
    norms = KeyNorms(*weights, 1e-6, 1e-6)
    with pytest.raises(ValueError, match=r"kv_a of shape \(5, 575\) is not"):
        cache_write(kv, index, 0, slots, kv_a[:, 1:], index_key, norms, (cos, sin))
    with pytest.raises(ValueError, match="do not hold rows of 576 and keys of 127"):
        cache_write(kv, index, 0, slots, kv_a, index_key[:, 1:], norms, (cos, sin))
    with pytest.raises(ValueError, match="layer 2 is not in a cache of 2"):
        cache_write(kv, index, 2, slots, kv_a, index_key, norms, (cos, sin))
    with pytest.raises(ValueError, match="scale_fmt 'e8' is unknown"):
        cache_write(kv, index, 0, slots, kv_a, index_key, norms, (cos, sin), scale_fmt="e8")
    with pytest.raises(ValueError, match="does not take kv_a of dtype float32; it takes bfloat16"):
        cases.run(case, "mosaic_gpu")
    with pytest.raises(ValueError, match=r"does not take kv_a of shape .*; it takes \[T, 512 \+ 64\]"):
        cases.run(EXACT[1], "interpret")


def test_the_kernel_refuses_a_gradient():
    case = cases.tiny()[2]
    arguments = list(map(jnp.asarray, case.arguments))

    def total(kv_a):
        return cases.run(case, "mosaic_gpu", (*arguments[:3], kv_a, *arguments[4:]))[1].astype(jnp.float32).sum()

    with pytest.raises(NotImplementedError, match="kernel of cache_write has no gradient"):
        jax.grad(total)(arguments[3])


# ---- the kernel --------------------------------------------------------------------------------------------------


def kernel(case: cases.Case, config: tuning.CacheWrite, interpret=None):
    """The case in the kernel itself, with a config of one's own: a function of its arrays."""

    def call(kv, index, slots, *others):
        return mosaic_gpu.cache_write(
            kv,
            index,
            jnp.full((1,), case.layer, jnp.int32),
            slots,
            *others,
            eps=(cases.EPS, cases.EPS),
            quantize_latent=case.quantize_latent,
            scale_fmt=case.scale_fmt,
            config=config,
            interpret=interpret,
        )

    return call


INTERPRETED = [
    (0, tuning.CacheWrite(tokens=1)),
    (1, tuning.CacheWrite(warpgroups=2, tokens=2)),
    (2, tuning.CacheWrite(tokens=3)),
]


@pytest.mark.interpret
@pytest.mark.parametrize(("number", "config"), INTERPRETED)
def test_kernel_in_the_interpreter(number, config, capfd):
    case = cases.tiny()[number]
    call = kernel(case, config, mosaic.interpreter())
    cases.check_against_reference(case, *call(*map(jnp.asarray, case.arguments)))
    assert "RACE DETECTED" not in capfd.readouterr().out


@pytest.mark.interpret
def test_op_in_the_interpreter():
    case = cases.tiny()[2]
    cases.check_against_reference(case, *cases.run(case, "interpret"))


@pytest.mark.parametrize("config", tuning.CONFIGS["cache_write"], ids=str)
@pytest.mark.parametrize("case", cases.real()[::3], ids=lambda case: case.name)
def test_kernel_lowers(case, config):
    text = jax.jit(kernel(case, config)).trace(*case.arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_config_validates_itself():
    with pytest.raises(ValueError, match="1 to 8 warpgroups, not 9"):
        tuning.CacheWrite(warpgroups=9)
    with pytest.raises(ValueError, match="at least one token, not 0"):
        tuning.CacheWrite(tokens=0)


def test_the_caches_are_updated_in_place_and_layers_share_a_kernel():
    """Donated caches become results of the program, and each kernel's results are its own operands."""
    case = cases.case("", cases.scattered(70, 3), blocks=3)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def two_layers(kv, index, *others):
        for layer in range(cases.LAYERS):
            kv, index = cases.run(case, "mosaic_gpu", (kv, index, *others), layer=layer)
        return kv, index

    text = two_layers.trace(*case.arguments).lower(lowering_platforms=("cuda",)).as_text()
    main, *others = re.split(r"func\.func private", text)
    assert re.findall(r"tf\.aliasing_output = (\d)", main) == ["0", "1"]
    assert main.count("call @") == 2 and len(others) == 1 and others[0].count("custom_call") == 1
    aliases = re.findall(r"output_tuple_indices = \[(\d)\], operand_index = (\d+)", others[0])
    operands = re.search(r"custom_call @\w+\(([^)]*)\)", others[0])
    assert operands is not None
    names = operands[1].split(", ")
    assert [(output, names[int(operand)]) for output, operand in aliases] == [("0", "%arg0"), ("1", "%arg1")]
