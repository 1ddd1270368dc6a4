"""What the service counts, for Prometheus."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    disable_created_metrics,
    generate_latest,
)

from fedpt_flwr.endpoint import Usage
from fedpt_flwr.remote import RemoteModel

if TYPE_CHECKING:
    from fedpt_flwr.service.versions import Version

_SECONDS_TO_FIRST = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
_SECONDS_PER_TOKEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5)


class Metrics:
    """Counters of one service, in a registry of their own, so that several can live in one process."""

    def __init__(self) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # when each counter was made is of no use to anybody
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fedpt_requests", "Requests that have ended", ["endpoint", "outcome"], registry=self.registry
        )
        self.prompt_tokens = Counter("fedpt_prompt_tokens", "Tokens of prompts", ["model"], registry=self.registry)
        self.generated_tokens = Counter(
            "fedpt_generated_tokens", "Tokens of texts that are complete", ["model"], registry=self.registry
        )
        self.drafted_tokens = Counter(
            "fedpt_drafted_tokens", "Tokens that the tuned model has drafted for the proxy", registry=self.registry
        )
        self.accepted_tokens = Counter(
            "fedpt_accepted_tokens", "Drafted tokens that were the proxy's own", registry=self.registry
        )
        self.time_to_first_token = Histogram(
            "fedpt_time_to_first_token_seconds",
            "From a request's arrival to its first token",
            buckets=_SECONDS_TO_FIRST,
            registry=self.registry,
        )
        self.time_per_token = Histogram(
            "fedpt_time_per_token_seconds",
            "Mean over the tokens of a text after its first",
            buckets=_SECONDS_PER_TOKEN,
            registry=self.registry,
        )
        self.queue_length = Gauge("fedpt_queue_length", "Texts that wait for a slot", registry=self.registry)
        self.slots_in_use = Gauge("fedpt_slots_in_use", "Texts that are being written", registry=self.registry)
        self.slots = Gauge("fedpt_slots", "Texts that can be written at once", registry=self.registry)
        self.swaps = Counter(
            "fedpt_version_swaps", "New versions of the proxy, by outcome", ["outcome"], registry=self.registry
        )
        self.remote = Gauge(
            "fedpt_remote", "What a remote large model has cost, by quantity", ["quantity"], registry=self.registry
        )
        self.version_info = Info("fedpt_version", "The version that new requests get", registry=self.registry)

    def set_version(self, version: Version) -> None:
        """Show another version, and what its large model costs if that is remote."""
        self.version_info.info({"name": version.name, "run": version.run, "round": str(version.server_round or "")})
        self.remote.clear()  # the gauges hold the model that they show
        if isinstance(version.proxy.large, RemoteModel):
            self._watch(version.proxy.large)

    def _watch(self, large: RemoteModel) -> None:
        """Show what a remote large model costs: requests, repetitions, tokens, and the price if there is one."""
        nothing = Usage()

        def spent(name: str) -> float:
            return float(large.usage_since(nothing)[name])

        for name in large.usage_since(nothing):
            self.remote.labels(name.removeprefix("remote_")).set_function(partial(spent, name))

    def render(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)
