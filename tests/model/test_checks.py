"""What the model expects of a replaced part: what breaks its contract is refused by name."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.checks import check_range, check_result, check_selection
from dsv32_jax.model.model import DeepseekV32
from pallas_kernels.index_select import index_select
from tests.harness import EXACT, one_shape

POSITIONS = np.array([0, 1, 5, -1], np.int32)
GOOD = np.array([[0, -1, -1], [1, 0, -1], [3, 5, 0], [9, 9, -7]], np.int32)


def checked(chosen: np.ndarray) -> None:

    @jax.jit
    def check(chosen, positions):
        check_selection("part index_select", chosen, positions)
        return chosen

    jax.block_until_ready(check(chosen, POSITIONS))
    jax.effects_barrier()


def test_a_selection_that_keeps_the_contract_passes():
    checked(GOOD)  # the last row is padding, of which nothing is asked


@pytest.mark.parametrize(
    ("row", "chosen", "message"),
    [
        (1, [-1, 0, 1], "position 1, the chosen 0 comes behind a -1"),
        (2, [3, -1, 0], "position 5, the chosen 0 comes behind a -1"),
        (2, [3, 6, 0], "position 5, the chosen 6 comes after the token's own position"),
        (0, [1, -1, -1], "position 0, the chosen 1 comes after"),
        (2, [3, 0, -2], "position 5, the chosen -2 is below -1"),
        (2, [3, 0, 3], "position 5, the chosen 3 stands there twice"),
    ],
)
def test_a_selection_that_breaks_it_is_refused(row, chosen, message):
    wrong = GOOD.copy()
    wrong[row] = chosen
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"part index_select: of the token at {message}"):
        checked(wrong)


@pytest.mark.parametrize(
    "wrong", [GOOD.astype(np.int16), GOOD.astype(np.float32), GOOD[:3], GOOD[0], GOOD[:, :0], (GOOD,)], ids=str
)
def test_another_shape_or_dtype_is_refused_without_check(wrong):
    with pytest.raises(UserError, match=r"^part index_select: gave .*must be int32 \[4, (K|3)\]$"):
        check_result("part index_select", jax.tree.map(jnp.asarray, wrong), lambda: jnp.asarray(GOOD), "index_select")


def test_experts_that_do_not_exist_or_stand_twice_are_refused():
    for experts, message in (
        ([[0, 1], [2, 4]], "row 1, the expert 4 is not in 0..3"),
        ([[3, 3]], "row 0, the expert 3"),
    ):
        with pytest.raises(jax.errors.JaxRuntimeError, match=f"part route: of {message}"):
            jax.block_until_ready(jax.jit(checked_experts)(jnp.asarray(experts)))
            jax.effects_barrier()
    jax.block_until_ready(jax.jit(checked_experts)(jnp.asarray([[0, 1], [3, 2]])))


def checked_experts(experts):
    check_range("part route", "expert", experts, 0, 4, distinct=True)
    return experts


def unsorted(*arrays, k):
    """Sets that are the same for attention, only with -1 first."""
    return jnp.sort(index_select(*arrays, k=k), axis=-1)


def test_calls_of_a_model_with_check_refuse_it():
    """Without check the perplexity is another."""
    config = ModelConfig.tiny(num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0, index_topk=4)
    model = jax.jit(lambda: DeepseekV32(config, nnx.Rngs(1)))()
    m = LanguageModel(model, config, options=EXACT)
    ids = list(range(7, 15))
    with one_shape(8, 1):
        unchecked = m.with_parts(index_select=unsorted).score(ids).perplexity
        assert np.isfinite(unchecked) and unchecked != m.with_parts(check=True).score(ids).perplexity
        checked = m.with_parts(index_select=unsorted, check=True)
        for call in (checked.score, checked.trace):
            message = (
                r"^part index_select \(.*:unsorted\), layers.0.attn: of the token at position 0, the chosen 0 comes"
            )
            with pytest.raises(UserError, match=message):
                call(ids)
