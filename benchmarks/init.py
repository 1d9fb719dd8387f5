"""What does the start cost, beside others' starts and beside a training step?

    python -m benchmarks.init                                 # everything: an hour on two cores
    python -m benchmarks.init --cases 97.5M --what seconds    # one part; the rest of the result stays
    python -m benchmarks.init --only "one pass" --rounds 1 --append    # one round more; medians are of all rounds
    python -m benchmarks.init --plot                          # draws docs/images/init.png from the result
    python -m benchmarks.init --device cuda --out benchmarks/results/init_h100.json    # models of 1B and 8B on a GPU

Every contender runs in processes of its own, in turn. Times are medians; the ratios are of CPU time, which on one
thread (OMP_NUM_THREADS=1) is what the wall time would be on a machine that does nothing else. Peaks are those above the
loaded model, of a round in which freed memory goes back to the system at once: otherwise they would be mostly the
allocator's habits.

On a GPU the ratios are of wall time, and the peaks those of PyTorch's allocator, of the same rounds.
"""

import argparse
import json
import os
import statistics
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import Contender, measure, table
from benchmarks.init_models import CASES, GPU_CASES, MICRO_BATCHES, MODULES, RANK, cases, prepared
from lora_one import Config

RESULT = harness.RESULTS / "init.json"
PLOT = Path(__file__).parents[1] / "docs" / "images" / "init.png"
K = RANK + Config().oversample  # directions that each layer's gradient is followed in
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # glibc: larger blocks are mapped and unmapped one by one
STEP = f"LoRA step, r = {K}"
PEER = "PEFT LoRA-GA"
ROUNDS = {"seconds": "rounds", "peak_mib": "peak_rounds"}


def contenders(case: str, folder: str, device: str = "cpu") -> dict[str, Contender]:
    """What is measured on a case. The slowest peers and the other frameworks are on the small models only; PEFT's
    LoRA-GA takes no quantised weights."""

    def one(function: str, **settings: Any) -> Contender:
        where = {} if device == "cpu" else {"device": device}
        return Contender(
            f"benchmarks.init_contenders:{function}", {"case": case, "folder": folder, **where, **settings}
        )

    starts = {
        "one pass": one("ours", passes=1),
        "one pass, recompute": one("ours", passes=1, recompute=True),
        "two passes": one("ours", passes=2),
        "exact": one("ours", gradient="exact"),
        "exact, recompute": one("ours", gradient="exact", recompute=True),
    }
    step = one("training_step", rank=K)
    if case in MICRO_BATCHES:  # these are compared with each other
        return {STEP: step, "one pass": starts["one pass"], "two passes": starts["two passes"]}
    found = {f"LoRA step, r = {RANK}": one("training_step", rank=RANK), STEP: step, PEER: one("lora_ga"), **starts}
    spec = cases(device)[case]
    if spec.quantized:
        del found[PEER]
    if case in ("tiny", "1B") or (device == "cpu" and spec.dtype == "float32"):
        found["authors' recipe"] = one("authors")
        found["PEFT EVA"] = one("eva")
    if case == "tiny" and device == "cpu":
        for backend in ("jax", "mlx"):
            found |= {
                f"{name}, {backend}": start._replace(settings={**start.settings, "backend": backend})
                for name, start in starts.items()
                if "recompute" not in name
            }
    return found


def run_on_gpu(case: str, folder: Path, device: str, only: list[str] | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each name and its one process, which has rounds of its own."""
    for name, contender in contenders(case, str(folder), device).items():
        if only is None or name in only:
            yield name, {"rounds": measure({name: contender}, 1, forked=MODULES)[name]["rounds"]}


def run(case: str, folder: Path, what: list[str], rounds: int, only: list[str] | None) -> dict[str, dict[str, Any]]:
    """name -> the rounds of each part that was measured, for `with_medians`."""
    chosen = {name: c for name, c in contenders(case, str(folder)).items() if only is None or name in only}
    found: dict[str, dict[str, Any]] = {name: {} for name in chosen}
    for part in what:
        before = dict(os.environ)
        os.environ.update(GIVE_BACK if part == "peak_mib" else {})
        try:
            measured = measure(chosen, rounds if part == "seconds" else 1)  # peaks hardly vary
        finally:
            os.environ.clear()
            os.environ.update(before)
        for name, result in measured.items():
            found[name][ROUNDS[part]] = [_of_part(part, row) for row in result["rounds"]]
    return found


def with_medians(numbers: dict[str, Any], new: dict[str, Any], append: bool) -> dict[str, Any]:
    """A contender's numbers with new rounds in the place of the same part's old ones, or after them."""
    rounds = {key: (numbers.get(key, []) if append else []) + rows for key, rows in new.items()}
    medians = {key: statistics.median(row[key] for row in rows) for rows in rounds.values() for key in rows[0]}
    return numbers | medians | rounds


def _of_part(part: str, row: dict[str, float]) -> dict[str, float]:
    """A round for time says nothing about the peak, whose rounds are slower."""
    of_the_other = {"seconds", "cpu_seconds", "outside"} if part == "peak_mib" else {"peak_mib"}
    return {key: value for key, value in row.items() if key not in of_the_other}


def ratios(found: dict[str, dict[str, Any]], clock: str = "cpu_seconds") -> str:
    """A table of one case; ratios of times are of `clock`."""

    def ratio(name: str, to: str, key: str) -> Any:
        parts = found[name].get(key), found.get(to, {}).get(key)
        return parts[0] / parts[1] if all(parts) else ""

    over = ["x LoRA-GA", f"x step {K}"]
    header = [
        "",
        "s",
        "CPU s",
        *over,
        "peak MiB",
        *over,
        "energy A",
        "energy BA",
        "outside",
        "passes",
    ]
    rows = [
        [
            name,
            numbers.get("seconds", ""),
            numbers.get("cpu_seconds", ""),
            ratio(name, PEER, clock),
            ratio(name, STEP, clock),
            numbers.get("peak_mib", ""),
            ratio(name, PEER, "peak_mib"),
            ratio(name, STEP, "peak_mib"),
            *(numbers.get(key, "") for key in ("energy_A", "energy", "outside", "passes")),
        ]
        for name, numbers in found.items()
    ]
    return table(header, rows)


def draw(results: dict[str, dict[str, dict[str, Any]]], path: Path) -> None:
    """CPU time and peak memory of each contender over PEFT LoRA-GA's, a column of bars a case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.5), layout="constrained")
    parts = {"cpu_seconds": "CPU time", "peak_mib": "peak memory"}
    for axes, (key, title) in zip(figure.subplots(1, 2), parts.items(), strict=True):
        cases = [case for case, found in results.items() if key in found.get(PEER, {})]
        names = list(
            dict.fromkeys(n for case in cases for n, found in results[case].items() if n != PEER and key in found)
        )
        for i, case in enumerate(cases):
            peer = results[case][PEER][key]
            values = [results[case].get(name, {}).get(key, 0.0) / peer for name in names]
            heights = [j + (i - (len(cases) - 1) / 2) * 0.8 / len(cases) for j in range(len(names))]
            axes.barh(heights, values, 0.8 / len(cases), label=case)
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set(title=f"{title} over {PEER}'s", xscale="log")
        axes.set_xticks(ticks := [0.1, 0.2, 0.5, 1, 2, 5, 10], [f"{tick:g}" for tick in ticks])
        axes.set_xticks([], minor=True)
        axes.set_yticks(range(len(names)), names)
        axes.invert_yaxis()
    if results:
        figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(results))
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=[*CASES, *GPU_CASES], help="all of the device but tiny")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--only", nargs="+", help="names of contenders")
    parser.add_argument("--what", nargs="+", choices=("seconds", "peak_mib"), default=["seconds", "peak_mib"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--append", action="store_true", help="add to the rounds that are there, do not replace them")
    parser.add_argument("--smoke", action="store_true", help="the tiny model, one round")
    parser.add_argument("--plot", action="store_true", help="draw the result that is there, and measure nothing")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    results = json.loads(options.out.read_text(encoding="utf-8"))["cases"] if options.out.is_file() else {}
    if options.plot:
        draw({case: found for case, found in results.items() if case in CASES}, PLOT)
        return
    device = options.device
    for case in ["tiny"] if options.smoke else options.cases or [name for name in cases(device) if name != "tiny"]:
        folder = prepared(case, device)
        found: Iterable[tuple[str, dict[str, Any]]]
        if device == "cpu":
            found = run(case, folder, options.what, 1 if options.smoke else options.rounds, options.only).items()
        else:
            found = run_on_gpu(case, folder, device, options.only)
        for name, numbers in found:
            of_case = results.setdefault(case, {})
            of_case[name] = with_medians(of_case.get(name, {}), numbers, options.append)
            packages = harness.versions("torch", "transformers", "peft", "bitsandbytes", "jax", "mlx", "lora-one")
            harness.save(options.out, rank=RANK, k=K, versions=packages, cases=results)
        clock = "cpu_seconds" if device == "cpu" else "seconds"
        print(f"\n{case}\n{ratios(results[case], clock)}\n", flush=True)


if __name__ == "__main__":
    main()
