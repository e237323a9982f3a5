"""Settings of every test run, made before JAX is imported, and the golden files."""

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

# Tests are for the CPU, also on a machine with a GPU, except when tests/gpu is what was asked for. Workers of
# pytest-xdist do not see the arguments, but the environment.
if any("tests/gpu" in argument for argument in sys.argv):
    os.environ["DSV32_GPU_TESTS"] = "1"
elif "DSV32_GPU_TESTS" not in os.environ:
    os.environ["JAX_PLATFORMS"] = "cpu"
if any("tests/mesh" in argument for argument in sys.argv):
    os.environ["DSV32_MESH_TESTS"] = "1"
    os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get("XLA_FLAGS", "")
# A warpgroup that waits in the GPU interpreter holds a thread of XLA's pool; there must be more than warpgroups.
os.environ.setdefault("NPROC", "8")
if "DSV32_GPU_TESTS" in os.environ:
    os.environ["JAX_ENABLE_COMPILATION_CACHE"] = "false"
else:
    if "PYTEST_XDIST_WORKER" not in os.environ:
        # Workers share what they compile, within this run alone: a test must not pass because of a program that an
        # earlier version of the code compiled.
        os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="dsv32-tests-")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.02"
        atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
    # Most of a test is compiling programs that run once; without optimisation that takes a third less.
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0 " + os.environ.get("XLA_FLAGS", "")

# Tracing makes very many small objects, hardly any of them garbage: looking less often for it saves a tenth.
gc.set_threshold(100_000, 20, 20)


def pytest_collection_finish() -> None:
    """Nor does what was imported become garbage."""
    gc.collect()
    gc.freeze()


LONGEST = (
    "train_demo/test_training.py",
    "bench/test_moe.py",
    "engine/test_engine.py",
    "engine/test_speculation.py",
    "test_notebooks.py",
    "model/test_step.py",
    "cli/test_cli.py",
    "gpu/test_model.py",
    "gpu/test_golden.py",
)
"""Files of tests that take longest; they begin first, so that no process is left with one of them at the end."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Brings tests of `LONGEST` to the front, in that order."""

    def place(item: pytest.Item) -> int:
        found = item.path.relative_to(Path(__file__).parent).as_posix()
        return LONGEST.index(found) if found in LONGEST else len(LONGEST)

    items.sort(key=place)


MOST_BYTES = 5e9
"""Of a process, after which it lets go of what it has compiled: two that kept all would fill a small machine."""


def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between files, frees compiled programs where the process has grown large; the disk cache has them still."""
    if nextitem is None or nextitem.path == item.path or not sys.platform.startswith("linux"):
        return
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    if pages * os.sysconf("SC_PAGE_SIZE") > MOST_BYTES:
        import jax

        jax.clear_caches()
        gc.collect()


GOLDEN = Path(__file__).parent / "data" / "golden"


@pytest.fixture
def golden() -> Callable[[str], Path]:
    """`golden("tiny/model")`: the path of a golden file or directory, which must exist."""

    def path(name: str) -> Path:
        found = GOLDEN / name
        assert found.exists(), f"{found} is missing"
        return found

    return path


# ---- the command line ----


@pytest.fixture(scope="session")
def tiny() -> str:
    """The directory of a small golden checkpoint."""
    return str(GOLDEN / "tiny" / "model")


@pytest.fixture
def dsv32(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, str, str]]:
    """Runs `dsv32 ARGUMENTS`: (exit code, standard output, standard error), without progress, however slow it is."""
    from dsv32_jax.cli import main
    from dsv32_jax.common import progress

    monkeypatch.setattr(progress, "FIRST_SECONDS", 3600.0)

    def run(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as exit:
            main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err  # type: ignore[return-value]

    return run


@pytest.fixture
def refused(dsv32: Callable[..., tuple[int, str, str]]) -> Callable[..., str]:
    """Runs a command that must fail with one line on standard error, and returns that line."""

    def run(*arguments: object) -> str:
        code, out, err = dsv32(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("error: ") and err.count("\n") == 1, err
        return err

    return run
