"""The hooks of the documentation site: links of the repository's pages lead to where the site has their targets."""

import importlib.util
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

FILE = Path(__file__).parents[1] / "docs" / "site" / "hooks.py"


@pytest.fixture(scope="module")
def led():
    spec = importlib.util.spec_from_file_location("site_hooks", FILE)
    hooks = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hooks)
    return lambda markdown, page: hooks.on_page_markdown(
        markdown, SimpleNamespace(file=SimpleNamespace(src_uri=page)), None, None
    )


@pytest.mark.parametrize(
    ("page", "link", "expected"),
    [
        ("index.md", "[x](docs/guide/jax.md#meshes)", "[x](guide/jax.md#meshes)"),  # the README is the first page
        ("index.md", "[x](docs/README.md)", "[x](questions.md)"),
        ("questions.md", "[x](../README.md)", "[x](index.md)"),
        ("guide/jax.md", "[x](mlx.md)", "[x](mlx.md)"),
        ("guide/jax.md", "![x](../images/cost.png)", "![x](../images/cost.png)"),
        ("guide/trainers.md", "[x](../../adapters/trl)", "[x](../repository/adapters/trl/README.md)"),
        ("repository/adapters/trl/README.md", "[x](../../docs/guide/trainers.md)", "[x](../../../guide/trainers.md)"),
        ("guide/jax.md", "[the suite](../../tests/conftest.py)", "the suite (`tests/conftest.py`)"),  # not in the site
        ("guide/jax.md", "[x](https://arxiv.org/abs/2502.01235)", "[x](https://arxiv.org/abs/2502.01235)"),
    ],
)
def test_links_lead_to_the_sites_pages(led, page, link, expected):
    assert led(f"See {link}.", page) == f"See {expected}."


def test_a_link_to_nothing_is_a_warning_which_the_strict_build_counts(led, caplog):
    with caplog.at_level(logging.WARNING, logger="mkdocs"):
        led("[x](../../adapters/nowhere/README.md)", "guide/jax.md")
    assert caplog.messages == ["docs/guide/jax.md links to ../../adapters/nowhere/README.md, which is not there"]
    assert "strict: true" in (FILE.parents[2] / "mkdocs.yml").read_text(encoding="utf-8")
