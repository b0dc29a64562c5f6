"""Settings of a checkpoint, read with their types checked and every error naming file, key and value."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError

_REQUIRED: Any = object()


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError when it cannot be read or is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class Fields:
    """A view of one settings table (config.json, GGUF metadata); a null value counts as absent.

    ``where`` starts every message, ``prefix`` is put before keys in messages. Methods raise CheckpointError
    when the key is missing without a default, or its value is not of the type.
    """

    def __init__(self, values: Mapping[str, Any], where: str, prefix: str = ""):
        self.values = values
        self.where = where
        self.prefix = prefix

    def error(self, message: str) -> CheckpointError:
        """An error about this table, to raise."""
        return CheckpointError(f"{self.where}: {message}")

    def get(self, key: str, default: Any = None) -> Any:
        """The value as stored, or the default."""
        value = self.values.get(key)
        return default if value is None else value

    def integer(self, key: str, default: Any = _REQUIRED, minimum: int = 1, maximum: int = 2**31 - 1) -> Any:
        """An integer from ``minimum`` to ``maximum``, or the default."""
        value = self._value(key, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise self._wrong(key, value, f"an integer from {minimum} to {maximum}")
        return value

    def number(self, key: str, default: Any = _REQUIRED) -> Any:
        """A finite number above zero as float, or the default."""
        value = self._value(key, default)
        if value is default:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise self._wrong(key, value, "a number above 0")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        """True or False."""
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self._wrong(key, value, "true or false")
        return value

    def token_ids(self, key: str) -> tuple[int, ...] | None:
        """One token id or a list of them; None where absent."""
        value = self.get(key)
        if value is None:
            return None
        ids = value if isinstance(value, list) else [value]
        if any(isinstance(i, bool) or not isinstance(i, int) for i in ids):
            raise self._wrong(key, value, "a token id or a list of token ids")
        return tuple(dict.fromkeys(ids))

    def _value(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        if value is not None:
            return value
        if default is _REQUIRED:
            raise self.error(f"{self.prefix}{key} is missing")
        return default

    def _wrong(self, key: str, value: Any, expected: str) -> CheckpointError:
        return self.error(f"{self.prefix}{key} is {str(value)[:80]!r}, expected {expected}")
