"""The API key is required on every route, also where there is none, and compared as a whole."""

import asyncio
import hmac

import pytest

from dsv32_jax.errors import UserError
from tests.server.harness import CHAT, COMPLETION, Call, client, error, service, settings

KEY = "s3cret"
ROUTES = [
    ("GET", "/v1/models"),
    ("GET", "/v1/models/tiny"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("GET", "/health"),
    ("GET", "/health/ready"),
    ("GET", "/metrics"),
]
NOWHERE = [("GET", "/"), ("GET", "/docs"), ("GET", "/v1/completions"), ("OPTIONS", "/v1/models"), ("PUT", "/health")]


@pytest.fixture(scope="module")
def server(session_engine):
    with client(session_engine, api_key=KEY) as test_client:
        yield test_client


def test_every_route_of_the_application_is_tried_here(server):
    paths = {getattr(route, "path", None) for route in server.app.routes}
    assert paths == {path.replace("/tiny", "/{name:path}") for _, path in ROUTES}


@pytest.mark.parametrize(("method", "path"), ROUTES + NOWHERE)
@pytest.mark.parametrize(
    "key",
    ["", "Bearer", "Bearer ", "Bearer s3cre", "Bearer s3crets", "Bearer S3CRET", "Basic s3cret", "s3cret", "Bearer é"],
)
def test_nothing_without_the_key(server, method, path, key):
    ask = COMPLETION if method == "POST" else None
    headers = {"authorization": key.encode("latin-1")}
    response = server.request(method, path, json=ask, headers=headers)
    assert error(response, 401)["code"] == "invalid_api_key" and response.headers["www-authenticate"] == "Bearer"
    assert KEY not in response.text


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_everything_with_it(server, method, path):
    ask = {"/v1/completions": COMPLETION, "/v1/chat/completions": CHAT}.get(path)
    assert server.request(method, path, json=ask).status_code == 200
    assert server.request(method, path, json=ask, headers={"authorization": f"bearer  {KEY}"}).status_code == 200


@pytest.mark.parametrize(
    "path", ["//v1/models", "/health/../v1/models", "/v1/models/", "/%76%31/models", "/v1/models?x=/health"]
)
def test_no_way_of_writing_a_path_or_a_host_gets_around_it(server, path):
    for headers in ({}, {"host": "127.0.0.1/health?"}, {"x-forwarded-for": "127.0.0.1"}, {"x-original-url": "/health"}):
        assert error(server.get(path, headers={"authorization": "", **headers}), 401)


def test_two_keys_are_none(session_engine):
    async def run():
        async with service(session_engine, api_key=KEY) as app:
            scope = {
                "type": "http",
                "method": "GET",
                "path": "/health",
                "headers": [(b"authorization", b"Bearer s3cret")] * 2,
            }
            sent = []

            async def send(message):
                sent.append(message)

            await app(scope, None, send)
            assert sent[0]["status"] == 401
            with pytest.raises(RuntimeError, match="websocket: not served"):
                await app({"type": "websocket", "path": "/", "headers": []}, None, None)

    asyncio.run(run())


def test_the_comparison_takes_the_same_time_for_every_key(session_engine, monkeypatch):
    """Only digests of one length are compared, by `hmac.compare_digest`."""
    seen, compare = [], hmac.compare_digest
    monkeypatch.setattr("hmac.compare_digest", lambda a, b: seen.append((len(a), len(b))) or compare(a, b))

    async def run():
        async with service(session_engine, api_key=KEY) as app:
            for authorization in ("Bearer x", f"Bearer {KEY}", "Bearer " + "x" * 5000, ""):
                await Call(app, "/health", headers={"authorization": authorization}).end()

    asyncio.run(run())
    assert seen == [(32, 32)] * 4


def test_without_a_key_none_is_asked_for(session_engine):
    with client(session_engine) as server:
        assert server.get("/v1/models").status_code == 200
        assert server.get("/v1/models", headers={"authorization": "Bearer x"}).status_code == 200


def test_keys_that_can_not_be(session_engine):
    for key in ("", " x", "é", "a\nb"):
        with pytest.raises(UserError, match="api_key: must"):
            settings(api_key=key)
    assert KEY not in repr(settings(api_key=KEY))
