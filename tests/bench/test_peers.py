"""Joining with other libraries' times."""

import json

import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.bench import targets
from dsv32_jax.experiments.bench.peers import EMPTY, Peers
from dsv32_jax.experiments.bench.targets import PeerRow
from dsv32_jax.experiments.bench.timer import FLUSH
from pallas_kernels.top_k.shapes import TopK

LOGITS, FAST, SLOW = PeerRow("A", "logits", "T=4"), PeerRow("B", "topk", "T=4"), PeerRow("C", "topk", "T=4")


def peers_file(path, rows, device="GPU X", flush=FLUSH):
    path.write_text(json.dumps({"device": device, "flush": flush, "rows": rows}))
    return path


def as_row(key, **fields):
    return {"peer": key.peer, "op": key.op, "shape": key.shape, **fields}


@pytest.fixture
def shape(monkeypatch):
    """A shape that stands beside these alternatives."""

    def beside(*alternatives):
        monkeypatch.setitem(targets.PEERS, ("top_k", "x"), alternatives)
        return TopK(name="x", tokens=4, context=256)

    return beside


def test_rows_of_one_alternative_add_up_and_the_fastest_alternative_counts(tmp_path, shape):
    rows = [as_row(LOGITS, seconds=2.0), as_row(FAST, seconds=1.0), as_row(SLOW, seconds=1.5)]
    peers = Peers.read([peers_file(tmp_path / "p.json", rows)], "GPU X")
    found = peers.join(shape((LOGITS, SLOW), (LOGITS, FAST)))
    assert found == {"name": "A + B", "rows": ["A: logits, T=4", "B: topk, T=4"], "seconds": 3.0}


def test_an_alternative_counts_only_whole(tmp_path, shape):
    rows = [as_row(FAST, seconds=1.0), as_row(LOGITS, error="no kernel"), as_row(SLOW, seconds=1.5)]
    peers = Peers.read([peers_file(tmp_path / "p.json", rows)], "GPU X")
    assert peers.join(shape((LOGITS, FAST))) is None
    assert peers.join(shape((LOGITS, FAST), (SLOW,)))["seconds"] == 1.5
    assert peers.join(shape()) is None


def test_each_timer_s_own_empty_call_is_taken_off(tmp_path, shape):
    rows = [as_row(LOGITS, seconds=2.0), as_row(FAST, seconds=1.0)]
    both = shape((LOGITS, FAST))
    plain = Peers.read([peers_file(tmp_path / "plain.json", rows)], "GPU X")
    assert plain.ratio(plain.join(both), 1.5, empty=0.5) == {"ratio": 2.0, "net": False}
    known = Peers.read([peers_file(tmp_path / "known.json", [*rows, as_row(EMPTY, seconds=0.25)])], "GPU X")
    assert known.ratio(known.join(both), 1.5, empty=0.5) == {"ratio": 2.5, "net": True}


def test_another_device_or_way_to_empty_l2_is_not_compared(tmp_path):
    files = [
        peers_file(tmp_path / "here.json", [as_row(FAST, seconds=1.0)]),
        peers_file(tmp_path / "there.json", [as_row(SLOW, seconds=0.5)], device="GPU Y"),
        peers_file(tmp_path / "written.json", [as_row(SLOW, seconds=0.5)], flush="write"),
        peers_file(tmp_path / "unknown.json", [as_row(SLOW, seconds=0.5)], flush=None),
    ]
    peers = Peers.read(files, "GPU X")
    assert (peers.seconds(FAST), peers.seconds(SLOW)) == (1.0, None)
    assert [file["name"] for file in peers.files if file["used"]] == ["here.json"] and len(peers.files) == 4


def test_several_files_are_one_table(tmp_path, shape):
    files = [
        peers_file(tmp_path / "a.json", [as_row(LOGITS, seconds=2.0), as_row(FAST, seconds=9.0)]),
        peers_file(tmp_path / "b.json", [as_row(FAST, seconds=1.0), {"peer": "B", "error": "gone"}]),
    ]
    assert Peers.read(files, "GPU X").join(shape((LOGITS, FAST)))["seconds"] == 3.0


@pytest.mark.parametrize("text", ["", "[]", '{"device": "GPU X"}', '{"rows": [{"op": 1}]}'])
def test_what_is_no_peers_file(tmp_path, text):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"p\.json"):
        Peers.read([path], "GPU X")
    with pytest.raises(UserError, match="cannot be read"):
        Peers.read([tmp_path / "absent.json"], "GPU X")
