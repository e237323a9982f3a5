"""Tables and the figure are made from the results, and the committed pages have what the committed results give."""

import json

import pytest

from dsv32_jax.experiments.bench import report

CEILINGS = {"copy": 4.2e12, "bf16": 8e14, "fp8": 1.5e15}


def made(device="GPU X", time="2026-01-01T00:00:00"):
    versions = {"jax": "0.11.2"}
    return {
        "time": time,
        "device": device,
        "date": "2026-01-01",
        "versions": versions,
        "timer": "device clock",
        "roofline": {"ceilings": CEILINGS},
    }


def row(op="top_k", shape="64x32768", median=1e-3, **fields):
    return {
        "run": "2026-01-01T00:00:00",
        "op": op,
        "shape": shape,
        "dims": {"tokens": 64, "kind": "prefill"},
        "seconds": {"median": median, "min": 0.9 * median, "max": 1.1 * median},
        "tflops": 620.4,
        "gbytes_per_second": 1234.5,
        "roofline": {"bound": "compute", "fraction": 0.81, "seconds": 0.81 * median},
        "backend": "mosaic_gpu",
        "memory": {"temporary": 10**9, "output": 5 * 10**8},
        "peer": {"name": "P", "rows": ["P: a call, a shape"], "seconds": 2 * median, "ratio": 2.0},
        "reference": reference(median * 10, median),
        "target": {"floor": 1.8, "goal": 3.0, "of": "peer"},
        **fields,
    }


def reference(seconds, median, tokens=64, measured=None):
    return {
        "name": "plain",
        "measured_tokens": tokens,
        "measured_seconds": seconds if measured is None else measured,
        "seconds_scaled_to_shape": seconds,
        "ratio": seconds / median,
        "memory": {"temporary": 0, "output": 2 * 10**9},
    }


def content(*rows, runs=None):
    return {"runs": runs or [made()], "rows": list(rows)}


def test_cells():
    assert report.cells(row()) == [
        "64x32768", "1 ms", "900 us to 1.1 ms", "620", "1234", "81% (compute)", "1.5 GB", "10.0x",
        "2.00x (P)", "1.8 / 3: floor",
    ]  # fmt: skip
    bare = report.cells(row(tflops=None, roofline=None, peer=None, backend="reference"))
    assert bare[0] == "64x32768 (reference)" and bare[3] == bare[5] == bare[8] == ""
    scaled = row(reference=reference(1e-2, 1e-3, tokens=256, measured=1e-4))
    assert report.cells(scaled)[7] == "10.0x, 256 tokens scaled"
    assert report.cells(row(reference={"error": "x"}))[7] == "did not run"
    failed = {"op": "top_k", "shape": "64x32768", "error": "MemoryError: no"}
    assert report.cells(failed)[:2] == ["64x32768", "failed: MemoryError: no"]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ({"floor": 1.8, "goal": 2.0, "of": "peer"}, "1.8 / 2: goal"),
        ({"floor": 2.1, "goal": 3.0, "of": "peer"}, "2.1 / 3: missed"),
        ({"floor": 0.6, "goal": 0.85, "of": "roofline"}, "0.6 / 0.85: floor"),
        ({"floor": 5, "goal": 10, "of": "reference"}, "5 / 10 of the reference: goal"),
        ({"floor": 5, "goal": 11, "of": "reference"}, "5 / 11 of the reference: floor"),
        ({"floor": 1.8, "goal": 3.0, "of": "peer", "enough": 0.8}, "1.8 / 3 or 80%: goal"),
        ({"floor": 1.8, "goal": 3.0, "of": "peer", "enough": 0.95}, "1.8 / 3 or 95%: floor"),
        ({"floor": 5, "goal": 10, "of": "reference", "within": 1e-3}, "5 / 10 of the reference and 1 ms: goal"),
        ({"floor": 5, "goal": 10, "of": "reference", "within": 9e-4}, "5 / 10 of the reference and 900 us: floor"),
    ],
)
def test_verdict(target, expected):
    assert report.verdict(row(target=target)) == expected


def test_a_target_without_its_peer_is_not_reached():
    assert report.verdict(row(peer=None)) == "1.8 / 3: not measured"
    target = {"floor": 5, "goal": 10, "of": "reference"}
    for missing in ({"error": "x"}, None):
        assert report.verdict(row(reference=missing, target=target)) == "5 / 10 of the reference: not measured"


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (2.0, "2 s"),
        (0.0123, "12.3 ms"),
        (3.849e-3, "3.85 ms"),
        (2.24e-5, "22.4 us"),
        (4e-7, "0.4 us"),
        (9.994e-4, "999 us"),
        (9.999e-4, "1 ms"),
        (1234.0, "1234 s"),
    ],
)
def test_duration(seconds, shown):
    assert report.duration(seconds) == shown


def test_a_page_gets_its_tables_and_keeps_the_rest():
    page = (
        "# top_k\n\n<!-- bench:top_k -->\nold\n<!-- /bench -->\n\nprose\n\n<!-- bench:sparse_mla -->\n<!-- /bench -->\n"
    )
    new = report.with_tables(page, content(row()))
    assert new == (
        "# top_k\n\n<!-- bench:top_k -->\n"
        "GPU X; 2026-01-01, jax 0.11.2; device clock; copy 4.2 TB/s, bf16 800 TFLOP/s, FP8 1500 TFLOP/s.\n\n"
        "| shape | time | spread | TFLOP/s | GB/s | roofline | memory | reference | peer | target |\n"
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |\n"
        "| 64x32768 | 1 ms | 900 us to 1.1 ms | 620 | 1234 | 81% (compute) | 1.5 GB | 10.0x | 2.00x (P) "
        "| 1.8 / 3: floor |\n"
        "<!-- /bench -->\n\nprose\n\n<!-- bench:sparse_mla -->\nNot measured yet.\n<!-- /bench -->\n"
    )
    assert report.with_tables(new, content(row())) == new


def test_each_device_has_a_table_of_its_own():
    other = "2026-01-02T00:00:00"
    table = report.markdown(content(row(), row(run=other), runs=[made(), made("GPU Y", other)]), "top_k")
    assert table.count("| shape |") == 2 and table.index("GPU X") < table.index("GPU Y")


def test_an_unknown_marker_is_an_error():
    with pytest.raises(ValueError, match="bench:softmax: no such op"):
        report.with_tables("<!-- bench:softmax -->\n<!-- /bench -->\n", content())


def test_attention_stands_beside_both_dense_ones():
    ours = row("attention", "prefill-32768", median=1e-3, peer=None)
    assert report.attention_cells(ours) == [
        "prefill-32768", "1 ms", "1.5 GB", "plain", "10 ms", "2 GB", "10.00x", "", "", "",
    ]  # fmt: skip
    peered = row("attention", "prefill-32768", reference={"error": "x"})
    assert report.attention_cells(peered)[3:] == ["did not run", "", "", "", "P: a call, a shape", "2 ms", "2.00x"]
    assert report.dense(row(peer=None, reference={"error": "x"})) is None


def test_the_curve_is_drawn_small(tmp_path):
    points = [
        row("attention", f"prefill-{n}", median=n * 1e-6, dims={"tokens": n, "kind": "prefill"})
        for n in (2**i for i in range(10, 18))
    ]
    failed = {**points[0], "error": "x"}
    assert report.curve(content(failed, points[3])) == []  # one point is no curve
    ((device, found),) = report.curve(content(*points))
    assert device == "GPU X" and found[0] == (1024, pytest.approx(1.024e-3), pytest.approx(2.048e-3))
    file = report.draw(content(*points), tmp_path / "curve.png")
    assert 0 < file.stat().st_size < 60_000


def test_committed_pages_have_the_committed_results():
    """`dsv32 bench --report` makes them; a page with a marker needs results."""
    pages = [path for path in sorted(report.PAGES.glob("*.md")) if report.MARKED.search(path.read_text("utf-8"))]
    if not pages:
        return
    assert report.RESULT.exists(), f"{pages[0]} has a table of results that are not there"
    results = json.loads(report.RESULT.read_text("utf-8"))
    assert not any(run["tiny"] for run in results["runs"])
    for path in pages:
        page = path.read_text("utf-8")
        assert report.with_tables(page, results) == page, f"{path}: run `dsv32 bench --report`"


def test_report_writes_pages(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "read_result", lambda name: content(row()))
    (tmp_path / "top_k.md").write_text("<!-- bench:top_k -->\n<!-- /bench -->\n")
    (tmp_path / "plain.md").write_text("no table\n")
    assert report.write_pages(tmp_path) == [tmp_path / "top_k.md"]
    assert "GPU X" in (tmp_path / "top_k.md").read_text() and (tmp_path / "plain.md").read_text() == "no table\n"
