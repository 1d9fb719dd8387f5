"""The pages of `lora-one inspect`: whole in one file, readable by machines, with the numbers that were measured."""

import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
import torch

import lora_one
from lora_one.checkpoint.comparison import compare
from lora_one.checkpoint.inspection import inspect_adapter
from lora_one.errors import DataError
from lora_one.finetune.metrics import Losses, read_losses
from lora_one.page import write_comparison, write_page

LOSSES = Losses([(1, 3.5), (2, float("nan")), (3, 1.25)], [(0, 4.0), (3, 1.5)])
VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """The elements of a page, and the texts of its tables."""

    def __init__(self, text):
        super().__init__()
        self.open, self.elements, self.rows, self.text = [], [], [], ""
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]


def adapter(folder, rank, seed):
    torch.manual_seed(seed)
    base = torch.nn.Sequential(*(torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 6)) for _ in range(3)))
    batches = [(torch.randn(8, 6), torch.randn(8, 6))]
    config = lora_one.Config(rank=rank, targets=r"\d\.[01]")
    model, report = lora_one.init(base, batches, lambda net, batch: (net(batch[0]) - batch[1]).square().mean(), config)
    lora_one.save(model, folder, report)
    return inspect_adapter(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return adapter(folder / "a <b>", 3, 0), adapter(folder / "c", 2, 1)


@pytest.fixture(scope="module")
def one_page(two):
    file = two[0].path / "inspect.html"
    write_page(file, two[0], LOSSES)
    return file.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page_of_two(two):
    file = two[0].path / "compare.html"
    write_comparison(file, compare(*two), (LOSSES, Losses([], [])))
    return file.read_text(encoding="utf-8")


@pytest.fixture(params=["one_page", "page_of_two"])
def text(request):
    return request.getfixturevalue(request.param)


def test_a_page_needs_nothing_else(text):
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & {tag for tag, _ in page.elements}
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            if name in ("href", "xlink:href", "src"):
                assert value.startswith("#"), (tag, name, value)
            assert not name.startswith("on")
    assert not re.search(r"@import|url\((?!#)", text)


def test_a_page_can_be_read_without_seeing_it(text):
    page = Page(text)
    assert page.all("html") == [{"lang": "en"}]
    assert len(page.all("h1")) == 1 and len(page.all("title")) == 1
    charts = page.all("svg")
    assert len(charts) == len(page.all("figcaption")) > 5
    for chart in charts:
        assert chart["role"] == "img" and re.search(r"\d", chart["aria-label"])
    assert len(page.all("caption")) == len(page.all("table")) > 1
    assert {header["scope"] for header in page.all("th")} == {"col", "row"}
    assert all(header.strip() for row in page.rows for header in row[:1])


def test_charts_follow_the_theme_of_the_reader(text):
    assert "prefers-color-scheme: dark" in text
    assert "currentColor" in text and "var(--s0)" in text and "var(--grid)" in text
    assert not re.search(r"#0a0b|#01020", text)  # the colours that stand for the page's


def test_ids_are_the_pages_own_and_every_chart_is_whole(text):
    ids = [attributes["id"] for _, attributes in Page(text).elements if "id" in attributes]
    assert len(ids) == len(set(ids)) > 10
    for chart in re.findall(r"<svg.*?</svg>", text, flags=re.S):
        ElementTree.fromstring(chart)


def test_the_page_of_one_has_its_numbers(two, one_page):
    page = Page(one_page)
    assert f"Adapter {two[0].path}" in page.text  # escaped: its name has brackets
    rows = {row[0]: row[1:] for row in page.rows}
    for layer in two[0].layers:
        shape, rank, norm, last, stable, gradient, energy, _, grown = rows[layer.name]
        assert (shape, rank) == (f"{layer.out_features} x {layer.in_features}", "3")
        found = [float(number) for number in (norm, last, stable, gradient, energy)]
        s = layer.singular_values
        expected = [layer.norm, s[-1] / s[0], layer.stable_rank, layer.start.gradient_norm, layer.start.energy]
        assert np.allclose(found, expected, rtol=6e-3, atol=6e-4)
        assert grown == "1.0x"
    assert rows["training loss, first to last"] == ["3.5000 to 1.2500"]
    assert rows["least loss on held-out data"] == ["1.5000 at step 3"]
    assert rows["start.rank"] == ["3"] and rows["adapter.r"] == ["3"]
    labels = [chart["aria-label"] for chart in page.all("svg")]
    assert "Training loss by step:  from 3.5 to 1.25" in labels
    norms = [layer.norm for layer in two[0].layers]
    assert f"Size of the update, ‖s B A‖, by layer and kind: from {min(norms):.3g} to {max(norms):.3g}" in labels


def test_the_page_of_two_says_what_differs(two, page_of_two):
    rows = {row[0]: row[1:] for row in Page(page_of_two).rows}
    assert rows["rank"] == ["3", "2"] and rows["start.rank"] == ["3", "2"]
    assert rows["parameters"] == ["198", "132"]  # 6 layers of 5 + 6 rows and columns
    assert rows["training loss, first to last"] == ["3.5000 to 1.2500", ""]
    assert "start.gamma" not in rows


def test_a_page_is_the_same_each_time(two, one_page, tmp_path):
    write_page(tmp_path / "again.html", two[0], LOSSES)
    assert (tmp_path / "again.html").read_text(encoding="utf-8") == one_page


def test_losses_are_read_as_they_were_written(tmp_path):
    assert read_losses(tmp_path) == Losses([], [])
    lines = [{"step": 0, "eval_loss": 4.0}, {"step": 1, "loss": 3.5}, {"step": 1, "eval_loss": 2.0}]
    text = "\n".join(map(json.dumps, lines)) + "\n"
    file = tmp_path / "metrics.jsonl"
    file.write_text(text + '{"step": 2, "lo')  # killed while it wrote
    assert read_losses(tmp_path) == Losses([(1, 3.5)], [(0, 4.0), (1, 2.0)])
    file.write_text('{"loss": 1.0}\n' + text)
    with pytest.raises(DataError, match=r'metrics.jsonl, line 1: must be an object with "step"'):
        read_losses(tmp_path)
