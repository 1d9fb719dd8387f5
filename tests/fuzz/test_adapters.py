"""Adapter folders of any content are opened, or refused by our own error; nothing is written except where asked."""

import contextlib
import copy
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import lora_one
from lora_one.checkpoint.adapter import Adapter, LoraLayer
from lora_one.checkpoint.inspection import inspect_adapter
from lora_one.checkpoint.metadata import read_report
from lora_one.checkpoint.mlx_lm import read_mlx_lm, write_mlx_lm
from lora_one.checkpoint.peft import check_folder, read_adapter, read_folder
from lora_one.core.factors import Factors
from lora_one.errors import CheckpointError, LoraOneError
from lora_one.report import LayerReport, Report
from tests.fuzz.inputs import DAMAGE, DEEP, HEADERS, LONG, TENSORS, TEXTS, VALUES, damaged, examples, honest, lying

LINEAR = {"layer": (5, 3), "../x": (5, 3)}
CONFIG, PEFT, MLX, REPORT = "adapter_config.json", "adapter_model.safetensors", "adapters.safetensors", "lora_one.json"


@pytest.fixture(scope="module")
def root() -> Iterator[Path]:
    """A folder with one good adapter folder, in both layouts; the working directory is empty and must stay empty."""
    here = Path.cwd()
    flush, os.fsync = os.fsync, lambda descriptor: None
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        (Path(name) / "cwd").mkdir()
        os.chdir(Path(name) / "cwd")
        src = Path(name) / "root" / "src"
        src.mkdir(parents=True)
        rng = np.random.default_rng(0)
        pair = Factors(rng.standard_normal((2, 3)), rng.standard_normal((5, 2)))
        write_mlx_lm(src, Adapter({"layer": LoraLayer([pair], 2.0, "F32")}), 1)
        layer = LayerReport("layer", 5, 3, 2, [1.0, 0.5], 1.2, 0.0, 0.9, 0.95)
        report = Report("torch", lora_one.Config(rank=2), 2, 1, 1.0, 128.0, [], 0.1, None, [layer])
        (src / REPORT).write_text(json.dumps({"backend": "torch", "versions": {}, "report": report.to_dict()}))
        shutil.copytree(src, Path(name) / "good")
        yield src.parent
        os.chdir(here)
    os.fsync = flush


@contextlib.contextmanager
def changed(root: Path, **files: bytes | None) -> Iterator[Path]:
    """Yield the adapter folder with other contents, and check that nothing else has appeared anywhere."""
    src = root / "src"
    for name in (CONFIG, PEFT, MLX, REPORT):
        shutil.copyfile(root.parent / "good" / name, src / name)
    for name, content in files.items():
        file = src / {"config": CONFIG, "peft": PEFT, "mlx": MLX, "report": REPORT}[name]
        if content is None:
            file.unlink()
        else:
            file.write_bytes(content)
    yield src
    assert {f.name for f in src.iterdir()} <= {CONFIG, PEFT, MLX, REPORT}
    assert {f.name for f in root.iterdir()} == {"src"} and {f.name for f in root.parent.iterdir()} == {
        "root",
        "good",
        "cwd",
    }
    assert os.listdir(root.parent / "cwd") == []


def open_all_ways(src: Path, to: str = "peft") -> None:
    with contextlib.suppress(CheckpointError):
        read_report(src)
    with contextlib.suppress(CheckpointError):
        str(inspect_adapter(src))
    with contextlib.suppress(CheckpointError):
        read_mlx_lm(src)
    with contextlib.suppress(CheckpointError):
        folder = read_folder(src)
        if not check_folder(folder, LINEAR):
            read_adapter(folder)
    dst = src.parent / "dst"
    try:
        lora_one.convert(src, dst, to)
    except CheckpointError:
        assert not dst.exists()
    else:  # what was written opens
        read_mlx_lm(dst) if to == "mlx" else read_adapter(read_folder(dst))
        shutil.rmtree(dst)


TO = st.sampled_from(["peft", "mlx"])


def test_the_good_folder_is_good(root):
    with changed(root) as src:
        assert read_report(src).layers[0].name == "layer" and inspect_adapter(src).report is not None
        assert check_folder(read_folder(src), LINEAR) == [] and set(read_mlx_lm(src).layers) == {"layer"}
        open_all_ways(src)


_READ = "r lora_alpha rank_pattern alpha_pattern use_rslora lora_dropout modules_to_save bias target_modules"
_ALSO = "task_type peft_type init_lora_weights fine_tune_type lora_parameters unknown"
SETTINGS = st.dictionaries(
    st.sampled_from([*_READ.split(), *_ALSO.split()]),
    VALUES
    | st.dictionaries(st.sampled_from(["layer", "^layer", ".*", "["]), st.sampled_from([1, 2, 0, 0.5, 1e300, "2"]))
    | st.fixed_dictionaries({"rank": VALUES | st.just(2), "scale": VALUES | st.just(2.0), "dropout": VALUES}),
    max_size=3,
)


@examples(700)
@given(SETTINGS, st.booleans(), TO)
def test_settings_of_any_kind(root, settings, only_peft, to):
    config = json.loads((root.parent / "good" / CONFIG).read_text()) | settings
    if only_peft:
        del config["lora_parameters"]
    with changed(root, config=json.dumps(config).encode()) as src:
        open_all_ways(src, to)


@examples(700)
@given(st.sampled_from(["config", "peft", "mlx", "report"]), DAMAGE, TO)
@example("config", ([], DEEP.encode()), "mlx")
@example("report", ([], DEEP.encode()), "mlx")
def test_damaged_files(root, which, damage, to):
    name = {"config": CONFIG, "peft": PEFT, "mlx": MLX, "report": REPORT}[which]
    data = damaged((root.parent / "good" / name).read_bytes(), damage)
    others: dict[str, None] = {"mlx": None} if which == "peft" else {}
    with changed(root, **{which: data}, **others) as src:
        open_all_ways(src, to)


@examples(600)
@given(HEADERS.map(lying) | TENSORS.map(honest), st.booleans(), TO)
def test_weights_of_any_header(root, data, is_mlx, to):
    with changed(root, peft=data, mlx=data if is_mlx else None) as src:
        open_all_ways(src, to)


@examples(300)
@given(
    st.dictionaries(st.sampled_from([*Report.__dataclass_fields__, "x"]), VALUES, max_size=2),
    st.dictionaries(st.sampled_from([*LayerReport.__dataclass_fields__, "x"]), VALUES, max_size=2),
)
def test_reports_of_any_kind(root, values, layer):
    kept = json.loads((root.parent / "good" / REPORT).read_text())
    kept["report"]["layers"][0] |= layer
    kept["report"] |= values
    with changed(root, report=json.dumps(kept).encode()) as src:
        with contextlib.suppress(CheckpointError):
            str(read_report(src))
        inspect_adapter(src)


@pytest.mark.parametrize(
    ("setting", "pattern"),
    [
        ("rank_pattern", "(a+)+$"),
        ("alpha_pattern", "(a|a)*$"),
        ("rank_pattern", ".*.*.*.*.*.*.*.*.*.*.*.*!"),
        ("target_modules", "(.*a){25}!"),
        ("exclude_modules", "(a?){40}a{40}!"),
    ],
)
def test_a_pattern_without_end_is_refused(root, setting, pattern, monkeypatch):
    monkeypatch.setattr("lora_one.checkpoint.patterns.SECONDS", 0.5)
    config = json.loads((root.parent / "good" / CONFIG).read_text())
    config[setting] = pattern if setting.endswith("modules") else {pattern: 2}
    name = f"base_model.model.{'a' * 60}b.lora_{{}}.weight"
    data = honest({name.format("A"): ("F32", [2, 3]), name.format("B"): ("F32", [5, 2])})
    with (
        changed(root, config=json.dumps(config).encode(), peft=data) as src,
        pytest.raises(CheckpointError, match=r"takes more than 0.5 seconds"),
    ):
        read_folder(src)


def test_patterns_that_are_written_with_groups_mean_what_they_mean_in_peft(root):
    from peft.utils.other import get_pattern_key

    layers = [f"model.layers.{i}.{name}" for i in (0, 1, 11) for name in ("mlp.up_proj", "self_attn.q_proj")]
    patterns = {r"layers\.(0|1)\..*q_proj": 3, r"(layers\.\d+\.)+mlp\.up_proj": 4, "q_proj": 5, "^up_proj": 6}
    config = json.loads((root.parent / "good" / CONFIG).read_text()) | {"rank_pattern": patterns}
    names = {f"base_model.model.{layer}.lora_{side}.weight": ("F32", [2, 2]) for layer in layers for side in "AB"}
    with changed(root, config=json.dumps(config).encode(), peft=honest(names)) as src:
        folder = read_folder(src)
    expected = {layer: patterns.get(get_pattern_key(patterns, layer), 2) for layer in layers}
    assert {layer: folder.ranks[layer] for layer in layers} == expected and set(expected.values()) == {3, 4, 5}


@pytest.mark.parametrize("text", [DEEP, LONG, f'{{"r": {LONG}}}', "[1]", "null", '"text"', "{", "\0", ""])
def test_json_that_is_none(root, text):
    with changed(root, config=text.encode(), report=text.encode()) as src:
        for read in (read_folder, read_mlx_lm, read_report, inspect_adapter):
            with pytest.raises(CheckpointError):
                read(src)


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "src/adapter_config.json/x", "/proc/self/mem", "none"])
def test_paths_where_no_adapter_can_be(root, name):
    path = root / name
    for read in (read_folder, read_mlx_lm, read_report, inspect_adapter):
        with pytest.raises(CheckpointError):
            read(path)
    with pytest.raises(CheckpointError):
        lora_one.convert(path, root / "dst", "mlx")
    if name != "none":
        with pytest.raises(CheckpointError):
            lora_one.convert(root.parent / "good", path, "mlx")


@pytest.fixture(scope="module")
def model():
    import torch

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(3, 5)

        def forward(self, x):
            return self.layer(x)

    return Net()


@examples(120)
@given(SETTINGS | st.just({}), HEADERS.map(lying) | TENSORS.map(honest) | st.none(), TEXTS)
def test_lora_one_load_on_torch(root, model, settings, weights, task):
    import torch

    files = {} if weights is None else {"peft": weights}
    config = json.loads((root.parent / "good" / CONFIG).read_text()) | settings
    before = copy.deepcopy(model.state_dict())
    kinds = [type(module) for module in model.modules()]
    with changed(root, config=json.dumps(config).encode(), mlx=None, **files) as src, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lora_one.load(copy.deepcopy(model), src)
            lora_one.load(model, src)
        except LoraOneError:
            assert [type(module) for module in model.modules()] == kinds
            after = model.state_dict()
            assert before.keys() == after.keys() and all(torch.equal(before[key], after[key]) for key in before)
        else:
            model.layer = model.layer.base_layer
