"""How A and B share the start on JAX, with batches and without."""

import pytest
from flax import nnx

import lora_one
from tests.backends import balance as shared
from tests.backends.jax.test_adaptive_rank import Net, batches, pairs_of, squared_error, started


@pytest.mark.parametrize("balance", shared.BALANCES)
def test_the_factors_have_the_lengths_of_the_balance_and_one_product(balance):
    model, report = started(Net, **shared.options(balance))
    shared.assert_started(pairs_of(model), balance)
    assert report.config.balance == balance


def without_data(balance):
    model, report = lora_one.init(Net(), config=shared.config(balance))
    optimizer = nnx.Optimizer(model, lora_one.optimizer(model, 1e-3, start_steps=shared.STEPS), wrt=nnx.LoRAParam)
    gradients_of = nnx.jit(nnx.grad(squared_error, argnums=nnx.DiffState(0, nnx.LoRAParam)))
    for step in range(shared.STEPS):
        optimizer.update(model, gradients_of(model, batches()[step % 2]))
    return pairs_of(model), report


@pytest.mark.parametrize("balance", shared.BALANCES[:-1])
def test_the_start_of_the_first_steps_has_the_balance_too(balance):
    shared.assert_started_without_data(without_data, balance)
