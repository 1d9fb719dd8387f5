"""Data that is not trained on: test items to answer, and sequences for a validation loss."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lora_one.finetune.data import Example
from lora_one.finetune.encoding import TokenSequence, encode
from lora_one.finetune.fit import check_questions
from lora_one.finetune.progress import Progress
from lora_one.finetune.recipe import Recipe
from lora_one.finetune.tuners.interface import Tuner
from lora_one.progress import Counted

from .answering import answers
from .scores import METRICS


@dataclass(frozen=True)
class HeldOut:
    """The held-out data of a run, ready for its model.

    Attributes:
        tests: the test items; there may be none.
        questions: the test items in tokens.
        batches: the batches of the validation loss; there may be none.
        metrics: the metrics of the test items, beside exact match.
    """

    tests: Sequence[Example]
    questions: Sequence[TokenSequence]
    batches: Sequence[Any]
    metrics: Sequence[str]

    def score(self, tuner: Tuner, progress: Progress, when: str) -> dict[str, float] | None:
        """Answer the test items and return the metrics of the answers; exact match is always one of them."""
        if not self.tests:
            return None
        progress.say(f"Answering {len(self.tests)} test items")
        longest = max(len(question.tokens) - question.prompt_length for question in self.questions)
        given = answers(tuner, self.questions, longest + 1, progress)
        expected = [reference(tuner, *item) for item in zip(self.tests, self.questions, strict=True)]
        pairs = [(text.strip(), right.strip()) for text, right in zip(given, expected, strict=True)]
        metrics = {name: METRICS[name](pairs) for name in ("exact_match", *self.metrics)}
        progress.score(when, metrics["exact_match"], len(self.tests))
        return metrics

    def validate(self, tuner: Tuner, progress: Progress, when: str) -> float | None:
        """Return the mean loss of the validation batches."""
        if not self.batches:
            return None
        progress.say("Measuring the loss on held-out data")

        def tell(number: int, done: int) -> None:
            if number == 1:  # the pass that computes; a second one counts the tokens
                progress.part(done, len(self.batches))

        loss = tuner.mean_loss(Counted(self.batches, tell))
        progress.validation(when, loss)
        return loss


def open_held_out(
    recipe: Recipe, tuner: Tuner, tests: Sequence[Example], validation: Sequence[TokenSequence] = ()
) -> HeldOut:
    """Encode the test items, and make batches of the sequences for the validation loss.

    Raises:
        DataError: the model has no place for one of them.
    """
    batches = tuner.batches(validation, recipe.batch_size) if validation else []
    return HeldOut(tests, _questions(recipe, tuner, tests), batches, recipe.metrics)


def reference(tuner: Tuner, example: Example, question: TokenSequence) -> str:
    """Return the expected answer as text, with tool calls as the chat template writes them."""
    if example.answer is None:
        return example.completion
    return tuner.tokenizer.decode(question.tokens[question.prompt_length :], skip_special_tokens=True)


def _questions(recipe: Recipe, tuner: Tuner, tests: Sequence[Example]) -> list[TokenSequence]:
    # Which tokens count in a loss does not matter here: "last_answer" needs least of a template.
    questions = [encode(tuner.tokenizer, example, "last_answer", recipe.chat_template) for example in tests]
    if tuner.separate and recipe.max_length is not None:
        questions = [question.cut(recipe.max_length, separate=True) or question for question in questions]
    check_questions(questions, tuner.tokenizer, tuner.limits, tuner.separate)
    return questions
