"""Renew all tables of all pages.

python -m benchmarks.tables
"""

from . import pages, renewed

for page in pages():
    before = page.read_text(encoding="utf-8")
    after = renewed(before)
    if after != before:
        page.write_text(after, encoding="utf-8")
        print(f"renewed {page}")
