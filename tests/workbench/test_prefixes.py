"""Requests that share prefixes, and those that do not, on a small model."""

from dsv32_jax.experiments.workbench import prefixes
from dsv32_jax.experiments.workbench.ablate_table import lines


def test_sharing_takes_fewer_blocks_for_the_same_requests(small):
    content = prefixes.measure(small, rounds=1, sizes=(2, 200, 2), max_tokens=64)
    apart, shared = content["rows"]
    # Of 150 tokens that are the same, the second request finds two whole blocks that the first has read.
    assert apart["computed_tokens"] - shared["computed_tokens"] == 128
    assert shared["peak_blocks"] <= apart["peak_blocks"]
    assert content["speedup"]["median"] > 0 and content["group"] == 2
    nothing = {"rows": [], "texts": None, "work": {}, "device": "x", "date": "y", "model": "z"}
    table = lines({**nothing, "prefixes": content})
    assert any(line.startswith("prefixes: shared") for line in table)
