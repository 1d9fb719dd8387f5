"""The public functions. Each finds the model's framework and calls its backend."""

import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, overload

from .backends import backend_of
from .backends.checks import check_iterable, check_readings, check_takes
from .backends.interface import Backend
from .backends.saving import save_adapter
from .backends.waiting import check_no_optimizer, forget, remember, warn_of_unfinished_start
from .config import Config
from .errors import ConfigError
from .initialization import initialize, initialize_without_data
from .progress import shown
from .report import Report
from .report.deferred import DeferredReport, check_needs_no_data


@overload
def init(
    model: Any,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Any] | None = None,
    config: Config | None = None,
    backend: str | None = None,
    progress: bool | None = None,
) -> tuple[Any, Report]: ...


@overload
def init(
    model: Any,
    batches: None = None,
    loss_fn: None = None,
    config: Config | None = None,
    backend: str | None = None,
    progress: bool | None = None,
) -> tuple[Any, DeferredReport]: ...


def init(
    model: Any,
    batches: Iterable[Any] | None = None,
    loss_fn: Callable[[Any, Any], Any] | None = None,
    config: Config | None = None,
    backend: str | None = None,
    progress: bool | None = None,
) -> tuple[Any, Report | DeferredReport]:
    """Attach LoRA to a model and start it by LoRA-One, leaving the base weights as they are.

    Call it once, before training, with a few batches of the training data. It looks at the gradient of the loss on
    them, and sets the factors of each layer to one gradient step along the gradient's best rank-r directions. Training
    then continues as with any LoRA adapter. Without batches it attaches LoRA, and `lora_one.optimizer` makes the start
    of the first training steps.

    Args:
        model: a model of PyTorch, JAX or MLX. LoRA is attached in place.

            PyTorch: any torch.nn.Module. PEFT attaches LoRA to a plain model or one of transformers. A PeftModel with
            one active LoRA adapter, and a model with injected LoRA layers, keep their layers, which are started again.
            torch.compile and DataParallel around the model, or around its parts, are looked through: wrap the returned
            model again, unless it had its adapter already and is the one you passed in.

            JAX: a flax.nnx.Module, or a model of Linen or of a plain tree of arrays (docs/guide/jax.md).

            MLX: an mlx.nn.Module, with mlx-lm's LoRA layers. Its batches and its default loss are mlx-lm's.
        batches: a collection such as a list or a DataLoader; a generator will do where one pass is made, the default
            on PyTorch. A few dozen sequences are enough. PyTorch moves the tensors to the model's device. None
            (default) leaves the start to the optimizer: docs/guide/without-data.md says when to choose which.
        loss_fn: function (model, batch) -> mean loss, a scalar. Default: `model(**batch).loss`. Only with batches.
        config: the settings. Default: `Config()`. For a model with an adapter, its own rank, alpha, use_rslora,
            targets, modules_to_save and dropout hold.
        backend: name of the framework the model must belong to: "torch", "jax" or "mlx". Default: any.
        progress: whether a bar on stderr counts the batches. Default: only where stderr is a terminal.

    Returns:
        The model with its LoRA layers, ready to train, and the report of the start: a `Report`; without batches a
        `DeferredReport`, which is filled in while training goes on.

    Raises:
        BackendError, ConfigError, ModelError, BatchError, GradientError, ProcessError: see `lora_one.errors`. After
            any exception, also one from `loss_fn` or the batches, the model is as it was: weights, train/eval mode,
            requires_grad, hooks, and the adapter that it had.

    Source: Zhang, Liu and Chen, "LoRA-One" (ICML 2025, arXiv 2502.01235), the initialisation of Algorithm 1.

    >>> import lora_one, torch
    >>> base = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Tanh(), torch.nn.Linear(5, 4))
    >>> batches = [(torch.randn(8, 6), torch.randn(8, 4)) for _ in range(2)]
    >>> mean_square = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> model, report = lora_one.init(base, batches, mean_square, lora_one.Config(rank=2, targets=["0", "2"]))
    >>> [(layer.name, layer.rank, len(layer.singular_values)) for layer in report.layers]
    [('0', 2, 2), ('2', 2, 2)]
    """
    config = Config() if config is None else config
    framework = backend_of(model, backend)
    if batches is None:
        return _init_without_data(framework, model, loss_fn, config)
    return _init_from_batches(framework, model, batches, loss_fn, config, progress)


def _init_from_batches(
    framework: Backend,
    model: Any,
    batches: Iterable[Any],
    loss_fn: Callable[[Any, Any], Any] | None,
    config: Config,
    progress: bool | None,
) -> tuple[Any, Report]:
    """Attach LoRA, and start it by the gradient of the loss on the batches."""
    began = time.perf_counter()
    check_iterable(batches)
    with shown(batches, progress) as counted, framework.open_session(model, counted, loss_fn, config) as session:
        if isinstance(batches, Iterator):
            check_readings(batches, config, session.folds)
        report = initialize(session, config, framework.ops.name, began)
    for known in (model, session.model):
        forget(known)
    return session.model, report


def _init_without_data(
    framework: Backend, model: Any, loss_fn: Callable[[Any, Any], Any] | None, config: Config
) -> tuple[Any, DeferredReport]:
    """Attach LoRA with plain LoRA's start, for the optimizer to make LoRA-One's of its first gradients."""
    if loss_fn is not None:
        raise ConfigError("loss_fn is for the gradient on batches, got it without batches: pass both or neither")
    check_needs_no_data(config)
    check_no_optimizer(model)
    with framework.open_session(model, None, None, config) as session:
        report = initialize_without_data(session, config, framework.ops.name)
    for known in (model, session.model):  # the user may keep either
        remember(known, report)
    return session.model, report


def optimizer(model: Any, learning_rate: float = 2e-4, weight_decay: float = 0.0, **options: Any) -> Any:
    """Return AdamW for a model with LoRA layers, in the framework's own kind of optimizer.

    Use it like any other optimizer of the framework. After `init` without batches its first steps make LoRA-One's
    start; otherwise the framework's own AdamW works as well. It adds two options: LoRA+'s learning rate for lora_B, and
    the paper's r x r preconditioner, which is off by default, since under AdamW it did harm
    (docs/evidence/preconditioner.md).

    Args:
        model: what `init` or `load` returned, or any model with LoRA layers of the framework's own library.
        learning_rate: float, default 2e-4. Step size of all parameters, unless `loraplus_lr_ratio` or a parameter group
            says otherwise. JAX also accepts an optax schedule, and MLX one of mlx.optimizers.
        weight_decay: float, default 0. Decoupled decay: each step multiplies the parameters by
            1 - learning_rate * weight_decay.
        precondition: bool, default False. Replace the gradients of each LoRA pair, before Adam's moments, by
            gA <- (B^T B + reg I)^-1 gA, (r, in), and gB <- gB (A A^T + reg I)^-1, (out, r). Other parameters are not
            preconditioned.
        reg: float >= 0, default 1e-6. The damping in these two formulas, on the diagonal of the r x r matrices.
        damping: "absolute" (default) adds `reg` as it is, as in the paper. "relative" adds `reg` times the mean
            eigenvalue of each r x r matrix, so that it does not depend on the factors' scale.
        betas: two floats in [0, 1), default (0.9, 0.999). Adam's decay rates of the mean and of the mean square.
        eps: float, default 1e-8. Adam's term in the denominator.
        loraplus_lr_ratio: float > 0, default 1. lora_B's learning rate over lora_A's (LoRA+, arXiv 2402.12354). It
            multiplies schedules, too, and lora_B's weight decay follows its rate.
        param_groups: groups of parameters with settings of their own, as torch.optim takes them, default none. All
            parameters not in them form the remaining groups. PyTorch only.
        fused: bool or None (default), as in torch.optim.AdamW. None chooses the fused kernel where there is one, but
            without its offer to undo a GradScaler's scale in the step. PyTorch only.
        start_steps: int >= 0, "auto" or None (default). How many of the first steps make LoRA-One's start of their
            gradients, which sets the factors; AdamW trains them afterwards, with fresh moments. "auto" takes 6 to 16,
            until the gradients agree. None means "auto" where `init` had no batches, else 0, which makes no start.

    Returns:
        PyTorch: a torch.optim.AdamW over all trainable parameters, with precondition=True or a start to make a
        `lora_one.backends.torch.LoraOneAdamW`.
        JAX: an optax transformation, for `nnx.Optimizer(model, optimizer, wrt=nnx.LoRAParam)` or for a tree of factors.
        MLX: a `lora_one.backends.mlx.LoraOneAdamW`, an mlx.optimizers.AdamW with bias correction.

    Raises:
        ConfigError: an invalid setting.
        ModelError: nothing is trainable, or there are no LoRA layers to precondition. With a start to make also: no
            LoRA, or one that LoRA-One cannot start; a lora_B that is not zero; a frozen factor.

    Source: Zhang, Liu and Chen, "LoRA-One" (ICML 2025, arXiv 2502.01235), the preconditioned steps of Algorithm 1.

    >>> import lora_one, torch
    >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
    >>> batches = [(torch.randn(8, 6), torch.randn(8, 4))]
    >>> mean_square = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> model, _ = lora_one.init(base, batches, mean_square, lora_one.Config(rank=2, targets=["0"]))
    >>> adamw = lora_one.optimizer(model, learning_rate=1e-2, precondition=True, damping="relative")
    >>> loss = mean_square(model, batches[0])
    >>> loss.backward()
    >>> adamw.step()
    >>> bool(mean_square(model, batches[0]) < loss)
    True
    """
    framework = backend_of(model)
    check_takes(framework.optimizer, options, framework.ops.name)
    return framework.optimizer(model, learning_rate=learning_rate, weight_decay=weight_decay, **options)


def save(model: Any, path: str | Path, report: Report | DeferredReport | None = None) -> None:
    """Write the active adapter into a folder that PEFT and vLLM can open.

    Use it after `init` to train with another program, or after training to keep the result. The folder holds PEFT's
    files, for MLX also mlx-lm's, and `lora_one.json` with the report and the versions of the packages in use. If FSDP2
    shards the weights, every process must call it, and one writes the folder.

    Args:
        model: a model with a LoRA adapter, of any of the frameworks.
        path: folder; it is made if it does not exist. An adapter in it, from any library, is replaced in one step: at
            any moment the folder holds the old adapter or the new one. Other files in it stay.
        report: what `init` returned, to be kept in `lora_one.json`. Default: none is kept.

    Raises:
        ModelError: the model has no adapter that can be saved.
        CheckpointError: the folder cannot be written; what it held is as it was.

    >>> import lora_one, pathlib, torch
    >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
    >>> batches = [(torch.randn(8, 6), torch.randn(8, 4))]
    >>> mean_square = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> model, report = lora_one.init(base, batches, mean_square, lora_one.Config(rank=2, targets=["0"]))
    >>> lora_one.save(model, "start", report)
    >>> sorted(file.name for file in pathlib.Path("start").iterdir() if file.suffix != ".md")
    ['adapter_config.json', 'adapter_model.safetensors', 'lora_one.json']
    """
    framework = backend_of(model)
    warn_of_unfinished_start(model, "the folder holds")
    save_adapter(framework, model, Path(path), report)


def load(model: Any, path: str | Path, trainable: bool = False) -> Any:
    """Open an adapter folder on its base model, after checking that the two belong together.

    Use it to run a trained adapter, or to continue training. It reads PEFT's layout, on MLX also mlx-lm's, from any
    library. Names, ranks and shapes are all compared with the model before anything is changed.

    Args:
        model: the base model that the adapter was trained on, or the same with a LoRA adapter of the same shape, which
            then gets the folder's factors and scales.
        path: the adapter folder.
        trainable: bool, default False: the adapter is frozen, as in PEFT. True makes it ready for training.

    Returns:
        The model with the adapter.

    Raises:
        CheckpointError: all that is wrong with files, names, ranks and shapes, at once. Nothing was loaded.

    >>> import lora_one, torch
    >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
    >>> weights = {name: value.clone() for name, value in base.state_dict().items()}
    >>> batches = [(torch.randn(8, 6), torch.randn(8, 4))]
    >>> mean_square = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> model, _ = lora_one.init(base, batches, mean_square, lora_one.Config(rank=2, targets=["0"]))
    >>> lora_one.save(model, "adapter")
    >>> fresh_base = torch.nn.Sequential(torch.nn.Linear(6, 4))
    >>> _ = fresh_base.load_state_dict(weights)
    >>> loaded = lora_one.load(fresh_base, "adapter")
    >>> torch.equal(loaded(batches[0][0]), model.eval()(batches[0][0]))
    True
    """
    return backend_of(model).load(model, Path(path), trainable)


def merge(model: Any, **options: Any) -> Any:
    """Add the adapter to the base weights, W + s B A, and remove the LoRA layers.

    Use it after training, for a model that runs at the base model's speed and that any program can open. The sum has
    the dtype of the weight. The base weights change and the factors are gone, so `save` the adapter first if you may
    need it again.

    Args:
        model: a model with a LoRA adapter.
        options: on MLX `dequantize=True` (default False) turns quantised weights into float ones; by default they are
            quantised again. Other frameworks have no options.

    Returns:
        The model without LoRA layers.

    Raises:
        ModelError: the model has no adapter, or one that cannot be merged.

    >>> import lora_one, torch
    >>> base = torch.nn.Sequential(torch.nn.Linear(6, 4))
    >>> batches = [(torch.randn(8, 6), torch.randn(8, 4))]
    >>> mean_square = lambda model, batch: (model(batch[0]) - batch[1]).square().mean()
    >>> model, _ = lora_one.init(base, batches, mean_square, lora_one.Config(rank=2, targets=["0"]))
    >>> before = model.eval()(batches[0][0])
    >>> merged = lora_one.merge(model)
    >>> type(merged[0]).__name__, torch.allclose(merged(batches[0][0]), before, atol=1e-5)
    ('Linear', True)
    """
    framework = backend_of(model)
    warn_of_unfinished_start(model, "the merged model has")
    return framework.merge(model, **options)
