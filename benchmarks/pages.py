"""What a block of a documentation page costs beside its own code: ``python benchmarks/pages.py``."""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from pytest_diffopt.documentation.order import Code, Order
from pytest_diffopt.documentation.processes import Server

BLOCKS = 100


def main() -> None:
    page = Path(tempfile.gettempdir(), "page.md")
    source = "import time\ntime.sleep(0.01)"
    with Server("auto") as server:

        def run() -> float:
            started = time.perf_counter()
            ran = server.run(
                lambda folder: Order("block", str(page), Code(source, 1), (), "as written", folder), seconds=60
            )
            return time.perf_counter() - started - ran.seconds

        start = run()
        overheads = [run() for _ in range(BLOCKS)]
    print(f"the first block, with the start of the server: {start:.1f} s")
    print(
        f"{BLOCKS} blocks after it: median {statistics.median(overheads):.3f} s, slowest {max(overheads):.3f} s (≤0.3 s)"
    )


if __name__ == "__main__":
    main()
