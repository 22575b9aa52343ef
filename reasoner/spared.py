"""Packages that libraries import at a start only because they find them installed, and that nothing here uses.

transformers takes scikit-learn for a setting of assisted generation and scipy for object detection, vLLM scipy for
sound and pandas for a table of AMD's kernels: hundreds of modules. None of the libraries that are imported then
requires one of them, so each gets on without.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SPARED = ("sklearn", "scipy", "pandas")


@contextmanager
def spared() -> Iterator[None]:
    """Inside, those of SPARED that were not imported before are as if they were not installed; afterwards they are
    there again, also after an error."""
    absent = [name for name in SPARED if name not in sys.modules]
    modules: dict[str, Any] = sys.modules
    modules.update(dict.fromkeys(absent))  # None is the import system's word for a module that is not there
    try:
        yield
    finally:
        for name in absent:
            if name in modules and modules[name] is None:  # else somebody insisted, and it is there
                del modules[name]
