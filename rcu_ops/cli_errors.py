"""The one exception a command raises for input it cannot use."""

from __future__ import annotations


class UserError(Exception):
    """Bad input to a command: one line that says what was expected and what was got.

    The command line prints it as ``rcu-ops: error: …`` and exits with code 2, without a traceback.
    """
