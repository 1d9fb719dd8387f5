"""The tap's products are LoRA's own gradients, and it keeps no more than they need."""

import pytest
import torch

import lora_one
from lora_one.backends.torch import TorchSession
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.backends.torch.passes.tap import WHOLE, product_of, tap
from lora_one.core.sketch import Probe
from tests.backends.torch.models import CASES, llama

CONFIG = lora_one.Config(rank=4)


def probes(session: TorchSession, side: str, width: int) -> dict[str, Probe]:
    generator = torch.Generator().manual_seed(0)
    given = {}
    for layer in session.layers:
        if side == "A":
            given[layer.name] = Probe("A", torch.randn(width, layer.in_features, generator=generator))
        else:
            given[layer.name] = Probe("B", torch.randn(layer.out_features, width, generator=generator))
    return given


def lora_gradients(session: TorchSession, given: dict[str, Probe]) -> dict[str, torch.Tensor]:
    """The mean gradients over the batches, by autograd through PEFT's layers with these factors, at scale 1."""
    wanted = {}
    for site in find_sites(session.model):
        side, factor = given[site.layer.name]
        zero = (site.layer.out_features, len(factor)) if side == "A" else (factor.shape[1], site.layer.in_features)
        wanted[site.layer.name] = torch.nn.Parameter(torch.zeros(zero))
        site.module.scaling[site.adapter] = 1.0
        site.lora_A.weight = torch.nn.Parameter(factor) if side == "A" else wanted[site.layer.name]
        site.lora_B.weight = torch.nn.Parameter(factor) if side == "B" else wanted[site.layer.name]
    batches = session._batches
    for batch in batches:
        (session._loss_fn(session.model, batch) / len(batches)).backward()
    return {name: factor.grad for name, factor in wanted.items()}


@pytest.mark.parametrize("side", ["A", "B"])
@pytest.mark.parametrize("name", CASES)
def test_products_are_the_gradients_of_lora_itself(name, side):
    case = CASES[name]()
    with TorchSession(case.model, case.batches, case.loss_fn, CONFIG) as session:
        given = probes(session, side, 5)
        _, got = session.sketch_pass(given)
        expected = lora_gradients(session, given)
        for layer, gradient in expected.items():
            torch.testing.assert_close(got[layer], gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize(
    ("product", "kept"),
    [
        (WHOLE, (6, 30)),
        (product_of(Probe("A", torch.ones(3, 30))), (6, 3)),
        (product_of(Probe("B", torch.ones(20, 3))), (6, 30)),
    ],
    ids=["whole", "given A", "given B"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_backward_pass_keeps(product, kept, dtype):
    """It keeps what the product needs of x, or x itself without a copy, in its own dtype."""
    base = torch.nn.Linear(30, 20, bias=False, dtype=dtype).requires_grad_(False)
    layer = torch.nn.Identity()
    formed, calls, saved = [], [], []
    x = torch.randn(2, 3, 30, dtype=dtype)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t)
    with tap(layer, base, product, lambda product, dy: formed.append(product), calls.append), hooks:
        y = layer(x)
    y.float().sum().backward()
    assert layer(x) is x  # as it was
    assert len(formed) == 1 and calls == [True] and formed[0].dtype == torch.float32
    (tensor,) = saved
    assert tensor.numel() == kept[0] * kept[1]
    assert (tensor.data_ptr() == x.data_ptr()) == (product.keep is None)


class InPlace(torch.nn.Module):
    """A model like Falcon, which adds to the output of its first layer in place."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = torch.nn.Linear(12, 24), torch.nn.Linear(24, 10)

    def forward(self, x):
        y = self.up(x)
        y += 1.0
        z = self.down(y.relu_())
        z *= 2.0
        return z


@pytest.mark.parametrize("gradient", ["exact", "sketch"])
def test_a_model_that_changes_what_its_layers_return(gradient):
    torch.manual_seed(0)
    model, x = InPlace(), torch.randn(16, 12)
    loss = model(x).pow(2).mean()
    weights = {"up": model.up.weight, "down": model.down.weight}
    expected = dict(zip(weights, torch.autograd.grad(loss, list(weights.values())), strict=True))
    config = lora_one.Config(rank=4, gradient=gradient)
    _, report = lora_one.init(model, [x], lambda model, x: model(x).pow(2).mean(), config)
    for layer in report.layers:
        s = torch.linalg.svdvals(expected[layer.name].double())
        torch.testing.assert_close(torch.tensor(layer.singular_values).double(), s[:4], rtol=1e-4, atol=0)


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_checkpointing_too_one_batch_frees_each_full_gradient_in_the_backward_pass(reentrant):
    case = llama()
    case.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    case.model.enable_input_require_grads()
    case.model.train()
    inside = []
    with TorchSession(case.model, case.batches[:1], None, lora_one.Config(rank=4, gradient="exact")) as session:
        session.exact_pass(lambda *_: inside.append(torch._C._current_graph_task_id() != -1))
    # Reentrant checkpointing hides the forward pass from the count of calls: its sums are handed over at the end.
    assert inside == [not reentrant] * 14
