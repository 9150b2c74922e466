"""Our tokenizers as fast tokenizers of transformers: the same ids for every text."""

import json
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

    Padding goes to the left, and its id is V, the first that is no symbol; `MinRNNForCausalLM`
    knows it. No text is read as padding, "<pad>" included.

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

    def __init__(
        self, tokenizer: Tokenizer | None = None, *, run_file: str | None = None, **kwargs: Any
    ) -> None:
        if tokenizer is None and not kwargs.get("tokenizer_file"):
            tokenizer = _of_run(run_file)
        if tokenizer is not None:
            kwargs["tokenizer_object"] = _fast(tokenizer)
        defaults = {"pad_token": _PAD, "padding_side": "left", "split_special_tokens": True}
        super().__init__(**{**defaults, "clean_up_tokenization_spaces": False, **kwargs})

    @classmethod
    def convert_to_native_format(
        cls, trust_remote_code: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """What `from_pretrained` found, as it is: the constructor reads it."""
        return kwargs

    def _encode_plus(self, text: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return super()._encode_plus(text, *args, **kwargs)
        except Exception as error:
            # tokenizers raises nothing more special
            if "[UNK]" not in str(error):
                raise
            known = self.get_vocab()
            texts = [text] if isinstance(text, str) else text
            unknown = next(c for row in texts for c in "".join(row) if c not in known)
            raise ValueError(
                f"character {unknown!r} (U+{ord(unknown):04X}) is not among the "
                f"{self.vocab_size} characters that this model knows"
            ) from error


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
