"""What Prometheus reads."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from minrnn.serve.service import Service


class Metrics:
    """Counters of one server.

    Args:
        service: whose engine is looked at when the metrics are read.
    """

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        engine, worker = service.worker.engine, service.worker
        self.requests = Counter(
            "minrnn_http_requests",
            "Answers by path and status",
            ["path", "status"],
            registry=self._registry,
        )
        self.seconds = Histogram(
            "minrnn_http_request_seconds",
            "Time to the end of an answer",
            ["path"],
            registry=self._registry,
        )
        for name, what, value in (
            ("texts_running", "Texts that are being drawn", lambda: engine.num_running),
            ("texts_waiting", "Texts whose prompt is not read yet", lambda: engine.num_waiting),
            ("texts_open", "Texts that clients wait for", service.open.total),
            (
                "state_bytes",
                "Bytes of the states of the running texts",
                lambda: engine.num_running * engine.state_bytes,
            ),
            (
                "state_bytes_per_stream",
                "Bytes of the state of one text",
                lambda: engine.state_bytes,
            ),
            (
                "prefix_bytes",
                "Bytes of the states behind prompts",
                lambda: engine.prefixes.num_bytes,
            ),
            ("sessions", "Saved sessions", service.sessions.count),
            ("symbols_drawn_total", "Symbols drawn", lambda: engine.num_drawn),
            ("symbols_read_total", "Symbols of prompts read", lambda: engine.num_read),
            (
                "symbols_found_total",
                "Symbols of prompts that were read before",
                lambda: engine.num_found,
            ),
            ("engine_errors_total", "Steps that failed", lambda: worker.num_errors),
        ):
            Gauge(f"minrnn_{name}", what, registry=self._registry).set_function(value)

    def text(self) -> bytes:
        """All of it, in the format that Prometheus reads."""
        return generate_latest(self._registry)
