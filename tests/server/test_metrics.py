"""/metrics and the file of --metrics-log have the engine's summary."""

import json

import pytest
from prometheus_client.parser import text_string_to_metric_families

from dsv32_jax.errors import UserError
from dsv32_jax.server import metrics_log, prometheus
from tests.server.harness import COMPLETION, client, wait


def parsed(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Values by name and labels."""
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    values = {(sample.name, tuple(sample.labels.items())): sample.value for sample in samples}
    assert len(values) == len(samples) and all(name.startswith("dsv32_") for name, _ in values)
    return values


def test_metrics_are_the_engines_summary(engine):
    with client(engine) as server:
        server.post("/v1/completions", json=COMPLETION | {"n": 2, "prompt": [5] * 70})
        server.post("/v1/completions", json=COMPLETION | {"prompt": [5] * 70})
        server.get("/nowhere")
        response = server.get("/metrics")
        assert response.headers["content-type"] == prometheus.CONTENT_TYPE
        values, summary = parsed(response.text), engine.summary()
    for key in ("generated_tokens", "prompt_tokens", "cached_tokens", "steps", "step_tokens", "preemptions"):
        assert values[f"dsv32_{key}_total", ()] == summary[key], key
    assert summary["generated_tokens"] >= 24 and summary["cached_tokens"] >= 64
    for name, key in (
        ("time_to_first_token", "first_token_seconds"),
        ("time_per_output_token", "between_tokens_seconds"),
        ("queue_time", "queued_seconds"),
    ):
        for quantile, percentile in (("0.5", "p50"), ("0.9", "p90"), ("0.99", "p99")):
            assert values[f"dsv32_{name}_seconds", (("quantile", quantile),)] == summary[key][percentile]
        for field in ("count", "sum"):
            assert values[f"dsv32_{name}_seconds_{field}", ()] == summary[key][field]
    counts = [summary[key]["count"] for key in ("first_token_seconds", "between_tokens_seconds")]
    assert sum(counts) == summary["generated_tokens"] and counts[0] >= 3
    assert values["dsv32_completions_finished_total", (("reason", "length"),)] == summary["finished"]["length"]
    for state in ("in_use", "cached", "free"):
        assert values["dsv32_cache_blocks", (("state", state),)] == summary["cache"][state]
    assert values["dsv32_cache_tokens_found_total", ()] == summary["cache"]["tokens_found"]
    assert values["dsv32_sequences_running", ()] == values["dsv32_sequences_waiting", ()] == 0
    assert values["dsv32_ready", ()] == 1 and values["dsv32_failed_steps_total", ()] == 0
    assert values["dsv32_http_responses_total", (("status", "200"),)] == 2
    assert values["dsv32_http_responses_total", (("status", "404"),)] == 1


def test_every_count_of_the_summary_is_there(engine):
    """A number that is added to `Metrics.summary` must be exported, or be listed as following from others."""
    derived = {"generated_tokens_per_second", "acceptance_rate", "finished", "cache"}
    known = {*prometheus.COUNTERS, *prometheus.GAUGES, *prometheus.LATENCIES, *derived}
    assert set(engine.summary()) <= known


def test_an_engine_that_has_done_nothing(engine, monkeypatch):
    summary = engine.summary() | {"first_token_seconds": None, "finished": {}}
    values = parsed(
        prometheus.text(prometheus.EngineCollector(summary, ready=False, failed_steps=3, statuses={})).decode()
    )
    assert values["dsv32_ready", ()] == 0 and values["dsv32_failed_steps_total", ()] == 3
    assert ("dsv32_time_to_first_token_seconds", (("quantile", "0.5"),)) not in values
    assert values["dsv32_time_to_first_token_seconds_count", ()] == 0


def test_the_metrics_log(engine, tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"older": true}\n')
    with client(engine, metrics_log=path, metrics_interval=0.01) as server:
        server.post("/v1/completions", json=COMPLETION)
        wait(lambda: path.read_text().count("\n") >= 4)
        after = engine.summary()["generated_tokens"]
    older, first, *_, last = map(json.loads, path.read_text().splitlines())
    assert older == {"older": True} and set(first) == {"time", *engine.summary()}
    assert last["generated_tokens"] == after >= first["generated_tokens"] and last["time"] >= first["time"]


def test_a_metrics_log_that_can_not_be_written_any_more(engine, tmp_path, caplog):
    with client(engine, metrics_log=tmp_path, metrics_interval=0.01) as server:
        wait(lambda: "a line of metrics is lost: Is a directory" in caplog.text)
        assert server.post("/v1/completions", json=COMPLETION).status_code == 200
    with pytest.raises(UserError, match=r"--metrics-log .*: cannot be written: Is a directory"):
        metrics_log.check_writable(tmp_path)
