"""`tests/gpu/test_small.py` under compute-sanitizer: `python -m tests.gpu.sanitize [OP]... [--tool TOOL]...`.

What each tool said, or why it could not run, is in `experiments/results/sanitizer.json` after each run; what it says of
other ops and tools stays. The exit code is 1 if a tool found something or a test failed, and 2 if a tool did not run.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent
OPS = (
    *("sparse_mla", "indexer_logits", "top_k", "index_select", "cache_write"),
    *("grouped_matmul", "matmul", "quantize", "moe_dispatch", "moe_layer"),
)
TOOLS = ("memcheck", "synccheck", "racecheck")
FOUND = 77
"""Exit code of the sanitizer when it found something, whatever pytest's own."""
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: .*")
SAID = re.compile(r"^=========[ \t]+((?!COMPUTE-SANITIZER|Host Frame|\w+ SUMMARY)\S.*)$", re.MULTILINE)
"""What the tool says of a finding, without the host's stack."""
BROKEN = "Internal Sanitizer Error"
"""The tool's own failure, which it counts as a finding: racecheck does not follow asynchronous copies of Hopper."""
COUNTS = re.compile(r"\b(\d+) (?:error|hazard|warning)")
TESTS = re.compile(r"^=*\s*(\d+ (?:passed|failed|skipped|deselected|error).*?)\s*=*$", re.MULTILINE)
"""pytest's last line."""


def command(op: str, tool: str) -> list[str]:
    """The tests of an op under a tool, which looks at our kernels and at none of XLA's."""
    sanitizer = ["compute-sanitizer", "--tool", tool, "--error-exitcode", str(FOUND), "--print-limit", "20"]
    sanitizer += ["--kernel-name", "kns=mosaic_gpu"]
    tests = [sys.executable, "-m", "pytest", "tests/gpu/test_small.py", "-k", op, "-q", "-p", "no:cacheprovider"]
    # The compilers that JAX starts are not looked at: threads and forks under the sanitizer have hung.
    return [*sanitizer, "--target-processes", "application-only", *tests]


def judged(tool: str, code: int | None, output: str) -> dict[str, Any]:
    """What a run says.

    Args:
      tool: which.
      code: its exit code; None if it ran out of time.
      output: its standard output and error.

    Returns:
      `verdict`: "clean", "found", "tests failed" or "not run"; `summary`: the tool's own line, or why it did not run;
      `findings`: the first things that it said; `tests`: pytest's last line.
    """
    summaries = SUMMARY.findall(output)
    tests = TESTS.findall(output)
    said = [line for line in output.splitlines() if line.strip()]
    result: dict[str, Any] = {"tool": tool, "exit_code": code, "tests": tests[-1] if tests else None}
    result["findings"] = [line.strip()[:300] for line in SAID.findall(output)[:12]]
    if code is None:
        return {**result, "verdict": "not run", "summary": "out of time"}
    if not summaries or not tests or not re.search("passed|failed", tests[-1]):
        return {**result, "verdict": "not run", "summary": said[-1][:300] if said else "no output"}
    if broken := [line for line in result["findings"] if BROKEN in line]:
        return {**result, "verdict": "not run", "summary": broken[0]}
    summary = summaries[-1].strip()
    if code == FOUND or any(int(number) for line in summaries for number in COUNTS.findall(line)):
        return {**result, "verdict": "found", "summary": summary}
    return {**result, "verdict": "clean" if code == 0 else "tests failed", "summary": summary}


def sanitized(op: str, tool: str, seconds: float) -> dict[str, Any]:
    """One op under one tool."""
    # The sanitizer keeps its own memory on the device beside JAX's.
    environment = {**os.environ, "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    start = time.monotonic()
    try:
        process = subprocess.Popen(
            command(op, tool),
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
    except FileNotFoundError:
        return {"op": op, **judged(tool, 127, "compute-sanitizer is not on the PATH"), "seconds": 0.0}
    code: int | None
    try:
        output, _ = process.communicate(timeout=seconds)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # pytest too, which would keep the device
        output, _ = process.communicate()
        code = None
    if code != 0:
        print(output[-3000:], flush=True)
    return {"op": op, **judged(tool, code, output), "seconds": round(time.monotonic() - start, 1)}


def merged(before: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """The content of `now` with those runs of another file's content that it does not have; each run has its date."""

    def dated(content: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
        return {(run["op"], run["tool"]): {"date": content["date"], **run} for run in content["runs"]}

    runs = dated(before) | dated(now) if before.get("device") == now["device"] else dated(now)
    order = [(op, tool) for tool in TOOLS for op in OPS]
    return {**now, "runs": [runs[pair] for pair in order if pair in runs]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"default: {', '.join(OPS)}")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="default: all three; may be repeated")
    parser.add_argument("--seconds", type=float, default=120, help="for each op and tool")
    parser.add_argument("--jobs", type=int, default=1, help="how many at once")
    parser.add_argument("--out", type=Path, default=ROOT / "experiments" / "results" / "sanitizer.json")
    arguments = parser.parse_args()
    if set(arguments.ops) - set(OPS):
        parser.error(f"ops are {', '.join(OPS)}")
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"  # this process only asks JAX for the device's name
    from dsv32_jax.experiments.results import environment, write_json

    version = None
    if path := shutil.which("compute-sanitizer"):
        shown = subprocess.run([path, "--version"], capture_output=True, text=True).stdout
        version = next((line for line in shown.splitlines() if line.startswith("Version")), None)
    before = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.exists() else {}
    content: dict[str, Any] = {**environment(), "compute_sanitizer": version, "runs": []}
    pairs = [(op, tool) for tool in arguments.tool or TOOLS for op in arguments.ops or OPS]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        runs = [pool.submit(sanitized, op, tool, arguments.seconds) for op, tool in pairs]
        for (op, tool), run in zip(pairs, runs, strict=True):
            result = run.result()
            content["runs"].append(result)
            write_json(arguments.out, merged(before, content))
            print(
                f"{tool:<10} {op:<15} {result['verdict']:<12} {result['seconds']:>6} s  {result['summary']}", flush=True
            )
    verdicts = {result["verdict"] for result in content["runs"]}
    sys.exit(1 if verdicts & {"found", "tests failed"} else 2 if "not run" in verdicts else 0)


if __name__ == "__main__":
    main()
