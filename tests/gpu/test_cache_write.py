"""Cache writes on a GPU: the kernel against the reference, into caches of NaN, in place."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.kernels.cases import cache_write as cases


def kernel(case):
    """The caches that the kernel gives for a case."""
    return jax.block_until_ready(
        jax.jit(lambda *arguments: cases.run(case, "mosaic_gpu", arguments))(*map(jnp.asarray, case.arguments))
    )


@pytest.mark.parametrize("case", cases.real(), ids=lambda case: case.name)
def test_kernel(case):
    kv, index = kernel(case)
    cases.check_against_reference(case, kv, index)
    for got, again in zip((kv, index), kernel(case), strict=True):
        np.testing.assert_array_equal(cases.as_bytes(got), cases.as_bytes(again), err_msg="from run to run")


@pytest.mark.parametrize("quantize_latent", [False, True])
def test_bfloat16_form_against_float64(quantize_latent):
    how = {"blocks": 100, "kv_form": "bfloat16", "index_form": "bfloat16", "quantize_latent": quantize_latent}
    case = cases.case("", cases.scattered(4096, 100), **how)
    (rows, keys), (expected_rows, expected_keys) = cases.stored(case, *kernel(case)), cases.expected(case)
    latent = len(case.latent_weight)
    assert cases.relative_rms(rows[:, :latent], expected_rows[:, :latent]) <= (3e-2 if quantize_latent else 3e-3)
    assert cases.relative_rms(rows[:, latent:], expected_rows[:, latent:]) <= 3e-3
    assert cases.relative_rms(keys, expected_keys) <= 4e-3


def test_a_quantised_latent_holds_what_fp8_can():
    how = {"blocks": 100, "quantize_latent": True}
    plain, packed = (cases.case("", cases.scattered(4096, 100), kv_form=form, **how) for form in ("bfloat16", "fp8"))
    rows, records = (cases.stored(case, *kernel(case))[0] for case in (plain, packed))
    np.testing.assert_array_equal(rows, records)


def test_no_cache_is_copied():
    """Sixty layers' worth of writes into donated caches: less temporary memory than the smaller cache has."""
    case = cases.case("", cases.scattered(300, 2000), blocks=2000)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def layers(kv, index, *others):
        for n in range(60):
            kv, index = cases.run(case, "mosaic_gpu", (kv, index, *others), layer=n % cases.LAYERS)
        return kv, index

    arguments = list(map(jnp.asarray, case.arguments))
    memory = layers.lower(*arguments).compile().memory_analysis()
    assert memory.alias_size_in_bytes >= case.kv.nbytes + case.index.nbytes
    assert memory.temp_size_in_bytes < case.index.nbytes / 10
    before = [array.unsafe_buffer_pointer() for array in arguments[:2]]
    after = jax.block_until_ready(layers(*arguments))
    assert [array.unsafe_buffer_pointer() for array in after] == before


def test_auto_takes_the_kernel():
    case = cases.real()[-2]
    text = jax.jit(lambda *arguments: cases.run(case, "auto", arguments)).lower(*case.arguments).as_text()
    assert "mosaic_gpu" in text
