"""How A and B share the start on MLX, with batches and without."""

import mlx.nn as nn
import pytest

import lora_one
from tests.backends import balance as shared
from tests.backends.mlx.test_adaptive_rank import Net, batches, pairs_of, squared_error, started


@pytest.mark.parametrize("balance", shared.BALANCES)
def test_the_factors_have_the_lengths_of_the_balance_and_one_product(balance):
    model, report = started(**shared.options(balance))
    shared.assert_started(pairs_of(model), balance)
    assert report.config.balance == balance


def without_data(balance):
    config = lora_one.Config(**{**shared.adaptive.CONFIG.to_dict(), **shared.options(balance)})
    model, report = lora_one.init(Net(), config=config)
    optimizer = lora_one.optimizer(model, 1e-3, start_steps=shared.STEPS)
    gradients_of = nn.value_and_grad(model, squared_error)
    for step in range(shared.STEPS):
        optimizer.update(model, gradients_of(model, batches()[step % 2])[1])
    assert report.to_dict()["done"]  # which asks the optimizer
    return pairs_of(model), report


@pytest.mark.parametrize("balance", shared.BALANCES[:-1])
def test_the_start_of_the_first_steps_has_the_balance_too(balance):
    pairs, report = without_data(balance)
    for layer in report.layers:
        if layer.name != "narrow":  # a gradient of rank 1
            shared.assert_shared(pairs[layer.name], layer.singular_values, balance)
    shared.assert_same_products(pairs, without_data(0.5)[0])
