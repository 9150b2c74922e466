"""Two servers of one store, two hundred sessions, and one server that is killed."""

import asyncio
import itertools
import random
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import minrnn
from tests import redis_server, witness
from tests.serving import TEXT, ask, make_run, process

SESSIONS, TURNS, LENGTH = 200, 5, 60
# every turn is asked for at both servers: at most so many symbols of a session
MOST = 2 * TURNS * LENGTH


def _make_run(folder: Path) -> Path:
    """A model whose most likely text does not repeat itself: each place has its own scores."""
    make_run(folder)
    model, tokenizer = minrnn.load(folder)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and name != "head.weight":
                parameter.mul_(3)
    minrnn.save(folder, model, tokenizer)
    return folder


@dataclass
class Told:
    """What the clients saw."""

    pieces: dict[int, list[tuple[int, list[float]]]] = field(default_factory=dict)
    """of each session: symbols behind a piece, and the scores of its symbols"""
    busy: int = 0
    cut: int = 0
    """answers that did not come whole"""


async def _turn(
    client: httpx.AsyncClient, address: str, number: int, prompt: str, told: Told
) -> bool:
    """Ask a server to go on with a session; whether it did."""
    body = {"model": "tiny", "prompt": prompt, "max_tokens": LENGTH, "temperature": 0}
    body |= {"logprobs": 1, "session": f"s{number}"}
    try:
        answer = await client.post(f"{address}/v1/completions", json=body)
    except httpx.TransportError:
        told.cut += 1
        return False
    if answer.status_code == 409:
        assert answer.json()["error"]["code"] == "session_busy"
        told.busy += 1
        return False
    if answer.status_code == 400:
        # it is new here, as the other server has not saved it before it was killed
        assert not prompt
        return False
    assert answer.status_code == 200, answer.text
    [choice] = answer.json()["choices"]
    piece = (choice["session"]["num_symbols"], choice["logprobs"]["token_logprobs"])
    told.pieces.setdefault(number, []).append(piece)
    return True


async def _session(
    client: httpx.AsyncClient, addresses: list[str], number: int, prompt: str, told: Told
) -> None:
    """Both servers at once, turn after turn; then the last, until it has gone on once more."""
    begun = False
    for _ in range(TURNS):
        asked = "" if begun else prompt
        # a session must not begin twice: its first turn is asked for at one of them
        some = addresses if begun else [random.Random(number).choice(addresses)]
        went = await asyncio.gather(*(_turn(client, a, number, asked, told) for a in some))
        begun = begun or any(went)
    until = time.monotonic() + 60
    while not await _turn(client, addresses[-1], number, "" if begun else prompt, told):
        assert time.monotonic() < until, f"session {number} is held for ever"
        await asyncio.sleep(0.2)


async def _clients(
    addresses: list[str], first: "subprocess.Popen[str]", prompts: list[str]
) -> tuple[Told, float]:
    """All sessions at once; the first server is killed in the middle. What was seen, and when."""
    told, limits = Told(), httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=120, limits=limits) as client:
        running = [
            asyncio.create_task(_session(client, addresses, number, prompt, told))
            for number, prompt in enumerate(prompts)
        ]
        # the first piece of each is asked for at one server, the others are fought for
        while sum(map(len, told.pieces.values())) < 3 * SESSIONS:
            assert not any(one.done() and one.exception() for one in running)
            await asyncio.sleep(0.005)
        first.send_signal(signal.SIGKILL)
        killed = time.monotonic()
        await asyncio.gather(*running)
    return told, killed


def _undisturbed(address: str, prompts: list[str]) -> list[list[float]]:
    """The scores of one long text behind each prompt."""
    found: list[list[float]] = []
    asked: dict[str, Any] = {"temperature": 0, "logprobs": 1, "max_tokens": MOST + LENGTH}
    for first in range(0, len(prompts), 40):
        choices = ask(address, prompt=prompts[first : first + 40], **asked).json()["choices"]
        found += [choice["logprobs"]["token_logprobs"] for choice in choices]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "redis"])
def test_no_session_runs_twice_at_once(tmp_path, kind) -> None:
    run, log = _make_run(tmp_path / "tiny"), tmp_path / "log"
    draw = random.Random(0)
    prompts = ["".join(draw.choices(TEXT, k=8)) for _ in range(SESSIONS)]
    command = ("tests.witness", str(log))
    with redis_server.running(tmp_path) as (store, _):
        options = ("--redis", store) if kind == "redis" else ()
        with (
            process(run, *options, command=command) as (one, first),
            process(run, *options, command=command) as (two, _),
        ):
            whole = _undisturbed(two, prompts)
            told, killed = asyncio.run(_clients([one, two], first, prompts))
            # each request that came in time was refused or served; some were cut
            assert told.busy > SESSIONS // 4
            assert told.cut > SESSIONS // 4
            for number, pieces in told.pieces.items():
                saved = httpx.get(f"{two}/v1/sessions/s{number}").json()["num_symbols"]
                _check(pieces, whole[number], len(prompts[number]), saved)
                assert len(set(whole[number])) > len(whole[number]) // 2
    assert len(told.pieces) == SESSIONS
    turns = 0
    for some in witness.held(log, {first.pid: killed}).values():
        turns += len(some)
        for before, behind in itertools.pairwise(some):
            assert before.end <= behind.begin, (before, behind)
    assert turns >= sum(map(len, told.pieces.values()))


def _check(
    pieces: list[tuple[int, list[float]]], whole: list[float], prompt: int, saved: int
) -> None:
    """The pieces of a session are those of one text: none twice, none lost that was told."""
    reached = 0
    for behind, scores in sorted(pieces):
        begin = behind - prompt - len(scores)
        # what lies between was saved, but its server was killed before it told so
        assert begin >= reached
        assert scores == pytest.approx(whole[begin : begin + len(scores)], abs=1e-9)
        reached = begin + len(scores)
    assert saved == prompt + reached
