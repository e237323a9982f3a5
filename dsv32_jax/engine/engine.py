"""Many requests at once: the loop of scheduler, jitted step and results.

The host plans a step while the device still runs the one before: a token that is drawn there goes into the next step
without the host having seen it. The host then reads what the earlier step drew. A continuation that ends is noticed one
step late; what it computes in that step is dropped. An engine that speculates plans after the results instead; see
`speculation`.

A step is planned, run, and then published: only then others find the blocks that it writes. Queues, pool and cache
change in calls of `change` alone: an exception there, Ctrl-C included, ends what was under way, and nothing is ever
half done. One in between, as while the host waits for the device, changes nothing.

Steps have few shapes: the tokens and the width of the block tables are a least number times powers of two or four, all
else is fixed. `warmup` compiles all of them.
"""

import functools
import logging
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv32_jax.common.arguments import boolean, instance, integer, number
from dsv32_jax.common.progress import progress_bar
from dsv32_jax.common.units import human
from dsv32_jax.engine.blocks import BLOCK_SIZE, BlockPool
from dsv32_jax.engine.device_step import (
    Drawing,
    Drawn,
    Shape,
    compiled,
    copy_blocks,
    draft_step,
    draw,
    engine_step,
)
from dsv32_jax.engine.packing import Draw, pack, step_sizes, table_widths
from dsv32_jax.engine.reception import Reception
from dsv32_jax.engine.request import MOST_LOGPROBS, Event, LogProbs
from dsv32_jax.engine.scheduler import Limits, Scheduler, Sequence, Step
from dsv32_jax.engine.speculation import take
from dsv32_jax.errors import UserError
from dsv32_jax.generate.compiling import all_at_once
from dsv32_jax.generate.language_model import LARGEST_CHUNK_FOR_KERNELS, LanguageModel
from dsv32_jax.generate.memory import available_bytes
from dsv32_jax.generate.sampling import NOT_FINITE, log_probabilities
from dsv32_jax.model.cache import KVCache

__all__ = ["Engine"]

RUNS_UNTIL_RECORDED = 3
"""On a GPU, XLA makes a CUDA graph of a program in its second and third run, which take up to ten times as long."""
MOST_CACHE_TOKENS = 2**31 - BLOCK_SIZE
"""Slots are int32."""

Late = tuple[Step, Drawn]
logger = logging.getLogger("dsv32_jax")


class Engine(Reception):
    """Continuous batching of requests over one model.

    Args:
      lm: model, tokenizer and options. Where a weight or the options are replaced later, the engine refuses to go on.
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
        instance("lm", lm, LanguageModel, "a LanguageModel, as `load` returns it")
        limits = limits_of(lm, max_tokens, max_sequences, max_prompt_tokens)
        if cache_tokens is not None and memory_fraction is not None:
            raise UserError("memory_fraction: give it or cache_tokens, not both")
        if cache_tokens is not None:
            cache_tokens = integer("cache_tokens", cache_tokens, 1, MOST_CACHE_TOKENS)
        sharing, self.speculate = boolean("sharing", sharing), boolean("speculate", speculate)
        if self.speculate and not lm.config.has_mtp:
            raise UserError("speculate: the model has no MTP layer; its config's num_nextn_predict_layers is 0")
        self._layers = lm.config.num_hidden_layers + self.speculate
        self._leaves, self._structure = lm.flat_model()  # before the free memory is looked at
        if memory_fraction is not None:
            cache_tokens = cache_tokens_of(lm, memory_fraction, limits.sequences, self._layers)
        elif cache_tokens is None:
            cache_tokens = min(lm.config.max_position_embeddings, 2**15)
        self.pool = BlockPool(-(-cache_tokens // BLOCK_SIZE), sharing=sharing)
        super().__init__(lm, Scheduler(self.pool, limits))
        kernels = lm.options.runs_kernels
        widest = min(-(-lm.config.max_position_embeddings // BLOCK_SIZE), self.pool.num_blocks)
        self._rows = limits.sequences * (2 if self.speculate else 1)  # that draw a token in a step
        self._sizes = step_sizes(limits.tokens, limits.prompt_tokens, kernels)
        self._widths = table_widths(widest, kernels)
        self._row: dict[Sequence, int] = {}  # of a sequence's token in `_drawn`
        self._programs: dict[tuple[int, int], tuple[Any, Any]] = {}  # compiled ahead, by shape
        self._late: deque[Late] = deque()  # steps that were started, whose tokens have not been taken
        self._ahead = 0 if self.speculate else 1  # of them, when the next is planned
        self._empty()

    # ---- steps ----

    def summary(self) -> dict[str, Any]:
        """Counts and latencies so far, and queues and cache now; see `Metrics.summary`."""
        with self.lock:
            self.repair()
            state = len(self.scheduler.running), len(self.scheduler.waiting)
            return self.metrics.summary(self.pool.statistics(), *state)

    @property
    def busy(self) -> bool:
        """Something runs or waits."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._late or self.torn)

    def step(self) -> list[Event]:
        """Starts the next step, then takes the tokens of the one before it, or when speculating its own.

        Returns:
          An event for each of these tokens; for one of a request that is being streamed none, as the stream has it.
          Before them, events that came in steps which streams and `generate` made.

        Raises:
          BaseException: whatever ended the step, Ctrl-C included. While the host waits for the device that changes
            nothing, and the next step goes on; else, and where the device failed, all requests that have not ended
            end with "error", nothing of theirs can be found in the cache, and the engine goes on with those that come
            afterwards. `UserError` if the model was edited; nothing has changed then.
        """
        self.check_unedited()
        silent = self._outbox.silent
        late = self.change(self._start_next)
        if late is None:
            with self.lock:
                return [] if silent else self._outbox.rest()
        try:
            drawn = late[1].fetched()
        except Exception as error:
            self.change(self._lose, late, error)
            raise
        return self.change(self._receive, late, drawn, silent)

    def start_anew(self, error: str) -> None:
        """Ends all requests; what is in the cache is not known any more, nor in queues and pool."""
        for request, n in list(self._owner.values()):
            if request.completions[n].finish_reason is None:
                request.completions[n].fail(error)
                self.metrics.finished["error"] += 1
        self._owner.clear()
        self.scheduler.clear()
        self._late.clear()
        self._row = {}
        self._empty()

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
        self.change(self._rehearse, shapes)
        return len(shapes)

    def _rehearse(self, shapes: list[tuple[int, int]]) -> None:
        """Runs steps with nothing in them; what the last real one drew is still to be fed to the next."""
        nothing, drawn = Step([], [], []), self._drawn
        runs = RUNS_UNTIL_RECORDED if jax.default_backend() == "gpu" else 1
        others = (Drawing(drawn=True), Drawing(drawn=True, nucleus=True), Drawing(logprobs=True))
        steps = [*((shape, Drawing()) for shape in shapes * runs), *((shapes[0], drawing) for drawing in others)]
        with progress_bar("warming up", len(steps), "steps") as advance:
            for shape, drawing in steps:
                self._start(nothing, *shape, drawing)
                advance(1)
            self._copy([])
            jax.block_until_ready(self.cache)
        self._drawn = drawn

    # ---- a step ----

    def _start_next(self) -> Late | None:
        """Plans, runs and publishes a step, unless enough are under way; returns the one whose tokens come next."""
        planned = None
        if len(self._late) <= self._ahead:
            planned = self.scheduler.schedule()
        if planned is not None:
            drawn = self._run(planned)
            self.scheduler.publish(planned)
            self._row = {sequence: row for row, sequence in enumerate(planned.samples)}
            self._late.append((planned, drawn))
        return self._late[0] if self._late and (planned is None or len(self._late) > self._ahead) else None

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
        drawn = [one for one in params if not one.greedy]
        return Drawing(bool(drawn), any(one.nucleus for one in drawn), any(one.logprobs is not None for one in params))

    def _draws(self, planned: Step) -> list[Draw]:
        """How each row draws."""
        owners = [self._owner[sequence] for sequence in planned.samples]
        return [Draw(one.params.seed, n, one.params.temperature or 0.0, one.params.top_p or 1.0) for one, n in owners]

    def _lose(self, late: Late, error: Exception) -> None:
        """A step has failed on the device."""
        if any(one is late for one in self._late):  # no other thread has noticed
            raise error

    def _receive(self, late: Late, drawn: Drawn, silent: bool) -> list[Event]:
        """Hands out a step's tokens."""
        if not self._late or self._late[0] is not late:  # another thread has done it
            return []
        planned, _ = self._late.popleft()
        tokens = drawn.tokens[: len(planned.samples)].tolist()
        if drawn.drafts is not None:
            tokens = take(planned, tokens, drawn.drafts, self.metrics)
        self.scheduler.receive(planned, tokens)
        events, gained, now = [] if silent else self._outbox.rest(), [], time.monotonic()
        for row, (sequence, token) in enumerate(zip(planned.samples, tokens, strict=True)):
            if sequence.finished or (token < 0 and token != NOT_FINITE):
                continue
            request, n = self._owner[sequence]
            completion = request.completions[n]
            if token == NOT_FINITE:
                completion.fail(f"the logits behind its {len(sequence.tokens)} tokens are not finite")
                logger.error("request %d, completion %d: %s", request.number, n, completion.error)
                self._finish(sequence)
                continue
            if (count := request.params.logprobs) is not None:
                assert drawn.told is not None
                own, ids, values = (x[row] for x in drawn.told)
                likeliest = dict(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
                completion.logprobs.append(LogProbs(float(own), likeliest))
            text = completion.add(token, request.params, self.lm.eos_ids, now - request.came)
            gained.append(completion.times)
            if completion.finish_reason:
                self._finish(sequence)
            if silent or request.readers:
                self._outbox.put(request, n, token, text)
            else:
                events.append(Event(request, n, token, text))
        self.metrics.tokens(gained)
        return events

    def _empty(self) -> None:
        """Device memory as at the start."""
        self.__dict__.pop("cache", None)  # there may be no room for two
        self.cache = KVCache.create(self.lm.config, self.pool.num_blocks, self.options, self._layers)
        self._drawn = jnp.zeros(self._rows, jnp.int32)


def limits_of(lm: LanguageModel, tokens: int | None, sequences: int, prompt_tokens: int | None) -> Limits:
    """Of a step, from the arguments of an engine."""
    kernels = lm.options.runs_kernels
    tokens = (512 if kernels else 256) if tokens is None else integer("max_tokens", tokens, 1)
    sequences = integer("max_sequences", sequences, 1)
    if prompt_tokens is None:
        longer = kernels and 2 * tokens <= LARGEST_CHUNK_FOR_KERNELS
        prompt_tokens = LARGEST_CHUNK_FOR_KERNELS if longer else tokens
    prompt_tokens = integer("max_prompt_tokens", prompt_tokens, 1)
    try:
        return Limits(tokens, sequences, prompt_tokens)
    except ValueError as error:
        raise UserError(f"max_{error}") from error


def cache_tokens_of(lm: LanguageModel, memory_fraction: float, sequences: int, layers: int) -> int:
    """Whole blocks of places that fit in a part of the free memory, and that so many sequences can fill."""
    memory_fraction = number("memory_fraction", memory_fraction, "above 0 and at most 1", above=0, most=1)
    form = KVCache.bytes_per_token(lm.config, lm.options.cache_form, lm.options.act_quant, layers)
    free, where = available_bytes()
    blocks = int(memory_fraction * min(free, 1e15) // (form * BLOCK_SIZE))
    if not blocks:
        raise UserError(f"memory_fraction: {memory_fraction} of {human(free)} of {where} holds no block of the cache")
    return BLOCK_SIZE * min(blocks, sequences * -(-lm.config.max_position_embeddings // BLOCK_SIZE))
