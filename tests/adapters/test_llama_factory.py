"""LLaMA-Factory begins at the folder of `lora-one init`: loaded as LLaMA-Factory 0.9.5 loads an adapter to train on.

Read there: llamafactory/model/adapter.py, `_setup_lora_tuning` (the arguments below, then all that trains in float32)
and llamafactory/hparams/model_args.py (their defaults). Its README says what was run in LLaMA-Factory.
"""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from typer.testing import CliRunner

from lora_one import demo
from lora_one.checkpoint.metadata import read_report
from lora_one.cli.commands import app
from lora_one.finetune import encode, read_examples

FOLDER = Path(__file__).parents[2] / "adapters" / "llama_factory"


@pytest.fixture(scope="module")
def start(tmp_path_factory) -> Path:
    """The folder that the README's command writes, from fewer batches."""
    out = tmp_path_factory.mktemp("start")
    arguments = ["init", "--rank", "4", "--init-batches", "2", "--batch-size", "4", "--out", str(out)]
    done = CliRunner(env={"TERM": "dumb"}).invoke(app, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return out


def loaded(start: Path, dtype: str) -> PeftModel:
    base = AutoModelForCausalLM.from_pretrained(demo.MODEL, dtype=dtype)
    settings = {"subfolder": None, "offload_folder": "offload", "cache_dir": None, "revision": "main", "token": None}
    model = PeftModel.from_pretrained(base, str(start), is_trainable=True, **settings)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_factors_that_it_trains_are_those_of_the_start(dtype, start, tmp_path):
    """At learning rate 0 the adapter that comes out is the one that went in, to the bit; at another it moves."""
    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL)
    sequences = [encode(tokenizer, example) for example in read_examples(demo.TRAIN)[:8]]
    rows = [{"input_ids": s.tokens, "labels": s.labels} for s in sequences]
    given = load_file(start / "adapter_model.safetensors")
    assert len(given) == 2 * len(read_report(start).layers) == 56
    for rate in (0.0, 1e-3):
        args = TrainingArguments(
            str(tmp_path), max_steps=2, learning_rate=rate, save_strategy="no", report_to="none", use_cpu=True
        )
        trainer = Trainer(
            loaded(start, dtype), args, train_dataset=rows, data_collator=DataCollatorForSeq2Seq(tokenizer)
        )
        trainer.train()
        trainer.save_model(str(tmp_path / "out"))
        kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
        assert given.keys() == kept.keys()
        for name, value in given.items():
            if rate == 0:
                np.testing.assert_array_equal(kept[name], value)
            else:
                assert np.abs(kept[name] - value).max() > 1e-4


def test_the_yaml_names_the_folder_of_the_readmes_command_and_the_models_and_data_of_the_demo():
    settings = yaml.safe_load((FOLDER / "finetune.yaml").read_text())
    assert f"--out {settings['adapter_name_or_path']}" in (FOLDER / "README.md").read_text()
    root = FOLDER.parents[1]
    assert root / settings["model_name_or_path"] == demo.MODEL
    described = yaml.safe_load((FOLDER / "dataset_info.json").read_text())[settings["dataset"]]
    assert (root / settings["dataset_dir"] / described["file_name"]).resolve() == demo.TRAIN
    assert settings["finetuning_type"] == "lora" and "lora_rank" not in settings  # the folder's holds
