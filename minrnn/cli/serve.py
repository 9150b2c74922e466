"""minrnn serve: a run over HTTP."""

from tyro.conf import OmitArgPrefixes

from minrnn.cli.devices import device_of
from minrnn.serve.config import ServeConfig


def serve_run(config: OmitArgPrefixes[ServeConfig]) -> int:
    """Serve a model over HTTP: OpenAI's completions, sessions, a page to try it."""
    try:
        from minrnn.serve.server import serve
    except ModuleNotFoundError as missing:
        hint = f"{missing.name} is missing: pip install 'minrnn[serve]'"
        raise ModuleNotFoundError(hint) from missing
    serve(config, device_of(config.device))
    return 0
