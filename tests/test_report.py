import dataclasses
import json
import warnings

import pytest

import lora_one
from lora_one.errors import CheckpointError
from lora_one.report import DeferredReport, LayerStart, Report
from tests.backends.torch.models import mlp


@pytest.fixture(scope="module")
def report():
    case = mlp()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return lora_one.init(case.model, case.batches, case.loss_fn, lora_one.Config(rank=4, gamma="auto"))[1]


def test_prints_a_row_for_each_layer(report):
    lines = str(report).splitlines()
    assert "3 layers, 1 pass over 3 batches" in lines[0]
    rows = [line for line in lines if line.startswith(("up ", "shared ", "down "))]
    assert len(rows) == 3
    assert "24 x 12" in rows[0]
    assert all(len(line) == len(rows[0]) for line in rows)


def test_json_round_trip(report, tmp_path):
    (tmp_path / "report.json").write_text(json.dumps(report.to_dict()))
    assert Report.from_dict(json.loads((tmp_path / "report.json").read_text())) == report


def test_a_report_that_does_not_tell_its_balance_has_the_papers(report):
    values = json.loads(json.dumps(report.to_dict()))
    assert values["config"].pop("balance") == 0.0
    assert Report.from_dict(values).config.balance == 0.5


def test_a_report_of_an_older_folder_has_a_field_that_is_gone(report):
    values = json.loads(json.dumps(report.to_dict()))
    for layer in values["layers"]:
        layer["share_at_least"] = 0.9
    assert Report.from_dict(values) == report
    values["layers"][0]["share"] = 0.9
    with pytest.raises(CheckpointError, match="unexpected keyword argument 'share'"):
        Report.from_dict(values)


def test_from_dict_of_something_else():
    with pytest.raises(CheckpointError, match="not a report of lora-one"):
        Report.from_dict({"layers": []})


def test_plot_is_a_picture(report, tmp_path):
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_numbers_are_plain_python(report):
    json.dumps(report.to_dict())
    assert report.seconds > 0
    assert report.peak_memory > 10**7
    assert isinstance(report.layers[0].singular_values[0], float)
    assert dataclasses.asdict(report.gamma_trials[0]) == {"gamma": 128.0, "loss": report.gamma_trials[0].loss}


def test_a_deferred_report_is_read_as_it_was_written_and_nothing_else_is():
    report = DeferredReport("torch", lora_one.Config(rank=2), [LayerStart("up", 24, 12, 2)], start_steps="auto")
    report.refresh = lambda: report.record(6, True, [([2.0, 1.0], 0.5)])
    written = json.loads(json.dumps(report.to_dict()))
    assert DeferredReport.from_dict(written) == report and "refresh" not in written
    assert (written["steps"], written["layers"][0]["singular_values"]) == (6, [1.0, 0.5])
    for wrong in ({"start_steps": "soon"}, {"steps": "6"}, {"layers": [{"name": "up"}]}, {"more": 1}):
        with pytest.raises(CheckpointError, match="not a report of lora-one"):
            DeferredReport.from_dict({**written, **wrong})
