"""What a sanitizer's run means."""

import pytest

from dsv32_jax.experiments.bench.shapes import SMALL
from tests.gpu.sanitize import FOUND, OPS, TOOLS, command, judged, merged

PASSED = "==== 2 passed, 3 deselected in 4.00s ====\n"
BROKEN = "========= Internal Sanitizer Error: The Sanitizer failed to handle a hardware exception.\n"


@pytest.mark.parametrize(
    ("code", "output", "verdict"),
    [
        (0, "========= COMPUTE-SANITIZER\n" + PASSED + "========= ERROR SUMMARY: 0 errors\n", "clean"),
        (0, PASSED + "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)\n", "clean"),
        (FOUND, PASSED + "========= ERROR SUMMARY: 3 errors\n", "found"),
        (0, PASSED + "========= ERROR SUMMARY: 1 error\n", "found"),
        (FOUND, PASSED + "========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)\n", "found"),
        (FOUND, "==== 1 failed in 4.00s ====\n========= ERROR SUMMARY: 5 errors\n", "found"),
        (1, "==== 1 failed, 1 passed in 4.00s ====\n========= ERROR SUMMARY: 0 errors\n", "tests failed"),
        (FOUND, BROKEN + "==== 1 failed in 4.00s ====\n= RACECHECK SUMMARY: 1 hazard displayed (1 error)", "not run"),
        (5, "==== 9 deselected in 0.10s ====\n========= ERROR SUMMARY: 0 errors\n", "not run"),
        (0, "==== 2 skipped in 0.10s ====\n========= ERROR SUMMARY: 0 errors\n", "not run"),
        (1, "========= Error: Device not supported\n", "not run"),
        (127, "compute-sanitizer is not on the PATH", "not run"),
        (None, PASSED + "========= ERROR SUMMARY: 0 errors\n", "not run"),
        (0, "", "not run"),
    ],
)
def test_verdicts(code, output, verdict):
    result = judged("memcheck", code, output)
    assert (result["verdict"], result["exit_code"]) == (verdict, code) and result["summary"]


def test_a_run_that_does_not_count_says_why():
    assert judged("memcheck", 1, "x\n========= Error: Device not supported\n")["summary"].endswith("not supported")
    broken = judged("racecheck", FOUND, BROKEN + PASSED + "= RACECHECK SUMMARY: 1 hazard")
    assert broken["summary"].startswith("Internal Sanitizer Error")
    assert judged("memcheck", None, "")["summary"] == "out of time"
    assert judged("memcheck", 0, "2 passed in 4.00s\n= ERROR SUMMARY: 0 errors")["tests"] == "2 passed in 4.00s"


def test_the_tests_of_one_op():
    line = command("top_k", "racecheck")
    assert line[:3] == ["compute-sanitizer", "--tool", "racecheck"] and "tests/gpu/test_small.py" in line
    assert line[line.index("-k") + 1] == "top_k"
    assert set(OPS) == set(SMALL) and len(TOOLS) == 3


def test_other_runs_stay_with_their_date():
    def content(date, device, *runs):
        return {"date": date, "device": device, "runs": [{"op": op, "tool": tool, "n": n} for op, tool, n in runs]}

    before = content("a", "H100", ("top_k", "memcheck", 1), ("top_k", "racecheck", 2))
    now = content("b", "H100", ("quantize", "memcheck", 3), ("top_k", "memcheck", 4))
    found = merged(before, now)["runs"]
    assert [(run["n"], run["date"]) for run in found] == [(4, "b"), (3, "b"), (2, "a")]
    assert [run["n"] for run in merged({**before, "device": "H200"}, now)["runs"]] == [4, 3]
    assert [run["n"] for run in merged({}, now)["runs"]] == [4, 3]
