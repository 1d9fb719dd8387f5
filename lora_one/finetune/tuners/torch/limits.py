"""What a transformers model can be given: tokens, and how many of them."""

import re
from typing import Any

from torch import nn

from lora_one.finetune.fit import Limits

# A table with a row for each position, learned or not.
_POSITIONS = re.compile(r"wpe|embed_pos.*|pos_emb.*|positions?_emb.*")
_OTHER_TOWERS = re.compile(r"vision|visual|image|audio|video")


def limits_of(model: Any) -> Limits:
    """Read off the tables that the model looks positions and tokens up in, since what its configuration calls
    positions is for some models the size of such a table, for others only what they were trained on.
    """
    config = model.config.get_text_config()
    trained = getattr(config, "max_position_embeddings", None)
    if model.config.is_encoder_decoder:
        tables = [_positions(part) for part in (model.get_encoder(), model.get_decoder())]
        return Limits(_rows(model), *tables)
    return Limits(_rows(model), _positions(model), trained=trained)


def _rows(model: Any) -> int | None:
    tables = (model.get_input_embeddings(), model.get_output_embeddings())
    sizes = (getattr(table, name, None) for table, name in zip(tables, ("num_embeddings", "out_features"), strict=True))
    return min((size for size in sizes if size is not None), default=None)


def _positions(model: nn.Module) -> int | None:
    found = []
    for path, module in model.named_modules():
        name = path.split(".")[-1]
        if isinstance(module, nn.Embedding) and _POSITIONS.fullmatch(name) and not _OTHER_TOWERS.search(path):
            found.append(module.num_embeddings - _first(module))
    for path, table in model.named_buffers():
        # GPT-J and CodeGen, CTRL: sines and cosines of each position. M2M100 and XGLM make theirs longer when needed.
        if path.split(".")[-1] in ("embed_positions", "pos_encoding") and not _OTHER_TOWERS.search(path):
            found.append(table.shape[0])
    config: Any = getattr(model, "config", None)
    if getattr(config, "model_type", None) == "mpt":  # its bias by distance is a table, too
        found.append(config.max_seq_len)
    return min(found, default=None)


def _first(table: nn.Embedding) -> int:
    """The row of the first position: OPT and BART leave two out, RoBERTa and its kin those up to the padding's."""
    offset = getattr(table, "offset", None)
    if offset is not None:
        return int(offset)
    return 0 if table.padding_idx is None else table.padding_idx + 1
