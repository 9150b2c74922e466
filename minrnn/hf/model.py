"""`minrnn.LanguageModel` for transformers: `generate`, `Trainer` and pipelines take it."""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils.generic import ModelOutput

from minrnn import checkpoint
from minrnn.data import tokenizers
from minrnn.hf.cache import Part, StateCache
from minrnn.hf.config import MinRNNConfig
from minrnn.models import LanguageModel
from minrnn.plain import match_dtypes

# the steps of a row from its first symbol to before its padding on the right
Span = tuple[int, int]


@dataclass
class MinRNNOutput(ModelOutput):
    """What a call of `MinRNNForCausalLM` gives."""

    loss: Tensor | None = None
    """With labels: the mean cross-entropy of the next symbol, in nats."""
    logits: Tensor | None = None
    """(B, T, V), or as many steps as `logits_to_keep` says."""
    past_key_values: StateCache | None = None
    """With `use_cache`: the state after the last symbol of each row."""


class MinRNNForCausalLM(PreTrainedModel, GenerationMixin):
    """A language model of minrnn, over any mixer, for transformers.

    Its folders are run folders: `minrnn.load` opens what `save_pretrained` writes, and
    `from_pretrained` opens what a training or `minrnn.save` wrote, with equal names of tensors.
    Padding is never read: a row gives what it gives alone.

    Args:
        config: the shape of the model, `vocab_size` >= 1.

    Raises:
        ValueError: `vocab_size` is 0; on a call, shapes do not fit or the mask has holes.

    Example:
        >>> model = MinRNNForCausalLM(MinRNNConfig(vocab_size=65, width=16)).eval()
        >>> ids = torch.randint(65, (2, 7))
        >>> model.generate(ids, max_new_tokens=3, do_sample=False).shape
        torch.Size([2, 10])
    """

    config_class = MinRNNConfig
    config: MinRNNConfig
    supports_gradient_checkpointing = True
    gradient_checkpointing = False
    _is_stateful = True
    _no_split_modules = ["Block"]
    _tied_weights_keys = {"head.weight": "embedding.weight"}

    def __init__(self, config: MinRNNConfig) -> None:
        super().__init__(config)
        # its parts and not itself, so that the tensors have the names that they have there
        model = LanguageModel(config.model_config)
        self.embedding, self.blocks = model.embedding, model.blocks
        self.norm, self.head = model.norm, model.head
        self.generation_config.pad_token_id = config.vocab_size
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MinRNNOutput:
        """Read symbols behind what `past_key_values` has read.

        Args:
            input_ids: (B, T), T >= 1; V stands for padding, for which the mask must be 0 if what
                comes behind it counts.
            attention_mask: (B, T) or more, of which the last T count: 0 for padding on either side.
            past_key_values: what an earlier call returned; None at the start.
            inputs_embeds: (B, T, width) in the place of `input_ids`.
            labels: (B, T); what comes after step t is compared with labels[:, t + 1], -100 with
                nothing.
            use_cache: return the states; None does so unless there are labels or in training.
            logits_to_keep: how many last steps have logits, 0 for all; or (K,), which ones.
        """
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise ValueError(f"`{name}` must be False: the model has logits and a state")
        x = self._embedded(input_ids, inputs_embeds)
        if past_key_values is not None and past_key_values.batch_size != x.shape[0]:
            raise ValueError(
                f"`past_key_values` must have B = {x.shape[0]} rows, got "
                f"{past_key_values.batch_size}"
            )
        if use_cache is None:
            use_cache = labels is None and not self.training
        spans = _spans(attention_mask, x)
        # what is recomputed in the backward pass gives no state
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        if use_cache or past_key_values is not None:
            y, cache = self._read_on(x, spans, past_key_values)
        else:
            y, cache = self._read(x, spans), None
        steps = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.head(self.norm(y[:, steps]))
        loss = None
        if labels is not None:
            size = self.config.vocab_size
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)
        return MinRNNOutput(loss, logits, cache if use_cache else None)

    def _embedded(self, ids: Tensor | None, embedded: Tensor | None) -> Tensor:
        if (ids is None) == (embedded is None):
            raise ValueError(
                "one of `input_ids` and `inputs_embeds` must be given, got both or none"
            )
        # the id of padding has no row in the embedding
        padding = self.config.vocab_size
        x = self.embedding(ids.masked_fill(ids == padding, 0)) if ids is not None else embedded
        assert isinstance(x, Tensor)
        if x.dim() != 3 or x.shape[1] < 1:
            raise ValueError(
                f"`input_ids` must have shape (B, T) with T >= 1, got {tuple(x.shape[:-1])}"
            )
        return x

    def _read(self, x: Tensor, spans: list[Span] | None) -> Tensor:
        """Run x (B, T, width) from the start, without the states after it."""
        if spans is None:
            for block in self.blocks:
                # (B, T, width)
                x = self._checkpointed(block, x) if self.gradient_checkpointing else block(x)[0]
            return x
        # turned so that all padding is on the right, where no symbol sees it, and back
        steps = torch.arange(x.shape[1], device=x.device)
        # (B, 1) each
        starts, stops = torch.tensor(spans, device=x.device).T[:, :, None]
        x = _turned(x, steps + starts).masked_fill((steps >= stops - starts)[:, :, None], 0.0)
        return _turned(self._read(x, None), steps - starts)

    def _checkpointed(self, block: nn.Module, x: Tensor) -> Tensor:
        if not self.training:
            return block(x)[0]
        return self._gradient_checkpointing_func(lambda x: block(x)[0], x)

    def _read_on(
        self, x: Tensor, spans: list[Span] | None, past: StateCache | None
    ) -> tuple[Tensor, StateCache]:
        """Run x (B, T, width) behind `past`; rows that are padded alike go together."""
        B, T, _ = x.shape
        before = [(list(range(B)), None)] if past is None else past.parts
        length = T + (0 if past is None else past.length)
        if spans is None and len(before) == 1 and before[0][0] == list(range(B)):
            y, state = self.blocks(x, before[0][1])
            return y, StateCache([Part(before[0][0], state)], length)
        outputs, parts = [], []
        for rows, state in before:
            alike: dict[Span, list[int]] = {}
            for place, row in enumerate(rows):
                alike.setdefault((0, T) if spans is None else spans[row], []).append(place)
            for (start, stop), places in alike.items():
                at = [rows[place] for place in places]
                inner = None if state is None else state.select(places)
                y = x[at, start:stop]
                if start < stop:
                    y, inner = self.blocks(y, inner)
                parts.append(Part(at, self.blocks.init_state(len(at)) if inner is None else inner))
                # (rows, T, width), zeros for padding
                outputs.append(F.pad(y, (0, 0, start, T - stop)))
        order = torch.tensor([row for part in parts for row in part.rows], device=x.device)
        return torch.cat(outputs)[order.argsort()], StateCache(parts, length)

    @staticmethod
    def _reorder_cache(past: StateCache, beam_idx: Tensor) -> StateCache:
        return past.select(beam_idx)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        # the model's own parts came initialised; others are an embedding or a head of another size
        if not any(module is own for _, own in self.named_modules()):
            nn.init.normal_(module.get_parameter("weight"), std=0.02)

    def get_input_embeddings(self) -> nn.Module:
        """The embedding."""
        return self.embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.embedding = value

    def get_output_embeddings(self) -> nn.Module:
        """The head."""
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the head."""
        self.head = new_embeddings

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        """Open a run folder, or what transformers finds by a name.

        Without `dtype` each weight of a run folder keeps the dtype that it was saved in.

        Raises:
            ValueError: the weights are damaged, or are not those of the configuration.
        """
        wanted = kwargs.pop("output_loading_info", False)
        weights = Path(str(pretrained_model_name_or_path), checkpoint.WEIGHTS)
        saved = checkpoint.read_tensors(weights)[0] if weights.is_file() else {}
        kinds = {x.dtype for x in saved.values() if x.is_floating_point()}
        # transformers would load all in one dtype: that must be the widest, to lose nothing
        each = len(kinds) > 1 and kwargs.get("dtype", kwargs.get("torch_dtype")) in (None, "auto")
        if each:
            kwargs = kwargs | {"dtype": functools.reduce(torch.promote_types, kinds)}
            kwargs.pop("torch_dtype", None)
        loaded: Any = super().from_pretrained(
            pretrained_model_name_or_path, *args, output_loading_info=True, **kwargs
        )
        model, found = loaded
        if each:
            match_dtypes(model, saved)
        if model.generation_config.pad_token_id is None:
            # made anew, for a run that has no generation_config.json
            model.generation_config.pad_token_id = model.config.vocab_size
        for kind, what in (("missing_keys", "it lacks"), ("unexpected_keys", "no part is named")):
            if found[kind]:
                name = min(found[kind])
                raise ValueError(f"{weights} does not fit its configuration: {what} {name}")
        return (model, found) if wanted else model

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a run folder that `minrnn.load` opens too: one file of weights, with a checksum.

        Args:
            save_directory: made if missing; a model that is there already is replaced.
            is_main_process: only that of several processes writes.
            state_dict: the weights, e.g. gathered from several processes; None for the model's.
            push_to_hub: must be False; `model.push_to_hub(name)` does it.
            kwargs: not used; there is one file, however large.

        Raises:
            SaveError: the folder cannot be written to, or the disk is full.
            ValueError: a training of minrnn has its run in the folder.
        """
        if push_to_hub:
            raise ValueError("`push_to_hub` must be False, got True; call model.push_to_hub(name)")
        if not is_main_process:
            return
        config = self.config
        config.dtype, config.architectures = self.dtype, [type(self).__name__]
        notes: dict[str, Any] = {"model": config.model}
        if config.tokenizer is not None:
            size = tokenizers.from_json(config.tokenizer).vocab_size
            # a model that was given more symbols has none for what they are
            notes |= {"tokenizer": config.tokenizer} if size == config.vocab_size else {}
        tensors = dict(self.state_dict() if state_dict is None else state_dict)
        if config.tie_word_embeddings:
            tensors["head.weight"] = tensors["embedding.weight"].clone()
            notes["tied"] = [["embedding.weight", "head.weight"]]
        folder = checkpoint.make_folder(save_directory)
        # the weights first: they are all that `minrnn.load` reads
        checkpoint.write_tensors(folder / checkpoint.WEIGHTS, tensors, notes)
        checkpoint.write_config(folder, json.loads(config.to_json_string()))
        self.generation_config.save_pretrained(folder)


def _spans(mask: Tensor | None, x: Tensor) -> list[Span] | None:
    """Where the symbols of each row are, by the last T columns of `mask`; None for everywhere."""
    if mask is None:
        return None
    B, T, _ = x.shape
    if mask.dim() != 2 or mask.shape[0] != B or mask.shape[1] < T:
        raise ValueError(
            f"`attention_mask` must have shape (B, T) = ({B}, {T}), got {tuple(mask.shape)}"
        )
    seen = mask[:, -T:].bool().cpu()
    if seen.all():
        return None
    # the first of the largest is the first symbol, from the left and from the right
    starts = seen.int().argmax(1)
    stops = T - seen.int().flip(1).argmax(1)
    stops = torch.where(seen.any(1), stops, starts)
    holes = (stops - starts) != seen.sum(1)
    if holes.any():
        raise ValueError(
            "`attention_mask` must be ones without a gap in each row, got "
            f"{seen[holes.int().argmax()].int().tolist()}"
        )
    return list(zip(starts.tolist(), stops.tolist(), strict=True))


def _turned(x: Tensor, steps: Tensor) -> Tensor:
    """x (B, T, width) with step t of a row taken from `steps` (B, T), counted round the end."""
    steps = steps % x.shape[1]
    return x.gather(1, steps[:, :, None].expand_as(x))
