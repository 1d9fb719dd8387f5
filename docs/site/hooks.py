"""What mkdocs.yml cannot say: the README is the first page, and links into the repository lead to the site's pages.

The pages are written for a reader of the repository, so their links are relative to it. A link to a file that the site
has becomes a link to it, one to a file that it has not becomes the file's name, and one to nothing is a warning, which
the strict build turns into a failure.
"""

from __future__ import annotations

import logging
import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # the tests run without mkdocs
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[2]
LOG = logging.getLogger("mkdocs.plugins.lora_one")
PATTERNS = ("C*.md", "RELEASING.md", "SECURITY.md", "adapters/*/README.md", "benchmarks/**/*.md")
RAW = ("benchmarks/results/*.json", "benchmarks/results/*.png", "notebooks/*.ipynb")
RENAMED = {"README.md": "index.md", "docs/README.md": "questions.md"}


@cache  # for every page of a build
def published() -> dict[str, str]:
    """Path in the repository -> path in the site, of what lies outside of docs/ or has another name there."""
    paths = [path for pattern in (*PATTERNS, *RAW) for path in sorted(ROOT.glob(pattern))]
    names = [path.relative_to(ROOT).as_posix() for path in paths]
    return RENAMED | {name: f"repository/{name}" for name in names}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from outside of docs/, and put docs/README.md under a name that leaves index.md to the README."""
    from mkdocs.structure.files import File

    files.remove(files.get_file_from_path("README.md"))
    for source, target in published().items():
        files.append(File.generated(config, target, abs_src_path=str(ROOT / source)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Lead the links of a page to where the site has their targets."""
    site = published()
    here = {target: source for source, target in site.items()}.get(page.file.src_uri, f"docs/{page.file.src_uri}")

    def led(match: re.Match[str]) -> str:
        mark, label, target = match.groups()
        path, _, anchor = target.partition("#")
        if "://" in target or not path:
            return match[0]
        repository = os.path.normpath(os.path.join(os.path.dirname(here), path))
        if not (ROOT / repository).exists():
            LOG.warning("%s links to %s, which is not there", here, target)
        elif repository.startswith("docs/") and repository not in site:
            return _link(mark, label, repository.removeprefix("docs/"), anchor, page)
        elif name := next((n for n in (repository, f"{repository}/README.md") if n in site), None):
            return _link(mark, label, site[name], anchor, page)
        return label if repository in label else f"{label} (`{repository}`)"

    return re.sub(r"(!?)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^)\s]+)\)", led, markdown)


def _link(mark: str, label: str, target: str, anchor: str, page: Page) -> str:
    relative = os.path.relpath(target, os.path.dirname(page.file.src_uri) or ".")
    return f"{mark}[{label}]({relative}{'#' + anchor if anchor else ''})"
