"""Turns the fields of a request into token ids and `SamplingParams`.

A field of OpenAI's API that this server lacks is refused where it would change the answer, and ignored where it would
not; names that the API does not have are refused. Four names go beyond it: `ignore_eos`, `cache_salt`,
`chat_template_kwargs.thinking` and its other name `enable_thinking`.
"""

import dataclasses
import secrets
from collections.abc import Callable, Mapping
from typing import Any

from dsv32_jax.engine.blocks import BLOCK_SIZE
from dsv32_jax.engine.engine import Engine
from dsv32_jax.engine.request import MAX_CONTINUATIONS, MAX_LOGPROBS, MAX_STOPS, SamplingParams
from dsv32_jax.errors import UserError
from dsv32_jax.server.errors import ApiError, from_user_error
from dsv32_jax.server.fields import Fields
from dsv32_jax.server.messages import read_messages
from dsv32_jax.server.settings import Settings

__all__ = ["ApiRequest", "read_chat_request", "read_completion_request"]

LONGEST_STOP = 256
"""Characters of a stop string."""
LONGEST_SALT = 256
"""Characters of a salt."""
MAX_LOGPROB_ENTRIES = 2**18
"""Log-probabilities that one answer may have: choices × tokens × alternatives, the sampled token counted as one."""
HOTTEST, COLDEST = 2.0, 0.01
"""The greatest temperature, as with OpenAI, and the least. A request with less is greedy, since its logits would
overflow when divided by that."""
DEFAULT_COMPLETION_TOKENS = 16
"""As with OpenAI."""

COMMON = {"model", "n", "seed", "stop", "stream", "stream_options", "temperature", "top_p", "max_tokens", "logprobs"}
COMMON |= {"ignore_eos", "cache_salt"}
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier", "parallel_tool_calls"}
IGNORED |= {"prompt_cache_key", "prompt_cache_retention"}
NEUTRAL: dict[str, tuple[Any, ...]] = {"logit_bias": ({},), "frequency_penalty": (0,), "presence_penalty": (0,)}
"""Fields that are supported only with the values that have no effect."""
OF_COMPLETION = COMMON | IGNORED | {"prompt"}
NEUTRAL_IN_COMPLETION = NEUTRAL | {"echo": (False,), "suffix": ("",), "best_of": (1,)}
OF_CHAT = COMMON | IGNORED | {"messages", "max_completion_tokens", "top_logprobs", "chat_template_kwargs"}
NEUTRAL_IN_CHAT: dict[str, tuple[Any, ...]] = NEUTRAL | {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "verbosity": (),
    "web_search_options": (),
}


@dataclasses.dataclass(frozen=True)
class ApiRequest:
    """A request for completions, checked.

    Attributes:
      prompts: token ids; each has `params.n` choices.
      params: of all prompts.
      salt: see `BlockTable`.
      stream: whether each piece of text is sent as an event.
      include_usage: whether one more event has the usage.
      names: the request's names of the engine's fields.
    """

    prompts: list[list[int]]
    params: SamplingParams
    salt: bytes
    stream: bool
    include_usage: bool
    names: Mapping[str, str]

    @property
    def choices(self) -> int:
        """The number of choices of all prompts together."""
        return len(self.prompts) * self.params.n


def read_completion_request(body: Mapping[str, Any], engine: Engine, settings: Settings) -> ApiRequest:
    """Reads the body of `POST /v1/completions`; raises `ApiError`."""
    fields = Fields(body)
    fields.only(OF_COMPLETION, NEUTRAL_IN_COMPLETION)
    check_model(fields, settings)
    names = {"prompt": "prompt", "max_new_tokens": "max_tokens", "logprobs": "logprobs"}
    logprobs = fields.integer("logprobs", 0, MAX_LOGPROBS)
    # All that is cheap to check comes before the prompt's text is encoded.
    build = _common(fields, engine, settings, names, logprobs)
    return build(_prompts(fields, engine), DEFAULT_COMPLETION_TOKENS)


def read_chat_request(body: Mapping[str, Any], engine: Engine, settings: Settings) -> ApiRequest:
    """Reads the body of `POST /v1/chat/completions`; raises `ApiError`."""
    fields = Fields(body)
    fields.only(OF_CHAT, NEUTRAL_IN_CHAT)
    check_model(fields, settings)
    limit_name = "max_completion_tokens" if "max_completion_tokens" in fields else "max_tokens"
    names = {
        "prompt": "messages",
        "chat_template": "messages",
        "max_new_tokens": limit_name,
        "logprobs": "top_logprobs",
    }
    top_logprobs = fields.integer("top_logprobs", 0, MAX_LOGPROBS)
    with_logprobs = fields.boolean("logprobs")
    if top_logprobs is not None and not with_logprobs:
        raise fields.error("top_logprobs", "needs logprobs to be true")
    build = _common(fields, engine, settings, names, (top_logprobs or 0) if with_logprobs else None)
    options = fields.object("chat_template_kwargs")
    options.only({"thinking", "enable_thinking"}, {})
    thinking = options.boolean("thinking") or options.boolean("enable_thinking")
    assert engine.lm.tokenizer is not None
    try:
        ids = engine.lm.tokenizer.encode_chat(read_messages(fields), thinking=thinking)
    except UserError as error:
        raise from_user_error(error, names) from error
    return build([ids], None)


def check_model(fields: Fields, settings: Settings) -> None:
    """Raises `ApiError` if the request does not name the model that is served."""
    name = fields.text("model")
    if name is None:
        raise ApiError(400, f"model: must be given; this server has {settings.name}", param="model")
    if name != settings.name:
        message = f"The model {name[:64]!a} does not exist; this server has {settings.name}"
        raise ApiError(404, message, param="model", code="model_not_found")


def _common(
    fields: Fields, engine: Engine, settings: Settings, names: Mapping[str, str], logprobs: int | None
) -> Callable[[list[list[int]], int | None], ApiRequest]:
    """Checks the fields that both routes have.

    Returns:
      A function of the prompts' ids and of the default for the new tokens, which checks their number, and makes the
      `ApiRequest`.
    """
    n = fields.integer("n", 1, min(MAX_CONTINUATIONS, engine.scheduler.limits.sequences), 1) or 1
    limit_name = names["max_new_tokens"]
    max_tokens = fields.integer(limit_name, 1, engine.lm.config.max_position_embeddings)
    temperature = fields.number("temperature", 0, HOTTEST, settings.temperature)
    # Without a seed, two requests are to differ.
    seed = fields.integer("seed", 0, 2**31 - 1, secrets.randbelow(2**31))
    stream = fields.boolean("stream")
    options = fields.object("stream_options")
    options.only({"include_usage", "include_obfuscation"}, {})
    if "stream_options" in fields and not stream:
        raise fields.error("stream_options", "needs stream to be true")
    include_usage = options.boolean("include_usage")
    salt = fields.text("cache_salt") or ""
    if len(salt) > LONGEST_SALT:
        raise fields.error("cache_salt", f"longer than {LONGEST_SALT} characters")
    try:
        params = SamplingParams(
            temperature=temperature if temperature >= COLDEST else 0.0,
            top_p=fields.number("top_p", 0, 1, settings.top_p),
            seed=seed or 0,
            n=n,
            stop=_stops(fields),
            ignore_eos=fields.boolean("ignore_eos"),
            logprobs=logprobs,
        )
    except UserError as error:
        raise from_user_error(error, {"top_p": "top_p", "stop": "stop"}) from error

    def build(prompts: list[list[int]], default: int | None) -> ApiRequest:
        if len(prompts) * n > MAX_CONTINUATIONS:
            raise fields.error("n", f"{len(prompts)} prompts × {n}; at most {MAX_CONTINUATIONS} choices in all")
        new = _new_tokens(engine, max(map(len, prompts)), max_tokens, default, names)
        entries = len(prompts) * n * new * (logprobs + 1) if logprobs is not None else 0
        if entries > MAX_LOGPROB_ENTRIES:
            message = (
                f"{len(prompts) * n} choices × {new} tokens × {(logprobs or 0) + 1} log-probabilities are more than "
                f"{MAX_LOGPROB_ENTRIES}; ask for fewer, or give a smaller {limit_name}"
            )
            raise fields.error(names["logprobs"], message)
        limited = dataclasses.replace(params, max_new_tokens=new)
        return ApiRequest(prompts, limited, salt.encode(), stream, include_usage, names)

    return build


def _new_tokens(
    engine: Engine, longest: int, max_tokens: int | None, default: int | None, names: Mapping[str, str]
) -> int:
    """The number of tokens to generate after the longest prompt: `max_tokens`, which must fit, or as many of the
    default as fit.
    """
    # The last token that is sampled needs no place in the cache.
    context = min(engine.lm.config.max_position_embeddings, engine.pool.num_blocks * BLOCK_SIZE + 1)
    room = context - longest
    if room < (max_tokens or 1):
        raise ApiError(
            400,
            f"{names['prompt']}: {longest} tokens and {max_tokens or 1} to be made are more than this server's "
            f"{context} tokens; shorten {names['prompt']}" + (f" or {names['max_new_tokens']}" if max_tokens else ""),
            param=names["prompt"],
            code="context_length_exceeded",
        )
    if max_tokens is None and default is None:
        default = engine.lm.new_tokens([[0] * longest], None)
    return max_tokens or min(default or 1, room)


def _stops(fields: Fields) -> tuple[str, ...]:
    value = fields.value("stop")
    stops = value if isinstance(value, list) else [] if value is None else [value]
    if len(stops) > MAX_STOPS:
        raise fields.error("stop", f"{len(stops)} strings; at most {MAX_STOPS}")
    for stop in stops:
        if not 1 <= len(fields.as_text("stop", stop)) <= LONGEST_STOP:
            raise fields.error("stop", f"a string of {len(stop)} characters; must be of 1..{LONGEST_STOP}")
    return tuple(stops)


def _prompts(fields: Fields, engine: Engine) -> list[list[int]]:
    """The ids of the field `prompt`: a text, texts, ids or lists of ids."""
    value = fields.value("prompt")
    if value is None or value == []:
        raise fields.error("prompt", "must be given: a string, strings, ids or lists of ids")
    several = isinstance(value, list) and not isinstance(value[0], int)
    prompts = value if several else [value]
    if len(prompts) > MAX_CONTINUATIONS:
        raise fields.error("prompt", f"{len(prompts)} of them; at most {MAX_CONTINUATIONS} in one request")
    return [_ids(fields, prompt, engine) for prompt in prompts]


def _ids(fields: Fields, prompt: Any, engine: Engine) -> list[int]:
    if not prompt:
        raise fields.error("prompt", "empty; it must have at least one character or token")
    if isinstance(prompt, list):
        vocabulary = engine.lm.config.vocab_size
        for position, id in enumerate(prompt):
            if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < vocabulary:
                raise fields.error("prompt", f"position {position}: must be a token id in 0..{vocabulary - 1}")
        return prompt
    assert engine.lm.tokenizer is not None
    return engine.lm.tokenizer.encode(fields.as_text("prompt", prompt), bos=True)
