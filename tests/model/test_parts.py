"""Parts of a step: what can be replaced, by what, and what is refused."""

import dataclasses
import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import pallas_kernels
from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model import variants
from dsv32_jax.model.model import DeepseekV32
from dsv32_jax.model.parts import DEFAULTS, INSIDE, MODEL_PARTS, NAMES, Parts
from dsv32_jax.model.sequence import Run, hidden_states, log_likelihoods
from dsv32_jax.model.variants import VARIANTS, every_key, masked, named_part, parts_of, recent
from tests.harness import EXACT, one_shape, times_compiled

DENSE = dataclasses.replace(EXACT, attention="dense")
IDS = np.array([[(seed * 5 + i * i) % 97 + 2 for i in range(40)] for seed in range(2)], np.int32)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    """Two layers, one with experts; 8 of up to 40 keys are chosen."""
    config = ModelConfig.tiny(
        num_hidden_layers=2, initializer_range=0.15, quantization_config=None, num_nextn_predict_layers=0, index_topk=8
    )
    return LanguageModel(jax.jit(lambda: DeepseekV32(config, nnx.Rngs(0)))(), config, options=EXACT)


def score(m: LanguageModel) -> np.ndarray:
    with one_shape(64, 1):
        return m.score(IDS).log_likelihoods


def score_of_sequences(m: LanguageModel) -> np.ndarray:
    """The same by the differentiable form."""
    run = Run.of(m.options)
    states, _ = jax.jit(lambda model, ids: hidden_states(model, ids, run))(m.model, IDS)
    return np.asarray(log_likelihoods(states[:, :-1], m.model.head, jnp.asarray(IDS[:, 1:])))


def through(name: str):
    """A function that is not the part's own and does what that does, whatever it is called with."""

    def replaced(*arrays, **keywords):
        return DEFAULTS[name](*arrays, **keywords)

    return replaced


# ---- the same by another function ----


@pytest.mark.parametrize("name", [name for name in NAMES if name != "dense_mla"])
def test_a_part_that_does_the_same_changes_nothing(lm, name):
    """Inside a fused op it also switches that op to its composed form."""
    np.testing.assert_allclose(score(lm.with_parts(**{name: through(name)})), score(lm), atol=1e-5)


def test_dense_attention_is_a_part_too(lm):
    dense = LanguageModel(lm.model, lm.config, options=DENSE)
    same = score(dense.with_parts(dense_mla=through("dense_mla")))
    np.testing.assert_array_equal(same, score(dense))
    np.testing.assert_allclose(score(lm.with_parts(index_select=every_key)), same, atol=1e-5)


@pytest.mark.parametrize(("part", "name"), [(part, name) for part, by_name in VARIANTS.items() for name in by_name])
def test_step_and_sequence_form_agree_under_every_variant(lm, part, name):
    if part == "dense_mla":
        lm = LanguageModel(lm.model, lm.config, options=DENSE)
    m = lm.with_parts(**{part: VARIANTS[part][name]}, check=True)
    np.testing.assert_allclose(score_of_sequences(m), score(m), atol=2e-5)
    changes = part == "index_rope" or (part == "index_select")
    assert (np.abs(score(m) - score(lm)).max() > 1e-3) == changes


@pytest.mark.parametrize("rows", [1, 3])
def test_flash_attention_is_dense_attention_in_blocks_of_keys(rows, monkeypatch):
    """With one sequence and several, padding, a context that is no multiple of a block, and chunks of tokens."""
    monkeypatch.setattr(variants, "KEYS", 128)
    rng = np.random.default_rng(0)
    queries = jnp.asarray(rng.standard_normal((7, 2, 24)), jnp.float32)
    context = jnp.asarray(rng.standard_normal((rows, 192, 24)), jnp.float32)
    sequence = jnp.asarray(rng.integers(0, rows, 7), jnp.int32)
    positions = jnp.asarray([0, 63, 64, 127, 128, 191, -1], jnp.int32)
    arrays, numbers = (queries, context, sequence, positions), {"scale": 0.3, "rope_dim": 8}
    expected = DEFAULTS["dense_mla"](*arrays, **numbers, chunk_bytes=2**20)
    for tokens in (3, 7):
        flash = variants.flash(*arrays, **numbers, chunk_bytes=tokens * 4 * 128 * (2 if rows == 1 else 24))
        np.testing.assert_allclose(flash, expected, atol=1e-5)


@pytest.mark.parametrize("name", ["sparse_mla", "cache_write", "top_k", "indexer_logits", "combine", "rms_norm"])
def test_the_sequence_form_calls_other_parts_and_has_gradients(lm, name):
    run = Run.of(lm.with_parts(**{name: through(name)}).options)

    def loss(model, run):
        return hidden_states(model, IDS, run)[0].astype(jnp.float32).sum()

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    for a, b in zip(jax.tree.leaves(gradient(lm.model, run)), jax.tree.leaves(gradient(lm.model, Run())), strict=True):
        np.testing.assert_allclose(np.float32(a), np.float32(b), rtol=5e-2, atol=5e-3 * np.abs(np.float32(b)).max())


def test_the_official_mask_is_the_sparse_attention(lm):
    np.testing.assert_allclose(score(lm.with_parts(sparse_mla=masked)), score(lm), atol=1e-5)


def test_another_rope_of_the_indexer_turns_queries_and_cached_keys_alike(lm):
    """Both turned by nothing at all: scores are those of unrotated keys, whatever the distance."""
    ids = [7] * 30
    with one_shape(64, 1):
        scores = lm.with_parts(index_rope=lambda x, cos, sin: x).trace(ids).index_scores[0]
        rotated = lm.trace(ids).index_scores[0]
    visible = np.tril(np.ones(scores.shape, bool))
    assert np.ptp(scores[visible]) <= 1e-4 * np.abs(scores[visible]).max() < np.ptp(rotated[visible])


def test_extras_are_what_a_function_names(lm):
    shapes = {}

    def select(*arrays, k, x, attention):
        shapes.update(x=x.shape, attention=attention.shape)
        return DEFAULTS["index_select"](*arrays, k=k)

    def route(logits, bias, *, positions, **options):
        shapes.update(positions=positions.shape)
        return DEFAULTS["route"](logits, bias, **options)

    np.testing.assert_array_equal(score(lm.with_parts(index_select=select, route=route)), score(lm))
    assert shapes == {"x": (64, lm.config.hidden_size), "attention": (64, 64), "positions": (64,)}


# ---- identity ----


def test_the_same_functions_are_the_same_program_and_others_another(lm, caplog):
    assert lm.with_parts(index_select=recent).options == lm.with_parts(index_select=recent).options
    assert lm.with_parts(index_select=DEFAULTS["index_select"]).options == lm.options
    assert hash(Parts(top_k=recent_first(2))) == hash(Parts(top_k=recent_first(2)))
    compiled = functools.partial(times_compiled, "flat_step", caplog=caplog)
    score(lm)
    assert compiled(lambda: score(lm.with_parts(rms_norm=twice))) == 1
    assert compiled(lambda: score(lm.with_parts(rms_norm=twice))) == 0
    assert compiled(lambda: score(lm)) == 0


def recent_first(least: int):
    return functools.partial(smallest, least=least)


def smallest(scores, k, *, least):
    return DEFAULTS["top_k"](-scores, max(k, least))


def twice(x, weight, eps, dtype=None):
    return 2 * DEFAULTS["rms_norm"](x, weight, eps, dtype)


def test_the_model_that_was_given_stays_and_weights_are_shared(lm):
    other = lm.with_parts(index_select=recent, check=True)
    assert lm.options == EXACT and other.options.check and other.options.parts.replaced == {"index_select": recent}
    assert all(a is b for a, b in zip(jax.tree.leaves(lm.model), jax.tree.leaves(other.model), strict=True))
    again = other.with_parts(route=through("route"))
    assert set(again.options.parts.replaced) == {"index_select", "route"} and again.options.check
    assert "recent" in repr(other) and "parts=Parts()" in repr(lm)


def test_every_part_is_documented_and_what_lies_inside_is_a_part():
    assert all(f"      {name}: " in inspect.getdoc(Parts).replace("\n", "\n    ") for name in NAMES)
    assert {*INSIDE, *(name for names in INSIDE.values() for name in names)} <= set(NAMES)
    assert set(VARIANTS) <= set(NAMES) and not MODEL_PARTS.replaced


# ---- what is refused ----


def wrong_dtype(*arrays, k):
    return DEFAULTS["index_select"](*arrays, k=k).astype(jnp.float32)


def test_results_of_another_shape_or_dtype_say_what_was_expected(lm):
    wrong = {
        "index_select": (wrong_dtype, r"gave float32 \[64, 8\]; must be int32 \[64, 8\]"),
        "route": (
            lambda logits, bias: (logits, logits),
            r"gave \(float32 \[64, 8\], float32 .*\); must be \(int",
        ),
        "rms_norm": (lambda x, weight, eps: x[:1], r"gave float32 \[1, 128\]; must be float32 \[64, 128\]"),
        "make_plan": (lambda experts, valid, num_experts: experts, "must be a RoutingPlan"),
        "combine": (lambda rows, weights, plan: None, "gave NoneType; must be float32"),
    }
    for name, (function, message) in wrong.items():
        with pytest.raises(UserError, match=f"^part {name} \\(.*{message}"):
            score(lm.with_parts(**{name: function}))


def test_wrong_names_and_functions_are_refused(lm):
    for parts, message in (
        ({"index_selekt": recent}, "part 'index_selekt' is unknown; did you mean index_select"),
        ({"zzz": recent}, "part 'zzz' is unknown; it is one of index_select, "),
        ({"index_select": 3}, "part index_select: 3 is no function"),
        ({"index_select": lambda queries: queries}, "cannot be called with \\(queries, head_weights, index, layer"),
        ({"route": lambda logits, bias, *, temperature: logits}, "missing a required.* argument: 'temperature'"),
        ({"top_k": functools.partial(smallest, least=np.zeros(2))}, "must be hashable, and binds"),
        ({"index_select": recent, "top_k": through("top_k")}, "part top_k: index_select is replaced as well"),
        ({"experts": through("experts"), "gather_rows": through("gather_rows")}, "part gather_rows: experts is"),
    ):
        with pytest.raises(UserError, match=message):
            lm.with_parts(**parts)


def test_a_part_that_no_step_calls_is_refused_instead_of_changing_nothing(lm):
    with pytest.raises(UserError, match=r"part dense_mla is replaced by .*no step with this config and these options"):
        score(lm.with_parts(dense_mla=through("dense_mla")))
    dense = LanguageModel(lm.model, lm.config, options=DENSE)
    with pytest.raises(UserError, match="part index_select is replaced by"):
        score(dense.with_parts(index_select=recent))


# ---- by name ----


def test_parts_by_name():
    assert named_part("index_select=recent") == ("index_select", recent)
    assert named_part("top_k=tests.model.test_parts:smallest") == ("top_k", smallest)
    assert parts_of(["index_select=recent", "sparse_mla=masked"]) == {"index_select": recent, "sparse_mla": masked}


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["index_select"], "must be PART=VARIANT or PART=package.module:function"),
        (["select=recent"], "part 'select' is unknown; did you mean index_select"),
        (["index_select=recnt"], "variant 'recnt' is unknown; it is one of dense, recent,"),
        (["top_k=recent"], "part top_k: variant 'recent' is unknown; it has none; give package.module:function"),
        (["top_k=no.such:function"], "part top_k: no.such:function cannot be imported"),
        (["top_k=tests.harness:nothing"], "cannot be imported"),
        (["index_select=recent", "index_select=oracle"], "part index_select: is named twice"),
    ],
)
def test_wrong_names_of_variants_are_refused(texts, message):
    with pytest.raises(UserError, match=message):
        parts_of(texts)


def test_recent_and_first_keeps_the_first():
    positions = jnp.array([0, 2, 3, 9, -1])
    chosen = VARIANTS["index_select"]["recent_and_first"](*[None] * 6, positions, k=3)
    np.testing.assert_array_equal(chosen, [[0, -1, -1], [2, 1, 0], [3, 2, 0], [9, 8, 0], [-1, -1, -1]])


# ---- what a newcomer would try ----


def test_what_a_partial_binds_is_kept(lm):
    four = dataclasses.replace(EXACT, index_topk=4)
    expected = score(LanguageModel(lm.model, lm.config, options=four).with_parts(index_select=recent))
    np.testing.assert_array_equal(score(lm.with_parts(index_select=functools.partial(recent, k=4))), expected)
    assert lm.with_parts(top_k=recent_first(1)).options != lm.with_parts(top_k=recent_first(True)).options
    assert lm.with_parts(top_k=recent_first(0.0)).options != lm.with_parts(top_k=recent_first(-0.0)).options


def test_a_package_of_kernels_is_its_function_and_none_the_models_own(lm):
    assert lm.with_parts(index_select=pallas_kernels.index_select).options == lm.options
    assert lm.with_parts(index_select=recent).with_parts(index_select=None).options == lm.options


def test_another_matmul_is_called_for_the_same_products_in_both_forms(lm):
    def larger(x, weight, *, backend, **rounding):
        return DEFAULTS["matmul"](x, weight, backend=backend, **rounding) * 1.5

    m = lm.with_parts(matmul=larger)
    np.testing.assert_allclose(score_of_sequences(m), score(m), atol=1e-4)
    assert np.abs(score(m) - score(lm)).max() > 1e-2


def nothing_for_the_fourth(queries, head_weights, index, layer, block_tables, sequence, positions, *, k):
    chosen = recent(queries, head_weights, index, layer, block_tables, sequence, positions, k=k)
    return jnp.where(positions[:, None] == 3, -1, chosen)


def test_a_token_that_attends_to_nothing_is_no_nan_in_either_form(lm):
    m = lm.with_parts(index_select=nothing_for_the_fourth, check=True)
    np.testing.assert_allclose(score_of_sequences(m), score(m), atol=2e-5)
    run = Run.of(m.options)
    gradient = jax.grad(lambda model: hidden_states(model, IDS, run)[0].sum())(m.model)
    assert all(np.isfinite(np.float32(leaf)).all() for leaf in jax.tree.leaves(gradient))


def shifted_plan(experts, valid, num_experts, *, tile, backend):
    plan = DEFAULTS["make_plan"](experts, valid, num_experts, tile, backend=backend)
    return dataclasses.replace(plan, token_row=plan.token_row + 1000)


def test_check_looks_at_plans_and_for_nan(lm):
    for part, function, message in (
        ("make_plan", shifted_plan, r"layers.1.ffn: of row 0, the row of a token 1\d\d\d is not in -1.."),
        ("rms_norm", lambda x, weight, eps: x * jnp.nan, "layers.0: gave NaN, first at 0"),
        ("indexer_logits", lambda *arrays: DEFAULTS["indexer_logits"](*arrays) * jnp.nan, "layers.0.attn: gave NaN"),
    ):
        with pytest.raises(UserError, match=f"^part {part} .*{message}"):
            lm.with_parts(**{part: function}, check=True).run_layer(
                int(part == "make_plan"), np.ones((5, 128), "float32")
            )


def test_an_error_inside_a_part_says_where(lm):
    with pytest.raises(ZeroDivisionError) as error:
        score(lm.with_parts(rms_norm=lambda x, weight, eps: 1 / 0))
    assert any(note.startswith("in part rms_norm (") and note.endswith(", layers.0") for note in error.value.__notes__)


def test_misspelt_keywords_and_functions_without_a_signature_are_refused(lm):
    def misspelt(queries, head_weights, index, layer, block_tables, sequence, positions, *, k, attenton=None):
        raise AssertionError

    for parts, message in (
        ({"index_select": misspelt}, "names 'attenton', which nobody gives; did you mean attention"),
        ({"swiglu": max}, "its arguments cannot be read"),
        ({"weight": recent}, "did you mean weights"),
    ):
        with pytest.raises(UserError, match=message):
            lm.with_parts(**parts)
