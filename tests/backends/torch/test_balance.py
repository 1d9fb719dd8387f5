"""How A and B share the start on PyTorch, with batches and without."""

import pytest

import lora_one
from tests.backends import balance as shared
from tests.backends.torch.test_adaptive_rank import Net, batches, pairs_of, squared_error, started


@pytest.mark.parametrize("balance", shared.BALANCES)
@pytest.mark.parametrize("gradient", ["sketch", "exact"])
def test_the_factors_have_the_lengths_of_the_balance_and_one_product(balance, gradient):
    model, report = started(gradient=gradient, **shared.options(balance))
    shared.assert_started(pairs_of(model), balance)
    assert report.config.balance == balance


def test_the_theorys_scale_is_shared_as_well():
    products = []
    for balance in shared.BALANCES:
        model, _ = started(scale="gradient", eta=0.3, **shared.options(balance))
        products.append(pairs_of(model))
    for pairs in products[1:]:
        shared.assert_same_products(pairs, products[0])


def without_data(balance):
    model, report = lora_one.init(Net(), config=shared.config(balance))
    optimizer = lora_one.optimizer(model, 1e-3, start_steps=shared.STEPS)
    for step in range(shared.STEPS):
        squared_error(model, batches()[step % 2]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert report.done
    return pairs_of(model), report


@pytest.mark.parametrize("balance", shared.BALANCES[:-1])
def test_the_start_of_the_first_steps_has_the_balance_too(balance):
    shared.assert_started_without_data(without_data, balance)
