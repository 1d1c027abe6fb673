"""For all tests: automatic calibrations are short, and kept in a folder of this run: nothing is
written to the home directory."""

import atexit
import os
import shutil
import tempfile

import pytest

if "PYTEST_XDIST_WORKER" not in os.environ:  # whose folder is that of the process that started it
    folder = tempfile.mkdtemp(prefix="mlx_kvq-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["MLX_KVQ_CACHE"] = folder  # also for the processes that tests start


@pytest.fixture(scope="session", autouse=True)
def _short_calibrations():
    """An eighth of what is read elsewhere, which commands that tests start do not take for theirs:
    which of them came first would decide what both read."""
    from mlx_kvq.calibration import automatic

    automatic.VERSION = "short"
    automatic.RANDOM_TOKENS //= 8
    automatic.SAMPLE_TOKENS //= 8


# With -n a file's tests run in one process: the longest files first, none left at the end.
LONGEST = ["plugin/test_server", "model/test_model", "repositories/test_hub", "test_install"]


def pytest_collection_modifyitems(items):
    def rank(item) -> int:
        found = [i for i, name in enumerate(LONGEST) if f"tests/{name}.py" in item.nodeid]
        return found[0] if found else len(LONGEST)

    items.sort(key=rank)
