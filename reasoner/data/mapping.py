"""`data.map`: a function of the user's that changes a row or drops it, named as file.py:function or module:function.

It runs in this process, as the user; reasoner trusts it as it trusts the conf that names it.
"""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from reasoner.config import nearest
from reasoner.errors import ConfigError, DataError

Change = Callable[[dict[str, Any], str], dict[str, Any] | None]


def load_map(spec: str) -> Change:
    """The function as (columns, where) -> columns, or None to drop the row.

    Raises ConfigError if it can't be found. What is returned raises DataError, naming the row, where the user's
    function raises or gives no mapping.
    """
    place, _, name = spec.rpartition(":")
    if not place or not name:
        raise ConfigError(f"data.map={spec}: write file.py:function or module:function")
    module = _module(place, spec)
    function = getattr(module, name, None)
    if not callable(function):
        own = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ConfigError(f"data.map={spec}: {place} has no function '{name}'{nearest(name, own)}")

    def change(columns: dict[str, Any], where: str) -> dict[str, Any] | None:
        try:
            changed = function(columns)
        except Exception as error:
            said = f"data.map={spec} raises {type(error).__name__}: {error}"
            raise DataError(f"{where}: {said}; the columns there are: {', '.join(map(str, columns))}") from error
        if changed is None:
            return None
        if not isinstance(changed, Mapping):
            kind = type(changed).__name__
            raise DataError(f"{where}: data.map={spec} returns a {kind}: return a dict, or None to drop the row")
        return dict(changed)

    return change


def _module(place: str, spec: str) -> ModuleType:
    path = Path(place).expanduser().resolve()
    if place.endswith(".py") and not path.is_file():
        raise ConfigError(f"data.map={spec}: there is no file {path}")
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        found = importlib.util.spec_from_file_location(f"reasoner_map_{path.stem}", path)
        assert found is not None and found.loader is not None
        module = importlib.util.module_from_spec(found)
        found.loader.exec_module(module)
    except Exception as error:
        raise ConfigError(f"data.map={spec} can't be imported ({type(error).__name__}: {error})") from error
    return module
