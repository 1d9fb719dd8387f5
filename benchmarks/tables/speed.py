"""Tables of what the start and the step cost: results of benchmarks.init, benchmarks.step and benchmarks.mlx_init."""

from typing import Any

from benchmarks.page.markdown import table

from .results import read

PEER, STEP = "PEFT LoRA-GA", "LoRA step, r = 24"
BY_BATCHES = {
    "97.5M": "1 of 8 x 256",
    "97.5M, 8 batches": "8 of 8 x 256",
    "97.5M, one batch of 64": "1 of 64 x 32",
    "97.5M, 64 batches of one": "64 of 1 x 32",
}
PAIRS = {"7B": "a 7B Llama", "7B, 200 pairs": "a 7B Llama", "0.5B": "a 0.5B Llama", "embedded": "the embedded model"}
FRAMEWORKS = {"torch": "PyTorch", "jax": "JAX", "mlx": "MLX"}
ASIDE = ("LoRA step, r = 8", "authors' recipe", "PEFT EVA")
BASELINES = ("fused AdamW", "optax.adamw", "AdamW")
ON_ONE_CPU = "On one CPU thread, a start of a 97.5M Llama on eight sequences takes"


def _ratio(found: dict[str, dict[str, Any]], name: str, other: str, key: str) -> float | None:
    one, its = found[name].get(key), found.get(other, {}).get(key)
    return one / its if one and its else None


def summary() -> str:
    """The sentences at the head of the page on speed."""
    cpu, gpu = read("init")["cases"]["97.5M"], read("init_h100")["cases"]["8B"]
    many = read("init")["cases"]
    start, recomputing, twice = "one pass", "one pass, recompute", "two passes"

    def times(case: dict[str, Any], name: str, other: str, key: str = "cpu_seconds") -> str:
        return f"{_ratio(case, name, other, key):.2f}"

    slower = {
        name: many["97.5M, 64 batches of one"][name]["cpu_seconds"]
        / many["97.5M, one batch of 64"][name]["cpu_seconds"]
        for name in (start, STEP)
    }
    return "\n".join(
        [
            f"- {ON_ONE_CPU} {times(cpu, start, STEP)} times a LoRA step's forward and backward, in "
            f"{times(cpu, start, STEP, 'peak_mib')} of its memory, and {times(cpu, start, PEER)} of LoRA-GA's time.",
            f"- It holds {cpu[start]['energy']:.2f} of the best rank-8 energy in the worst layer, and with "
            f"`Config(passes=2)`, for {times(cpu, twice, STEP)} times the step, {cpu[twice]['energy']:.2f}.",
            f"- Recomputing activations it takes {times(cpu, recomputing, STEP)} times the step, in "
            f"{times(cpu, recomputing, STEP, 'peak_mib')} of its memory.",
            f"- On an H100, an 8B Llama in bfloat16 starts in {gpu[start]['seconds']:.2f} s, attaching included: "
            f"{times(gpu, start, PEER, 'seconds')} of LoRA-GA's time, in {times(gpu, start, PEER, 'peak_mib')} of its "
            "memory.",
            f"- 64 batches of one sequence take {slower[start]:.2f} times one batch of 64, as a LoRA step takes "
            f"{slower[STEP]:.2f} times. Each batch is read once a pass, so fewer cost less.",
        ]
    )


def starts_on_cpu() -> str:
    """The start on one thread, from one batch."""
    return _starts({"": read("init")["cases"]["97.5M"]}, "", "CPU s", "cpu_seconds")


def starts_by_batches() -> str:
    """The same by the number and the size of batches."""
    cases = read("init")["cases"]
    return _starts({label: cases[case] for case, label in BY_BATCHES.items()}, "batches", "CPU s", "cpu_seconds")


def starts_on_gpu() -> str:
    """The start on an H100, by model; without the slowest peers and another step."""
    cases = read("init_h100")["cases"]
    chosen = {case: {name: found[name] for name in found if name not in ASIDE} for case, found in cases.items()}
    return _starts(chosen, "model", "s", "seconds")


def all_starts_on_gpu() -> str:
    """All that was measured there."""
    return _starts(read("init_h100")["cases"], "model", "s", "seconds")


def _starts(cases: dict[str, dict[str, Any]], first: str, clock: str, key: str) -> str:
    lines = []
    for case, found in cases.items():
        for name, numbers in found.items():
            seconds, memory = (
                [_shown(_ratio(found, name, other, k)) for other in (PEER, STEP)] for k in (key, "peak_mib")
            )
            peak = numbers.get("peak_mib")
            outside = numbers.get("outside")
            lines.append(
                [
                    f"{case}: {name}" if case else name,
                    _shown(numbers[key], 1 if key == "cpu_seconds" else 2),
                    *seconds,
                    "" if peak is None else f"{peak:,.0f}",
                    *memory,
                    "" if outside is None else f"{100 * outside:.0f} %",
                    _energy(numbers),
                ]
            )
    over = ["times LoRA-GA", "times a step"]
    return table([first, clock, *over, "peak MiB", *over, "outside the model", "energy"], lines).strip()


def _energy(numbers: dict[str, Any]) -> str:
    if "energy" not in numbers:
        return ""
    alone = f" (A alone {numbers['energy_A']:.3f})" if numbers["energy_A"] > numbers["energy"] + 0.5 else ""
    return f"{numbers['energy']:.3f}{alone}"


def _shown(value: float | None, digits: int = 2) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def step_on_cpu() -> str:
    """The preconditioned step on two cores."""
    return _steps("step")


def step_on_another_cpu() -> str:
    """The same on another processor."""
    return _steps("step_other_epyc")


def step_on_gpu() -> str:
    """The same on an H100."""
    return _steps("step_h100")


def _steps(name: str) -> str:
    """Times of the framework's own AdamW, and what the compilation takes in JAX."""
    comparisons = read(name)["comparisons"]
    names = [n for c in comparisons for n in c["contenders"] if n not in BASELINES]
    others = list(dict.fromkeys(names))
    lines = []
    for c in comparisons:
        found = c["contenders"]
        base = next(found[n] for n in BASELINES if n in found)
        cells = [_step(found.get(other), base) for other in others]
        title = f"{FRAMEWORKS[c['framework']]}, {c['pairs']} of {PAIRS[c['size']]}, r = {c['rank']}"
        lines.append([title, f"{base['median']['ms']:.3g} ms{_compiled(base)}", *cells])
    return table(["LoRA pairs", "AdamW", *others], lines).strip()


def _step(numbers: dict[str, Any] | None, base: dict[str, Any]) -> str:
    if numbers is None:
        return ""
    ratio = numbers["median"]["ms"] / base["median"]["ms"]
    return f"{ratio:.{0 if ratio > 20 else 1}f}{_compiled(numbers)}"


def _compiled(numbers: dict[str, Any]) -> str:
    seconds = numbers["median"].get("compile_seconds")
    return "" if seconds is None else f", compiled in {seconds:.1f} s"


def step_summary() -> str:
    """How the step on an H100 stands to PEFT's, and in a CUDA graph to AdamW's."""
    found = [c["contenders"] for c in read("step_h100")["comparisons"]]
    shares = [100 * x["lora-one"]["median"]["ms"] / x["PEFT Riemannian"]["median"]["ms"] for x in found]
    graphs = [x["lora-one, CUDA graph"]["median"]["ms"] / x["fused AdamW, CUDA graph"]["median"]["ms"] for x in found]
    return (
        f"On an H100 the step takes {min(shares):.1f} to {max(shares):.1f} % of the time of PEFT's. Captured in a CUDA "
        f"graph, as `capturable=True` allows, it takes {min(graphs):.1f} to {max(graphs):.1f} times AdamW's."
    )


def mlx_memory() -> str:
    """Peaks of the start on MLX beside a training step's, in MiB."""
    columns = {
        "training_step_mib": "LoRA training step",
        "one_pass_mib": "one pass",
        "two_passes_mib": "two passes",
        "exact_one_batch_mib": "exact, one batch",
        "exact_two_batches_mib": "exact, two batches",
        "all_gradients_mib": "all full gradients",
    }
    rows = read("mlx_init")["rows"]
    lines = [[row["base"], str(row["tokens"]), *(f"{row[key]:.1f}" for key in columns)] for row in rows]
    ratios = [row["one_pass_mib"] / row["training_step_mib"] for row in rows]
    return (
        table(["base", "tokens a batch", *columns.values()], lines)
        + f"\nA start in one pass takes {min(ratios):.2f} to {max(ratios):.2f} of a training step's memory."
    )
