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
    model, report = lora_one.init(Net(), config=shared.config(balance))
    optimizer = lora_one.optimizer(model, 1e-3, start_steps=shared.STEPS)
    gradients_of = nn.value_and_grad(model, squared_error)
    for step in range(shared.STEPS):
        optimizer.update(model, gradients_of(model, batches()[step % 2])[1])
    assert report.to_dict()["done"]  # which asks the optimizer
    return pairs_of(model), report


@pytest.mark.parametrize("balance", shared.BALANCES[:-1])
def test_the_start_of_the_first_steps_has_the_balance_too(balance):
    shared.assert_started_without_data(without_data, balance)
