"""A small model behind a real socket, for tests of the server."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import torch
import uvicorn

import minrnn
from minrnn.data.tokenizers import Tokenizer
from minrnn.serve.app import create_app
from minrnn.serve.config import Limits
from minrnn.serve.engine import Engine, EngineConfig
from minrnn.serve.folder_store import FolderStore
from minrnn.serve.server import listen
from minrnn.serve.service import Service
from minrnn.serve.worker import Worker

TEXT = "abcdefgh .,\n"
ENDLESS = {"model": "tiny", "prompt": "abc", "max_tokens": 100_000, "stream": True}


def make_run(folder: Path, tokenizer: Tokenizer | None = None) -> Path:
    """A run folder; the model is untrained and in float64, where rounding decides no draw."""
    torch.manual_seed(0)
    tokenizer = tokenizer or minrnn.Characters(TEXT)
    config = minrnn.ModelConfig(vocab_size=tokenizer.vocab_size, width=16, num_layers=2)
    model = minrnn.LanguageModel(config).double().eval()
    torch.nn.init.normal_(model.head.weight, std=0.5)
    minrnn.save(folder, model, tokenizer)
    return folder


@contextlib.contextmanager
def served(
    run: Path,
    limits: Limits | None = None,
    keys: Sequence[str] = (),
    engine: EngineConfig | None = None,
) -> Iterator[tuple[str, Service]]:
    """Serve in this process; the address and the service."""
    limits, engine = limits or Limits(), engine or EngineConfig()
    model, tokenizer = minrnn.load(run)
    assert isinstance(model, minrnn.LanguageModel)
    assert tokenizer is not None
    sessions = FolderStore(run / "sessions", "a model", limits.sessions_per_key)
    service = Service("tiny", tokenizer, Worker(Engine(model, engine)), sessions, limits)
    app = create_app(service, keys)
    with listen("127.0.0.1", 0, limits.client_seconds) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
        thread.start()
        try:
            wait_for(lambda: server.started)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}", service
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()


@contextlib.contextmanager
def process(
    run: Path, *options: str, command: Sequence[str] = ("minrnn",)
) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`minrnn serve` as a process of its own; its address and itself."""
    command = [sys.executable, "-m", *command, "serve", str(run), "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, env=environment, **pipes) as server:
        try:
            assert server.stdout is not None
            said = server.stdout.readline()
            found = re.search(r"http://\S+:\d+", said)
            assert found, said + server.stderr.read()
            address = found.group()
            yield address, server
        finally:
            if server.poll() is None:
                server.send_signal(signal.SIGKILL)


def ask(address: str, key: str = "", **fields) -> httpx.Response:
    """Ask for a completion, by fixed settings but for `fields`."""
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 8, "seed": 1} | fields
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{address}/v1/completions", json=body, headers=headers, timeout=30)


def wait_for(condition, seconds: float = 20.0) -> None:
    """Wait until something is so."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.01)
