"""`minrnn.LanguageModel` for transformers: `generate`, `Trainer` and pipelines take it."""

import functools
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from minrnn import checkpoint
from minrnn.data import tokenizers
from minrnn.hf import adapters
from minrnn.hf.cache import Part, StateCache
from minrnn.hf.config import MinRNNConfig
from minrnn.hf.generation import StateGenerationMixin
from minrnn.hf.padding import IGNORED, Tokens, find_tokens, group, model_inputs, spread
from minrnn.models import LanguageModel, ModelConfig
from minrnn.plain import match_dtypes
from minrnn.state import State


@dataclass
class MinRNNOutput(ModelOutput):
    """What a call of `MinRNNForCausalLM` gives."""

    loss: Tensor | None = None
    """With labels: the mean cross-entropy of the next symbol, in nats."""
    logits: Tensor | None = None
    """(B, T, V), or as many steps as `logits_to_keep` says."""
    past_key_values: StateCache | None = None
    """With `use_cache`: the state after the last symbol of each row."""


class MinRNNForCausalLM(PreTrainedModel, StateGenerationMixin):
    """A language model of minrnn, over any mixer, for transformers.

    Its folders are run folders: `minrnn.load` opens what `save_pretrained` writes, and
    `from_pretrained` opens what a training or `minrnn.save` wrote, with equal names of tensors.
    Padding is never read, wherever it is: a row gives what it gives alone. Assisted generation is
    refused, as a state cannot go back.

    Args:
        config: the shape of the model, `vocab_size` >= 1.

    Raises:
        ValueError: `vocab_size` is 0; on a call, shapes do not fit.
        TypeError: on a call, `past_key_values` is another cache.

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
    # assisted generation is refused: a state cannot go back
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

    def _get_name(self) -> str:
        # `Trainer` knows a causal language model by this; FSDP and a subclass give it another class
        return MinRNNForCausalLM.__name__

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: StateCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MinRNNOutput:
        """Read tokens after those that `past_key_values` has read.

        Args:
            input_ids: (B, T), T >= 1; the id V is padding whatever the mask says.
            attention_mask: (B, T) or more, of which the last T count: 0 for padding, anywhere.
            position_ids: (B, T) or (1, T): a token at position 0 starts a sequence from an empty
                state, so that a row can hold several; the other positions are not used.
            past_key_values: what an earlier call returned; None at the start.
            inputs_embeds: (B, T, width) in the place of `input_ids`.
            labels: (B, T), each compared with the prediction of the token before it. Ignored are
                -100, V, those of padding and those of the first token of a sequence: the loss is
                that of the sequences without padding.
            use_cache: return the states; None does so unless there are labels or in training.
            logits_to_keep: how many last steps have logits, 0 for all; or (K,), which ones. The
                loss is over all steps in any case.
            kwargs: `num_items_in_batch`, labels that `Trainer` counts in an update; `shift_labels`
                (B, T), the labels of the step after each.
        """
        for name in ("output_hidden_states", "output_attentions"):
            if kwargs.get(name):
                raise ValueError(f"`{name}` must be False: the model has logits and a state")
        for name in ("seq_idx", "cu_seq_lens_q"):
            if kwargs.get(name) is not None and position_ids is None:
                raise ValueError(f"`{name}` must come with `position_ids`, which start sequences")
        inputs = model_inputs(input_ids, inputs_embeds)
        if past_key_values is not None:
            self._check_past(past_key_values, inputs.shape[0])
        pad_id = self.config.vocab_size
        # all that depends on values is found before the first layer, for torch.compile
        tokens = find_tokens(attention_mask, input_ids, position_ids, inputs, pad_id)
        packed = tokens is not None and tokens.is_packed
        if packed and (use_cache or past_key_values is not None):
            name = "use_cache" if use_cache else "past_key_values"
            raise ValueError(f"`{name}` must be None where `position_ids` start several sequences")
        if use_cache is None:
            use_cache = labels is None and not self.training and not packed
        # what is recomputed in the backward pass gives no state
        use_cache = use_cache and not (self.gradient_checkpointing and self.training)
        # the id of padding has no row in the embedding
        x = inputs if input_ids is None else self.embedding(inputs.masked_fill(inputs == pad_id, 0))
        if use_cache or past_key_values is not None:
            y, cache = self._read_on(x, tokens, past_key_values)
        else:
            y, cache = self._read(x, tokens), None
        steps = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        if labels is None and kwargs.get("shift_labels") is None:
            return MinRNNOutput(None, self.head(self.norm(y[:, steps])), cache)
        logits = self.head(self.norm(y))
        loss = self._loss(logits, labels, tokens, **kwargs)
        return MinRNNOutput(loss, logits[:, steps], cache if use_cache else None)

    def _loss(
        self,
        logits: Tensor,
        labels: Tensor | None,
        tokens: Tokens | None,
        num_items_in_batch: Tensor | int | None = None,
        shift_labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Of logits (B, T, V), without predictions from nothing or of padding."""
        name, given = ("labels", labels) if shift_labels is None else ("shift_labels", shift_labels)
        assert given is not None
        if given.shape != logits.shape[:2]:
            B, T, size = logits.shape
            raise ValueError(f"`{name}` must have shape (B, T) = ({B}, {T}), got {(*given.shape,)}")
        size = self.config.vocab_size
        given = given.to(logits.device)
        kept = given.masked_fill(given == size, IGNORED)
        if shift_labels is not None:
            kept = kept if tokens is None else kept.masked_fill(tokens.read == 0, IGNORED)
            labels = kwargs["shift_labels"] = kept
        else:
            labels = kept if tokens is None else tokens.targets(kept)
            given, kept = given[:, 1:], labels[:, 1:]
        if num_items_in_batch is not None:
            # Trainer counts all of `given`: its sum over `num_items_in_batch` becomes the mean
            # over `kept`, with the weight that Trainer gives this batch in its update
            counts = [x.ne(IGNORED).sum().clamp(min=1) for x in (kept, given)]
            items = torch.as_tensor(num_items_in_batch, device=logits.device)
            kwargs["num_items_in_batch"] = items * (counts[0] / counts[1])
        return self.loss_function(logits=logits, labels=labels, vocab_size=size, **kwargs)

    @staticmethod
    def _check_past(past: StateCache, B: int) -> None:
        if not isinstance(past, StateCache):
            raise TypeError(
                "`past_key_values` must be a StateCache, which an earlier call returned, got "
                f"{type(past).__name__}"
            )
        if past.batch_size != B:
            raise ValueError(f"`past_key_values` must have B = {B} rows, got {past.batch_size}")

    def _read(self, x: Tensor, tokens: Tokens | None) -> Tensor:
        """Run x (B, T, width) from the start, without the states after it."""
        if tokens is not None:
            if not tokens.num_sequences:
                return torch.zeros_like(x)
            # sequences as rows: all padding after them, where no token sees it
            return tokens.scatter(self._read(tokens.gather(x), None))
        for block in self.blocks:
            # (B, T, width)
            x = self._checkpointed(block, x) if self.gradient_checkpointing else block(x)[0]
        return x

    def _checkpointed(self, block: nn.Module, x: Tensor) -> Tensor:
        if not self.training:
            return block(x)[0]
        return self._gradient_checkpointing_func(lambda x: block(x)[0], x)

    def _read_on(
        self, x: Tensor, tokens: Tokens | None, past: StateCache | None
    ) -> tuple[Tensor, StateCache]:
        """Run x (B, T, width) after `past`; rows with equally many tokens go together."""
        B, T, _ = x.shape
        before: list[tuple[list[int], State | None]] = [(list(range(B)), None)]
        if past is not None:
            before = [(part.rows, part.state) for part in past.parts]
        length = T + (0 if past is None else past.length)
        if tokens is None and len(before) == 1 and before[0][0] == list(range(B)):
            y, last = self.blocks(x, before[0][1])
            return y, StateCache([Part(before[0][0], last)], length)
        if tokens is None:
            tokens = Tokens(torch.ones(B, T, dtype=torch.bool, device=x.device))
        counts = tokens.read[:, -1].tolist()
        outputs, parts = [], []
        for rows, state in before:
            for count, places in group([counts[row] for row in rows]).items():
                at = [rows[place] for place in places]
                inner = None if state is None else state.select(places)
                # (rows, count, width)
                y = torch.stack([x[row, tokens.seen[row]] for row in at])
                if count:
                    y, inner = self.blocks(y, inner)
                parts.append(Part(at, self.blocks.init_state(len(at)) if inner is None else inner))
                outputs.append(spread(y, tokens.read[at]))
        order = torch.tensor([row for part in parts for row in part.rows], device=x.device)
        return torch.cat(outputs)[order.argsort()], StateCache(parts, length)

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
            ImportError: the folder holds an adapter, and `peft` is not installed.
        """
        wanted = kwargs.pop("output_loading_info", False)
        folder = Path(str(pretrained_model_name_or_path))
        weights, saved = folder / checkpoint.WEIGHTS, {}
        adapted = (folder / checkpoint.ADAPTER_CONFIG).is_file()
        if adapted:
            adapters.require_peft(folder)
        if weights.is_file():
            saved, notes = checkpoint.read_tensors(weights)
            if adapted and "adapter" in notes:
                model, found = cls._with_adapter(folder, saved, notes, *args, **kwargs)
                return (model, found) if wanted else model
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

    @classmethod
    def _with_adapter(
        cls,
        folder: Path,
        tensors: dict[str, Tensor],
        notes: dict[str, Any],
        *args: Any,
        config: MinRNNConfig | None = None,
        adapter_kwargs: object = None,
        adapter_name: str | None = None,
        **kwargs: Any,
    ) -> tuple[Any, Any]:
        # transformers' own way from the adapter's file loses what it does not know, such as the
        # magnitudes of DoRA; the names in `tensors` are those of the model with the adapter
        adapters.check_weights(tensors, ModelConfig(**notes["model"]), adapted=True)
        own = {adapters.plain_name(name): x for name, x in tensors.items()}
        config = MinRNNConfig.from_pretrained(folder) if config is None else config
        with torch.device("meta"):
            names = LanguageModel(config.model_config).state_dict().keys()
        loaded: Any = super().from_pretrained(
            None,
            *args,
            config=config,
            state_dict={name: own[name] for name in names},
            output_loading_info=True,
            **kwargs,
        )
        model, found = loaded
        model.generation_config = GenerationConfig.from_pretrained(folder)
        name = notes["adapter"]
        adapters.add_saved(model, folder, tensors, name)
        return model, found

    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: dict[str, Tensor] | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write a run folder that `minrnn.load` opens too: one file of weights, with a checksum.

        With an adapter (`add_adapter`) its two files in the format of PEFT are written too, beside
        the weights of the model itself; `from_pretrained` opens both, and `minrnn.load` what
        `merged` returns.

        Args:
            save_directory: made if missing; a model that is there already is replaced.
            is_main_process: only that of several processes writes.
            state_dict: the weights, e.g. gathered from several processes; None for the model's.
            push_to_hub: must be False; `model.push_to_hub(name)` does it.
            kwargs: not used; there is one file, however large.

        Raises:
            SaveError: the folder cannot be written to, or the disk is full.
            ValueError: a training of minrnn has its run in the folder; or `state_dict` has not the
                weights of the configuration, such as those of a model inside a PeftModel.
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
        adapted = self._has_adapter()
        adapters.check_weights(tensors, config.model_config, adapted)
        folder = checkpoint.make_folder(save_directory)
        if adapted:
            notes["adapter"] = self.active_adapters()[0]
        # the weights first: they are all that `minrnn.load` reads
        checkpoint.write_tensors(folder / checkpoint.WEIGHTS, tensors, notes)
        checkpoint.write_config(folder, json.loads(config.to_json_string()))
        self.generation_config.save_pretrained(folder)
        if adapted:
            super().save_pretrained(folder, state_dict=tensors)

    def _has_adapter(self) -> bool:
        return getattr(self, "_hf_peft_config_loaded", False)

    def merged(self) -> "MinRNNForCausalLM":
        """A copy whose weights have the active adapter of `add_adapter` added.

        Raises:
            ValueError: there is no adapter.
        """
        if not self._has_adapter():
            raise ValueError("`merged` needs an adapter of `add_adapter`, the model has none")
        return adapters.merged(self)
