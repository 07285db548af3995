"""Run every benchmark that has targets, and print one table of ratios, each with its target.

    python benchmarks/run_all.py

Takes less than a quarter of an hour on two cores, which nothing else should use meanwhile: where time is short, what is
compared takes fewer turns.
"""

from __future__ import annotations

import subprocess
import sys
import time

from common import ROOT, make_parser, result_file, table

from nni_cream.runs import read_json

# The scripts, and how much time each may take: slow machines make fewer turns.
SCRIPTS = {
    "fused_cell": ("--repeats", "4", "--steps", "5", "--seconds", "60"),
    "cream_step": ("--repetitions", "6", "--seconds", "40"),
    "scaling": ("--repeats", "3", "--seconds", "12"),
    "input_share": (),
}


def main() -> None:
    """Run them one after the other, and print what they have saved."""
    device = make_parser(__doc__).parse_args().device
    started = time.monotonic()
    rows = {}
    for name, arguments in SCRIPTS.items():
        print(f"benchmarks/{name}.py ...", end=" ", flush=True)
        begun = time.monotonic()
        script = ROOT / "benchmarks" / f"{name}.py"
        subprocess.run([sys.executable, script, "--device", device, *arguments], check=True, stdout=subprocess.DEVNULL)
        print(f"{time.monotonic() - begun:.0f} s", flush=True)
        for setting, found in read_json(result_file(name, device), "result of a benchmark")["table"].items():
            rows[setting] = {what: ratio for what, ratio in found.items() if "verdict" in ratio}
    print(table(rows))
    print(f"{(time.monotonic() - started) / 60:.0f} minutes")


if __name__ == "__main__":
    main()
