"""Notebooks on the demo model, each a `.py` in percent form and the `.ipynb` that `make notebooks` makes of it.

In reading order: `NAMES`.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
NAMES = (
    "first_tokens",
    "what_the_indexer_looks_at",
    "your_own_selection_and_kernel",
    "what_quantisation_costs",
    "your_own_loss",
)
