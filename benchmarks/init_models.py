"""The models that the starts are measured on: Llamas with random weights, as folders that every framework opens.

Those of a GPU are made there, by each process anew: the same seed makes the same weights.

Random weights make flat gradients, flatter than pretrained ones do: `python -m benchmarks.energy` has the latter.
"""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.harness import Contender, run_in_own_process
from lora_one import demo
from lora_one.backends.torch import ops
from lora_one.core.alignment import captured_energy
from lora_one.core.factors import Factors
from lora_one.finetune.encoding import TokenSequence

RANK = 8
MODULES = ("benchmarks.init_contenders",)  # what all processes on a GPU need
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Case:
    """A model and the batches that it is started on."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool
    dtype: str
    sequences: int
    length: int
    batches: int
    checked: tuple[int, ...]  # decoder layers whose exact gradient the results are held against
    quantized: bool = False  # the targets' weights are 4-bit (bitsandbytes, NF4)

    @property
    def tokens(self) -> list[TokenSequence]:
        """Random ones; the loss is on all but the first of each."""
        rows = np.random.default_rng(0).integers(3, self.vocabulary, (self.sequences, self.length))
        return [TokenSequence(row.tolist(), 1) for row in rows]

    @property
    def batch_size(self) -> int:
        return self.sequences // self.batches


MICRO_BATCHES = {"97.5M, one batch of 64": 1, "97.5M, 64 batches of one": 64}  # the same 64 sequences
CASES = {
    "tiny": Case(64, 128, 2, 4, 2, 160, False, "float32", 4, 32, 2, (0, 1)),
    "97.5M": Case(768, 2048, 12, 12, 12, 8192, False, "float32", 8, 256, 1, tuple(range(12))),
    "97.5M, 8 batches": Case(768, 2048, 12, 12, 12, 8192, False, "float32", 8, 256, 8, tuple(range(12))),
    **{
        name: Case(768, 2048, 12, 12, 12, 8192, False, "float32", 64, 32, batches, tuple(range(12)))
        for name, batches in MICRO_BATCHES.items()
    },
    "0.5B": Case(896, 4864, 24, 14, 2, 151936, True, "bfloat16", 2, 128, 1, (0, 11, 23)),
    "1.1B": Case(2048, 5632, 22, 32, 4, 32000, False, "bfloat16", 2, 128, 1, (0, 21)),
    "1.1B, 1024 tokens": Case(2048, 5632, 22, 32, 4, 32000, False, "bfloat16", 4, 256, 1, (0, 21)),
}
GPU_CASES = {
    "tiny": CASES["tiny"],
    "1B": Case(2048, 8192, 16, 32, 8, 128256, True, "bfloat16", 8, 512, 1, (0, 15)),
    "8B": Case(4096, 14336, 32, 32, 8, 128256, False, "bfloat16", 8, 512, 1, (0, 31)),
    "8B, 4-bit": Case(4096, 14336, 32, 32, 8, 128256, False, "bfloat16", 8, 512, 1, (0, 31), quantized=True),
}


def cases(device: str) -> dict[str, Case]:
    """By name."""
    return CASES if device == "cpu" else GPU_CASES


def llama_config(case: Case) -> LlamaConfig:
    """Of the model of a case."""
    return LlamaConfig(
        hidden_size=case.hidden,
        intermediate_size=case.intermediate,
        num_hidden_layers=case.layers,
        num_attention_heads=case.heads,
        num_key_value_heads=case.key_value_heads,
        vocab_size=case.vocabulary,
        tie_word_embeddings=case.tied,
        max_position_embeddings=512,
    )


def random_llama(case: Case, device: str = "cpu") -> LlamaForCausalLM:
    """The model of a case, made on a device."""
    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(llama_config(case)).to(getattr(torch, case.dtype))
    if case.quantized:
        _replace_targets(model, _quantized)
        model.is_loaded_in_4bit = True  # what PEFT asks
    return model


def prepare(case: Case, folder: Path) -> None:
    """Write the model, with the embedded model's tokenizer, and the exact gradients of the layers that are checked."""
    model = random_llama(case)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo.MODEL / name, folder / name)
    _write_gradients(model, case, folder)


def prepare_on(device: str, case: str, folder: str) -> dict[str, float]:
    """Write the exact gradients alone, of a model that is made there: for `harness`."""
    torch.backends.cuda.matmul.allow_tf32 = False
    _write_gradients(random_llama(cases(device)[case], device), cases(device)[case], Path(folder))
    return {}


def _write_gradients(model: LlamaForCausalLM, case: Case, folder: Path) -> None:
    gradients = _exact_gradients(model.float(), case)
    best = {f"{name}.best": _best_energy(g) for name, g in gradients.items()}
    (folder / "gradients").mkdir(exist_ok=True)  # not beside the weights, which some loaders take all together
    save_file(gradients | best, folder / "gradients" / "exact.safetensors")


def prepared(name: str, device: str = "cpu") -> Path:
    """The folder of a case, made once and kept with the system's temporary files. A quantised one is empty: its
    weights have no gradient by autograd to hold a start against."""
    kept = Path(tempfile.gettempdir()) / "lora-one-benchmarks"
    folder = kept / ("" if device == "cpu" else device) / name.replace(", ", "-").replace(" ", "-")
    if not (folder / "gradients" / "exact.safetensors").is_file():
        folder.mkdir(parents=True, exist_ok=True)
        if cases(device)[name].quantized:
            return folder
        if device == "cpu":
            prepare(CASES[name], folder)
        else:
            settings = {"device": device, "case": name, "folder": str(folder)}
            run_in_own_process(Contender("benchmarks.init_models:prepare_on", settings), forked=MODULES)
    return folder


def _replace_targets(model: LlamaForCausalLM, replacement: Callable[[Any], nn.Module]) -> None:
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            for name, layer in list(parent.named_children()):
                if name in TARGETS:
                    setattr(parent, name, replacement(layer))


def _quantized(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    weight = layer.weight.data
    new = bnb.nn.Linear4bit(
        *weight.shape[::-1], bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4", module=new).to(weight.device)
    return new


def _exact_gradients(model: LlamaForCausalLM, case: Case) -> dict[str, Tensor]:
    """G by autograd on the weights themselves, in float32, by module name."""
    model.requires_grad_(False)
    wanted = {
        name: module.weight.requires_grad_(True)
        for name, module in model.named_modules()
        if name.endswith(TARGETS) and int(name.split(".")[2]) in case.checked
    }
    for start in range(0, case.sequences, case.batch_size):
        rows = [s.tokens for s in case.tokens[start : start + case.batch_size]]
        ids = torch.tensor(rows, device=model.device)
        (model(input_ids=ids, labels=ids).loss / case.batches).backward()
    gradients: dict[str, Tensor] = {}
    for name, weight in wanted.items():
        assert weight.grad is not None
        gradients[name] = weight.grad
    return gradients  # on the model's device


def worst_energies(folder: Path, adapter: Path, device: str = "cpu") -> dict[str, float]:
    """What a saved start holds of the best rank-r energy, in the worst of the layers that are checked.

    Returns:
        "energy_A": by the row space of lora_A alone; "energy": by the row space of lora_A and the column space of
        lora_B. The first is all that there is to a start with B = 0, or with other directions in B than in A.
    """
    exact = load_file(folder / "gradients" / "exact.safetensors", device=device)
    tensors = load_file(adapter / "adapter_model.safetensors", device=device)
    of_a, of_both = [], []
    for name in (key for key in exact if f"{key}.best" in exact):
        g, best = exact[name], float(exact[f"{name}.best"])
        a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].float() for side in "AB")
        q, _ = torch.linalg.qr(a.mT)  # (in, r)
        of_a.append(float((g @ q).square().sum()) / best)
        of_both.append(float(captured_energy(ops, g, Factors(a, b)) * g.square().sum()) / best if b.any() else 0.0)
    return {"energy_A": min(of_a), "energy": min(of_both)}


def _best_energy(g: Tensor) -> Tensor:
    """Sum of the RANK largest squared singular values, (), float64: by the Gram matrix of the shorter side; on a GPU,
    where its eigenvalues take seconds, by many more iterations than anybody's start makes."""
    if g.is_cuda:
        return torch.svd_lowrank(g, q=min(64, *g.shape), niter=40)[1][:RANK].double().square().sum().cpu()
    g = (g if g.shape[0] <= g.shape[1] else g.mT).double()
    return torch.linalg.eigvalsh(g @ g.mT)[-RANK:].sum()
