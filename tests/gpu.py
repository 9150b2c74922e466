"""What stands on the operators, on a GPU: layers, models, training, streams. By `make test-gpu`.

Each is held to the same on the CPU, which the other files hold to references.
"""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_engine import V, make_model, make_request, run
from test_mixers import MIXERS, WIDTH
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from training import text_config, write_text

import minrnn
from minrnn import MinGRU, MinLSTM, checkpoint, gradients
from minrnn.data.batch import Batch
from minrnn.losses import next_symbol
from minrnn.runs import text as runs
from minrnn.serve.engine import Engine

LAYERS: dict[str, Callable[[], nn.Module]] = {
    "gru": lambda: MinGRU(6, 8, num_layers=2, batch_first=True),
    "gru, both ways": lambda: MinGRU(6, 8, bidirectional=True, batch_first=True),
    "lstm": lambda: MinLSTM(6, 8, num_layers=2, batch_first=True),
    "lstm, both ways": lambda: MinLSTM(6, 8, proj_size=4, bidirectional=True, batch_first=True),
}
# long enough for chunks of time, and shorter ones
LENGTHS = (700, 257, 256, 3, 1)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> torch.device:
    """The GPU."""
    device = torch.device(request.config.getoption("--device"))
    assert device.type == "cuda", "these tests are for a GPU: pytest --device cuda tests/gpu.py"
    return device


def _results(module: nn.Module, x: Tensor | PackedSequence) -> list[Tensor]:
    """y, the state, and the gradients of all weights, on the CPU."""
    y, state = module(x)
    y = y.data if isinstance(y, PackedSequence) else y
    states = list(state) if isinstance(state, tuple) else [state]
    loss = sum((one.float().sin()).mean() for one in (y, *states))
    grads = torch.autograd.grad(loss, list(module.parameters()))
    return [one.detach().cpu() for one in (y, *states, *grads)]


def _assert_close(found: list[Tensor], wanted: list[Tensor], limit: float = 2e-5) -> None:
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=limit, atol=limit)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layer", LAYERS)
def test_layers(device: torch.device, layer: str, packed: bool) -> None:
    module = LAYERS[layer]()
    x = [torch.randn(T, 6) for T in LENGTHS]
    given = pack_sequence(x) if packed else x[0].expand(3, -1, -1)
    wanted = _results(module, given)
    _assert_close(_results(module.to(device), given.to(device)), wanted)


@pytest.mark.parametrize("layer", ["gru", "lstm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_steps_are_the_whole(device: torch.device, layer: str, dtype: torch.dtype) -> None:
    module = LAYERS[layer]().to(device, dtype)
    x = torch.randn(3, 300, 6, device=device, dtype=dtype)
    # float32 here and so after each step
    state = torch.zeros(2, 3, 8, device=device)
    with torch.inference_mode():
        whole, _ = module(x, state)
        steps = []
        for x_t in x.split(1, dim=1):
            y, state = module(x_t, state)
            steps.append(y)
    limit = 2e-2 if dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(torch.cat(steps, dim=1), whole, rtol=limit, atol=limit)


@pytest.mark.parametrize("layer", LAYERS)
def test_autocast_is_near(device: torch.device, layer: str) -> None:
    module = LAYERS[layer]().to(device)
    x = torch.randn(3, 300, 6, device=device)
    wanted = _results(module, x)
    for dtype, limit in ((torch.bfloat16, 4e-2), (torch.float16, 5e-3)):
        with torch.autocast("cuda", dtype):
            _assert_close([one.float() for one in _results(module, x)], wanted, limit)


def test_a_graph_replays_a_step(device: torch.device) -> None:
    model = minrnn.LanguageModel(minrnn.ModelConfig(vocab_size=V, width=32)).eval().to(device)
    ids = torch.randint(V, (2, 1), device=device)
    state = model.init_state(2)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.inference_mode():
        # kernels are loaded before a graph is recorded
        with torch.cuda.stream(stream):
            model(ids, state)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            logits, after = model(ids, state)
        for _ in range(3):
            ids.copy_(torch.randint(V, (2, 1)))
            wanted, state_after = model(ids, state)
            graph.replay()
            torch.testing.assert_close(logits, wanted)
            for one, other in zip(
                after.flatten().values(), state_after.flatten().values(), strict=True
            ):
                torch.testing.assert_close(one, other)


def test_a_graph_replays_chunks_of_time(device: torch.device) -> None:
    module = LAYERS["gru"]().to(device)
    x = torch.randn(2, 700, 6, device=device)
    with torch.inference_mode():
        module(x)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, _ = module(x)
        for _ in range(3):
            x.copy_(torch.randn(2, 700, 6))
            graph.replay()
            torch.testing.assert_close(y, module(x)[0])


# torch's own compiler still calls torch.jit
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_a_compiled_model_is_the_model(device: torch.device) -> None:
    config = minrnn.ModelConfig(vocab_size=V, width=32, num_layers=2, dropout=0.0)
    model = minrnn.LanguageModel(config).to(device)
    ids = torch.randint(V, (2, 300), device=device)
    found = []
    for each in (model, torch.compile(model)):
        loss = each(ids)[0].logsumexp(2).mean()
        found.append([loss.detach(), *torch.autograd.grad(loss, list(model.parameters()))])
    _assert_close(*found)


@pytest.mark.parametrize("name", MIXERS)
def test_mixers(device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    # nn.GRU and nn.LSTM would take 10 bits of each factor
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    module = MIXERS[name]()
    x = torch.randn(2, 16, WIDTH)
    wanted, _ = module(x)
    found, _ = module.to(device)(x.to(device))
    torch.testing.assert_close(found.cpu(), wanted, rtol=2e-5, atol=2e-5)


def test_gradients_in_chunks(device: torch.device) -> None:
    config = minrnn.ModelConfig(vocab_size=V, width=16, num_layers=2, dropout=0.0)
    model = minrnn.LanguageModel(config).to(device)
    ids = torch.randint(V, (2, 1001), device=device)

    batch = Batch(ids[:, :-1], ids[:, 1:], torch.ones_like(ids[:, 1:], dtype=torch.bool))

    def found(chunk: int) -> list[Tensor]:
        model.zero_grad()
        gradients.backward(model, next_symbol, batch, chunk=chunk)
        return [one.grad.clone() for one in model.parameters()]

    _assert_close(found(300), found(0))


@pytest.mark.parametrize("mixer", ["mingru", "minlstm", "gru", "mamba"])
def test_texts_of_the_engine(device: torch.device, mixer: str) -> None:
    model = make_model(mixer)
    requests = [make_request(seed) for seed in range(20)]
    wanted = [one.symbols for one in run(Engine(model), *requests)]
    found = [one.symbols for one in run(Engine(model.to(device)), *requests)]
    assert found == wanted


@pytest.mark.parametrize(("precision", "limit"), [("no", 1e-3), ("bf16", 2e-2), ("fp16", 1e-2)])
def test_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str, limit: float
) -> None:
    source = write_text(tmp_path / "text.txt")
    options = {"steps": 60, "eval_every": 20, "learning_rate": 1e-2, "precision": precision}

    def losses(name: str) -> list[float]:
        config = text_config(source, tmp_path / name, **options)
        # the GPU would draw other numbers
        runs.go_on(runs.start(replace(config, model=replace(config.model, dropout=0.0))))
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [line["valid_loss"] for line in lines if "valid_loss" in line]

    found = losses("gpu")
    model, _ = checkpoint.load(tmp_path / "gpu")
    assert next(model.parameters()).device.type == "cpu"
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    wanted = losses("cpu")
    assert wanted[-1] < 2.0
    assert found == pytest.approx(wanted, rel=limit)
    assert found != wanted
