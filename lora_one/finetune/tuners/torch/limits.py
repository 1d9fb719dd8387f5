"""The tokens, and the number of them, that a transformers model accepts."""

import re
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from lora_one.finetune.fit import Limits

# Names of tables with a row for each position, learned or not.
_POSITION_TABLES = re.compile(r"wpe|embed_pos.*|pos_emb.*|positions?_emb.*")
_OTHER_TOWERS = re.compile(r"vision|visual|image|audio|video")


def limits_of(model: PreTrainedModel) -> Limits:
    """Return the limits of a model, from its tables of positions and tokens.

    The configuration does not say enough: its number of positions is the size of such a table for some models, and only
    the length of the training sequences for others.
    """
    config = model.config.get_text_config()
    trained = getattr(config, "max_position_embeddings", None)
    if model.config.is_encoder_decoder:
        tables = [_positions(part) for part in (model.get_encoder(), model.get_decoder())]
        return Limits(_rows(model), *tables)
    return Limits(_rows(model), _positions(model), trained=trained)


def _rows(model: PreTrainedModel) -> int | None:
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    sizes = (getattr(table, name, None) for table, name in zip(tables, ("num_embeddings", "out_features"), strict=True))
    return min((size for size in sizes if size is not None), default=None)


def _positions(model: nn.Module) -> int | None:
    sizes = []
    for path, module in model.named_modules():
        name = path.split(".")[-1]
        if isinstance(module, nn.Embedding) and _POSITION_TABLES.fullmatch(name) and not _OTHER_TOWERS.search(path):
            sizes.append(module.num_embeddings - _first(module))
    for path, table in model.named_buffers():
        # Sines and cosines of each position in GPT-J, CodeGen and CTRL. M2M100 and XGLM extend theirs when needed.
        if path.split(".")[-1] in ("embed_positions", "pos_encoding") and not _OTHER_TOWERS.search(path):
            sizes.append(table.shape[0])
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) == "mpt":  # its bias by distance is a table too
        sizes.append(config.max_seq_len)
    return min(sizes, default=None)


def _first(table: nn.Embedding) -> int:
    """Return the row of the first position.

    OPT and BART skip two rows; RoBERTa and its relatives skip all rows up to the padding's.
    """
    offset = getattr(table, "offset", None)
    if offset is not None:
        return int(offset)
    return 0 if table.padding_idx is None else table.padding_idx + 1
