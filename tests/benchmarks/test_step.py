import json

from benchmarks import harness, step


def in_this_process(contender: harness.Contender, forked: object = ()) -> dict[str, float]:
    """Spares eight imports of a framework; that processes of their own work is test_harness's matter."""
    return getattr(step, contender.function.split(":")[1])(**contender.settings)


def test_smoke_measures_every_contender_and_writes_table_json_and_plot(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(harness, "run_in_own_process", in_this_process)
    out = tmp_path / "step.json"
    step.main(["--smoke", "--out", str(out)])
    result = json.loads(out.read_text(encoding="utf-8"))
    assert {c["framework"]: list(c["contenders"]) for c in result["comparisons"]} == step.CONTENDERS
    for comparison in result["comparisons"]:
        first, *_ = comparison["contenders"].values()
        for found in comparison["contenders"].values():
            assert found["median"]["ms"] > 0
            assert found["ratio"] == found["median"]["ms"] / first["median"]["ms"]
    assert set(result["machine"]) == {"cpu", "cores", "threads", "system"} and result["versions"]["torch"]
    assert out.with_suffix(".png").stat().st_size > 1000
    assert "| torch, smoke, r = 4 | lora-one " in capsys.readouterr().out


def test_a_part_that_is_measured_again_takes_the_place_of_its_old_numbers(tmp_path, monkeypatch):
    out = tmp_path / "step.json"
    parts = ("torch", "embedded"), ("jax", "7B, 200 pairs"), ("jax", "embedded"), ("torch", "embedded")
    for turn, (framework, size) in enumerate(parts):
        monkeypatch.setattr(harness, "run_in_own_process", lambda *_, turn=turn: {"ms": turn + 1, "peak_mib": 1.0})
        monkeypatch.setattr(step, "draw", lambda comparisons, path: None)
        step.main(["--only", framework, "--sizes", size, "--ranks", "8", "--rounds", "1", "--out", str(out)])
    found = json.loads(out.read_text(encoding="utf-8"))["comparisons"]
    assert [(c["framework"], c["size"]) for c in found] == [parts[3], parts[1], parts[2]]
    assert [c["contenders"]["lora-one"]["median"]["ms"] for c in found] == [4, 2, 3]


def test_pefts_step_finds_the_gradients_of_a_backward_pass_each_time():
    """Its pinv raises once they have grown out of float32, as they do when each step multiplies the last one's."""
    assert step.torch_step("PEFT Riemannian", "embedded", 4)["ms"] > 0
