"""The measuring of an ablation's rows, on a small model."""

import json

import jax
import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.experiments.workbench import ablate as module
from dsv32_jax.experiments.workbench.ablate import Measured, ablate
from dsv32_jax.experiments.workbench.ablate_table import finding, lines
from dsv32_jax.experiments.workbench.ablations import Row
from dsv32_jax.experiments.workbench.cost import Work
from dsv32_jax.experiments.workbench.settings import Setting
from dsv32_jax.experiments.workbench.tables import WIDEST
from tests.harness import TEXT


def test_a_part_of_ones_own_is_a_row_like_any_other(dsv32, small, monkeypatch, tmp_path):
    monkeypatch.setattr("dsv32_jax.experiments.workbench.models.model_named", lambda name, mtp: small)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_own.py").write_text("from dsv32_jax.model.variants import recent as nearest\n")
    text, out, figure = (tmp_path / name for name in ("text.txt", "out.json", "figure.png"))
    text.write_text(TEXT)
    sizes = ("--context", 64, "--prompt-tokens", 16, "--rounds", 1, "--window", 32, "--windows", 1, "--needles", 0)
    flags = ("--part", "index_select=my_own:nearest", "--text-file", text, "--out", out, "--figure", figure)
    code, stdout, err = dsv32("ablate", *flags, *sizes, "--json")
    assert code == 0, err
    content = json.loads(stdout)
    assert content == json.loads(out.read_text())
    assert figure.read_bytes().startswith(b"\x89PNG")
    original, mine = content["rows"]
    assert (original["name"], original["against"], mine["against"]) == ("as loaded", None, 0)
    assert mine["changes"] == ["parts.index_select"]
    assert mine["runs"]["parts"]["index_select"] == "dsv32_jax.model.variants:recent"
    assert original["quality"]["kl"] == 0 and original["quality"]["recall"] == 1
    assert mine["quality"]["kl"] > 0 and mine["quality"]["recall"] < 1
    assert all(row["seconds"][phase]["median"] > 0 for row in content["rows"] for phase in ("decode", "prompt"))
    assert mine["memory"]["weights"] == original["memory"]["weights"] > 0
    table = lines(content)
    assert max(map(len, table)) <= WIDEST
    assert sum(line.startswith("1 yours: index_select=my_") for line in table) == 3
    assert any("quality is left out" in line for line in lines({**content, "texts": None}))


def planted(number: int, before: Measured | None, seconds: float, step: bool = False) -> Measured:
    """A row without compiled steps that took so long."""
    times = {"median": seconds, "quartiles": [seconds, seconds]}
    content = {
        "number": number,
        "name": f"row {number}",
        "against": None if before is None else before.content["number"],
        "step": step,
        "seconds": {"decode": times, "prompt": times},
        "speedup": {},
    }
    if before is not None:
        median = before.content["seconds"]["decode"]["median"] / seconds
        content["speedup"]["decode"] = {"median": median, "differs": abs(median - 1) > 0.1}
    return Measured(content, None)  # type: ignore[arg-type]


def test_a_row_that_fails_is_left_out_and_the_next_is_compared_with_the_one_before(small, monkeypatch):
    alive = []

    def measure(self, row, number, before):
        if row.name == "broken":
            raise UserError("does not fit")
        alive.append(before and before.content["number"])
        return planted(number, before, 1 / (number + 1))

    monkeypatch.setattr(module.Bench, "measure", measure)
    monkeypatch.setattr(module.Bench, "alone", lambda self, row: None)
    rows = [Row(name, Setting(), against) for name, against in (("a", None), ("broken", 0), ("c", 1), ("d", 0))]
    content = ablate(small, rows, None, Work(1, 64, 16), mode="cumulative", model="small")
    assert alive == [None, 0, 0]
    assert content["left_out"] == {"broken": "does not fit"}
    assert [row["number"] for row in content["rows"]] == [0, 2, 3]
    assert finding(content, "decode") == "A decode step: the largest change is row 3, 4.00 times as fast"
    yours = [rows[0], Row("broken", Setting(), 0, "yours")]
    with pytest.raises(UserError, match="does not fit"):
        ablate(small, yours, None, Work(1, 64, 16))
    with pytest.raises(UserError, match="does not fit"):  # nothing to compare with
        ablate(small, [Row("broken", Setting(), None), rows[3]], None, Work(1, 64, 16))


def test_a_baseline_without_room_gives_its_place_to_the_next(small, monkeypatch):
    def measure(self, row, number, before):
        if number == 0:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return planted(number, before, 1.0)

    monkeypatch.setattr(module.Bench, "measure", measure)
    monkeypatch.setattr(module.Bench, "alone", lambda self, row: None)
    rows = [Row("baseline", Setting(), None), Row("b", Setting(), 0), Row("c", Setting(), 1)]
    content = ablate(small, rows, None, Work(1, 64, 16))
    assert content["left_out"] == {"baseline": "no room in the device's memory"}
    assert [row["against"] for row in content["rows"]] == [None, 1]


def test_the_finding_multiplies_what_was_measured_side_by_side():
    """Between the two comparisons the machine became half as fast."""
    first = planted(0, None, 4.0)
    second = planted(1, first, 2.0, step=True)
    second.content["seconds"]["decode"] = {"median": 4.0}
    third = planted(2, second, 1.0, step=True)
    rows = [row.content for row in (first, second, third)]
    assert finding({"rows": rows}, "decode") == (
        "A decode step is 8.00 times as fast as the baseline's; the largest share: row 2 (4.00x)"
    )
    slower = [first.content, planted(1, first, 8.0, step=True).content]
    assert "2.00 times as slow as the baseline's" in finding({"rows": slower}, "decode")


def test_changes_within_the_spread_are_no_finding():
    first = planted(0, None, 1.0)
    rows = [first.content, planted(1, first, 1.05).content]
    assert "no change is beyond the spread" in finding({"rows": rows}, "decode")


def test_an_error_that_is_not_the_rows_own_is_passed_on():
    assert module.reason_of(ValueError("?")) is None
    assert module.reason_of(RuntimeError("RESOURCE_EXHAUSTED: out of memory")) == "no room in the device's memory"


def test_the_command_names_what_is_wrong(dsv32, refused, tmp_path):
    assert "--one-at-a-time, --leave-one-out" in refused("ablate", "--one-at-a-time", "--leave-one-out")
    assert "group 'speed' is unknown" in refused("ablate", "speed")
    assert "pipelining: not offered" in refused("ablate", "pipelining")
    assert "--figure: there is no step" in refused("ablate", "prefixes", "--figure", tmp_path / "x.png")
    assert "--figure" in refused("ablate", "--figure", tmp_path)
    assert "needs kernels" in refused("ablate", "layouts")
    assert "--part 'index_selct' is unknown" in refused("ablate", "--part", "index_selct=recent")
    code, listed, _ = dsv32("ablate", "--list")
    assert code == 0 and listed.startswith("attention") and "not offered" in listed
