"""Wrong settings of a server: an error that names the field."""

import pytest

from dsv32_jax.errors import UserError
from tests.server.harness import settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_queue": 0}, "max_queue: 0; must be at least 1"),
        ({"max_body_bytes": 0}, "max_body_bytes: 0"),
        ({"deadline": 0}, "deadline: 0; must be above 0"),
        ({"deadline": float("inf")}, "deadline: inf"),
        ({"drain_seconds": -1}, "drain_seconds: -1; must be 0 or above"),
        ({"metrics_interval": 0}, "metrics_interval: 0"),
        ({"temperature": -1}, "temperature: -1"),
        ({"name": ""}, "name: empty"),
        ({"name": 5}, "name: 5; must be a string"),
        ({"api_key": b"x"}, "api_key: b'x'"),
        ({"max_queue": 1.5}, "max_queue: 1.5; must be a whole number"),
        ({"max_body_bytes": True}, "max_body_bytes: True"),
        ({"deadline": "5"}, "deadline: '5'; must be a number"),
        ({"send_seconds": None}, "send_seconds: None"),
        ({"drain_seconds": float("nan")}, "drain_seconds: nan; must be 0 or above"),
        ({"warmup": 1}, "warmup: 1; must be True or False"),
        ({"top_p": None}, "top_p: None"),
        ({"metrics_log": "x"}, "metrics_log: 'x'; must be a path"),
    ],
)
def test_wrong_settings(wrong, message):
    with pytest.raises(UserError, match=message):
        settings(**wrong)
