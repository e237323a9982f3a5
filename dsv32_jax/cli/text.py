"""Verbs that read and write text: `generate`, `chat`, `score`."""

import math
import sys
from pathlib import Path
from typing import Annotated

import typer

from dsv32_jax.cli.inputs import (
    chat_of,
    check_sampling,
    lines,
    loaded,
    print_json,
    prompts_of,
    read_text,
    read_token_ids,
    replacing,
    sampling_of,
    save_ids,
    tokenizer_of,
)
from dsv32_jax.cli.options import (
    Attention,
    Backend,
    ComputeDtype,
    IgnoreEos,
    IndexTopk,
    Json,
    MaxNewTokens,
    Model,
    NoActQuant,
    NoMtp,
    PromptFile,
    PromptFlag,
    Seed,
    System,
    Temperature,
    Thinking,
    TokenIds,
    TopP,
)
from dsv32_jax.errors import UserError


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
    backend: Backend = "auto",
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
    no_mtp: NoMtp = False,
    as_json: Json = False,
    save_tokens: Annotated[
        Path | None, typer.Option("--save-tokens", help="Write int32 [B, N] here (.npy), -1 after a row's end.")
    ] = None,
) -> None:
    """Continue prompts.

    A prompt is continued as plain text; with --system or --thinking it is one user message of a chat.

    Example: dsv32 generate --model DIR --prompt "The lighthouse"
    """
    prompts = prompts_of(prompt, prompt_file, token_ids)
    check_sampling(temperature, top_p, seed)
    with replacing(save_tokens, "--save-tokens") as tokens_file:
        m = loaded(model, compute_dtype, no_act_quant, attention, index_topk, backend, no_mtp)
        if isinstance(prompts, list) and (system is not None or thinking):
            prompts = [tokenizer_of(m).encode_chat(chat_of(system, text), thinking=thinking) for text in prompts]
        settings = sampling_of(m, temperature, top_p, seed, ignore_eos)
        if len(prompts) == 1 and m.tokenizer is not None and not as_json:
            tokens: list[list[int]] = [[]]
            room = m.new_tokens(m.rows(prompts), max_new_tokens)
            for piece in m.stream(prompts, room, **settings):
                tokens[0].append(piece.token)
                typer.echo(piece.text, nl=False)
                sys.stdout.flush()
            typer.echo()
            if tokens_file is not None:
                save_ids(tokens_file, [tokens[0] + [-1] * (room - len(tokens[0]))])
            return
        result = m.generate(prompts, max_new_tokens, **settings)
        if tokens_file is not None:
            save_ids(tokens_file, result.tokens)
        tokens = [[token for token in row if token >= 0] for row in result.tokens.tolist()]
        if as_json:
            print_json(
                tokens=tokens,
                texts=result.texts,
                finish_reasons=result.finish_reasons,
                prompt_tokens=[len(row) for row in m.rows(prompts)],
                **settings,
            )
            return
        for row, ids in enumerate(tokens):
            if len(tokens) > 1:
                typer.echo(f"--- {row}")
            typer.echo(" ".join(map(str, ids)) if result.texts is None else result.texts[row])


def chat(
    model: Model = "demo",
    max_new_tokens: MaxNewTokens = None,
    temperature: Temperature = None,
    top_p: TopP = None,
    seed: Seed = 0,
    ignore_eos: IgnoreEos = False,
    thinking: Thinking = False,
    system: System = None,
    attention: Attention = "sparse",
    index_topk: IndexTopk = None,
    backend: Backend = "auto",
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
    no_mtp: NoMtp = False,
    as_json: Json = False,
) -> None:
    """Talk to the model: one line is one message; /exit or the end of input leaves.

    Example: dsv32 chat --model DIR --system "Answer in one sentence."
    """
    check_sampling(temperature, top_p, seed)
    m = loaded(model, compute_dtype, no_act_quant, attention, index_topk, backend, no_mtp)
    settings = sampling_of(m, temperature, top_p, seed, ignore_eos)
    messages = chat_of(system)
    for line in lines("" if as_json or not sys.stdin.isatty() else "> "):
        messages.append({"role": "user", "content": line})
        ids = tokenizer_of(m).encode_chat(messages, thinking=thinking)
        answer = ""
        for piece in m.stream([ids], max_new_tokens, **settings):
            answer += piece.text or ""
            if not as_json:
                typer.echo(piece.text, nl=False)
                sys.stdout.flush()
        if not as_json:
            typer.echo()
        messages.append({"role": "assistant", "content": answer})
    if as_json:
        print_json(messages=messages)


def score(
    model: Model = "demo",
    text_file: Annotated[Path | None, typer.Option("--text-file", help="A UTF-8 text.")] = None,
    token_ids: TokenIds = None,
    attention: Attention = "sparse",
    index_topk: IndexTopk = None,
    backend: Backend = "auto",
    compute_dtype: ComputeDtype = None,
    no_act_quant: NoActQuant = False,
    no_mtp: NoMtp = False,
    as_json: Json = False,
    save_logits: Annotated[
        Path | None, typer.Option("--save-logits", help="Write float32 [B, T, vocab] here (.npy); 0 where absent.")
    ] = None,
) -> None:
    """Log-likelihood of a text or of token ids.

    A text is scored after the beginning-of-sentence token; of token ids the first in each row is not scored.

    Example: dsv32 score --model DIR --text-file book.txt --json
    """
    import numpy as np

    if (text_file is None) == (token_ids is None):
        raise UserError("--text-file, --token-ids: give one of the two")
    text = None if text_file is None else read_text(text_file, "--text-file")
    ids = None if token_ids is None else read_token_ids(token_ids)
    inputs = [text] if ids is None else ids
    with replacing(save_logits, "--save-logits") as logits_file:
        m = loaded(model, compute_dtype, no_act_quant, attention, index_topk, backend, no_mtp)
        out = None
        if logits_file is not None:
            # The file has the token file's own width, also where every row ends before it.
            width = ids.shape[1] if ids is not None else len(m.rows(inputs)[0])
            shape = (len(inputs), width, m.config.vocab_size)
            out = np.lib.format.open_memmap(logits_file, mode="w+", dtype=np.float32, shape=shape)
        result = m.score(inputs, out=out)
        if out is not None:
            out.flush()
    bits = None
    if text is not None:
        bits = -result.log_likelihood / math.log(2) / len(text.encode())
    summary = {"perplexity": result.perplexity, "bits_per_byte": bits, "tokens": result.tokens}
    summary["log_likelihood"] = result.log_likelihood
    if as_json:
        lengths = [len(row) - 1 for row in m.rows(inputs)]
        rows = [row[:length].tolist() for row, length in zip(result.log_likelihoods, lengths, strict=True)]
        print_json(**summary, log_likelihoods=rows)
        return
    for name, value in summary.items():
        if value is not None:
            typer.echo(f"{name:<15} {value:.6g}" if isinstance(value, float) else f"{name:<15} {value}")
