"""`dsv32 generate`."""

import dataclasses
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from dsv32_jax.cli.inputs import (
    chat_of,
    check_sampling,
    loaded,
    print_json,
    prompts_of,
    replacing,
    sampling_of,
    save_ids,
    say,
    tokenizer_of,
)
from dsv32_jax.cli.options import (
    Attention,
    Backends,
    CheckFlag,
    ComputeDtype,
    IgnoreEos,
    IndexTopk,
    Json,
    MaxNewTokens,
    Model,
    NoActQuant,
    NoMtp,
    PartFlag,
    PromptFile,
    PromptFlag,
    Seed,
    System,
    Temperature,
    Thinking,
    TokenIds,
    TopP,
)


def generate(
    model: Model = "demo",
    prompt: PromptFlag = None,
    prompt_file: PromptFile = None,
    token_ids: TokenIds = None,
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = 0,
    ignore_eos: IgnoreEos = False,
    thinking: Thinking = False,
    system: System = None,
    attention: Attention = "sparse",
    index_topk: IndexTopk = None,
    backend: Backends = None,
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
    no_mtp: NoMtp = False,
    part: PartFlag = None,
    check: CheckFlag = False,
    as_json: Json = False,
    save_tokens: Annotated[
        Path | None, typer.Option("--save-tokens", help="Write int32 [B, N] here (.npy), -1 after a row's end.")
    ] = None,
) -> None:
    """Continue prompts.

    A prompt is continued as plain text; with --system or --thinking it is one user message of a chat. The last line, on
    stderr, has the speed: new tokens of all prompts by the time that reading the prompts and generating took.

    Example: dsv32 generate --model DIR --prompt "The lighthouse"
    """
    prompts: Any = prompts_of(prompt, prompt_file, token_ids)
    check_sampling(temperature, top_p, seed)
    with replacing(save_tokens, "--save-tokens") as tokens_file:
        m = loaded(model, compute_dtype, no_act_quant, attention, index_topk, backend, no_mtp, part, check)
        if isinstance(prompts, list) and (system is not None or thinking):
            tokenizer = tokenizer_of(m, "--system" if system is not None else "--thinking")
            prompts = [tokenizer.encode_chat(chat_of(system, text), thinking=thinking) for text in prompts]
        sampling = sampling_of(m, temperature, top_p, seed, ignore_eos)
        rows = m.rows(prompts)
        room = m.new_tokens(rows, max_new_tokens)
        m.warmup([len(row) for row in rows], room)
        start = time.perf_counter()
        if len(prompts) == 1 and m.tokenizer is not None and not as_json:
            tokens: list[list[int]] = [[]]
            for piece in m.stream(
                prompts,
                room,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                seed=sampling.seed,
                ignore_eos=sampling.ignore_eos,
            ):
                tokens[0].append(piece.token)
                typer.echo(piece.text, nl=False)
                sys.stdout.flush()
            typer.echo()
            say(speed(tokens, time.perf_counter() - start))
            if tokens_file is not None:
                save_ids(tokens_file, [tokens[0] + [-1] * (room - len(tokens[0]))])
            return
        result = m.generate(
            prompts,
            room,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            seed=sampling.seed,
            ignore_eos=sampling.ignore_eos,
        )
        seconds = time.perf_counter() - start
        if tokens_file is not None:
            save_ids(tokens_file, result.tokens)
        tokens = [[token for token in row if token >= 0] for row in result.tokens.tolist()]
        if as_json:
            print_json(
                tokens=tokens,
                texts=result.texts,
                finish_reasons=result.finish_reasons,
                prompt_tokens=[len(row) for row in rows],
                seconds=seconds,
                tokens_per_second=sum(map(len, tokens)) / seconds,
                **dataclasses.asdict(sampling),
            )
            return
        for row, ids in enumerate(tokens):
            if len(tokens) > 1:
                typer.echo(f"--- {row}")
            typer.echo(" ".join(map(str, ids)) if result.texts is None else result.texts[row])
        say(speed(tokens, seconds))


def speed(tokens: list[list[int]], seconds: float) -> str:
    """A line about new tokens of all prompts and the time that they took."""
    count = sum(map(len, tokens))
    return f"{count} tokens in {seconds:.2f} s, {count / seconds:.1f} tokens/s"
