"""Metrics of the engine in Prometheus format."""

import time
from collections.abc import Callable, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from .mounting import GONE, NONE, STACK, Mounted
from .requests import Request

#: Upper bounds, in seconds, of the buckets in the histograms of times.
TIMES = (0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """The per-adapter counters and the gauges of one engine.

    Cached prompts are not counted, because the count could reveal other clients' prompts.
    """

    def __init__(
        self,
        now: Mapping[str, tuple[str, Callable[[], float]]],
        mounted: Callable[[], Mapping[str, Mounted]],
    ):
        """`now` maps the name of each gauge to its description and a function that returns its
        value. `mounted` returns the mounted adapters by id."""
        self._mounted = mounted
        self._registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self._registry, "namespace": "segtrain"}
        by = {"labelnames": ["adapter"], **own}
        times = {"buckets": TIMES, **by}
        self._requests = Counter(
            "requests", "Finished answers, by reason.", ["adapter", "finish"], **own
        )
        self._prompts = Counter("prompt_tokens", "Prompt tokens.", **by)
        self._tokens = Counter("generated_tokens", "Answer tokens.", **by)
        first = "Time from a request to its first token."
        self._first = Histogram("time_to_first_token_seconds", first, **times)
        self._whole = Histogram("request_seconds", "Time from a request to its end.", **times)
        for name, (about, read) in now.items():
            Gauge(name, about, **own).set_function(read)

    def count(self, request: Request, finish: str) -> None:
        """Counts a completion that has ended. `finish` is "stop", "length", "gone" or "failed"."""
        adapters, now = request.selected.adapters, time.monotonic()
        name = STACK if len(adapters) > 1 else NONE
        if len(adapters) == 1:
            (own,) = adapters
            name = own.id if self._mounted().get(own.id) is own else GONE
        self._requests.labels(name, finish).inc()
        self._prompts.labels(name).inc(len(request.prompt))
        self._tokens.labels(name).inc(len(request.made))
        if request.first is not None:
            self._first.labels(name).observe(request.first - request.asked)
        self._whole.labels(name).observe(now - request.asked)

    def forget(self, adapter: str) -> None:
        """Drops the counters of an unmounted adapter. Otherwise, clients could create any number of
        counters by mounting adapters under new names."""
        for own in (self._requests, self._prompts, self._tokens, self._first, self._whole):
            own.remove_by_labels({"adapter": adapter})

    def text(self) -> bytes:
        return generate_latest(self._registry)
