"""PEFT's task for a transformers model, which makes `generate` and a classifier's new head work as expected."""

import inspect

import peft
from torch import nn
from transformers import PreTrainedModel

_BY_NAME = {
    "ForSequenceClassification": peft.TaskType.SEQ_CLS,
    "ForTokenClassification": peft.TaskType.TOKEN_CLS,
    "ForQuestionAnswering": peft.TaskType.QUESTION_ANS,
}
# The modules that PEFT trains as a whole for a task.
_HEADS = {
    peft.TaskType.SEQ_CLS: ("classifier", "score"),
    peft.TaskType.TOKEN_CLS: ("classifier", "score"),
    peft.TaskType.QUESTION_ANS: ("qa_outputs",),
}

_INPUTS = ("input_ids", "inputs_embeds")
_PASSED_ON = ("attention_mask", "labels", "output_attentions", "output_hidden_states", "return_dict")


def task_type(model: nn.Module) -> peft.TaskType | None:
    """Return the task, if the model takes all arguments that PEFT's class for the task passes by name.

    Speech and image models take no `input_ids`: for them PEFT's class without a task is right, which passes on whatever
    it is given.
    """
    task = _task(model)
    if task is None:
        return None
    parameters = inspect.signature(model.forward).parameters
    # Models with **kwargs pass on what they do not know, but their parts do not know embeddings either.
    named = [*_INPUTS, *(f"decoder_{name}" for name in _INPUTS if task == peft.TaskType.SEQ_2_SEQ_LM)]
    open_ended = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    fits = parameters.keys() >= {*named} and (open_ended or parameters.keys() >= {*_PASSED_ON})
    return task if fits else None


def heads(model: nn.Module) -> tuple[str, ...]:
    """Return the modules that are a new head for the model's task, to be trained as a whole."""
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
