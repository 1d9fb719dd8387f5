import copy
import dataclasses
import math
import warnings

import numpy as np
import peft
import pytest
import torch
from torch import nn

import lora_one
from lora_one.backends.torch import TorchOps, TorchSession, ops
from lora_one.backends.torch.attachment.attach import find_sites
from lora_one.core.alignment import captured_energy
from lora_one.core.factors import Factors
from lora_one.core.gradient import Gradient, RowProduct, as_matrix
from lora_one.errors import ZeroGradientWarning
from tests.arrays import best_rank
from tests.backends.torch.models import CASES, Case, classifier, gpt2, llama, mlp

RANK = 4
SCALING = 16 / math.sqrt(RANK)
EXACT = lora_one.Config(rank=RANK, gradient="exact")
SKETCH = lora_one.Config(rank=RANK, passes=4)
ONE_PASS = lora_one.Config(rank=RANK)


def gradients(case: Case) -> dict[str, np.ndarray]:
    """The mean G of each linear weight over the batches, by autograd on the plain model, in float64, (out, in)."""
    model = copy.deepcopy(case.model).double().eval()
    for batch in case.batches:
        batch = [x.double() for x in batch] if isinstance(batch, tuple) else batch
        loss = model(**batch).loss if case.loss_fn is None else case.loss_fn(model, batch)
        loss.backward()
    gradients_by_name = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is not None and weight.ndim == 2 and weight.grad is not None:
            g = weight.grad.numpy() / len(case.batches)
            gradients_by_name[name] = g.T if type(module).__name__ == "Conv1D" else g
    return gradients_by_name


def products(model: nn.Module) -> dict[str, np.ndarray]:
    """The product s B A of each LoRA layer, float64."""
    return {
        site.layer.name: site.layer.scaling
        * (site.lora_B.weight.double() @ site.lora_A.weight.double()).detach().numpy()
        for site in find_sites(model)
    }


def assert_one_step(model: nn.Module, expected: dict[str, np.ndarray], tolerance: float, gamma: float = 128.0) -> None:
    """Rounding in G turns the subspace between s_r and s_(r+1), the more the closer they are (Davis and Kahan)."""
    for name, product in products(model).items():
        s = np.append(np.linalg.svd(expected[name], compute_uv=False), 0.0)
        step = -best_rank(expected[name], RANK) / s[0] * SCALING / gamma
        allowed = tolerance * s[RANK - 1] / (s[RANK - 1] - s[RANK])
        assert np.linalg.norm(product - step) <= allowed * np.linalg.norm(step), name


@pytest.mark.feature("Exact gradient")
@pytest.mark.parametrize("name", CASES)
def test_exact_start_is_the_truncated_svd_of_the_weight_gradients(name):
    """The reference is LAPACK on gradients of the plain model's weights, by autograd in float64."""
    case = CASES[name]()
    expected = gradients(case)
    model, report = lora_one.init(case.model, case.batches, case.loss_fn, EXACT)
    assert_one_step(model, expected, 1e-5)
    for layer in report.layers:
        s = np.linalg.svd(expected[layer.name], compute_uv=False)
        np.testing.assert_allclose(layer.singular_values, s[:RANK], rtol=1e-4)
        assert layer.gradient_norm == pytest.approx(np.linalg.norm(s), rel=1e-5)
        assert layer.energy == pytest.approx(np.sum(s[:RANK] ** 2) / np.sum(s**2), rel=1e-4)
        assert layer.share_of_best == 1.0 and layer.gradient_norm_error == 0.0


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("config", "tolerance"), [(EXACT, 1e-5), (SKETCH, 2e-4)], ids=["exact", "sketch"])
def test_layers_that_are_alike_may_go_in_stacks_as_they_do_on_a_gpu(monkeypatch, name, config, tolerance):
    monkeypatch.setattr(TorchSession, "stacks_layers", True)
    stacks = []
    stack = TorchOps.stack
    monkeypatch.setattr(
        TorchOps, "stack", lambda self, xs, axis=0: stacks.append((xs[0].ndim, len(xs))) or stack(self, xs, axis)
    )
    case = CASES[name]()
    expected = gradients(case)
    model, _ = lora_one.init(case.model, case.batches, case.loss_fn, config)
    assert_one_step(model, expected, tolerance)
    assert name == "mlp" or max(stacks) > (2, 1)  # of its layers no two are alike


@pytest.mark.parametrize("name", CASES)
def test_sketch_agrees_with_the_exact_start(name):
    """The layers are small: four passes at k = 20 see most of them completely."""
    case = CASES[name]()
    expected = gradients(case)
    model, report = lora_one.init(case.model, case.batches, case.loss_fn, SKETCH)
    assert_one_step(model, expected, 2e-4)
    assert min(layer.share_of_best for layer in report.layers) > 0.999


@pytest.mark.feature("Start in one pass")
@pytest.mark.parametrize("name", CASES)
def test_one_pass_holds_nearly_all_of_the_best_energy(name):
    """By default, and from a generator, which can be read once."""
    case = CASES[name]()
    expected = gradients(case)
    model, report = lora_one.init(case.model, (batch for batch in case.batches), case.loss_fn, ONE_PASS)
    assert report.passes == 1
    for layer in report.layers:
        share = share_held(model, layer.name, expected[layer.name])
        assert 0.98 < share <= 1 + 1e-6
        assert layer.share_of_best <= share + 0.01
        assert layer.gradient_norm == pytest.approx(np.linalg.norm(expected[layer.name]), rel=0.2)


def share_held(model: nn.Module, name: str, g: np.ndarray) -> float:
    """The energy of G in the directions of a layer's factors over that of its best part of rank RANK."""
    [site] = [site for site in find_sites(model) if site.layer.name == name]
    pair = Factors(*(x.weight.detach().double().numpy() for x in (site.lora_A, site.lora_B)))
    held = float(captured_energy(lora_one.backends.load_backend("numpy").ops, g, pair)) * np.linalg.norm(g) ** 2
    return held / np.sum(np.linalg.svd(g, compute_uv=False)[:RANK] ** 2)


@pytest.mark.parametrize("passes", [1, 2, 3, 5])
def test_every_number_of_passes_works_and_is_reported(passes):
    case = llama()
    expected = gradients(case)
    config = lora_one.Config(rank=RANK, passes=passes, oversample=6)
    model, report = lora_one.init(case.model, case.batches, config=config)
    assert report.passes == passes and report.batches == 2
    for layer in report.layers:
        share = share_held(model, layer.name, expected[layer.name])
        assert (0.8 if passes == 1 else 0.95) < share <= 1 + 1e-6
        assert layer.share_of_best <= share + 0.05  # an estimate, and on the safe side of the truth but for noise


def test_base_loss_and_norms_in_the_report():
    case = llama()
    model = copy.deepcopy(case.model).eval()
    with torch.no_grad():
        loss = np.mean([model(**batch).loss.item() for batch in case.batches])
    for config in (EXACT, SKETCH):
        _, report = lora_one.init(copy.deepcopy(case.model), case.batches, config=config)
        assert report.base_loss == pytest.approx(loss, rel=1e-5)
        assert report.gamma == 128.0 and report.gamma_trials == []


@pytest.mark.parametrize("config", [EXACT, SKETCH], ids=["exact", "sketch"])
@pytest.mark.parametrize("name", CASES)
def test_base_weights_are_unchanged_to_the_bit_and_the_model_is_ready_to_train(name, config):
    case = CASES[name]()
    case.model.train()
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    random_state = torch.random.get_rng_state()
    model, _ = lora_one.init(case.model, case.batches, case.loss_fn, config)
    after = {k.replace(".base_layer", ""): v for k, v in model.base_model.model.state_dict().items()}
    for key, value in before.items():
        assert torch.equal(after.get(key, after.get(key.replace("classifier.", "classifier.original_module."))), value)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.random.get_rng_state(), random_state)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable and all("lora_" in name or "modules_to_save" in name for name in trainable)
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks or module._backward_hooks for module in model.modules())


def test_first_step_lowers_the_loss():
    """Before any training the model is better than its base on the init batches: this is the purpose of `init`."""
    case = llama()
    model, report = lora_one.init(case.model, case.batches, config=SKETCH)
    model.eval()
    with torch.no_grad():
        loss = np.mean([model(**batch).loss.item() for batch in case.batches])
    assert loss < report.base_loss - 0.02


@pytest.mark.feature("LoRA dropout")
def test_evaluation_mode_is_kept_and_dropout_is_off_meanwhile():
    torch.manual_seed(0)
    case = llama(dropout=0.5)
    expected = gradients(case)  # in evaluation mode
    case.model.train()
    model, _ = lora_one.init(case.model, case.batches, config=dataclasses.replace(EXACT, dropout=0.3))
    assert_one_step(model, expected, 1e-5)
    assert model.peft_config["default"].lora_dropout == 0.3 and model.training
    case = llama()
    case.model.eval()
    model, _ = lora_one.init(case.model, case.batches, config=SKETCH)
    assert not any(module.training for module in model.modules())


def test_output_layer_and_embeddings_are_left_out_of_all_linear():
    for make, head in ((llama, "lm_head"), (gpt2, "lm_head"), (classifier, "classifier")):
        case = make()
        _model, report = lora_one.init(case.model, case.batches, config=EXACT)
        names = [layer.name for layer in report.layers]
        assert len(names) == {llama: 14, gpt2: 8, classifier: 13}[make]
        assert not any(name.endswith(head) or "embed" in name or "wte" in name for name in names)


@pytest.mark.feature("Linear layers")
@pytest.mark.parametrize(
    ("targets", "count"),
    [(["q_proj", "v_proj"], 4), (("layers.1.mlp.up_proj",), 1), (r".*layers\.0\.self_attn\.(q|k)_proj", 2)],
)
def test_targets_have_pefts_meaning(targets, count):
    case = llama()
    config = dataclasses.replace(SKETCH, targets=targets)
    _model, report = lora_one.init(case.model, case.batches, config=config)
    reference = peft.get_peft_model(
        llama().model, peft.LoraConfig(target_modules=targets if isinstance(targets, str) else list(targets))
    )
    assert [layer.name for layer in report.layers] == [site.layer.name for site in find_sites(reference)]
    assert len(report.layers) == count


def test_gradient_scale_is_a_gradient_step():
    case = mlp()
    expected = gradients(case)
    config = dataclasses.replace(EXACT, scale="gradient", eta=0.25)
    model, report = lora_one.init(case.model, case.batches, case.loss_fn, config)
    assert report.gamma is None
    for name, product in products(model).items():
        np.testing.assert_allclose(product, -0.25 * SCALING * best_rank(expected[name], RANK), atol=1e-6)


@pytest.mark.feature("Float16 and bfloat16")
def test_bfloat16_base_gets_float32_factors_near_those_of_float32():
    case = llama(torch.bfloat16)
    expected = gradients(Case(llama(torch.bfloat16).model.float(), case.batches, None))
    for config in (EXACT, SKETCH):
        model, _ = lora_one.init(llama(torch.bfloat16).model, case.batches, config=config)
        for site in find_sites(model):
            assert site.lora_A.weight.dtype == site.lora_B.weight.dtype == torch.float32
            assert site.module.get_base_layer().weight.dtype == torch.bfloat16
        assert_one_step(model, expected, 0.1)  # bf16 activations: 8 bits


def test_float64_model_is_computed_in_float64():
    case = mlp(torch.float64)
    expected = gradients(case)
    model, _ = lora_one.init(case.model, case.batches, case.loss_fn, EXACT)
    assert_one_step(model, expected, 1e-12)


def test_user_precision_flags_and_autocast_do_not_reach_the_algebra():
    case = mlp()
    expected = gradients(case)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        model, _ = lora_one.init(case.model, case.batches, case.loss_fn, EXACT)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert_one_step(model, expected, 1e-5)
    x = torch.randn(64, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        product = ops.matmul(x, x)
    assert product.dtype == torch.float32 and torch.equal(product, x @ x)


def test_shared_layer_gets_the_sum_of_its_calls():
    """`Mlp.shared` is called twice; its weight's gradient is the sum, and so must the tap's and the sketch's be."""
    case = mlp()
    assert_one_step(lora_one.init(case.model, case.batches, case.loss_fn, EXACT)[0], gradients(mlp()), 1e-5)


def test_one_batch_frees_each_full_gradient_before_the_next_layer():
    """In the last batch a layer is decomposed inside the backward pass: at most one full gradient is alive."""
    case = llama()
    alive, most = 0, 0
    session = lora_one.backends.load_backend("torch").open_session(case.model, case.batches[:1], None, EXACT)

    def consume(name, gradient):
        nonlocal most
        most = max(most, len(pending) - len(consumed))
        consumed.append(name)

    consumed: list[str] = []
    pending: list[str] = []
    with session:
        for site in find_sites(session.model):
            name = site.layer.name
            site.module.get_base_layer().register_full_backward_hook(lambda *_, name=name: pending.append(name))
        session.exact_pass(consume)
    assert len(consumed) == 14 and most <= 1 and alive == 0


def test_few_tokens_leave_a_gradient_as_the_product_of_their_rows():
    """All gradients of one batch of 8 tokens stay products; not where a sum is needed, or G is smaller."""
    few = [{name: ids[:1, :8] for name, ids in batch.items()} for batch in llama().batches]
    for batches, products in ((few[:1], 14), (few, 0), (llama().batches[:1], 0)):
        case = llama()._replace(batches=batches)
        handed_over: dict[str, Gradient] = {}
        with TorchSession(case.model, batches, None, EXACT) as session:
            session.exact_pass(handed_over.__setitem__)
        assert sum(isinstance(g, RowProduct) for g in handed_over.values()) == products
        for name, g in gradients(case).items():
            if name in handed_over:
                np.testing.assert_allclose(as_matrix(ops, handed_over[name]), g, atol=1e-5 * np.abs(g).max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_start_from_few_tokens_is_that_of_the_matrices(dtype, monkeypatch):
    """The layers are large enough for products with G, and give the same start as with G multiplied out."""

    def started():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(320, 300), nn.Tanh(), nn.Linear(300, 310)).to(dtype)
        batch = (torch.randn(3, 9, 320).to(dtype), torch.randn(3, 9, 310).to(dtype))
        loss_fn = lambda model, batch: (model(batch[0]) - batch[1]).float().square().mean()  # noqa: E731
        model, report = lora_one.init(model, [batch], loss_fn, EXACT)
        return products(model), report

    from_rows, report = started()
    monkeypatch.setattr(RowProduct, "is_smaller", False)
    expected, plain = started()
    for name, product in expected.items():
        assert np.linalg.norm(from_rows[name] - product) <= 1e-5 * np.linalg.norm(product)
    for one, other in zip(report.layers, plain.layers, strict=True):
        assert one.gradient_norm == pytest.approx(other.gradient_norm, rel=1e-5)
        assert one.singular_values == pytest.approx(other.singular_values, rel=1e-5)


def test_gradient_checkpointing_stays_on_and_changes_nothing():
    case = llama()
    expected = gradients(case)
    calls = []
    for config in (EXACT, SKETCH):
        model = llama().model
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.train()
        model.model.layers[0].self_attn.q_proj.register_forward_hook(lambda *_: calls.append(1))
        model, _ = lora_one.init(model, case.batches, config=config)
        assert_one_step(model, expected, 1e-5 if config is EXACT else 2e-4)
    assert len(calls) == 2 * 2 * (1 + 4)  # each layer forward twice a batch, in each pass


@pytest.mark.feature("Adapters attached by others")
def test_existing_adapter_is_started_again_in_place():
    case = llama()
    expected = gradients(case)
    lora_config = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules=["q_proj", "down_proj"], lora_dropout=0.1)
    model = peft.get_peft_model(case.model, lora_config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    for p in parameters:
        torch.nn.init.normal_(p)  # as if it had been trained: the gradient is still the base model's
    for config in (lora_one.Config(gradient="exact"), lora_one.Config(passes=4)):
        same, report = lora_one.init(model, case.batches, config=config)
        assert same is model
        assert [p for p in model.parameters() if p.requires_grad] == parameters  # an optimizer may hold them
        assert len(report.layers) == 4 and report.layers[0].rank == RANK
        for name, product in products(model).items():
            step = -best_rank(expected[name], RANK) / np.linalg.norm(expected[name], 2) * (32 / RANK) / 128
            assert np.linalg.norm(product - step) <= 2e-4 * np.linalg.norm(step)


def test_gamma_auto_raises_gamma_only_while_the_loss_is_above_the_base():
    case = mlp()
    config = dataclasses.replace(EXACT, gamma="auto", alpha=20000.0)  # a step that overshoots
    model, report = lora_one.init(case.model, case.batches, case.loss_fn, config)
    gammas = [trial.gamma for trial in report.gamma_trials]
    assert len(gammas) > 1 and gammas == [128.0 * 4**i for i in range(len(gammas))]
    assert all(trial.loss > report.base_loss for trial in report.gamma_trials[:-1])
    assert report.gamma_trials[-1].loss <= report.base_loss and report.gamma == gammas[-1]
    with torch.no_grad():
        loss = np.mean([case.loss_fn(model, batch).item() for batch in case.batches])
    assert loss == pytest.approx(report.gamma_trials[-1].loss, rel=1e-5)
    _calm, report = lora_one.init(mlp().model, case.batches, case.loss_fn, dataclasses.replace(EXACT, gamma="auto"))
    assert [trial.gamma for trial in report.gamma_trials] == [128.0]


def test_layers_without_gradient_keep_plain_loras_start_and_are_named():
    torch.manual_seed(0)
    case = mlp()
    case.model.add_module("unused", nn.Linear(12, 12))
    case.model.add_module("dead", nn.Linear(12, 12))

    def loss_fn(model, batch):
        return case.loss_fn(model, batch) + 0.0 * model.dead(batch[0]).sum()

    for config in (EXACT, SKETCH):
        with pytest.warns(ZeroGradientWarning, match="2 of 5 layers .*: unused, dead"):
            model, report = lora_one.init(copy.deepcopy(case.model), case.batches, loss_fn, config)
        assert report.plain_layers == ["unused", "dead"]
        for site in find_sites(model):
            if site.layer.name in report.plain_layers:
                assert not site.lora_B.weight.any()
                assert site.lora_A.weight.std().item() == pytest.approx(1 / math.sqrt(3 * 12), rel=0.3)
        assert "zero gradient" in str(report)


def test_seed_draws_another_sketch_and_the_same_seed_the_same():
    def start(seed: int) -> dict[str, np.ndarray]:
        config = dataclasses.replace(SKETCH, passes=2, oversample=1, seed=seed)
        return products(lora_one.init(llama().model, llama().batches, config=config)[0])

    one, again, other = start(0), start(0), start(1)
    for name in one:
        np.testing.assert_array_equal(one[name], again[name])
        assert np.linalg.norm(one[name] - other[name]) > 1e-3 * np.linalg.norm(one[name])


def test_a_batch_split_in_two_gives_the_same_start():
    case = llama()
    whole = {k: torch.cat([b[k] for b in case.batches]) for k in case.batches[0]}
    expected = gradients(llama())
    for batches in ([whole], case.batches):
        model, report = lora_one.init(llama().model, batches, config=EXACT)
        assert report.batches == len(batches)
        assert_one_step(model, expected, 1e-5)


def test_dataloader_is_a_re_iterable_collection():
    case = mlp()
    data = torch.utils.data.TensorDataset(*(torch.cat(x) for x in zip(*case.batches, strict=True)))
    loader = torch.utils.data.DataLoader(data, batch_size=16)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model, _ = lora_one.init(case.model, loader, case.loss_fn, EXACT)
    assert_one_step(model, gradients(mlp()), 1e-5)


def test_full_precision_blocks_nest_and_leave_the_flags_alone():
    from lora_one.backends.torch.linalg.precision import full_precision

    flags = torch.backends.mkldnn.matmul
    before = flags.fp32_precision
    x = torch.randn(8, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision(x.device):
            with full_precision(x.device):
                assert (x @ x).dtype == torch.float32
            assert flags.fp32_precision == "ieee"
            assert (x @ x).dtype == torch.float32
        assert (x @ x).dtype == torch.bfloat16
        assert ops.matmul(x, x).dtype == torch.float32
    assert flags.fp32_precision == before


@pytest.mark.parametrize("settings", [{"gradient": "exact"}, {"passes": 4}, {"gradient": "exact", "recompute": True}])
def test_a_compiled_model_starts_as_the_model_itself(settings):
    config = lora_one.Config(rank=RANK, targets=["q_proj", "down_proj"], **settings)
    expected, _ = lora_one.init(llama().model, llama().batches, config=config)
    model, _ = lora_one.init(torch.compile(llama().model, backend="eager"), llama().batches, config=config)
    steps = products(model)
    assert len(steps) == 4
    for (name, product), step in zip(steps.items(), products(expected).values(), strict=True):
        assert np.linalg.norm(product - step) <= 1e-5 * np.linalg.norm(step), name  # as `assert_one_step`


def test_a_session_works_inside_its_block_only():
    case = mlp()
    session = TorchSession(case.model, case.batches, case.loss_fn, EXACT)
    calls = (
        lambda session: session.mean_loss(),
        lambda session: session.like("up"),
        lambda session: session.fold_pass({}),
        lambda session: session.sides_pass({}),
        lambda session: session.exact_pass(lambda *_: None),
        lambda session: session.assign("up", None),
    )
    with session:
        assert session.mean_loss().batches == len(case.batches)
    for outside in (session, TorchSession(case.model, case.batches, case.loss_fn, EXACT)):
        for call in calls:
            with pytest.raises(RuntimeError, match="inside `with` only"):
                call(outside)


def test_attaching_draws_no_start_that_is_overwritten():
    case = mlp()
    draw = torch.nn.init.kaiming_uniform_
    with TorchSession(case.model, case.batches, case.loss_fn, EXACT) as session:
        assert not any(site.lora_A.weight.any() for site in find_sites(session.model))
    assert torch.nn.init.kaiming_uniform_ is draw
