"""The start in Lightning's loop: closures, accumulated and clipped gradients, a schedule."""

import warnings

import pytest
import torch
from torch import nn

import lora_one
from lora_one import Config


@pytest.fixture
def lightning():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import lightning

        yield lightning


def fitted(lightning, accumulate: int, clip: float | None):
    """The model and its report after twelve optimizer steps."""

    class Fit(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            base = nn.Sequential(nn.Linear(24, 20), nn.Tanh(), nn.Linear(20, 8))
            self.model, self.report = lora_one.init(base, config=Config(rank=2, targets=["0", "2"]))

        def training_step(self, batch, index):
            x, y = batch
            return (self.model(x) - y).square().mean()

        def configure_optimizers(self):
            adamw = lora_one.optimizer(self.model, learning_rate=1e-2)
            return [adamw], [torch.optim.lr_scheduler.ExponentialLR(adamw, 0.9)]

    torch.manual_seed(1)
    data = torch.utils.data.TensorDataset(torch.randn(192, 24), torch.randn(192, 8))
    quiet = {name: False for name in ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")}
    trainer = lightning.Trainer(
        max_steps=12, accelerator="cpu", accumulate_grad_batches=accumulate, gradient_clip_val=clip, **quiet
    )
    module = Fit()
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=16 // accumulate))
    assert trainer.global_step == 12
    return module.model, module.report


def factors(model) -> list[torch.Tensor]:
    return [p.detach().clone() for name, p in model.named_parameters() if "lora_" in name]


def test_lightning_makes_the_start_also_of_gradients_that_it_accumulates(lightning):
    model, report = fitted(lightning, accumulate=1, clip=None)
    assert report.done and 6 <= report.steps <= 12 and not report.plain_layers
    accumulated, other = fitted(lightning, accumulate=2, clip=None)
    assert other.steps == report.steps
    for x, y in zip(factors(model), factors(accumulated), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


def test_lightning_may_clip(lightning):
    _, report = fitted(lightning, accumulate=1, clip=1e-3)
    assert report.done and all(layer.start == "spectral" for layer in report.layers)
