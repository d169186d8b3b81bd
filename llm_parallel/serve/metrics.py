"""What the server counts, in the form that Prometheus reads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
PREFIX = "llm_parallel"


class Metrics:
    """Counters of requests and tokens, and how long clients waited. ``gauges``: what is asked when Prometheus asks."""

    def __init__(self) -> None:
        from prometheus_client import CollectorRegistry, Counter, Histogram

        self.registry = CollectorRegistry()
        given: dict[str, Any] = {"registry": self.registry, "namespace": PREFIX}
        self.requests = Counter("http_requests", "Requests by path and status.", ("path", "status"), **given)
        self.prompt_tokens = Counter("prompt_tokens", "Tokens of prompts taken.", **given)
        self.generated_tokens = Counter("generated_tokens", "Tokens written.", **given)
        self.answers = Counter("answers", "Answers by the reason for which they ended.", ("reason",), **given)
        self.reloads = Counter("reloads", "Checkpoints taken up while serving.", **given)
        self.first_token = Histogram(
            "time_to_first_token_seconds", "From the request to its first token.", buckets=SECONDS, **given
        )
        self.per_token = Histogram("time_per_token_seconds", "Between an answer's tokens.", buckets=SECONDS, **given)

    def gauge(self, name: str, text: str, value: Callable[[], float]) -> None:
        """Adds a number that is asked for when it is read."""
        from prometheus_client import Gauge

        Gauge(name, text, registry=self.registry, namespace=PREFIX).set_function(value)

    def page(self) -> tuple[bytes, str]:
        """The page that Prometheus reads, and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self.registry), CONTENT_TYPE_LATEST
