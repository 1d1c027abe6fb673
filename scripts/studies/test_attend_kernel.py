"""What ncu prints, as a table."""

import pytest
from attend_kernel import CALLS, read, table

HEAD = '"ID","Process ID","Kernel Name","Metric Unit","Metric Value"'


def printed(name, kernels, shape="12/2 128 1 512", size=1_000_000):
    lines = [HEAD, *(f'"0","1","{k}","{unit}","{value}"' for k, unit, value in kernels)]
    return "\n".join([*lines, f"MARK {name} {shape} {size}"])


def test_table_of_ours_and_torch(tmp_path):
    first, second = [("kvq_attend", "ns", "9,000")], [("kvq_attend", "us", "2.5")] * (CALLS - 1)
    (tmp_path / "now.csv").write_text(printed("ours", [*first, *second]))
    two = [("flash_fwd_splitkv", "ns", "4,000"), ("flash_fwd_splitkv_combine", "ns", "1,000")]
    (tmp_path / "torch.csv").write_text(printed("flash", two * CALLS))
    lines = table([tmp_path / "now.csv", tmp_path / "torch.csv"]).splitlines()
    assert lines[0] == "| heads q/kv, D | batch | tokens | now | TB/s | flash | × best fp16 |"
    assert lines[2] == "| 12/2, 128 | 1 | 512 | 2.5 | 0.40 | 5.0 | 2.00 |"


def test_calls_that_are_missing():
    with pytest.raises(ValueError, match=f"1 calls for 1 shapes, not {CALLS} each"):
        read(printed("ours", [("kvq_attend", "ns", "9")]))
