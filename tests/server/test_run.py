"""A real server on a socket: OpenAI's own client, slow and broken clients, and its end."""

import asyncio
import contextlib
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import types
import urllib.error
import urllib.request

import openai
import pytest

from dsv32_jax.engine.request import SamplingParams
from dsv32_jax.errors import UserError
from dsv32_jax.server import create_app
from dsv32_jax.server.protocol import SlowProtocol, protocol_class
from dsv32_jax.server.run import Server, bind, serve
from tests.harness import golden_directory
from tests.server.harness import MESSAGES, PROMPT, settings, wait

KEY = "s3cret"


@contextlib.contextmanager
def running(engine, **changes):
    """A server in a thread: (server, port). It is drained at the end."""
    lines, codes = [], []
    server = Server(create_app(engine, settings(**changes)), lines.append)
    with bind("127.0.0.1", 0) as bound:
        thread = threading.Thread(target=lambda: codes.append(server.run(sockets=[bound])))
        thread.start()
        wait(lambda: lines and server.service.ready)
        port = int(lines[0].rpartition(":")[2].partition("/")[0])
        assert lines == [f"http://127.0.0.1:{port}/v1"]
        try:
            yield server, port
        finally:
            server.handle_exit(signal.SIGTERM, None)
            thread.join(60)
            assert not thread.is_alive() and server.service.stopped and not server.force_exit


@pytest.fixture(scope="module")
def running_server(session_engine):
    with running(session_engine, api_key=KEY, read_seconds=1, max_body_bytes=100_000) as server_and_port:
        yield server_and_port


def test_openais_client(running_server, reference_engine, lm):
    """Streams of completions and chats, of several clients at a time, have the tokens of an engine alone."""
    _, port = running_server
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        fields = {"model": "tiny", "max_tokens": 12, "seed": 5, "temperature": 0.8, "extra_body": {"ignore_eos": True}}
        params = SamplingParams(max_new_tokens=12, seed=5, temperature=0.8, ignore_eos=True)
        usage = {"stream": True, "stream_options": {"include_usage": True}}
        texts: dict[str, str] = {}

        def complete():
            *chunks, last = client.completions.create(prompt=PROMPT, **usage, **fields)
            texts["completion"] = "".join(chunk.choices[0].text for chunk in chunks)
            assert chunks[-1].choices[0].finish_reason == "length" and not last.choices
            assert last.usage.completion_tokens == 12 and last.usage.prompt_tokens_details.cached_tokens == 0

        def chat():
            *chunks, last = client.chat.completions.create(messages=MESSAGES, **usage, **fields)
            assert chunks[0].choices[0].delta.role == "assistant"
            texts["chat"] = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert last.usage.prompt_tokens == len(lm.tokenizer.encode_chat(MESSAGES))

        threads = [threading.Thread(target=each) for each in (complete, chat)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        prompts = {"completion": PROMPT, "chat": lm.tokenizer.encode_chat(MESSAGES)}
        expected = reference_engine.generate(prompts.values(), params)
        assert texts == {name: each.completions[0].text for name, each in zip(prompts, expected, strict=True)}
        whole = client.chat.completions.create(messages=MESSAGES, n=2, logprobs=True, top_logprobs=2, **fields)
        assert whole.choices[0].message.content == texts["chat"] and len(whole.choices) == 2
        assert len(whole.choices[1].logprobs.content) == 12
        with pytest.raises(openai.BadRequestError, match="n: 99") as refused:
            client.completions.create(prompt=PROMPT, n=99, **fields)
        assert refused.value.param == "n"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt-4")
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError):
            client.models.list()


def test_a_client_that_leaves_a_real_stream(running_server):
    server, port = running_server
    engine = server.service.worker.engine
    cancelled = engine.metrics.finished["cancelled"]
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        fields = {"max_tokens": 240, "n": 4, "extra_body": {"ignore_eos": True}}
        stream = client.completions.create(model="tiny", prompt="abc", stream=True, **fields)
        next(iter(stream))
        stream.close()
    wait(lambda: not engine.busy)
    assert engine.metrics.finished["cancelled"] == cancelled + 4 and engine.pool.statistics().in_use == 0


def raw(port: int, data: bytes, second: bytes = b"") -> bytes:
    """Sends bytes, and after a first answer others; returns all answers until the server closes the connection."""
    with socket.create_connection(("127.0.0.1", port), timeout=60) as connection:
        connection.sendall(data)
        received = b""
        if second:
            received = connection.recv(65536)
            connection.sendall(second)
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(65536):
                received += piece
        return received


def test_heads_that_are_too_large_or_no_http(running_server):
    _, port = running_server
    for data in (
        b"GET /health HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 40_000,
        b"GET /" + b"x" * 40_000,
        b"GET /health HTTP/1.1\r\nHost: x\r\n" + b"".join(b"X-%d: y\r\n" % n for n in range(5000)),
        b"\x80\x04\x95 pickle\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: -1\r\n\r\n",
        b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\nTransfer-Encoding: gzip\r\n\r\n",
    ):
        response = raw(port, data)
        if response:  # a reset may come before the answer is read
            head, _, body = response.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 400") and json.loads(body)["error"]["code"] == "invalid_http"
    assert raw(port, b"x\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_head_that_does_not_come(running_server):
    _, port = running_server
    assert raw(port, b"") == b""
    assert raw(port, b"GET /health HTT") == b""
    first = f"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
    responses = raw(port, first, second=b"GET /hea")
    assert responses.startswith(b"HTTP/1.1 200") and responses.count(b"HTTP/1.1") == 1


def test_a_body_that_does_not_come_or_is_too_large(running_server):
    _, port = running_server
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    head += f"Authorization: Bearer {KEY}\r\n"
    timed_out = raw(port, f"{head}Content-Length: 50\r\n\r\n{{".encode())
    assert timed_out.startswith(b"HTTP/1.1 408")
    chunk = b"1000\r\n" + b" " * 4096 + b"\r\n"
    large = raw(port, f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunk * 25)
    assert large.startswith(b"HTTP/1.1 413") or not large
    declared = raw(port, f"{head}Content-Length: 100001\r\n\r\n".encode())
    assert declared.startswith(b"HTTP/1.1 413") and b'"code":"body_too_large"' in declared


def test_a_websocket_is_not_served(running_server):
    _, port = running_server
    head = f"GET /health HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\nConnection: upgrade, close\r\n"
    assert b"101" not in raw(port, f"{head}Upgrade: websocket\r\n\r\n".encode()).partition(b"\r\n")[0]


def test_a_client_that_does_not_read_is_cut_off():
    async def run(resumes):
        protocol = protocol_class(read_seconds=60, send_seconds=0.02)
        assert issubclass(protocol, SlowProtocol)
        slow, aborted = protocol.__new__(protocol), asyncio.Event()
        slow.loop, slow.transport, slow._head, slow._write = asyncio.get_running_loop(), None, None, None
        slow.transport = types.SimpleNamespace(abort=aborted.set)
        slow.flow = types.SimpleNamespace(pause_writing=lambda: None, resume_writing=lambda: None)
        slow.pause_writing()
        slow.pause_writing()
        if resumes:
            slow.resume_writing()
            await asyncio.sleep(0.1)
            assert not aborted.is_set()
        else:
            async with asyncio.timeout(60):
                await aborted.wait()

    asyncio.run(run(False))
    asyncio.run(run(True))


def test_collections_leave_out_what_was_there_before(session_engine):
    """Objects from before the server stay out of collections until its end."""
    with running(session_engine):
        wait(lambda: gc.get_freeze_count() > 100_000)
    assert not gc.get_freeze_count()


def test_a_second_signal_ends_at_once(session_engine):
    server = Server(create_app(session_engine, settings()), print)
    server.handle_exit(signal.SIGINT, None)
    assert not server.should_exit
    server.handle_exit(signal.SIGINT, None)
    assert server.should_exit and server.force_exit


def test_a_server_whose_engine_ends_ends_with_1(session_engine, monkeypatch, caplog):
    def broken():
        raise MemoryError

    monkeypatch.setattr(session_engine, "warmup", broken)
    codes: list[int] = []
    bound = bind("127.0.0.1", 0)
    thread = threading.Thread(
        target=lambda: codes.append(serve(session_engine, settings(), bound, listening=lambda _: None))
    )
    thread.start()
    thread.join(60)
    assert codes == [1] and "the engine's thread has ended" in caplog.text


def test_a_port_that_is_taken():
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {port}: cannot be bound: Address already in use"):
            bind("127.0.0.1", port)
    with pytest.raises(UserError, match="--host no host"):
        bind("no host", 0)


def test_the_command_serves_and_drains(tmp_path):
    """`dsv32 serve` as a process, from its first line to SIGTERM."""
    model, log = golden_directory("tiny") / "model", tmp_path / "log.jsonl"
    flags = "--port 0 --name m --max-sequences 1 --max-step-tokens 8 --cache-tokens 64 --compute-dtype float32"
    command = [sys.executable, "-m", "dsv32_jax.cli", "serve", "--model", str(model), *flags.split()]
    environment = {**os.environ, "DSV32_API_KEY": KEY, "JAX_PLATFORMS": "cpu"}
    command += ["--metrics-log", str(log)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert line.startswith("serving m at http://127.0.0.1:"), process.communicate()[1]
            address = line.split()[-1].removesuffix("/v1")

            def get(path: str, key: str) -> int:
                request = urllib.request.Request(address + path, headers={"Authorization": f"Bearer {key}"})
                try:
                    return urllib.request.urlopen(request, timeout=60).status
                except urllib.error.HTTPError as error:
                    return error.code

            assert get("/health", "wrong") == 401 and get("/health", KEY) == 200
            wait(lambda: get("/health/ready", KEY) == 200)
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(lines) >= 2 and all(line["generated_tokens"] == 0 for line in lines)
