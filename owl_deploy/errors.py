"""Errors that owl-deploy raises on bad input or a failed stage.

    OwlDeployError                exit code 1: the work could not be done
    |-- RecipeError               exit code 2: a setting is wrong
    |-- UnsupportedModelError     exit code 1: this model cannot be handled
    |-- GateError                 exit code 3: a result failed a gate
    |   `-- ParityError           the artifact does not compute what the checkpoint computes
    `-- EngineUnavailableError    exit code 4: the engine is not here
        `-- EngineFailedError     the engine started and then failed

Every message says what was wrong, what was found and what to do. Only the command line turns
these into exit codes; a programmer's wrong argument is a plain `ValueError`.
"""

from __future__ import annotations

import reprlib
from typing import Any

# One sentence, whatever was found: a few lines of YAML aliases can stand for gigabytes.
_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 100, 100


def shown(value: Any) -> str:
    """Return an untrusted value as a message can hold it: short, whatever it is."""
    try:
        return _REPR.repr(value)
    except ValueError:  # Python writes no integers of more than 4300 digits
        return "a number beyond all bounds"


class OwlDeployError(Exception):
    """A stage could not do its work; the message says why and what to do."""

    exit_code = 1


class RecipeError(OwlDeployError):
    """A recipe key or a command-line flag has an impossible value."""

    exit_code = 2


class UnsupportedModelError(OwlDeployError):
    """The model is missing, damaged, unsafe to load, or of a kind that is not handled."""


class GateError(OwlDeployError):
    """A result was produced and failed a gate; nothing was left behind."""

    exit_code = 3


class ParityError(GateError):
    """An artifact does not compute what its checkpoint computes."""


class EngineUnavailableError(OwlDeployError):
    """An engine is not installed, or cannot run on this machine."""

    exit_code = 4


class EngineFailedError(EngineUnavailableError):
    """An engine's worker process crashed, hung or reported an error."""
