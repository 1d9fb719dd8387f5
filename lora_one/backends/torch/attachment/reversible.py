"""LoRA on a model for the time of a session: kept when it ends, taken back when it fails."""

from collections.abc import Mapping
from contextlib import ExitStack
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from lora_one.backends.torch.files.state import is_frozen, train_adapter
from lora_one.checkpoint.scales import plain_settings
from lora_one.config import Config
from lora_one.errors import ModelError

from .adapters import adapter_of, is_leftover
from .attach import Site, attach_lora, check_adapter_fits, find_sites
from .quiet import nothing_drawn
from .sharded_base import check_factors_sharded
from .sharding import is_sharded, note_trainable, reshard, write
from .snapshot import Snapshot
from .starts import check_base_is_whole
from .tensor_parallel import prepare_factors
from .wrappers import check_open_to_lora, plain_names, unwrapped


class ReversibleAttachment:
    """The LoRA layers of a model in a session: those it has, or those that `attach` gives it.

    Attributes:
        model: the model without the wrappers around it; after `attach` the PeftModel.
        had_adapter: whether the user's model came with a LoRA adapter.
        sites: the LoRA layers by name.
    """

    def __init__(self, model: nn.Module, config: Config):
        self.model: Any = unwrapped(model)
        self._given = model
        self.had_adapter = False
        self.sites: dict[str, Site] = {}
        self._config = config
        self._values_before: list[tuple[Tensor, Tensor]] = []
        self._plain_names = ExitStack()
        self._plain_names.enter_context(plain_names(self.model))
        self._before = Snapshot(self.model)

    def attach(self) -> None:
        """Attach LoRA, or check and unfreeze the adapter that is there."""
        adapted = adapter_of(self.model)
        if adapted is None or is_leftover(self.model, adapted):
            check_open_to_lora(self._given)
            _check_ranks_can_change(self.model, self._config)
            with nothing_drawn():  # every layer's factors are assigned
                self.model = adapted = attach_lora(self.model, self._config)
        else:
            self.had_adapter = True
            check_adapter_fits(adapted, self._config)
            check_base_is_whole(adapted)
            check_factors_sharded(adapted)
        sites = find_sites(adapted)
        prepare_factors(adapted, sites[0].adapter)
        self.sites = {site.layer.name: site for site in sites}
        if self.had_adapter:
            self._values_before = [value for site in sites for value in site.values()]
            if is_frozen(adapted, sites[0].adapter):  # as `load` leaves it by default
                train_adapter(adapted, sites[0].adapter, True)

    def set_ranks(self, ranks: Mapping[str, int]) -> None:
        """Give the layers other ranks, at the same scaling, and zeros as factors; PEFT's configuration states them."""
        for name, site in self.sites.items():
            self.sites[name] = site.with_rank(ranks[name])
        layers = [site.layer for site in self.sites.values()]
        settings = plain_settings({layer.module or layer.name: (layer.rank, layer.scaling) for layer in layers})
        for setting, value in settings.items():
            setattr(self.model.peft_config[site.adapter], setting, value)

    def close(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Keep the LoRA layers; after an exception make the model what it was."""
        reshard(self.model)
        if kind is None:
            self._before.restore_modes(self.model)
            note_trainable(self.model)
        else:
            self._before.restore()
            for parameter, values in self._values_before:
                write(parameter, values)
        self._plain_names.close()


def _check_ranks_can_change(model: nn.Module, config: Config) -> None:
    """Raise ModelError if the ranks are to follow the gradients, and the factors are sharded before any is there."""
    if config.rank_max is not None and is_sharded(model):
        raise ModelError(
            "rank_max needs weights that are whole, since the ranks are not known before the gradients are; got a "
            "model that is spread over processes: call lora_one.init first and spread what it returns, or leave "
            "rank_max out"
        )
