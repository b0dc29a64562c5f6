"""A nested dictionary in an HDF5 group, legible to h5dump, and back.

Strings, booleans and numbers become attributes, lists of strings or of numbers datasets, dictionaries groups. What fits
none of these (mixed or nested lists, awkward keys, huge integers) becomes a dataset of JSON text with the attribute
``encoding`` = ``json``. ``None`` is left out.
"""

import json
from collections.abc import Mapping
from pathlib import PurePath
from typing import Any

import numpy as np

from llama_hpc.results.schema import storable


def store(group: Any, values: Mapping[str, Any]) -> None:
    """Write ``values`` into an h5py group. Values of other types are stored as their ``str``."""
    for key, value in _plain(values).items():
        _store_value(group, key, value)


def load(group: Any) -> dict[str, Any]:
    """The dictionary that ``store`` wrote, with plain Python values."""
    import h5py

    values = {key: _plain(value) for key, value in group.attrs.items()}
    for key, item in group.items():
        if isinstance(item, h5py.Group):
            values[key] = load(item)
        elif item.attrs.get("encoding") == "json":
            values[key] = json.loads(item.asstr()[()])
        else:
            is_string = h5py.check_string_dtype(item.dtype) is not None
            values[key] = (item.asstr()[:] if is_string else item[:]).tolist()
    return values


def _store_value(group: Any, key: str, value: Any) -> None:
    import h5py

    if value is None:
        return
    if isinstance(value, str):
        group.attrs[key] = storable(value)
    elif _is_number(value):
        group.attrs[key] = value
    elif isinstance(value, dict) and all(_usable(name) for name in value):
        store(group.create_group(key), value)
    elif _is_list(value, lambda item: isinstance(item, str)):
        group.create_dataset(key, data=[storable(item) for item in value], dtype=h5py.string_dtype())
    elif _is_list(value, lambda item: type(item) is type(value[0]) and _is_number(item)):
        group.create_dataset(key, data=value)
    else:
        dataset = group.create_dataset(key, data=storable(json.dumps(value)), dtype=h5py.string_dtype())
        dataset.attrs["encoding"] = "json"


def _plain(value: Any) -> Any:
    """The value in terms of str, bool, int, float, None, list and dict."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, Mapping):
        return {key if isinstance(key, str) else str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in (value if isinstance(value, list | tuple) else sorted(value, key=str))]
    if value is None or (isinstance(value, str | bool | int | float) and not isinstance(value, PurePath)):
        return value
    return str(value)


def _is_number(value: Any) -> bool:
    return isinstance(value, bool | float) or (isinstance(value, int) and -(2**63) <= value < 2**64)


def _is_list(value: Any, accepts: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(accepts(item) for item in value)


def _usable(key: str) -> bool:
    """True for a key that can name an HDF5 attribute or object."""
    return bool(key) and key != "." and "/" not in key and storable(key) == key
