"""What `load` returns: a model with its config and tokenizer, and the calls a notebook or script makes of it."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from dsv32_jax.common.arguments import boolean, instance, integer, shown
from dsv32_jax.common.progress import progress_bar
from dsv32_jax.config import ModelConfig
from dsv32_jax.config.generation_config import checked_generation_config
from dsv32_jax.errors import UserError
from dsv32_jax.fidelity import OF_LAYER, TAPS, Trace
from dsv32_jax.generate.compiling import all_at_once
from dsv32_jax.generate.memory import describe
from dsv32_jax.generate.messages import checked_messages
from dsv32_jax.generate.prompts import Prompts, rows_of
from dsv32_jax.generate.reasoning import ReasoningSplit
from dsv32_jax.generate.results import Answer, Generation, Piece, Score
from dsv32_jax.generate.sampling import NOT_FINITE, check_sampling, not_finite, row_keys, sample
from dsv32_jax.generate.snapshot import Snapshot
from dsv32_jax.generate.tokenizer import Message, Tokenizer
from dsv32_jax.generate.weights import check_edited, dequantized, shapes_of, with_weights
from dsv32_jax.model.cache import BLOCK_SIZE, KVCache
from dsv32_jax.model.checks import shown_as_user_errors
from dsv32_jax.model.model import Batch, DeepseekV32, Options, step, tapped_layer, tapped_step
from dsv32_jax.model.params import named_parameters
from dsv32_jax.model.prepared import prepared
from dsv32_jax.model.taps import Reduction, Taps
from pallas_kernels.backend import BackendError
from pallas_kernels.paging import slots_of

# A prompt is read in pieces of a power of two between these, so that `step` is compiled for few shapes.
SMALLEST_CHUNK, LARGEST_CHUNK = 16, 512
SMALLEST_CHUNK_FOR_KERNELS, LARGEST_CHUNK_FOR_KERNELS = 128, 2048
"""With kernels a shorter piece saves little time, since weights are read for it all the same, and must be compiled; a
piece of 2048 tokens takes twice the time of one of 512. References would need memory for every head's scores."""

CONFIG_OF_TEXT = frozenset({"bos_token_id", "eos_token_id", "max_position_embeddings"})
"""Fields in which the config of a `LanguageModel` may differ from its model's: no step reads them."""
DEFAULT_NEW_TOKENS = 256
ALL = Taps.of({"*": None})
OF_LAYER_TAPS = Taps.of(dict.fromkeys(OF_LAYER))


class LanguageModel:
    """A model ready to use.

    `model`, `config`, `tokenizer`, `options` and `generation_config` are plain attributes, free to be replaced, and so
    is every weight (`m.model.head = ...`): each call looks at what there is when it begins. `with_parts` makes another
    model instead, which shares the rest. Replacing a method of a class (`MLA.select = ...`) is not supported: what was
    compiled before keeps the old one.

    generation_config: the checkpoint's `generation_config.json`; to change it, assign another dict. Its `eos_token_id`
      goes before the config's, and what it says of sampling holds where a call says nothing: see `sampling_defaults`.
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
        self._shapes = (model.config, shapes_of(model))
        self._flattened: tuple[Snapshot, list[Any], Any] | None = None

    def __repr__(self) -> str:
        return f"LanguageModel({describe(self.model)}; {self.options})"

    # Passing a module to a jitted function costs the host some microseconds a leaf at every call; a flat list costs far
    # less.
    def flat_model(self) -> tuple[list[Any], Any]:
        """Leaves of the `prepared` model and their structure, for jitted functions that are called often.

        The same lists again until the model, a weight of it, the options or the config is replaced.
        """
        if self._flattened is None or not self._flattened[0].shows(self):
            self._flattened = None  # there may be no room for two
            self.check_model()
            self._flattened = (Snapshot(self), *jax.tree.flatten(prepared(self.model, self.options)))
        return self._flattened[1:]

    def _step(self) -> Callable[[Batch, KVCache], tuple[Array, KVCache]]:
        """`step` of the model and the options as they are now."""
        flat, options = self.flat_model(), self.options

        def run(batch: Batch, cache: KVCache) -> tuple[Array, KVCache]:
            with _user_error():
                out = _flat_step(*flat, batch, cache, options)
                return jax.block_until_ready(out) if options.check else out

        return run

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """As it was assigned, without nulls; to be read."""
        return self._generation_config

    @generation_config.setter
    def generation_config(self, fields: Mapping[str, Any]) -> None:
        instance("generation_config", fields, Mapping, "a dict")
        checked = checked_generation_config(fields, vocab_size=self.config.vocab_size)
        self._generation_config: Mapping[str, Any] = MappingProxyType(checked)

    def check_model(self) -> None:
        """Raises `UserError` where no step can compute with the model and the config as they are now."""
        config, shapes = self._shapes
        if self.model.config != config:  # another model
            self._shapes = (self.model.config, shapes_of(self.model))
        else:
            check_edited(self.model, shapes)
        # A step computes by the model's own config: another one here would be read in part.
        computed, said = (vars(config) for config in (self.model.config, self.config))
        for name in computed:
            if computed[name] != said[name] and name not in CONFIG_OF_TEXT:
                raise UserError(
                    f"config: {name} is {shown(said[name])}, and the model's own config says {shown(computed[name])}; "
                    "a step computes by the latter, so the two must agree"
                )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a sentence: of the generation config, or of the config."""
        eos = self.generation_config.get("eos_token_id")
        eos = self.config.eos_token_id if eos is None else eos
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    def sampling_defaults(self) -> tuple[float, float]:
        """(temperature, top_p) where a call says nothing: the generation config's if it says `do_sample`, or greedy."""
        if not self.generation_config.get("do_sample"):
            return 0.0, 1.0
        temperature, top_p = (self.generation_config.get(name) for name in ("temperature", "top_p"))
        return 1.0 if temperature is None else float(temperature), 1.0 if top_p is None else float(top_p)

    def sampling(self, temperature: float | None, top_p: float | None, seed: int) -> tuple[float, float]:
        """(temperature, top_p) of a call; `UserError` where a value is wrong."""
        defaults = self.sampling_defaults()
        temperature, top_p = (b if a is None else a for a, b in zip((temperature, top_p), defaults, strict=True))
        check_sampling(temperature, top_p, seed)
        return temperature, top_p

    # ---- another model ----

    @property
    def weights(self) -> Mapping[str, Any]:
        """Every parameter by its path ("layers.3.attn.q_a"), to be read: an array, or a `QTensor`."""
        return MappingProxyType(named_parameters(self.model))

    def with_parts(
        self, *, weights: Mapping[str, Any] | None = None, check: bool | None = None, **functions: Callable[..., Any]
    ) -> "LanguageModel":
        """This model with other parts; it shares the rest, and stays as it is.

        Args:
          weights: by path, as in `weights`: arrays of the parameter's shape in float32, bfloat16 or float16, or a
            `QTensor` in place of a linear. The MTP layer has its own embedding and head, `mtp.embed` and `mtp.head`.
          check: check in each step the values that replaced parts give, not only their shapes and dtypes; slow, for
            tests and notebooks. As before where None.
          functions: by the name of the part, see `dsv32_jax.model.parts.Parts`: `with_parts(index_select=f)`. A
            function is called with the positional arguments of the public op whose place it takes, and those of its
            keyword arguments that the function names. The same function again compiles nothing anew.

        Raises:
          UserError: a path or a part that does not exist; an array of another shape or dtype; a function that cannot be
            called as its part is, or that nothing would call. A result of another shape or dtype is refused when a
            step is compiled.
        """
        model = with_weights(self.model, weights or {})
        changes: dict[str, Any] = {"parts": self.options.parts.with_parts(functions)}
        if check is not None:
            changes["check"] = boolean("check", check)
        options = dataclasses.replace(self.options, **changes)
        return LanguageModel(model, self.config, self.tokenizer, options, self.generation_config)

    def dequantized(self, dtype: str = "float32", *, memory_check: bool = True) -> "LanguageModel":
        """This model with plain weights instead of quantised ones, and unquantised activations: it has gradients.

        Args:
          dtype: "float32" or "bfloat16". `load(..., dequantize=dtype)` gives the same without the quantised weights
            beside it.
          memory_check: refuse what does not fit into the free memory.

        Raises:
          UserError: an unknown dtype, or there is no room.
        """
        model = dequantized(self.model, dtype, memory_check=memory_check)
        config = self.config.replace(quantization_config=None)
        options = dataclasses.replace(self.options, act_quant=False)
        return LanguageModel(model, config, self.tokenizer, options, self.generation_config)

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Writes the model, its tokenizer and its generation config as a Hugging Face checkpoint.

        Options are of a run and not written: `index_topk`, `act_quant` and all others are to be given to `load` again.

        Args:
          directory: must not exist.

        Raises:
          UserError: it exists or cannot be written, or a weight has another shape than it had, or is NaN or infinite.
        """
        from dsv32_jax.generate.loading import save

        self.check_model()
        save(self, directory)

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
            values = np.asarray(_log_likelihood(logits, targets))[: len(known)]
            if not np.isfinite(values).all():
                raise not_finite(row, start + int(np.argmin(np.isfinite(values))))
            found[row, start : start + len(known)] = values
            if out is not None:
                out[row, start:stop] = np.asarray(logits)[: stop - start]
        return Score.of(found, sum(len(row) - 1 for row in rows))

    def trace(self, ids: Prompts) -> Trace:
        """What every layer chose and computed for one sequence of ids [T]; see `dsv32_jax.fidelity.Trace`.

        The whole sequence is one step: memory grows with its square.
        """
        (row,) = self._sequence("trace", ids)
        experts = any(self.config.is_moe(layer) for layer in range(self.config.num_hidden_layers))
        names = [name for name in TAPS if experts or not name.startswith("layers.*.ffn.")]
        logits, values = self._tapped(row, Taps.of(dict.fromkeys(names)), _padded(len(row), SMALLEST_CHUNK))
        return Trace.from_taps(logits, values, len(row))

    def probe(self, ids: Prompts, taps: Mapping[str, Reduction]) -> dict[str, Any]:
        """Values inside a step, for one sequence; the whole sequence is one step.

        Args:
          ids: [T] integers, or a text.
          taps: by name ("layers.3.attn.topk"; see `tap_names`) or pattern ("layers.*.ffn.input"): None for the value
            itself, or a function of it that runs on the device and returns arrays. A function may name what belongs to
            a value (`dsv32_jax.model.taps.DETAILS`). The same function again compiles nothing anew.

        Returns:
          By name, NumPy arrays: what the functions gave, or the values, whose first axis is the tokens'; axes of
          positions are as long as the cache, a multiple of 64.

        Raises:
          UserError: a name or pattern that no value has, or two that ask for different things of one.
        """
        (row,) = self._sequence("probe", ids)
        instance("taps", taps, Mapping, "a mapping from names to functions or None")
        return jax.tree.map(np.asarray, self._tapped(row, Taps.of(taps), len(row))[1])

    def tap_names(self) -> dict[str, str]:
        """The names that `probe` takes, each with the dtype and shape of its value for 8 tokens."""
        batch, cache = self._one_step([0] * 8, 8)
        run = functools.partial(_flat_tapped_step, structure=self.flat_model()[1], options=self.options, taps=ALL)
        values = jax.eval_shape(run, self.flat_model()[0], batch=batch, cache=cache)[2]
        return {name: f"{value.dtype} {list(value.shape)}" for name, value in values.items()}

    def _sequence(self, call: str, ids: Prompts) -> list[list[int]]:
        rows = self.rows(ids)
        if len(rows) != 1:
            raise UserError(f"{call}: {len(rows)} sequences; give one")
        return rows

    def _one_step(self, row: list[int], size: int) -> tuple[Batch, KVCache]:
        """One sequence as one step of `size` tokens with all its logits, and a cache for it."""
        table = self._block_tables(1, len(row))[0]
        batch = _prompt_batch(row, 0, len(row), size, table, np.arange(size, dtype=np.int32))
        return batch, KVCache.create(self.config, table.size, self.options)

    def _tapped(self, row: list[int], taps: Taps, size: int) -> tuple[Array, dict[str, Any]]:
        """Logits [size, V] of a sequence, and what the taps ask for."""
        batch, cache = self._one_step(row, size)
        with _user_error():
            stepped = _flat_tapped_step(*self.flat_model(), batch, cache, self.options, taps)
            logits, _, values = jax.block_until_ready(stepped)
        return logits, values

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
        layer = integer("layer", layer, 0, self.config.num_hidden_layers - 1)
        width, longest = self.config.hidden_size, self.config.max_position_embeddings
        instance("hidden", hidden, (np.ndarray, Array), f"an array of floats [T, {width}]")
        if hidden.ndim != 2 or hidden.shape[1] != width or not 1 <= len(hidden) <= longest:
            raise UserError(f"hidden: {list(hidden.shape)}; must be [T, {width}], T in 1..{longest}")
        if not jnp.issubdtype(hidden.dtype, jnp.floating):
            raise UserError(f"hidden: {hidden.dtype}; must be floats")
        tokens = len(hidden)
        batch, cache = self._one_step([0] * tokens, tokens)
        with _user_error():
            values = _flat_tapped_layer(
                *self.flat_model(), layer, jnp.asarray(hidden), batch, cache, self.options, OF_LAYER_TAPS
            )
            values = jax.block_until_ready(values)
        arrays = {name.rpartition(".")[2]: np.asarray(value) for name, value in values.items()}
        for name in ("index_scores", "attention"):
            arrays[name] = arrays[name][:, :tokens]
        return arrays

    # ---- generation ----

    def generate(
        self,
        prompts: Prompts,
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
        ignore_eos: bool = False,
    ) -> Generation:
        """Continues each prompt by up to `max_new_tokens` tokens; all rows are decoded together.

        Args:
          prompts: ids [T] or [B, T] (-1 absent at the right), a text, or a list of texts or id lists. A text gets the
            beginning-of-sentence token in front. What a row receives does not depend on the other rows.
          max_new_tokens: at least 1; the longest prompt plus this must fit in `max_position_embeddings`. Default:
            that of the generation config, or 256, or what fits.
          temperature, top_p: see `sampling.sample`; temperature 0 is greedy and the same for every seed. Default: of
            the generation config, see `sampling_defaults`.
          seed: the same seed gives the same tokens.
          ignore_eos: go on after an end-of-sentence token.

        Raises:
          UserError: naming the argument, or the prompt and position, that is wrong; or logits are not finite.
        """
        rows = self.rows(prompts)
        max_new_tokens = self.new_tokens(rows, max_new_tokens)
        tokens = np.full((len(rows), max_new_tokens), -1, np.int32)
        with progress_bar("generating", max_new_tokens, "tokens") as advance:
            for n, ids in enumerate(self._decode(rows, max_new_tokens, temperature, top_p, seed, ignore_eos)):
                tokens[:, n] = ids
                advance(1)
        texts = None if self.tokenizer is None else [self.tokenizer.decode(row) for row in tokens]
        stopped = np.isin(tokens, self.eos_ids).any(axis=1) & (not ignore_eos)
        return Generation(tokens, texts, ["stop" if stop else "length" for stop in stopped])

    def stream(
        self,
        prompts: Prompts,
        max_new_tokens: int | None = None,
        *,
        temperature: float | None = None,
        top_p: float | None = None,
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

    def chat(
        self,
        messages: str | Sequence[Message],
        max_new_tokens: int | None = None,
        *,
        thinking: bool = False,
        temperature: float | None = None,
        top_p: float | None = None,
        seed: int = 0,
    ) -> Answer:
        """Answers a message, or the last one of a conversation.

        Args:
          messages: a text, which is one message of the user; or mappings with `role` (system, user, assistant) and
            `content`, as `Answer.messages` is.
          thinking: let the model reason before it answers.
          max_new_tokens, temperature, top_p, seed: as those of `generate`; reasoning counts too.

        Raises:
          UserError: what `generate` raises, or the checkpoint has no tokenizer or no chat template.
        """
        if self.tokenizer is None:
            raise UserError("chat: the checkpoint has no tokenizer.json, which a chat needs")
        boolean("thinking", thinking)
        turns = checked_messages([{"role": "user", "content": messages}] if isinstance(messages, str) else messages)
        prompt = self.tokenizer.render_chat(turns, thinking=thinking)
        split, tokens = ReasoningSplit(self.tokenizer, prompt, thinking), []
        sampling = {"temperature": temperature, "top_p": top_p, "seed": seed}
        for piece in self.stream([self.tokenizer.encode(prompt)], max_new_tokens, **sampling):
            tokens.append(piece.token)
            split.add(piece.token, piece.text or "")
        split.finish()
        return Answer(
            split.answer,
            split.reasoning or None,
            "stop" if tokens[-1] in self.eos_ids else "length",
            np.asarray(tokens, np.int32),
            [*turns, {"role": "assistant", "content": split.answer}],
        )

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
        lengths = [integer("lengths", length, 1, self.config.max_position_embeddings) for length in lengths]
        if not lengths:
            raise UserError("lengths: none; give the number of tokens of each prompt")
        most = self.config.max_position_embeddings - max(lengths)
        tables = self._block_tables(len(lengths), max(lengths) + integer("max_new_tokens", max_new_tokens, 1, most))
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
        temperature: float | None,
        top_p: float | None,
        seed: int,
        ignore_eos: bool,
    ) -> Iterator[np.ndarray]:
        """int32 [B] a step, -1 for rows that have ended; stops when all have.

        The next step is started before the tokens of this one are fetched, so that the device does not wait for the
        host. A row that has ended is therefore computed once more; nobody sees what comes of it.
        """
        temperature, top_p = self.sampling(temperature, top_p, seed)
        boolean("ignore_eos", ignore_eos)
        run = self._step()
        lengths = np.array([len(row) for row in rows], np.int32)
        batch = len(rows)
        tables = self._block_tables(batch, int(lengths.max()) + max_new_tokens)
        cache = KVCache.create(self.config, tables.size, self.options)
        last = []
        for row, table in zip(rows, tables, strict=True):
            for start, stop, size in self._chunks(len(row)):
                # Only the logits after the last prompt token are wanted; -1 asks for none and keeps the shape.
                wanted = np.array([stop - start - 1 if stop == len(row) else -1], np.int32)
                logits, cache = run(_prompt_batch(row, start, stop, size, table, wanted), cache)
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
                logits, cache = run(flat, cache)
                following = draw(logits, n + 1)
            taken = np.where(running, ids, -1).astype(np.int32)
            if (taken == NOT_FINITE).any():
                number = int(np.argmax(taken == NOT_FINITE))
                raise not_finite(number, int(lengths[number]) + n - 1)
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
        run = self._step()
        tables = self._block_tables(1, max(map(len, rows)))
        cache = KVCache.create(self.config, tables.size, self.options)
        for number, row in enumerate(rows):
            for start, stop, size in self._chunks(len(row), all_logits=True):
                wanted = np.where(np.arange(size) < stop - start, np.arange(size), -1).astype(np.int32)
                logits, cache = run(_prompt_batch(row, start, stop, size, tables[0], wanted), cache)
                yield number, start, stop, logits

    def new_tokens(self, rows: list[list[int]], max_new_tokens: int | None) -> int:
        """How many tokens `generate` makes of these rows; `UserError` where they do not fit."""
        longest = max(map(len, rows))
        room = self.config.max_position_embeddings - longest
        if max_new_tokens is None:
            max_new_tokens = max(1, min(int(self.generation_config.get("max_new_tokens") or DEFAULT_NEW_TOKENS), room))
        max_new_tokens = integer("max_new_tokens", max_new_tokens, 1)
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
        instance("out", out, np.ndarray, f"a NumPy array, float32 {list(shape)}")
        if out.ndim != 3 or out.dtype != np.float32 or out.shape[1] < shape[1] or out.shape[::2] != shape[::2]:
            raise UserError(f"out: {out.dtype} {list(out.shape)}; must be float32 {list(shape)}")
        if not out.flags.writeable:
            raise UserError("out: cannot be written; give an array that can")
        out[...] = 0
        return out

    def rows(self, prompts: Prompts) -> list[list[int]]:
        """Prompts in any accepted form as checked lists of ids; see `prompts.rows_of`."""
        return rows_of(prompts, self.config, self.tokenizer)


@functools.partial(jax.jit, static_argnames=("structure", "options"), donate_argnames=("cache",))
def _flat_step(
    leaves: list[Any], structure: Any, batch: Batch, cache: KVCache, options: Options
) -> tuple[Array, KVCache]:
    return step(jax.tree.unflatten(structure, leaves), batch, cache, options)


@functools.partial(jax.jit, static_argnames=("structure", "options", "taps"), donate_argnames=("cache",))
def _flat_tapped_step(
    leaves: list[Any], structure: Any, batch: Batch, cache: KVCache, options: Options, taps: Taps
) -> tuple[Array, KVCache, dict[str, Any]]:
    return tapped_step(jax.tree.unflatten(structure, leaves), batch, cache, options, taps)


@functools.partial(jax.jit, static_argnames=("structure", "layer", "options", "taps"), donate_argnames=("cache",))
def _flat_tapped_layer(
    leaves: list[Any],
    structure: Any,
    layer: int,
    hidden: Array,
    batch: Batch,
    cache: KVCache,
    options: Options,
    taps: Taps,
) -> dict[str, Any]:
    return tapped_layer(jax.tree.unflatten(structure, leaves), layer, hidden, batch, cache, options, taps)


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
    """A backend that an op lacks is the user's choice, so the user's error; what `checks` refuse, too."""
    try:
        with shown_as_user_errors():
            yield
    except BackendError as error:
        raise UserError(f"backend: {error}") from error


def _batch(**arrays: np.ndarray | Array) -> Batch:
    """Arrays of the host stay there: a jitted function takes them over in a tenth of the time of `jnp.asarray`."""
    return Batch(**{n: a if isinstance(a, Array) else np.asarray(a, np.int32) for n, a in arrays.items()})
