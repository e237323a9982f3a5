"""How `cache_write` divides its work."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """How `cache_write` shares out tokens.

    Attributes:
      warpgroups: of a CTA; each of their four warps takes a token at a time.
      tokens: that a warp takes, the next one's loads in flight while it works on one.
    """

    warpgroups: int = 1
    tokens: int = 1

    def __post_init__(self) -> None:
        if not 1 <= self.warpgroups <= 8:
            raise ValueError(f"a CTA has 1 to 8 warpgroups, not {self.warpgroups}")
        if self.tokens < 1:
            raise ValueError(f"a warp takes at least one token, not {self.tokens}")

    @property
    def cta_tokens(self) -> int:
        """Tokens of a CTA."""
        return 4 * self.warpgroups * self.tokens


CONFIG = Config()
"""One token a warp: the other warps of a multiprocessor hide its latency better than a second token of its own."""
CONFIGS = [CONFIG]
