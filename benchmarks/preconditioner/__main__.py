"""Does the r x r preconditioner pay under Adam, or under momentum SGD?

    python -m benchmarks.preconditioner                  # all that is missing in results/preconditioner.json
    python -m benchmarks.preconditioner --minutes 5      # stop after five minutes; call it again to go on
    python -m benchmarks.preconditioner --report         # docs/evidence/preconditioner.md, from what is there

Every rule of `rules.py` on every task of `tasks.py`, each at its own best learning rate: see `plan.py`.
"""

import argparse
import time
import warnings

from .plan import carry_out
from .report import write
from .sweep import OutOfTime, Results


def main() -> None:
    """Run what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--report", action="store_true", help="make no runs")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    results = Results(deadline=time.monotonic() + 60 * options.minutes)
    if options.report:
        write(results)
        return
    try:
        carry_out(results)
        print("all runs are there")
    except OutOfTime:
        print(f"{len(results.rows)} runs so far: call again to go on")


if __name__ == "__main__":
    main()
