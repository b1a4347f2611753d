"""Models and corpora of the testbed under short names."""

from collections.abc import Mapping

from pipeline.specs import PretrainSpec
from pipeline.testbed.world import PRETRAINING_MIXTURE

PRETRAIN_PRESETS: Mapping[str, PretrainSpec] = {
    "tiny": PretrainSpec(
        mixture=dict(PRETRAINING_MIXTURE),
        vocab_size=1024,
        hidden_size=64,
        intermediate_size=192,
        num_layers=2,
        num_key_value_heads=1,
        batch_size=8,
        steps=400,
        learning_rate=1e-2,
    ),
    "small": PretrainSpec(
        mixture=dict(PRETRAINING_MIXTURE), batch_size=16, steps=700, learning_rate=5e-3
    ),
}
"""`tiny`, for tests, trains in seconds; `small` in about a minute on two cores."""
