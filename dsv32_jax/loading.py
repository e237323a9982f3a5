"""`load`: a checkpoint, by name or directory, as a `LanguageModel`."""

import os
import re
from pathlib import Path
from typing import Any

import jax

from dsv32_jax.config import ModelConfig, read_json
from dsv32_jax.errors import UserError
from dsv32_jax.language_model import LanguageModel
from dsv32_jax.memory import available_bytes, checkpoint_bytes, human
from dsv32_jax.model import Options
from dsv32_jax.tokenizer import Tokenizer

DEMO = Path(__file__).parent / "demo"


def load(
    name_or_path: str | os.PathLike[str] = "demo",
    *,
    compute_dtype: str | None = None,
    act_quant: bool | None = None,
    attention: str = "sparse",
    index_topk: int | None = None,
    backend: str = "auto",
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
      backend: of the kernels: "auto", "mosaic_gpu", "reference" or "interpret".
      memory_check: refuse a checkpoint whose files are larger than the free memory.

    Raises:
      UserError: naming the file, field or argument that is wrong.
    """
    directory = find(name_or_path)
    config = ModelConfig.from_hf(directory / "config.json")
    options = Options.default(
        config,
        compute_dtype=compute_dtype,
        act_quant=act_quant,
        attention=attention,
        index_topk=index_topk,
        backend=backend,
    )
    tokenizer = Tokenizer(directory) if (directory / "tokenizer.json").exists() else None
    generation_config = read_generation_config(directory)
    if memory_check:
        needed, (free, place) = checkpoint_bytes(directory), available_bytes()
        if needed > free:
            raise UserError(
                f"{directory}: its weights take {human(needed)} and {place} has {human(free)} free; "
                f"`dsv32 info --model {directory} --memory` tells what fits"
            )
    use_compilation_cache()
    from dsv32_jax import convert

    read = convert.load_hf if convert.checkpoint_kind(directory) == "hf" else convert.load_orbax
    return LanguageModel(read(directory, config), config, tokenizer, options, generation_config)


def find(name_or_path: str | os.PathLike[str]) -> Path:
    """The local directory of a checkpoint, downloaded first where it is a name on the hub."""
    name = os.fspath(name_or_path)
    directory = DEMO if name == "demo" and not Path(name).is_dir() else Path(name).expanduser()
    if directory.is_dir():
        if not (directory / "config.json").is_file():
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
    except Exception as error:  # no network, no such repository, no permission, no package: the way out is the same
        raise UserError(
            f"{name}: no such directory, and it could not be fetched from huggingface.co ({type(error).__name__}); "
            f"where there is a network run `hf download {name} --local-dir DIR`, bring DIR here and give its path"
        ) from error


def read_generation_config(directory: Path) -> dict[str, Any]:
    """`generation_config.json` as a dict, empty where there is none."""
    path = directory / "generation_config.json"
    return read_json(path) if path.exists() else {}


def use_compilation_cache() -> None:
    """Keeps compiled programs between processes, in ~/.cache/dsv32-jax or where JAX_COMPILATION_CACHE_DIR says."""
    if jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", str(Path.home() / ".cache" / "dsv32-jax"))
