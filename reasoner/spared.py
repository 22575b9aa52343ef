"""Packages that libraries import at a start only because they find them installed, and that nothing here uses.

transformers takes scikit-learn for a setting of assisted generation and scipy for object detection, vLLM scipy for
sound and pandas for a table of kernels of AMD's: a tenth of what a process with vLLM imports. None of the libraries
that a run imports requires one of them, so each gets on without.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager

SPARED = ("sklearn", "scipy", "pandas")


@contextmanager
def spared() -> Iterator[None]:
    """Inside, those of SPARED that were not imported before are as if they were not installed; afterwards they are
    there again, also after an error."""
    absent = [name for name in SPARED if name not in sys.modules]
    sys.modules.update(dict.fromkeys(absent))  # type: ignore[arg-type]  # None: the import system's word for no module
    try:
        yield
    finally:
        for name in absent:
            del sys.modules[name]
