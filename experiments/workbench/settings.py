"""One way to run a model, as a value: options, parts, the scheme of the weights, where a cache's blocks lie."""

import dataclasses
import types
import typing
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from dsv32_jax.convert.quantization import UNQUANTISED, mixed, quantize_model, uniform
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.workbench.random_model import random_model
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.model.context import Options
from dsv32_jax.model.params import is_linear
from dsv32_jax.model.parts import title
from dsv32_jax.model.variants import backends_of, parts_of
from pallas_kernels.matmul import SCHEMES, scheme_name

__all__ = [
    "MIXED",
    "SCHEME",
    "SETTABLE",
    "STORED",
    "Setting",
    "description",
    "differences",
    "in_scheme",
    "random_in_scheme",
]

SCHEME = "scheme"
"""The field that is not one of `Options`: the scheme of the linears' weights."""
STORED, MIXED = "stored", "mixed"
"""Schemes of a setting beside those of the library: the checkpoint's own, and experts in INT4 with the rest in INT8."""
WEIGHT_SCHEMES = (STORED, UNQUANTISED, *SCHEMES, MIXED)
UNNAMED = ("parts", "patches", "check")
"""Fields of `Options` that are functions, and the one that changes no result."""
HINTS = {name: hint for name, hint in typing.get_type_hints(Options).items() if name not in UNNAMED}
SETTABLE = (*HINTS, SCHEME)
"""The fields that `--set FIELD=VALUE` takes."""
ATTENDING = {"sparse": "sparse_mla", "dense": "dense_mla"}
"""The part that attends, by `Options.attention`."""
FAMILIES = ("indexer", "experts", "shared", "attn", "ffn")
"""Groups of linears in a description: the first of these names that a path has."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """How a model is run, as far as that differs from how it was loaded.

    Attributes:
      name: for tables.
      options: fields of `Options`.
      parts: functions by part; None puts the model's own back. An op with a backend of its own is one of these.
      scheme: of the linears' weights: "stored", "bf16" (dequantised), a name of `pallas_kernels.matmul.SCHEMES`, or
        "mixed". Weights are rounded one by one, without calibration.
      contiguous: in steps that are timed, the blocks of a sequence lie one after the other.
    """

    name: str = "as loaded"
    options: Mapping[str, Any] = types.MappingProxyType({})
    parts: Mapping[str, Callable[..., Any] | None] = types.MappingProxyType({})
    scheme: str = STORED
    contiguous: bool = False

    def __post_init__(self) -> None:
        if self.scheme not in WEIGHT_SCHEMES:
            raise UserError(f"scheme {self.scheme!r} is unknown; it is one of {', '.join(WEIGHT_SCHEMES)}")

    @staticmethod
    def of(
        name: str,
        sets: Iterable[str] = (),
        parts: Iterable[str] = (),
        backends: Iterable[str] = (),
        suffix: str = "",
    ) -> "Setting":
        """The setting that a command line names.

        Args:
          name: of the setting.
          sets: texts "FIELD=VALUE", see `SETTABLE`.
          parts: texts "PART=FUNCTION", see `dsv32_jax.model.variants.named_part`.
          backends: texts "NAME" or "OP=NAME", see `dsv32_jax.model.variants.backends_of`.
          suffix: of the flags' names in errors: "-a" where they are `--set-a` and so on.

        Raises:
          UserError: naming the flag that is wrong.
        """
        chosen: dict[str, Any] = {}
        for text in sets:
            field, value = parsed(text, f"--set{suffix}")
            if field in chosen:
                raise UserError(f"--set{suffix} {text}: {field} is set twice")
            chosen[field] = value
        try:
            functions = parts_of(parts)
            everywhere, pinned = backends_of(backends)
        except UserError as error:
            kind, rest = str(error).split(" ", 1)
            raise UserError(f"--{kind}{suffix} {rest}") from error
        if both := functions.keys() & pinned.keys():
            part = min(both)
            raise UserError(f"--backend{suffix} {part}=...: --part{suffix} replaces it as well; give one")
        if everywhere is not None:
            if "backend" in chosen:
                raise UserError(f"--backend{suffix} {everywhere}: --set{suffix} names a backend as well")
            chosen["backend"] = everywhere
        scheme = chosen.pop(SCHEME, STORED)
        return Setting(name=name, options=chosen, parts=functions | pinned, scheme=scheme)

    def merged(self, other: "Setting", name: str | None = None) -> "Setting":
        """This setting with what `other` says in its place."""
        return Setting(
            name=other.name if name is None else name,
            options={**self.options, **other.options},
            parts={**self.parts, **other.parts},
            scheme=self.scheme if other.scheme == STORED else other.scheme,
            contiguous=self.contiguous or other.contiguous,
        )

    def apply(self, m: LanguageModel) -> LanguageModel:
        """The model that runs so; `m` is not changed, and shares every weight whose scheme stays.

        Raises:
          UserError: an option, a part or a scheme does not go with the model.
        """
        return self.applied_to_weights(in_scheme(m, self.scheme))

    def applied_to_weights(self, m: LanguageModel) -> LanguageModel:
        """`apply` to a model whose weights are in the setting's scheme already."""
        options = dataclasses.replace(m.options, **self.options)
        other = LanguageModel(m.model, m.config, m.tokenizer, options, m.generation_config)
        return other.with_parts(**self.parts) if self.parts else other  # type: ignore[arg-type]

    def describe(self, m: LanguageModel) -> dict[str, Any]:
        """JSON that says exactly what runs, see `description`."""
        return description(self.apply(m), self.contiguous)


def parsed(text: str, flag: str) -> tuple[str, Any]:
    """The field and the value of "index_topk=64".

    Raises:
      UserError: another form, a field that cannot be set, or a value that it does not take.
    """
    field, equals, value = text.partition("=")
    if not equals:
        raise UserError(f"{flag} {text}: must be FIELD=VALUE, for instance index_topk=64")
    if field not in SETTABLE:
        raise UserError(f"{flag} {text}: there is no field {field!r}; it is one of {', '.join(SETTABLE)}")
    if field == SCHEME:
        if value not in WEIGHT_SCHEMES:
            raise UserError(f"{flag} {text}: must be one of {', '.join(WEIGHT_SCHEMES)}")
        return field, value
    kinds = typing.get_args(HINTS[field]) or (HINTS[field],)
    converted = converted_to(value, kinds)
    if converted is ...:
        wanted = "true or false" if bool in kinds else "a whole number"
        raise UserError(f"{flag} {text}: must be {wanted}{', or none' if type(None) in kinds else ''}")
    try:
        Options(**{field: converted})
    except UserError as error:
        raise UserError(f"{flag} {text}: {error}") from error
    return field, converted


def converted_to(text: str, kinds: tuple[type, ...]) -> Any:
    """The text as a value of one of these types; ... where it is none."""
    if text == "none" and type(None) in kinds:
        return None
    if bool in kinds:
        return {"true": True, "false": False}.get(text, ...)
    if int in kinds:
        return int(text) if text.isascii() and text.lstrip("-").isdigit() else ...
    return text


def in_scheme(m: LanguageModel, scheme: str) -> LanguageModel:
    """The model with the weights of its linears in another scheme, see `Setting.scheme`; "stored" is the same model."""
    if scheme == STORED:
        return m
    schemes = mixed(m.model) if scheme == MIXED else uniform(m.model, scheme)
    if all((scheme_name(m.weights[path]) or UNQUANTISED) == new for path, new in schemes.items()):
        return m
    model = quantize_model(m.model, schemes)
    config = m.config.replace(quantization_config=model.config.quantization_config, unknown=model.config.unknown)
    return LanguageModel(model, config, m.tokenizer, m.options, m.generation_config)


def random_in_scheme(m: LanguageModel, scheme: str) -> LanguageModel:
    """As `in_scheme`, for a model of random weights: others are made in the scheme, which takes less memory."""
    if scheme == STORED:
        return m
    schemes = mixed(m.model) if scheme == MIXED else uniform(m.model, scheme)
    other = random_model(m.config, schemes=schemes)
    return LanguageModel(other.model, m.config, m.tokenizer, m.options, m.generation_config)


def description(lm: LanguageModel, contiguous: bool = False) -> dict[str, Any]:
    """Says exactly what a step of this model runs.

    Returns:
      JSON-able; each entry can be changed by itself:
        options: every field of `Options` but parts and attention, with the number where `index_topk` is the config's.
        attention: the keys that a token attends to, and the function that attends to them.
        parts: the names of the other functions that are not the model's own, by part.
        patches: the functions that change a value within the step, by the value's name.
        schemes: how many linears of each group ("experts", "indexer") are in which scheme.
        kernels: whether ops run kernels where these take the arguments.
        blocks: of a sequence in the cache of timed steps, "anywhere" or "one after the other".
    """
    options = lm.options
    fields = {name: getattr(options, name) for name in (*HINTS, "check") if name != "attention"}
    fields["index_topk"] = options.index_topk or lm.config.index_topk
    fields["cache_dtype"] = options.cache_form
    attends = ATTENDING[options.attention]
    function = title(getattr(options.parts, attends))
    keys = "the chosen keys" if options.attention == "sparse" else "all keys"
    return {
        "options": fields,
        "attention": f"{function} over {keys}" if options.absorb else f"unabsorbed, over {keys}",
        "parts": {name: title(part) for name, part in options.parts.replaced.items() if name != attends},
        "patches": {name: title(patch) for name, patch in options.patches.requests if patch is not None},
        "schemes": schemes_by_family(lm),
        "kernels": options.runs_kernels,
        "blocks": "one after the other" if contiguous else "anywhere",
    }


def schemes_by_family(lm: LanguageModel) -> dict[str, dict[str, int]]:
    """The number of linears in each scheme, by `FAMILIES`; a plain one counts under its dtype."""
    counts: dict[str, Counter[str]] = {}
    for path, leaf in lm.weights.items():
        if is_linear(path):
            names = path.split(".")
            family = next((name for name in FAMILIES if name in names), "other")
            counts.setdefault(family, Counter())[scheme_name(leaf) or str(leaf.dtype)] += 1
    return {family: dict(sorted(count.items())) for family, count in sorted(counts.items())}


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[str]:
    """The names of what two descriptions do not share: of options and parts each by itself, "options.index_topk"."""

    def entries(one: Mapping[str, Any]) -> dict[str, Any]:
        flat = {name: value for name, value in one.items() if name not in ("options", "parts")}
        for outer in ("options", "parts"):
            flat |= {f"{outer}.{name}": value for name, value in one[outer].items()}
        return flat

    a, b = entries(first), entries(second)
    return sorted(name for name in a.keys() | b.keys() if a.get(name) != b.get(name))
