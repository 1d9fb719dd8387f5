"""The preconditioned step beside its peers: the LoRA pairs of a 7B Llama, and smaller models.

    python -m benchmarks.step              # everything (a quarter of an hour), to benchmarks/results/step.json
    python -m benchmarks.step --smoke      # two rounds of tiny shapes, to check that it runs
    python -m benchmarks.step --only torch # of torch, jax, mlx; the file keeps what it has of the others
    python -m benchmarks.step --device cuda --out benchmarks/results/step_h100.json  # torch and jax on a GPU

Contenders of one framework and size take turns, each in a process of its own. A number is the median over rounds of the
median wall time of a step; memory is the peak over the state that the step starts with (factors, gradients, moments).
"""

import argparse
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import (
    MIB,
    RESULTS,
    Contender,
    measure,
    median_seconds,
    peak_memory,
    save,
    synchronize,
    table,
    versions,
)

Shapes = list[tuple[int, int]]  # (out, in) of each target
# A rate at which nothing moves: the gradient stays the same, and after thousands of steps along it factors overflow.
RATE, REG = 1e-12, 1e-2


def llama_shapes(layers: int, hidden: int, key_value: int, intermediate: int) -> Shapes:
    """The seven linear layers of each block."""
    square, narrow = [(hidden, hidden)] * 2, [(key_value, hidden)] * 2
    return (square + narrow + [(intermediate, hidden)] * 2 + [(hidden, intermediate)]) * layers


SIZES: dict[str, Shapes] = {
    "7B": llama_shapes(32, 4096, 4096, 11008),
    "7B, 200 pairs": llama_shapes(32, 4096, 4096, 11008)[:200],
    "0.5B": llama_shapes(24, 896, 128, 4864),
    "embedded": llama_shapes(4, 128, 64, 384),
    "smoke": llama_shapes(2, 16, 8, 32),
}
# framework -> (size, rank) of each comparison
COMPARISONS = {
    "torch": [("7B", 8), ("7B", 16), ("7B", 64), ("0.5B", 8), ("embedded", 8)],
    "jax": [("7B, 200 pairs", 8), ("7B, 200 pairs", 16), ("7B, 200 pairs", 64), ("0.5B", 8), ("embedded", 8)],
    "mlx": [("7B", 8), ("0.5B", 8), ("embedded", 8)],
}
COMPARISONS_ON_GPU = {
    "torch": [("7B", 8), ("7B", 16), ("7B", 64)],
    "jax": [("7B, 200 pairs", 8)],
}
CONTENDERS = {
    "torch": ["fused AdamW", "lora-one", "plain loop", "PEFT Riemannian"],
    "jax": ["optax.adamw", "lora-one", "plain loop"],
    "mlx": ["AdamW", "lora-one", "plain loop"],
}
IN_A_GRAPH = ", CUDA graph"
CONTENDERS_ON_GPU = {
    "torch": [*CONTENDERS["torch"], f"fused AdamW{IN_A_GRAPH}", f"lora-one{IN_A_GRAPH}"],
    "jax": CONTENDERS["jax"][:2],
}
MODULES = ("torch", "peft", "lora_one.backends.torch")  # what processes of a GPU have imported when they begin


def factors(size: str, rank: int, seed: int = 0) -> list[tuple[np.ndarray, np.ndarray]]:
    """(r, in) and (out, r) of each target, float32."""
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal((rank, i), np.float32) * 0.02, rng.standard_normal((o, rank), np.float32) * 0.02)
        for o, i in SIZES[size]
    ]


def torch_step(contender: str, size: str, rank: int, device: str = "cpu") -> dict[str, float]:
    """One contender of PyTorch on PEFT's LoRA layers over a base model that takes no memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_riemannian_optimizer

    import lora_one
    from lora_one.backends.torch.optimizer import lora_pairs

    with torch.device("meta"):
        base = torch.nn.Sequential(*[torch.nn.Linear(i, o, bias=False) for o, i in SIZES[size]])
        names = [str(index) for index in range(len(base))]
        model = get_peft_model(base, LoraConfig(r=rank, target_modules=names))
    values = _factors_on(device, size, rank)
    for name, value in zip([n for n, p in model.named_parameters() if p.requires_grad], values, strict=True):
        holder = model.get_submodule(name.rpartition(".")[0])
        holder.weight = torch.nn.Parameter(value)
        holder.weight.grad = torch.randn(value.shape, generator=torch.Generator(device).manual_seed(1), device=device)
    del values
    parameters = [p for p in model.parameters() if p.requires_grad]
    new_gradients = None
    contender, in_a_graph, _ = contender.partition(IN_A_GRAPH)
    if contender == "fused AdamW":
        optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True)
    elif contender == "PEFT Riemannian":
        optimizer = create_riemannian_optimizer(model, torch.optim.AdamW, lr=RATE, reg=REG, fused=True)
        # It multiplies the inverses into `.grad` itself: without the next backward pass they would grow by each step.
        gradients = [p.grad for p in parameters]
        new_gradients = partial(torch._foreach_copy_, gradients, [g.clone() for g in gradients])
    elif contender == "plain loop":
        optimizer = torch.optim.AdamW(parameters, lr=RATE, fused=True)
        optimizer.step = partial(_plain_loop, optimizer.step, lora_pairs(model))
    else:
        optimizer = lora_one.optimizer(model, RATE, precondition=True, reg=REG)
    if device == "cpu":  # activations come and go in a training step, and leave the allocator with memory in hand
        torch.empty(31 * MIB, dtype=torch.uint8)
    step = _captured(optimizer) if in_a_graph else optimizer.step
    return _measured(step, size, new_gradients, device)


def _factors_on(device: str, size: str, rank: int) -> list[Any]:
    """Of all pairs, one after the other; on a GPU, which draws them faster, other values."""
    import torch

    if device == "cpu":
        return [torch.from_numpy(x) for pair in factors(size, rank) for x in pair]
    shapes = [shape for o, i in SIZES[size] for shape in ((rank, i), (o, rank))]
    return [torch.randn(shape, device=device) * 0.02 for shape in shapes]


def _captured(optimizer: Any) -> Callable[[], Any]:
    """The step in a CUDA graph, after one outside that makes the moments."""
    import torch

    for group in optimizer.param_groups:
        group["capturable"] = True
    with torch.cuda.stream(torch.cuda.Stream()):
        optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    return graph.replay


def _plain_loop(adamw_step: Callable[[], Any], pairs: list[Any]) -> None:
    """What one would write: the formula pair by pair into `.grad`, AdamW, and the gradients back."""
    import torch

    from lora_one.backends.torch import TorchOps
    from lora_one.core.factors import Factors
    from lora_one.core.precondition import precondition

    raw = [(p, p.grad) for pair in pairs for p in pair]
    with torch.no_grad():
        for pair in pairs:
            direction = precondition(TorchOps(), Factors(*pair), Factors(*(p.grad for p in pair)), REG)
            for p, its in zip(pair, direction, strict=True):
                p.grad = its
    adamw_step()
    for p, its in raw:
        p.grad = its


def jax_step(contender: str, size: str, rank: int, device: str = "cpu") -> dict[str, float]:
    """One contender of JAX, as one compiled step that gives its buffers back."""
    import time

    import jax
    import jax.numpy as jnp
    import optax

    from lora_one.backends.jax import lora_adamw

    def tree(seed: int) -> Any:
        pairs = enumerate(factors(size, rank, seed))
        return {f"layer{n}": {"lora_a": jnp.asarray(a.T), "lora_b": jnp.asarray(b.T)} for n, (a, b) in pairs}

    def plain_loop(pair: Any, grads: Any) -> Any:
        a, b, eye = pair["lora_a"], pair["lora_b"], jnp.eye(rank)
        new_a = jnp.linalg.solve(b @ b.T + REG * eye, grads["lora_a"].T).T  # (in, r)
        return {"lora_a": new_a, "lora_b": jnp.linalg.solve(a.T @ a + REG * eye, grads["lora_b"])}

    tx = lora_adamw(RATE, reg=REG) if contender == "lora-one" else optax.adamw(RATE, weight_decay=0.0)
    params, grads = tree(0), tree(1)
    state = tx.init(params)

    def step(params: Any, state: Any, grads: Any) -> Any:
        if contender == "plain loop":
            grads = {name: plain_loop(params[name], grads[name]) for name in params}
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, grads).compile()
    seconds = time.perf_counter() - began
    held = [params, state]

    def run() -> None:
        held[:] = compiled(*held, grads)
        jax.block_until_ready(held)

    del params, state
    measured = _measured(run, size)
    if device != "cpu":  # what XLA says that it needs besides the arguments
        measured["peak_mib"] = compiled.memory_analysis().temp_size_in_bytes / MIB
    return {**measured, "compile_seconds": seconds}


def mlx_step(contender: str, size: str, rank: int) -> dict[str, float]:
    """One contender of MLX, compiled as mlx-lm's trainer does it."""
    import mlx.core as mx
    from mlx.optimizers import AdamW

    from lora_one.backends.mlx import LoraOneAdamW, MlxOps
    from lora_one.core.factors import Factors
    from lora_one.core.precondition import precondition

    def tree(seed: int) -> Any:
        pairs = enumerate(factors(size, rank, seed))
        return {f"layer{n}": {"lora_a": mx.array(a.T), "lora_b": mx.array(b.T)} for n, (a, b) in pairs}

    params, grads = tree(0), tree(1)

    def plain_loop(pair: Any, grads: Any) -> Any:
        given = [Factors(x["lora_a"].T, x["lora_b"].T) for x in (pair, grads)]
        direction = precondition(MlxOps(), *given, REG)
        return {"lora_a": direction.lora_A.T, "lora_b": direction.lora_B.T}

    if contender == "lora-one":
        optimizer = LoraOneAdamW(RATE, params, REG, weight_decay=0.0)
    else:
        optimizer = AdamW(RATE, bias_correction=True, weight_decay=0.0)
    optimizer.init(params)
    held = [params]
    del params
    state = [optimizer.state]
    mx.eval(held, state, grads)

    def update(params: Any, grads: Any) -> Any:
        if contender == "plain loop":
            grads = {name: plain_loop(params[name], grads[name]) for name in params}
        return optimizer.apply_gradients(grads, params)

    compiled = mx.compile(update, inputs=state, outputs=state)

    def run() -> None:
        held[0] = compiled(held[0], grads)
        mx.eval(held, state)

    return _measured(run, size)


def _measured(
    step: Callable[[], Any], size: str, before: Callable[[], Any] | None = None, device: str = "cpu"
) -> dict[str, float]:
    def run() -> None:
        step()
        synchronize(device)

    # A few steps alone may all fall into the quicker of the states that a machine has (benchmarks/notes/step.md).
    warm_up, repeats = (1, 2) if size == "smoke" else (10, 20) if size.startswith("7B") else (10, 40)
    if device != "cpu":
        warm_up, repeats = 5, 20
    run()  # the moments come into being
    with peak_memory(device) as memory:
        run()
    return {"ms": 1e3 * median_seconds(run, warm_up, repeats, before), "peak_mib": memory.peak / MIB}


def compare(framework: str, size: str, rank: int, rounds: int, device: str = "cpu") -> dict[str, Any]:
    """All contenders of a framework on one size."""
    names = (CONTENDERS if device == "cpu" else CONTENDERS_ON_GPU)[framework]
    settings = {"size": size, "rank": rank, **({} if device == "cpu" else {"device": device})}
    contenders = {
        name: Contender(f"benchmarks.step:{framework}_step", {"contender": name, **settings}) for name in names
    }
    found = measure(contenders, rounds, forked=() if device == "cpu" else MODULES)
    first = found[names[0]]["median"]["ms"]
    for result in found.values():
        result["ratio"] = result["median"]["ms"] / first
    return {"framework": framework, "size": size, "rank": rank, "pairs": len(SIZES[size]), "contenders": found}


def ratios(comparisons: list[dict[str, Any]]) -> str:
    """The table: times the framework's own AdamW."""
    rows = [
        (
            f"{c['framework']}, {c['size']}, r = {c['rank']}",
            name,
            found["median"]["ms"],
            found["ratio"],
            found["median"]["peak_mib"],
        )
        for c in comparisons
        for name, found in c["contenders"].items()
    ]
    return table(["shapes", "step", "ms", "times AdamW", "peak MiB over the state"], rows)


def draw(comparisons: list[dict[str, Any]], path: Path) -> None:
    """Bars of the ratios, one group a comparison."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 0.55 * sum(len(c["contenders"]) for c in comparisons) / 2 + 1), layout="constrained")
    axes = figure.subplots()
    colors = {"lora-one": "tab:blue", "plain loop": "lightsteelblue", "PEFT Riemannian": "tab:orange"}
    at, ticks = 0, []
    for c in comparisons:
        for name, found in c["contenders"].items():
            axes.barh(at, found["ratio"], color=colors.get(name, "gray"))
            axes.text(found["ratio"], at, f" {found['ratio']:.2f}", va="center", fontsize=8)
            ticks.append((at, f"{c['framework']}, {c['size']}, r = {c['rank']}: {name}"))
            at += 1
        at += 1
    axes.set_yticks([t for t, _ in ticks], [label for _, label in ticks], fontsize=8)
    axes.invert_yaxis()
    axes.set(xlabel="time of a step, times the framework's own AdamW", title="the preconditioned AdamW step")
    figure.savefig(path, dpi=120)


def _of(comparison: dict[str, Any]) -> tuple[str, str, int]:
    return comparison["framework"], comparison["size"], comparison["rank"]


def _place(comparison: dict[str, Any]) -> tuple[int, int, int]:
    """Where a comparison stands in the table: as COMPARISONS has them."""
    framework, size, rank = _of(comparison)
    return list(COMPARISONS).index(framework), list(SIZES).index(size), rank


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes only")
    parser.add_argument("--only", nargs="+", choices=list(COMPARISONS), help="frameworks; all that the device has")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), default=list(SIZES))
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 16, 64])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=RESULTS / "step.json")
    options = parser.parse_args(arguments)
    packages = versions("torch", "peft", "jax", "optax", "mlx", "numpy")
    comparisons: list[dict[str, Any]] = []
    if options.out.exists() and not options.smoke:
        comparisons = json.loads(options.out.read_text(encoding="utf-8"))["comparisons"]
    known = COMPARISONS if options.device == "cpu" else COMPARISONS_ON_GPU
    for framework in options.only or known:
        chosen = [(size, rank) for size, rank in known[framework] if size in options.sizes and rank in options.ranks]
        for size, rank in [("smoke", 4)] if options.smoke else chosen:
            new = compare(framework, size, rank, 1 if options.smoke else options.rounds, options.device)
            comparisons = sorted([*(c for c in comparisons if _of(c) != _of(new)), new], key=_place)
            save(options.out, versions=packages, comparisons=comparisons)
            draw(comparisons, options.out.with_suffix(".png"))
    print(ratios(comparisons))


if __name__ == "__main__":
    main()
