"""Tables in Markdown, and pages whose parts between markers are made from results."""

import re

from dsv32_jax.errors import UserError


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def between(page: str, name: str, content: str) -> str:
    """The page with other text between the markers of a name."""
    marked = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
    if not marked.search(page):
        raise UserError(f"page: no markers of {name!r}; there must be <!-- {name} --> and <!-- /{name} -->")
    return marked.sub(lambda found: f"{found[1]}\n{content}\n\n{found[2]}", page)
