"""minrnn serve: a run over HTTP."""

from tyro.conf import OmitArgPrefixes

from minrnn.cli.devices import device_of
from minrnn.serve.config import ServeConfig


def serve_run(config: OmitArgPrefixes[ServeConfig]) -> int:
    """Serve a model over HTTP: OpenAI's completions, sessions, a page to try it."""
    # fastapi and uvicorn are an extra of their own
    from minrnn.serve.server import serve

    serve(config, device_of(config.device))
    return 0
