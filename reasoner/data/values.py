"""Cells that remember how their file writes them: a number keeps its literal, a text that we can't be sure of keeps
the reason.

Left out: everything that isn't text or a number.
"""


class WrittenFloat(float):
    """A float whose text is the file's own: `1.10` and `145.0` stay so, and no digit is lost.

    >>> str(written_float("1.10"))
    '1.10'
    """

    written: str

    def __str__(self) -> str:
        return self.written


def written_float(text: str) -> float:
    """The number, which writes itself as `text`."""
    plain = float(text)
    if repr(plain) == text:
        return plain
    cell = WrittenFloat(plain)
    cell.written = text
    return cell


class DoubtfulText(str):
    """A cell whose text in its file we can't know; `doubt` says which and why. Templates refuse it, rewards and maps
    get it as text.
    """

    doubt: str


def doubtful(text: str, doubt: str) -> DoubtfulText:
    """The text with its doubt."""
    cell = DoubtfulText(text)
    cell.doubt = doubt
    return cell
