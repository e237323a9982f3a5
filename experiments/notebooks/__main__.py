"""Runs the notebooks on a CPU, top to bottom, and writes each `.ipynb` with what its cells print and draw.

    python -m experiments.notebooks [NAME ...]

The `.py` in percent form is what is edited and reviewed; whatever is changed in the `.ipynb` alone is lost.
"""

import base64
import io
import os
import time
from pathlib import Path
from typing import Any

from dsv32_jax.common.files import whole_file
from dsv32_jax.errors import UserError
from dsv32_jax.experiments import command_line
from dsv32_jax.experiments.notebooks import FOLDER, NAMES

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python", "file_extension": ".py", "mimetype": "text/x-python"},
}
"""Of every notebook: nothing of the machine that ran it."""


def notebook(source: Path) -> Any:
    """The cells of a `.py` in percent form, without outputs; ids are numbers, so that they stay the same."""
    import jupytext

    cells = jupytext.read(source, fmt="py:percent")
    cells.metadata = METADATA | {"jupytext": {"formats": "ipynb,py:percent"}}
    for number, cell in enumerate(cells.cells):
        cell.id = f"cell-{number}"
    return cells


def smaller(image: str) -> str:
    """A PNG in base64 with a palette of 128 colours: a third of the bytes, and nobody sees it."""
    from PIL import Image

    target = io.BytesIO()
    picture = Image.open(io.BytesIO(base64.b64decode(image))).convert("RGB")
    picture.quantize(128, dither=Image.Dither.NONE).save(target, "png", optimize=True)
    return base64.b64encode(target.getvalue()).decode()


def execute(source: Path) -> Path:
    """Runs a notebook and writes it beside its source; the first error ends it, and nothing is written."""
    import nbformat
    from nbclient import NotebookClient
    from traitlets.config import Config

    target = source.with_suffix(".ipynb")
    cells = notebook(source)
    kernel = Config(KernelManager={"transport": "ipc"})  # no port that others on the machine can reach
    settings = {"timeout": None, "kernel_name": "python3", "record_timing": False, "coalesce_streams": True}
    NotebookClient(cells, config=kernel, **settings).execute()
    for data in (output.data for cell in cells.cells for output in cell.get("outputs", ()) if "data" in output):
        if "image/png" in data:
            data["image/png"] = smaller(data["image/png"])
    cells.metadata = METADATA | {"jupytext": cells.metadata["jupytext"]}
    with whole_file(target) as temporary:
        nbformat.write(cells, temporary)
    return target


def main() -> None:
    """The command."""
    parser = command_line.parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(NAMES)}; without one, all")
    arguments = parser.parse_args()
    for name in arguments.names:
        if name not in NAMES:
            raise UserError(f"notebook {name!r} is unknown; it is one of {', '.join(NAMES)}")
    for module in ("jupytext", "nbclient", "ipykernel", "matplotlib"):
        command_line.require("notebooks", module, extra="notebooks")
    command_line.writable(FOLDER)
    os.environ["JAX_PLATFORMS"] = "cpu"  # of the kernels too: what is committed is what anybody gets
    for name in arguments.names or NAMES:
        start = time.perf_counter()
        print(f"{name} ...", flush=True)
        target = execute(FOLDER / f"{name}.py")
        print(f"{target.name}: {target.stat().st_size / 1000:.0f} kB in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    command_line.run(main)
