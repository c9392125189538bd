"""Errors a user can act on.

    DinoscopeError
    ├── ConfigError        a key, a value or a table row of the configuration
    ├── SlideError         a slide that cannot be opened, measured or tiled
    ├── ManifestError      a tile manifest that is missing, damaged or of the wrong kind
    ├── WeightsError       a model file that cannot be read or does not fit
    ├── CheckpointError    a training checkpoint that is missing, incomplete or damaged
    ├── RunError           a training run that must not start or cannot go on
    │   ├── SealError      settings differ from those the run was started with
    │   ├── LockError      another process is training in the same folder
    │   └── StoppedError   a training run that saved its state and is to be started again
    ├── FeaturesError      a feature file that is damaged or does not fit the others
    └── EvaluationError    labels, cases or splits by which nothing can be measured

Each message is one sentence that names the slide, run, file or key, the value found, what was wanted and what to do.
Mistakes of our own are `assert`s, not these.
"""

__all__ = [
    "CheckpointError",
    "ConfigError",
    "DinoscopeError",
    "EvaluationError",
    "FeaturesError",
    "LockError",
    "ManifestError",
    "RunError",
    "SealError",
    "SlideError",
    "StoppedError",
    "WeightsError",
]


class DinoscopeError(ValueError):
    """Base of every error that is the input's doing, not ours."""

    exit_status = 1  # of the program that ends with it


class ConfigError(DinoscopeError):
    """A key, a value or a table row of the configuration is wrong."""


class SlideError(DinoscopeError):
    """A slide cannot be opened, measured or tiled."""


class ManifestError(DinoscopeError):
    """A tile manifest is missing, damaged or of the wrong kind."""


class WeightsError(DinoscopeError):
    """A model file cannot be read or does not fit the model."""


class CheckpointError(DinoscopeError):
    """A training checkpoint is missing, incomplete or damaged."""


class RunError(DinoscopeError):
    """A training run must not start or cannot go on."""


class SealError(RunError):
    """Settings differ from those that the run was started with."""


class LockError(RunError):
    """Another process is training in the same folder."""


class StoppedError(RunError):
    """A training run saved its state before its end, as it was asked to; it is to be started again."""

    exit_status = 75  # EX_TEMPFAIL of sysexits.h: try again later


class FeaturesError(DinoscopeError):
    """A feature file is damaged or does not fit the others."""


class EvaluationError(DinoscopeError):
    """Labels, cases or splits are such that nothing can be measured by them."""
