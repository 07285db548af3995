"""A trial that waits after each epoch that it has reported until a test lets it go on.

    python -m tests.experiments.stepwise FOLDER trials/search_cream.py --recipe ...

After epoch 1 it waits for the file ``FOLDER/1``, and so on; not for ever, since a test that fails leaves it alone.
"""

from __future__ import annotations

import runpy
import sys
import time
from pathlib import Path
from typing import Any

from nni_cream.reporting import Reporter

SECONDS = 600


def main() -> None:
    _, folder, script, *arguments = sys.argv
    report = Reporter.intermediate

    def report_and_wait(self: Reporter, metrics: Any) -> None:
        report(self, metrics)
        deadline = time.monotonic() + SECONDS
        while not Path(folder, str(metrics["epoch"])).exists() and time.monotonic() < deadline:
            time.sleep(0.1)

    Reporter.intermediate = report_and_wait  # type: ignore[method-assign]
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
