"""What `load` returns: a model with its config and tokenizer, and the calls a notebook or script makes of it."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv32_jax import arguments
from dsv32_jax.cache import BLOCK_SIZE, KVCache
from dsv32_jax.compiling import all_at_once
from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.fidelity import Trace
from dsv32_jax.model import Batch, DeepseekV32, Options, prepared, run_layer, step, step_with_trace
from dsv32_jax.sampling import row_keys, sample
from dsv32_jax.tokenizer import Tokenizer
from pallas_kernels.backend import BackendError
from pallas_kernels.paging import slots_of

# A prompt is read in pieces of a power of two between these, so that `step` is compiled for few shapes.
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 512
SMALLEST_CHUNK_FOR_KERNELS, LARGEST_CHUNK_FOR_KERNELS = 128, 2048
"""With kernels a shorter piece saves little time, since weights are read for it all the same, and must be compiled; a
piece of 2048 tokens takes twice the time of one of 512. References would need memory for every head's scores."""

Prompts = str | Sequence[Any] | np.ndarray | Array


@dataclasses.dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    tokens: int32 [B, N], N = `max_new_tokens`; -1 after a row's end-of-sentence token.
    texts: one text a row (special tokens left out), or None without a tokenizer.
    finish_reasons: "stop" (end of sentence) or "length", one a row.
    """

    tokens: np.ndarray
    texts: list[str] | None
    finish_reasons: list[str]


@dataclasses.dataclass(frozen=True)
class Score:
    """What `score` returns.

    log_likelihoods: float32 [B, T - 1]; entry t is log p(ids[t + 1] | ids[: t + 1]), 0 where that token is absent.
    tokens: how many tokens were scored (each row's first has nothing before it).
    log_likelihood: their sum. perplexity: exp(-log_likelihood / tokens).
    """

    log_likelihoods: np.ndarray
    tokens: int
    log_likelihood: float
    perplexity: float


class Piece(NamedTuple):
    """One newly generated token of one row; `text` is what it completes (None without a tokenizer)."""

    row: int
    token: int
    text: str | None


class LanguageModel:
    """A model ready to use. `model`, `config`, `tokenizer` and `options` are plain attributes, free to be replaced.

    generation_config: the checkpoint's `generation_config.json` as a dict; its `eos_token_id` goes before the config's.
    """

    def __init__(
        self,
        model: DeepseekV32,
        config: ModelConfig,
        tokenizer: Tokenizer | None = None,
        options: Options | None = None,
        generation_config: dict[str, Any] | None = None,
    ):
        self.model = model
        self.config = config
        self.tokenizer = tokenizer
        self.options = options or Options.default(config)
        self.generation_config = generation_config or {}
        eos = self.generation_config.get("eos_token_id", config.eos_token_id)
        self.eos_ids: tuple[int, ...] = () if eos is None else tuple(np.atleast_1d(eos).tolist())
        self._flattened: tuple[Any, ...] | None = None

    # Passing a module to a jitted function costs the host some microseconds a leaf at every call; a flat list costs far
    # less. Replacing `self.model` or `self.options` flattens anew.
    def flat_model(self) -> tuple[list[Any], Any]:
        """Leaves of the `prepared` model and their structure, for jitted functions that are called often."""
        model, options = self.model, self.options
        if self._flattened is None or self._flattened[0] is not model or self._flattened[1] != options:
            self._flattened = None  # there may be no room for two
            self._flattened = (model, options, *jax.tree.flatten(prepared(model, options)))
        return self._flattened[2:]

    def _step(self, batch: Batch, cache: KVCache) -> tuple[Array, KVCache]:
        leaves, structure = self.flat_model()
        with _user_error():
            return _flat_step(leaves, structure, batch, cache, self.options)

    # ---- forward ----

    def logits(self, ids: Prompts, *, out: np.ndarray | None = None) -> np.ndarray:
        """Logits at every position.

        Args:
          ids: [T] or [B, T] integers; -1 marks absent positions at the right.
          out: float32 [B, T, V] to write into, for instance a memory-mapped file.

        Returns:
          float32 [B, T, V] in host memory (`out` where given); 0 at absent positions.

        Raises:
          UserError: an id outside the vocabulary, a -1 in the middle, an empty or too long row.
        """
        rows = self.rows(ids)
        result = self._output(rows, out)
        for row, start, stop, logits in self._forward(rows):
            result[row, start:stop] = np.asarray(logits)[: stop - start]
        return result

    def score(self, ids: Prompts, *, out: np.ndarray | None = None) -> Score:
        """Log-likelihood of every token given those before it.

        Args:
          ids: [T] or [B, T] integers, or texts (beginning-of-sentence token put in front); at least 2 tokens a row.
          out: float32 [B, T, V], filled as `logits` fills it, in the same pass.
        """
        rows = self.rows(ids)
        for number, ids_of_row in enumerate(rows):
            if len(ids_of_row) < 2:
                raise UserError(f"row {number}: 1 token; a score needs at least 2, the first has nothing before it")
        if out is not None:
            out = self._output(rows, out)
        found = np.zeros((len(rows), max(map(len, rows)) - 1), np.float32)
        for row, start, stop, logits in self._forward(rows):
            targets = np.zeros(logits.shape[0], np.int32)
            known = rows[row][start + 1 : stop + 1]
            targets[: len(known)] = known
            found[row, start : start + len(known)] = np.asarray(_log_likelihood(logits, targets))[: len(known)]
            if out is not None:
                out[row, start:stop] = np.asarray(logits)[: stop - start]
        count = sum(len(row) - 1 for row in rows)
        total = float(found.sum(dtype=np.float64))
        return Score(found, count, total, _exp(-total / count))

    def trace(self, ids: Prompts) -> Trace:
        """What every layer chose and computed for one sequence of ids [T]; see `dsv32_jax.fidelity.Trace`.

        The whole sequence is one step: memory grows with its square.
        """
        rows = self.rows(ids)
        if len(rows) != 1:
            raise UserError(f"trace: {len(rows)} sequences; give one")
        (row,) = rows
        size = _padded(len(row), SMALLEST_CHUNK)
        tables = self._block_tables(1, len(row))
        cache = KVCache.create(self.config, tables.size, self.options)
        batch = _prompt_batch(row, 0, len(row), size, tables[0], np.arange(size, dtype=np.int32))
        with _user_error():
            logits, _, recorded = step_with_trace(self.model, batch, cache, self.options)
        return Trace.from_step(logits, recorded, len(row))

    def run_layer(self, layer: int, hidden: np.ndarray | Array) -> dict[str, np.ndarray]:
        """One layer alone, on a residual stream of one's own.

        Args:
          layer: which, from 0.
          hidden: float [T, hidden_size], the stream before it, of positions 0 .. T - 1.

        Returns:
          `hidden` [T, hidden_size] after the layer, `topk` int32 [T, K], `index_scores` and `attention` float32 [T, T],
          and in layers with experts `experts` and `expert_weights` [T, experts]; see `dsv32_jax.fidelity.Trace`.

        Raises:
          UserError: there is no such layer, or `hidden` has another shape.
        """
        if not 0 <= layer < self.config.num_hidden_layers:
            raise UserError(f"layer: {layer}; must be in 0..{self.config.num_hidden_layers - 1}")
        if hidden.ndim != 2 or hidden.shape[1] != self.config.hidden_size or not len(hidden):
            raise UserError(f"hidden: {list(hidden.shape)}; must be [T, {self.config.hidden_size}]")
        tokens = len(hidden)
        table = self._block_tables(1, tokens)[0]
        cache = KVCache.create(self.config, table.size, self.options)
        batch = _prompt_batch([0] * tokens, 0, tokens, tokens, table, np.arange(tokens, dtype=np.int32))
        with _user_error():
            record = run_layer(self.model, layer, jnp.asarray(hidden), batch, cache, self.options)[2]
        seen = {name: np.asarray(value) for name, value in record.items()}
        return {
            name: value[:, :tokens] if name in ("index_scores", "attention") else value for name, value in seen.items()
        }

    # ---- generation ----

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> Generation:
        """Continues each prompt by up to `max_new_tokens` tokens; all rows are decoded together.

        Args:
          prompts: ids [T] or [B, T] (-1 absent at the right), a text, or a list of texts or id lists. A text gets the
            beginning-of-sentence token in front. What a row receives does not depend on the other rows.
          max_new_tokens: at least 1; the longest prompt plus this must fit in `max_position_embeddings`. Default:
            that of the generation config, or 256, or what fits.
          temperature, top_p, seed: see `sampling.sample`; temperature 0 is greedy and the same for every seed.
          ignore_eos: go on after an end-of-sentence token.

        Raises:
          UserError: naming the argument, or the prompt and position, that is wrong.
        """
        rows = self.rows(prompts)
        max_new_tokens = self.new_tokens(rows, max_new_tokens)
        tokens = np.full((len(rows), max_new_tokens), -1, np.int32)
        for n, ids in enumerate(self._decode(rows, max_new_tokens, temperature, top_p, seed, ignore_eos)):
            tokens[:, n] = ids
        texts = None if self.tokenizer is None else [self.tokenizer.decode(row) for row in tokens]
        stopped = np.isin(tokens, self.eos_ids).any(axis=1) & (not ignore_eos)
        return Generation(tokens, texts, ["stop" if stop else "length" for stop in stopped])

    def stream(
        self,
        prompts: Prompts,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> Iterator[Piece]:
        """`generate`, token by token: one `Piece` for each row that is still running, in step order.

        A character's bytes are held back until all have come; a row's last piece has what was still held.
        """
        rows = self.rows(prompts)
        max_new_tokens = self.new_tokens(rows, max_new_tokens)
        decoders = None if self.tokenizer is None else [self.tokenizer.stream_decoder() for _ in rows]
        for n, ids in enumerate(self._decode(rows, max_new_tokens, temperature, top_p, seed, ignore_eos)):
            for row, token in enumerate(ids.tolist()):
                if token < 0:
                    continue
                text = None
                if decoders is not None:
                    text = decoders[row].add(token)
                    if n + 1 == max_new_tokens or (token in self.eos_ids and not ignore_eos):
                        text += decoders[row].finish()
                yield Piece(row, token, text)

    def sampling_defaults(self) -> tuple[float, float]:
        """(temperature, top_p) where a caller gives none: greedy, unless the generation config says `do_sample`."""
        found = self.generation_config
        if not found.get("do_sample"):
            return 0.0, 1.0
        temperature, top_p = (found.get(name) for name in ("temperature", "top_p"))
        return 1.0 if temperature is None else float(temperature), 1.0 if top_p is None else float(top_p)

    def warmup(self, lengths: Sequence[int], max_new_tokens: int) -> int:
        """Compiles what `generate` runs for prompts of these lengths together, several programs at a time.

        Else each is compiled when it is first needed, one after the other; with kernels that takes most of a minute of
        one core at full width.

        Args:
          lengths: tokens of each prompt of a call.
          max_new_tokens: of that call.

        Returns:
          How many programs those are.
        """
        with _user_error():
            return len(all_at_once(self.programs(lengths, max_new_tokens)))

    def programs(self, lengths: Sequence[int], max_new_tokens: int) -> list[Callable[[], Any]]:
        """What compiles each program of `warmup`."""
        tables = self._block_tables(len(lengths), max(lengths) + max_new_tokens)
        cache = jax.eval_shape(lambda: KVCache.create(self.config, tables.size, self.options))
        leaves, structure = self.flat_model()
        pieces = sorted({size for length in lengths for *_, size in self._chunks(length)})

        def compile_step(tokens: int, table: np.ndarray) -> Any:
            given, wanted = np.zeros(tokens, np.int32), np.zeros(len(table), np.int32)
            batch = Batch(given, given, given, given, table, wanted)
            return _flat_step.lower(leaves, structure, batch, cache, self.options).compile()

        steps = [*((size, tables[:1]) for size in pieces), (len(lengths), tables)]
        return [functools.partial(compile_step, *step) for step in steps]

    def _decode(
        self,
        rows: list[list[int]],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seed: int,
        ignore_eos: bool,
    ) -> Iterator[np.ndarray]:
        """int32 [B] a step, -1 for rows that have ended; stops when all have.

        The next step is started before the tokens of this one are fetched, so that the device does not wait for the
        host. A row that has ended is therefore computed once more; nobody sees what comes of it.
        """
        check_sampling(temperature, top_p, seed)
        lengths = np.array([len(row) for row in rows], np.int32)
        batch = len(rows)
        tables = self._block_tables(batch, int(lengths.max()) + max_new_tokens)
        cache = KVCache.create(self.config, tables.size, self.options)
        last = []
        for row, table in zip(rows, tables, strict=True):
            for start, stop, size in self._chunks(len(row)):
                # Only the logits after the last prompt token are wanted; -1 asks for none and keeps the shape.
                wanted = np.array([stop - start - 1 if stop == len(row) else -1], np.int32)
                logits, cache = self._step(_prompt_batch(row, start, stop, size, table, wanted), cache)
                if stop == len(row):
                    last.append(logits)
        numbers = np.arange(batch, dtype=np.int32)
        greedy, nucleus = temperature == 0, top_p < 1

        def draw(logits: Array, n: int) -> Array:
            keys = None if greedy else row_keys(seed, numbers, lengths + n)
            return sample(logits, keys, temperature, top_p, greedy=greedy, nucleus=nucleus)

        running = np.ones(batch, bool)
        ids = draw(jnp.concatenate(last), 0)
        for n in range(max_new_tokens):
            if n + 1 < max_new_tokens:
                positions = np.where(running, lengths + n, -1)
                flat = _batch(
                    ids=ids,
                    positions=positions,
                    slots=slots_of(positions, numbers, tables),
                    sequence=np.where(running, numbers, 0),
                    block_tables=tables,
                    logit_rows=numbers,
                )
                logits, cache = self._step(flat, cache)
                following = draw(logits, n + 1)
            taken = np.where(running, ids, -1).astype(np.int32)
            yield taken
            if not ignore_eos:
                running = running & ~np.isin(taken, self.eos_ids)
            if n + 1 == max_new_tokens or not running.any():
                return
            ids = following

    # ---- helpers ----

    def _chunks(self, length: int, all_logits: bool = False) -> Iterator[tuple[int, int, int]]:
        """(start, stop, size) of the pieces of a prompt; size is the power of two that the piece is padded to.

        Pieces of which all logits are wanted stay short: those of 2048 tokens would take a gigabyte.
        """
        kernels = self.options.runs_kernels
        least = SMALLEST_CHUNK_FOR_KERNELS if kernels else SMALLEST_CHUNK
        most = LARGEST_CHUNK_FOR_KERNELS if kernels and not all_logits else LARGEST_CHUNK
        for start in range(0, length, most):
            stop = min(start + most, length)
            yield start, stop, _padded(stop - start, least)

    def _forward(self, rows: list[list[int]]) -> Iterator[tuple[int, int, int, Array]]:
        """(row, start, stop, logits [T >= stop - start, V]) for each chunk of each row, one row after the other.

        The cache is used again for the next row: what an earlier row left lies at positions that causality hides until
        they are written anew.
        """
        tables = self._block_tables(1, max(map(len, rows)))
        cache = KVCache.create(self.config, tables.size, self.options)
        for number, row in enumerate(rows):
            for start, stop, size in self._chunks(len(row), all_logits=True):
                wanted = np.where(np.arange(size) < stop - start, np.arange(size), -1).astype(np.int32)
                logits, cache = self._step(_prompt_batch(row, start, stop, size, tables[0], wanted), cache)
                yield number, start, stop, logits

    def new_tokens(self, rows: list[list[int]], max_new_tokens: int | None) -> int:
        """How many tokens `generate` makes of these rows; `UserError` where they do not fit."""
        longest = max(map(len, rows))
        room = self.config.max_position_embeddings - longest
        if max_new_tokens is None:
            max_new_tokens = max(1, min(int(self.generation_config.get("max_new_tokens") or 256), room))
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens: {max_new_tokens}; must be at least 1")
        if max_new_tokens > room:
            raise UserError(
                f"max_new_tokens: {max_new_tokens} after a prompt of {longest} tokens is longer than the cache can be; "
                f"together at most max_position_embeddings = {longest + room}"
            )
        return max_new_tokens

    def _block_tables(self, rows: int, tokens: int) -> np.ndarray:
        """int32 [rows, N]: row r owns blocks r*N .. (r+1)*N - 1. N is a power of two: few shapes to compile."""
        blocks = 1 << (-(-tokens // BLOCK_SIZE) - 1).bit_length()
        blocks = min(blocks, -(-self.config.max_position_embeddings // BLOCK_SIZE))
        return np.arange(rows * blocks, dtype=np.int32).reshape(rows, blocks)

    def _output(self, rows: list[list[int]], out: np.ndarray | None) -> np.ndarray:
        shape = (len(rows), max(map(len, rows)), self.config.vocab_size)
        if out is None:
            return np.zeros(shape, np.float32)
        if out.ndim != 3 or out.dtype != np.float32 or out.shape[1] < shape[1] or out.shape[::2] != shape[::2]:
            raise UserError(f"out: {out.dtype} {list(out.shape)}; must be float32 {list(shape)}")
        out[...] = 0
        return out

    def rows(self, prompts: Prompts) -> list[list[int]]:
        """Prompts in any accepted form as checked lists of ids, without the absent positions at the right."""
        if isinstance(prompts, str):
            prompts = [prompts]
        if isinstance(prompts, np.ndarray | Array):
            array = np.asarray(prompts)
            if array.ndim not in (1, 2) or array.dtype.kind not in "iu":
                raise UserError(f"token ids: {array.dtype} {list(array.shape)}; must be int32 [T] or [B, T]")
            prompts = list(np.atleast_2d(array))
        elif not isinstance(prompts, Sequence):
            raise UserError(f"prompt: of type {type(prompts).__name__}; must be a text, token ids, or a list of these")
        elif len(prompts) and isinstance(prompts[0], int | np.integer):
            prompts = [prompts]
        if not len(prompts):
            raise UserError("prompt: none given")
        return [self._row(number, prompt) for number, prompt in enumerate(prompts)]

    def _row(self, number: int, prompt: str | Sequence[int] | np.ndarray | Array) -> list[int]:
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise UserError("prompt: the checkpoint has no tokenizer.json; give token ids instead of text")
            if not prompt:
                raise UserError(f"prompt {number}: empty; it must have at least one character")
            prompt = self.tokenizer.encode(prompt, bos=True)
        try:
            ids = np.asarray(prompt)
        except ValueError:  # lists of different lengths, one in the other
            ids = np.array(None)
        if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
            raise UserError(f"prompt {number}: must be a text or a flat list of integer token ids")
        (present,) = np.nonzero(ids != -1)
        if not present.size:
            raise UserError(f"prompt {number}: empty; it must have at least one token")
        ids = ids[: present[-1] + 1]
        (wrong,) = np.nonzero((ids < 0) | (ids >= self.config.vocab_size))
        if wrong.size:
            where = f"prompt {number}, position {wrong[0]}"
            if ids[wrong[0]] == -1:
                raise UserError(f"{where}: -1 in the middle; absent positions are at the right")
            raise UserError(
                f"{where}: token {ids[wrong[0]]} is not in 0..{self.config.vocab_size - 1} "
                f"(vocab_size {self.config.vocab_size})"
            )
        if len(ids) > self.config.max_position_embeddings:
            raise UserError(
                f"prompt {number}: {len(ids)} tokens is longer than the cache can be; "
                f"at most max_position_embeddings = {self.config.max_position_embeddings}"
            )
        return ids.tolist()


def check_sampling(temperature: float, top_p: float, seed: int) -> None:
    """Raises `UserError` for values that `generate` does not take."""
    # The device has float32.
    arguments.number("temperature", temperature, "0 (greedy) or above", least=0, most=float(np.finfo(np.float32).max))
    arguments.number("top_p", top_p, "above 0 and at most 1", above=0, most=1)
    arguments.integer("seed", seed, 0, 2**31 - 1)


@functools.partial(jax.jit, static_argnames=("structure", "options"), donate_argnames=("cache",))
def _flat_step(
    leaves: list[Any], structure: Any, batch: Batch, cache: KVCache, options: Options
) -> tuple[Array, KVCache]:
    return step(jax.tree.unflatten(structure, leaves), batch, cache, options)


@jax.jit
def _log_likelihood(logits: Array, targets: Array) -> Array:
    """float32 [T]: log softmax of `logits` [T, V] at `targets` [T]."""
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    return chosen - jax.nn.logsumexp(logits, axis=1)


def _padded(length: int, least: int) -> int:
    return max(least, 1 << (length - 1).bit_length())


def _prompt_batch(row: list[int], start: int, stop: int, size: int, table: np.ndarray, wanted: np.ndarray) -> Batch:
    """Tokens start..stop of one row as a flat batch of `size` tokens; padding has position and slot -1."""
    positions, sequence = np.arange(start, start + size), np.zeros(size, np.int32)
    positions[stop - start :] = -1
    ids = np.zeros(size, np.int32)
    ids[: stop - start] = row[start:stop]
    return _batch(
        ids=ids,
        positions=positions,
        slots=slots_of(positions, sequence, table[None]),
        sequence=sequence,
        block_tables=table[None],
        logit_rows=wanted,
    )


@contextlib.contextmanager
def _user_error() -> Iterator[None]:
    """A backend that an op lacks is the user's choice, so the user's error."""
    try:
        yield
    except BackendError as error:
        raise UserError(f"backend: {error}") from error


def _batch(**arrays: np.ndarray | Array) -> Batch:
    """Arrays of the host stay there: a jitted function takes them over in a tenth of the time of `jnp.asarray`."""
    return Batch(**{n: a if isinstance(a, Array) else np.asarray(a, np.int32) for n, a in arrays.items()})


def _exp(value: float) -> float:
    try:
        return math.exp(value)
    except OverflowError:
        return math.inf
