"""Tables of how nearly whole models agree: benchmarks/results/agreement.json."""

from benchmarks.page.markdown import table

from .results import read

PAIRS = {
    "torch float32 / jax float32": "PyTorch, JAX, float32",
    "torch float32 / mlx float32": "PyTorch, MLX, float32",
    "jax float32 / mlx float32": "JAX, MLX, float32",
    "torch float64 / jax float64": "PyTorch, JAX, float64",
}
MODELS = {"embedded": "the embedded Llama", "grouped": "a Llama with grouped heads"}
QUANTITIES = {
    "logits": "logits",
    "gradient of the weights": "gradient",
    "B0 A0": "B0 A0",
    "losses, worst step": "loss, worst of 50 steps",
    "effective weights, end": "weights at the end",
}


def errors() -> str:
    """The worst relative error of each quantity, for each pair of frameworks."""
    found = read("agreement")
    lines = [
        [f"{title}: {pair}", *(f"{found[model]['errors'][key][quantity]:.0e}" for quantity in QUANTITIES)]
        for model, title in MODELS.items()
        for key, pair in PAIRS.items()
    ]
    return table(["", *QUANTITIES.values()], lines).strip()


def rounding() -> str:
    """What limits the agreement of the losses in float32."""
    found = read("agreement")["embedded"]
    moved = found["of them moved the other way by step 1"]
    runs = list(
        zip(found["perturbed"]["moved the other way by step 1"], found["perturbed"]["losses, worst step"], strict=True)
    )
    turned, same = (max(error for count, error in runs if bool(count) is way) for way in (True, False))
    return (
        f"Of the embedded model's {found['factor entries']:,} factor entries, {moved['torch float32']} moved otherwise "
        f"in PyTorch's float32 than in float64, {moved['jax float32']} in JAX's and {moved['mlx float32']} in MLX's. "
        "One is enough for the differences above. PyTorch with weights moved by one rounding error differs from itself "
        f"by {turned:.0e} where this turns an entry round, and by {same:.0e} where it does not."
    )
