"""Our errors and the exit code each ends in. Anything else that escapes is a bug of ours and keeps its traceback.

ReasonerError
├── InputError           2   what the user handed in is wrong: one line that says what, where and what to do
│   ├── ConfigError          a key, value, group or conf
│   ├── DataError            a file, row or column (file:line)
│   ├── RewardError          a reward function that can't be found, called or trusted
│   ├── ModelError           a model, tokenizer or template
│   ├── RunFolderError       the output folder: not writable, locked, full, nothing to resume
│   ├── OutOfMemory          one sequence alone, or the micro-batch that is asked for, does not fit
│   └── MissingExtra         an optional package that is not installed, with the command that installs it
├── GuardTripped         3   a guard stopped the run; its checkpoint is kept
└── Interrupted        130   Ctrl-C, or 143 on SIGTERM; the checkpoint is kept
"""


class ReasonerError(Exception):
    """Base of every error that ends a run in one line instead of a traceback."""

    exit_code = 2


class InputError(ReasonerError):
    """What the user handed in is wrong."""


class ConfigError(InputError):
    """A conf, group, key or value is wrong."""


class DataError(InputError):
    """A data file, row or column is wrong; the message names file:line."""


class RewardError(InputError):
    """A reward function can't be found, called or trusted."""


class ModelError(InputError):
    """A model, tokenizer or template can't serve."""


class RunFolderError(InputError):
    """The output folder is not writable, locked, full, or has nothing to resume from."""


class OutOfMemory(InputError):
    """Training does not fit: a single sequence, so that nothing is left to halve, or the rehearsed micro-batch."""


class MissingExtra(InputError):
    """An optional package is not installed."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs the package '{package}': pip install -e '.[{extra}]'")


class GuardTripped(ReasonerError):
    """A guard stopped the run; the checkpoint before it is kept."""

    exit_code = 3


class Interrupted(ReasonerError):
    """A signal stopped the run after its checkpoint was written; `exit_code` is 128 + the signal's number."""

    def __init__(self, signal_number: int, message: str):
        super().__init__(message)
        self.exit_code = 128 + signal_number
