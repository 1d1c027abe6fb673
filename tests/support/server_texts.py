"""How many texts of 32 concurrent requests to mlx_lm.server differ from those of the same requests
alone; a Markdown table.

    python -m tests.support.server_texts [--models NAME …] [--dtypes float32 bfloat16]
        [--kv-cache fp16 int4-srft]
"""

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from tests.support.float32 import MODELS, NAMES, write_float32
from tests.support.server import REQUESTS, Server, most_at_once, requests


def texts(folder: Path, spec: str, everyone: list, callers: int) -> list[dict]:
    options = () if spec == "fp16" else ("--kv-cache", spec)
    with Server(folder, *options) as server, ThreadPoolExecutor(callers) as pool:
        return list(pool.map(server.complete, everyone))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(";")[0])
    parser.add_argument("--models", nargs="+", default=NAMES, choices=NAMES)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--kv-cache", nargs="+", default=["fp16", "int4-srft"], metavar="SPEC")
    args = parser.parse_args()
    rows = []
    cases = [(m, d, s) for m in args.models for d in args.dtypes for s in args.kv_cache]
    with tempfile.TemporaryDirectory(prefix="mlx_kvq-") as temporary:
        for model, dtype, spec in tqdm(cases, unit="case"):
            folder = MODELS / model
            parent = Path(temporary) / f"{model}-{dtype}-{len(rows)}"
            parent.mkdir()
            if dtype == "float32":
                folder = write_float32(model, parent)
            else:
                (parent / model).symlink_to(folder.resolve())
                folder = parent / model
            everyone = requests(folder)
            together = texts(folder, spec, everyone, REQUESTS)
            alone = texts(folder, spec, everyone, 1)
            differ = sum(a["text"] != b["text"] for a, b in zip(together, alone, strict=True))
            rows.append([model, dtype, spec, most_at_once(together), differ])
            tqdm.write(" | ".join(map(str, rows[-1])))
    print(f"| model | dtype | cache | at once | texts of {REQUESTS} that differ |")
    print("|---|---|---|---|---|")
    for row in rows:
        print(f"| {' | '.join(map(str, row))} |")


if __name__ == "__main__":
    main()
