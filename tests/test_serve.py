"""The server as clients see it: OpenAI's completions, sessions, limits, faults."""

import json
import re
from pathlib import Path

import httpx
import openai
import pytest
import torch

import minrnn
from minrnn.data.tokenizers import Bytes
from minrnn.serve.config import Limits
from tests.serving import make_run, served, wait_for


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def address(run: Path):
    with served(run) as (address, _):
        yield address


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    limits = Limits(prompt=100, length=200, choices=8, scored=100)
    with served(make_run(tmp_path_factory.mktemp("strict")), limits) as found:
        yield found


@pytest.fixture
def client(address: str):
    with httpx.Client(base_url=address, timeout=30) as client:
        yield client


def ask(client: httpx.Client, prompt="abc", **fields):
    body = {"model": "tiny", "prompt": prompt, "max_tokens": 20, "seed": 1} | fields
    return client.post("/v1/completions", json=body)


def text_of(client: httpx.Client, prompt="abc", **fields) -> str:
    answer = ask(client, prompt, **fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]["text"]


def events_of(client: httpx.Client, **fields) -> list[dict]:
    answer = ask(client, stream=True, **fields)
    assert answer.headers["content-type"].startswith("text/event-stream")
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    return [json.loads(event) for event in events[:-1]]


def generated(run: Path, prompt: str, length: int, **sampling) -> str:
    model, tokenizer = minrnn.load(run)
    how = minrnn.Sampling(**{"seed": 1} | sampling)
    return "".join(minrnn.generate(model, tokenizer, prompt, length=length, sampling=how))


def test_a_completion_is_what_generate_gives(client, run) -> None:
    for sampling in ({}, {"temperature": 0.0}, {"top_k": 2}, {"top_p": 0.5, "temperature": 2.0}):
        assert text_of(client, **sampling) == generated(run, "abc", 20, **sampling)
    answer = ask(client).json()
    assert answer["object"] == "text_completion"
    assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 20, "total_tokens": 23}
    assert answer["choices"][0]["finish_reason"] == "length"
    # without `max_tokens` 16, as OpenAI's
    plain = client.post("/v1/completions", json={"model": "tiny", "prompt": "abc", "seed": 1})
    assert plain.json()["choices"][0]["text"] == generated(run, "abc", 16)


def test_a_stream_of_events_adds_up_to_the_whole(client) -> None:
    events = events_of(client, n=3, stream_options={"include_usage": True}, logprobs=2)
    whole = ask(client, n=3, logprobs=2).json()
    assert events[-1]["choices"] == []
    assert events[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [
            e["choices"][0] for e in events[:-1] if e["choices"][0]["index"] == choice["index"]
        ]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert [part["finish_reason"] for part in parts] == [None] * (len(parts) - 1) + ["length"]
        for field, expected in choice["logprobs"].items():
            found = [value for part in parts[:-1] for value in part["logprobs"][field]]
            assert found == expected


def test_prompts_ids_echo_stop_and_several_texts(client, run) -> None:
    tokenizer = minrnn.load(run).tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("abc").tolist()
    whole = text_of(client)
    assert text_of(client, ids) == text_of(client, [ids]) == whole
    assert text_of(client, ids, echo=True) == "abc" + whole
    assert text_of(client, echo=True, max_tokens=0) == "abc"
    cut = ask(client, stop=["zzz", whole[5:8]]).json()["choices"][0]
    assert cut["text"] == whole[: whole.index(whole[5:8])]
    assert cut["finish_reason"] == "stop"
    texts = [c["text"] for c in ask(client, ["abc", "h."], n=2).json()["choices"]]
    alone = [text_of(client, p, seed=s) for p in ("abc", "h.") for s in (1, 2)]
    assert texts == alone


def test_logprobs_are_the_models(client, run) -> None:
    model, tokenizer = minrnn.load(run)
    assert tokenizer is not None
    found = ask(client, "abcde", echo=True, logprobs=3, max_tokens=4).json()["choices"][0]
    ids = torch.from_numpy(tokenizer.encode(found["text"]))
    expected = model(ids[None])[0][0].log_softmax(-1)
    scores = found["logprobs"]
    assert "".join(scores["tokens"]) == found["text"]
    assert scores["text_offset"] == list(range(9))
    assert scores["token_logprobs"][0] is scores["top_logprobs"][0] is None
    for place in range(1, 9):
        log_p = expected[place - 1, ids[place]].item()
        assert scores["token_logprobs"][place] == pytest.approx(log_p)
        best = expected[place - 1].topk(3)
        top = dict(zip(tokenizer.decode(best.indices.tolist()), best.values.tolist(), strict=True))
        assert scores["top_logprobs"][place] == pytest.approx(top)


def test_logprobs_of_a_prompt_alone(client) -> None:
    whole = ask(client, "abc", echo=True, logprobs=1, max_tokens=0).json()["choices"][0]
    [event] = events_of(client, prompt="abc", echo=True, logprobs=1, max_tokens=0)
    assert event["choices"][0]["logprobs"] == whole["logprobs"]
    assert whole["logprobs"]["tokens"] == ["a", "b", "c"]


def test_logprobs_of_bytes_count_characters(tmp_path) -> None:
    run = make_run(tmp_path / "tiny", Bytes())
    with served(run) as (address, _), httpx.Client(base_url=address) as client:
        found = ask(client, "é€x", echo=True, logprobs=1, max_tokens=0).json()["choices"][0]
    # a character is complete with its last byte
    assert found["logprobs"]["text_offset"] == [0, 0, 1, 1, 1, 2]
    tokens = found["logprobs"]["tokens"]
    assert tokens == [f"token_id:{byte}" for byte in "é€".encode()] + ["x"]


def test_openais_own_client(address) -> None:
    asked = {"model": "tiny", "prompt": "abc", "max_tokens": 20, "seed": 1}
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none") as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        whole = client.completions.create(**asked, logprobs=1).choices[0]
        stream = client.completions.create(**asked, stream=True)
        assert "".join(part.choices[0].text for part in stream) == whole.text
        assert whole.finish_reason == "length"
        with pytest.raises(openai.NotFoundError, match="`model` must be 'tiny', got 'gpt'"):
            client.completions.create(model="gpt", prompt="abc")
        with pytest.raises(openai.BadRequestError, match="character 'Z'"):
            client.completions.create(model="tiny", prompt="Z")


def test_a_session_goes_on_with_the_new_text_alone(client) -> None:
    greedy = {"temperature": 0, "session": "one"}
    whole = text_of(client, "abc", temperature=0, max_tokens=30)
    first = ask(client, "abc", max_tokens=10, **greedy).json()["choices"][0]
    rest = ask(client, "", max_tokens=20, **greedy).json()["choices"][0]
    assert first["text"] + rest["text"] == whole
    # the state is as large as it was, whatever it has read
    assert rest["session"]["bytes"] == first["session"]["bytes"] > 0
    assert (first["session"]["num_symbols"], rest["session"]["num_symbols"]) == (13, 33)
    assert client.get("/v1/sessions").json()["data"] == ["one"]
    assert client.post("/v1/sessions/one/fork", json={"name": "two"}).status_code == 201
    branches = [
        text_of(client, "h", temperature=0, session=name, max_tokens=5) for name in ("one", "two")
    ]
    assert branches[0] == branches[1]
    assert text_of(client, "abc" + whole + "h", temperature=0, max_tokens=5) == branches[0]
    for name in ("one", "two"):
        assert client.delete(f"/v1/sessions/{name}").json()["deleted"]
    assert client.get("/v1/sessions").json()["data"] == []
    assert client.get("/v1/sessions/one").status_code == 404


def test_a_session_serves_one_request_at_a_time(run) -> None:
    with served(run) as (address, _), httpx.Client(base_url=address, timeout=30) as client:
        body = {"model": "tiny", "prompt": "a", "max_tokens": 100_000, "session": "busy"}
        with client.stream("POST", "/v1/completions", json=body | {"stream": True}) as answer:
            # closing the iterator would close the connection
            lines = answer.iter_lines()
            next(lines)
            again = client.post("/v1/completions", json=body)
            assert again.status_code == 409
            assert again.json()["error"]["code"] == "session_busy"
            assert client.delete("/v1/sessions/busy").status_code == 409
        # a client that goes away leaves the session as it was: there was none
        wait_for(lambda: client.delete("/v1/sessions/busy").status_code == 404)


@pytest.mark.parametrize(
    ("fields", "status", "message"),
    [
        ({"model": "other"}, 404, "`model` must be 'tiny', got 'other'"),
        ({"prompt": ""}, 400, "`prompt` must hold at least one symbol, got none"),
        ({"prompt": []}, 400, "`prompt` must hold at least one symbol"),
        ({"prompt": ["a", ""]}, 400, "`prompt` must hold at least one symbol"),
        ({"prompt": [99]}, 400, "`prompt` must hold ids < 12, got 99"),
        ({"prompt": [-1]}, 400, "prompt"),
        ({"prompt": "a" * 101}, 400, "`prompt` must hold <= 100 symbols, got 101"),
        ({"prompt": "é"}, 400, "U\\+00E9"),
        ({"prompt": 5}, 400, "prompt"),
        ({"max_tokens": -1}, 400, "max_tokens: Input should be greater than or equal to 0"),
        ({"max_tokens": 201}, 400, "`max_tokens` must be <= 200, got 201"),
        ({"temperature": 3}, 400, "temperature"),
        ({"top_p": 0}, 400, "top_p"),
        ({"n": 0}, 400, "n: Input should be greater"),
        ({"n": 9}, 400, "prompts times `n` must be <= 8, got 9"),
        ({"prompt": ["a"] * 2000}, 400, "prompt"),
        ({"prompt": ["a"] * 9}, 400, "prompts times `n` must be <= 8, got 9"),
        ({"top_k": 10**30}, 400, "top_k"),
        ({"logprobs": 1, "n": 8}, 400, "texts times `max_tokens` must be <= 100"),
        ({"stop": [""]}, 400, "`stop` must be up to 4 texts"),
        ({"stop": ["a"] * 5}, 400, "`stop` must be up to 4 texts"),
        ({"suffix": "x"}, 400, "`suffix` is not offered"),
        ({"best_of": 2}, 400, "`best_of` must be `n` = 1"),
        ({"presence_penalty": 1.0}, 400, "`presence_penalty` is not offered"),
        ({"stream_options": {}}, 400, "`stream_options` needs `stream` true"),
        ({"session": "a/../b"}, 400, "session"),
        ({"session": "x", "n": 2}, 400, "with `session`, `n` must be 1"),
        ({"session": "x", "prompt": ["a", "b"]}, 400, "`prompt` must be one text, got 2"),
        ({"session": "new", "prompt": ""}, 400, "`prompt` must hold at least one symbol"),
        ({"temprature": 1}, 400, "temprature: Extra inputs are not permitted .known: model,"),
    ],
)
def test_bad_requests_are_named(strict, fields, status, message) -> None:
    address, service = strict
    with httpx.Client(base_url=address) as client:
        answer = ask(client, **fields)
    assert answer.status_code == status
    error = answer.json()["error"]["message"]
    assert re.search(message, error), error
    # nothing of it stays
    assert not service.open.total()
    assert not service.claims.busy
