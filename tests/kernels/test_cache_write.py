"""Keys from raw projections into the cache: the op against NumPy, the kernel against the op."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mosaic, rowwise
from pallas_kernels.cache_format import store_keys
from pallas_kernels.cache_write import KeyNorms, cache_write, index_keys, latents, mosaic_gpu
from pallas_kernels.cache_write.config import CONFIGS, Config
from tests.kernels.cases import cache_write as cases

BLOCKS, LATENT = 4, 512
SLOTS = np.array([64 * 3 + 63, 5, -1, 64 + 17, 64 * 3], np.int32)


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


@pytest.mark.parametrize("case", cases.tiny()[:2], ids=lambda case: case.name)
def test_the_parts_compose_the_op_and_take_other_functions(case):
    kv, index, slots, kv_a, index_key, latent_weight, index_weight, index_bias, *angles = map(
        jnp.asarray, case.arguments
    )

    def halved(x, weight, *rest):
        return x / 2

    def reversed_angles(x, cos, sin):
        return rowwise.rope_interleaved(x, cos, -sin)

    def composed(latent_parts, index_parts):
        latent, rope_key = latents(
            kv_a, latent_weight, cases.EPS, angles, case.quantize_latent, case.scale_fmt, **latent_parts
        )
        key = index_keys(index_key, index_weight, index_bias, cases.EPS, angles, **index_parts)
        stored = store_keys(kv, index, case.layer, slots, latent, rope_key, key, case.scale_fmt)
        return latent, rope_key, key, cases.stored(case, *stored)

    latent, _, key, stored = composed({}, {})
    for array, expected in zip(stored, cases.stored(case, *cases.run(case, "reference")), strict=True):
        np.testing.assert_array_equal(array, expected)
    other = {"norm": halved, "rope": reversed_angles}
    other_latent, other_rope_key, other_key, _ = composed(other, other)
    assert other_latent.shape == latent.shape and (other_latent != latent).any()
    np.testing.assert_array_equal(other_rope_key, rowwise.rope_interleaved(kv_a[:, LATENT:], angles[0], -angles[1]))
    rotated = rowwise.rope_leading(index_key / 2, *angles, reversed_angles)
    np.testing.assert_array_equal(other_key, rowwise.hadamard(rotated))
    assert (other_key != key).any() and other_key.shape == key.shape


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


def kernel(case: cases.Case, config: Config, interpret=None):
    """The case in the kernel itself, with a config of one's own: a function of its arrays."""

    def call(kv, index, slots, kv_a, index_key, latent_weight, index_weight, index_bias, cos, sin):
        return mosaic_gpu.cache_write(
            kv,
            index,
            jnp.full((1,), case.layer, jnp.int32),
            slots,
            (kv_a, index_key),
            (latent_weight, index_weight, index_bias),
            (cos, sin),
            eps=(cases.EPS, cases.EPS),
            quantize_latent=case.quantize_latent,
            scale_fmt=case.scale_fmt,
            config=config,
            interpret=interpret,
        )

    return call


INTERPRETED = [
    (0, Config(tokens=1)),
    (1, Config(warpgroups=2, tokens=2)),
    (2, Config(tokens=3)),
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


@pytest.mark.parametrize("config", CONFIGS, ids=str)
@pytest.mark.parametrize("case", cases.real()[::3], ids=lambda case: case.name)
def test_kernel_lowers(case, config):
    text = jax.jit(kernel(case, config)).trace(*case.arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "mosaic_gpu" in text


def test_config_validates_itself():
    with pytest.raises(ValueError, match="1 to 8 warpgroups, not 9"):
        Config(warpgroups=9)
    with pytest.raises(ValueError, match="at least one token, not 0"):
        Config(tokens=0)


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
