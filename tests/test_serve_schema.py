"""Requests made from the server's own description of itself: none of them ends in a 500."""

import schemathesis
from hypothesis import HealthCheck, Phase, given, settings

from minrnn.data.tokenizers import Bytes
from minrnn.serve.config import Limits
from tests.serving import make_run, served

OPERATIONS = {
    "GET /",
    "GET /health",
    "GET /metrics",
    "GET /v1/models",
    "GET /v1/models/{name}",
    "POST /v1/completions",
    "GET /v1/sessions",
    "GET /v1/sessions/{name}",
    "POST /v1/sessions/{name}/fork",
    "DELETE /v1/sessions/{name}",
}


# what is refused at most values, before anything else is looked at
PICKY = ("best_of", "suffix", "frequency_penalty", "presence_penalty", "logit_bias", "stop")


def _accept(body: dict) -> None:
    """Make half of the bodies ones that may be served."""
    body["model"] = "tiny"
    if len(str(body)) % 2:
        for name in (*PICKY, "stream_options"):
            body.pop(name, None)
        body |= {"max_tokens": len(str(body)) % 20, "n": 1, "prompt": body.get("prompt") or "abc"}


def _ask(operation) -> set[int]:
    """Make requests of one kind; the statuses of the answers."""
    statuses: set[int] = set()

    @settings(
        max_examples=100,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=operation.as_strategy())
    def ask(case) -> None:
        if isinstance(case.body, dict) and "model" in case.body:
            _accept(case.body)
        answer = case.call()
        assert answer.status_code < 500, (case.as_curl_command(), answer.text)
        statuses.add(answer.status_code)

    ask()
    return statuses


def test_no_request_ends_in_a_500(tmp_path) -> None:
    limits = Limits(length=20, seconds=5.0)
    with served(make_run(tmp_path / "tiny", Bytes()), limits) as (address, service):
        described = schemathesis.openapi.from_url(f"{address}/openapi.json")
        operations = [found.ok() for found in described.get_all_operations()]
        answered = {operation.label: _ask(operation) for operation in operations}
        assert service.worker.num_errors == 0
        assert not service.open.total()
        assert not service.claims.busy
    assert set(answered) == OPERATIONS
    # right and wrong ones among them
    assert answered["POST /v1/completions"] >= {200, 400}
