"""What the side-by-side measurements share: contenders in processes of their own, rounds in turn, medians, tables.

A contender is a function of settings that JSON can hold, named "module:function", that measures itself and returns
numbers. Every round of every contender is a fresh process, and the rounds of all contenders take turns, so that what
one leaves behind (threads, allocator caches, a warm page cache) or a slow minute of the machine favours nobody.

    python -m benchmarks.harness benchmarks.step:torch_fused '{"rank": 8}' OUT.json  # one round

On a GPU, whose time is dear, processes are forked off one that has imported the frameworks, and has not touched it.
"""

import gc
import importlib
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

RESULTS = Path(__file__).parent / "results"
ROOT = Path(__file__).parents[1]
MIB = 2**20


class Contender(NamedTuple):
    """What runs in a process of its own."""

    function: str  # "module:function"; returns a dict of numbers
    settings: dict[str, Any]  # its keyword arguments


def measure(
    contenders: Mapping[str, Contender], rounds: int, say: Callable[[str], None] = print, forked: Sequence[str] = ()
) -> dict[str, Any]:
    """Every contender `rounds` times, in turn.

    Args:
        forked: modules; each process is then forked off one that has imported them, in the environment of its start.

    Returns:
        name -> {"settings", "rounds": the numbers of each round, "median": the median of each number}.

    Raises:
        RuntimeError: a contender failed; the message is the end of what it printed.
    """
    found: dict[str, list[dict[str, float]]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name, contender in contenders.items():
            found[name].append(run_in_own_process(contender, forked))
            say(f"round {number + 1} of {rounds}: {name}: {_shown(found[name][-1])}")
    return {
        name: {
            "settings": contenders[name].settings,
            "rounds": rounds_of,
            "median": {key: statistics.median(row[key] for row in rounds_of) for key in rounds_of[0]},
        }
        for name, rounds_of in found.items()
    }


def run_in_own_process(contender: Contender, forked: Sequence[str] = ()) -> dict[str, float]:
    """The numbers of one round."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "numbers.json"
        # bitsandbytes, which PEFT imports, touches the GPU as it is imported: then there is no forking any more.
        if forked and importlib.util.find_spec("bitsandbytes") is None:
            _run_forked(contender, out, forked)
            return dict(json.loads(out.read_text(encoding="utf-8")))
        command = [sys.executable, "-m", "benchmarks.harness", contender.function, json.dumps(contender.settings), out]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
        if result.returncode != 0:
            raise RuntimeError(f"{contender.function} {contender.settings}: {result.stderr[-2000:]}")
        numbers: dict[str, float] = json.loads(out.read_text(encoding="utf-8"))
        return numbers


def _run_forked(contender: Contender, out: Path, modules: Sequence[str]) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(modules))  # of the first call: the server stays
    process = context.Process(target=main, args=(contender.function, json.dumps(contender.settings), str(out)))
    process.start()
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"{contender.function} {contender.settings}: exit {process.exitcode}; its error is above")


def peak_memory(device: str) -> "PeakMemory":
    """A context manager that measures the peak of a block on "cpu" or "cuda"."""
    return PeakMemory() if device == "cpu" else CudaPeakMemory()


class PeakMemory:
    """Bytes that a block of code needs at its peak above what is resident when it begins (RSS; Linux only).

    with PeakMemory() as memory:
        ...
    memory.peak
    """

    peak = 0

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the high-water mark back to what is resident
        self._before = _status("VmRSS")
        return self

    def __exit__(self, *_: object) -> None:
        self.peak = _status("VmHWM") - self._before


class CudaPeakMemory(PeakMemory):
    """The same of what PyTorch's allocator has given out on a GPU."""

    def __enter__(self) -> "CudaPeakMemory":
        import torch

        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        self._before = torch.cuda.memory_allocated()
        return self

    def __exit__(self, *_: object) -> None:
        import torch

        self.peak = torch.cuda.max_memory_allocated() - self._before


def synchronize(device: str) -> None:
    """Wait for all that was asked of a GPU."""
    if device != "cpu":
        import torch

        torch.cuda.synchronize()


def median_seconds(
    run: Callable[[], Any], warm_up: int = 3, repeats: int = 15, before: Callable[[], Any] | None = None
) -> float:
    """Median wall time of one call, after `warm_up` others; `before` each, what does not count."""
    times = []
    for number in range(warm_up + repeats):
        if before is not None:
            before()
        began = time.perf_counter()
        run()
        if number >= warm_up:
            times.append(time.perf_counter() - began)
    return statistics.median(times)


def machine() -> dict[str, Any]:
    """The processor, how much of it may be used, the GPU if there is one, and the system."""
    return {
        "cpu": _cpu_name(),
        **_gpu(),
        "cores": os.cpu_count(),
        "threads": os.environ.get("OMP_NUM_THREADS", "as the library chooses"),
        "system": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    }


def versions(*packages: str) -> dict[str, str]:
    """Of those of the packages that are installed, by the names they are installed by."""
    installed = {d.name.lower().replace("_", "-") for d in importlib.metadata.distributions()}
    return {package: importlib.metadata.version(package) for package in packages if package in installed}


def save(path: Path, **parts: Any) -> None:
    """Write a result, with the machine it was measured on."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"machine": machine(), **parts}, indent=1) + "\n", encoding="utf-8")


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; floats with three digits."""
    cells = [[_cell(value) for value in row] for row in (header, *rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(header))]
    lines = [
        "| " + " | ".join(value.ljust(width) for value, width in zip(row, widths, strict=True)) + " |" for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def _cell(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _shown(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{key} {_cell(value)}" for key, value in numbers.items())


def _gpu() -> dict[str, str]:
    if shutil.which("nvidia-smi") is None:
        return {}
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    return {"gpu": subprocess.run(command, capture_output=True, text=True).stdout.strip()}


def _status(key: str) -> int:
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


def _cpu_name() -> str:
    """With the numbers that tell generations of one name apart."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    if "model name" not in found:
        return platform.processor()
    numbers = ", ".join(f"{key} {found[key]}" for key in ("cpu family", "model") if key in found)
    return f"{found['model name']} ({numbers})"


def main(function: str, settings: str, out: str) -> None:
    """One round of one contender, in this process."""
    module, name = function.split(":")
    numbers = getattr(importlib.import_module(module), name)(**json.loads(settings))
    Path(out).write_text(json.dumps(numbers), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
