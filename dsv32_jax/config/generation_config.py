"""Reads `generation_config.json`: a checkpoint's defaults for sampling."""

import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dsv32_jax.common.fields import same, shown
from dsv32_jax.common.reading import present, read_json
from dsv32_jax.errors import CheckpointWarning, UserError


def read_generation_config(directory: Path, vocab_size: int | None = None) -> dict[str, Any]:
    """The fields of `generation_config.json` that have a value; none where there is no file.

    This project uses `do_sample`, `temperature`, `top_p`, `max_new_tokens` and `eos_token_id`. An empty list of
    end-of-sentence tokens is left out as a null is, so that those of config.json hold.

    Raises:
      UserError: the file is not a JSON object, or one of those fields has a wrong value; token ids are checked against
        `vocab_size` where it is given.

    Warns (`CheckpointWarning`), once and by name, of fields that would change the sampled tokens and are not supported.
    """
    path = directory / "generation_config.json"
    if not present(path):
        return {}
    return checked_generation_config(read_json(path), str(path), vocab_size)


def checked_generation_config(
    raw: Mapping[str, Any], source: str = "generation_config", vocab_size: int | None = None
) -> dict[str, Any]:
    """The same for fields that have been read; `source` names their file in errors and warnings."""
    fields = {name: value for name, value in raw.items() if value is not None}
    if fields.get("eos_token_id") == []:
        del fields["eos_token_id"]
    for name, (allowed, right) in _READ.items():
        if name in fields and not allowed(fields[name]):
            raise UserError(f"{source}: {name} is {shown(fields[name])}; it must be {right} or null")
    for name in ("eos_token_id", "bos_token_id"):
        ids = fields.get(name, [])
        for id in ids if isinstance(ids, list) else [ids]:
            if vocab_size is not None and id >= vocab_size:
                raise UserError(f"{source}: {name} {id} is outside vocab_size {vocab_size}")
    ignored = [name for name, value in fields.items() if not _changes_nothing(name, value)]
    if ignored:
        message = f"{source}: fields that are not offered are passed over: {', '.join(sorted(ignored))}"
        warnings.warn(message, CheckpointWarning, stacklevel=1)
    return fields


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _integer(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _tokens(value: Any) -> bool:
    return all(_integer(id, 0) for id in value) if isinstance(value, list) else _integer(value, 0)


_READ: dict[str, tuple[Callable[[Any], bool], str]] = {
    "do_sample": (lambda value: isinstance(value, bool), "true, false"),
    "temperature": (lambda value: _number(value) and value >= 0, "a finite number of at least 0"),
    "top_p": (lambda value: _number(value) and 0 < value <= 1, "a number above 0 and at most 1"),
    "max_new_tokens": (lambda value: _integer(value, 1), "an integer of at least 1"),
    "eos_token_id": (_tokens, "a token id, a list of them"),
    "bos_token_id": (lambda value: _integer(value, 0), "a token id"),
}
"""A check of each field's value other than null, and the same in words."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("repetition_penalty", "encoder_repetition_penalty", "typical_p", "guidance_scale"), (1,)),
    **dict.fromkeys(("num_beams", "num_beam_groups"), (1,)),
    **dict.fromkeys(("min_p", "top_h", "epsilon_cutoff", "eta_cutoff", "penalty_alpha", "diversity_penalty"), (0,)),
    **dict.fromkeys(("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "min_length", "min_new_tokens"), (0,)),
    "top_k": (0, -1),
    "max_length": (20,),  # transformers' default, which gives way to max_new_tokens
    **dict.fromkeys(("suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "stop_strings"), ([],)),
    **dict.fromkeys(("presence_penalty", "frequency_penalty"), (0,)),
    **dict.fromkeys(("remove_invalid_values", "token_healing"), (False,)),
    **dict.fromkeys(("sequence_bias",), ({}, [])),
}
"""Values with which sampling is that of this project; other values and unknown names are ignored with a warning."""
_WITHOUT_EFFECT = frozenset(
    """
    pad_token_id decoder_start_token_id transformers_version _from_model_config _commit_hash use_cache use_mtp
    cache_implementation cache_config max_cache_len return_legacy_cache prefill_chunk_size compile_config
    disable_compile low_memory continuous_batching_config num_return_sequences output_attentions
    output_hidden_states output_scores output_logits return_dict_in_generate renormalize_logits early_stopping
    length_penalty is_assistant num_assistant_tokens num_assistant_tokens_schedule assistant_confidence_threshold
    prompt_lookup_num_tokens max_matching_ngram_size assistant_early_exit assistant_lookbehind target_lookbehind
    assistant_ensemble_weight speculation_type
    """.split()
)
"""Fields that ask for more outputs or for another way to the same tokens, or belong to beam search."""


def _changes_nothing(name: str, value: Any) -> bool:
    if name in _READ or name in _WITHOUT_EFFECT:
        return True
    return any(same(value, neutral) for neutral in _NEUTRAL.get(name, ()))
