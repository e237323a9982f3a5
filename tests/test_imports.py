"""The arrows of the house: experiments -> convert -> dsv32_jax -> pallas_kernels, read from the import statements."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("pallas_kernels", "dsv32_jax", "convert", "experiments")
ROOMS = ("errors", "fidelity", "common", "config", "model", "generate", "engine", "server", "cli")
"""What `dsv32_jax` consists of, lowest first: a room imports itself and those below it."""
# Folders of the repository that are imported as parts of `dsv32_jax`.
MAPPED = {"dsv32_jax.convert": "convert", "dsv32_jax.experiments": "experiments"}
# These may reach up, inside functions.
VERBS = ("before_after", "checkpoints", "diagnosing", "measuring", "workbench")
REACH_UP = {Path("dsv32_jax") / name for name in ("generate/loading.py", *(f"cli/{verb}.py" for verb in VERBS))}


def imports(tree: ast.AST, inside: bool = False) -> list[tuple[str, bool]]:
    """(imported module, whether inside a function) of every import statement."""
    found: list[tuple[str, bool]] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            found += [(alias.name, inside) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            found += [(f"{module}.{alias.name}", inside) for alias in node.names]
        found += imports(node, inside or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return found


def package(module: str) -> str:
    """The package of an imported module, by its folder."""
    mapped = (folder for name, folder in MAPPED.items() if module == name or module.startswith(f"{name}."))
    return next(mapped, module.partition(".")[0])


def files(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found, f"{package} has no files"
    return found


def climbs(path: Path, module: str) -> bool:
    """Whether a file of `dsv32_jax` imports a module of a room above its own."""
    _, room, *_ = (part.removesuffix(".py") for part in path.parts)
    target = module.split(".")[1]
    return room in ROOMS and target in ROOMS and ROOMS.index(target) > ROOMS.index(room)


def violations(path: Path, source: str) -> list[str]:
    """Imports of a package above the one that `path` (relative to the root) is in."""
    rank = PACKAGES.index(path.parts[0])
    bad = []
    for module, inside in imports(ast.parse(source)):
        top = package(module)
        if top in PACKAGES and PACKAGES.index(top) > rank and not (inside and path in REACH_UP):
            bad.append(f"{path} imports {module}")
        if top == path.parts[0] == "dsv32_jax" and climbs(path, module):
            bad.append(f"{path} imports {module}")
        if module.partition(".")[0] in MAPPED.values():
            bad.append(f"{path} imports {module}, which is not installed under that name")
        if path.parts[0] == "pallas_kernels" and top == "flax":
            bad.append(f"{path} imports {module}")
    return bad


@pytest.mark.parametrize("package", PACKAGES)
def test_no_arrow_points_up(package):
    assert [bad for path in files(package) for bad in violations(path.relative_to(ROOT), path.read_text())] == []


def test_every_room_has_its_floor():
    rooms = {path.name.removesuffix(".py") for path in (ROOT / "dsv32_jax").iterdir() if path.name[0] != "_"}
    assert rooms - {"demo"} == set(ROOMS)  # the demo model's files


def test_the_rule_itself():
    model, loading = Path("dsv32_jax/model/model.py"), Path("dsv32_jax/generate/loading.py")
    inside = "def f():\n    from dsv32_jax import convert"
    assert violations(model, inside) and not violations(loading, inside)
    upward = ("from dsv32_jax.convert import hf", "import dsv32_jax.experiments")
    assert all(violations(loading, source) for source in upward)
    assert violations(model, "from dsv32_jax.generate import loading")
    assert violations(model, "def f():\n    from dsv32_jax.engine.engine import Engine")
    assert not violations(loading, "from dsv32_jax.model.model import step")
    assert violations(Path("dsv32_jax/errors.py"), "import dsv32_jax.common.files")
    assert violations(Path("experiments/x.py"), "from convert import hf")
    assert violations(Path("pallas_kernels/top_k/x.py"), "from flax import nnx")


def test_every_package_is_installed_under_its_name():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert settings["package-dir"] == MAPPED
    names = {folder: name for name, folder in MAPPED.items()}
    expected = set()
    for top in PACKAGES:
        for path in files(top):
            parts = path.parent.relative_to(ROOT).parts
            assert (path.parent / "__init__.py").exists(), path.parent
            expected.add(".".join((names.get(top, top), *parts[1:])))
    assert settings["packages"] == sorted(expected)


def test_kernels_stand_alone():
    names = sorted(p.parent.name for p in (ROOT / "pallas_kernels").glob("*/__init__.py"))
    code = "import sys\n" + "".join(f"import pallas_kernels.{name}\n" for name in names)
    code += "print([m for m in ('flax', 'dsv32_jax', 'convert', 'experiments') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_config_needs_no_jax():
    code = "import sys, dsv32_jax.config\nprint('jax' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "False", done.stderr
