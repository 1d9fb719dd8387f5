"""The guides: the PyTorch page runs as it is printed, and the page for troubles has every error and warning."""

import inspect
import re
from pathlib import Path

from lora_one import errors

GUIDE = Path(__file__).parents[1] / "docs" / "guide"


def test_the_pytorch_page_runs_as_it_is_printed(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (GUIDE / "pytorch.md").read_text(), flags=re.DOTALL | re.MULTILINE)
    monkeypatch.chdir(tmp_path)
    scope: dict = {}
    for block in blocks:
        exec(compile(block, "pytorch.md", "exec"), scope)
    assert "3.mlp.down_proj" in capsys.readouterr().out
    names = [layer.name for layer in scope["report"].layers]
    assert len(names) == 12 and all(name.endswith(("q_proj", "v_proj", "down_proj")) for name in names)
    assert float(scope["loss"].detach()) < 0.7 * scope["report"].base_loss
    batch = scope["batch"]
    difference = scope["merged"](**batch).logits - scope["model"](**batch).logits
    assert difference.abs().max() < 1e-3 * scope["model"](**batch).logits.abs().max()
    assert (tmp_path / "merged" / "model.safetensors").is_file()


def test_every_error_and_warning_is_on_the_page_for_troubles():
    page = (GUIDE / "troubleshooting.md").read_text(encoding="utf-8")
    classes = {name for name, cls in inspect.getmembers(errors, inspect.isclass) if cls.__module__ == errors.__name__}
    rows = set(re.findall(r"^\| `(\w+)` \| .+ \| .+ \|$", page, flags=re.MULTILINE))
    assert rows == classes - {"LoraOneError", "InitWarning"}
    assert "`lora_one.errors.LoraOneError`" in page and "`lora_one.errors.InitWarning`" in page
