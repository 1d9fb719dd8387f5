"""Make docs/evidence/quality.md, docs/evidence/text.md and their pictures.

python -m benchmarks.page
"""

from benchmarks.quality.results import read_rows

from . import PAGE, make_page, text
from .plots import draw_all


def main() -> None:
    """Write the pages, docs/images/quality-*.png and text-*.png."""
    draw_all(read_rows(), PAGE.parents[1] / "images")
    PAGE.write_text(make_page(), encoding="utf-8")
    print(f"wrote {PAGE}")
    text.write()


if __name__ == "__main__":
    main()
