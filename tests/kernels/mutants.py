"""A kernel's module with one formula of its source changed: tests have to fail with it."""

import importlib.util
from pathlib import Path
from types import ModuleType


def mutated(module: ModuleType, right: str, wrong: str, folder: Path) -> ModuleType:
    """The module anew, from a file in `folder`, with `wrong` wherever its source says `right`, which it has to."""
    source = Path(str(module.__file__)).read_text(encoding="utf-8")
    assert right in source, f"{module.__name__} no longer says {right}"
    file = folder / "mutant.py"
    file.write_text(source.replace(right, wrong), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("mutant", file)
    assert spec is not None and spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found
