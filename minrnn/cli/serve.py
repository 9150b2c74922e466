"""minrnn serve: a run over HTTP."""

from tyro.conf import OmitArgPrefixes

from minrnn.cli.devices import device_of
from minrnn.serve.config import ServeConfig


def serve_run(config: OmitArgPrefixes[ServeConfig]) -> int:
    """Serve a model over HTTP: OpenAI's completions, sessions, a page to try it."""
    # the packages of the server take their time, and a line that is refused needs none of them
    from minrnn.serve.server import serve

    serve(config, device_of(config.device))
    return 0
