"""Make docs/evidence/quality.md and its pictures.

python -m benchmarks.page
"""

from benchmarks.quality.results import read_rows

from . import PAGE, make_page
from .plots import draw_all


def main() -> None:
    """Write the page and docs/images/quality-*.png."""
    draw_all(read_rows(), PAGE.parents[1] / "images")
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
