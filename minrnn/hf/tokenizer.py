"""Our tokenizers as fast tokenizers of transformers: the same ids for every text."""

import contextlib
import copy
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers as library
from transformers import PreTrainedTokenizerFast

from minrnn.data import tokenizers
from minrnn.data.bpe import BPE, byte_level, byte_symbols
from minrnn.data.tokenizers import Bytes, Tokenizer

_PAD = "<pad>"


class MinRNNTokenizer(PreTrainedTokenizerFast):
    """A tokenizer of minrnn for transformers.

    Padding goes to the left, and its id is V, the first after those of the tokens, which
    `MinRNNForCausalLM` never reads. No text is read as padding, "<pad>" included; tokens that are
    added, special or not, are read in texts.

    Args:
        tokenizer: `Characters`, `Bytes` or `BPE`; `from_pretrained` takes a run's.

    Raises:
        ValueError: the run was saved without a tokenizer, or a text holds an unknown character.

    Example:
        >>> from minrnn import Characters
        >>> fast = MinRNNTokenizer(Characters("abc"))
        >>> fast(["cab", "a"])["input_ids"], fast.decode([2, 0, 1])
        ([[2, 0, 1], [0]], 'cab')
        >>> fast(["cab", "a"], padding=True)["input_ids"]
        [[2, 0, 1], [3, 3, 0]]
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "run_file": "config.json"}
    model_input_names = ["input_ids", "attention_mask"]
    # the name of padding while a text is read that holds it
    _hidden: str | None = None

    def __init__(
        self, tokenizer: Tokenizer | None = None, *, run_file: str | None = None, **kwargs: Any
    ) -> None:
        if tokenizer is None and not kwargs.get("tokenizer_file"):
            tokenizer = _of_run(run_file)
        defaults = {"pad_token": _PAD, "padding_side": "left"}
        if tokenizer is not None:
            fast = copy.deepcopy(_fast(tokenizer))
            # before other special tokens, so that its id is V
            fast.add_special_tokens([str(kwargs.get("pad_token", _PAD))])
            kwargs["tokenizer_object"] = fast
        super().__init__(**{**defaults, "clean_up_tokenization_spaces": False, **kwargs})

    @classmethod
    def convert_to_native_format(
        cls, trust_remote_code: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """What `from_pretrained` found, as it is: the constructor reads it."""
        return kwargs

    def _encode_plus(self, text: Any, text_pair: Any = None, *args: Any, **kwargs: Any) -> Any:
        try:
            with self._padding_hidden(text, text_pair):
                return super()._encode_plus(text, text_pair, *args, **kwargs)
        except Exception as error:
            # tokenizers raises nothing more special
            if "[UNK]" not in str(error):
                raise
            known, texts = self.get_vocab(), list(_strings((text, text_pair)))
            # added tokens are read as a whole, unless `split_special_tokens` says otherwise
            added = [x for x, number in self.get_added_vocab().items() if number > self.vocab_size]
            without = [re.sub("|".join(map(re.escape, added)), "", row) for row in texts]
            unknown = next(c for row in [*without, *texts] for c in row if c not in known)
            raise ValueError(
                f"character {unknown!r} (U+{ord(unknown):04X}) is not among the "
                f"{self.vocab_size} characters that this model knows"
            ) from error

    @contextlib.contextmanager
    def _padding_hidden(self, *texts: Any) -> Iterator[None]:
        """Read the texts with a name of padding that is in none of them."""
        kept: Any = self._tokenizer
        added = kept.get_added_tokens_decoder()
        name = added[self.vocab_size].content if self.vocab_size in added else ""
        roles = [x for role, x in self.special_tokens_map.items() if role != "pad_token"]
        rows = list(_strings(texts))
        if not name or name in roles or not any(name in row for row in rows):
            yield
            return
        hidden_name = name
        while any(name in row for row in rows) or name in kept.get_vocab():
            name += ">"
        hidden = library.Tokenizer(kept.model)
        for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
            setattr(hidden, part, getattr(kept, part))
        hidden.encode_special_tokens = kept.encode_special_tokens
        # in the order of their ids, so that they get the same
        for number, token in sorted(added.items()):
            token = library.AddedToken(name, special=True) if number == self.vocab_size else token
            (hidden.add_special_tokens if token.special else hidden.add_tokens)([token])
        self._tokenizer, self._hidden = hidden, hidden_name
        try:
            yield
        finally:
            self._tokenizer, self._hidden = kept, None

    def _convert_token_to_id_with_added_voc(self, token: str) -> int:
        if token == self._hidden:
            return self.vocab_size
        return super()._convert_token_to_id_with_added_voc(token)


def _strings(texts: Any) -> Iterator[str]:
    """All strings in nested lists and tuples."""
    if isinstance(texts, str):
        yield texts
    elif texts is not None:
        for part in texts:
            yield from _strings(part)


def _of_run(path: str | None) -> Tokenizer:
    saved = json.loads(Path(path).read_text(encoding="utf-8")) if path else {}
    if saved.get("tokenizer") is None:
        raise ValueError(f"`tokenizer` must be given: {path or 'no run'} has none")
    return tokenizers.from_json(saved["tokenizer"])


def _fast(tokenizer: Tokenizer) -> library.Tokenizer:
    if isinstance(tokenizer, BPE):
        return tokenizer.fast
    if isinstance(tokenizer, Bytes):
        return byte_level({symbol: i for i, symbol in enumerate(byte_symbols())}, [], words=False)
    ids = {character: i for i, character in enumerate(tokenizer.vocabulary)}
    # no unknown symbol is among them, so that an unknown character is an error
    fast = library.Tokenizer(library.models.WordLevel(ids, unk_token="[UNK]"))
    fast.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"[\s\S]"), "isolated")
    fast.decoder = library.decoders.Fuse()
    return fast
