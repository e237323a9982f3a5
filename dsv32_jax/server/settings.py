"""The settings with which a server starts."""

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
      api_key: the key that every request must have, on every route; None if none is required.
      max_queue: the most prompts that wait for the engine; more are refused with 429.
      max_body_bytes: the largest body of a request; larger ones are refused with 413.
      deadline: how long a request may take from its arrival to its end; then it ends with an error.
      drain_seconds: how long running requests may go on after SIGTERM.
      read_seconds: in which a request's head must come, and then its body.
      send_seconds: after which a client that does not read is disconnected.
      warmup: compile every shape of a step before a request is taken; otherwise each when it is first needed.
      temperature, top_p: of requests without these fields.
      metrics_log: a file to which the engine's summary is appended as one line of JSON, again and again.
      metrics_interval: the time from one line to the next.

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
        # A header cannot carry other characters, so that no client could send such a key.
        if self.api_key is not None and not (self.api_key.isascii() and self.api_key.isprintable() and self.api_key):
            raise UserError("api_key: must be printable ASCII, and not empty")
        if self.api_key is not None and self.api_key != self.api_key.strip():
            raise UserError("api_key: must not begin or end with a space")
