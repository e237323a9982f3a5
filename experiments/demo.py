"""`make demo`: the whole path from a checkpoint to text, on a small model with random weights.

Writes an FP8 checkpoint in the Hugging Face layout, then converts it, describes it, scores a text and continues a
prompt with the commands of `dsv32`. The weights are random, so the text is gibberish: what is shown is that the path
works.
"""

import contextlib
import json
import sys
import tempfile
from pathlib import Path

from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError

TEXT = """\
The lighthouse keeper counts the ships that pass in the night. Some carry grain, some carry salt, and some carry only
the wind. When the fog comes in, he lights the lamp and sounds the horn, and he writes down the hour. In the morning
the sea is flat and grey, and the gulls walk along the wall as if they owned it. He drinks his tea, he oils the gears,
and he waits for the boat that brings the letters.
"""
PROMPT = "The lighthouse keeper"
BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"


def make_checkpoint(directory: Path) -> None:
    """Writes a random FP8 checkpoint of the tiny preset, with a tokenizer trained on `TEXT`."""
    from flax import nnx

    import convert
    from dsv32_jax.model import DeepseekV32

    config = ModelConfig.tiny()
    convert.export_model(DeepseekV32(config, nnx.Rngs(0)), directory)
    write_tokenizer(directory, config.vocab_size)


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """A byte-level BPE tokenizer of at most `vocab_size` tokens: `tokenizer.json` and its settings."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS, EOS],  # ids 0 and 1, as in the config
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": False, "model_max_length": 1280}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def dsv32(*arguments: str | Path) -> None:
    """Shows a command and runs it in this process, as the console script would."""
    from dsv32_jax import cli

    words = [str(argument) for argument in arguments]
    print("\n$ dsv32 " + " ".join(f'"{word}"' if " " in word else word for word in words), flush=True)
    try:
        cli.main(words)
    except SystemExit as end:
        if end.code:
            raise


def main(directory: Path) -> None:
    """The demo in `directory`, which gets the two checkpoints and the scored text."""
    print("A small model with the layers of DeepSeek-V3.2-Exp: FP8 linears, sparse attention, experts, an MTP module.")
    print(
        "ITS WEIGHTS ARE RANDOM: the text below is gibberish, and no score or speed says anything about the real model."
    )
    source, converted, text = directory / "random-fp8", directory / "random-orbax", directory / "text.txt"
    make_checkpoint(source)
    text.write_text(TEXT, encoding="utf-8")
    print(f"\nwrote {source}: " + ", ".join(sorted(path.name for path in source.iterdir())))
    dsv32("convert", source, converted)
    dsv32("info", "--model", converted)
    dsv32("score", "--model", converted, "--text-file", text)
    dsv32("generate", "--model", converted, "--prompt", PROMPT, "--max-new-tokens", "16", "--temperature", "0")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit("usage: python -m experiments.demo [DIRECTORY TO KEEP THE FILES IN]")
    with contextlib.ExitStack() as stack:
        if len(sys.argv) == 2:
            kept = Path(sys.argv[1])
            kept.mkdir(parents=True, exist_ok=True)
        else:
            kept = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dsv32-demo-")))
        try:
            main(kept)
        except UserError as error:  # a directory that has been used before
            sys.exit(f"error: {error}")
