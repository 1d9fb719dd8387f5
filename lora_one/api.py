"""The public functions: they find the model's framework, and hand over."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from .backends import backend_of
from .checkpoint.folder import replacing_adapter
from .checkpoint.metadata import write_metadata
from .config import Config
from .initialization import initialize
from .report import Report


def init(
    model: Any,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Any] | None = None,
    config: Config | None = None,
    backend: str | None = None,
) -> tuple[Any, Report]:
    """Start LoRA by LoRA-One: one gradient step along the best rank-r directions, the base weights untouched.

    Source: Zhang, Liu and Chen, "LoRA-One" (ICML 2025, arXiv 2502.01235), the initialisation of Algorithm 1.

    Args:
        model: a torch.nn.Module: plain, of transformers, or a PeftModel with one active LoRA adapter. A plain model
            gets LoRA attached, in place, by PEFT; the layers of a PeftModel, and those that were injected into a
            model, are started again. torch.compile and DataParallel around it, or around its parts, are looked through:
            wrap what comes back once more, unless it had its adapter already and is what you handed in. Or an
            mlx.nn.Module, with mlx-lm's LoRA layers in the same way; its batches and its default loss are mlx-lm's.
        batches: a re-iterable collection of batches (a list, a DataLoader): the sketch reads it once a pass.
            A few dozen sequences are enough. Tensors are moved to the model's device.
        loss_fn: (model, batch) -> mean loss, a scalar. Default: `model(**batch).loss`.
        config: see `Config`. For a PeftModel rank, alpha, use_rslora, targets, modules_to_save and dropout are the
            adapter's own.
        backend: the framework's name, as a check; it is read off the model.

    Returns:
        The model with its LoRA layers, ready to train, and the report.

    Raises:
        BackendError, ConfigError, ModelError, BatchError, GradientError: see `lora_one.errors`. On any exception, the
            caller's own included, the model is as it was: weights, train/eval mode, requires_grad, hooks, and the
            adapter that it had.
    """
    began = time.perf_counter()
    config = Config() if config is None else config
    framework = backend_of(model, backend)
    with framework.open_session(model, batches, loss_fn, config) as session:
        report = initialize(session, config, framework.ops.name, began)
    return session.model, report


def optimizer(model: Any, learning_rate: float = 2e-4, weight_decay: float = 0.0, **options: Any) -> Any:
    """AdamW for a model with LoRA layers, optionally r x r preconditioned, of the framework's own kind.

    Args:
        model: what `init` or `load` returned, or any model with LoRA layers of the framework's own library.
        learning_rate: of all parameters, unless a parameter group says otherwise.
        weight_decay: decoupled.
        options: of the backend, see `lora_one.backends.<name>.optimizer`.
    """
    return backend_of(model).optimizer(model, learning_rate=learning_rate, weight_decay=weight_decay, **options)


def save(model: Any, path: str | Path, report: Report | None = None) -> None:
    """Write the active adapter as a folder that PEFT and vLLM open as is, with `lora_one.json` beside it.

    Args:
        path: made if it does not exist. An adapter in it, of any library's, is replaced in one step, so that at any
            moment it holds the old adapter or the new one; everything else in it stays.
        report: what `init` returned; kept in `lora_one.json`.

    Raises:
        ModelError: the model has no adapter that can be saved.
        CheckpointError: the folder cannot be written; what it held is as it was.
    """
    framework = backend_of(model)
    with replacing_adapter(Path(path)) as folder:
        framework.save(model, folder)
        write_metadata(folder, framework.ops.name, report)


def load(model: Any, path: str | Path, trainable: bool = False) -> Any:
    """Open an adapter folder (PEFT's format) on its base model, after checking that it belongs to it.

    Args:
        model: the base model the adapter was trained on, or one with a LoRA adapter of the same shape, which gets the
            folder's factors and scales.
        trainable: False freezes the adapter, as PEFT does; True is for going on training.

    Raises:
        CheckpointError: everything that is wrong, at once: files, names, ranks, shapes. Nothing was loaded.
    """
    return backend_of(model).load(model, Path(path), trainable)


def merge(model: Any, **options: Any) -> Any:
    """Add the adapter to the base weights, W + s B A, and take the LoRA layers out. Returns the plain model.

    Args:
        options: of the backend: MLX has `dequantize=True`, for quantised weights to become float ones.
    """
    return backend_of(model).merge(model, **options)
