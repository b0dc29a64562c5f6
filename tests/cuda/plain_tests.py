"""Runs tests of kernels on a device where pytest is absent: it stands in for what these tests use of pytest.

``use`` comes before the import of a module of tests; ``run`` runs those that ask for nothing but parameters and a device.
"""

import inspect
import itertools
import re
import sys
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from types import SimpleNamespace


def _parametrize(names: str, values):
    def decorate(function: Callable) -> Callable:
        split = [name.strip() for name in names.split(",")]
        cases = [dict(zip(split, value if len(split) > 1 else (value,), strict=True)) for value in values]
        function.cases = [*getattr(function, "cases", []), cases]
        return function
    return decorate


@contextmanager
def _raises(kind: type[BaseException], match: str = ""):
    try:
        yield
    except kind as error:
        assert re.search(match, str(error)), f"{error} does not match {match}"
    else:
        raise AssertionError(f"{kind.__name__} was not raised")


class _Monkeypatch:
    """Attributes that are others while a test runs."""

    def __init__(self):
        self._before = []

    def setattr(self, target, name: str, value) -> None:
        self._before.append((target, name, getattr(target, name)))
        setattr(target, name, value)

    def undo(self) -> None:
        for target, name, value in reversed(self._before):
            setattr(target, name, value)


def use() -> None:
    """From here on ``import pytest`` is this."""
    sys.modules["pytest"] = SimpleNamespace(mark=SimpleNamespace(parametrize=_parametrize), raises=_raises)


def run(module, device, large: bool, over: Callable[[], bool], first_only: bool = False) -> tuple[int, int, int]:
    """How many tests passed, failed, and were left out because time was ``over``. ``large``: also those that ask for a real GPU;
    ``first_only``: one case of each test. What fails is printed."""
    passed = failed = left = 0
    for test in [value for name, value in vars(module).items() if name.startswith("test_") and callable(value)]:
        wanted = set(inspect.signature(test).parameters)
        if "gpu" in wanted and not large:
            continue
        for case in itertools.islice(itertools.product(*getattr(test, "cases", [])), 1 if first_only else None):
            arguments = {key: value for part in case for key, value in part.items()}
            fixtures = {"device": device, "gpu": device, "monkeypatch": (patch := _Monkeypatch())}
            arguments |= {name: value for name, value in fixtures.items() if name in wanted}
            assert set(arguments) == wanted, f"{test.__name__} asks for {wanted - set(arguments)}"
            if over():
                left += 1
                continue
            try:
                test(**arguments)
                passed += 1
            except Exception:
                failed += 1
                shown = {key: value for key, value in arguments.items() if key not in fixtures}
                print(f"FAILED {test.__name__} {shown}\n{traceback.format_exc(limit=-3)}", flush=True)
            finally:
                patch.undo()
    return passed, failed, left
