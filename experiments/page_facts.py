"""What pages repeat of the code, made from it: lines that links lead to, sizes of configs, bytes of the real model.

    python -m experiments.page_facts [--check]

A link to a line is [`MLA.select`](../dsv32_jax/model/mla.py#L100): its text names a class, a function or a constant of
the file, and its number is the line on which the definition begins. Nobody edits the numbers: run this after the code
moved.
"""

import ast
import math
import re
from collections.abc import Iterator
from pathlib import Path

from dsv32_jax import convert
from dsv32_jax.common.units import human
from dsv32_jax.config import PRESETS, ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.pages import between, table
from dsv32_jax.generate.loading import DEMO
from dsv32_jax.generate.memory import GPU_BYTES, USABLE, cache_bytes_per_token, parameter_counts

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r"\[([^\]]*)\]\(([^)#\s]+\.py)#L(\d+)\)")

SYMBOLS = {
    "$D$": "hidden_size",
    "layers": "num_hidden_layers",
    "layers with a dense feed-forward block": "first_k_dense_replace",
    "$H$": "num_attention_heads",
    "width of $c^Q$": "q_lora_rank",
    "width of $c$": "kv_lora_rank",
    "$d_{\\text{nope}}$, width of $q^C_h$": "qk_nope_head_dim",
    "$d_{\\text{rope}}$, width of $q^R_h$ and $k^R$": "qk_rope_head_dim",
    "width of $v_h$": "v_head_dim",
    "$H_I$": "index_n_heads",
    "$d_I$, width of $q^I_j$ and $k^I$": "index_head_dim",
    "$k$": "index_topk",
    "experts": "n_routed_experts",
    "$K$": "num_experts_per_tok",
    "groups of experts": "n_group",
    "$M$": "topk_group",
    "$\\gamma$": "routed_scaling_factor",
    "width of an expert": "moe_intermediate_size",
}
"""Fields of a config by what the page on the model calls them."""


def sizes() -> str:
    """The table of the released model's and the demo model's sizes."""
    configs = [PRESETS["671b"], ModelConfig.from_hf(DEMO / "config.json")]
    rows = [
        [symbol, f"`{field}`", *(f"{getattr(config, field):g}" for config in configs)]
        for symbol, field in SYMBOLS.items()
    ]
    return table(["symbol", "field of config.json", "released", "demo"], rows)


def memory() -> str:
    """The released model's bytes, GPUs that would hold its weights, and bytes of its cache."""
    config = PRESETS["671b"]
    by_dtype = parameter_counts(convert.stored_parameters(config))[1]
    total = sum(by_dtype.values())
    parts = ", ".join(f"{human(size)} {dtype}" for dtype, size in sorted(by_dtype.items()))
    rows = [["weights", f"{human(total)} ({parts})"]]
    for name, size in GPU_BYTES.items():
        rows.append([f"weights, devices of the kind {name}", str(math.ceil(total / (size * USABLE)))])
    tokens = config.max_position_embeddings
    for form, size in cache_bytes_per_token(config).items():
        rows.append([f"cache in {form}", f"{size / 1e3:.1f} kB a token, {human(size * tokens)} for {tokens:,} tokens"])
    return table(["of the released model", "needs"], rows)


MARKED = {"sizes": sizes, "memory": memory}
"""What stands between markers, by name."""


def pages() -> list[Path]:
    """The pages of the repository."""
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


def names_of(node: ast.stmt) -> Iterator[str]:
    """The names that a statement defines."""
    if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield node.name
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    yield from (target.id for target in targets if isinstance(target, ast.Name))


def line_of(file: Path, symbol: str) -> int:
    """The line on which the definition of a symbol begins, "MLA.select" for instance.

    Raises:
      UserError: the file does not exist or does not define it.
    """
    if not file.exists():
        raise UserError(f"{file}: does not exist, and a page links to {symbol!r} in it")
    body: list[ast.stmt] = ast.parse(file.read_text(encoding="utf-8")).body
    definition: ast.stmt | None = None
    for name in symbol.split("."):
        definition = next((node for node in body if name in names_of(node)), None)
        if definition is None:
            raise UserError(f"{file}: defines no {symbol!r}, to which a page links")
        body = getattr(definition, "body", [])
    assert definition is not None
    return definition.lineno


def with_lines(text: str, folder: Path) -> str:
    """The text of a page in `folder` with the line numbers that are right now.

    Raises:
      UserError: the text of a link to a line is not the name of a symbol in backticks, or the file has no such symbol.
    """

    def renumbered(match: re.Match[str]) -> str:
        title, path, _ = match.groups()
        if not re.fullmatch(r"`[\w.]+`", title):
            raise UserError(f"link {match[0]}: its text must be the name of a symbol of that file, in backticks")
        return f"[{title}]({path}#L{line_of((folder / path).resolve(), title.strip('`'))})"

    return LINK.sub(renumbered, text)


def up_to_date(text: str, folder: Path) -> str:
    """The text of a page in `folder` with what it should repeat; raises UserError as `with_lines` does."""
    for name, content in MARKED.items():
        if f"<!-- {name} -->" in text:
            text = between(text, name, content())
    return with_lines(text, folder)


def main() -> None:
    """The command."""
    parser = command_line.parser(__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; fail where a page differs from the code")
    check = parser.parse_args().check
    for page in pages():
        old = page.read_text(encoding="utf-8")
        new = up_to_date(old, page.parent)
        if new != old and check:
            raise UserError(f"{page.relative_to(ROOT)}: differs from the code; run {command_line.program()}")
        if new != old:
            page.write_text(new, encoding="utf-8")
            print(page.relative_to(ROOT))


if __name__ == "__main__":
    command_line.run(main)
