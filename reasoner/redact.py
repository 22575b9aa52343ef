"""Known secrets kept out of every byte a run writes.

Known are the values of environment variables whose names speak of a token, key, secret or password.

Left out: secrets that are in no environment variable. Nothing tells them from other text.
"""

import json
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any

NAME_PARTS = ("TOKEN", "KEY", "SECRET", "PASSWORD")
MIN_LENGTH = 8  # a shorter value would be found inside ordinary words and numbers
REDACTED = "<redacted>"  # unlike [..] or {..} it stays a string in YAML


class Redactor:
    """Replaces secrets in text and in nested values.

    >>> Redactor(["hf_abcdefgh"]).text("token: hf_abcdefgh")
    'token: <redacted>'
    """

    def __init__(self, secrets: Iterable[str]):
        forms = {form for secret in secrets if len(secret) >= MIN_LENGTH for form in _written_forms(secret)}
        longest_first = sorted(forms, key=lambda form: (-len(form), form))
        self._pattern = re.compile("|".join(map(_tolerant, longest_first))) if forms else None

    @classmethod
    def from_environment(cls) -> "Redactor":
        """A redactor of what the environment holds now."""
        return cls(value for name, value in os.environ.items() if any(part in name.upper() for part in NAME_PARTS))

    def text(self, text: str) -> str:
        """The text without secrets, also where JSON or YAML escaped or folded them."""
        return self._pattern.sub(REDACTED, text) if self._pattern else text

    def tree(self, value: Any) -> Any:
        """The value with every string in it redacted, keys too; tuples become lists, numbers are never touched."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, Mapping):
            return {self.tree(key): self.tree(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [self.tree(inner) for inner in value]
        return value


def _written_forms(secret: str) -> set[str]:
    """The secret as it is, as JSON strings hold it (letters escaped or not), and inside YAML's single quotes."""
    return {secret, json.dumps(secret)[1:-1], json.dumps(secret, ensure_ascii=False)[1:-1], secret.replace("'", "''")}


def _tolerant(form: str) -> str:
    """A pattern of the form that also matches where a YAML writer folded the line at one of its spaces."""
    return r"[\s\\]+".join(re.escape(word) for word in re.split(r"\s+", form))
