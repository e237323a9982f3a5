"""What a server is told when it starts."""

import dataclasses
from pathlib import Path

from dsv32_jax.common.arguments import boolean, instance, integer, number
from dsv32_jax.errors import UserError
from dsv32_jax.generate.sampling import check_sampling

__all__ = ["Settings"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """Limits and defaults of a server; times in seconds.

    Attributes:
      name: of the model, as clients give it.
      api_key: what every request must bear, on every route; None: nobody is asked for one.
      max_queue: prompts that wait for the engine, at most; more are refused with 429.
      max_body_bytes: of a request, at most; more are refused with 413.
      deadline: from a request's coming to its end; later it is ended with an error.
      drain_seconds: how long running requests may go on after SIGTERM.
      read_seconds: in which a request's head must come, and then its body.
      send_seconds: after which a client that does not read is cut off.
      warmup: compile every shape of a step before a request is taken; else each when it is needed first.
      temperature, top_p: of requests that do not say.
      metrics_log: a file that gets the engine's summary as one line of JSON, again and again.
      metrics_interval: how often.

    Raises:
      UserError: naming the field.
    """

    name: str
    api_key: str | None = dataclasses.field(default=None, repr=False)
    max_queue: int = 64
    max_body_bytes: int = 4 * 2**20
    deadline: float = 600.0
    drain_seconds: float = 30.0
    read_seconds: float = 30.0
    send_seconds: float = 30.0
    warmup: bool = True
    temperature: float = 0.0
    top_p: float = 1.0
    metrics_log: Path | None = None
    metrics_interval: float = 10.0

    def __post_init__(self) -> None:
        check_sampling(self.temperature, self.top_p, 0)
        instance("name", self.name, str, "a string")
        instance("api_key", self.api_key, (str, type(None)), "a string")
        instance("metrics_log", self.metrics_log, (Path, type(None)), "a path")
        boolean("warmup", self.warmup)
        for name in ("max_queue", "max_body_bytes"):
            integer(name, getattr(self, name), 1)
        for name in ("deadline", "read_seconds", "send_seconds", "metrics_interval"):
            number(name, getattr(self, name), "above 0", above=0)
        number("drain_seconds", self.drain_seconds, "0 or above", least=0)
        if not self.name:
            raise UserError("name: empty; it must have at least one character")
        # A header cannot carry other characters, so that such a key could never be given.
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise UserError("api_key: must be printable ASCII, and not empty")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise UserError("api_key: must not begin or end with a space")
