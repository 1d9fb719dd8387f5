"""Save and load an adapter in PEFT's files, after checks of our own."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_one.backends.torch.attachment.adapters import (
    adapter_of,
    is_leftover,
    mark_as_ours,
    opened,
    require_lora,
    take_out_leftover,
)
from lora_one.backends.torch.attachment.kinds import lend_settings
from lora_one.backends.torch.attachment.quiet import quiet_peft
from lora_one.backends.torch.attachment.sharded_base import shard_attached
from lora_one.backends.torch.attachment.sharding import (
    gathered,
    is_sharded,
    is_spread,
    own_part,
    write,
)
from lora_one.backends.torch.attachment.snapshot import Snapshot
from lora_one.backends.torch.attachment.starts import base_weights_kept, check_start
from lora_one.backends.torch.attachment.tensor_parallel import prepare_factors
from lora_one.backends.torch.attachment.wrappers import (
    check_open_to_lora,
    plain_names,
    unwrapped,
)
from lora_one.backends.torch.processes import Processes
from lora_one.checkpoint.folder import WEIGHTS
from lora_one.checkpoint.peft import AdapterFolder, read_folder
from lora_one.errors import CheckpointError, ModelError

from .config import blaming_settings, config_to_save, read_config, set_attributes, take_scales
from .embeddings import added_rows
from .fit import problems_after, problems_before
from .state import active_adapter, adapter_state, tokens_of_others, train_adapter


class WholeAdapter(NamedTuple):
    """What is written of an adapter."""

    tensors: dict[str, Tensor]
    config: peft.LoraConfig


@contextmanager
def one_writer(model: nn.Module, path: Path) -> Iterator[WholeAdapter | None]:
    """Yield the adapter of a model in the process that writes it into a folder, and wait until it is written.

    A model whose weights are in shards is saved by all processes together. Of those of one machine that name the same
    folder, the first writes it.
    """
    processes = Processes("lora_one.save", alone=not is_sharded(model))
    with processes.together():
        whole = _whole(model)  # all of them gather it, before one may fail to write
        mine = socket.gethostname(), str(path.absolute())
        yield whole if processes.gather(mine).index(mine) == processes.rank else None
        processes.count()


def save(model: nn.Module | WholeAdapter, path: Path) -> None:
    """See `lora_one.save`. It saves the active adapter, with the embeddings if tokens were added to the base model."""
    whole = model if isinstance(model, WholeAdapter) else _whole(model)
    path.mkdir(parents=True, exist_ok=True)
    save_file(_separate(whole.tensors), path / WEIGHTS, metadata={"format": "pt"})
    whole.config.save_pretrained(str(path))


def _whole(model: nn.Module) -> WholeAdapter:
    with opened(model, "save") as adapted:
        return WholeAdapter(_tensors(adapted), config_to_save(adapted, active_adapter(adapted, "save")))


def _tensors(adapted: peft.PeftModel) -> dict[str, Tensor]:
    """Return what the file of weights holds, whole. Every process must call it if the weights are sharded.

    Raises:
        ModelError: weights that hold no numbers.
    """
    adapter = active_adapter(adapted, "save")
    state = {**adapter_state(adapted, adapter), **added_rows(adapted)}
    tensors = {key: gathered(tensor) for key, tensor in state.items()}
    if empty := [key for key, tensor in tensors.items() if tensor.is_meta or tensor.numel() == 0]:
        raise ModelError(
            f"{empty[0]}: it holds no numbers, as low_cpu_mem_usage=True makes weights, offloading, and sharding over "
            "processes; load the adapter's weights first, or the model where it fits, or gather the weights"
        )
    return tensors


def load(model: nn.Module, path: Path, trainable: bool) -> nn.Module:
    """See `lora_one.load`."""
    base = unwrapped(model)
    processes = Processes("lora_one.load", alone=not is_sharded(base))
    with processes.together(), plain_names(base):
        adapted = adapter_of(base)
        present = None if is_leftover(base, adapted) else adapted  # the adapter that gets the folder's factors
        if present is not None:
            require_lora(present, "load")
        if present is None:
            check_open_to_lora(model)
        plain = base if adapted is None else adapted.get_base_model()
        held = None if present is None else present.peft_config[active_adapter(present, "load")]
        folder = read_folder(path)
        with blaming_settings(folder):
            config = read_config(folder)
            problems = problems_before(folder, config, plain, held) + check_start(folder, present)
        _refuse(folder, problems)
        loaded = _load(base, present, folder, config, trainable)
    return model if present is not None else loaded


def _load(
    base: nn.Module, present: peft.PeftModel | None, folder: AdapterFolder, config: peft.LoraConfig, trainable: bool
) -> peft.PeftModel:
    before, depth = Snapshot(base), _depth(base)
    config.inference_mode = not trainable
    existing = {id(tensor) for tensor in (*base.parameters(), *base.buffers())}
    overwritten: list[tuple[Tensor, Tensor]] = []
    with base_weights_kept(base, folder):
        try:
            adapted = _attach(base, config, folder) if present is None else present
            adapter = active_adapter(adapted, "load")
            prepare_factors(adapted, adapter)
            _refuse(folder, problems_after(folder, config, adapted, adapter))
            state = {**adapted.state_dict(keep_vars=True), **adapter_state(adapted, adapter)}
            # PEFT writes some weights of embeddings a second time, under a name that nothing reads.
            tensors = {key: tensor for key, tensor in load_file(folder.path / WEIGHTS).items() if key in state}
            overwritten += [(state[key], own_part(state[key])) for key in tensors if id(state[key]) in existing]
            for key in [key for key in tensors if is_spread(state[key])]:  # PEFT 0.21.0 cannot write shards
                write(state[key], tensors.pop(key))
            unused = dict.fromkeys(tokens_of_others(adapted, adapter), torch.empty(0))
            peft.set_peft_model_state_dict(adapted, {**tensors, **unused}, adapter)
        except BaseException:
            before.restore()
            set_attributes(getattr(base, "config", None), depth)
            for tensor, original in overwritten:
                write(tensor, original)
            raise
    if present is None:
        mark_as_ours(adapted)
    else:
        take_scales(adapted, adapter, config)
    train_adapter(adapted, adapter, trainable)
    before.restore_modes(adapted if present is None else base)
    return adapted


def _depth(model: nn.Module) -> dict[str, Any]:
    """Return what PEFT changes in a model's configuration if an adapter replicates layers."""
    config: Any = getattr(model, "config", None)
    return {"num_hidden_layers": config.num_hidden_layers} if hasattr(config, "num_hidden_layers") else {}


def _refuse(folder: AdapterFolder, problems: list[str]) -> None:
    if problems:
        raise CheckpointError(f"the adapter in {folder.path} does not fit the model", problems)


def _attach(model: nn.Module, config: peft.LoraConfig, folder: AdapterFolder) -> peft.PeftModel:
    take_out_leftover(model)
    name, config.base_model_name_or_path = config.base_model_name_or_path, None  # PEFT warns if it changes this
    known = {id(p) for p in model.parameters()}
    with quiet_peft():
        try:
            adapted: Any = peft.get_peft_model(model, config)
        except Exception as error:  # of any kind: the folder's settings decide what PEFT does
            raise CheckpointError(
                f"PEFT cannot attach the adapter in {folder.path} to the model: {type(error).__name__}: {error}"
            ) from error
    config.base_model_name_or_path = config.base_model_name_or_path or name
    shard_attached(adapted, known)
    lend_settings(adapted)
    return adapted


def _separate(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors as safetensors needs them: contiguous, on the CPU, and each with its own memory."""
    seen: set[int] = set()
    separate = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach().cpu().contiguous()
        address = tensor.untyped_storage().data_ptr()
        separate[key] = tensor.clone() if address in seen else tensor
        seen.add(address)
    return separate
