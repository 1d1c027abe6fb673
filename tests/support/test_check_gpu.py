"""The op matrix of check_gpu.py as a program: what it counts and how it ends."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support import check_gpu


@pytest.mark.parametrize(
    "limit, bad, status, said",
    [
        (60, None, 0, "9 of 9 done, 0 failed, 0 left"),
        (60, 5, 1, "9 of 9 done, 1 failed, 0 left"),
        (-1, None, 2, "0 of 9 done, 0 failed, 9 left"),
    ],
)
def test_exit_status_tells_failures_from_cases_left(monkeypatch, capsys, limit, bad, status, said):
    def check(backend, case, fused):
        assert case != bad, "planted"
        return {"codes": 0.0}

    # Processes would not see what is patched here.
    monkeypatch.setattr(check_gpu, "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    monkeypatch.setattr(check_gpu.op_matrix, "check", check)
    assert check_gpu.check_matrix(list(range(9)), 1, limit, "cuda", 0) == status
    out = capsys.readouterr().out
    assert said in out and ("FAIL 5: AssertionError: planted" in out) == (bad == 5)
