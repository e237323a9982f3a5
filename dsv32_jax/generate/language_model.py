"""`LanguageModel`: a model with its config and tokenizer, and the calls of a notebook or script."""

import dataclasses
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from dsv32_jax.common.arguments import boolean, instance, integer, shown
from dsv32_jax.common.progress import progress_bar
from dsv32_jax.config import ModelConfig
from dsv32_jax.config.generation_config import checked_generation_config
from dsv32_jax.errors import UserError
from dsv32_jax.generate import decoding, forward, inspection
from dsv32_jax.generate.compiling import all_at_once
from dsv32_jax.generate.flat_model import FlatModel, user_errors
from dsv32_jax.generate.memory import describe
from dsv32_jax.generate.messages import checked_messages
from dsv32_jax.generate.prompts import Prompts, is_one, rows_of
from dsv32_jax.generate.reasoning import ReasoningSplit
from dsv32_jax.generate.results import Answer, Generation, Piece, Score
from dsv32_jax.generate.sampling import check_sampling
from dsv32_jax.generate.snapshot import Snapshot
from dsv32_jax.generate.tokenizer import Message, Tokenizer
from dsv32_jax.generate.weights import check_edited, dequantized, shapes_of, with_weights
from dsv32_jax.model.model import DeepseekV32, Options
from dsv32_jax.model.params import named_parameters
from dsv32_jax.model.prepared import prepared
from dsv32_jax.model.taps import Patches, Reduction, Taps, operands_of

CONFIG_OF_TEXT = frozenset({"bos_token_id", "eos_token_id", "max_position_embeddings"})
"""Fields in which the config of a `LanguageModel` may differ from its model's: no step reads them."""
DEFAULT_NEW_TOKENS = 256


class LanguageModel:
    """A model ready to use.

    `model`, `config`, `tokenizer`, `options` and `generation_config` are plain attributes that can be replaced, and so
    can every weight (`m.model.head = ...`): each call uses the values that they have when it begins. `with_parts` makes
    another model instead, which shares the rest. Replacing a method of a class (`MLA.select = ...`) is not supported:
    programs that are already compiled keep the old one.

    generation_config: the checkpoint's `generation_config.json`; to change it, assign another dict. Its `eos_token_id`
      takes precedence over the config's, and its sampling parameters are the defaults of calls: see
      `sampling_defaults`.
    """

    def __init__(
        self,
        model: DeepseekV32,
        config: ModelConfig,
        tokenizer: Tokenizer | None = None,
        options: Options | None = None,
        generation_config: Mapping[str, Any] | None = None,
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

    def flat_model(self) -> tuple[list[Any], Any]:
        """Leaves of the `prepared` model and their structure, for jitted functions that are called often.

        Later calls return the same lists until the model, a weight of it, the options or the config is replaced.
        """
        if self._flattened is None or not self._flattened[0].shows(self):
            self._flattened = None  # the memory may not hold two
            self.check_model()
            self._flattened = (Snapshot(self), *jax.tree.flatten(prepared(self.model, self.options)))
        return self._flattened[1:]

    def prepared_model(self) -> DeepseekV32:
        """The model as a step of these options takes it, to be an argument of a jitted function of one's own.

        Inside that, `model(batch, cache, m.options)` is a step: logits float32 [R, V] and the cache. What makes a batch
        is in `dsv32_jax.generate.batching`; `experiments/generate_jitted.py` is an example. Where kernels run, some
        weights are rearranged (`dsv32_jax.model.prepared`) and kept for later calls.
        """
        leaves, structure = self.flat_model()
        return jax.tree.unflatten(structure, leaves)

    def _flat(self) -> FlatModel:
        """The model, the config and the options as they are now."""
        return FlatModel(*self.flat_model(), self.config, self.options)

    @property
    def generation_config(self) -> Mapping[str, Any]:
        """The assigned dict without nulls, read-only."""
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
        # A step computes by the model's own config, and would ignore a different one here.
        for name, value in vars(self.model.config).items():
            other = getattr(self.config, name)
            if value != other and name not in CONFIG_OF_TEXT:
                raise UserError(
                    f"config: {name} is {shown(other)}, and the model's own config says {shown(value)}; "
                    "a step computes by the latter, so the two must agree"
                )

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The ids that end a sentence: of the generation config, or of the config."""
        eos = self.generation_config.get("eos_token_id")
        eos = self.config.eos_token_id if eos is None else eos
        return () if eos is None else (eos,) if isinstance(eos, int) else tuple(eos)

    def sampling_defaults(self) -> tuple[float, float]:
        """(temperature, top_p) where a call gives none: the generation config's if it has `do_sample`, else greedy."""
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
        """Every parameter by its path ("layers.3.attn.q_a"), read-only: an array, or a `QTensor`."""
        return MappingProxyType(named_parameters(self.model))

    def with_parts(
        self, *, weights: Mapping[str, Any] | None = None, check: bool | None = None, **functions: Callable[..., Any]
    ) -> "LanguageModel":
        """Returns a model with other parts that shares the rest; this one is not changed.

        Args:
          weights: by path, as in `weights`: arrays of the parameter's shape in float32, bfloat16 or float16, or a
            `QTensor` in place of a linear. The MTP layer has its own embedding and head, `mtp.embed` and `mtp.head`.
          check: check in each step the values that replaced parts return, not only their shapes and dtypes: what a
            selection, a routing and a plan point to, and that numbers are no NaN (`dsv32_jax.model.checks`); slow, for
            tests and notebooks. None keeps the present setting.
          functions: by the name of the part, see `dsv32_jax.model.parts.Parts`: `with_parts(index_select=f)`; None
            puts the model's own back. A function is called with the positional arguments of the public op whose place
            it takes, and those of its keyword arguments that the function names. It is read when a step is compiled,
            so it must be made of jax.numpy and depend on its arguments alone; the same function again compiles nothing.

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

    def with_patches(self, patches: Mapping[str, Reduction]) -> "LanguageModel":
        """Returns a model whose steps go on with other values than they compute; this one is not changed.

        For activation patching, steering and ablation of single values: in `probe`, `trace`, `score`, `logits`,
        `generate` and an `Engine` alike.

        Args:
          patches: by name ("layers.3.hidden"; see `tap_names`) or pattern ("layers.*.ffn.input"): a function of the
            value that gives an array of its shape and dtype and is made of jax.numpy. It may have parameters for the
            details of a value (`dsv32_jax.model.taps.DETAILS`), such as `positions`, since a step may have any of a
            sequence's tokens. It is read when a step is compiled; another function compiles another program. None takes
            away a patch that this model has. A tap shows a patched value as the step goes on with it.

        Raises:
          UserError: what is no function. When a step is compiled: a name that no value has, or that of a value which
            the step looks at alone (`attention`, `logits`, with dense attention `topk`).
        """
        instance("patches", patches, Mapping, "a mapping from names to functions or None")
        requests = {**dict(self.options.patches.requests), **dict(Patches.of(patches).requests)}
        changed = Patches.of({pattern: function for pattern, function in requests.items() if function is not None})
        options = dataclasses.replace(self.options, patches=changed)
        return LanguageModel(self.model, self.config, self.tokenizer, options, self.generation_config)

    def dequantized(self, dtype: str = "float32", *, memory_check: bool = True) -> "LanguageModel":
        """Returns this model with plain weights and unquantised activations, which has gradients.

        Args:
          dtype: "float32" or "bfloat16". `load(..., dequantize=dtype)` gives the same without keeping the quantised
            weights in memory.
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

        Options belong to a run and are not written: pass `index_topk`, `act_quant` and others to `load` again.

        Args:
          directory: must not exist.

        Raises:
          UserError: it exists or cannot be written, or a weight has changed its shape, or is NaN or infinite.
        """
        from dsv32_jax.generate.loading import save

        self.check_model()
        save(self, directory)

    # ---- forward ----

    def logits(self, ids: Prompts, *, out: np.ndarray | None = None) -> np.ndarray:
        """Computes the logits at every position.

        Args:
          ids: [T] or [B, T] integers; -1 marks absent positions at the right.
          out: float32 [B, T, V] to write into, for instance a memory-mapped file.

        Returns:
          float32 [B, T, V] in host memory (`out` where given); 0 at absent positions.

        Raises:
          UserError: an id outside the vocabulary, a -1 in the middle, an empty or too long row.
        """
        rows = self.rows(ids)
        return forward.logits(self._flat(), rows, forward.output(rows, self.config, out))

    def score(self, ids: Prompts, *, out: np.ndarray | None = None) -> Score:
        """Computes the log-likelihood of every token after those before it.

        Args:
          ids: [T] or [B, T] integers, or texts (beginning-of-sentence token put in front); at least 2 tokens a row.
          out: float32 [B, T, V], filled as `logits` fills it, in the same pass.
        """
        rows = self.rows(ids)
        for number, ids_of_row in enumerate(rows):
            if len(ids_of_row) < 2:
                raise UserError(f"row {number}: 1 token; a score needs at least 2, the first has nothing before it")
        if out is not None:
            out = forward.output(rows, self.config, out)
        return forward.score(self._flat(), rows, out)

    def trace(self, ids: Prompts) -> Any:
        """Records what every layer chose and computed; see `dsv32_jax.fidelity.Trace`.

        Each sequence is one step by itself: memory grows with the square of its length.

        Args:
          ids: [T] integers or a text; or [B, T] (-1 absent at the right), or a list of texts or id lists.

        Returns:
          A `Trace`; or of a list or [B, T] a list of them, each as long as its sequence.
        """
        traces = inspection.traces(self._flat(), self.rows(ids))
        return traces[0] if is_one(ids) else traces

    def probe(
        self, ids: Prompts, taps: Mapping[str, Reduction], operands: Mapping[str, ArrayLike] | None = None
    ) -> dict[str, Any]:
        """Reads values inside a step, for one sequence; the whole sequence is one step.

        Args:
          ids: [T] integers, or a text.
          taps: by name ("layers.3.attn.topk"; see `tap_names`) or pattern ("layers.*.ffn.input"): None for the value
            itself, or a function of it that runs on the device and returns arrays. A function may have parameters for
            the details of a value (`dsv32_jax.model.taps.DETAILS`). The same function again compiles nothing anew.
          operands: arrays and numbers that these functions, and those of patches, get if they name them. Other values
            of the same shapes compile nothing anew: what differs from call to call, such as a position.

        Returns:
          NumPy arrays by name: the results of the functions, or the values, whose first axis is the tokens'; axes of
          positions are as long as the cache, a multiple of 64.

        Raises:
          UserError: a name or pattern that no value has, or two that give one value different functions; an operand
            that has the name of a detail or that no function names.
        """
        row = self._sequence("probe", ids)
        instance("taps", taps, Mapping, "a mapping from names to functions or None")
        arrays = operands_of(operands or {}, (Taps.of(taps), self.options.patches))
        return jax.tree.map(
            np.asarray, inspection.tapped(self._flat(), row, Taps.of(taps), len(row), operands=arrays)[1]
        )

    def tap_names(self) -> dict[str, str]:
        """The names that `probe` takes, each with the dtype and shape of its value for 8 tokens."""
        return inspection.tap_names(self._flat())

    def _sequence(self, call: str, ids: Prompts) -> list[int]:
        """The ids of the only sequence that a call takes."""
        rows = self.rows(ids)
        if len(rows) != 1:
            raise UserError(f"{call}: {len(rows)} sequences; give one")
        return rows[0]

    def run_layer(self, layer: int, hidden: np.ndarray | Array) -> dict[str, np.ndarray]:
        """Runs one layer alone on a given residual stream.

        Args:
          layer: its number, from 0.
          hidden: float [T, hidden_size], the stream before it, of positions 0 .. T - 1.

        Returns:
          `hidden` [T, hidden_size] after the layer, `topk` int32 [T, K], `index_scores` and `attention` float32 [T, T],
          and in layers with experts `experts` and `expert_weights` [T, experts]; see `dsv32_jax.fidelity.Trace`.

        Raises:
          UserError: there is no such layer, or `hidden` has another shape.
        """
        return inspection.run_layer(self._flat(), layer, hidden)

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
            that of the generation config, or 256, or as many as fit.
          temperature, top_p: see `sampling.sample`; temperature 0 is greedy and the same for every seed. Default:
            `sampling_defaults`.
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

        A character's bytes are held back until it is complete; a row's last piece has the remaining bytes.
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
          UserError: as `generate`, and where the checkpoint has no tokenizer or no chat template.
        """
        if self.tokenizer is None:
            raise UserError("chat: the checkpoint has no tokenizer.json, which a chat needs")
        boolean("thinking", thinking)
        turns = checked_messages([{"role": "user", "content": messages}] if isinstance(messages, str) else messages)
        prompt = self.tokenizer.render_chat(turns, thinking=thinking)
        split, tokens = ReasoningSplit(self.tokenizer, prompt, thinking), []
        ids = self.tokenizer.encode(prompt)
        for piece in self.stream([ids], max_new_tokens, temperature=temperature, top_p=top_p, seed=seed):
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
        """Compiles the programs that `generate` runs for prompts of these lengths together, several at a time.

        Without this call each is compiled when it is first needed, one after the other; with kernels that takes most of
        a minute of one core at full width.

        Args:
          lengths: tokens of each prompt of a call.
          max_new_tokens: of that call.

        Returns:
          The number of programs.
        """
        with user_errors():
            return len(all_at_once(self.programs(lengths, max_new_tokens)))

    def programs(self, lengths: Sequence[int], max_new_tokens: int) -> list[Callable[[], Any]]:
        """Jobs that compile each program of `warmup`."""
        return decoding.programs(self._flat(), lengths, max_new_tokens)

    def _decode(
        self,
        rows: list[list[int]],
        max_new_tokens: int,
        temperature: float | None,
        top_p: float | None,
        seed: int,
        ignore_eos: bool,
    ) -> Iterator[np.ndarray]:
        """Checks the arguments of sampling, then yields the tokens of each step, see `decoding.decode`."""
        temperature, top_p = self.sampling(temperature, top_p, seed)
        boolean("ignore_eos", ignore_eos)
        yield from decoding.decode(
            self._flat(),
            rows,
            max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            end_ids=() if ignore_eos else self.eos_ids,
        )

    # ---- helpers ----

    def new_tokens(self, rows: list[list[int]], max_new_tokens: int | None) -> int:
        """The number of tokens that `generate` adds to these rows; `UserError` where they do not fit."""
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

    def rows(self, prompts: Prompts) -> list[list[int]]:
        """Converts prompts of any accepted form to checked lists of ids; see `prompts.rows_of`."""
        return rows_of(prompts, self.config, self.tokenizer)
