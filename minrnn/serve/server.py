"""The server as a process: a run folder, a port, signals."""

import asyncio
import ctypes
import hashlib
import platform
import socket
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI

from minrnn import checkpoint
from minrnn.data.tokenizers import Tokenizer
from minrnn.interrupts import Interrupts
from minrnn.models import LanguageModel
from minrnn.packing import pack_model
from minrnn.serve.app import create_app
from minrnn.serve.config import ServeConfig
from minrnn.serve.engine import Engine
from minrnn.serve.folder_store import FolderStore
from minrnn.serve.redis_store import RedisStore
from minrnn.serve.service import Service
from minrnn.serve.sessions import SessionStore
from minrnn.serve.worker import Worker


class _Server(uvicorn.Server):
    """Lets open texts go on for a while when it is told to stop."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float) -> None:
        super().__init__(config)
        self.service, self.grace = service, grace

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        draining = asyncio.create_task(self.service.drain(self.grace))
        await super().shutdown(sockets)
        await draining


def serve(config: ServeConfig, device: torch.device) -> None:
    """Serve until SIGTERM or Ctrl-C.

    Args:
        config: what to serve and where.
        device: where to compute.

    Raises:
        FileNotFoundError: there is no run, or no file of keys.
        ValueError: the run is damaged, or holds no language model.
        OSError: the address cannot be listened on, or the sessions cannot be reached.
    """
    keys = read_keys(config.keys) if config.keys else []
    model, tokenizer = _language_model(config.run)
    with listen(config.host, config.port, config.limits.client_seconds) as listening:
        service = _service(config, model.to(device), tokenizer)
        host, port = listening.getsockname()[:2]
        address = f"http://{f'[{host}]' if ':' in host else host}:{port}"
        state_bytes = service.worker.engine.state_bytes
        print(f"{service.name} on {address}, {state_bytes:,} bytes of state a stream", flush=True)
        settings = uvicorn.Config(
            create_app(service, keys),
            log_level="warning",
            timeout_graceful_shutdown=int(config.grace) + 5,
        )
        # uvicorn raises the signal again once all is done: it ends the command well
        with Interrupts():
            _Server(settings, service, config.grace).run([listening])


def open_app(config: ServeConfig, device: torch.device) -> FastAPI:
    """What `serve` serves, as an ASGI application for another server's processes.

    Its engine runs in a thread of this process, until the application is shut down. `host`, `port`
    and `grace` are the other server's business.

    Args:
        config: what to serve.
        device: where to compute.

    Raises:
        FileNotFoundError: there is no run, or no file of keys.
        ValueError: the run is damaged, or holds no language model.
        OSError: the sessions cannot be reached.
    """
    keys = read_keys(config.keys) if config.keys else []
    model, tokenizer = _language_model(config.run)
    return create_app(_service(config, model.to(device), tokenizer), keys)


def _language_model(run: Path) -> tuple[LanguageModel, Tokenizer]:
    model, tokenizer = checkpoint.load(run)
    if not isinstance(model, LanguageModel) or tokenizer is None:
        raise ValueError(f"{run} holds no language model with a tokenizer")
    return model, tokenizer


def _service(config: ServeConfig, model: LanguageModel, tokenizer: Tokenizer) -> Service:
    return_freed_memory()
    store = open_store(config)
    engine = Engine(pack_model(model, config.weights), config.engine)
    name = config.name or config.run.resolve().name
    return Service(name, tokenizer, Worker(engine), store, config.limits)


def open_store(config: ServeConfig) -> SessionStore:
    """Where the sessions are kept: Redis, or a folder.

    Raises:
        OSError: the folder cannot be made, or Redis does not answer.
        ValueError: the address of Redis is none.
        ModuleNotFoundError: the package redis is not installed.
    """
    model, most = _checksum(config.run), config.limits.sessions_per_key
    if config.redis:
        return RedisStore(config.redis, model, most)
    return FolderStore(config.sessions or config.run / "sessions", model, most)


def read_keys(path: Path) -> Sequence[str]:
    """The API keys in a file, one a line; empty lines and those that begin with # are left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it holds no key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"`keys` must name a file of API keys, {path} is none")
    lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    if not keys:
        raise ValueError(f"`keys` must name a file with at least one API key, {path} has none")
    return keys


def return_freed_memory() -> None:
    """Have glibc give freed blocks of 128 KiB and more back at once.

    By itself it keeps more and more of them: states that come and go would fill several times the
    memory that they take.
    """
    if platform.libc_ver()[0] == "glibc":
        # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD
        for setting in (-3, -1):
            ctypes.CDLL(None).mallopt(setting, 128 << 10)


def _checksum(run: Path) -> str:
    return hashlib.sha256((run / checkpoint.WEIGHTS).read_bytes()).hexdigest()


def listen(host: str, port: int, client_seconds: float) -> socket.socket:
    """A socket that listens; connections whose client reads nothing for so long are ended.

    Raises:
        OSError: the address cannot be listened on.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if sys.platform == "linux":
        # connections have it from here; what waits to be sent would keep them open for ever
        milliseconds = int(1000 * client_seconds)
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, milliseconds)
    try:
        listening.bind((host, port))
    except OSError as error:
        listening.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    listening.listen(2048)
    return listening
