"""The bar of `lora_one.init` counts the batches that are done, and is silent where nobody looks."""

import io
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import tqdm.auto

import lora_one
from lora_one import progress
from lora_one.backends.checks import with_last
from lora_one.errors import BatchError, ConfigError, GradientError
from lora_one.progress import shown
from tests.frameworks import said_beside_bitsandbytes


class Stream(io.StringIO):
    def __init__(self, is_terminal: bool):
        super().__init__()
        self._is_terminal = is_terminal

    def isatty(self) -> bool:
        return self._is_terminal


class EachChange(tqdm.auto.tqdm):
    """A bar that is drawn at each change, and not ten times a second."""

    def __init__(self, *arguments, **settings):
        super().__init__(*arguments, mininterval=0, **settings)


@pytest.fixture
def terminal(monkeypatch) -> Stream:
    stream = Stream(is_terminal=True)
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))  # pytest sets sys.stderr itself
    monkeypatch.setattr(tqdm.auto, "tqdm", EachChange)
    return stream


def counts(stream: Stream) -> list[tuple[str, int, int]]:
    """What the bar showed: (pass, batches done, batches), without repetitions."""
    found = re.findall(r"LoRA-One(?:, pass (\d))?: .*? (\d+)/(\d+)", stream.getvalue())
    drawn = [(number, int(done), int(total)) for number, done, total in found]
    return [each for index, each in enumerate(drawn) if index == 0 or each != drawn[index - 1]]


def test_a_batch_counts_when_it_is_done_in_every_pass(terminal):
    states = []
    with shown(["a", "b", "c"], None) as batches:
        assert len(batches) == 3
        for _ in range(2):
            states += [(batch, counts(terminal)[-1][1:]) for batch, _ in with_last(batches)]
    assert states == 2 * [("a", (0, 3)), ("b", (1, 3)), ("c", (2, 3))]
    assert counts(terminal)[-4:] == [("2", 0, 3), ("2", 1, 3), ("2", 2, 3), ("2", 3, 3)]
    assert terminal.getvalue().endswith("\n")


def test_who_looks_at_the_first_batch_only_makes_no_pass(terminal):
    with shown(["a", "b"], None) as batches:
        assert next(iter(batches)) == "a"
        assert list(batches) == ["a", "b"]
    assert counts(terminal)[-1] == ("1", 2, 2)


def test_an_iterator_stays_one_and_is_read_once(terminal):
    with shown(iter(["a", "b"]), None) as batches:
        assert iter(batches) is batches
        assert [next(batches), *batches] == ["a", "b"]
        assert list(batches) == []
    assert counts(terminal)[-1] == ("1", 2, 2)


def test_batches_of_unknown_number(terminal):
    with shown((batch for batch in "abc"), None) as batches:
        assert list(batches) == ["a", "b", "c"]
    assert re.search(r"LoRA-One, pass 1: 3batch .*\n$", terminal.getvalue())


def test_an_error_ends_the_line_where_it_was(terminal):
    with pytest.raises(GradientError, match="batch 3"):
        start([torch.ones(2, 6), torch.ones(2, 6), torch.full((2, 6), torch.nan)])
    assert counts(terminal)[-1] == ("1", 2, 3)
    assert terminal.getvalue().endswith("\n")


@pytest.mark.parametrize(
    ("is_terminal", "setting", "is_shown"), [(True, False, False), (False, None, False), (False, True, True)]
)
def test_when_a_bar_is_shown(monkeypatch, is_terminal, setting, is_shown):
    stream, given = Stream(is_terminal), ["a", "b"]
    monkeypatch.setattr(progress, "sys", SimpleNamespace(stderr=stream))
    with shown(given, setting) as batches:
        assert list(batches) == given
        assert (batches is given) != is_shown
    assert bool(stream.getvalue()) == is_shown


def test_without_tqdm_only_a_bar_that_was_asked_for_is_missed(monkeypatch, terminal):
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with shown(["a"], None) as batches:
        assert batches == ["a"]
    with pytest.raises(ConfigError, match="pip install tqdm"), shown(["a"], True):
        pass
    assert terminal.getvalue() == ""


def start(batches, **settings):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(6, 4))
    config = lora_one.Config(rank=2, targets=["0"])
    return lora_one.init(model, batches, lambda model, x: model(x).square().mean(), config, **settings)


def test_init_shows_the_bar_and_starts_the_same(terminal):
    batches = [torch.randn(8, 6) for _ in range(3)]
    model, report = start(batches, progress=True)
    assert counts(terminal)[-1] == (str(report.passes), 3, 3)
    plain, _ = start(batches, progress=False)
    for factor, same in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(factor, same)


def test_what_is_no_collection_keeps_its_error(terminal):
    with pytest.raises(BatchError, match="must be iterable, got int"):
        start(3)


def test_a_script_stays_silent():
    code = "from tests.test_progress import start; import torch; start([torch.ones(2, 6)])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, said_beside_bitsandbytes(done.stderr)) == (0, "", [])
