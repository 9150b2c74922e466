"""Continuous batching: every text is what it would be alone, whoever joins or leaves."""

from collections.abc import Sequence

import pytest
import torch

import minrnn
from minrnn.sampling import Sampling
from minrnn.serve.engine import Engine, EngineConfig
from minrnn.serve.prefixes import PrefixStore, Read
from minrnn.serve.requests import Ending, Request, Scored
from minrnn.state import State

V = 11


class Heard:
    """A listener that keeps what it hears, and ends its text at `stop`."""

    def __init__(self, stop: int | None = None) -> None:
        self.stop, self.symbols, self.ending = stop, [], None
        self.scores: list[Scored] = []
        self.prompt: Sequence[Scored] = ()

    def read(self, prompt: Sequence[Scored]) -> None:
        self.prompt = prompt

    def drawn(self, symbol: Scored) -> bool:
        assert self.ending is None
        self.symbols.append(symbol.symbol)
        self.scores.append(symbol)
        return symbol.symbol == self.stop

    def ended(self, ending: Ending) -> None:
        assert self.ending is None
        self.ending = ending


def make_model(mixer: str = "mingru") -> minrnn.LanguageModel:
    """Untrained and in float64, where rounding decides no draw."""
    config = minrnn.ModelConfig(vocab_size=V, width=16, num_layers=2, mixer=mixer, num_heads=2)
    model = minrnn.LanguageModel(config).double().eval()
    torch.nn.init.normal_(model.head.weight)
    return model


def make_request(seed: int, **fields) -> Request:
    random = torch.Generator().manual_seed(seed)
    prompt = torch.randint(V, (1 + seed % 13,), generator=random)
    sampling = Sampling(0.5 + 0.1 * (seed % 7), seed % 5, (1.0, 0.8)[seed % 2], seed)
    return Request(prompt, **{"length": 3 + seed % 17, "samplings": (sampling,)} | fields)


def run(engine: Engine, *requests: Request) -> list[Heard]:
    heard = [Heard() for _ in requests]
    for request, one in zip(requests, heard, strict=True):
        engine.submit(request, [one])
    while engine.busy:
        engine.step()
    return heard


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "mamba", "lstm", "aaren"])
def test_a_text_is_what_it_would_be_alone(mixer: str) -> None:
    model = make_model(mixer)
    config = EngineConfig(batch_size=5, chunk=4, prompt_share=6)
    together = Engine(model, config)
    heard = {}
    # seven join at once, then one at every step, while others end
    for seed in range(7):
        heard[seed] = Heard()
        together.submit(make_request(seed), [heard[seed]])
    for seed in range(7, 30):
        together.step()
        heard[seed] = Heard()
        together.submit(make_request(seed), [heard[seed]])
    while together.busy:
        together.step()
    for seed, one in heard.items():
        [alone] = run(Engine(model, config), make_request(seed))
        assert one.symbols == alone.symbols
        assert len(one.symbols) == make_request(seed).length
        assert one.ending is not None
        assert one.ending.reason == "length"


def test_the_engine_draws_what_a_stream_draws() -> None:
    model = make_model()
    for seed in range(5):
        request = make_request(seed)
        stream = minrnn.Stream(model, request.samplings[0])
        stream.prime(request.prompt)
        [heard] = run(Engine(model), request)
        assert heard.symbols == [stream.step() for _ in range(request.length)]


def test_a_state_goes_on_where_a_text_ended() -> None:
    model = make_model()
    greedy = (Sampling(temperature=0),)
    prompt = torch.tensor([1, 2, 3])
    [whole] = run(Engine(model), Request(prompt, 20, greedy))
    [first] = run(Engine(model), Request(prompt, 8, greedy))
    assert first.ending is not None
    unread = torch.tensor(first.ending.unread)
    assert unread.tolist() == first.symbols[-1:]
    [rest] = run(Engine(model), Request(unread, 12, greedy, state=first.ending.state))
    assert first.symbols + rest.symbols == whole.symbols


def test_prompts_of_one_owner_are_read_once() -> None:
    model = make_model()
    engine = Engine(model, EngineConfig(chunk=4))
    prompt = torch.randint(V, (19,))
    longer = torch.cat([prompt[:12], torch.tensor([3, 1, 4])])
    requests = [Request(ids, 5, owner=owner) for owner in "ab" for ids in (prompt, prompt, longer)]
    read = []
    for request in requests:
        before = engine.num_read
        run(engine, request)
        read.append(engine.num_read - before)
    # the whole prompt; nothing; what follows the three chunks that both have
    assert read == [19, 0, 3, 19, 0, 3]
    assert engine.num_found == 2 * (19 + 12)
    sampled = Request(prompt, 9, (Sampling(seed=3),), owner="a")
    assert run(engine, sampled)[0].symbols == run(Engine(model), sampled)[0].symbols


def test_several_texts_behind_one_prompt() -> None:
    model = make_model()
    samplings = tuple(Sampling(seed=seed) for seed in range(7))
    engine, heard = Engine(model, EngineConfig(batch_size=3)), [Heard() for _ in range(7)]
    engine.submit(Request(torch.tensor([1, 2, 3]), 6, samplings), heard)
    while engine.busy:
        engine.step()
    assert engine.num_read == 3
    assert len({tuple(one.symbols) for one in heard}) > 1
    for sampling, one in zip(samplings, heard, strict=True):
        [alone] = run(Engine(model), Request(torch.tensor([1, 2, 3]), 6, (sampling,)))
        assert one.symbols == alone.symbols


def test_long_prompts_do_not_hold_up_running_texts() -> None:
    engine = Engine(make_model(), EngineConfig(chunk=4, prompt_share=4))
    running, waiting, short = Heard(), Heard(), Heard()
    engine.submit(Request(torch.tensor([1]), 100), [running])
    engine.step()
    engine.submit(Request(torch.randint(V, (40,)), 1), [waiting])
    engine.submit(Request(torch.tensor([2, 2]), 1), [short])
    for _ in range(3):
        before = len(running.symbols)
        engine.step()
        assert len(running.symbols) == before + 1
    # the short prompt does not wait for the long one either
    assert short.ending is not None
    assert waiting.ending is None
    assert engine.num_waiting == 1


def test_endings() -> None:
    now = [0.0]
    engine = Engine(make_model(), clock=lambda: now[0])
    greedy = (Sampling(temperature=0),)
    [plain] = run(engine, Request(torch.tensor([1]), 30, greedy))
    stopped, cancelled, late, closed = Heard(plain.symbols[4]), Heard(), Heard(), Heard()
    engine.submit(Request(torch.tensor([1]), 30, greedy), [stopped])
    engine.submit(Request(torch.tensor([1]), 30, greedy), [cancelled])
    engine.submit(Request(torch.tensor([1]), 30, greedy, seconds=5.0), [late])
    engine.submit(Request(torch.tensor([1]), 30, greedy), [closed])
    engine.step()
    engine.cancel(cancelled)
    while stopped.ending is None:
        engine.step()
    now[0] = 6.0
    engine.step()
    engine.close()
    endings = [one.ending.reason for one in (stopped, cancelled, late, closed)]
    assert endings == ["stop", "cancelled", "time", "closed"]
    assert stopped.symbols == plain.symbols[: plain.symbols.index(plain.symbols[4]) + 1]
    assert not engine.busy
    # a text that has not begun has no state
    waiting = Heard()
    engine.submit(Request(torch.tensor([1]), 30), [waiting])
    engine.cancel(waiting)
    assert waiting.ending == Ending("cancelled")


@pytest.mark.parametrize("length", [0, 3])
def test_a_call_that_fails_leaves_no_text_without_an_end(length) -> None:
    model, broken = make_model(), [False]

    class Breaking(torch.nn.Module):
        def forward(self, ids, state=None):
            logits, state = model(ids, state)
            return logits * float("nan") if broken[0] and 7 in ids else logits, state

    breaking = Breaking()
    breaking.config, breaking.head = model.config, model.head
    engine = Engine(breaking, EngineConfig(chunk=4, prompt_share=4))
    heard = [Heard() for _ in range(4)]
    engine.submit(Request(torch.tensor([1]), 100), [heard[0]])
    engine.step()
    broken[0] = True
    engine.submit(Request(torch.tensor([1, 7, 3, 4, 5]), length or 9), [heard[1]])
    engine.submit(Request(torch.tensor([7]), 3, (Sampling(seed=0), Sampling(seed=1))), heard[2:])
    failed = 0
    for _ in range(5):
        try:
            engine.step()
        except ValueError:
            failed += 1
            engine.close("error")
    assert failed == 1
    assert all(one.ending is not None for one in heard)
    assert not engine.busy


def test_scores_are_log_probabilities() -> None:
    model = make_model()
    prompt = torch.randint(V, (9,))
    request = Request(prompt, 4, (Sampling(seed=1),), scores=3, scores_prompt=True)
    [heard] = run(Engine(model, EngineConfig(chunk=4)), request)
    ids = torch.cat([prompt, torch.tensor(heard.symbols)])
    expected = model(ids[None])[0][0].log_softmax(-1)
    found = [*heard.prompt, *heard.scores]
    assert [one.symbol for one in found] == ids.tolist()
    assert found[0].log_p is None
    for place, one in enumerate(found[1:]):
        assert one.log_p == pytest.approx(expected[place, one.symbol].item())
        best = expected[place].topk(3)
        assert [symbol for symbol, _ in one.top] == best.indices.tolist()


def test_reading_alone_draws_nothing() -> None:
    engine = Engine(make_model())
    [heard] = run(engine, Request(torch.tensor([1, 2]), 0))
    assert heard.symbols == []
    assert heard.ending is not None
    assert heard.ending.unread == ()
    assert heard.ending.state is not None
    assert heard.ending.state.num_bytes == engine.state_bytes


def test_prefixes_stay_within_their_bytes() -> None:
    store = PrefixStore(1000, chunk=2)
    for number in range(50):
        read = Read(2, State({"h": torch.zeros(1, 40)}), torch.zeros(1, 10))
        store.put("a", torch.tensor([number, number]), read)
        assert store.num_bytes == len(store) * 200 <= 1000
        # used all the time, so never the oldest
        assert store.longest("a", torch.tensor([0, 0, 1])) is not None
    assert store.longest("a", torch.tensor([1, 1])) is None
    assert store.longest("a", torch.tensor([49, 49])) is not None
    store.put("a", torch.tensor([5, 5]), Read(2, State({"h": torch.zeros(1, 999)}), torch.zeros(1)))
    assert len(store) == 5


def test_what_a_stream_holds_is_its_state() -> None:
    engine = Engine(make_model(), EngineConfig(prefix_bytes=0))
    for seed in range(20):
        engine.submit(make_request(seed, length=100), [Heard()])
    for _ in range(5):
        engine.step()
    held = [x for group in engine._groups for x in group.state.flatten().values()]
    assert engine.num_running == 20
    # views of larger tensors would hold more than they show
    assert sum(x.untyped_storage().nbytes() for x in held) == 20 * engine.state_bytes


def test_wrong_arguments_are_named() -> None:
    with pytest.raises(
        ValueError, match=r"`model` must have a state of constant size.*'attention'"
    ):
        Engine(make_model("attention"))
    with pytest.raises(ValueError, match="`batch_size` must be >= 1, got 0"):
        EngineConfig(batch_size=0)
    with pytest.raises(ValueError, match="`prefix_bytes` must be >= 0, got -1"):
        EngineConfig(prefix_bytes=-1)
