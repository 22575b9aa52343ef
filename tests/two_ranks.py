"""Running code on two gloo ranks of this machine."""

import socket
import tempfile
from pathlib import Path

from tests.forked import start_forked


def on_two_ranks(code: str, *arguments: str) -> list[str]:
    """What each of two gloo ranks that run the code prints."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder) / rank for rank in "01"]
        ranks = [start_forked(code, *arguments, said=s, environment={**shared, "RANK": s.name}) for s in said]
        for rank in ranks:
            rank.join(120)
            rank.kill()
            rank.join()
        assert [rank.exitcode for rank in ranks] == [0, 0], [s.with_suffix(".err").read_text() for s in said]
        return [s.with_suffix(".out").read_text() for s in said]
