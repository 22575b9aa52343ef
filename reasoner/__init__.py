"""reasoner: train a reasoning model at home. `import reasoner` loads nothing heavy; `reasoner.train` does when it is
first used."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["__version__", "train"]


def __getattr__(name: str) -> Any:
    if name == "train":
        from reasoner.garbage import uncollected

        with uncollected():  # and nothing frozen: what else this process holds is its own
            from reasoner.pipeline import train

        return train
    raise AttributeError(f"module 'reasoner' has no attribute '{name}'")
