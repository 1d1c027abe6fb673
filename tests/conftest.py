"""No test writes to the home directory: automatic calibrations go to a folder of this run."""

import atexit
import os
import shutil
import tempfile

if "PYTEST_XDIST_WORKER" not in os.environ:  # whose folder is that of the process that started it
    folder = tempfile.mkdtemp(prefix="mlx_kvq-tests-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.environ["MLX_KVQ_CACHE"] = folder  # also for the processes that tests start
