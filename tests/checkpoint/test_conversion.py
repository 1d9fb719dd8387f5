"""`convert` on folders that PEFT and mlx-lm themselves wrote: the logits stay equal, or all reasons are named."""

import json
import warnings
from pathlib import Path

import mlx.core as mx
import mlx.optimizers as optim
import numpy as np
import peft
import pytest
import torch
import transformers
from mlx.utils import tree_flatten
from mlx_lm.tuner.trainer import TrainingArgs, train
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import save_config
from typer.testing import CliRunner

import lora_one
from lora_one.checkpoint.tensors import Tensor, read_tensors, write_tensors
from lora_one.cli import commands as cli
from lora_one.errors import CheckpointError, ConfigError
from tests.backends.mlx.hf import write_llama
from tests.backends.mlx.models import VOCABULARY, tiny_mixtral
from tests.frameworks import logits, mlx_model, opened_by_lora_one, opened_by_mlx_lm, opened_by_peft, torch_model

TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, (2, 16))
TOLERANCE = 1e-4  # absolute, on logits of size 1 to 10: float32 in libraries that sum in different orders

# Settings of LoRA and DoRA in PEFT; each folder gets nonzero factors.
PEFT = {
    "suffixes": {"target_modules": ["q_proj", "v_proj"]},
    "rslora": {"target_modules": ["q_proj", "down_proj"], "use_rslora": True},
    "patterns": {
        "target_modules": ["q_proj", "up_proj", "down_proj"],
        "rank_pattern": {r"layers\.1\..*up_proj": 7, "layers.0.self_attn.q_proj": 2},
        "alpha_pattern": {"^model.layers.0.*down_proj": 3, "q_proj": 11},
    },
    "patterns-rslora": {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"k_proj": 1, "o_proj": 6}},
    "some-layers": {"target_modules": ["k_proj"], "layers_to_transform": [1], "layers_pattern": "layers"},
    "regex": {"target_modules": r".*layers\.0\.(mlp\.gate_proj|self_attn\.o_proj)"},
    "full-paths-and-head": {"target_modules": ["model.layers.1.mlp.down_proj", "lm_head"]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["v_proj"], "lora_dropout": 0.1},
    "bfloat16": {"target_modules": ["q_proj", "up_proj"], "rank_pattern": {"up_proj": 3}},
    "dora": {"target_modules": ["q_proj", "up_proj"], "use_dora": True, "rank_pattern": {"up_proj": 3}},
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write_llama(folder)
    return folder


def write_peft(model: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.float32, **settings) -> None:
    """Write a folder with PEFT itself, with nonzero factors."""
    torch.manual_seed(1)
    config = peft.LoraConfig(
        **{"r": 4, "lora_alpha": 6, "init_lora_weights": False, "task_type": "CAUSAL_LM"} | settings
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, config)
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.data = (0.3 * torch.randn_like(parameter)).to(dtype)
        # For LoRA on lm_head PEFT adds a copy of the base weight, unless told not to.
        adapted.save_pretrained(folder, save_embedding_layers="lm_head" not in str(config.target_modules) and "auto")


@pytest.mark.feature("mlx-lm opens the folder", "torch")
@pytest.mark.parametrize("name", PEFT)
def test_what_peft_wrote_opens_in_mlx_lm_in_flax_and_in_peft_again(name, base, tmp_path):
    src = tmp_path / "src"
    write_peft(torch_model(base), src, torch.bfloat16 if name == "bfloat16" else torch.float32, **PEFT[name])
    expected = logits(opened_by_peft(base, src), TOKENS)
    assert np.abs(expected - logits(torch_model(base), TOKENS)).max() > 0.1
    for to in ("peft", "mlx", "flax"):
        lora_one.convert(src, tmp_path / to, to)
    opened = {
        "peft": opened_by_peft(base, tmp_path / "peft"),
        "mlx": opened_by_mlx_lm(base, tmp_path / "mlx"),
        "both": opened_by_peft(base, tmp_path / "mlx"),
        "flax": opened_by_lora_one("jax", base, tmp_path / "flax"),
    }
    for to, model in opened.items():
        np.testing.assert_allclose(logits(model, TOKENS), expected, atol=TOLERANCE, rtol=0, err_msg=to)
    kinds = {tensor.dtype for tensor in read_tensors(tmp_path / "peft" / "adapter_model.safetensors").values()}
    assert kinds == {"BF16" if name == "bfloat16" else "F32"}


def test_gpt2s_conv1d_goes_to_mlx_lm_under_its_other_names(tmp_path):
    """fan_in_fan_out concerns only the base weight: the factors of a Conv1D are like any other layer's."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=2, n_positions=32, initializer_range=0.2
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    src, ours = tmp_path / "src", tmp_path / "mlx"
    write_peft(model, src, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    expected = logits(opened_by_peft(tmp_path / "base", src), TOKENS)
    lora_one.convert(src, ours, "mlx", rename={"transformer": "model"})
    np.testing.assert_allclose(
        logits(_gpt2_of_mlx_lm(tmp_path / "base", ours), TOKENS), expected, atol=TOLERANCE, rtol=0
    )
    lora_one.convert(ours, tmp_path / "peft", "peft", rename={"model": "transformer"})
    again = opened_by_peft(tmp_path / "base", tmp_path / "peft")
    np.testing.assert_allclose(logits(again, TOKENS), expected, atol=TOLERANCE, rtol=0)


def _gpt2_of_mlx_lm(base: Path, adapter: Path):
    """transformers writes "transformer.h.0..."; mlx-lm's GPT-2 wants the bare "h.0..." of the first checkpoints."""
    from mlx_lm.models import gpt2
    from mlx_lm.tuner.utils import load_adapters

    config = json.loads((base / "config.json").read_text())
    weights = {k.removeprefix("transformer."): v for k, v in mx.load(str(base / "model.safetensors")).items()}
    model = gpt2.Model(gpt2.ModelArgs.from_dict(config | {"n_ctx": config["n_positions"]}))
    model.load_weights(list(model.sanitize(weights).items()))
    return load_adapters(model, str(adapter))


# Settings of LoRA and DoRA in mlx-lm.
# fmt: off
MLX_LM = {
    "default-keys": {"num_layers": 2, "scale": 1.0},
    "last-layer-trained": {"num_layers": 1, "keys": ["self_attn.q_proj", "mlp.down_proj"], "scale": 20.0, "steps": 3},
    "full-paths": {
        "num_layers": 2,
        "keys": ["model.layers.0.mlp.up_proj", "lm_head"],
        "rank": 3,
        "dropout": 0.1,
        "scale": 2.5,
    },
    "bfloat16": {"num_layers": 2, "keys": ["mlp.up_proj"], "scale": 2.0, "dtype": mx.bfloat16},
    "dora": {"num_layers": 1, "keys": ["self_attn.q_proj", "mlp.up_proj"], "kind": "dora", "steps": 3},
}
# fmt: on


def write_mlx_lm(model, folder: Path, num_layers: int, kind: str = "lora", dtype=mx.float32, steps=0, **parameters):
    """Write a folder with mlx-lm itself: by its training loop, or random factors saved as the loop does it."""
    mx.random.seed(0)
    model.freeze()
    parameters = {"rank": 4, "scale": 20.0, "dropout": 0.0} | parameters
    if kind == "full":
        model.layers[-1].unfreeze()
    else:
        linear_to_lora_layers(model, num_layers, parameters, use_dora=kind == "dora")
    folder.mkdir()
    config = {"fine_tune_type": kind, "num_layers": num_layers, "lora_parameters": parameters}
    save_config(config | ({"lora_parameters": None} if kind == "full" else {}), folder / "adapter_config.json")
    file = str(folder / "adapters.safetensors")
    if not steps:
        factors = tree_flatten(model.trainable_parameters())
        factors = [(name, (0.1 * mx.random.normal(x.shape)).astype(dtype)) for name, x in factors]
        mx.save_safetensors(file, dict(factors))
        return

    def batches(dataset, batch_size, **_):
        while True:
            yield mx.array(TOKENS), mx.array([[0, 15], [0, 15]])

    arguments = TrainingArgs(batch_size=2, iters=steps, steps_per_report=10, steps_per_save=10, adapter_file=file)
    train(model, optim.Adam(learning_rate=2e-2), [0, 1], args=arguments, iterate_batches=batches)


@pytest.mark.parametrize("name", MLX_LM)
def test_what_mlx_lm_wrote_opens_in_peft_in_flax_and_in_mlx_lm_again(name, base, tmp_path):
    src = tmp_path / "src"
    write_mlx_lm(mlx_model(base), src, **MLX_LM[name])
    expected = logits(_widened(opened_by_mlx_lm(base, src)), TOKENS)
    assert np.abs(expected - logits(mlx_model(base), TOKENS)).max() > 0.1
    for to in ("peft", "mlx", "flax"):
        lora_one.convert(src, tmp_path / to, to)
    opened = {
        "peft": opened_by_peft(base, tmp_path / "peft"),
        "mlx": _widened(opened_by_mlx_lm(base, tmp_path / "mlx")),
        "both": opened_by_peft(base, tmp_path / "mlx"),
        "flax": opened_by_lora_one("jax", base, tmp_path / "flax"),
    }
    for to, model in opened.items():
        np.testing.assert_allclose(logits(model, TOKENS), expected, atol=TOLERANCE, rtol=0, err_msg=to)
    stored = read_tensors(src / "adapters.safetensors")
    again = read_tensors(tmp_path / "mlx" / "adapters.safetensors")
    assert again.keys() == stored.keys()
    for key, (array, dtype) in stored.items():
        assert again[key].dtype == dtype
        np.testing.assert_array_equal(again[key].array, array)


def _widened(model):
    """Return the model in float32, since PEFT and JAX compute with bfloat16 factors in float32."""
    model.set_dtype(mx.float32)
    return model


REFUSED_PEFT = {
    "lora-bias": (
        {"lora_bias": True, "target_modules": ["q_proj"]},
        ["lora_bias=True: LoRA with a bias", *(f"layers.{i}.self_attn.q_proj.lora_B.bias: a bias" for i in (0, 1))],
    ),
    "resized-or-not": (
        {"target_modules": ["embed_tokens", "q_proj"]},
        ["embed_tokens.base_layer.weight: PEFT's copy of the base weight, which may have changed"],
    ),
    "tokens": (
        {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]},
        ["trainable_token_indices=[1, 2]: embeddings of single tokens", "trainable_tokens_delta: a weight"],
    ),
    "biases": ({"target_modules": ["q_proj"], "bias": "all"}, ["bias='all': biases of the base model were trained"]),
    "pissa": (
        {"target_modules": ["q_proj"], "init_lora_weights": "pissa"},
        ["init_lora_weights='pissa': it changed the base weights"],
    ),
}


def refusal(src: Path, to: str = "mlx") -> str:
    dst = src.parent / "refused"
    with pytest.raises(CheckpointError) as caught:
        lora_one.convert(src, dst, to)
    assert not dst.exists()
    return str(caught.value)


@pytest.mark.parametrize("name", REFUSED_PEFT)
def test_what_is_more_than_lora_is_refused_with_every_reason(name, base, tmp_path):
    settings, reasons = REFUSED_PEFT[name]
    write_peft(torch_model(base), tmp_path / "src", **settings)
    for to in ("mlx", "flax", "peft"):
        text = refusal(tmp_path / "src", to)
        for reason in reasons:
            assert reason in text


def test_modules_that_were_trained_whole_go_where_they_have_a_place(base, tmp_path):
    src, dst = tmp_path / "src", tmp_path / "dst"
    write_peft(torch_model(base), src, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert "modules_to_save=['lm_head']: layers that were trained whole" in refusal(src, "mlx")
    lora_one.convert(src, dst, "peft", rename={"lm_head": "head"})
    before, after = (read_tensors(folder / "adapter_model.safetensors") for folder in (src, dst))
    key = "base_model.model.{}.weight"
    np.testing.assert_array_equal(after[key.format("head")].array, before[key.format("lm_head")].array)
    assert json.loads((dst / "adapter_config.json").read_text())["modules_to_save"] == ["head"]


def test_embeddings_and_convolutions_keep_their_names_and_axes(tmp_path):
    """In PEFT's layout. mlx-lm adds an embedding's LoRA to a tied output layer, and has no LoRA for convolutions."""
    model = torch.nn.Sequential(torch.nn.Embedding(20, 6), torch.nn.Conv2d(3, 4, (2, 5)))
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "src", save_embedding_layers=False)
    before = read_tensors(tmp_path / "src" / "adapter_model.safetensors")
    for to in ("peft", "flax"):
        lora_one.convert(tmp_path / "src", tmp_path / to, to)
        after = read_tensors(tmp_path / to / "adapter_model.safetensors")
        assert before.keys() == after.keys()
        for key, tensor in before.items():
            np.testing.assert_array_equal(tensor.array, after[key].array)
    text = refusal(tmp_path / "src")
    assert "0: LoRA on an embedding, which mlx-lm adds to a tied output layer too and PEFT does not" in text
    assert "1: LoRA on a convolution, which mlx adapters have no place for" in text


@pytest.mark.parametrize("backend", ["jax", "mlx"])
def test_load_leaves_out_no_more_than_convert_does(backend, base, tmp_path):
    write_peft(torch_model(base), tmp_path, target_modules=["q_proj"], trainable_token_indices=[1, 2])
    with pytest.raises(CheckpointError, match=r"trainable_token_indices=\[1, 2\]: embeddings of single tokens"):
        opened_by_lora_one(backend, base, tmp_path)


def test_settings_that_are_not_known_here_are_refused_by_name(base, tmp_path):
    src = tmp_path / "src"
    write_peft(torch_model(base), src, target_modules=["q_proj"])
    config = json.loads((src / "adapter_config.json").read_text())
    (src / "adapter_config.json").write_text(json.dumps(config | {"use_next_years_lora": True}))
    assert "use_next_years_lora=True: not known here, and it may change what is computed" in refusal(src)


def test_factors_that_contradict_the_configuration_are_all_named(base, tmp_path):
    src = tmp_path / "src"
    write_peft(torch_model(base), src, target_modules=["q_proj", "k_proj"])
    prefix, file = "base_model.model.model.layers.0.self_attn.", src / "adapter_model.safetensors"
    tensors = read_tensors(file)
    del tensors[f"{prefix}q_proj.lora_B.weight"]
    tensors[f"{prefix}k_proj.lora_A.weight"] = Tensor(np.zeros((3, 64), np.float32), "F32")
    tensors[f"{prefix}v_proj.lora_A.weight"] = Tensor(np.zeros((2, 4, 64), np.float32), "F32")
    tensors[f"{prefix}v_proj.lora_B.weight"] = Tensor(np.zeros((2, 64, 4), np.float32), "F32")
    write_tensors(file, tensors, "pt")
    text = refusal(src)
    assert "model.layers.0.self_attn.q_proj: lora_B is missing" in text
    assert "model.layers.0.self_attn.k_proj: lora_A must be (4, 64), got (3, 64)" in text
    assert "model.layers.0.self_attn.v_proj: lora_A must be (4, 64), got (2, 4, 64)" in text


def test_a_folder_says_whether_it_has_doras_magnitudes_and_has_them(base, tmp_path):
    keys = ["model.layers.1.self_attn.q_proj"]
    for kind, other in (("dora", "lora"), ("lora", "dora")):
        write_mlx_lm(mlx_model(base), tmp_path / kind, 1, kind=kind, keys=keys)
        file = tmp_path / kind / "adapter_config.json"
        file.write_text(file.read_text().replace(f'"{kind}"', f'"{other}"'))
        is_there = "there" if kind == "dora" else "missing"
        assert f'q_proj: m is {is_there}, and "fine_tune_type" is "{other}"' in refusal(tmp_path / kind)
        src = tmp_path / f"peft-{kind}"
        write_peft(torch_model(base), src, target_modules=["q_proj"], use_dora=kind == "dora")
        settings = json.loads((src / "adapter_config.json").read_text())
        (src / "adapter_config.json").write_text(json.dumps(settings | {"use_dora": other == "dora"}))
        reason = "belongs to no layer with DoRA" if kind == "dora" else "is missing"
        assert f"self_attn.q_proj: lora_magnitude_vector {reason}: use_dora is {other == 'dora'}" in refusal(src)


def test_mlx_lms_full_weights_and_embeddings_are_refused(base, tmp_path):
    write_mlx_lm(mlx_model(base), tmp_path / "full", 1, kind="full")
    text = refusal(tmp_path / "full")
    assert "got 'full': whole weights were trained" in text and "model.layers.1.mlp.up_proj.weight" in text
    write_mlx_lm(mlx_model(base), tmp_path / "embedding", 1, keys=["model.embed_tokens", "self_attn.q_proj"])
    assert "model.embed_tokens: LoRA on an embedding" in refusal(tmp_path / "embedding", "peft")


def test_stacks_of_experts_are_refused_one_by_one(tmp_path):
    keys = ["block_sparse_moe.switch_mlp.up_proj", "self_attn.q_proj"]
    write_mlx_lm(tiny_mixtral(), tmp_path / "src", 2, keys=keys)
    text = refusal(tmp_path / "src", "peft")
    for layer in (0, 1):
        name = f"model.layers.{layer}.block_sparse_moe.switch_mlp.up_proj"
        assert f"{name}: a stack of 4 experts, which only mlx-lm has a layout for" in text


def test_folders_that_convert_does_not_read_or_write(base, tmp_path):
    src = tmp_path / "src"
    write_peft(torch_model(base), src, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"to must be one of peft, mlx, flax, diffusers, gguf, got 'onnx'"):
        lora_one.convert(src, tmp_path / "dst", "onnx")
    with pytest.raises(CheckpointError, match="nothing is overwritten"):
        lora_one.convert(src, src, "peft")
    with pytest.raises(ConfigError, match=r"got \['encoder'\]; paths are as model\.layers\.0\.self_attn\.q_proj"):
        lora_one.convert(src, tmp_path / "dst", "mlx", rename={"encoder": "model"})
    (src / "adapter_model.safetensors").rename(src / "adapter_model.bin")
    assert "adapter_model.bin, which is a pickle" in refusal(src)
    assert "adapter_config.json: " in refusal(tmp_path / "nowhere")


def test_the_command_converts_renames_and_keeps_the_report(base, tmp_path):
    write_peft(torch_model(base), tmp_path / "src", target_modules=["q_proj"])
    (tmp_path / "src" / "lora_one.json").write_text("{}")
    arguments = ["convert", str(tmp_path / "src"), str(tmp_path / "dst"), "--to", "mlx", "--rename", "model=decoder"]
    result = CliRunner().invoke(cli.app, arguments, catch_exceptions=False)
    assert result.exit_code == 0 and "Adapter:" in result.output
    config = json.loads((tmp_path / "dst" / "adapter_config.json").read_text())
    paths = [f"decoder.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]
    assert config["lora_parameters"]["keys"] == config["target_modules"] == paths
    assert (config["num_layers"], config["lora_parameters"]["scale"], config["lora_alpha"]) == (2, 1.5, 6.0)
    assert (tmp_path / "dst" / "lora_one.json").read_text() == "{}"
    result = CliRunner().invoke(cli.app, [*arguments[:-1], "model"])
    assert result.exit_code == 2 and "OLD=NEW" in result.output


def test_a_folder_of_mlx_lm_alone_is_told_from_pefts_where_only_pefts_is_read(base, tmp_path):
    write_mlx_lm(mlx_model(base), tmp_path / "src", 1, keys=["mlp.up_proj"])
    with pytest.raises(CheckpointError, match=r"in mlx-lm's layout only .*lora-one convert .* --to peft"):
        opened_by_lora_one("jax", base, tmp_path / "src")


def test_patterns_of_a_layer_do_not_hold_for_layers_whose_paths_end_alike(tmp_path):
    """PEFT reads "up" as any path that ends in it."""

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.up, self.block = torch.nn.Linear(8, 8), torch.nn.ModuleDict({"up": torch.nn.Linear(8, 8)})

        def forward(self, x):
            return self.block["up"](torch.tanh(self.up(x)))

    settings = {"task_type": None, "target_modules": ["up"], "rank_pattern": {r"block\.up": 3}}
    write_peft(Net(), tmp_path / "src", **settings, alpha_pattern={r"block\.up": 1})
    lora_one.convert(tmp_path / "src", tmp_path / "mlx", "mlx")
    lora_one.convert(tmp_path / "mlx", tmp_path / "peft", "peft")
    lora_one.convert(tmp_path / "src", tmp_path / "again", "peft")
    x = torch.ones(1, 8)
    with torch.no_grad():
        expected, *got = (
            peft.PeftModel.from_pretrained(Net(), tmp_path / name).eval()(x) for name in ("src", "again", "peft")
        )
    for other in got:
        torch.testing.assert_close(other, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", ["F64", "F32", "F16", "BF16"])
def test_tensors_are_written_as_torch_reads_them(dtype, tmp_path):
    from safetensors.torch import load_file

    kind = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[dtype]
    wide = np.float64 if dtype == "F64" else np.float32
    x = np.random.default_rng(0).standard_normal((5, 7)).astype(wide).T  # a view with strides
    x[0, :4] = [1 + 2**-9, 1 + 3 * 2**-9, np.inf, np.nan]  # ties of bfloat16; what rounding must not touch
    write_tensors(tmp_path / "x", {"x": Tensor(x, dtype), "odd": Tensor(x[:1, :1], "BF16")}, "pt")
    written = load_file(tmp_path / "x")
    expected = torch.tensor(x).to(kind)
    torch.testing.assert_close(written["x"], expected, rtol=0, atol=0, equal_nan=True)
    assert written["x"].dtype == kind
    again = read_tensors(tmp_path / "x")["x"]
    assert again.dtype == dtype
    np.testing.assert_array_equal(again.array, expected.to(torch.float64).numpy())
