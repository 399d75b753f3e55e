"""The settings of training on preferences. Nothing here imports MindSpore."""

from dataclasses import dataclass, fields

LOSSES = ("dpo", "ipo", "kto", "simpo", "reward")  # of prefer.loss
NO_REFERENCE = ("simpo", "reward")


@dataclass(frozen=True)
class Settings:
    """The keys of config.prefer, as plain values that a graph may close over."""

    loss: str
    beta: float
    margin: float
    label_smoothing: float
    length_normalised: bool
    desirable_weight: float
    undesirable_weight: float
    row_pairs: int


def settings(config):
    """Returns the Settings of config.prefer."""
    return Settings(**{field.name: config.prefer[field.name] for field in fields(Settings)})


def needs_reference(config):
    """Whether the loss compares with a reference model."""
    return bool(config.prefer.loss) and config.prefer.loss not in NO_REFERENCE


def caches_reference(config):
    """Whether the log-probabilities of the reference model come from a cache. With LoRA, the frozen base computes them in the step."""
    return needs_reference(config) and not config.lora.rank
