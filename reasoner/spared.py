"""Packages that libraries import at a start only because they find them installed, and that nothing here uses.

transformers takes scikit-learn for a setting of assisted generation, scipy for object detection, torchvision for
pictures and torchaudio for sound, vLLM scipy for sound, OpenCV for films and pandas for a table of AMD's kernels, and
the hub's client trio for programs that run on it: hundreds of modules. None of the libraries that are imported then
requires one of them, so each gets on without. transformers goes on taking them for absent in this process; no part of
a run reads pictures or sound.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SPARED = ("sklearn", "scipy", "pandas", "torchvision", "torchaudio", "cv2", "trio")


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
