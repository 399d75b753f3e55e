"""The settings of training on preferences and on rewards. Nothing here imports MindSpore."""

from dataclasses import dataclass, fields

LOSSES = ("dpo", "ipo", "kto", "simpo", "reward")  # of prefer.loss
NO_REFERENCE = ("simpo", "reward")
RL_LOSSES = ("grpo", "dapo", "dr_grpo", "gspo")  # of rl.loss


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


@dataclass(frozen=True)
class RLSettings:
    """The keys of config.rl that a graph needs, as plain values that it may close over."""

    loss: str
    max_new_tokens: int
    clip_low: float
    clip_high: float
    kl_coef: float


def settings(config):
    """Returns the Settings of config.prefer."""
    return Settings(**{field.name: config.prefer[field.name] for field in fields(Settings)})


def rl_settings(config):
    """Returns the RLSettings of config.rl."""
    return RLSettings(**{field.name: config.rl[field.name] for field in fields(RLSettings)})


def needs_reference(config):
    """Whether the loss of preferences compares with a reference model."""
    return bool(config.prefer.loss) and config.prefer.loss not in NO_REFERENCE


def caches_reference(config):
    """Whether the log-probabilities of the reference model come from a cache. With LoRA, the frozen base computes them in the step."""
    return needs_reference(config) and not config.lora.rank


def keeps_reference(config):
    """Whether a run on rewards keeps the weights that training starts from beside those that train, as its reference model."""
    return bool(config.rl.loss) and config.rl.kl_coef > 0 and not config.lora.rank


def has_reference(config):
    """Whether a run needs the model that it started from beside the one that trains, so that its checkpoints note which one that is."""
    return caches_reference(config) or keeps_reference(config)
