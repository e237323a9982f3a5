"""Right requests get the engine's own tokens and texts, in the JSON of OpenAI's API, whole and as a stream."""

import pytest

from dsv32_jax.engine.request import Completion, SamplingParams
from tests.server.harness import CHAT, COMPLETION, MESSAGES, PATHS, PROMPT, client, error, events


@pytest.fixture(scope="module")
def server(session_engine):
    with client(session_engine) as test_client:
        yield test_client


def request_alone(reference_engine, prompt, **params):
    return reference_engine.generate([prompt], SamplingParams(**{"max_new_tokens": 8, "ignore_eos": True, **params}))[0]


def test_models(server):
    models = server.get("/v1/models").json()
    assert models["object"] == "list" and [model["id"] for model in models["data"]] == ["tiny"]
    assert server.get("/v1/models/tiny").json() == models["data"][0]
    assert error(server.get("/v1/models/no/such"), 404)["code"] == "model_not_found"


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "top_p": 0.8, "seed": 7}])
def test_a_completion_is_the_engines(server, reference_engine, sampling):
    request = request_alone(reference_engine, PROMPT, **sampling)
    answer = server.post("/v1/completions", json=COMPLETION | sampling).json()
    assert answer["object"] == "text_completion" and answer["id"].startswith("cmpl-") and answer["model"] == "tiny"
    text = request.completions[0].text
    assert answer["choices"] == [{"index": 0, "text": text, "logprobs": None, "finish_reason": "length"}]
    tokens = len(request.prompt)
    assert answer["usage"] == {
        "prompt_tokens": tokens,
        "completion_tokens": 8,
        "total_tokens": tokens + 8,
        "prompt_tokens_details": {"cached_tokens": 0},
    }


def test_a_chat_is_the_engines(server, reference_engine, lm):
    request = request_alone(reference_engine, lm.tokenizer.encode_chat(MESSAGES))
    answer = server.post("/v1/chat/completions", json=CHAT).json()
    assert answer["object"] == "chat.completion" and answer["usage"]["prompt_tokens"] == len(request.prompt)
    message = {"role": "assistant", "content": request.completions[0].text, "refusal": None}
    assert answer["choices"] == [{"index": 0, "message": message, "logprobs": None, "finish_reason": "length"}]


def test_messages_in_parts_and_of_a_developer(server):
    parts = [{"type": "text", "text": "Which boats"}, {"type": "text", "text": "were green?"}]
    messages = [{"role": "developer", "content": "Short."}, {"role": "user", "content": parts, "name": "me"}]
    joined = [MESSAGES[0], {"role": "user", "content": "Which boats\nwere green?"}]
    first, second = (
        server.post("/v1/chat/completions", json=CHAT | {"messages": each}).json() for each in (messages, joined)
    )
    assert first["choices"] == second["choices"] and first["usage"]["prompt_tokens"] > 4


def test_thinking_reaches_the_template(server, lm, monkeypatch):
    seen = []
    monkeypatch.setattr(lm.tokenizer, "encode_chat", lambda messages, *, thinking: seen.append(thinking) or [2, 3])
    for options in ({}, {"thinking": True}, {"enable_thinking": True}):
        assert server.post("/v1/chat/completions", json=CHAT | {"chat_template_kwargs": options}).status_code == 200
    assert seen == [False, True, True]


def test_an_answer_may_be_sent_back_as_it_was(server):
    answer = server.post("/v1/chat/completions", json=CHAT).json()["choices"][0]["message"]
    answer |= {"tool_calls": None, "function_call": None, "annotations": [], "audio": None}
    messages = [*MESSAGES, answer, {"role": "user", "content": "And in 1903?"}]
    assert server.post("/v1/chat/completions", json=CHAT | {"messages": messages}).status_code == 200


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_says_the_same_as_the_whole(server, path, n):
    ask = PATHS[path] | {"n": n, "temperature": 1, "seed": 3, "max_tokens": 12}
    whole = server.post(path, json=ask | {"logprobs": True if "chat" in path else 1}).json()
    response = server.post(path, json=ask | {"stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, usage = events(response.text)
    assert (
        usage["choices"] == [] and usage["usage"]["completion_tokens"] == 12 * n == whole["usage"]["completion_tokens"]
    )
    assert all(chunk["usage"] is None for chunk in chunks) and len({chunk["id"] for chunk in chunks}) == 1
    texts, reasons, roles = [""] * n, [[] for _ in range(n)], [0] * n
    for chunk in chunks:
        (choice,) = chunk["choices"]
        delta = choice.get("delta", choice)
        texts[choice["index"]] += delta.get("content", delta.get("text")) or ""
        roles[choice["index"]] += "role" in delta
        reasons[choice["index"]] += [choice["finish_reason"]]
    assert texts == [choice.get("text", choice.get("message", {}).get("content")) for choice in whole["choices"]]
    assert len(set(texts)) == n
    for each in reasons:
        assert each[-1] == "length" and set(each[:-1]) <= {None}
    assert roles == [int("chat" in path)] * n


@pytest.mark.parametrize("path", PATHS)
def test_steps_with_several_tokens_of_a_choice(server, session_engine, monkeypatch, path):
    """Such as those of an engine that speculates: the reason comes with the last token, a log-probability with each."""
    ask = PATHS[path] | {"n": 2, "temperature": 1, "seed": 3, "max_tokens": 9, "stream": True}
    ask |= {"logprobs": True, "top_logprobs": 1} if "chat" in path else {"logprobs": 1}

    def choices():
        return [chunk["choices"][0] for chunk in events(server.post(path, json=ask).text)]

    want, step = choices(), session_engine.step
    monkeypatch.setattr(session_engine, "step", lambda: [*step(), *step(), *step()])
    several = choices()
    for index in range(2):
        assert [each for each in several if each["index"] == index] == [each for each in want if each["index"] == index]
    assert sum(each["finish_reason"] is not None for each in several) == 2


def test_no_usage_without_asking(server):
    chunks = events(server.post("/v1/completions", json=COMPLETION | {"stream": True}).text)
    assert not any("usage" in chunk for chunk in chunks) and all(chunk["choices"] for chunk in chunks)


def test_characters_that_are_split_over_tokens_come_whole(server, lm, monkeypatch):
    text = "🚢 海风 é"
    script, add = lm.tokenizer.encode(text), Completion.add
    assert len(script) > len(text)
    monkeypatch.setattr(
        Completion, "add", lambda self, token, *arguments: add(self, script[len(self.tokens)], *arguments)
    )
    ask = COMPLETION | {"stream": True, "max_tokens": len(script)}
    pieces = [chunk["choices"][0]["text"] for chunk in events(server.post("/v1/completions", json=ask).text)]
    assert "".join(pieces) == text and all(piece and "�" not in piece for piece in pieces)
    response = server.post("/v1/completions", json=ask | {"max_tokens": 2}).text
    cut = [chunk["choices"][0]["text"] for chunk in events(response)]
    assert "".join(cut) == "�"  # the end of the answer is in the middle of a character


def test_stop_strings(server, reference_engine):
    text = request_alone(reference_engine, PROMPT).completions[0].text
    stop = text[3:5]
    want = text[: text.index(stop)]
    for stops in (stop, ["never", stop]):
        answer = server.post("/v1/completions", json=COMPLETION | {"stop": stops}).json()
        assert (answer["choices"][0]["text"], answer["choices"][0]["finish_reason"]) == (want, "stop")
        chunks = events(server.post("/v1/completions", json=COMPLETION | {"stop": stops, "stream": True}).text)
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == want
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"


def test_seeds(server):
    ask = COMPLETION | {"temperature": 1.5, "max_tokens": 16}

    def text(**fields):
        return server.post("/v1/completions", json=ask | fields).json()["choices"][0]["text"]

    assert text(seed=1) == text(seed=1) != text(seed=2)
    assert text() != text()  # 16 tokens alike by chance are no worry
    assert text(temperature=0.001) == text(temperature=0)


def test_log_probabilities_of_a_completion(server, reference_engine, lm):
    (want,) = request_alone(reference_engine, PROMPT, logprobs=2).completions
    ask = COMPLETION | {"logprobs": 2}
    logprobs = server.post("/v1/completions", json=ask).json()["choices"][0]["logprobs"]
    assert logprobs["token_logprobs"] == pytest.approx([each.token for each in want.logprobs], abs=1e-5)
    assert [len(each) for each in logprobs["top_logprobs"]] == [2] * 8  # greedy: the sampled one is the likeliest
    for token, top, id, expected in zip(
        logprobs["tokens"], logprobs["top_logprobs"], want.tokens, want.logprobs, strict=True
    ):
        data = lm.tokenizer.token_bytes(id)
        assert token in (data.decode(errors="replace"), f"token_id:{id}") or token.startswith("bytes:\\x")
        assert top[token] == pytest.approx(expected.likeliest[id], abs=1e-5)
    assert logprobs["text_offset"][0] == 0 and logprobs["text_offset"] == sorted(logprobs["text_offset"])
    chunks = events(server.post("/v1/completions", json=ask | {"stream": True}).text)
    streamed = [chunk["choices"][0]["logprobs"] for chunk in chunks]
    assert {name: [item for each in streamed for item in each[name]] for name in logprobs} == logprobs
    sampled = server.post("/v1/completions", json=COMPLETION | {"logprobs": 0}).json()["choices"][0]["logprobs"]
    assert [list(top) for top in sampled["top_logprobs"]] == [[token] for token in sampled["tokens"]]


def test_log_probabilities_of_a_chat(server, reference_engine, lm):
    (want,) = request_alone(reference_engine, lm.tokenizer.encode_chat(MESSAGES), logprobs=3).completions
    ask = CHAT | {"logprobs": True, "top_logprobs": 3}
    entries = server.post("/v1/chat/completions", json=ask).json()["choices"][0]["logprobs"]["content"]
    assert [entry["logprob"] for entry in entries] == pytest.approx([each.token for each in want.logprobs], abs=1e-5)
    for entry, id in zip(entries, want.tokens, strict=True):
        assert bytes(entry["bytes"] or ()) == lm.tokenizer.token_bytes(id) and len(entry["top_logprobs"]) == 3
        assert entry["top_logprobs"][0]["token"] == entry["token"]
    without = server.post("/v1/chat/completions", json=CHAT | {"logprobs": True}).json()
    assert all(entry["top_logprobs"] == [] for entry in without["choices"][0]["logprobs"]["content"])


def test_several_prompts_of_ids_and_texts(server, lm):
    ids = lm.tokenizer.encode(PROMPT, bos=True)
    text_alone = server.post("/v1/completions", json=COMPLETION).json()["choices"][0]["text"]
    assert server.post("/v1/completions", json=COMPLETION | {"prompt": ids}).json()["choices"][0]["text"] == text_alone
    for prompts in ([PROMPT, "In 1903"], [ids, lm.tokenizer.encode("In 1903", bos=True)]):
        answer = server.post("/v1/completions", json=COMPLETION | {"prompt": prompts, "n": 2}).json()
        assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
        texts = [choice["text"] for choice in answer["choices"]]
        assert texts[0] == texts[1] == text_alone != texts[2] == texts[3]
        assert answer["usage"]["completion_tokens"] == 32


def test_cached_tokens_and_salts(server, session_engine):
    """Only prompts with equal salts share cached blocks."""
    session_engine.pool.forget()
    ids = [(i * i) % 97 + 2 for i in range(150)]

    def cached(**fields):
        ask = COMPLETION | {"prompt": ids, "max_tokens": 1, **fields}
        return server.post("/v1/completions", json=ask).json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    assert [cached(), cached()] == [0, 128]
    assert [cached(cache_salt="a"), cached(cache_salt="a"), cached(cache_salt="b")] == [0, 128, 0]


def test_what_has_no_effect_is_taken(server):
    ignored = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "safety_identifier": "x"}
    neutral = {"logit_bias": {}, "frequency_penalty": 0, "presence_penalty": 0.0, "stop": None, "seed": None}
    ask = COMPLETION | ignored | neutral | {"echo": False, "best_of": 1, "suffix": None}
    assert server.post("/v1/completions", json=ask).status_code == 200
    ask = CHAT | ignored | neutral | {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}}
    assert server.post("/v1/chat/completions", json=ask).status_code == 200


def test_defaults(server, lm, monkeypatch):
    ask = {"model": "tiny", "prompt": PROMPT, "ignore_eos": True}
    answer = server.post("/v1/completions", json=ask).json()
    assert answer["usage"]["completion_tokens"] == 16
    ask = {"model": "tiny", "messages": MESSAGES, "ignore_eos": True}
    monkeypatch.setattr(lm, "generation_config", {"max_new_tokens": 5})
    assert server.post("/v1/chat/completions", json=ask).json()["usage"]["completion_tokens"] == 5
    monkeypatch.setattr(lm, "generation_config", {"max_new_tokens": 5000})  # cut to what the cache has
    usage = server.post("/v1/chat/completions", json=ask).json()["usage"]
    assert usage["total_tokens"] == 4 * 64 + 1
    ask |= {"max_tokens": 3, "max_completion_tokens": 2}
    assert server.post("/v1/chat/completions", json=ask).json()["usage"]["completion_tokens"] == 2
