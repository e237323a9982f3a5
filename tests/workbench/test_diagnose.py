"""Where a step's time goes, and what is said of it."""

import collections
import json
import re

import jax
import jax.numpy as jnp
import pytest

from dsv32_jax import cli
from dsv32_jax.config import ModelConfig
from dsv32_jax.errors import UserError
from dsv32_jax.experiments.workbench import diagnose as module
from dsv32_jax.experiments.workbench.diagnose import diagnose, rows_of_parts, verdict_of
from dsv32_jax.experiments.workbench.diagnose_report import check_figure, draw, lines_of
from dsv32_jax.experiments.workbench.least_work import LeastWork
from dsv32_jax.experiments.workbench.profile import Event, Profile
from dsv32_jax.experiments.workbench.random_model import random_model
from dsv32_jax.experiments.workbench.scopes import PARTS
from dsv32_jax.experiments.workbench.steps import StepShape
from pallas_kernels.top_k import top_k

CEILINGS = {"copy": 1e9, "bf16": 1e12}
CONFIG = ModelConfig.tiny(num_hidden_layers=2, first_k_dense_replace=1, num_nextn_predict_layers=0)


def profile(*times, end=100.0, calls=1):
    """A profile of operations (name, start, end), in nanoseconds."""
    events = [Event(name, "jit_f", "s", start, stop) for name, start, stop in times]
    return Profile(events, 0.0, end, end * 1e-9, calls)


def test_parts_and_waiting_are_the_profiled_step():
    row = rows_of_parts({"experts": 60, "top-k": 20}, profile(("a", 0, 60), ("b", 70, 90), calls=2), {}, CEILINGS)
    assert row["profiled"]["seconds"] == pytest.approx(50e-9)
    assert [(part["part"], part["share"]) for part in row["parts"]] == [
        ("experts", pytest.approx(0.6)),
        ("top-k", pytest.approx(0.2)),
    ]
    assert row["waiting"] == {"seconds": pytest.approx(10e-9), "share": pytest.approx(0.2)}
    assert row["difference"]["seconds"] == pytest.approx(0)
    assert row["busy"] == pytest.approx(0.8)


def test_a_step_within_graphs_has_parts_from_another_profile_and_their_difference():
    without, normal = profile(("a", 0, 60), end=200.0), profile(("graph", 0, 50), end=70.0)
    row = rows_of_parts({"experts": 60}, without, {}, CEILINGS, (normal, 62.5e-9))
    assert row["profiled"]["seconds"] == pytest.approx(70e-9)
    assert row["profiled"]["without_graphs"] == pytest.approx(200e-9)
    assert row["waiting"]["seconds"] == pytest.approx(20e-9)
    assert row["difference"]["seconds"] == pytest.approx(-10e-9)
    assert row["busy"] == pytest.approx(0.8)  # of the step without the profiler
    total = sum(part["share"] for part in row["parts"]) + row["waiting"]["share"] + row["difference"]["share"]
    assert total == pytest.approx(1)


def test_a_graph_that_the_profile_does_not_show_works_as_long_as_the_parts():
    row = rows_of_parts({"experts": 60}, profile(("a", 0, 60)), {}, CEILINGS, (profile(end=80.0), 80e-9))
    assert row["waiting"]["seconds"] == pytest.approx(20e-9) and row["busy"] == pytest.approx(0.75)


def test_a_part_has_its_bound_and_what_it_is_worth():
    work = {"experts": LeastWork(30, collections.Counter(bf16=1000)), "top-k": LeastWork(5), "head": LeastWork(1)}
    row = rows_of_parts({"experts": 60, "top-k": 20, "routing": 10}, profile(("a", 0, 90)), work, CEILINGS)
    experts, selection, routing = row["parts"]
    assert experts["bound"] == {
        "seconds": pytest.approx(30e-9),
        "by": "memory",
        "of_time": pytest.approx(0.5),
    }
    assert (experts["bytes"], experts["operations"]) == (30, {"bf16": 1000})
    assert experts["gain"] == pytest.approx(0.3) and selection["gain"] == pytest.approx(0.15)
    assert routing["bound"] is None and "gain" not in routing
    assert row["verdict"]["text"] == (
        "experts take 60% of the step at 50% of their bound; largest gain: at their bound the step takes 30% less time"
    )


def part(name, share, of_bound=None):
    if of_bound is None:
        return {"part": name, "seconds": share, "share": share, "bound": None}
    bound = {"seconds": share * of_bound, "by": "memory", "of_time": of_bound}
    return {"part": name, "seconds": share, "share": share, "bound": bound, "gain": share * (1 - of_bound)}


def test_the_verdict_names_the_bottleneck_and_the_largest_gain():
    verdict = verdict_of([part("top-k", 0.12, 0.35), part("experts", 0.41, 0.88), part("head", 0.1)], 0.05)
    assert (verdict["bottleneck"], verdict["largest_gain"]) == ("experts", "top-k")
    assert verdict["text"] == (
        "experts take 41% of the step at 88% of their bound; largest gain: top-k, 12% of the step at 35% of its bound: "
        "at its bound the step takes 8% less time"
    )


def test_a_device_that_waits_is_the_verdict():
    verdict = verdict_of([part("experts", 0.3, 0.5)], 0.6)
    assert (verdict["bottleneck"], verdict["largest_gain"], verdict["gain"]) == ("waiting", "waiting", 0.6)
    assert verdict["text"] == (
        "the device waits for 60% of the step; largest gain: without waiting the step takes 60% less time"
    )


# ---- a step that runs ------------------------------------------------------------------------------------------


@pytest.fixture
def small_ceilings(monkeypatch):
    monkeypatch.setattr(module, "CPU_SIDE", 64)
    monkeypatch.setattr(module, "CPU_BYTES", 2**16)


def slow_top_k(scores, k, *, lengths, backend):
    """The selection after 40 products that nobody needs."""
    x = jnp.full((400, 400), 1e-3)
    x = jax.lax.fori_loop(0, 40, lambda _, x: (x @ x) * 1e-3 + x, x)
    return top_k(scores + 0 * x[0, 0], k, lengths=lengths, backend=backend)


@pytest.mark.parametrize("graphs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_planted_slowdown_is_the_verdict(small_ceilings, monkeypatch, tmp_path, graphs):
    monkeypatch.setattr(module, "runs_graphs", lambda: graphs)
    m = random_model(CONFIG).with_parts(top_k=slow_top_k)
    content = diagnose(m, [StepShape(sequences=2, context=128)], name="tiny")
    (row,) = content["rows"]
    assert (row["verdict"]["bottleneck"], row["verdict"]["largest_gain"]) == ("top-k", "top-k")
    assert content["runs"]["parts"] == {"top_k": f"{__name__}:slow_top_k"}
    # What ran and what did not is the profiled time, and none of it without a part.
    accounted = sum(part["seconds"] for part in row["parts"])
    accounted += row["waiting"]["seconds"] + row["difference"]["seconds"]
    assert (row["profiled"]["without_graphs"] is not None) == graphs
    assert accounted == pytest.approx(row["profiled"]["by_the_hosts_clock"], rel=0.05)
    names = {part["part"] for part in row["parts"]}
    assert {"experts", "projections", "head", "sparse MLA", "indexer scores"} <= names <= set(PARTS) - {"unattributed"}
    assert row["memory"]["needed"] == sum(row["memory"]["purposes"].values())
    assert len(row["experts_used"]) == 1
    assert row["longest"][0]["part"] == "top-k" and row["longest"][0]["times"] >= 1
    json.dumps(content)
    assert any(line.strip().startswith("top-k") for line in lines_of(row))
    pytest.importorskip("matplotlib")
    assert draw(content, tmp_path / "figure.png").stat().st_size > 1000


def test_a_context_that_is_too_long_is_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(module, "measure_ceilings", lambda dtype: pytest.fail("measured"))
    with pytest.raises(UserError, match="context 1344: the model takes at most"):
        diagnose(random_model(CONFIG), [StepShape(context=64), StepShape(context=1344)])


def test_a_step_without_room_leaves_the_others(monkeypatch, small_ceilings):
    def no_room(m, shape, *_):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of memory")

    monkeypatch.setattr(module, "diagnose_step", no_room)
    content = diagnose(random_model(CONFIG), [StepShape(context=64)])
    assert content["rows"][0]["error"].startswith("RESOURCE_EXHAUSTED")
    assert lines_of(content["rows"][0]) == ["decode, 1 sequence of 64 tokens: RESOURCE_EXHAUSTED: out of memory"]


def test_a_figure_must_be_a_png_in_a_folder(tmp_path):
    with pytest.raises(UserError, match=r"must end in \.png"):
        check_figure(tmp_path / "a.pdf")
    with pytest.raises(UserError, match="cannot be written"):
        check_figure(tmp_path / "none" / "a.png")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--context", "1k,four"), "--context 1k,four: 'four' is no number"),
        (("--batch", "0"), "--batch 0"),
        (("--context", "100"), "context 100: must be a multiple of 64"),
        (("--phase", "train"), "--phase 'train' is unknown"),
        (("--model", "full-width"), "must be full-width:N"),
        (("--part", "topk=recent"), "part 'topk' is unknown"),
        (("--set", "topk=1"), "--set topk=1: there is no field"),
        (("--figure", "a.svg"), r"must end in \.png"),
        (("--out", "."), "--out .: is a directory"),
    ],
)
def test_wrong_flags_are_named(capsys, flags, message):
    with pytest.raises(SystemExit) as end:
        cli.main(["diagnose", *flags])
    assert end.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(message, error)


@pytest.mark.slow
def test_the_command_writes_what_it_prints(capsys, tmp_path, small_ceilings):
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit) as end:
        cli.main(["diagnose", "--context", "64", "--batch", "1", "--phase", "decode", "--json", "--out", str(out)])
    assert not end.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed == json.loads(out.read_text())
    assert printed["model"] == "demo" and printed["rows"][0]["shape"]["context"] == 64
