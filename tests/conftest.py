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
    """An eighth of what is read elsewhere."""
    from mlx_kvq.calibration import automatic

    automatic.RANDOM_TOKENS //= 8
    automatic.SAMPLE_TOKENS //= 8
