"""Many requests at once: the loop of scheduler, jitted step and results.

The host plans a step while the device still runs the one before: a token that is drawn there goes into the next step
without the host having seen it. The host then reads what the earlier step drew. A continuation that ends is noticed one
step late; what it computes in that step is dropped. An engine that speculates plans after the results instead; see
`speculation`.

Steps have few shapes: the tokens and the width of the block tables are a least number times powers of two or four, all
else is fixed. `warmup` compiles all of them.
"""

import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv32_jax.blocks import BLOCK_SIZE, BlockPool
from dsv32_jax.cache import KVCache
from dsv32_jax.compiling import all_at_once
from dsv32_jax.device_step import Drawing, Drawn, Shape, copy_blocks, draft_step, draw, engine_step
from dsv32_jax.errors import UserError
from dsv32_jax.language_model import LARGEST_CHUNK_FOR_KERNELS, LanguageModel
from dsv32_jax.memory import available_bytes, human
from dsv32_jax.metrics import Metrics
from dsv32_jax.model import Options
from dsv32_jax.packing import Draw, pack
from dsv32_jax.progress import progress_bar
from dsv32_jax.request import MOST_LOGPROBS, Completion, Event, LogProbs, Request, SamplingParams
from dsv32_jax.sampling import log_probabilities
from dsv32_jax.scheduler import Limits, Scheduler, Sequence, Step
from dsv32_jax.speculation import take

__all__ = ["Engine"]

SMALLEST_STEP = 8
"""Tokens that the smallest step is padded to; each larger one has twice as many."""
LARGER_FOR_KERNELS = 4
"""With kernels four times as many: a few hundred tokens take little longer than one, since weights are read for either,
and each shape costs some ten seconds of compiling."""
NARROWEST_TABLE = 4
"""Blocks of the narrowest block tables; each wider one is `WIDER` times as wide."""
NARROWEST_FOR_KERNELS = 128
"""The same with kernels: they stop at a token's position, where references compute on the whole width."""
WIDER = 4
RUNS_UNTIL_RECORDED = 3
"""On a GPU, XLA makes a CUDA graph of a program in its second and third run, which take up to ten times as long."""


class Engine:
    """Continuous batching of requests over one model.

    Args:
      lm: model, tokenizer and options. The engine keeps to the options that it is made with.
      cache_tokens: places of the cache, rounded up to whole blocks. Default: of one sequence of the greatest length, or
        2^15, whichever is less.
      memory_fraction: instead, of the memory that is free now, how much the cache takes; no more than all sequences
        together can fill.
      max_tokens: of a step. Default: 256, or 512 with kernels: a step of them takes little longer than one of fewer,
        since weights are read for either.
      max_prompt_tokens: of a step that continues no sequence, so that none waits for it. Default: `max_tokens`, or 2048
        with kernels where that is twice as many or more: prompts then take half of the time.
      max_sequences: that run at a time.
      sharing: find cached prefixes again.
      speculate: try a token of the model's MTP layer in each step of a sequence: up to two tokens a step, and the same
        as without. A layer more in the cache, and no planning ahead.

    Raises:
      UserError: naming the argument that is wrong.
    """

    cache: KVCache
    _drawn: Array  # by the step before

    def __init__(
        self,
        lm: LanguageModel,
        *,
        cache_tokens: int | None = None,
        memory_fraction: float | None = None,
        max_tokens: int | None = None,
        max_prompt_tokens: int | None = None,
        max_sequences: int = 32,
        sharing: bool = True,
        speculate: bool = False,
    ):
        kernels = lm.options.runs_kernels
        if max_tokens is None:
            max_tokens = 512 if kernels else 256
        if max_prompt_tokens is None:
            longer = kernels and 2 * max_tokens <= LARGEST_CHUNK_FOR_KERNELS
            max_prompt_tokens = LARGEST_CHUNK_FOR_KERNELS if longer else max_tokens
        try:
            limits = Limits(max_tokens, max_sequences, max_prompt_tokens)
        except ValueError as error:
            raise UserError(f"max_{error}") from error
        if cache_tokens is not None and memory_fraction is not None:
            raise UserError("memory_fraction: give it or cache_tokens, not both")
        if speculate and not lm.config.has_mtp:
            raise UserError("speculate: the model has no MTP layer; its config's num_nextn_predict_layers is 0")
        self.speculate = speculate
        self._layers = lm.config.num_hidden_layers + speculate
        self._leaves, self._structure = lm.flat_model()  # before the free memory is looked at
        if memory_fraction is not None:
            cache_tokens = cache_tokens_of(lm, memory_fraction, max_sequences, self._layers)
        elif cache_tokens is None:
            cache_tokens = min(lm.config.max_position_embeddings, 2**15)
        if cache_tokens < 1:
            raise UserError(f"cache_tokens: {cache_tokens}; must be at least 1")
        self.lm = lm
        self.options: Options = lm.options
        self.pool = BlockPool(-(-cache_tokens // BLOCK_SIZE), sharing=sharing)
        self.scheduler = Scheduler(self.pool, limits)
        self.metrics = Metrics()
        widest = min(-(-lm.config.max_position_embeddings // BLOCK_SIZE), self.pool.num_blocks)
        self._rows = max_sequences * (2 if speculate else 1)  # that draw a token in a step
        narrowest = NARROWEST_FOR_KERNELS if kernels else NARROWEST_TABLE
        sizes = multiplied(SMALLEST_STEP, max_tokens, LARGER_FOR_KERNELS if kernels else 2)
        self._sizes = sorted({*sizes, max(sizes[-1], max_prompt_tokens)})
        self._widths = multiplied(min(narrowest, widest), widest, WIDER)
        self._numbers = itertools.count()
        self._owner: dict[Sequence, tuple[Request, int]] = {}
        self._row: dict[Sequence, int] = {}  # of a sequence's token in `_drawn`
        self._programs: dict[tuple[int, int], tuple[Any, Any]] = {}  # compiled ahead, by shape
        self._late: tuple[Step, Drawn] | None = None
        self._empty()

    # ---- requests ----

    def add(self, prompt: Any, params: SamplingParams | None = None, *, salt: bytes = b"") -> Request:
        """Queues a prompt.

        Args:
          prompt: a text, or ids.
          params: how it is continued.
          salt: only prompts with equal salts find each other's blocks in the cache; of a tenant, say.

        Raises:
          UserError: the prompt is wrong, or could never run: it does not fit into the cache with what may follow it.
        """
        params = params or SamplingParams()
        rows = self.lm.rows(prompt)
        if len(rows) > 1:
            raise UserError(f"prompt: {len(rows)} of them; add one after the other")
        (ids,) = rows
        self.lm.new_tokens([ids], params.max_new_tokens)
        if params.stop and self.lm.tokenizer is None:
            raise UserError("stop: the checkpoint has no tokenizer.json; give stop_token_ids")
        sequences = [Sequence(list(ids), params.max_new_tokens, salt) for _ in range(params.n)]
        sequences[0].siblings = sequences[1:]
        try:
            self.scheduler.add(sequences[0])
        except ValueError as error:
            raise UserError(f"prompt: {error}") from error
        decoders = [self.lm.tokenizer.stream_decoder() if self.lm.tokenizer else None for _ in sequences]
        request = Request(next(self._numbers), ids, params, [Completion(decoder) for decoder in decoders])
        self._owner |= {sequence: (request, n) for n, sequence in enumerate(sequences)}
        return request

    def cancel(self, request: Request) -> None:
        """Ends a request; its blocks are free for the next step."""
        self._end(request, "cancelled")

    def summary(self) -> dict[str, Any]:
        """Counts and latencies so far, and queues and cache now; see `Metrics.summary`."""
        state = len(self.scheduler.running), len(self.scheduler.waiting)
        return self.metrics.summary(self.pool.statistics(), *state)

    @property
    def busy(self) -> bool:
        """Something runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._late)

    def step(self) -> list[Event]:
        """Starts the next step, then takes the tokens of the one before it, or when speculating its own: those are
        what it returns.

        If a step fails on the device, all requests that have not ended end with "error", and the exception is raised;
        the engine goes on with those that come afterwards.
        """
        planned = self.scheduler.schedule()
        try:
            started = None if planned is None else (planned, self._run(planned))
            late, self._late = (started, None) if self.speculate else (self._late, started)
            return [] if late is None else self._receive(*late)
        except Exception:
            self._start_anew()
            raise

    def stream(self, request: Request) -> Iterator[Event]:
        """Events of one request as they come, while all others go on too."""
        while not request.finished:
            yield from (event for event in self.step() if event.request is request)

    def generate(self, prompts: Iterable[Any], params: SamplingParams | None = None) -> list[Request]:
        """Adds prompts, and runs until they have all ended."""
        requests = [self.add(prompt, params) for prompt in prompts]
        for request in requests:
            while not request.finished:
                self.step()
        return requests

    # ---- shapes ----

    def shapes(self) -> list[tuple[int, int]]:
        """(tokens, width of the block tables) of every step that can be."""
        return [(tokens, width) for width in self._widths for tokens in self._sizes]

    def programs(self) -> list[Callable[[], tuple[Any, Any]]]:
        """What compiles the programs of each of `shapes`; it holds none of the engine's memory."""
        state = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (self._drawn, self.cache))
        model, speculate, options = (self._leaves, self._structure), self.speculate, self.options
        return [
            functools.partial(compiled, model, self._shape(*size), *state, options, speculate) for size in self.shapes()
        ]

    def warmup(self) -> int:
        """Compiles every shape, several at a time, and runs each with nothing in it, on a GPU until its graph is
        recorded; returns how many there are.
        """
        shapes = self.shapes()
        self._programs = dict(zip(shapes, all_at_once(self.programs()), strict=True))
        nothing = Step([], [], [])
        runs = RUNS_UNTIL_RECORDED if jax.default_backend() == "gpu" else 1
        others = (Drawing(drawn=True), Drawing(drawn=True, nucleus=True), Drawing(logprobs=True))
        steps = [*((shape, Drawing()) for shape in shapes * runs), *((shapes[0], drawing) for drawing in others)]
        with progress_bar("warming up", len(steps), "steps") as advance:
            for shape, drawing in steps:
                self._start(nothing, *shape, drawing)
                advance(1)
            self._copy([])
            jax.block_until_ready(self.cache)
        return len(shapes)

    # ---- a step ----

    def _run(self, planned: Step) -> Drawn:
        """Starts a step; returns what it draws, before it is there."""
        for part in planned.parts:
            request, _ = self._owner[part.sequence]
            if request.cached_tokens is None:
                request.cached_tokens = part.start
                self.metrics.begin(request, part.start)
        self.metrics.steps += 1
        self.metrics.step_tokens += planned.tokens
        self.metrics.preemptions += len(planned.preempted)
        if planned.copies:
            self._copy(planned.copies)
        blocks = max(len(part.sequence.table.blocks) for part in planned.parts if part.sequence.table)
        tokens = next(size for size in self._sizes if size >= planned.tokens)
        width = next(width for width in self._widths if width >= blocks)
        drawn = self._start(planned, tokens, width, self._drawing(planned))
        self._row = {sequence: row for row, sequence in enumerate(planned.samples)}
        for array in jax.tree.leaves((drawn.tokens, drawn.told, drawn.drafts)):
            array.copy_to_host_async()
        return drawn

    def _start(self, planned: Step, tokens: int, width: int, drawing: Drawing) -> Drawn:
        """Starts a step of a given shape."""
        shape = self._shape(tokens, width)
        flat = pack(planned, shape, self._row, self._draws(planned) if drawing.drawn else [], self.speculate)
        run_step, run_draft = self._programs.get((tokens, width)) or self._jitted(shape)
        states, logits, draws, self.cache = run_step(self._leaves, flat, self._drawn, self.cache)
        self._drawn = draw(logits, draws, greedy=not drawing.drawn, nucleus=drawing.nucleus)
        told = log_probabilities(logits, self._drawn, MOST_LOGPROBS) if drawing.logprobs else None
        drafts = None
        if self.speculate:
            drafts, self.cache = run_draft(self._leaves, flat, states, self._drawn, self.cache)
        return Drawn(self._drawn, told, drafts)

    def _shape(self, tokens: int, width: int) -> Shape:
        return Shape(tokens, width, self.scheduler.limits.sequences, self._rows)

    def _jitted(self, shape: Shape) -> tuple[Any, Any]:
        """What `compiled` returns, of a shape that is not compiled ahead."""
        how = {"shape": shape, "options": self.options}
        return (
            lambda leaves, *given: engine_step(leaves, self._structure, *given, **how),
            lambda leaves, *given: draft_step(leaves, self._structure, *given, **how),
        )

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        """Of all copies of a step, as many as may run at a time: no sequence needs more than one."""
        pairs = np.full((self.scheduler.limits.sequences, 2), -1, np.int32)
        pairs[: len(copies)] = np.asarray(copies, np.int32).reshape(-1, 2)
        self.cache = copy_blocks(self.cache, *map(jnp.asarray, pairs.T))

    def _drawing(self, planned: Step) -> Drawing:
        """What the rows of a plan ask for."""
        params = [self._owner[sequence][0].params for sequence in planned.samples]
        drawn = [one for one in params if one.temperature > 0]
        return Drawing(
            bool(drawn), any(one.top_p < 1 for one in drawn), any(one.logprobs is not None for one in params)
        )

    def _draws(self, planned: Step) -> list[Draw]:
        """How each row draws."""
        owners = [self._owner[sequence] for sequence in planned.samples]
        return [Draw(one.params.seed, n, one.params.temperature, one.params.top_p) for one, n in owners]

    def _receive(self, planned: Step, drawn: Drawn) -> list[Event]:
        """Hands out a step's tokens."""
        tokens = np.asarray(drawn.tokens)[: len(planned.samples)].tolist()
        if drawn.drafts is not None:
            tokens = take(planned, tokens, np.asarray(drawn.drafts), self.metrics)
        self.scheduler.receive(planned, tokens)
        events, gained, now = [], [], time.monotonic()
        for row, (sequence, token) in enumerate(zip(planned.samples, tokens, strict=True)):
            if sequence.finished or token < 0:
                continue
            request, n = self._owner[sequence]
            completion = request.completions[n]
            if (count := request.params.logprobs) is not None:
                assert drawn.told is not None
                own, ids, values = (np.asarray(x)[row] for x in drawn.told)
                likeliest = dict(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
                completion.logprobs.append(LogProbs(float(own), likeliest))
            text = completion.add(token, request.params, self.lm.eos_ids, now - request.came)
            gained.append(completion.times)
            if completion.finish_reason:
                self._finish(sequence)
            events.append(Event(request, n, token, text))
        self.metrics.tokens(gained)
        return events

    def _end(self, request: Request, reason: str) -> None:
        """Ends what still runs of a request."""
        for sequence, (owner, n) in list(self._owner.items()):
            if owner is request:
                request.completions[n].finish_reason = reason
                self._finish(sequence)

    def _start_anew(self) -> None:
        """Ends all requests; what is in the cache is not known any more."""
        for request, _ in list(self._owner.values()):
            self._end(request, "error")
        self.pool.forget()
        self._late, self._row = None, {}
        self._empty()

    def _empty(self) -> None:
        """Device memory as at the start."""
        self.__dict__.pop("cache", None)  # there may be no room for two
        self.cache = KVCache.create(self.lm.config, self.pool.num_blocks, self.options, self._layers)
        self._drawn = jnp.zeros(self._rows, jnp.int32)

    def _finish(self, sequence: Sequence) -> None:
        """Of a completion that has its `finish_reason`."""
        self.scheduler.finish(sequence)
        request, n = self._owner.pop(sequence)
        self.metrics.finished[request.completions[n].finish_reason or ""] += 1


def compiled(
    model: tuple[list[Any], Any], shape: Shape, drawn: Any, cache: Any, options: Options, speculate: bool
) -> tuple[Any, Any]:
    """The programs of a shape: the step, and the draft of an engine that speculates. All arrays may be abstract."""
    flat, how = np.zeros(shape.size, np.int32), {"shape": shape, "options": options}
    step = engine_step.lower(*model, flat, drawn, cache, **how)
    if not speculate:
        return step.compile(), None
    states, *_ = step.out_info
    return step.compile(), draft_step.lower(*model, flat, states, drawn, cache, **how).compile()


def cache_tokens_of(lm: LanguageModel, memory_fraction: float, sequences: int, layers: int) -> int:
    """Whole blocks of places that fit in a part of the free memory, and that so many sequences can fill."""
    if not 0 < memory_fraction <= 1:
        raise UserError(f"memory_fraction: {memory_fraction}; must be above 0 and at most 1")
    form = KVCache.bytes_per_token(lm.config, lm.options.cache_form, lm.options.act_quant, layers)
    free, where = available_bytes()
    blocks = int(memory_fraction * min(free, 1e15) // (form * BLOCK_SIZE))
    if not blocks:
        raise UserError(f"memory_fraction: {memory_fraction} of {human(free)} of {where} holds no block of the cache")
    return BLOCK_SIZE * min(blocks, sequences * -(-lm.config.max_position_embeddings // BLOCK_SIZE))


def multiplied(first: int, last: int, factor: int) -> list[int]:
    """first, first * factor, ... up to the first that is not less than `last`, which then takes its place."""
    found = [first]
    while found[-1] < last:
        found.append(found[-1] * factor)
    return [*found[:-1], max(last, first)]
