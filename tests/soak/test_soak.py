"""The soak of the server: its accounting, on made-up data; and a short soak of a real server."""

import dataclasses
import json
import random

import pytest

from dsv32_jax.errors import UserError
from dsv32_jax.server import prometheus
from tests.harness import golden_directory
from tests.soak.__main__ import Settings, main, soak
from tests.soak.accounting import (
    DROPPED,
    SAMPLES,
    Answer,
    Expected,
    Ledger,
    Outcome,
    failures,
    gauges,
    judge,
)
from tests.soak.client import Stream, whole
from tests.soak.server import Process
from tests.soak.traffic import KINDS, Question, Sizes, Traffic, questions

DEADLINE = 5.0
ANSWER = Answer(("a", "b"), ("stop", "length"), 9)
GOOD = Outcome("200", 1.0, ANSWER)
TWO = Expected(choices=2)
SIZES = Sizes(context=256, words_per_token=0.3, sequences=4, max_queue=3, max_body_bytes=1000)


def verdict(outcome: Outcome, expected: Expected = TWO) -> str:
    name, reason = judge(outcome, expected, DEADLINE)
    assert bool(reason) == (name == "lost")
    return name


def test_answers():
    assert verdict(GOOD) == "finished"
    assert verdict(GOOD, Expected(choices=2, answer=ANSWER, tokens=9)) == "finished"
    for other in (
        dataclasses.replace(ANSWER, texts=("a", "c")),
        dataclasses.replace(ANSWER, reasons=("stop", "stop")),
        dataclasses.replace(ANSWER, tokens=8),
    ):
        assert verdict(GOOD, Expected(choices=2, answer=other)) == "lost"
    assert verdict(GOOD, Expected(choices=2, tokens=8)) == "lost"
    assert verdict(GOOD, Expected(choices=1)) == "lost"
    for reason in (None, "cancelled", "error"):
        assert verdict(Outcome("200", 1.0, dataclasses.replace(ANSWER, reasons=("stop", reason)))) == "lost"


def test_a_request_that_never_ended():
    assert verdict(Outcome("200", 1.0)) == "lost"  # a stream without its [DONE]
    for status in ("ReadTimeout", "ReadError", "ConnectError", "RemoteProtocolError", "500", "503", "400", "401"):
        assert verdict(Outcome(status, 1.0)) == "lost"
    for code in ("internal_error", "draining", "error"):
        assert verdict(Outcome("200", 1.0, ANSWER, code)) == "lost"


def test_a_deadline_counts_only_when_it_has_come():
    for status in ("504", "200"):  # the latter in a stream
        late, early = (Outcome(status, seconds, None, "deadline_exceeded") for seconds in (5.1, 4.9))
        assert (verdict(late), verdict(early)) == ("expired", "lost")
    assert verdict(Outcome("504", 6.0)) == "lost"


def test_a_full_queue_must_say_when_to_come_again():
    assert verdict(Outcome("429", 0.1, code="queue_full", retry_after="1")) == "refused"
    for header in (None, "", "soon"):
        assert verdict(Outcome("429", 0.1, retry_after=header)) == "lost"
    assert verdict(Outcome("429", 0.1, retry_after="1"), Expected(frozenset({"401"}), queues=False)) == "lost"


def test_refusals_must_be_the_right_ones():
    expected = Expected(frozenset({"413", "ReadError"}))
    assert verdict(Outcome("413", 0.1), expected) == verdict(Outcome("ReadError", 0.1), expected) == "refused"
    for outcome in (Outcome("400", 0.1), GOOD, Outcome("500", 0.1), Outcome("413 malformed", 0.1)):
        assert verdict(outcome, expected) == "lost"


def test_only_who_means_to_may_go_away():
    assert verdict(Outcome(DROPPED, 1.0), Expected(drops=True)) == "dropped"
    assert verdict(Outcome(DROPPED, 1.0), Expected()) == "lost"
    assert verdict(Outcome("500", 1.0), Expected(drops=True)) == "lost"


def test_the_ledger_counts_by_kind_and_status():
    ledger = Ledger(DEADLINE)
    ledger.add("greedy", dataclasses.replace(GOOD, first=0.5), TWO)
    ledger.add("greedy", Outcome("429", 0.1, retry_after="1"), TWO)
    ledger.add("greedy", Outcome("200", 7.0, None, "deadline_exceeded"), TWO)
    ledger.add("seeded", Outcome("500", 0.1, message="it broke"), TWO)
    summary = ledger.summary()
    assert summary["statuses"] == {
        "greedy": {"200": 1, "200 deadline_exceeded": 1, "429": 1},
        "seeded": {"500": 1},
    }
    assert summary["verdicts"] == {"expired": 1, "finished": 1, "lost": 1, "refused": 1}
    assert (summary["requests"], summary["lost"], summary["lost_because"]) == (4, 1, ["seeded: status 500 it broke"])
    assert summary["finished_seconds"]["all"]["p50"] == 1.0 and summary["first_event_seconds"]["p99"] == 0.5
    assert set(summary["finished_seconds"]) == {"all", "greedy"}
    for _ in range(100):
        ledger.add("seeded", Outcome("500", 0.1), TWO)
    assert ledger.lost == 101 and len(ledger.summary()["lost_because"]) < 30


def test_gauges_are_those_of_the_server():
    """Read from what the server's own exporter writes, so that a name that changes is noticed."""
    cache = {"in_use": 3, "cached": 4, "free": 5, "shared": 0, "tokens_asked": 10, "tokens_found": 6, "evictions": 7}
    counts = {name: 20 + number for number, name in enumerate(prometheus.COUNTERS)}
    summary = counts | {"running": 1, "waiting": 2, "seconds": 3.0, "finished": {"stop": 1}}
    summary |= dict.fromkeys(prometheus.LATENCIES) | {"cache": cache | {"internal_fragmentation": 0.5}}
    collector = prometheus.EngineCollector(summary, ready=True, failed_steps=8, statuses={200: 9})
    text = prometheus.text(collector).decode()
    read = gauges(text)
    assert (read.running, read.waiting, read.in_use, read.cached, read.free) == (1, 2, 3, 4, 5)
    assert (read.tokens_asked, read.tokens_found, read.evictions, read.failed_steps) == (10, 6, 7, 8)
    assert (read.preemptions, read.steps) == (counts["preemptions"], counts["steps"])
    assert not read.idle and dataclasses.replace(read, running=0, waiting=0, in_use=0).idle
    earlier = dataclasses.replace(read, preemptions=read.preemptions - 3, tokens_asked=2, tokens_found=2)
    assert read.since(earlier)["preemptions"] == 3 and read.since(earlier)["hit_rate"] == 0.5
    for name in SAMPLES.values():
        without = "\n".join(line for line in text.splitlines() if not line.startswith(f"{name} "))
        with pytest.raises(UserError, match=r"/metrics: .* is missing"):
            gauges(without)
    with pytest.raises(UserError, match="/metrics"):
        gauges("<html>not a metric</html>")


SOUND = {
    "died": False,
    "exit_code": 0,
    "lost": 0,
    "leaked": 0,
    "stuck": 0,
    "failed_steps": 0,
    "verdicts": {"finished": 9},
    "answers_at_the_end": True,
}


def test_failures():
    assert failures(SOUND) == []
    for change, failure in (
        ({"lost": 2}, "2 requests lost"),
        ({"leaked": 1}, "1 blocks leaked"),
        ({"leaked": None}, "the blocks in use at the end are not known"),
        ({"stuck": 3}, "3 sequences still run or wait"),
        ({"failed_steps": 1}, "1 steps failed"),
        ({"died": True, "exit_code": -9}, "the server died, exit code -9"),
        ({"exit_code": 1}, "exit code 1 after SIGTERM"),
        ({"exit_code": None}, "the server did not end after SIGTERM"),
        ({"verdicts": {"refused": 5}}, "no request was answered"),
        ({"answers_at_the_end": False}, "the last request was not answered"),
    ):
        assert failures(SOUND | change) == [failure]


def test_streams_and_whole_answers_are_the_same():
    stream = Stream()
    for event in (
        {"choices": [{"index": 1, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}]},
        {"choices": [{"index": 1, "delta": {"content": "b"}, "finish_reason": "length"}], "usage": None},
        {"choices": [{"index": 0, "delta": {"content": "x"}, "finish_reason": None}]},
        {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]},
        {"choices": [], "usage": {"completion_tokens": 3}},
    ):
        stream.add(json.dumps(event))
    assert stream.answer() is None
    stream.add("[DONE]")
    choices = [
        {"index": 1, "message": {"content": "b"}, "finish_reason": "length"},
        {"index": 0, "message": {"content": "x"}, "finish_reason": "stop"},
    ]
    assert stream.answer() == whole({"choices": choices, "usage": {"completion_tokens": 3}})
    assert stream.answer() == Answer(("x", "b"), ("stop", "length"), 3) and stream.code is None
    stream.add(json.dumps({"error": {"code": "deadline_exceeded", "message": "late"}}))
    assert (stream.code, stream.message) == ("deadline_exceeded", "late")


def test_traffic_has_every_kind_and_only_depends_on_its_seed():
    all_questions = questions(SIZES, random.Random(0))
    assert all_questions == questions(SIZES, random.Random(0)) != questions(SIZES, random.Random(1))
    known = [(question, ANSWER) for question in all_questions]

    def drawn(seed: int) -> list:
        traffic = Traffic(SIZES, known, random.Random(seed))
        return [call for _ in range(400) for call in traffic.draw()]

    calls = drawn(3)
    assert calls == drawn(3) != drawn(4)
    kinds = {call.kind for call in calls}
    assert {kind for kind in KINDS if kind not in ("question", "refused")} <= kinds
    assert {"greedy", "chat, streamed", "wrong key", "oversize", "NaN", "dropped, streamed"} <= kinds
    for call in calls:
        drops, refused = call.expected.drops, bool(call.expected.refusal)
        assert (call.leaves is not None) == drops == call.kind.startswith("dropped")
        assert not (drops and refused) and (call.expected.answer is None) == (
            refused or call.kind.split(",")[0] in ("fresh", "flood", "long", "dropped")
        )
    assert len({call.kind for call in Traffic(SIZES, known, random.Random(0)).refusals()}) > 20


def test_a_salt_and_a_stream_are_in_the_body():
    call = Question("greedy", {"prompt": "a"}).call(ANSWER, stream=True, salt="s")
    body = json.loads(call.content)
    assert body["stream"] and body["cache_salt"] == "s" and call.kind == "greedy, salted, streamed"


def test_a_server_that_does_not_start_shows_its_output():
    with Process(["--max-queue", "0"], "key") as server:
        with pytest.raises(UserError, match=r"ended with exit code 2 before it listened.*max_queue: 0"):
            server.listen(60)
        assert not server.alive


def test_wrong_flags(capsys):
    for flags, message in (
        (["--seconds", "nan"], "--seconds: nan"),
        (["--clients", "0"], "--clients: 0; must be in 1..256"),
        (["--max-queue", "1"], "--max-queue: 1; must be in 2..64"),
        (["--deadline", "-1"], "--deadline: -1.0"),
    ):
        assert main(flags) == 2
        captured = capsys.readouterr()
        assert message in captured.err and captured.err.startswith("error: ") and not captured.out


@pytest.mark.slow
def test_a_soak():
    """Twenty seconds of a tiny model, whose cache is too small for those who run at a time."""
    settings = Settings(
        model=str(golden_directory("tiny") / "model"),
        seconds=20,
        clients=6,
        cache_tokens=256,
        max_queue=4,
        max_sequences=4,
        max_step_tokens=8,
    )
    result = soak(settings, say=lambda _: None)
    assert result["failures"] == [] and result["lost"] == result["leaked"] == 0 and result["exit_code"] == 0
    assert result["under_load"]["preemptions"] and result["under_load"]["evictions"]
    assert result["under_load"]["tokens_found"] and result["verdicts"]["dropped"] and result["verdicts"]["refused"]
    assert any("429" in status for status in result["statuses"].values())
