"""Models for inference: matrices packed so that a row of a batch gives what it would give alone."""

import copy
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from minrnn.blocks import Block, CausalConv, FeedForward
from minrnn.layers import MinGRU, MinLSTM
from minrnn.mixers import MinimalRNN
from minrnn.mixers.contract import DepthwiseConv
from minrnn.models import Blocks, LanguageModel, check_ids, check_state, state_shapes
from minrnn.ops.rows import Packed, WeightDtype, can_run_model, linear_rows, pack, run_model
from minrnn.state import State

# what the compiled call of a whole model takes
_KIND: dict[str, Any] = {"device": "cpu", "dtype": torch.float32}
# by their exact classes: those of adapters and parametrizations compute more
_PARTS = {LanguageModel, Blocks, Block, CausalConv, FeedForward, DepthwiseConv, MinimalRNN}
_PARTS |= {MinGRU, MinLSTM, nn.Embedding, nn.Linear, nn.RMSNorm, nn.Dropout}


class PackedWeight(Tensor):
    """A matrix (N, K) that `F.linear` multiplies by, each row by itself; nothing else reads it.

    Args:
        weight: (N, K), float32.
        dtype: of the weights in memory.

    Example:
        >>> weight = PackedWeight(torch.ones(4, 3), "int8")
        >>> F.linear(torch.ones(2, 3), weight).shape
        torch.Size([2, 4])
    """

    packed: Packed

    @staticmethod
    def __new__(cls, weight: Tensor, dtype: WeightDtype = "float32") -> "PackedWeight":
        made = Tensor._make_wrapper_subclass(
            cls, weight.shape, dtype=weight.dtype, device=weight.device
        )
        made.packed = pack(weight, dtype)
        return made

    def __init__(self, weight: Tensor, dtype: WeightDtype = "float32") -> None:
        pass

    @property
    def num_bytes(self) -> int:
        """Of the weights in memory."""
        parts = [x for x in (self.packed.panels, self.packed.scale) if x is not None]
        return sum(x.numel() * x.element_size() for x in parts)

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is F.linear:
            return _linear(*args, **(kwargs or {}))
        # shape, dtype and whatever else only describes it
        with torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> NoReturn:
        raise TypeError(f"packed weights can only be multiplied by, by F.linear, not {func}")


def _linear(x: Tensor, weight: PackedWeight, bias: Tensor | None = None) -> Tensor:
    return linear_rows(x, weight.packed, bias)


class PackedModel(nn.Module):
    """A language model of minimal cells whose every call is one call of a compiled kernel.

    The same function as the `LanguageModel` it is made from, to rounding, with the same states.
    What a text gives does not depend on the batch, nor on how it is cut into calls, to the bit.

    Args:
        model: float32, on the CPU, with a mixer "mingru" or "minlstm".
        weights: how the matrices are kept in memory.
    """

    def __init__(self, model: LanguageModel, weights: WeightDtype = "float32") -> None:
        super().__init__()
        self.config, config = model.config, model.config
        self.embedding = nn.Embedding.from_pretrained(model.embedding.weight.detach().clone())
        self._weights: list[Tensor] = []
        for block in model.blocks:
            assert isinstance(block, Block)
            self._weights += _block_weights(block, weights)
        self._weights += [model.norm.weight, *_matrix(model.head, weights)]
        # copies: training `model` on must not move half of this one
        self._weights = [
            x.detach().clone(memory_format=torch.contiguous_format) for x in self._weights
        ]
        inner = config.mlp_ratio * config.width
        D = config.expansion * config.width
        num_gates = 2 if config.mixer == "mingru" else 3
        self._sizes = [D, num_gates, config.conv_width, inner]
        self._state_shapes = state_shapes(self.init_state(1))

    @property
    def num_weight_bytes(self) -> int:
        """What a step reads: all but the embedding, of which it reads a row."""
        return sum(x.numel() * x.element_size() for x in self._weights)

    def init_state(self, batch_size: int) -> State:
        """The state before the first symbol; `forward` takes None for the same."""
        width, (D, _, conv_width, _) = self.config.width, self._sizes
        states = []
        for _ in range(self.config.num_layers):
            states += [torch.zeros(batch_size, D, **_KIND)]
            states += [torch.zeros(batch_size, max(0, conv_width - 1), width, **_KIND)]
        return self._named(states)

    def forward(self, ids: Tensor, state: State | None = None) -> tuple[Tensor, State]:
        """Read `ids` behind what `state` has read, as `LanguageModel` does."""
        check_ids(ids)
        if state is None:
            state = self.init_state(ids.shape[0])
        check_state(state, self._state_shapes, ids.shape[0])
        states: list[Tensor] = []
        for number in range(self.config.num_layers):
            block = state.inner(str(number))
            h = block.inner("mixer").tensor("h").contiguous()
            conv = block.tensor("conv").contiguous() if self.config.conv_width else h.new_empty(0)
            states += [h, conv]
        config = self.config
        logits, after = run_model(
            ids.long(),
            self.embedding.weight,
            self._weights,
            states,
            self._sizes,
            config.candidate,
            config.normalized,
        )
        return logits, self._named(after)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        # its matrices are no parameters: only the embedding would be read
        raise TypeError("a PackedModel loads no weights: load them into the model, then pack that")

    def _named(self, states: list[Tensor]) -> State:
        parts: dict[str, Tensor | State] = {}
        for number in range(self.config.num_layers):
            block: dict[str, Tensor | State] = {"mixer": State({"h": states[2 * number]})}
            if self.config.conv_width:
                block["conv"] = states[2 * number + 1]
            parts[str(number)] = State(block)
        return State(parts)


def pack_model(
    model: LanguageModel, weights: WeightDtype = "float32"
) -> LanguageModel | PackedModel:
    """A copy of `model` for inference, its matrices packed.

    What a row of a batch gives is then, to the bit, what it gives alone, for the mixers "mingru"
    and "minlstm"; for others up to the rounding of what is no matrix product. Of models that are
    not float32 throughout nothing is packed. Adapters, hooks, and other parts than those of the
    configuration are kept: such a model is packed matrix by matrix, as that of another mixer.

    Args:
        model: stays as it is.
        weights: how the matrices are kept: bfloat16 takes half, int8 a quarter of the memory, and
            of the time where reading them is what takes time.

    Example:
        >>> from minrnn.models import ModelConfig
        >>> model = pack_model(LanguageModel(ModelConfig(vocab_size=5, width=8)).eval())
        >>> ids = torch.tensor([[1, 2, 3], [4, 0, 1]])
        >>> torch.equal(model(ids)[0][:1], model(ids[:1])[0])
        True
    """
    is_float32 = all(x.dtype == torch.float32 for x in model.parameters())
    if (
        model.config.mixer in ("mingru", "minlstm")
        and is_float32
        and can_run_model(model.head.weight.device)
        and _is_as_built(model)
    ):
        return PackedModel(model, weights).eval()
    packed = copy.deepcopy(model).requires_grad_(False).eval()
    for module in packed.modules() if is_float32 else ():
        for name in matrices(module):
            if name in getattr(module, "parametrizations", ()):
                # computed at each call
                continue
            weight = getattr(module, name)
            if weight is not None:
                delattr(module, name)
                setattr(module, name, PackedWeight(weight, weights))
    return packed


def _is_as_built(model: LanguageModel) -> bool:
    """No part of `model` computes something else than the compiled call, which reads weights."""
    for part in model.modules():
        if type(part) not in _PARTS or part._forward_hooks or part._forward_pre_hooks:
            return False
        if isinstance(part, nn.RMSNorm) and part.eps is not None:
            return False
        if isinstance(part, MinGRU | MinLSTM) and part.candidate != model.config.candidate:
            return False
        if isinstance(part, MinLSTM) and part.normalized != model.config.normalized:
            return False
    return True


def _block_weights(block: Block, weights: WeightDtype) -> list[Tensor]:
    """The weights of a block in the order of `run_model`."""
    none = torch.empty(0, **_KIND)
    assert isinstance(block.mixer, MinimalRNN)
    rnn = block.mixer.rnn
    assert rnn.weight_hr_l0 is not None
    found = [none] * 5
    if block.conv is not None:
        depthwise = block.conv.depthwise
        # (width, 1, conv_width) to (conv_width, width)
        found = [depthwise.weight[:, 0].T, depthwise.bias, *_matrix(block.conv.pointwise, weights)]
    found += [block.mixer_norm.weight]
    found += _packed(rnn.weight_ih_l0, rnn.bias_ih_l0, weights)
    found += _packed(rnn.weight_hr_l0, None, weights)
    if block.mlp is None or block.mlp_norm is None:
        return [*found, *[none] * 7]
    mlp = block.mlp
    parts = [*_matrix(mlp.widen, weights), *_matrix(mlp.narrow, weights)]
    return [*found, block.mlp_norm.weight, *parts]


def _matrix(linear: nn.Linear, weights: WeightDtype) -> list[Tensor]:
    return _packed(linear.weight, linear.bias, weights)


def _packed(weight: Tensor, bias: Tensor | None, dtype: WeightDtype) -> list[Tensor]:
    """Panels, scale and bias."""
    none = torch.empty(0, **_KIND)
    panels, scale, *_ = pack(weight, dtype)
    return [panels, none if scale is None else scale, none if bias is None else bias]


def num_weight_bytes(model: nn.Module) -> int:
    """What a step reads: all matrices and vectors but the embedding's, of which it reads a row."""
    if isinstance(model, PackedModel):
        return model.num_weight_bytes
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            size -= module.weight.numel() * module.weight.element_size()
        packed = (vars(module).get(name) for name in matrices(module))
        size += sum(x.num_bytes for x in packed if isinstance(x, PackedWeight))
    return size


def matrices(module: nn.Module) -> list[str]:
    """The names of the weights that `module` multiplies by in `F.linear`."""
    if isinstance(module, nn.Linear):
        return ["weight"]
    if isinstance(module, MinGRU | MinLSTM):
        names = {*module._parameters, *vars(module)}
        return sorted(name for name in names if name.startswith(("weight_ih", "weight_hr")))
    return []
