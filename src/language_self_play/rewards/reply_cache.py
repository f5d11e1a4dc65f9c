"""A judge's replies on disk, so that none is paid for twice."""

from __future__ import annotations

import os
import sqlite3
from pathlib import Path

from language_self_play.errors import InputFileError, ServiceError

LOCKED_S = 30.0  # how long another run may hold the cache


def default_cache() -> Path:
    """judge.sqlite in the user's cache folder, as the XDG base directory specification has it."""
    named = os.environ.get("XDG_CACHE_HOME", "")
    # The specification has relative paths ignored.
    folder = Path(named) if Path(named).is_absolute() else Path("~/.cache").expanduser()
    return folder / "language-self-play" / "judge.sqlite"


class ReplyCache:
    """Replies by the hash of their request, in an SQLite file that several runs may share."""

    def __init__(self, path: Path, setting: str):
        self.path = path.absolute()
        self.setting = setting
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # The requests' thread writes while the one that made the connection waits for it.
            self.connection = sqlite3.connect(
                self.path, timeout=LOCKED_S, isolation_level=None, check_same_thread=False
            )
        except (OSError, ValueError, sqlite3.Error) as error:
            raise InputFileError(self._message(error)) from None
        try:
            self._check()
        except sqlite3.Error as error:
            self.connection.close()
            raise InputFileError(self._message(error)) from None

    def _check(self) -> None:
        run = self.connection.execute
        (damage,) = run("PRAGMA quick_check(1)").fetchone()
        if damage != "ok":
            raise sqlite3.DatabaseError(damage)
        tables = {name for (name,) in run("SELECT name FROM sqlite_master WHERE type = 'table'")}
        if tables and "replies" not in tables:
            raise sqlite3.DatabaseError("it is another program's database")
        run("CREATE TABLE IF NOT EXISTS replies (request TEXT PRIMARY KEY, reply TEXT NOT NULL)")
        # Changes nothing, and fails if nothing can be written or the columns are others.
        run("DELETE FROM replies WHERE request = '' AND reply = ''")

    def get(self, request: str) -> str | None:
        """The reply, or None. Raises ServiceError if the file has become unreadable."""
        try:
            row = self.connection.execute(
                "SELECT reply FROM replies WHERE request = ?", (request,)
            ).fetchone()
        except sqlite3.Error as error:
            raise ServiceError(self._message(error)) from None
        return None if row is None else str(row[0])

    def put(self, request: str, reply: str) -> None:
        """Keep a reply, on disk when this returns. Raises ServiceError if it can't be written."""
        try:
            self.connection.execute(
                "INSERT OR REPLACE INTO replies VALUES (?, ?)", (request, reply)
            )
        except sqlite3.Error as error:
            raise ServiceError(self._message(error)) from None

    def close(self) -> None:
        self.connection.close()

    def _message(self, error: Exception) -> str:
        reason = getattr(error, "strerror", None) or error
        return (
            f"{self.setting} = {os.fspath(self.path)!r}: can't be used as a cache of replies"
            f" ({reason}); move it away, or name another file"
        )
