"""When the garbage collector rests: while a process imports and makes its parts, which stay, it would look at all of
them again and again and find nothing."""

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from reasoner.spared import spared


@contextmanager
def uncollected() -> Iterator[None]:
    """The collector is off inside, and afterwards what it was, also after an error; gc.collect() works all the same."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@contextmanager
def importing() -> Iterator[None]:
    """Uncollected, and what is there at the end is frozen: no collection looks at it before gc.unfreeze(). Packages
    that nothing here uses are spared.

    What is garbage at the start goes first, lest it keep its memory. After an error nothing is frozen.
    """
    gc.collect()
    with uncollected(), spared():
        yield
        gc.freeze()
