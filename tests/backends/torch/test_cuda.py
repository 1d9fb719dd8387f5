"""Tests that need a CUDA GPU. The tests beside this file run the same code on the CPU."""

import copy

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import lora_one
from lora_one.backends.torch import LoraOneAdamW, deferred, ops
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.core.fold import fold, start_fold
from lora_one.core.gradient import RowProduct
from lora_one.errors import ConfigError
from tests.arrays import best_rank
from tests.backends.torch.deferred.runs import Run, begun
from tests.backends.torch.deferred.test_steps import assert_steps_of_core
from tests.backends.torch.models import CASES, llama
from tests.backends.torch.test_init import EXACT, ONE_PASS, RANK, SKETCH, assert_one_step, gradients, share_held
from tests.backends.torch.test_lora_adamw import SHAPES, make_pairs, parameters

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU here")


def on_gpu(pairs):
    for p in parameters(pairs):
        p.data = p.data.cuda()
        p.grad = None
    return pairs


def set_gradients_on_gpu(pairs, seed: int) -> None:
    """Draw gradients on the CPU, and copy them into the memory of the present gradients."""
    for index, p in enumerate(parameters(pairs)):
        g = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * seed + index), dtype=p.dtype).cuda()
        p.grad = g if p.grad is None else p.grad.copy_(g)


def stepped_eagerly(dtype, steps: int, shapes=SHAPES):
    """The steps on the CPU, in float64, which the tests beside this file compare with the spec."""
    pairs = make_pairs(shapes, torch.float64)
    for p in parameters(pairs):
        p.data = p.data.to(dtype).double()
    optimizer = LoraOneAdamW(parameters(pairs), pairs, reg=1e-2, lr=1e-2)
    for i in range(steps):
        for index, p in enumerate(parameters(pairs)):
            generator = torch.Generator().manual_seed(100 * i + index)
            p.grad = torch.randn(p.shape, generator=generator, dtype=dtype).double()
        optimizer.step()
    return pairs


def gpu_pairs(dtype, shapes=SHAPES):
    pairs = make_pairs(shapes, torch.float64)
    for p in parameters(pairs):
        p.data = p.data.to(dtype)
    return on_gpu(pairs)


def assert_same(pairs, expected, tolerance: float) -> None:
    for got, want in zip(parameters(pairs), parameters(expected), strict=True):
        error = (got.detach().double().cpu() - want.detach()).abs().max() / want.detach().abs().max()
        assert error <= tolerance


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 2e-5)])
def test_steps_are_those_of_the_cpu_in_float64(dtype, tolerance, kernel):
    pairs = gpu_pairs(dtype)
    optimizer = LoraOneAdamW(parameters(pairs), pairs, reg=1e-2, lr=1e-2, **{kernel: True})
    for i in range(20):
        set_gradients_on_gpu(pairs, i)
        optimizer.step()
    assert_same(pairs, stepped_eagerly(dtype, 20), tolerance)


@pytest.mark.parametrize("kernel", ["fused", "foreach"])
def test_a_step_in_a_cuda_graph_is_the_step(kernel):
    pairs = gpu_pairs(torch.float32)
    optimizer = LoraOneAdamW(parameters(pairs), pairs, reg=1e-2, lr=1e-2, capturable=True, **{kernel: True})
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # as torch asks: a few steps on another stream, before
        for i in range(2):
            set_gradients_on_gpu(pairs, i)
            optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizer.step()
    for i in range(2, 10):
        set_gradients_on_gpu(pairs, i)
        graph.replay()
    torch.cuda.synchronize()
    assert_same(pairs, stepped_eagerly(torch.float32, 10), 2e-5)


def test_a_compiled_step_is_the_step_and_one_graph():
    pairs = gpu_pairs(torch.float32, SHAPES[:2])
    optimizer = LoraOneAdamW(parameters(pairs), pairs, reg=1e-2, lr=1e-2, foreach=True)
    compiled = torch.compile(optimizer.step, fullgraph=True)
    for i in range(3):
        set_gradients_on_gpu(pairs, i)
        compiled()
    assert_same(pairs, stepped_eagerly(torch.float32, 3, SHAPES[:2]), 2e-5)


def test_nothing_waits_for_the_device():
    pairs = gpu_pairs(torch.float32)
    optimizer = LoraOneAdamW(parameters(pairs), pairs, fused=True)
    set_gradients_on_gpu(pairs, 0)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def kernels(run) -> int:
    """The number of kernels and copies that ran on the GPU."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
        run()
        torch.cuda.synchronize()
    return sum(1 for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA)


def test_a_step_launches_as_many_kernels_for_twelve_layers_as_for_two():
    counts = []
    for layers in (2, 12):
        pairs = on_gpu(make_pairs([(8, 32, 32), (8, 32, 48)] * layers, torch.float32))
        optimizer = LoraOneAdamW(parameters(pairs), pairs, fused=True)
        for i in range(2):
            set_gradients_on_gpu(pairs, i)
            optimizer.step()
        counts.append(kernels(optimizer.step))
    assert 0 < counts[1] <= counts[0] + 4  # kernels over lists of tensors take a bounded number of them


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("config", "tolerance"), [(EXACT, 2e-5), (SKETCH, 2e-4)], ids=["exact", "sketch"])
def test_starts_are_those_of_the_float64_gradient(name, config, tolerance):
    case = CASES[name]()
    expected = gradients(case)
    model, report = lora_one.init(case.model.cuda(), case.batches, case.loss_fn, config)
    assert_one_step(model.cpu(), expected, tolerance)
    assert report.peak_memory is not None and report.peak_memory > 0


@pytest.mark.parametrize("name", CASES)
def test_one_pass_in_stacks_holds_what_it_holds_on_the_host(name):
    case = CASES[name]()
    expected = gradients(case)
    on_host, _ = lora_one.init(CASES[name]().model, case.batches, case.loss_fn, ONE_PASS)
    model, report = lora_one.init(case.model.cuda(), case.batches, case.loss_fn, ONE_PASS)
    assert report.passes == 1
    for layer in report.layers:
        shares = [share_held(m.cpu(), layer.name, expected[layer.name]) for m in (on_host, model)]
        assert shares[1] > shares[0] - 0.01


def test_a_fold_of_bfloat16_rows_is_that_of_their_float64_copies():
    """Tensor cores multiply the rows by directions in three bfloat16 parts."""
    torch.manual_seed(0)
    dy, x = (torch.randn(3, 64, n, device="cuda").bfloat16() for n in (48, 40))
    omega, test = (torch.randn(3, 40, n, device="cuda") for n in (6, 8))
    got = fold(ops, start_fold(ops, omega, 48, test), RowProduct(dy, x))
    wide = start_fold(ops, omega.double().cpu(), 48, test.double().cpu())
    expected = fold(ops, wide, RowProduct(dy.double().cpu(), x.double().cpu()))
    products = [(state.u * state.s[:, None]) @ state.v.mT for state in (got, expected)]
    torch.testing.assert_close(products[0].cpu().double(), products[1], rtol=0, atol=1e-4 * float(expected.s.max()))
    torch.testing.assert_close(got.tested.cpu().double(), expected.tested, rtol=0, atol=1e-4 * float(expected.s.max()))


@pytest.mark.parametrize("config", [EXACT, SKETCH], ids=["exact", "sketch"])
@pytest.mark.parametrize("factor", [2.0**-30, 2.0**14])
def test_float16_starts_are_those_of_float32(config, factor):
    """The loss may be small or large: a backward pass that overflows is left from the device's own thread."""

    def start(dtype):
        case = llama(torch.float16)
        batches = [{k: v.cuda() for k, v in batch.items()} for batch in case.batches]
        model = case.model.to(dtype).cuda()
        adapted, _ = lora_one.init(model, batches, lambda m, b: m(**b).loss * factor, config)
        return [site.lora_B.weight @ site.lora_A.weight for site in find_sites(adapted)]

    for got, expected in zip(start(torch.float16), start(torch.float32), strict=True):
        assert float(torch.cosine_similarity(got.flatten(), expected.flatten(), dim=0)) > 0.999


def test_a_bfloat16_gradient_is_multiplied_in_float32():
    """Tensor cores form G of a bfloat16 model without rounding beyond that of dy and x."""
    case = llama(torch.bfloat16)
    model = case.model.cuda().eval()
    seen = {}

    def keep(name):
        def hook(module, args, y):
            x = args[0].detach()
            y.register_hook(lambda dy: seen.setdefault(name, []).append((dy.detach(), x)))

        return hook

    layers = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    handles = [m.register_forward_hook(keep(n)) for n, m in layers.items()]
    for batch in case.batches:
        model(**{key: x.cuda() for key, x in batch.items()}).loss.backward()
    for handle in handles:
        handle.remove()
    model.zero_grad()
    attached, _ = lora_one.init(copy.deepcopy(model), case.batches, None, EXACT)
    expected = {
        name: sum(dy.double().flatten(0, 1).T @ x.double().flatten(0, 1) for dy, x in pairs).cpu().numpy() / 2
        for name, pairs in seen.items()
    }
    assert_one_step(attached.cpu(), expected, 2e-5)


def test_a_start_on_nf4_weights_is_that_of_the_dequantised_gradient():
    bnb = pytest.importorskip("bitsandbytes")
    from tests.backends.torch.test_quantized import NF4, batches, dequantized_gradients, load

    base = load(quantization_config=NF4, device_map={"": 0})
    expected = dequantized_gradients(base)
    for config in (lora_one.Config(rank=RANK, gradient="exact"), lora_one.Config(rank=RANK, passes=8)):
        model, _ = lora_one.init(base, batches(), config=config)
        sites = find_sites(model)
        assert len(sites) == 28 and all(isinstance(s.module.get_base_layer(), bnb.nn.Linear4bit) for s in sites)
        for site in sites:
            g = expected[site.layer.name]
            step = -best_rank(g, RANK) / np.linalg.norm(g, 2) / 128
            product = (site.lora_B.weight.double() @ site.lora_A.weight.double()).detach().cpu().numpy()
            assert np.linalg.norm(product - step) <= 1e-4 * np.linalg.norm(step), site.layer.name
        base = model.unload()


def begun_on_gpu(make, dtype=torch.float32, **options) -> Run:
    """A run whose optimizer was made before the model moved, as accelerate does it."""
    run = begun(make, dtype, **options)
    run.model.cuda()
    batches = [
        {k: x.cuda() for k, x in b.items()} if isinstance(b, dict) else tuple(x.cuda() for x in b)
        for b in run.case.batches
    ]
    return run._replace(case=run.case._replace(batches=batches))


@pytest.mark.parametrize("name", ["mlp", "llama", "gpt2", "t5", "classifier"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 5e-4)])
def test_a_start_without_data_in_stacks_is_that_of_core_in_float64(name, dtype, tolerance):
    run = begun_on_gpu(CASES[name], dtype)
    assert len(list(deferred._batches(run.pairs))) < len(run.pairs) or name == "mlp"
    assert_steps_of_core(run, tolerance)


def test_a_start_of_bfloat16_factors_is_that_of_float64_rounded():
    run = begun_on_gpu(llama, torch.bfloat16, start_steps=4)
    run.model.to(torch.bfloat16)
    assert_steps_of_core(run, 1e-2)
    assert all(factor.dtype == torch.bfloat16 for factor in parameters(run.pairs))


@pytest.mark.parametrize("precondition", [False, True])
def test_a_cuda_graph_holds_a_step_after_the_start_and_none_before(precondition):
    run, plain = (begun_on_gpu(llama, start_steps=4, precondition=precondition, reg=1e-2) for _ in range(2))
    for each in (run, plain):
        each.optimizer.param_groups[0]["capturable"] = True
    run.train(0, 2)
    run.backward(2)
    graph = torch.cuda.CUDAGraph()
    with pytest.raises(ConfigError, match="take these before the capture"), torch.cuda.graph(graph):
        run.optimizer.step()
    run.optimizer.zero_grad()
    assert run.report.steps == 2
    run.train(2, 4)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        run.train(4, 6)
        run.backward(6)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run.optimizer.step()
    graph.replay()
    for i in (7, 8):
        run.optimizer.zero_grad(set_to_none=False)
        run.backward(i)
        graph.replay()
    torch.cuda.synchronize()
    plain.train(0, 9)
    for got, want in zip(parameters(run.pairs), parameters(plain.pairs), strict=True):
        torch.testing.assert_close(got, want, rtol=0, atol=2e-4)


def test_a_gradient_scaler_skips_steps_of_a_start_in_float16():
    run = begun_on_gpu(llama, start_steps=3, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    for finite in (True, False, True, True, True):
        with torch.autocast("cuda", torch.float16):
            loss = run.model(**run.case.batches[0]).loss
        scaler.scale(loss if finite else loss * float("inf")).backward()
        scaler.step(run.optimizer)
        scaler.update()
        run.optimizer.zero_grad()
    assert run.report.done and run.report.steps == 3
    assert all(bool(factor.isfinite().all()) for factor in parameters(run.pairs))
