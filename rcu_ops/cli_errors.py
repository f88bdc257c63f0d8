"""The exceptions that a command raises for the command line to answer."""

from __future__ import annotations


class UserError(Exception):
    """Bad input to a command: one line that says what was expected and what was got.

    The command line prints it as ``rcu-ops: error: …`` and exits with code 2, without a traceback.
    """


class StoppedError(Exception):
    """A signal ended a command, and what was done so far is kept; the message says how to go on.

    The command line prints it as ``rcu-ops: …`` and exits with 128 and the signal's number.
    """

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.number = number
