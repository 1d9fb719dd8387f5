import json

from benchmarks import harness, step


def in_this_process(contender: harness.Contender) -> dict[str, float]:
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
