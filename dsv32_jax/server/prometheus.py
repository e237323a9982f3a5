"""An engine's summary in Prometheus' text format."""

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric, SummaryMetricFamily
from prometheus_client.registry import Collector

__all__ = ["CONTENT_TYPE", "EngineCollector", "text"]

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

COUNTERS = {
    "steps": "Steps of the model.",
    "step_tokens": "Tokens that the steps computed.",
    "prompt_tokens": "Tokens of prompts that have begun.",
    "cached_tokens": "Those of them that were found in the cache.",
    "generated_tokens": "Tokens handed out.",
    "preemptions": "Times that a sequence had to give back its blocks.",
    "drafted_tokens": "Tokens tried by speculation.",
    "accepted_tokens": "Those of them that were right.",
}
GAUGES = {
    "running": ("sequences_running", "Sequences that run now."),
    "waiting": ("sequences_waiting", "Sequences that wait now."),
    "seconds": ("uptime_seconds", "Since the engine was made."),
}
LATENCIES = {
    "queued_seconds": ("queue_time_seconds", "From a request's coming to its first step."),
    "first_token_seconds": ("time_to_first_token_seconds", "From a request's coming to its first token."),
    "between_tokens_seconds": ("time_per_output_token_seconds", "From one token of a completion to the next."),
}
QUANTILES = {"p50": "0.5", "p90": "0.9", "p99": "0.99"}
CACHE_COUNTERS = {
    "tokens_asked": "Tokens of all prompts that the cache was searched for.",
    "tokens_found": "Those of them that it had.",
    "evictions": "Cached blocks given up for memory.",
}


class EngineCollector(Collector):
    """The metrics of a summary; all names begin with dsv32_.

    Args:
      summary: of `Engine.summary`.
      ready: whether the server takes requests.
      failed_steps: steps that ended with an exception.
      statuses: answers so far, by HTTP status.
    """

    def __init__(
        self, summary: Mapping[str, Any], *, ready: bool, failed_steps: int, statuses: Mapping[int, int]
    ) -> None:
        self.summary, self.ready, self.failed_steps, self.statuses = summary, ready, failed_steps, statuses

    def collect(self) -> Iterator[Metric]:
        cache = self.summary["cache"]
        for key, description in COUNTERS.items():
            yield CounterMetricFamily(f"dsv32_{key}", description, value=self.summary[key])
        for key, description in CACHE_COUNTERS.items():
            yield CounterMetricFamily(f"dsv32_cache_{key}", description, value=cache[key])
        yield CounterMetricFamily("dsv32_failed_steps", "Steps that ended with an error.", value=self.failed_steps)
        finished = CounterMetricFamily("dsv32_completions_finished", "Completions that ended.", labels=["reason"])
        for reason, count in self.summary["finished"].items():
            finished.add_metric([reason], count)
        yield finished
        answers = CounterMetricFamily("dsv32_http_responses", "Answers, by status.", labels=["status"])
        for status, count in sorted(self.statuses.items()):
            answers.add_metric([str(status)], count)
        yield answers
        for key, (name, description) in GAUGES.items():
            yield GaugeMetricFamily(f"dsv32_{name}", description, value=self.summary[key])
        yield GaugeMetricFamily("dsv32_ready", "1: takes requests.", value=int(self.ready))
        blocks = GaugeMetricFamily("dsv32_cache_blocks", "Blocks of the cache now, of 64 tokens.", labels=["state"])
        for state in ("in_use", "cached", "free"):
            blocks.add_metric([state], cache[state])
        yield blocks
        shared = "Blocks that more than one sequence holds."
        yield GaugeMetricFamily("dsv32_cache_blocks_shared", shared, value=cache["shared"])
        empty = "Share of the places of blocks in use that hold no token."
        yield GaugeMetricFamily("dsv32_cache_internal_fragmentation", empty, value=cache["internal_fragmentation"])
        for key, (name, description) in LATENCIES.items():
            family = SummaryMetricFamily(f"dsv32_{name}", f"{description} Quantiles of the latest.")
            latencies = self.summary[key] or {"count": 0, "sum": 0.0}
            for quantile, label in QUANTILES.items():
                if quantile in latencies:
                    family.add_sample(family.name, {"quantile": label}, latencies[quantile])
            family.add_metric([], latencies["count"], latencies["sum"])
            yield family


def text(collector: EngineCollector) -> bytes:
    """The body of `/metrics`."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(collector)
    return generate_latest(registry)
