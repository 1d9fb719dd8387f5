"""The statements of the theory's figures, on fixed seeds, and the gradients behind them."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.theory import alignment, portrait, preconditioning, relu
from benchmarks.theory.arrays import Arrays
from benchmarks.theory.problem import Linear, Relu, low_rank
from tests.arrays import ARRAYS

NUMPY = Arrays("numpy")
SEEDS = (0, 1, 2)


@pytest.mark.parametrize("activation", ["linear", "relu"])
def test_gradients_are_autograds(activation):
    rng = np.random.default_rng(0)
    weight, target, shift = (rng.standard_normal((5, 7)) for _ in range(3))
    if activation == "linear":
        problem = Linear(NUMPY, target, 40, seed=3)
        x = np.random.default_rng(3).standard_normal((40, 7))
        act, weight = torch.nn.Identity(), np.zeros((5, 7))
    else:
        problem = Relu(NUMPY, weight, target, 40, seed=3)
        x = np.random.default_rng(3).standard_normal((2, 40, 7))[0]
        act = torch.nn.ReLU()
    c = torch.tensor(shift, requires_grad=True)
    outputs = [act(torch.tensor(x) @ (torch.tensor(weight) + change).T) for change in (c, torch.tensor(target))]
    (0.5 * (outputs[0] - outputs[1]).square().sum(dim=1).mean()).backward()
    np.testing.assert_allclose(problem.gradient(shift), c.grad.numpy(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_risks_are_the_expected_loss(seed):
    """The linear risk in closed form and the ReLU risk by samples, against many fresh samples."""
    rng = np.random.default_rng(seed)
    weight, target, shift = (rng.standard_normal((4, 4)) for _ in range(3))
    x = rng.standard_normal((200_000, 4))
    expected = 0.5 * np.square(x @ (shift - target).T).sum(axis=1).mean()
    assert Linear(NUMPY, target, 10, seed).risk(shift) == pytest.approx(expected, rel=0.02)
    outputs = [np.maximum(x @ (weight + change).T, 0) for change in (shift, target)]
    expected = 0.5 * np.square(outputs[0] - outputs[1]).sum(axis=1).mean()
    assert Relu(NUMPY, weight, target, 100_000, seed).risk(shift) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_plain_lora_aligns_with_the_gradient_the_earlier_the_smaller_its_start(seed):
    found = alignment.measure(NUMPY, steps=300, every=300, seed=seed)
    lora = [found[f"LoRA, variance {variance:g}"] for variance in alignment.VARIANCES]
    assert min(rows["angle"][0] for rows in lora) > 0.98
    late = [rows["angle"][1] for rows in lora]
    assert min(late[:2]) > 0.98 and late[-1] < 0.25  # by 300 steps variances 1 and 0.1 have not begun to turn
    assert late[1:] == sorted(late[1:], reverse=True)
    assert found["LoRA-One"]["angle"][0] < 1e-12
    assert found["LoRA-One"]["risk"][1] < 1e-2 * min(rows["risk"][1] for rows in lora)


@pytest.mark.parametrize("seed", SEEDS)
def test_b_the_spectral_start_converges_linearly_and_independently_of_the_condition_number(seed):
    found = preconditioning.measure(NUMPY, seed)
    spectral = np.array(found["risk"]["spectral"])
    tens = spectral[30:91:10] / spectral[20:81:10]  # what ten steps leave of the risk
    assert tens.max() < 2e-3 and tens.max() / tens.min() < 2
    assert spectral[100] < 1e-30
    with_it, without = (np.array(found["rate"][name]) for name in ("preconditioned", "plain"))
    assert with_it.max() < 0.75 and with_it.max() - with_it.min() < 2e-3
    assert np.all(np.diff(without) > 0)
    scaled = (1 - without[2:]) * found["kappa"][2:]  # from kappa = 100 on, a step takes off a share of about 1 / kappa
    assert scaled.min() > 0.3 and scaled.max() < 1


@pytest.mark.parametrize("seed", SEEDS)
def test_b_lora_gas_vectors_stall_where_rank_r_cannot_reach_and_lora_ones_can(seed):
    found = preconditioning.measure(NUMPY, seed)["risk"]
    problem = Linear(NUMPY, low_rank(100, 100, np.array([4.0, 3.0, 2.0, 1.0]) / 4, seed), 1600, seed)

    def least(correction):
        """The risk that no B A of rank 4 is below (Eckart and Young)."""
        return 0.5 * np.square(np.linalg.svd(problem.target - correction, compute_uv=False)[4:]).sum()

    for name, (_, correction) in preconditioning.starts(NUMPY, problem).items():
        bound = least(correction)
        if name == "LoRA-GA's vectors, base corrected":
            assert bound > 1e-2
            assert bound <= found[name][100] < 1.2 * bound
        else:
            assert bound < 1e-28
            assert found[name][100] < 1e-29
    # With A and B exchanged rank 4 is enough: only the input side of the gradient is blurred by the samples.
    u, _, vt = np.linalg.svd(problem.gradient(np.zeros((100, 100))))
    assert least(-u[:, :4] @ vt[4:8]) < 1e-28


@pytest.mark.parametrize("seed", SEEDS)
def test_c_every_road_ends_on_the_curve_of_minimisers_and_the_spectral_one_is_short(seed):
    found = portrait.measure(NUMPY, steps=6000, seed=seed)
    points, risk = np.array(found["points"]), np.array(found["risk"])
    a, b = points[-1, :, :2], points[-1, :, 2:]
    np.testing.assert_allclose(b * a, np.broadcast_to(portrait.BETA, a.shape), atol=1e-4)
    assert (b[:-1] > 0).any() and (b[:-1] < 0).any()  # LoRA reaches both branches
    length = np.linalg.norm(np.diff(points, axis=0), axis=-1).sum(axis=0)
    steps = (risk < 1e-6).argmax(axis=0)
    assert length[-1] < 0.7 * np.median(length[:-1])
    assert steps[-1] < 0.8 * np.median(steps[:-1])


@pytest.mark.parametrize("seed", SEEDS)
def test_d_preconditioning_and_the_spectral_start_each_pay_through_a_relu(seed):
    found = relu.measure(NUMPY, steps=60, seed=seed)
    order = ["LoRA-One, preconditioned", "LoRA, preconditioned", "LoRA-One", "LoRA"]
    for better, worse in pairwise(order):
        assert found[better][60] < 0.2 * found[worse][60]
    best = np.array(found[order[0]])
    tens = best[20:51:10] / best[10:41:10]
    assert tens.max() < 1e-3  # linear, at least


@pytest.mark.parametrize("arrays", [a for a in ARRAYS if a.values[0][1] == "float64"])
def test_the_figures_are_the_same_on_every_backend(arrays):
    """Plain descent and angles by figure a, the preconditioner and the ReLU by figure d.

    `arrays` is (backend, dtype): tests/conftest.py gives JAX its float64 by it.
    """
    theirs = Arrays(arrays[0])
    for measure in (
        lambda on: [rows["risk"] + rows["angle"] for rows in alignment.measure(on, steps=20, every=10).values()],
        lambda on: list(relu.measure(on, steps=5).values()),
    ):
        np.testing.assert_allclose(measure(theirs), measure(NUMPY), rtol=1e-7, atol=1e-12)
