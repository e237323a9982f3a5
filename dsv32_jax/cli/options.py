"""Flags that several verbs have."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Option("--model", help='A checkpoint directory, "org/name" on the hub, or "demo".')]
PromptFlag = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; repeat it for a batch.")]
PromptFile = Annotated[
    list[Path] | None, typer.Option("--prompt-file", help="A UTF-8 file that is one prompt; repeat it for a batch.")
]
TokenIds = Annotated[
    Path | None, typer.Option("--token-ids", help="An .npy file of int32 [B, T]; -1: absent, at the right.")
]
TextFile = Annotated[Path | None, typer.Option("--text-file", help="A UTF-8 text.")]
MaxNewTokens = Annotated[
    int | None, typer.Option("--max-new-tokens", help="Default: of generation_config.json, or 256, or what fits.")
]
Temperature = Annotated[
    float | None, typer.Option("--temperature", help="0 is greedy. Default: of generation_config.json, or 0.")
]
TopP = Annotated[float | None, typer.Option("--top-p", help="Default: of generation_config.json, or 1.")]
Seed = Annotated[int, typer.Option("--seed", help="The same seed gives the same tokens.")]
IgnoreEos = Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-sentence token.")]
Thinking = Annotated[bool, typer.Option("--thinking", help="Let the model reason before it answers (a chat).")]
System = Annotated[str | None, typer.Option("--system", help="A system message (a chat).")]
Attention = Annotated[str, typer.Option("--attention", help="sparse | dense")]
IndexTopk = Annotated[
    int | None, typer.Option("--index-topk", help="Tokens that each query attends to. Default: of the config.")
]
Backend = Annotated[str, typer.Option("--backend", help="auto | mosaic_gpu | reference | interpret")]
Backends = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        metavar="[OP=]NAME",
        help="auto (default) | mosaic_gpu | reference | interpret; of one op: top_k=reference; repeat it.",
    ),
]
ComputeDtype = Annotated[
    str | None, typer.Option("--compute-dtype", help="bfloat16 | float32. Default: bfloat16 on a GPU, else float32.")
]
NoActQuant = Annotated[
    bool, typer.Option("--no-act-quant", help="Quantise no activation, index key or latent: weights only.")
]
PartFlag = Annotated[
    list[str] | None,
    typer.Option(
        "--part",
        metavar="PART=FUNCTION",
        help="Replace a part of each step: index_select=recent, or index_select=package.module:function; repeat it.",
    ),
]
CheckFlag = Annotated[
    bool, typer.Option("--check", help="Check in each step the values that replaced parts give; slow.")
]
NoMtp = Annotated[bool, typer.Option("--no-mtp", help="Leave out the multi-token prediction (MTP) layer.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]
