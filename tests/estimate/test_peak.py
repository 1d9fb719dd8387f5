"""The peak memory against that of PyTorch's allocator while small models run."""

import dataclasses

import numpy as np
import peft
import pytest
import torch
import transformers

import lora_one
from lora_one.backends.torch.passes import folds, token_loss
from lora_one.config import Config
from lora_one.estimate import Workload, activations, flops
from lora_one.estimate.memory import exact_memory, sketch_memory, step_memory

from .models import shape_of, small
from .test_costs import targets_of

MEMORY = {"step": step_memory, "sketch": sketch_memory, "exact": exact_memory}


def _prepared(job, config, work):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, work.dtype), attn_implementation=work.attention
    )
    ids = torch.randint(3, 300, (work.batch_size, work.seq_len))
    batch = {"input_ids": ids, "labels": ids}
    if work.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    if job != "step":
        settings = dataclasses.replace(work.config, gradient=job)
        return lambda: lora_one.init(model, [batch] * work.init_batches, config=settings)
    model = peft.get_peft_model(model, peft.LoraConfig(r=work.config.rank, target_modules="all-linear"))
    optimizer = lora_one.optimizer(model)

    def run():
        model(**batch, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    run()  # Adam's moments exist from the first step on
    return run


def _peak(run) -> int:
    """Return the peak of all tensors' bytes, over those that existed before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        run()
    nodes, changes = list(profile.profiler.kineto_results.experimental_event_tree()), []
    while nodes:
        node = nodes.pop()
        nodes += node.children
        if node.name == "[memory]":
            changes.append((node.start_time_ns, node.extra_fields.alloc_size))
    return int(np.cumsum([size for _, size in sorted(changes, key=lambda change: change[0])]).max())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("job", "vocabulary", "seq_len", "settings"),
    [
        ("step", 2048, 96, {}),  # the peak is in the loss
        ("step", 2048, 96, {"attention": "eager"}),
        ("step", 320, 96, {}),  # or in the backward pass
        ("step", 320, 96, {"checkpointing": True}),
        ("sketch", 2048, 96, {"init_batches": 2}),
        ("sketch", 320, 96, {"checkpointing": True}),
        ("sketch", 320, 24, {"init_batches": 4}),  # or where a layer is renewed
        ("sketch", 320, 8, {"init_batches": 4}),  # and rows wait
        ("sketch, 2 passes", 2048, 96, {"init_batches": 2}),
        ("sketch, 2 passes", 320, 96, {"checkpointing": True}),  # or where all products are there
        ("exact", 2048, 96, {}),
        ("exact", 2048, 96, {"init_batches": 2}),
    ],
)
def test_the_peak_is_what_the_allocator_hands_out(job, vocabulary, seq_len, settings, dtype):
    config = small("llama")
    config.update({"vocab_size": vocabulary, "hidden_size": 128, "intermediate_size": 352})
    job, _, passes = job.partition(", ")
    settings = {"init_batches": 1, "config": Config(rank=8, passes=2 if passes else 1), **settings}
    work = Workload(batch_size=2, seq_len=seq_len, dtype=dtype, **settings)
    model = shape_of(config)
    parts = MEMORY[job](model, targets_of(model), work)
    before = parts["base weights"] + (parts["LoRA factors"] + parts["Adam moments"] if job == "step" else 0)
    assert _peak(_prepared(job, config, work)) == pytest.approx(sum(parts.values()) - before, rel=0.05)


def test_an_init_takes_the_loss_of_as_many_rows_at_once_as_is_counted():
    assert activations.LOSS_CHUNK == token_loss.CHUNK_BYTES


def test_rows_wait_in_an_init_for_as_much_memory_as_is_counted():
    assert flops.WAITING_SHARE == folds.SHARE_OF_GRADIENT
    assert flops.WAITING_BYTES == folds.LEAST_BYTES
