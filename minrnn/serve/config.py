"""Settings of the server."""

from dataclasses import dataclass, field
from pathlib import Path

from tyro.conf import Positional

from minrnn.configs import check_fields
from minrnn.ops.rows import WeightDtype
from minrnn.serve.engine import EngineConfig

_AT_LEAST_ONE = (
    "body_bytes",
    "prompt",
    "length",
    "choices",
    "scored",
    "streams",
    "streams_per_key",
)


@dataclass(frozen=True)
class Limits:
    """What one request, one key and all together may take.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    body_bytes: int = 1 << 20
    """Of a request."""
    prompt: int = 65536
    """Symbols of a request's prompts, together."""
    length: int = 100_000
    """Symbols that a text may ask for."""
    choices: int = 64
    """Texts of one request."""
    scored: int = 50_000
    """Symbols that a request with `logprobs` may ask for: their scores wait in memory."""
    streams: int = 2048
    """Texts that are open at once."""
    streams_per_key: int = 2048
    """Texts of one key that are open at once."""
    sessions_per_key: int = 1000
    """Saved sessions of one key."""
    seconds: float = 3600.0
    """Time from a request to the end of its texts."""
    client_seconds: float = 60.0
    """Time that a client may take to send a body, or to read anything of what was sent."""

    def __post_init__(self) -> None:
        check_fields(self)
        for name in _AT_LEAST_ONE:
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be >= 1, got {getattr(self, name)}")
        for name in ("seconds", "client_seconds"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name}` must be > 0, got {getattr(self, name)}")
        if self.sessions_per_key < 0:
            raise ValueError(f"`sessions_per_key` must be >= 0, got {self.sessions_per_key}")


@dataclass(frozen=True)
class ServeConfig:
    """Serve the model of a run over HTTP, with OpenAI's completions and with sessions.

    Raises:
        ValueError: a field is out of range.
        TypeError: a field has another type.
    """

    run: Positional[Path]
    """The run folder."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all."""
    port: int = 8000
    """0 takes a free one and prints it."""
    name: str | None = None
    """What clients call the model; None for the name of the folder."""
    keys: Path | None = None
    """A file of API keys, one a line; None serves everybody."""
    sessions: Path | None = None
    """The folder of the sessions; None for `sessions` in the run folder. Servers on one machine
    may share it."""
    redis: str | None = None
    """In place of the folder, the address of a Redis that servers on many machines share, e.g.
    redis://localhost:6379/0."""
    grace: float = 10.0
    """Seconds that open texts may go on after SIGTERM before they are saved and ended."""
    device: str = "cpu"
    """Where to compute; auto for a GPU if there is one."""
    weights: WeightDtype = "float32"
    """How the matrices are kept in memory: smaller ones are read in less time."""
    limits: Limits = field(default_factory=Limits)
    engine: EngineConfig = field(default_factory=EngineConfig)

    def __post_init__(self) -> None:
        check_fields(self)
        if not 0 <= self.port < 1 << 16:
            raise ValueError(f"`port` must be in [0, 65535], got {self.port}")
        if self.redis and self.sessions:
            raise ValueError("`redis` and `sessions` are two places for the same; give one of them")
        if self.grace < 0:
            raise ValueError(f"`grace` must be >= 0, got {self.grace}")
