"""Wrong requests get an error in the JSON of OpenAI's API that names the field, and never reach the engine."""

import ast
import json
from pathlib import Path

import pytest

from dsv32_jax import server as package
from dsv32_jax.errors import UserError
from dsv32_jax.server.errors import from_user_error
from tests.server.harness import CHAT, COMPLETION, PATHS, client, error

COMPLETIONS, CHATS = PATHS


@pytest.fixture(scope="module")
def server(session_engine):
    with client(session_engine, max_body_bytes=100_000, max_queue=8) as test_client:
        yield test_client
        assert not session_engine.busy and session_engine.pool.statistics().in_use == 0


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"model": None}, "model", "must be given"),
        ({"model": 3}, "model", "3 is not a string"),
        ({"n": 17}, "n", "n: 17; must be in 1..4"),
        ({"n": 10**30}, "n", "must be in 1..4"),
        ({"n": 0}, "n", "must be in 1..4"),
        ({"n": True}, "n", "True is not an integer"),
        ({"n": 1.5}, "n", "1.5 is not an integer"),
        ({"seed": -1}, "seed", "must be in 0..2147483647"),
        ({"seed": 2**31}, "seed", "must be in 0..2147483647"),
        ({"temperature": 999999}, "temperature", "must be from 0 to 2"),
        ({"temperature": -0.1}, "temperature", "must be from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "'hot' is not a number"),
        ({"top_p": -1}, "top_p", "must be from 0 to 1"),
        ({"top_p": 0}, "top_p", "top_p: 0.0; must be above 0"),
        ({"max_tokens": 0}, "max_tokens", "must be in 1..1280"),
        ({"max_tokens": 10**400}, "max_tokens", "a number of more than 40 digits; must be in 1..1280"),
        ({"stop": ["x"] * 17}, "stop", "17 strings; at most 16"),
        ({"stop": "x" * 257}, "stop", "a string of 257 characters"),
        ({"stop": ""}, "stop", "a string of 0 characters"),
        ({"stop": [3]}, "stop", "3 is not a string"),
        ({"stream": "yes"}, "stream", "'yes' is not true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "needs stream"),
        ({"stream": True, "stream_options": []}, "stream_options", "a list is not an object"),
        ({"stream": True, "stream_options": {"x": 1}}, "stream_options.x", "Unrecognized request argument"),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "not supported"),
        ({"presence_penalty": 1}, "presence_penalty", "not supported"),
        ({"logit_bias": {"5": 100}}, "logit_bias", "not supported"),
        ({"prompt_embeds": "gASV"}, "prompt_embeds", "Unrecognized request argument supplied: prompt_embeds"),
        ({"\ud800" * 99: 1}, "\\ud800" * 9, "Unrecognized request argument"),
        ({"cache_salt": "x" * 257}, "cache_salt", "longer than 256"),
    ],
)
def test_wrong_fields_of_both(server, path, change, param, message):
    refusal = error(server.post(path, content=json.dumps(PATHS[path] | change), headers=JSON), 400)
    assert refusal["param"].startswith(param) and message in refusal["message"] and len(refusal["message"]) < 300
    assert refusal["type"] == "invalid_request_error"


JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"prompt": None}, "prompt", "must be given"),
        ({"prompt": []}, "prompt", "must be given"),
        ({"prompt": ""}, "prompt", "empty"),
        ({"prompt": ["a", ""]}, "prompt", "empty"),
        ({"prompt": 3}, "prompt", "3 is not a string"),
        ({"prompt": [5, 512]}, "prompt", "position 1: must be a token id in 0..511"),
        ({"prompt": [5, -1]}, "prompt", "position 1"),
        ({"prompt": [5, True]}, "prompt", "position 1"),
        ({"prompt": [5, 2**70]}, "prompt", "position 1"),
        ({"prompt": [[5], "a", [[5]]]}, "prompt", "position 0"),
        ({"prompt": "\ud800"}, "prompt", "surrogate"),
        ({"prompt": ["a"] * 17}, "prompt", "17 of them; at most 16"),
        ({"prompt": ["a"] * 9}, "prompt", "9 of them; at most 8 can wait"),
        ({"prompt": ["a"] * 6, "n": 3}, "n", "6 prompts × 3; at most 16 choices"),
        ({"logprobs": 21}, "logprobs", "must be in 0..20"),
        ({"logprobs": -1}, "logprobs", "must be in 0..20"),
        ({"logprobs": True}, "logprobs", "not an integer"),
        ({"echo": True}, "echo", "not supported"),
        ({"suffix": "x"}, "suffix", "not supported"),
        ({"best_of": 3}, "best_of", "not supported"),
        ({"messages": []}, "messages", "Unrecognized"),
    ],
)
def test_wrong_completions(server, change, param, message):
    refusal = error(server.post(COMPLETIONS, content=json.dumps(COMPLETION | change), headers=JSON), 400)
    assert refusal["param"] == param and message in refusal["message"]


def turn(**fields):
    return {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b", **fields}]}


IMAGE = {"type": "image_url", "image_url": {"url": "http://127.0.0.1/secret"}}


@pytest.mark.parametrize(
    ("change", "param", "message"),
    [
        ({"messages": None}, "messages", "at least one message"),
        ({"messages": []}, "messages", "at least one message"),
        ({"messages": "hello"}, "messages", "at least one message"),
        ({"messages": ["hello"]}, "messages", "0 is 'hello'; must be an object"),
        (turn(role="tool"), "messages.1.role", "'tool' is not supported; must be one of system"),
        (turn(role=None), "messages.1.role", "None is not supported"),
        (turn(content=None), "messages.1.content", "None is not a string"),
        (turn(content=[IMAGE]), "messages.1.content", "parts of type text"),
        (turn(content=["a"]), "messages.1.content", "parts of type text"),
        (turn(content="\udc00"), "messages.1.content", "surrogate"),
        (turn(tool_calls=[{"id": "x"}]), "messages.1.tool_calls", "not supported"),
        (turn(colour="red"), "messages.1.colour", "Unrecognized"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "must be in 0..20"),
        ({"top_logprobs": 2}, "top_logprobs", "needs logprobs"),
        ({"logprobs": 2}, "logprobs", "2 is not true or false"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "must be in"),
        ({"tools": [{"type": "function"}]}, "tools", "not supported"),
        ({"tool_choice": "required"}, "tool_choice", "not supported"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "not supported"),
        ({"modalities": ["text", "audio"]}, "modalities", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"chat_template_kwargs": {"thinking": 1}}, "chat_template_kwargs.thinking", "not true or false"),
        ({"chat_template_kwargs": {"x": 1}}, "chat_template_kwargs.x", "Unrecognized"),
        ({"chat_template": "{{ 1 }}"}, "chat_template", "Unrecognized"),
    ],
)
def test_wrong_chats(server, change, param, message):
    refusal = error(server.post(CHATS, content=json.dumps(CHAT | change), headers=JSON), 400)
    assert refusal["param"] == param and message in refusal["message"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "not JSON"),
        (b"{", "not JSON"),
        (b'{"n": 1,}', "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'{"temperature": NaN}', "NaN is no number"),
        (b'{"temperature": -Infinity}', "-Infinity is no number"),
        (b'{"temperature": 1e999}', "too large"),
        (b'{"n": ' + b"9" * 5000 + b"}", "not JSON"),
        (b'{"a": ' + b"[" * 17 + b"]" * 17 + b"}", "nested more than 16 deep"),
        (b"[" * 90_000, "nested more than 16 deep"),
        (b'{"a":' * 15_000, "nested more than 16 deep"),
        (b'{"prompt": "\xff"}', "not UTF-8 (byte 12)"),
        ('{"n": 1}'.encode("utf-16"), "not UTF-8"),
        (b"\x80\x04\x95", "not UTF-8"),  # a pickle
        (b"\x1f\x8b\x08\x00", "not UTF-8"),  # gzip
    ],
)
@pytest.mark.parametrize("path", PATHS)
def test_bodies_that_are_no_json(server, path, body, message):
    refusal = error(server.post(path, content=body, headers=JSON), 400)
    assert message in refusal["message"] and refusal["code"] == "invalid_json"


def test_a_body_must_say_that_it_is_json(server):
    """A page in a browser can send other content types anywhere without a preflight request."""
    for content_type in ("text/plain", "application/x-www-form-urlencoded", ""):
        content = json.dumps(COMPLETION)
        assert error(server.post(COMPLETIONS, content=content, headers={"content-type": content_type}), 415)
    content_type = {"content-type": "Application/JSON; charset=utf-8"}
    assert server.post(COMPLETIONS, content=json.dumps(COMPLETION), headers=content_type).status_code == 200


def test_too_long_prompts(server, lm):
    refusal = error(server.post(COMPLETIONS, json=COMPLETION | {"prompt": "ship " * 300}), 400)
    assert refusal["code"] == "context_length_exceeded" and refusal["param"] == "prompt"
    assert "and 8 to be made are more than this server's 257 tokens" in refusal["message"]
    assert server.post(COMPLETIONS, json=COMPLETION | {"prompt": [5] * 249}).status_code == 200
    assert error(server.post(COMPLETIONS, json=COMPLETION | {"prompt": [5] * 250}), 400)
    assert error(server.post(COMPLETIONS, json=COMPLETION | {"prompt": ["a", [5] * 250]}), 400)
    long = [{"role": "user", "content": "ship " * 300}]
    refusal = error(server.post(CHATS, json=CHAT | {"messages": long, "max_tokens": None}), 400)
    assert refusal["code"] == "context_length_exceeded" and refusal["param"] == "messages"


def test_too_many_log_probabilities(server, monkeypatch):
    """Their whole number is limited: choices times tokens times alternatives."""
    monkeypatch.setattr("dsv32_jax.server.api_request.MAX_LOGPROB_ENTRIES", 300)
    ask = COMPLETION | {"logprobs": 9, "max_tokens": 10}
    assert server.post(COMPLETIONS, json=ask | {"n": 3}).status_code == 200
    refusal = error(server.post(COMPLETIONS, json=ask | {"n": 4}), 400)
    assert refusal["param"] == "logprobs" and "4 choices × 10 tokens × 10 log-probabilities" in refusal["message"]
    chat = CHAT | {"logprobs": True, "top_logprobs": 20, "max_tokens": 15}
    assert error(server.post(CHATS, json=chat), 400)["param"] == "top_logprobs"


def test_no_such_model(server):
    for path, ask in PATHS.items():
        refusal = error(server.post(path, json=ask | {"model": "gpt-4"}), 404)
        assert refusal["code"] == "model_not_found" and refusal["param"] == "model" and "'gpt-4'" in refusal["message"]


def test_no_such_route_or_method(server):
    for path in ("/", "/v1", "/v1/completion", "/v1/completions/", "/v1/embeddings", "/docs", "/health/x"):
        assert error(server.get(path, follow_redirects=False), 404)["code"] == "unknown_url"
    for path in ("/v1/completions", "/v1/chat/completions"):
        response = server.get(path)
        assert error(response, 405)["code"] == "method_not_allowed" and response.headers["allow"] == "POST"
    for path in ("/v1/models", "/health", "/metrics"):
        assert error(server.post(path, json={}), 405)


def test_large_bodies(server):
    ask = COMPLETION | {"user": "x" * 100_000}
    assert error(server.post(COMPLETIONS, json=ask), 413)["code"] == "body_too_large"

    def chunks():
        for _ in range(30):
            yield b" " * 4096

    response = server.post(COMPLETIONS, content=chunks(), headers=JSON)
    assert "content-length" not in response.request.headers
    assert error(response, 413)["code"] == "body_too_large"
    for length in ("1e9", "-5", "9" * 30):
        assert error(server.post(COMPLETIONS, content=b"{}", headers=JSON | {"content-length": length}), 413)


def test_the_engines_errors_name_the_clients_field():
    names = {"prompt": "messages", "max_new_tokens": "max_tokens"}
    refusal = from_user_error(UserError("prompt 0, position 3: token 9 is not in 0..5"), names)
    assert refusal.param == "messages" and refusal.message == "messages 0, position 3: token 9 is not in 0..5"
    refusal = from_user_error(UserError("max_new_tokens: 9 is too many: 3"), names)
    assert refusal.param == "max_tokens" and refusal.message == "max_tokens: 9 is too many: 3"
    assert from_user_error(UserError("something else"), names).param is None


def test_nothing_here_can_run_what_a_client_sends():
    files = sorted(Path(package.__file__).parent.glob("*.py"))
    assert len(files) > 10
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            called = node.func.id if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) else ""
            banned = {"pickle", "marshal", "shelve", "torch", "multiprocessing", "subprocess", "ctypes"}
            assert not {name.partition(".")[0] for name in names} & banned, path
            assert called not in ("eval", "exec", "compile", "__import__"), path
