"""Folders for results: made if need be, and one that belongs to a run, which no other command overwrites."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rcu_ops.cli_errors import UserError
from rcu_ops.report import write_json

SETTINGS = "settings.json"


def make_folder(path: Path, option: str = "--out") -> None:
    """Make a folder for results, and those around it, unless it is there.

    Args:
        path: the folder.
        option: what the user gave it as, for the message.

    Raises:
        UserError: it cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be made: {error.strerror or error}") from error


def claim_folder(out: Path, identity: Mapping[str, Any], what: str) -> bool:
    """Make ``out`` the folder of the run that ``identity`` (plain JSON values) describes; True if it was already.

    Args:
        out: the folder, made if need be.
        identity: everything the results depend on.
        what: what the folder holds, with its article, for the message ("an evaluation").

    Raises:
        UserError: it holds another run, or cannot be written.
    """
    settings = out / SETTINGS
    if settings.is_file():
        try:
            held = json.loads(settings.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(f"{settings}: cannot be read: {error}") from error
        differing = [key for key in sorted({*held, *identity}) if held.get(key) != identity.get(key)]
        if differing:
            raise UserError(
                f"--out: {out} holds {what} with another {' and '.join(differing)}; give another folder, or "
                "--overwrite to replace it"
            )
        return True
    make_folder(out)
    try:
        write_json(settings, identity, indent=2)
    except OSError as error:
        raise UserError(f"--out: {out} cannot be written: {error.strerror or error}") from error
    return False
