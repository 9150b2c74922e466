"""Configurations refuse what their fields are not declared to hold."""

from dataclasses import replace

import pytest

from minrnn.models import ModelConfig
from minrnn.recipes import TextConfig
from minrnn.sampling import Sampling
from minrnn.train_config import TrainConfig


@pytest.mark.parametrize(
    ("config", "field", "value", "error", "message"),
    [
        (TrainConfig(), "steps", 6.5, TypeError, r"`steps` must be int, got 6\.5"),
        (TrainConfig(), "steps", "6", TypeError, "`steps` must be int, got '6'"),
        (TrainConfig(), "seed", True, TypeError, "`seed` must be int, got True"),
        (TrainConfig(), "seed", 1 << 63, ValueError, r"`seed` must be below 2\^63"),
        (TrainConfig(), "learning_rate", float("inf"), ValueError, "must be finite, got inf"),
        (TrainConfig(), "precision", "bf32", ValueError, "must be one of 'no', 'bf16', 'fp16'"),
        (ModelConfig(), "normalized", 1, TypeError, "`normalized` must be bool, got 1"),
        (ModelConfig(), "forget_bias", 1.0, ValueError, "belong to the mixer 'minlstm'"),
        (ModelConfig(), "longest_memory", -1, ValueError, "`longest_memory` must be >= 0, got -1"),
        (
            ModelConfig(mixer="gru"),
            "longest_memory",
            9,
            ValueError,
            "'mingru' and 'minlstm', got 'gru'",
        ),
        (TextConfig(), "data", "x", TypeError, "`data` must be Path or None, got 'x'"),
        (TextConfig(), "valid_fraction", 1.0, ValueError, r"must be in \(0, 1\), got 1\.0"),
        (TextConfig(), "context", 0, ValueError, "`context` must be >= 1, got 0"),
        (TextConfig(), "model", ModelConfig(5), ValueError, "`vocab_size` is that of the text"),
        (Sampling(), "seed", -1, ValueError, r"`seed` must be in \[0, 2\^63\), got -1"),
    ],
)
def test_wrong_fields_are_named(config, field, value, error, message) -> None:
    with pytest.raises(error, match=message):
        replace(config, **{field: value})


def test_an_int_will_do_for_a_float() -> None:
    assert TrainConfig(learning_rate=1).learning_rate == 1
    assert Sampling(temperature=0).temperature == 0
