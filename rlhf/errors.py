"""The error tree. Every error says: the setting, its value, why it cannot work, what to do.

RLHFError              refused: exit code 2, the message alone, no traceback
├── ConfigError        a setting, or a combination of settings (guards included)
├── DataError          a file or a row of data
├── RegistryError      a run: missing, unfinished, changed, locked, or not matching its parents
└── ShapeError         tensors that do not fit together (a bug in the caller)
StoppedByGuard         a run-time check stopped training: exit code 3, last good checkpoint kept
"""


class RLHFError(Exception):
    """Something a person can put right; the message says how."""


class ConfigError(RLHFError):
    """A setting that cannot work, found before any weight is loaded."""


class DataError(RLHFError):
    """A data file or row that would be trained on wrongly; names file, line and field."""


class RegistryError(RLHFError):
    """A run that is missing, unfinished, damaged, in use, or does not match its parents."""


class ShapeError(RLHFError):
    """Tensors whose shapes do not fit together."""


class StoppedByGuard(Exception):
    """A run-time check (a step-0 proof, a NaN) ended training; the process exits with 3."""
