"""The demo's tasks: seeded generators of prompts and completions, in plain Python.

Every item reads `name:input=output`, with one token per character. A hash of the prompt puts an item into the training
split or into the held-out split. So the two are disjoint for every seed and every number of items.

    python -m lora_one.demo.tasks --out DIR     writes the fine-tuning data
"""

import argparse
import json
import random
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from string import ascii_lowercase
from typing import Literal

Split = Literal["train", "test"]


@dataclass(frozen=True)
class Task:
    """A skill: `draw` makes a random input, `solve` returns its only correct output."""

    name: str
    draw: Callable[[random.Random], str]
    solve: Callable[[str], str]
    weight: float = 1.0  # share of the pretraining mixture, relative to the other tasks

    def item(self, rng: random.Random, split: Split) -> dict[str, str]:
        """Draw an item of `split` as `{"prompt": "name:input=", "completion": "output"}`."""
        while True:
            text = self.draw(rng)
            prompt = f"{self.name}:{text}="
            if split_of(prompt) == split:
                return {"prompt": prompt, "completion": self.solve(text)}

    def items(self, split: Split, count: int, seed: int = 0) -> list[dict[str, str]]:
        """Draw `count` different items of `split`; the same seed gives the same items."""
        rng = random.Random(f"{self.name}/{split}/{seed}")
        items: dict[str, dict[str, str]] = {}
        while len(items) < count:
            item = self.item(rng, split)
            items[item["prompt"]] = item
        return list(items.values())


def split_of(prompt: str) -> Split:
    """Return the split that a prompt belongs to: one in eight is held out."""
    return "test" if zlib.crc32(prompt.encode()) % 8 == 0 else "train"


def word(low: int, high: int) -> Callable[[random.Random], str]:
    """Return a function that draws words of `low` to `high` letters, where every length is equally likely."""
    return lambda rng: "".join(rng.choices(ascii_lowercase, k=rng.randint(low, high)))


def _sum(rng: random.Random) -> str:
    return f"{rng.randint(0, 99)}+{rng.randint(0, 99)}"


def _above(rng: random.Random) -> str:
    """Draw a word of different letters and a bound below its largest letter: `bound,word`."""
    word = rng.sample(ascii_lowercase, rng.randint(3, 7))
    bound = rng.choice(sorted(word)[:-1])
    return f"{bound},{''.join(word)}"


def _add(text: str) -> str:
    left, right = text.split("+")
    return str(int(left) + int(right))


def _smallest_above(text: str) -> str:
    bound, word = text.split(",")
    return min(letter for letter in word if letter > bound)


def _next(text: str) -> str:
    """Replace each letter by the next one, and z by a."""
    return "".join(ascii_lowercase[(ord(letter) - ord("a") + 1) % 26] for letter in text)


PRETRAIN = [
    Task("add", _sum, _add, weight=2.0),  # carrying takes the longest to learn
    Task("copy", word(3, 8), str),
    Task("rev", word(3, 8), lambda text: text[::-1]),
    Task("up", word(3, 8), str.upper),
    Task("next", word(3, 8), _next),
    Task("max", word(3, 8), max),
    Task("min", word(3, 8), min),
    Task("dbl", word(3, 6), lambda text: "".join(letter * 2 for letter in text)),
    Task("over", _above, _smallest_above),
]

# New to the model, but related to its pretraining tasks, and spelled with the same characters: `main` builds on `min`
# and `over`; `harder` also combines the reverse order and upper case.
FINETUNE = {
    "main": Task("sort", word(4, 8), lambda text: "".join(sorted(text))),
    "harder": Task("desc", word(3, 6), lambda text: "".join(sorted(text.upper(), reverse=True))),
}


def pretraining(split: Split, seed: int = 0) -> Iterator[dict[str, str]]:
    """Yield pretraining items of `split` without end. The tasks are mixed by weight."""
    rng = random.Random(f"pretraining/{split}/{seed}")
    weights = [task.weight for task in PRETRAIN]
    while True:
        yield rng.choices(PRETRAIN, weights)[0].item(rng, split)


def write(folder: Path, train: int = 2048, test: int = 256, seed: int = 0) -> None:
    """Write the main task to `folder` and the harder one to `folder/harder`, as `train.jsonl` and `test.jsonl`."""
    for name, task in FINETUNE.items():
        into = folder if name == "main" else folder / name
        into.mkdir(parents=True, exist_ok=True)
        sizes: list[tuple[Split, int]] = [("train", train), ("test", test)]
        for split, count in sizes:
            lines = [json.dumps(item) + "\n" for item in task.items(split, count, seed)]
            (into / f"{split}.jsonl").write_text("".join(lines))


def main() -> None:
    """Write the fine-tuning data from the command line."""
    parser = argparse.ArgumentParser(prog="python -m lora_one.demo.tasks", description=main.__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write the JSON Lines files to")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.out, seed=arguments.seed)


if __name__ == "__main__":
    main()
