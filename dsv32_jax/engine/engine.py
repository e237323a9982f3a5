"""Many requests at once: the loop of scheduler, jitted step and results.

The host plans a step while the device still runs the previous one: a token that is sampled there goes into the next
step without the host having seen it. The host then reads the tokens of the earlier step. It notices the end of a
continuation one step late, and drops what that continuation computes in the step. An engine that speculates plans after
the results instead; see `speculation`.

A step is planned, run, and then published: only then can others find the blocks that it writes. Queues, pool and cache
change only in transactions: an exception in one, Ctrl-C included, ends all running requests, and no change is ever half
made. An exception between two of them, as while the host waits for the device, changes nothing.

Steps have few shapes: the tokens and the width of the block tables are a least number times powers of two or four, and
everything else is fixed. `warmup` compiles all of them.
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
    SampledTokens,
    SamplingKinds,
    Shape,
    compile_programs,
    copy_blocks,
    draft_step,
    engine_step,
    sample_tokens,
)
from dsv32_jax.engine.intake import RequestIntake
from dsv32_jax.engine.packing import pack, step_sizes, table_widths
from dsv32_jax.engine.request import MAX_LOGPROBS, Event, LogProbs, SamplingParams
from dsv32_jax.engine.scheduler import Limits, Scheduler, Sequence, Step
from dsv32_jax.engine.speculation import accept_drafts
from dsv32_jax.errors import UserError
from dsv32_jax.generate.batching import LARGEST_CHUNK_FOR_KERNELS
from dsv32_jax.generate.compiling import all_at_once
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.memory import available_bytes
from dsv32_jax.generate.sampling import NOT_FINITE, log_probabilities
from dsv32_jax.model.cache import KVCache
from dsv32_jax.model.checks import shown_as_user_errors

__all__ = ["Engine"]

RUNS_UNTIL_RECORDED = 3
"""On a GPU, XLA records a CUDA graph of a program in its second and third run, which take up to ten times as long."""
MAX_CACHE_TOKENS = 2**31 - BLOCK_SIZE
"""Slots are int32."""

StartedStep = tuple[Step, SampledTokens]
logger = logging.getLogger("dsv32_jax")


class Engine(RequestIntake):
    """Continuous batching of requests over one model.

    Args:
      lm: model, tokenizer and options. Where a weight or the options are replaced later, the engine refuses to go on.
      cache_tokens: tokens that the cache holds, rounded up to whole blocks. Default: those of one sequence of the
        greatest length, or 2^15, whichever is less.
      memory_fraction: instead of `cache_tokens`, the part of the free memory that the cache takes; it takes no more
        than all sequences together can fill.
      max_tokens: of a step. Default: 256, or 512 with kernels: such a step takes little longer than one of fewer
        tokens, since weights are read for either.
      max_prompt_tokens: of a step that continues no sequence, so that none waits for it. Default: `max_tokens`, or 2048
        with kernels where that is twice as many or more: prompts then take half of the time.
      max_sequences: that run at a time.
      sharing: whether sequences share the blocks of equal prefixes.
      speculate: try a token of the model's MTP layer in each step of a sequence. This gives the same tokens, up to two
        a step; it needs one more layer in the cache, and steps are not planned ahead.
      programs: what runs on the device for steps of a shape, instead of the model: a function of a
        `device_step.Shape` that returns what `device_step.compile_programs` does. A measurement of the host needs it.

    Raises:
      UserError: naming the argument that is wrong.
    """

    cache: KVCache
    _last_tokens: Array  # int32 [R], sampled by the step that was started last

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
        programs: Callable[[Shape], tuple[Any, Any]] | None = None,
    ):
        instance("lm", lm, LanguageModel, "a LanguageModel, as `load` returns it")
        limits = limits_of(lm, max_tokens, max_sequences, max_prompt_tokens)
        if cache_tokens is not None and memory_fraction is not None:
            raise UserError("memory_fraction: give it or cache_tokens, not both")
        if cache_tokens is not None:
            cache_tokens = integer("cache_tokens", cache_tokens, 1, MAX_CACHE_TOKENS)
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
        self._rows = limits.sequences * (2 if self.speculate else 1)  # that sample a token in a step
        self._sizes = step_sizes(limits.tokens, limits.prompt_tokens, kernels)
        self._widths = table_widths(widest, kernels)
        self._last_rows: dict[Sequence, int] = {}  # of a sequence's token in `_last_tokens`
        self._programs: dict[tuple[int, int], tuple[Any, Any]] = {}  # compiled ahead, by shape
        self._programs_of = programs or self._jitted  # of a shape that is not among them
        self._started: deque[StartedStep] = deque()  # steps whose tokens have not been received
        self._lookahead = 0 if self.speculate else 1  # how many of them there may be when the next is planned
        self._reset_device_memory()

    # ---- steps ----

    def summary(self) -> dict[str, Any]:
        """Counts and latencies so far, and queues and cache now; see `Metrics.summary`."""
        with self.lock:
            self.repair()
            running, waiting = len(self.scheduler.running), len(self.scheduler.waiting)
            return self.metrics.summary(self.pool.statistics(), running, waiting)

    @property
    def busy(self) -> bool:
        """Whether a sequence runs or waits, or a step's tokens have not been received."""
        return bool(self.scheduler.running or self.scheduler.waiting or self._started or self.torn)

    def step(self) -> list[Event]:
        """Starts the next step, then receives the tokens of the previous one, or when speculating its own.

        Returns:
          An event for each of these tokens, except for those of a request that is being streamed, which its stream
          returns. Before them, events of steps which streams and `generate` made.

        Raises:
          BaseException: whatever ended the step, Ctrl-C included. While the host waits for the device, this changes
            nothing, and the next call goes on. Otherwise, and where the device failed, all requests that have not ended
            end with "error", no block of theirs can be found in the cache, and the engine goes on with those that come
            afterwards. `UserError` if the model was edited; nothing has changed then.
        """
        self.check_unedited()
        with shown_as_user_errors():
            return self._step()

    def _step(self) -> list[Event]:
        silent = self._outbox.silent
        started = self.transact(self._start_next)
        if started is None:
            with self.lock:
                return [] if silent else self._outbox.pop_waiting()
        try:
            sampled = started[1].fetched()
        except Exception as error:
            self.transact(self._fail, started, error)
            raise
        return self.transact(self._receive, started, sampled, silent)

    def recover(self, error: str) -> None:
        """Ends all requests with an error, and empties queues, pool and cache, whose contents are unknown."""
        for request, n in list(self._owner.values()):
            if request.completions[n].finish_reason is None:
                request.completions[n].fail(error)
                self.metrics.finished["error"] += 1
        self._owner.clear()
        self.scheduler.clear()
        self._started.clear()
        self._last_rows = {}
        self._reset_device_memory()

    # ---- shapes ----

    def shapes(self) -> list[tuple[int, int]]:
        """(tokens, width of the block tables) of every step that can occur."""
        return [(tokens, width) for width in self._widths for tokens in self._sizes]

    def programs(self) -> list[Callable[[], tuple[Any, Any]]]:
        """Functions that compile the programs of each of `shapes`; they hold none of the engine's memory."""
        abstract = functools.partial(jax.tree.map, lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype))
        tokens, cache = abstract(self._last_tokens), abstract(self.cache)
        return [
            functools.partial(
                compile_programs,
                self._leaves,
                self._structure,
                tokens,
                cache,
                shape=self._shape(*shape),
                options=self.options,
                speculate=self.speculate,
            )
            for shape in self.shapes()
        ]

    def warmup(self) -> int:
        """Compiles every shape, several at a time, and runs each without requests, on a GPU until its graph is
        recorded; returns how many shapes there are.
        """
        shapes = self.shapes()
        self._programs = dict(zip(shapes, all_at_once(self.programs()), strict=True))
        self.transact(self._run_empty_steps, shapes)
        return len(shapes)

    def _run_empty_steps(self, shapes: list[tuple[int, int]]) -> None:
        """Runs steps without requests. The next real step still takes tokens of the last real one, which are kept."""
        empty, last_tokens = Step([], [], []), self._last_tokens
        runs = RUNS_UNTIL_RECORDED if jax.default_backend() == "gpu" else 1
        kinds = (SamplingKinds(random=True), SamplingKinds(random=True, nucleus=True), SamplingKinds(logprobs=True))
        steps = [*((shape, SamplingKinds()) for shape in shapes * runs), *((shapes[0], kind) for kind in kinds)]
        with progress_bar("warming up", len(steps), "steps") as advance:
            for (tokens, width), kind in steps:
                self._start(empty, tokens, width, kind)
                advance(1)
            self._copy([])
            jax.block_until_ready(self.cache)
        self._last_tokens = last_tokens

    # ---- a step ----

    def _start_next(self) -> StartedStep | None:
        """Plans, runs and publishes a step, unless enough have been started; returns the step to be received now."""
        planned = None
        if len(self._started) <= self._lookahead:
            planned = self.scheduler.schedule()
        if planned is not None:
            sampled = self._run(planned)
            self.scheduler.publish(planned)
            self._last_rows = {sequence: row for row, sequence in enumerate(planned.receivers)}
            self._started.append((planned, sampled))
        due = planned is None or len(self._started) > self._lookahead
        return self._started[0] if self._started and due else None

    def _run(self, planned: Step) -> SampledTokens:
        """Starts a planned step, and counts it; returns the sampled tokens, whose arrays are still being computed."""
        for part in planned.parts:
            request, _ = self._owner[part.sequence]
            if request.cached_tokens is None:
                request.cached_tokens = part.start
                self.metrics.prompt_started(request, part.start)
        self.metrics.steps += 1
        self.metrics.step_tokens += planned.tokens
        self.metrics.preemptions += len(planned.preempted)
        if planned.copies:
            self._copy(planned.copies)
        blocks = max(len(part.sequence.table.blocks) for part in planned.parts if part.sequence.table)
        tokens = next(size for size in self._sizes if size >= planned.tokens)
        width = next(width for width in self._widths if width >= blocks)
        sampled = self._start(planned, tokens, width, self._sampling_kinds(planned))
        for array in jax.tree.leaves((sampled.tokens, sampled.logprobs, sampled.drafts)):
            array.copy_to_host_async()
        return sampled

    def _start(self, planned: Step, tokens: int, width: int, kinds: SamplingKinds) -> SampledTokens:
        """Starts a step, padded to so many tokens and block tables of that width."""
        shape = self._shape(tokens, width)
        flat = pack(planned, shape, self._last_rows, self._sampling(planned) if kinds.random else [], self.speculate)
        run_step, run_draft = self._programs.get((tokens, width)) or self._programs_of(shape)
        states, logits, sampling, self.cache = run_step(self._leaves, flat, self._last_tokens, self.cache)
        self._last_tokens = sample_tokens(logits, sampling, greedy=not kinds.random, nucleus=kinds.nucleus)
        logprobs = log_probabilities(logits, self._last_tokens, MAX_LOGPROBS) if kinds.logprobs else None
        drafts = None
        if self.speculate:
            drafts, self.cache = run_draft(self._leaves, flat, states, self._last_tokens, self.cache)
        return SampledTokens(self._last_tokens, logprobs, drafts)

    def _shape(self, tokens: int, width: int) -> Shape:
        return Shape(tokens, width, self.scheduler.limits.sequences, self._rows)

    def _jitted(self, shape: Shape) -> tuple[Any, Any]:
        """The same as `compile_programs` returns, compiled when it is called."""
        structure, options = self._structure, self.options

        def run_step(leaves: list[Any], flat: Any, previous_tokens: Array, cache: KVCache) -> Any:
            return engine_step(leaves, structure, flat, previous_tokens, cache, shape=shape, options=options)

        def run_draft(leaves: list[Any], flat: Any, states: Array, tokens: Array, cache: KVCache) -> Any:
            return draft_step(leaves, structure, flat, states, tokens, cache, shape=shape, options=options)

        return run_step, run_draft

    def _copy(self, copies: list[tuple[int, int]]) -> None:
        """Copies (source, target) blocks, padded to `max_sequences`: no sequence needs more than one."""
        pairs = np.full((self.scheduler.limits.sequences, 2), -1, np.int32)
        pairs[: len(copies)] = np.asarray(copies, np.int32).reshape(-1, 2)
        self.cache = copy_blocks(self.cache, *map(jnp.asarray, pairs.T))

    def _sampling_kinds(self, planned: Step) -> SamplingKinds:
        """The kinds of sampling that the rows of a step need."""
        params = [self._owner[sequence][0].params for sequence in planned.receivers]
        random = [row for row in params if not row.greedy]
        nucleus, logprobs = any(row.nucleus for row in random), any(row.logprobs is not None for row in params)
        return SamplingKinds(bool(random), nucleus, logprobs)

    def _sampling(self, planned: Step) -> list[tuple[SamplingParams, int]]:
        """For each row of a step its sampling parameters and the number of its completion."""
        owners = [self._owner[sequence] for sequence in planned.receivers]
        return [(request.params, n) for request, n in owners]

    def _fail(self, started: StartedStep, error: Exception) -> None:
        """Raises the error with which the device ended a step, unless another thread has done so."""
        if any(step is started for step in self._started):
            raise error

    def _receive(self, started: StartedStep, sampled: SampledTokens, silent: bool) -> list[Event]:
        """Hands out a step's tokens."""
        if not self._started or self._started[0] is not started:  # another thread has done it
            return []
        planned, _ = self._started.popleft()
        tokens = sampled.tokens[: len(planned.receivers)].tolist()
        if sampled.drafts is not None:
            tokens = accept_drafts(planned, tokens, sampled.drafts, self.metrics)
        self.scheduler.receive(planned, tokens)
        events, token_times, now = [] if silent else self._outbox.pop_waiting(), [], time.monotonic()
        for row, (sequence, token) in enumerate(zip(planned.receivers, tokens, strict=True)):
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
                assert sampled.logprobs is not None
                logprob, ids, values = (array[row] for array in sampled.logprobs)
                likeliest = dict(zip(ids[:count].tolist(), values[:count].tolist(), strict=True))
                completion.logprobs.append(LogProbs(float(logprob), likeliest))
            text = completion.add(token, request.params, self.lm.eos_ids, now - request.arrived)
            token_times.append(completion.times)
            if completion.finish_reason:
                self._finish(sequence)
            if silent or request.readers:
                self._outbox.put(request, n, token, text)
            else:
                events.append(Event(request, n, token, text))
        self.metrics.tokens_generated(token_times)
        return events

    def _reset_device_memory(self) -> None:
        """Allocates an empty cache."""
        self.__dict__.pop("cache", None)  # there may be no room for two
        self.cache = KVCache.create(self.lm.config, self.pool.num_blocks, self.options, self._layers)
        self._last_tokens = jnp.zeros(self._rows, jnp.int32)


def limits_of(lm: LanguageModel, tokens: int | None, sequences: int, prompt_tokens: int | None) -> Limits:
    """The limits of a step, from the arguments of an engine."""
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
    """Tokens, in whole blocks, whose cache fits in a part of the free memory, and that so many sequences can fill."""
    memory_fraction = number("memory_fraction", memory_fraction, "above 0 and at most 1", above=0, most=1)
    token_bytes = KVCache.bytes_per_token(lm.config, lm.options.cache_form, lm.options.act_quant, layers)
    free, memory = available_bytes()
    blocks = int(memory_fraction * min(free, 1e15) // (token_bytes * BLOCK_SIZE))
    if not blocks:
        raise UserError(f"memory_fraction: {memory_fraction} of {human(free)} of {memory} holds no block of the cache")
    return BLOCK_SIZE * min(blocks, sequences * -(-lm.config.max_position_embeddings // BLOCK_SIZE))
