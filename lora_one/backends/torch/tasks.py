"""PEFT's task of a transformers model, so that `generate` and a classifier's new head work as its users expect."""

import inspect

import peft
from torch import nn
from transformers import PreTrainedModel

_BY_NAME = {
    "ForSequenceClassification": peft.TaskType.SEQ_CLS,
    "ForTokenClassification": peft.TaskType.TOKEN_CLS,
    "ForQuestionAnswering": peft.TaskType.QUESTION_ANS,
}
# What PEFT trains whole of these tasks.
_HEADS = {
    peft.TaskType.SEQ_CLS: ("classifier", "score"),
    peft.TaskType.TOKEN_CLS: ("classifier", "score"),
    peft.TaskType.QUESTION_ANS: ("qa_outputs",),
}


def task_type(model: nn.Module) -> peft.TaskType | None:
    """The task, where the model takes the arguments that PEFT's class for it hands on by name.

    Speech and image models take no `input_ids`: PEFT's class without a task hands on what it is given.
    """
    task = _task(model)
    return task if task is None or "input_ids" in inspect.signature(model.forward).parameters else None


def heads(model: nn.Module) -> tuple[str, ...]:
    """The modules that are a new head, by the model's task: to be trained whole."""
    task = _task(model)
    return tuple(name for name in _HEADS.get(task, ()) if hasattr(model, name)) if task is not None else ()


def _task(model: nn.Module) -> peft.TaskType | None:
    if not isinstance(model, PreTrainedModel):
        return None
    for suffix, task in _BY_NAME.items():
        if type(model).__name__.endswith(suffix):
            return task
    if not model.can_generate():
        return None
    return peft.TaskType.SEQ_2_SEQ_LM if model.config.is_encoder_decoder else peft.TaskType.CAUSAL_LM
