"""`dsv32 serve`: an OpenAI-compatible HTTP endpoint over `Engine`. Needs the extra `serve`.

A request passes `run` (socket, signals) → `protocol` (slow connections) → `app` (routes, key, sizes) → `api_request`
(fields) → `worker` (the engine's thread) → `answer` and `response_json` (JSON and server-sent events). `prometheus`
makes the text of `/metrics`.
"""

from dsv32_jax.server.app import create_app
from dsv32_jax.server.run import serve
from dsv32_jax.server.settings import Settings

__all__ = ["Settings", "create_app", "serve"]
