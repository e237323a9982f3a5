"""Generates text by one compiled program: the prompts in pieces, then a loop of steps that draw tokens on the device.

python -m experiments.generate_jitted --prompt "To install a package on Debian, you" --prompt "What does tar do?"

A script to copy and to change. The cache is donated: the program writes into it and gives it back for the next call.
Tokens are those of `m.generate`, whose speed is printed beside. --part index_select=module:function replaces a part.
"""

import functools
import timeit

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from dsv32_jax.experiments import command_line
from dsv32_jax.generate.batching import batch_of, block_tables, prompt_pieces
from dsv32_jax.generate.loading import load
from dsv32_jax.generate.sampling import NOT_FINITE, not_finite, row_keys, sample
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.variants import parts_of


@functools.partial(jax.jit, static_argnames=("options", "new", "greedy", "nucleus"), donate_argnames="cache")
def generate(model, cache, pieces, tables, lengths, end_ids, options, new, seed, temperature, top_p, greedy, nucleus):
    """Tokens int32 [B, new], -1 after a row's end, and the cache; `arguments_of` makes the arguments."""
    rows = jnp.arange(len(lengths))

    def read(state, piece):  # a piece of the prompts; its logits are 0 but for rows that end in it
        of_piece, cache = model(piece, state[0], options)
        return (cache, state[1] + of_piece), None

    def draw(logits, n):
        keys = None if greedy else row_keys(seed, rows, lengths + n)
        return sample(logits, keys, temperature, top_p, greedy=greedy, nucleus=nucleus)

    def step(state):  # reads the last token of each row that has not ended, and draws the n-th
        n, running, ids, tokens, cache = state
        positions = jnp.where(running, lengths + n - 1, -1)
        logits, cache = model(batch_of(ids, positions, rows, tables, rows), cache, options)
        ids = draw(logits, n)
        tokens = tokens.at[:, n].set(jnp.where(running, ids, -1))
        return n + 1, running & ~jnp.isin(ids, end_ids), ids, tokens, cache

    (cache, logits), _ = lax.scan(read, (cache, jnp.zeros((len(rows), model.config.vocab_size))), pieces)
    ids = draw(logits, 0)
    tokens = jnp.full((len(rows), new), -1).at[:, 0].set(ids)
    state = (1, ~jnp.isin(ids, end_ids), ids, tokens, cache)
    *_, tokens, cache = lax.while_loop(lambda state: (state[0] < new) & state[1].any(), step, state)
    return tokens, cache


def arguments_of(m, rows, new, temperature, top_p, seed):
    """The arguments of `generate` that continue rows of ids by up to `new` tokens, with a cache for them."""
    lengths = np.array([len(row) for row in rows], np.int32)
    tables = block_tables(len(rows), int(lengths.max()) + new, m.config.max_position_embeddings)
    prompts = dict(pieces=prompt_pieces(rows, tables, m.options), tables=tables, lengths=lengths)
    ends = dict(end_ids=np.array(m.eos_ids, np.int32), new=new)
    sampling = dict(seed=seed, temperature=temperature, top_p=top_p, greedy=temperature == 0, nucleus=top_p < 1)
    cache = KVCache.create(m.config, tables.size, m.options)
    return dict(model=m.prepared_model(), options=m.options, cache=cache, **prompts, **ends, **sampling)


def main() -> None:
    """The command."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--model", default="demo", help='a checkpoint directory, "org/name" on the hub, or "demo"')
    parser.add_argument("--prompt", action="append", required=True, help="repeat it for a batch")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--part", action="append", default=[], metavar="PART=FUNCTION", help="replaces a part")
    flags = parser.parse_args()
    m = load(flags.model).with_parts(**parts_of(flags.part))
    rows = m.rows(flags.prompt)
    new = m.new_tokens(rows, flags.max_new_tokens)
    temperature, top_p = m.sampling(flags.temperature, flags.top_p, flags.seed)
    sampling = dict(temperature=temperature, top_p=top_p, seed=flags.seed)
    arguments = arguments_of(m, rows, new, **sampling)

    def jitted():
        tokens, arguments["cache"] = generate(**arguments)
        return np.asarray(tokens)

    stepwise = functools.partial(m.generate, rows, new, **sampling)
    tokens = jitted()
    for row, n in np.argwhere(tokens == NOT_FINITE):
        raise not_finite(row, len(rows[row]) + n - 1)
    print(*map(m.tokenizer.decode, tokens), sep="\n")  # type: ignore[union-attr]
    calls: dict = {"one program": jitted, "m.generate": stepwise}
    for name, call in calls.items():
        seconds = min(timeit.repeat(call, number=1, repeat=3))  # the first of m.generate compiles
        print(f"{name}: {(tokens >= 0).sum() / seconds:.1f} tokens/s")
    print(f"tokens that differ: {(tokens != stepwise().tokens).sum()} of {tokens.size}")


if __name__ == "__main__":
    command_line.run(main)
