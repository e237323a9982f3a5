"""`load`: a checkpoint, by name or directory, as a `LanguageModel`."""

import os
import re
import tempfile
import warnings
from pathlib import Path

import jax

from dsv32_jax.common.arguments import boolean, instance
from dsv32_jax.common.files import home_directory
from dsv32_jax.common.reading import present
from dsv32_jax.config import ModelConfig
from dsv32_jax.config.generation_config import read_generation_config
from dsv32_jax.config.quantization_config import QuantizationConfig
from dsv32_jax.errors import SurroundingsWarning, UserError
from dsv32_jax.generate.language_model import LanguageModel
from dsv32_jax.generate.memory import check_room, checkpoint_bytes
from dsv32_jax.generate.tokenizer import Tokenizer
from dsv32_jax.generate.weights import check_dequantized, dequantized_bytes, with_weights
from dsv32_jax.model.model import DeepseekV32, Options
from pallas_kernels.matmul import FP8_BLOCK, scheme_name

DEMO = Path(__file__).parents[1] / "demo"


def load(
    name_or_path: str | os.PathLike[str] = "demo",
    *,
    compute_dtype: str | None = None,
    act_quant: bool | None = None,
    attention: str = "sparse",
    index_topk: int | None = None,
    index_topk_freq: int = 1,
    backend: str = "auto",
    dequantize: str | None = None,
    check: bool = False,
    mtp: bool = True,
    memory_check: bool = True,
) -> LanguageModel:
    """Loads a checkpoint.

    Args:
      name_or_path: a directory in the Hugging Face layout or written by `dsv32 convert`; "org/name" on the Hugging
        Face hub; or "demo".
      compute_dtype: "bfloat16" (default on a GPU) or "float32" (default on a CPU).
      act_quant: quantise activations, index keys and latents as the official FP8 code does; default: where the
        checkpoint is FP8.
      attention: "sparse", or "dense" (every token attends to all before it).
      index_topk: tokens that each query attends to; default: the config's.
      index_topk_freq: the indexer chooses in every n-th layer, and the layers between attend to what it chose there.
      backend: of the kernels: "auto", "mosaic_gpu", "reference" or "interpret".
      dequantize: "float32" or "bfloat16": quantised weights become plain arrays, each as it is read, and activations
        are not quantised unless `act_quant` says so. Gradients need it. "bfloat16" is exact for FP8 whose scales are
        powers of two.
      mtp: False leaves out the multi-token prediction layer, also where config.json announces one that the files lack.
      check: check in each step the values that replaced parts give (`m.with_parts`); slow, for tests and notebooks.
      memory_check: refuse a checkpoint that takes more than the free memory.

    Raises:
      UserError: naming the file, field or argument that is wrong.
    """
    instance("name_or_path", name_or_path, (str, os.PathLike), "a directory or a name")
    for name, value in {"check": check, "mtp": mtp, "memory_check": memory_check}.items():
        boolean(name, value)
    directory = find(name_or_path)
    config = ModelConfig.from_hf(directory / "config.json")
    if dequantize is not None:
        check_dequantized(dequantize)
    if not mtp:
        config = config.replace(num_nextn_predict_layers=0)
    options = Options.default(
        config if dequantize is None else config.replace(quantization_config=None),
        compute_dtype=compute_dtype,
        act_quant=act_quant,
        attention=attention,
        index_topk=index_topk,
        index_topk_freq=index_topk_freq,
        backend=backend,
        check=check,
    )
    tokenizer = read_tokenizer(directory)
    generation_config = read_generation_config(directory, config.vocab_size)
    from dsv32_jax import convert

    if memory_check:
        hint = f"; `dsv32 info --model {directory} --memory` tells what fits"
        if dequantize is None:
            check_room(checkpoint_bytes(directory), f"{directory}: its weights", hint)
        else:
            needed = dequantized_bytes(convert.stored_parameters(config), dequantize)
            check_room(needed, f"{directory}: its weights in {dequantize}", hint)
    use_compilation_cache()
    read = convert.load_hf if convert.checkpoint_kind(directory) == "hf" else convert.load_orbax
    model = read(directory, config, mtp=mtp, dequantize=dequantize)
    return LanguageModel(model, model.config, tokenizer, options, generation_config)


def save(lm: LanguageModel, directory: str | os.PathLike[str]) -> None:
    """`LanguageModel.save`."""
    from dsv32_jax import convert

    instance("directory", directory, (str, os.PathLike), "a path")
    files = None if lm.tokenizer is None else lm.tokenizer.directory
    settings = dict(lm.generation_config)
    convert.export_model(with_true_schemes(lm), directory, tokenizer_files=files, generation_config=settings)


def with_true_schemes(lm: LanguageModel) -> DeepseekV32:
    """The model with the config of `lm`, and a quantization_config with the true scheme of every linear."""
    from dsv32_jax.convert.stored import quantization_config

    scheme_by_path = {path: scheme_name(leaf) for path, leaf in lm.weights.items()}
    schemes = {path: scheme for path, scheme in scheme_by_path.items() if scheme is not None}
    quantization = lm.config.quantization_config
    # The released form does not say which linears are plain; any other names the scheme of each.
    if not (isinstance(quantization, QuantizationConfig) and set(schemes.values()) <= {FP8_BLOCK.name}):
        quantization = quantization_config(schemes, lm.config)
    model = with_weights(lm.model, {})
    model.config = lm.config.replace(quantization_config=quantization)
    return model


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The local directory of a checkpoint, downloaded first where it is a name on the hub."""
    name = os.fspath(name_or_path)
    directory = DEMO if name == "demo" and not Path(name).is_dir() else _expanded(name)
    if directory.is_dir():
        if not present(directory / "config.json"):
            from dsv32_jax.convert.unfinished import refuse_unfinished

            refuse_unfinished(directory)
            raise UserError(f"{directory}: has no config.json; a checkpoint directory must have one")
        return directory
    if name == "demo":
        raise UserError(f"demo: {DEMO} is missing; the checkpoint ships with the package, install it again")
    if directory.exists():
        raise UserError(f"{name}: is a file; give the checkpoint's directory")
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise UserError(f"{name}: no such directory")
    try:
        from huggingface_hub import snapshot_download

        from dsv32_jax.convert.companions import COPIED

        return Path(snapshot_download(name, allow_patterns=[*COPIED, "*.json", "*.safetensors"]))
    except Exception as error:  # no network, no such repository, no permission, no package: the remedy is the same
        raise UserError(
            f"{name}: no such directory, and it could not be fetched from huggingface.co ({type(error).__name__}); "
            f"where there is a network run `hf download {name} --local-dir DIR`, bring DIR here and give its path"
        ) from error


def read_tokenizer(directory: Path) -> Tokenizer | None:
    """None where there is no `tokenizer.json`."""
    return Tokenizer(directory) if present(directory / "tokenizer.json") else None


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes, in ~/.cache/dsv32-jax or where JAX_COMPILATION_CACHE_DIR says.

    Where that cannot be written, programs are compiled anew in each process, and a warning says so.
    """
    if jax.config.jax_compilation_cache_dir is not None or not jax.config.jax_enable_compilation_cache:
        return
    try:
        directory = home_directory() / ".cache" / "dsv32-jax"
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        warnings.warn(
            f"no cache of compiled programs: {error.filename}: {error.strerror}; a directory for it can be named in "
            "JAX_COMPILATION_CACHE_DIR",
            SurroundingsWarning,
            stacklevel=3,
        )
    else:
        jax.config.update("jax_compilation_cache_dir", str(directory))


def _expanded(name: str) -> Path:
    """The path of `name`, with the home directory for `~`."""
    try:
        return Path(name).expanduser()
    except RuntimeError as error:
        raise UserError(f"{name}: no such home directory is known; give the path in full") from error
