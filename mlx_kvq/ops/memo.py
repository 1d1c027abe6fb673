"""What was made for earlier calls: tens of layers ask for the same launches at every token."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

MOST = 4096  # a decode step adds one for each kind of layer

# Frozen shapes and dtypes of a call -> what runs it.
launches: dict[Hashable, Any] = {}
# Kernels, and whether they work on this machine: a few for each kind of format.
kernels: dict[Hashable, Any] = {}


def remember(key: Hashable, launch: Any) -> Any:
    if len(launches) >= MOST:
        launches.clear()
    launches[key] = launch
    return launch


def launch(key: Hashable, make: Callable[[], Any]) -> Any:
    found = launches.get(key)
    return remember(key, make()) if found is None else found


def kernel(key: Hashable, make: Callable[[], Any]) -> Any:
    found = kernels.get(key)
    if found is None:
        found = kernels[key] = make()
    return found


def forget() -> None:
    """Make everything anew: for tests and for tuning, which change the environment."""
    launches.clear()
    kernels.clear()


@contextmanager
def apart() -> Iterator[None]:
    """Inside, nothing that was made before is used; what is made inside is dropped."""
    global launches, kernels
    before = launches, kernels
    launches, kernels = {}, {}
    try:
        yield
    finally:
        launches, kernels = before
