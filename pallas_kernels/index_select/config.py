"""How many tokens `index_select` takes at a time."""

from pallas_kernels.hopper import SMS


def chunk_tokens(tokens: int, affordable: int) -> int:
    """Returns the tokens of a chunk, at most `affordable`: as many for every multiprocessor, if there are enough."""
    if affordable >= tokens:
        return tokens
    return affordable // SMS * SMS or affordable
