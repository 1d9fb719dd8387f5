"""Fine-tuning encoder-decoders and image-text models: the batches against transformers' own tokenizer and processor."""

import contextlib
from functools import partial

import peft
import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoProcessor,
    AutoTokenizer,
)

import lora_one
from lora_one.backends.torch import attach_plain
from lora_one.errors import CheckpointError, DataError, ModelError
from lora_one.finetune.checkpoints import NEVER, Checkpoints, latest
from lora_one.finetune.data import Example
from lora_one.finetune.encoding import TokenSequence, encode
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.runs import Run
from lora_one.finetune.tuners.loading import load_tuner
from tests.finetune.recipes.standins import make_llava, make_t5

PAIRS = [("sort: ba", "ab"), ("sort: hello", "ehllo"), ("x", "x")]


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    make_t5(folder)
    return folder


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llava")
    make_llava(folder)
    return folder


def open_tuner(folder):
    return load_tuner("torch").open_tuner(folder, "float32", "cpu")


def picture(shade):
    return Image.new("RGB", (40, 30), (shade, 255 - shade, 60))


def test_an_encoder_decoder_reads_the_prompt_and_learns_the_completion(t5):
    tuner = open_tuner(t5)
    assert tuner.separate
    (batch,) = tuner.batches([encode(tuner.tokenizer, Example(*pair, "")) for pair in PAIRS], 3)
    tokenizer = AutoTokenizer.from_pretrained(t5)
    expected = tokenizer([prompt for prompt, _ in PAIRS], padding=True, return_tensors="pt")
    labels = tokenizer([completion for _, completion in PAIRS], padding=True, return_tensors="pt")
    assert torch.equal(batch["input_ids"], expected["input_ids"])
    assert torch.equal(batch["attention_mask"], expected["attention_mask"])
    assert torch.equal(batch["labels"], labels["input_ids"].masked_fill(labels["attention_mask"] == 0, -100))


def test_an_encoder_decoder_answers_as_generate_does(t5):
    tuner, model = open_tuner(t5), AutoModelForSeq2SeqLM.from_pretrained(t5)
    prompts = [encode(tuner.tokenizer, Example(*pair, "")).tokens[: len(pair[0])] for pair in PAIRS]
    found = tuner.generate(prompts, max_new_tokens=6)
    for prompt, answer in zip(prompts, found, strict=True):
        tokens = model.generate(torch.tensor([[*prompt, 1]]), max_new_tokens=6, do_sample=False)[0, 1:].tolist()
        assert answer == (tokens[: tokens.index(1)] if 1 in tokens else tokens)


def test_a_picture_takes_as_many_tokens_as_it_has_features(llava):
    tuner, processor = open_tuner(llava), AutoProcessor.from_pretrained(llava)
    model = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32)
    texts = ["U: <image>\nWhat? A:", "U: <image> or <image>? A:", "U: Hi A:"]
    seen = [[picture(9)], [picture(50), picture(200)], []]
    sequences = [
        encode(tuner.tokenizer, Example(text, "cup", "", partial(list, pictures)))
        for text, pictures in zip(texts, seen, strict=True)
    ]
    (batch,) = tuner.batches(sequences, 3)
    whole = [f"{text}cup</s>" for text in texts]
    expected = processor(
        text=whole, images=[p for p in seen if p], padding=True, padding_side="right", return_tensors="pt"
    )
    assert (batch["input_ids"][1] == 3).sum() == 2 * 4  # 2 x 2 patches a picture
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(batch[name], expected[name]), name
    assert torch.equal(batch["pixel_values"], expected["pixel_values"])
    learnt = batch["labels"] != -100
    assert learnt.sum(1).tolist() == [4, 4, 4]  # c, u, p and the end
    labels = expected["input_ids"].masked_fill(~learnt, -100)
    with torch.no_grad():
        assert tuner.loss_fn(tuner.model, batch) == pytest.approx(
            float(model(**expected, labels=labels).loss), rel=1e-6
        )


def test_an_image_text_model_answers_as_generate_does(llava):
    tuner, processor = open_tuner(llava), AutoProcessor.from_pretrained(llava)
    model = AutoModelForImageTextToText.from_pretrained(llava, dtype=torch.float32)
    texts, seen = ["U: <image>\nWhat? A:", "U: <image> A:"], [picture(9), picture(240)]
    prompts = [tuner.tokenizer.encode(text) for text in texts]
    found = tuner.generate(prompts, max_new_tokens=5, pictures=[partial(list, [image]) for image in seen])
    for text, image, answer in zip(texts, seen, found, strict=True):
        inputs = processor(text=text, images=image, return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, inputs["input_ids"].shape[1] :].tolist()
        assert answer == (tokens[: tokens.index(1)] if 1 in tokens else tokens)


def test_every_image_token_needs_a_picture(llava):
    tuner = open_tuner(llava)
    with pytest.raises(DataError, match=r"a picture an image token is expected, got 1 for 2: '<s>U: <image><image>"):
        tuner.batches([encode(tuner.tokenizer, Example("U: <image><image>", "a", "", lambda: [picture(1)]))], 1)
    # An early answer of a conversation is before its later pictures.
    early = encode(tuner.tokenizer, Example("U: <image>", "a", "", lambda: [picture(1), picture(2)]))
    (batch,) = tuner.batches([early], 1)
    assert batch["pixel_values"].shape[0] == 1


def test_a_folder_without_a_model_is_said_to_be_one(tmp_path):
    with pytest.raises(ModelError, match="must hold a causal language model and its tokenizer"):
        open_tuner(tmp_path)


def trained(folder, **settings):
    tuner = open_tuner(folder)
    # Equal lengths: of an encoder-decoder, transformers takes the mean over micro-batches of the mean over tokens.
    sequences = [encode(tuner.tokenizer, Example(f"say {i}", "ab", "")) for i in range(8)]
    config = lora_one.Config(rank=2, targets=["q", "v"])
    tuner.model, _ = lora_one.init(tuner.model, tuner.batches(sequences, 8), config=config)
    losses = []
    recipe = Recipe(model=str(folder), data="x", learning_rate=0.01, warmup=0, **settings)
    tuner.train(sequences, recipe.for_examples(8), lambda step, loss: losses.append(loss))
    return peft.get_peft_model_state_dict(tuner.model), losses


def test_micro_batches_add_up_to_a_step(t5, tmp_path):
    whole, losses = trained(t5, epochs=2, batch_size=4, out=str(tmp_path))
    parts, same = trained(t5, epochs=2, batch_size=2, accumulation=2, out=str(tmp_path))
    assert len(losses) == len(same) == 4
    assert same == pytest.approx(losses, rel=1e-4)
    for name, factor in whole.items():
        torch.testing.assert_close(parts[name], factor, rtol=1e-4, atol=1e-5)


@pytest.mark.feature("Learning-rate schedules", "torch")
def test_the_schedule_is_transformers(t5, tmp_path, monkeypatch):
    """The cosine's first step is a whole learning rate, its last is (1 + cos(pi (n - 1) / n)) / 2 of one."""
    rates = []
    step = torch.optim.AdamW.step

    def spy(self, *arguments, **options):
        rates.append(self.param_groups[0]["lr"])
        return step(self, *arguments, **options)

    monkeypatch.setattr(torch.optim.AdamW, "step", spy)
    trained(t5, steps=4, batch_size=8, schedule="cosine", out=str(tmp_path))
    assert rates == pytest.approx([0.01, 0.01 * (1 + 0.5**0.5) / 2, 0.005, 0.01 * (1 - 0.5**0.5) / 2])


def test_a_cut_sequence_still_has_its_end_in_the_encoder(t5):
    tuner = open_tuner(t5)
    (batch,) = tuner.batches([TokenSequence([10, 11, 12, 13, 1], 3).cut(3, tuner.separate)], 1)
    assert batch["input_ids"].tolist() == [[10, 11, 1]]
    assert batch["labels"].tolist() == [[13, 1]]


class Stopped(Exception):
    """A run's end before its time."""


def resumable(folder, out, sequences, checkpoints=NEVER, run=None, last=None):
    """Train all five steps, or up to one that ends in an exception, with dropout."""
    tuner = open_tuner(folder)
    config = lora_one.Config(rank=2, targets=["q", "v"] if tuner.separate else ["q_proj"], dropout=0.3)
    tuner.model = attach_plain(tuner.model, config)
    settings = {"learning_rate": 0.01, "warmup": 1, "steps": 5, "batch_size": 2, "precondition": True}
    recipe = Recipe(model=str(folder), data="x", out=str(out), **settings)
    run = run or Run.begin(recipe, sequences)

    def on_step(step, loss):
        run.losses.append(loss)
        if step == last:
            raise Stopped

    with contextlib.suppress(Stopped):
        tuner.train(sequences, recipe, on_step, checkpoints(run) if callable(checkpoints) else checkpoints)
    return peft.get_peft_model_state_dict(tuner.model), run.losses


@pytest.mark.parametrize("kind", ["t5", "llava"])
def test_every_kind_of_tuner_goes_on_bit_for_bit(kind, tmp_path, request):
    folder = request.getfixturevalue(kind)
    tokenizer = open_tuner(folder).tokenizer
    seen = {} if kind == "t5" else {"pictures": partial(list, [picture(50)])}
    image = "<image>" if seen else ""
    sequences = [encode(tokenizer, Example(f"{image}say {i}", "ab", "", **seen)) for i in range(5)]
    whole, losses = resumable(folder, tmp_path, sequences)

    def saving(run):
        return Checkpoints(run, tmp_path, every=1, last=5)

    resumable(folder, tmp_path, sequences, saving, last=4)  # in the second epoch
    start = latest(tmp_path, pytest.fail)
    assert start.step == 3
    going_on = Checkpoints(start.run, tmp_path, 1, 5, start)
    found, same = resumable(folder, tmp_path, sequences, going_on, start.run)
    assert same == losses
    for name, factor in whole.items():
        assert torch.equal(found[name], factor), name


def test_a_full_disk_ends_the_training_with_the_checkpoint_before_whole(t5, tmp_path, monkeypatch):
    """What torch.save raises there is a RuntimeError."""
    sequences = [encode(open_tuner(t5).tokenizer, Example(f"say {i}", "ab", "")) for i in range(4)]
    save, calls = torch.save, []

    def full(*arguments, **options):
        calls.append(arguments)
        if len(calls) > 4:  # optimizer, schedule, random streams; then the second checkpoint's
            raise RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed")
        return save(*arguments, **options)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(CheckpointError, match=r"a checkpoint in .* cannot be written: PytorchStreamWriter failed"):
        resumable(t5, tmp_path, sequences, lambda run: Checkpoints(run, tmp_path, every=1, last=5))
    assert latest(tmp_path, pytest.fail).step == 1
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-1"]
