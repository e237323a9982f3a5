"""Results as JSON: their folder, and the description of the machine that each contains."""

import importlib.metadata
import json
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jax

from dsv32_jax.common.files import whole_file
from dsv32_jax.experiments.command_line import writable

RESULTS = Path(__file__).parent / "results"


def environment() -> dict[str, Any]:
    """Device, versions and time of a measurement."""
    device = jax.devices()[0]
    return {
        "device": platform.processor() or platform.machine() if device.platform == "cpu" else device.device_kind,
        "platform": device.platform,
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes a JSON file, whole or not at all."""
    writable(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_result(name: str) -> dict[str, Any]:
    """Reads a result of `experiments/results`."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
