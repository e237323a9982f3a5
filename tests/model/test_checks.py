"""What a part may expect of another: a selection that breaks its contract is refused by name."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.checks import check_selection
from dsv32_jax.model.mla import MLA
from dsv32_jax.model.model import DeepseekV32
from tests.harness import EXACT, one_shape

POSITIONS = np.array([0, 1, 5, -1], np.int32)
GOOD = np.array([[0, -1, -1], [1, 0, -1], [3, 5, 0], [9, 9, -7]], np.int32)


def checked(chosen: np.ndarray) -> None:
    jax.block_until_ready(jax.jit(lambda c, p: check_selection(c, p, 4, debug=True))(chosen, POSITIONS))
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
    with pytest.raises(jax.errors.JaxRuntimeError, match=f"MLA.select, layer 4: of the token at {message}"):
        checked(wrong)


@pytest.mark.parametrize(
    "wrong", [GOOD.astype(np.int16), GOOD.astype(np.float32), GOOD[:3], GOOD[0], GOOD[:, :0]], ids=str
)
def test_another_shape_or_dtype_is_refused_without_debug(wrong):
    with pytest.raises(UserError, match=r"MLA.select, layer 0: .*must be int32 \[4, K\]"):
        check_selection(jnp.asarray(wrong), jnp.asarray(POSITIONS), 0, debug=False)


def test_calls_of_a_model_with_debug_refuse_it(monkeypatch):
    """Sets that are the same for attention, only with -1 first: without debug the perplexity is another."""
    config = ModelConfig.tiny(num_hidden_layers=1, first_k_dense_replace=1, num_nextn_predict_layers=0, index_topk=4)
    model = jax.jit(lambda: DeepseekV32(config, nnx.Rngs(1)))()
    m = LanguageModel(model, config, options=dataclasses.replace(EXACT, debug=True))
    ids = list(range(7, 15))
    with one_shape(8, 1):
        assert np.isfinite(m.score(ids).perplexity)
        chosen = MLA.select
        monkeypatch.setattr(MLA, "select", lambda *args: jnp.sort(chosen(*args), axis=-1))
        jax.clear_caches()  # methods are no part of what programs are kept by
        for call in (m.score, m.trace):
            with pytest.raises(
                UserError, match=r"^MLA.select, layer 0: of the token at position 0, the chosen 0 comes"
            ):
                call(ids)
    jax.clear_caches()
