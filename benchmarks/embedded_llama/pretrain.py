"""Pretrain the demo model: a Llama of 0.9M parameters that learns a few skills on strings, a token a character.

python -m benchmarks.embedded_llama.pretrain --out DIR     about ten minutes on one core; needs torch and transformers
"""

import argparse
import json
import math
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from string import ascii_letters, digits, punctuation

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from lora_one.demo.tasks import PRETRAIN, pretraining

SPECIAL = {"pad_token": "<pad>", "bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>"}
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
ROPE_THETA = 10000.0


def write_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Write a tokenizer of printable ASCII, a token a character, and return it as transformers reads it back."""
    tokens = [*SPECIAL.values(), "\n", " ", *digits, *ascii_letters, *punctuation]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL["unk_token"]))
    tokenizer.add_special_tokens(list(SPECIAL.values()))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()  # without it decoding puts a space between tokens
    tokenizer.save(str(folder / "tokenizer.json"))
    # Written by hand: save_pretrained of transformers 5 names a class that transformers 4 does not have.
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **SPECIAL,
        "model_max_length": 256,
        "padding_side": "left",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return AutoTokenizer.from_pretrained(folder)


def build(tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Build the untrained model. Every linear layer reads a multiple of 64 numbers, as 4-bit quantisation wants."""
    config = LlamaConfig(
        vocab_size=128,  # the tokenizer's 100, padded to a multiple of 64
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def batches(tokenizer: PreTrainedTokenizerBase, size: int, seed: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield `(input_ids, labels)` without end, both int64 (size, longest); labels are -100 outside the completion."""
    stream = pretraining("train", seed)
    while True:
        items = list(islice(stream, size))
        prompts = tokenizer([item["prompt"] for item in items])["input_ids"]
        answers = tokenizer([item["completion"] + tokenizer.eos_token for item in items])["input_ids"]
        longest = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
        ids = torch.full((size, longest), tokenizer.pad_token_id)  # (size, longest)
        labels = torch.full((size, longest), -100)  # (size, longest)
        for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
            end = len(prompt) + len(answer)
            ids[row, :end] = torch.tensor(prompt + answer)
            labels[row, len(prompt) : end] = torch.tensor(answer)
        yield ids, labels


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, steps: int, seed: int) -> None:
    """Train in place with AdamW: 100 steps of warm-up, then a cosine down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / 100, 0.5 + 0.5 * math.cos(math.pi * step / steps))
    )
    model.train()
    for step, (ids, labels) in enumerate(islice(batches(tokenizer, 64, seed), steps)):
        # No attention mask: the padding is on the right, where causal attention never looks.
        loss = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"step {step:5d}   loss {loss.item():.4f}", flush=True)


@torch.no_grad()
def exact_match(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, items: list[dict[str, str]]) -> float:
    """Return the share of items whose greedy completion, up to the end of sequence, is exactly the right one."""
    model.eval()
    prompts = tokenizer([item["prompt"] for item in items], return_tensors="pt", padding=True, padding_side="left")
    room = 1 + max(len(item["completion"]) for item in items)
    output = model.generate(
        input_ids=prompts["input_ids"], attention_mask=prompts["attention_mask"], max_new_tokens=room, do_sample=False
    )  # (items, prompt + room)
    new = output[:, prompts["input_ids"].shape[1] :].tolist()
    right = 0
    for ids, item in zip(new, items, strict=True):
        # A completion counts only if it ends: cutting off one that runs on would flatter the model.
        end = ids.index(tokenizer.eos_token_id) if tokenizer.eos_token_id in ids else None
        right += end is not None and tokenizer.decode(ids[:end]) == item["completion"]
    return right / len(items)


def write_model(model: LlamaForCausalLM, folder: Path) -> None:
    """Write the weights as bfloat16, and a config that older readers understand too."""
    model.to(torch.bfloat16).save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)  # safetensors writes for the owner only
    path = folder / "config.json"
    # transformers 5 writes rope_parameters only; other readers look for the older key.
    config = json.loads(path.read_text()) | {"rope_theta": ROPE_THETA}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def main() -> None:
    """Pretrain the demo model, report held-out exact match per task, and write the model folder."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.embedded_llama.pretrain", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(arguments.seed)

    tokenizer = write_tokenizer(arguments.out)
    model = build(tokenizer)
    print(f"{model.num_parameters():,} parameters")
    started = time.perf_counter()
    train(model, tokenizer, arguments.steps, arguments.seed)
    print(f"trained in {time.perf_counter() - started:.0f} s")

    write_model(model, arguments.out)
    # What is measured is what is shipped: the rounded weights, read back.
    model = AutoModelForCausalLM.from_pretrained(arguments.out, dtype=torch.float32)
    for task in PRETRAIN:
        print(f"{task.name:6s} {exact_match(model, tokenizer, task.items('test', 256)):7.1%}")


if __name__ == "__main__":
    main()
