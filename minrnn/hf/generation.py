"""`generate` over states in the place of keys and values, with a padding id outside of V."""

from typing import Any

from torch import Tensor
from transformers import GenerationMixin

from minrnn.hf.cache import StateCache


class StateGenerationMixin(GenerationMixin):
    """What transformers' `generate` asks of a model with a state."""

    @staticmethod
    def _reorder_cache(past: StateCache, beam_idx: Tensor) -> StateCache:
        return past.select(beam_idx)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def compute_transition_scores(
        self,
        sequences: Tensor,
        scores: tuple[Tensor, ...],
        beam_indices: Tensor | None = None,
        normalize_logits: bool = False,
    ) -> Tensor:
        """The scores of the tokens that were generated, 0 for padding after the end of a row.

        Args:
            sequences: (B, T), what `generate` returned.
            scores: its `scores` or `logits`, (B * num_beams, V) for each new token.
            beam_indices: its `beam_indices`, of beam search.
            normalize_logits: log-softmax them first.

        Returns:
            (B, new tokens).
        """
        # padding has no score: its id is the first after those of the tokens
        padding = sequences >= scores[0].shape[-1]
        known = sequences.masked_fill(padding, 0)
        mixin: Any = super()
        found = mixin.compute_transition_scores(known, scores, beam_indices, normalize_logits)
        return found.masked_fill(padding[:, -found.shape[1] :], 0.0)
