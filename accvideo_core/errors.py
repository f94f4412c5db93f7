"""Errors a user may meet. Each message says what is wrong, with what value, and what to do about it."""

import sys


class AccVideoError(Exception):
    """Base of every error meant for a user; the command line prints it in one line and exits with `exit_code`."""

    exit_code = 1


class InvalidValueError(AccVideoError, ValueError):
    """An argument outside what is possible: a negative shift, 0 steps, a size that is no multiple of 16."""

    exit_code = 2


class CheckpointError(AccVideoError):
    """A weight file that is missing, damaged, of another model, or does not fit the network."""


class LoraError(AccVideoError):
    """A LoRA file that is missing, damaged, of another model, or says something about it that is not understood."""


class SynVidError(AccVideoError):
    """A trajectory dataset that is missing, damaged or made in another way, or a trajectory that must not go into it."""


class TrainingError(AccVideoError):
    """A training that cannot go on: a gradient that is no number, memory that does not suffice, a run it does not belong to."""


class PromptError(AccVideoError, ValueError):
    """A prompt that a text encoder cannot take, or a prompt file that cannot be read."""


class OutputError(AccVideoError, OSError):
    """Something could not be written; nothing half-written is left behind."""


class KernelError(AccVideoError):
    """A compute kernel that fails or gives wrong results on this device; it is refused instead of used."""


class MissingExtraError(AccVideoError, ImportError):
    """An optional package is needed; the message says how to install it here, and the extra of ours that names it."""

    def __init__(self, wanted: str, package: str, extra: str, otherwise: str = "") -> None:
        command = f"{sys.executable} -m pip install {package}"
        super().__init__(f"{wanted} the {package} package; install it: {command} (the extra accvideo[{extra}]){otherwise}")


class AccVideoWarning(UserWarning):
    """Something was changed, dropped or guessed, and the result differs for it."""
