"""The tap's products are LoRA's own gradients, and it keeps no more than they need."""

import pytest
import torch

import lora_one
from lora_one.backends.torch import TorchSession
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.backends.torch.passes.tap import WHOLE, product_of, tap
from lora_one.core.sides import Products, Sides
from tests.backends.torch.models import CASES, llama

CONFIG = lora_one.Config(rank=4)


def random_sides(session: TorchSession) -> dict[str, Sides]:
    generator = torch.Generator().manual_seed(0)
    return {
        layer.name: Sides(
            torch.randn(layer.in_features, 5, generator=generator),
            torch.randn(layer.out_features, 3, generator=generator),
        )
        for layer in session.layers
    }


def lora_gradients(session: TorchSession, sides: dict[str, Sides]) -> dict[str, Products]:
    """The same products by autograd through PEFT's layers with a pair whose product is zero, at scale 1."""
    pairs = {}
    for site in find_sites(session.model):
        right, left = sides[site.layer.name]
        lora_A = torch.cat([right.mT, torch.zeros(3, len(right))]).requires_grad_(True)
        lora_B = torch.cat([torch.zeros(len(left), 5), left], dim=1).requires_grad_(True)
        site.module.scaling[site.adapter] = 1.0
        site.lora_A.weight, site.lora_B.weight = torch.nn.Parameter(lora_A), torch.nn.Parameter(lora_B)
        pairs[site.layer.name] = site.lora_A.weight, site.lora_B.weight
    batches = session._batches
    for batch in batches:
        (session._loss_fn(session.model, batch) / len(batches)).backward()
    return {name: Products(b.grad[:, :5], a.grad[5:].mT) for name, (a, b) in pairs.items()}


@pytest.mark.parametrize("name", CASES)
def test_products_are_the_gradients_of_lora_itself(name):
    case = CASES[name]()
    with TorchSession(case.model, case.batches, case.loss_fn, CONFIG) as session:
        sides = random_sides(session)
        _, got = session.sides_pass(sides)
        for layer, expected in lora_gradients(session, sides).items():
            for product, gradient in zip(got[layer], expected, strict=True):
                torch.testing.assert_close(product, gradient, rtol=1e-4, atol=1e-5 * float(gradient.abs().max()))


@pytest.mark.parametrize(
    ("product", "kept"),
    [
        (WHOLE, (6, 30)),
        (product_of(Sides(torch.ones(30, 3), torch.ones(20, 2))), (6, 30)),
    ],
    ids=["whole", "sides"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_backward_pass_keeps(product, kept, dtype):
    """It keeps x itself, without a copy, in its own dtype."""
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
    assert tensor.data_ptr() == x.data_ptr()


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
