"""What every framework is given: a model folder, batches of tokens, and how to start and to train."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lora_one import Config, demo
from lora_one.finetune.data import read_examples
from lora_one.finetune.encoding import encode

Batch = dict[str, np.ndarray]  # "input_ids", "labels": (rows, length), int32; -100 is a label that does not count

IGNORED = -100
STEPS = 50
INIT_BATCHES = 1  # with more, rows of small batches wait for each other in some frameworks, which fold fewer times


@dataclass(frozen=True)
class Job:
    """One run of LoRA-One.

    Attributes:
        model: folder in Hugging Face's format.
        init_batches: what the gradient is read from.
        train_batches: one a step.
    """

    model: Path
    init_batches: list[Batch]
    train_batches: list[Batch]
    config: Config
    learning_rate: float


def embedded(
    model: Path = demo.MODEL, rows: int = 16, learning_rate: float = 1e-3, config: Config | None = None
) -> Job:
    """The embedded Llama on its own task.

    Args:
        model: another folder of the same architecture and tokenizer.
        rows: sequences in a batch.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo.MODEL, local_files_only=True)
    sequences = [encode(tokenizer, example) for example in read_examples(demo.TRAIN)[: (INIT_BATCHES + STEPS) * rows]]
    # All as wide as the widest, on the right and ignored, so that XLA compiles one shape.
    width = max(len(sequence.tokens) for sequence in sequences)
    tokens = np.zeros((len(sequences), width), np.int32)
    labels = np.full_like(tokens, IGNORED)
    for row, sequence in enumerate(sequences):
        length = len(sequence.tokens)
        tokens[row, :length] = sequence.tokens
        labels[row, sequence.prompt_length : length] = sequence.tokens[sequence.prompt_length :]
    batches = [
        {"input_ids": tokens[at : at + rows], "labels": labels[at : at + rows]} for at in range(0, len(tokens), rows)
    ]
    return Job(model, batches[:INIT_BATCHES], batches[INIT_BATCHES:], config or Config(passes=3), learning_rate)


def grouped(model: Path) -> Job:
    """A random Qwen2, which `write_grouped` made, learning sequences that count upwards.

    Args:
        model: the folder.
    """
    rng = np.random.default_rng(0)
    batches = []
    for number in range(INIT_BATCHES + STEPS):
        rows = 8 if number < INIT_BATCHES else 4  # with 4, the 4th singular value of a layer is within 2 % of the 5th
        first, stride = rng.integers(0, VOCABULARY, (rows, 1)), rng.integers(1, 4, (rows, 1))
        tokens = ((first + stride * np.arange(16)) % VOCABULARY).astype(np.int32)
        batches.append({"input_ids": tokens, "labels": np.where(np.arange(16) < 2, IGNORED, tokens)})
    config = Config(rank=4, passes=3, oversample=4)
    return Job(model, batches[:INIT_BATCHES], batches[INIT_BATCHES:], config, learning_rate=1e-3)


VOCABULARY = 48


def write_grouped(folder: Path) -> None:
    """A random Qwen2: grouped-query attention, biases on q, k and v, tied embeddings."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(0)
    model = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            initializer_range=0.15,
            tie_word_embeddings=True,
            rope_parameters={"rope_type": "default", "rope_theta": 500.0},
        )
    )
    with torch.no_grad():  # biases start at 0 and norms at 1, which would hide what is done with them
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(folder)


def write_perturbed(model: Path, folder: Path, seed: int = 0) -> None:
    """A copy of a model in float32, each weight moved by a rounding error: what no framework can be held to."""
    import torch
    from transformers import AutoModelForCausalLM

    copy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, local_files_only=True)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in copy.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(parameter.double() * (1.0 + torch.finfo(torch.float32).eps * noise))
    copy.save_pretrained(folder)
