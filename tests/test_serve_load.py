"""The server under load, as a process with the paper's model: for `make test-slow`."""

import asyncio
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import minrnn
from tests.serving import process

pytestmark = pytest.mark.slow

STREAMS, REQUESTS = 2000, 10_000


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """The model of the paper's Shakespeare, untrained: 6.7 million weights."""
    torch.manual_seed(0)
    tokenizer = minrnn.Characters("".join(map(chr, range(32, 97))))
    model = minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=tokenizer.vocab_size))
    torch.nn.init.normal_(model.head.weight, std=0.1)
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    minrnn.save(folder, model, tokenizer)
    return folder


def _resident(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(re.search(r"VmRSS:\s+(\d+)", status).group(1)) * 1024


async def _open(address: str, fields: dict):
    """A request on a connection of its own; its reader and writer."""
    host, port = address.removeprefix("http://").split(":")
    body = json.dumps({"model": "tiny", "prompt": "A", "stream": True} | fields).encode()
    reader, writer = await asyncio.open_connection(host, int(port))
    head = "POST /v1/completions HTTP/1.1\r\nhost: x\r\nconnection: close\r\n"
    head += f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    return reader, writer


async def _text(reader, writer) -> tuple[int, str]:
    """Status and text of an answer that is read to its end."""
    whole = await reader.read()
    writer.close()
    status = int(whole.split(b" ", 2)[1])
    events = re.findall(rb"data: (\{.*\})", whole)
    choices = [json.loads(event)["choices"] for event in events]
    return status, "".join(choice[0]["text"] for choice in choices if choice)


def test_two_thousand_open_streams(run, capsys) -> None:
    async def ask(address: str, number: int) -> tuple[int, str]:
        fields = {"prompt": chr(40 + number % 50) * (1 + number % 7), "seed": number}
        return await _text(*await _open(address, fields | {"max_tokens": 60}))

    async def all_of(address: str, server, state_bytes: int) -> list[tuple[int, str]]:
        before, most = _resident(server.pid), 0
        tasks = [asyncio.create_task(ask(address, n)) for n in range(STREAMS)]
        running = 0.0
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0.5)
            most = max(most, _resident(server.pid))
            running = max(running, await _metric(address, "minrnn_texts_running"))
        grown = (most - before) / STREAMS
        with capsys.disabled():
            print(
                f"\n{running:,.0f} streams at once; {state_bytes:,} bytes of state each, "
                f"{grown:,.0f} bytes of resident memory each"
            )
        assert running >= 0.95 * STREAMS
        # beside its state a stream has a connection, and its text on the way
        assert grown < 1.2 * state_bytes + 80_000
        return [task.result() for task in tasks]

    with process(run, "--streams", str(STREAMS), "--prefix-bytes", "0") as found:
        address, server = found
        asyncio.run(ask(address, 0))
        state_bytes = int(asyncio.run(_metric(address, "minrnn_state_bytes_per_stream")))
        answers = asyncio.run(all_of(address, server, state_bytes))
        assert {status for status, _ in answers} == {200}
        assert {len(text) for _, text in answers} == {60}
        for number in range(0, STREAMS, 40):
            assert asyncio.run(ask(address, number)) == answers[number]


ENGINE = """
import sys, torch, minrnn
from minrnn.packing import pack_model
from minrnn.serve.engine import Engine, EngineConfig
from minrnn.serve.requests import Request
from minrnn.serve.server import return_freed_memory
from tests.test_serve_load import _resident
import os

class Silent:
    def read(self, prompt): pass
    def drawn(self, symbol): return False
    def ended(self, ending): pass

torch.set_num_threads(1)
return_freed_memory()
model = pack_model(minrnn.load(sys.argv[1]).model)
engine = Engine(model, EngineConfig(prefix_bytes=0))

def add(count):
    for n in range(count):
        engine.submit(Request(torch.full((1 + n % 9,), n % 60), 10_000), [Silent()])
    while engine.num_waiting:
        engine.step()

add(256)
engine.close()
before = _resident(os.getpid())
add(int(sys.argv[2]))
for _ in range(5):
    engine.step()
print((_resident(os.getpid()) - before) / engine.num_running, engine.state_bytes)
"""


def test_memory_of_the_engine_is_its_states(run, capsys) -> None:
    command = [sys.executable, "-c", ENGINE, str(run), str(STREAMS)]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    grown, state_bytes = map(float, said.split())
    with capsys.disabled():
        print(f"\n{state_bytes:,.0f} bytes of state, {grown:,.0f} of resident memory a stream")
    assert grown < 1.2 * state_bytes


async def _metric(address: str, name: str) -> float:
    host, port = address.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(b"GET /metrics HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE).group(1))


def test_ten_thousand_requests_leave_nothing(run, capsys) -> None:
    chance = random.Random(0)

    async def one(address: str, number: int) -> None:
        kind = chance.random()
        if kind < 0.1:
            # cancelled, at once or after some symbols
            reader, writer = await _open(address, {"max_tokens": 10_000, "seed": number})
            if kind < 0.05:
                await reader.read(500)
            writer.transport.abort()
        elif kind < 0.15:
            status, _ = await _text(*await _open(address, {"max_tokens": "many"}))
            assert status == 400
        else:
            session = {"session": f"s{number % 50}"} if kind < 0.25 else {}
            fields = {"max_tokens": 5, "seed": number} | session
            status, text = await _text(*await _open(address, fields))
            assert (status, len(text)) == (200, 5) or (status == 409 and session)

    async def batch(address: str, numbers: range) -> None:
        limit = asyncio.Semaphore(32)

        async def limited(number: int) -> None:
            async with limit:
                await one(address, number)

        await asyncio.gather(*map(limited, numbers))
        while await _metric(address, "minrnn_texts_open"):
            await asyncio.sleep(0.05)

    with process(run) as (address, server):
        asyncio.run(batch(address, range(REQUESTS // 5)))
        files = len(os.listdir(f"/proc/{server.pid}/fd"))
        before = _resident(server.pid)
        asyncio.run(batch(address, range(REQUESTS // 5, REQUESTS)))
        grown = _resident(server.pid) - before
        with capsys.disabled():
            print(f"\n{REQUESTS:,} requests: {grown / 1e6:.1f} MB more resident memory")
        assert grown < 20e6
        assert len(os.listdir(f"/proc/{server.pid}/fd")) <= files + 2
        assert asyncio.run(_metric(address, "minrnn_texts_running")) == 0
        assert asyncio.run(_metric(address, "minrnn_engine_errors_total")) == 0
