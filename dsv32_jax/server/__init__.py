"""`dsv32 serve`: an OpenAI-compatible HTTP endpoint over `Engine`. Needs the extra `serve`.

A request's way: `run` (socket, signals) → `protocol` (slow connections) → `app` (routes, key, sizes) → `ask` (fields)
→ `worker` (the engine's thread) → `answer` and `wording` (JSON and server-sent events). `prometheus` is `/metrics`.
"""

from dsv32_jax.server.app import create_app
from dsv32_jax.server.run import serve
from dsv32_jax.server.settings import Settings

__all__ = ["Settings", "create_app", "serve"]
