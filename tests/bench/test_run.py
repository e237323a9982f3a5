"""`dsv32 bench`, in process, with tiny shapes on the reference."""

import json

import jax
import pytest

from dsv32_jax.cli import main
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.bench import cases, run, targets
from dsv32_jax.experiments.bench.shapes import SHAPES, SMALL, TINY
from dsv32_jax.experiments.bench.targets import PeerRow
from dsv32_jax.experiments.bench.timer import FLUSH
from dsv32_jax.experiments.results import environment
from pallas_kernels import backend as kernels_backend

DEVICE = environment()["device"]
REFERENCES = [shape for shapes in SMALL.values() for shape in shapes if shape.op != "moe_layer"]


@pytest.fixture
def dsv32(capsys):
    """Runs `dsv32 bench ARGUMENTS`: (exit code, standard output, standard error)."""

    def command(*arguments):
        with pytest.raises(SystemExit) as exit:
            main(["bench", *[str(argument) for argument in arguments]])
        captured = capsys.readouterr()
        return exit.value.code or 0, captured.out, captured.err

    return command


@pytest.fixture(autouse=True)
def quick_roofline(monkeypatch):
    """The ceilings are tested elsewhere."""
    ceilings = {"copy": 1e12, "bf16": 1e14, "fp8": None}
    found = {"ceilings": ceilings, "methods": {}, "timer_check": {}, "empty_call_seconds": 0.0}
    monkeypatch.setattr(run.roofline, "measure", lambda *_: found)


@pytest.fixture
def peered(monkeypatch):
    """A tiny shape with a peer and a target."""
    (shape,) = TINY["top_k"]
    monkeypatch.setitem(targets.PEERS, ("top_k", shape.name), ((PeerRow("P", "topk", "tiny"),),))
    monkeypatch.setitem(targets.TARGETS, ("top_k", shape.name), targets.TARGETS["top_k", "1x131072"])
    return shape


def peers_file(path, device, seconds=1.0):
    row = {"peer": "P", "op": "topk", "shape": "tiny", "seconds": seconds}
    path.write_text(json.dumps({"device": device, "flush": FLUSH, "rows": [row]}))
    return path


def test_help_has_an_example(dsv32):
    code, out, _ = dsv32("--help")
    assert code == 0 and "Example: dsv32 bench" in out


def test_list(dsv32):
    code, out, _ = dsv32("--list")
    assert code == 0 and len(out.splitlines()) == sum(map(len, SHAPES.values()))
    assert "top_k           64x131072              tokens=64 context=131072 chosen=2048" in out
    code, out, _ = dsv32("--list", "--quick", "cache_write")
    assert [line.split()[1] for line in out.splitlines()] == ["65536"]


def test_a_row_and_its_run(dsv32, tmp_path, peered):
    out = tmp_path / "results.json"
    peers = peers_file(tmp_path / "peers.json", DEVICE)
    code, printed, err = dsv32("top_k", "--tiny", "--out", out, "--peers", peers, "--repetitions", 4)
    assert code == 0, err
    content = json.loads(out.read_text())
    (made,), (row,) = content["runs"], content["rows"]
    assert (made["tiny"], made["timer"], made["device"]) == (True, "host clock", DEVICE)
    assert (
        made["peers"] == [{"name": "peers.json", "device": DEVICE, "flush": FLUSH, "used": True}]
        and made["versions"]["jax"]
    )
    assert (row["op"], row["shape"], row["run"], row["backend"]) == ("top_k", "tiny", made["time"], "reference")
    assert row["dims"] == {"tokens": 3, "context": 256, "chosen": 16} and row["target"]["goal"] == 3.0
    times = row["seconds"]
    assert times["min"] <= times["quartiles"][0] <= times["median"] <= times["quartiles"][1] <= times["max"]
    assert 3 <= times["repetitions"] <= 4
    assert row["gbytes_per_second"] == pytest.approx(row["bytes"] / times["median"] / 1e9)
    assert row["tflops"] is None and row["config"] is None
    assert row["roofline"]["bound"] == "memory"
    assert row["roofline"]["fraction"] == pytest.approx(row["bytes"] / 1e12 / times["median"])
    assert row["peer"]["ratio"] == pytest.approx(1.0 / times["median"])
    reference = row["reference"]
    assert reference["ratio"] == pytest.approx(reference["measured_seconds"] / times["median"])
    assert reference["measured_tokens"] == 3 and reference["name"] == "lax.top_k"
    assert "top_k" in printed and "P" in printed


def test_no_ratio_across_devices(dsv32, tmp_path, peered):
    out = tmp_path / "results.json"
    peers = peers_file(tmp_path / "peers.json", "another GPU")
    code, printed, _ = dsv32("top_k", "--tiny", "--out", out, "--peers", peers, "--quick")
    assert code == 0 and "another GPU" in printed
    (row,) = json.loads(out.read_text())["rows"]
    assert row["peer"] is None and "reference" not in row


def test_a_failure_is_recorded_and_ends_non_zero(dsv32, tmp_path, monkeypatch):
    def out_of_memory(shape, backend):
        raise MemoryError("out of memory\nwhile allocating 99 GB")

    monkeypatch.setitem(cases.BUILDERS, type(TINY["index_select"][0]), out_of_memory)
    out = tmp_path / "results.json"
    code, printed, err = dsv32("index_select", "top_k", "--tiny", "--out", out)
    assert code == 1 and "shapes that failed: 1" in err and "out of memory" in printed
    failed, fine = sorted(json.loads(out.read_text())["rows"], key=lambda row: row["op"])
    assert failed["error"] == "MemoryError: out of memory while allocating 99 GB" and "seconds" not in failed
    assert "error" not in fine


def test_a_reference_that_fails_is_recorded_and_no_more(tmp_path, monkeypatch):
    def no_reference(shape):
        raise MemoryError("too long")

    monkeypatch.setattr(run.cases, "build_reference", no_reference)
    content, failed = run.measure(run.Settings(ops=["top_k"], tiny=True), say=lambda line: None)
    assert failed == 0 and content["rows"][0]["reference"] == {"error": "MemoryError: too long"}


def test_each_row_is_written_at_once(tmp_path, monkeypatch):
    out = tmp_path / "results.json"
    seen = []
    settings = run.Settings(ops=["sparse_mla"], tiny=True, out=out, quick=False)
    monkeypatch.setattr(run, "one", lambda shape, *_: {"op": shape.op, "shape": shape.name, "error": "x"})
    run.measure(settings, say=lambda line: seen.append(len(json.loads(out.read_text())["rows"]) if out.exists() else 0))
    assert seen[-2:] == [1, 2]


def test_a_row_replaces_its_own_older_one_and_no_other(tmp_path):
    def made(time, device):
        return {"time": time, "device": device}

    def row(run_, op, shape, mark):
        return {"run": run_, "op": op, "shape": shape, "mark": mark}

    content = {
        "runs": [made("1", "X"), made("2", "Y"), made("3", "X")],
        "rows": [row("1", "top_k", "1x131072", "old"), row("2", "top_k", "1x131072", "other device")],
    }
    run.place(content, row("3", "top_k", "1x131072", "new"))
    run.place(content, row("3", "sparse_mla", "prefill-4096x8192", "first"))
    assert [found["mark"] for found in content["rows"]] == ["first", "new", "other device"]
    assert [found["time"] for found in content["runs"]] == ["2", "3"]


def test_results_of_another_run_stay(dsv32, tmp_path):
    out = tmp_path / "results.json"
    assert dsv32("top_k", "--tiny", "--quick", "--out", out)[0] == 0  # --quick: no tiny shape has a target
    assert not out.exists()
    assert dsv32("top_k", "--tiny", "--out", out)[0] == 0
    assert dsv32("index_select", "--tiny", "--out", out)[0] == 0
    content = json.loads(out.read_text())
    assert [row["op"] for row in content["rows"]] == ["top_k", "index_select"] and len(content["runs"]) == 2


def test_budget(capsys):
    content, failed = run.measure(run.Settings(ops=["top_k"], tiny=True, budget_seconds=0))
    assert (content["rows"], failed) == ([], 0)
    assert "not begun within 0 s: top_k tiny" in capsys.readouterr().out


def test_wrong_input(dsv32, tmp_path):
    for arguments, named in (
        (("softmax",), "op softmax: unknown"),
        (("top_k", "--shape", "9x9"), "--shape 9x9: unknown; shapes are 1x131072"),
        (("top_k",), "needs a GPU"),
        (("top_k", "--tiny", "--backend", "triton"), "--backend triton: unknown"),
        (("top_k", "--tiny", "--peers", tmp_path / "none.json"), "none.json: cannot be read"),
    ):
        code, out, err = dsv32(*arguments)
        assert (code, out) == (2, "") and named in err and err.count("\n") == 1
    (tmp_path / "other.json").write_text('{"rows": 3}')
    code, _, err = dsv32("top_k", "--tiny", "--out", tmp_path / "other.json")
    assert code == 2 and "other.json: is no results' file of bench" in err


def test_json(dsv32):
    code, out, err = dsv32("top_k", "--tiny", "--json")
    assert code == 0 and [row["op"] for row in json.loads(out)["rows"]] == ["top_k"]
    assert "timer: host clock" in err


def test_a_named_backend_runs_or_fails(dsv32):
    code, out, err = dsv32("top_k", "--tiny", "--backend", "mosaic_gpu")
    assert code == 1 and "failed" in out and "shapes that failed: 1" in err


@pytest.mark.slow
def test_every_tiny_shape(dsv32, tmp_path):
    out = tmp_path / "results.json"
    code, _, err = dsv32("--tiny", "--out", out)
    assert code == 0, err
    rows = json.loads(out.read_text())["rows"]
    assert [(row["op"], row["shape"]) for row in rows] == [(op, shape.name) for op in TINY for shape in TINY[op]]
    assert all("error" not in row["reference"] for row in rows)


def test_wrong_settings_show_before_anything_runs():
    with pytest.raises(UserError, match="unknown"):
        run.chosen_shapes(run.Settings(ops=["top_k"], shape="nothing"))


def test_calls_are_compiled_before_anything_is_measured(monkeypatch):
    """The measurement then compiles references alone, and no call of ours."""
    order = []
    ahead, one = run.compile_ahead, run.one
    shapes = [run.dataclasses.replace(TINY["top_k"][0], name=f"tiny-{n}", tokens=n) for n in (1, 2, 3)]
    monkeypatch.setattr(run, "AHEAD", 2)
    monkeypatch.setattr(run, "chosen_shapes", lambda settings: shapes)
    monkeypatch.setattr(run, "place", lambda content, row: content["rows"].append(row))

    def compiling(batch, backend):
        order.append([shape.name for shape in batch])
        programs = ahead(batch, backend)
        assert [len(found) for found in programs] == [1] * len(batch)
        return programs

    def measuring(shape, settings, timer, peers, ceilings, programs):
        before = list(programs.items())
        row = one(shape, settings, timer, peers, ceilings, programs)
        order.append((shape.name, list(programs.items()) == before))
        return row

    monkeypatch.setattr(run, "compile_ahead", compiling)
    monkeypatch.setattr(run, "one", measuring)
    content, failed = run.measure(run.Settings(ops=["top_k"], tiny=True), say=lambda line: None)
    assert failed == 0 and [row["shape"] for row in content["rows"]] == ["tiny-1", "tiny-2", "tiny-3"]
    assert order == [["tiny-1", "tiny-2"], ("tiny-1", True), ("tiny-2", True), ["tiny-3"], ("tiny-3", True)]


def test_what_cannot_be_compiled_ahead_is_left_to_the_measurement():
    (shape,) = TINY["top_k"]
    assert run.compile_ahead([shape], "mosaic_gpu") == [{}]  # no kernel on this device


def has_kernel(monkeypatch, shape, backend):
    """Whether one is in a call, where kernels would run; it is only traced."""
    found = []

    def traced(f, *arguments, **how):
        found.append("Ref<gmem>" in str(jax.make_jaxpr(f)(*arguments)))
        return cases.Program(None, "", {})

    module = run.module_of(shape)
    monkeypatch.setattr(kernels_backend, "on_hopper", lambda: True)
    monkeypatch.setattr(module, "compile_", traced)
    jax.eval_shape(lambda: (module.build(shape, backend), 0)[1])
    return any(found)


@pytest.mark.parametrize("shape", REFERENCES, ids=[f"{shape.op}-{shape.name}" for shape in REFERENCES])
def test_no_kernel_is_in_a_reference(monkeypatch, shape):
    assert not has_kernel(monkeypatch, shape, "reference")
    assert has_kernel(monkeypatch, shape, "mosaic_gpu")


@pytest.mark.parametrize(
    ("backend", "hopper", "measured"),
    [("auto", True, "mosaic_gpu"), ("auto", False, "reference"), ("reference", True, "reference")],
)
def test_a_measurement_is_of_the_kernel_where_kernels_run(monkeypatch, backend, hopper, measured):
    monkeypatch.setattr(run, "on_hopper", lambda: hopper)
    assert run.measured_backend(backend, TINY["top_k"][0]) == measured
    without = run.dataclasses.replace(TINY["top_k"][0], kernel=False)
    assert run.measured_backend(backend, without) == "reference"
    assert run.measured_backend("mosaic_gpu", without) == "mosaic_gpu"  # a named one runs or fails
