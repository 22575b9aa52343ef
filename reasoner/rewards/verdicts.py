"""Verdicts that were paid for, kept on disk, so that a rehearsal, a resumed run and a second run don't pay again.

Left out: what was judged, and by which words. A verdict is found by the hash of its whole request alone.
"""

import sqlite3
from pathlib import Path

from reasoner.errors import RewardError


class Verdicts:
    """Scores by the hash of the request that they answer. `path` None: in memory, for as long as this lives.

    Raises RewardError, naming `where`, if the file can't be opened or is none of these. Processes may share a file.
    """

    def __init__(self, path: Path | None, where: str):
        self._said = f"{where}={path}"
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
            # Made in the thread that loads, used in the judge's: never by both at once.
            self._db = sqlite3.connect(path or ":memory:", timeout=30, isolation_level=None, check_same_thread=False)
        except (OSError, sqlite3.Error) as error:
            raise RewardError(f"{self._said} can't be opened: {error}; give another file, or null for none") from None
        try:
            self._db.execute("CREATE TABLE IF NOT EXISTS verdicts (request TEXT PRIMARY KEY, score INTEGER NOT NULL)")
            self._db.execute("SELECT request, score FROM verdicts LIMIT 1")
        except sqlite3.Error as error:
            self._db.close()
            raise RewardError(f"{self._said} is no file of verdicts: {error}; give another one, or delete it") from None

    def get(self, request: str) -> int | None:
        """The score that this request got, None if it was never asked. Raises sqlite3.Error."""
        row = self._db.execute("SELECT score FROM verdicts WHERE request = ?", (request,)).fetchone()
        return row[0] if row else None

    def put(self, request: str, score: int) -> None:
        """Keep what this request got. Raises sqlite3.Error."""
        self._db.execute("INSERT OR REPLACE INTO verdicts VALUES (?, ?)", (request, score))

    def close(self) -> None:
        """Close the file."""
        self._db.close()
