"""The inputs of the fuzz tests: unexpected values, damaged text and bytes, and headers that lie."""

import json
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st


def examples(count: int) -> settings:
    """Return settings for the given number of examples, the same in every run, without a limit on time."""
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


PATHS = ["../x", "/x", "..", "a/../../x", "~/x", "\\\\x", "x\0y", "n" * 300, "layer\n", "\u2028", "\ud800", ""]
WORDS = ["layer", ".*", "[", "*", "^layer", "all", "none", "LORA", "true", "1e5", "yes"]
TEXTS = st.sampled_from([*PATHS, *WORDS]) | st.text(max_size=6)
NUMBERS = st.sampled_from(
    [0, 1, -1, 2, 3, 2**31, 2**64, 10**400, 0.0, 0.5, -0.5, 1e308, 5e-324, float("nan"), float("inf"), -float("inf")]
)
LEAVES = st.none() | st.booleans() | NUMBERS | TEXTS
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3), max_leaves=5
)
DEEP = "[" * 100_000 + "]" * 100_000  # brackets nested too deeply
LONG = "1" * 10_000  # more digits than Python reads

_EDITS = st.lists(
    st.tuples(st.sampled_from(["cut", "flip", "put", "drop", "twice"]), st.integers(0, 2**20), st.binary(max_size=6)),
    max_size=3,
)
_SPLICES = [*[b""] * 8, b"\xff\xfe", b"\xef\xbb\xbf", b"\0", DEEP[:2000].encode(), LONG.encode(), b"NaN", b"{}"]
DAMAGE = st.tuples(_EDITS, st.sampled_from(_SPLICES))


def damaged(data: bytes, damage: Any) -> bytes:
    """Return the bytes cut off, with bits flipped, or with other bytes inserted."""
    edits, splice = damage
    for kind, where, other in edits:
        at = where % (len(data) + 1)
        if kind == "cut":
            data = data[:at]
        elif kind == "flip" and at < len(data):
            data = data[:at] + bytes([data[at] ^ (1 << where % 8)]) + data[at + 1 :]
        elif kind == "put":
            data = data[:at] + other + data[at:]
        elif kind == "drop":
            data = data[:at] + data[at + len(other) :]
        elif kind == "twice":
            data = data[:at] + data
    at = len(data) // 2
    return data[:at] + splice + data[at:]


_LAYERS = ("layer", "../x", "x\0", "²", "n" * 300)
_PEFT_NAMES = [f"base_model.model.{layer}.lora_{side}.weight" for layer in _LAYERS for side in "AB"]
_MLX_NAMES = ["layer.lora_a", "layer.lora_b", "../x.lora_a", "../x.lora_b", "1.lora_a", "1.lora_b", "lora_a", "", "/x"]
_NAMES = st.sampled_from([*_PEFT_NAMES, *_MLX_NAMES])
_SIZES = st.sampled_from([0, 1, 2, 3, 5, -1, 2**32, 2**62, 2**64, 1.5, "2", None])
_ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "BOOL", "F8_E4M3", "F4", "X", 1, None]),
        "shape": st.lists(_SIZES, max_size=4) | LEAVES,
        "data_offsets": st.lists(_SIZES | st.integers(0, 64), min_size=2, max_size=2) | LEAVES,
    }
)
HEADERS = st.tuples(
    st.dictionaries(_NAMES, _ENTRIES | VALUES, max_size=4),
    st.sampled_from([None, None, None, 0, 7, 2**31, 2**63 - 1, 2**64 - 1]),  # the length that it says
    st.integers(0, 80),  # bytes of data
)
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 5]), min_size=1, max_size=3)
TENSORS = st.dictionaries(
    _NAMES, st.tuples(st.sampled_from(["F32", "F16", "BF16", "F64", "I64", "F8_E4M3"]), SHAPES), min_size=1, max_size=4
)
_BYTES = {"F64": 8, "I64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1}


def lying(drawn: Any) -> bytes:
    """Return a safetensors file whose header is anything at all."""
    header, length, size = drawn
    text = json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + bytes(size)


def honest(drawn: Any) -> bytes:
    """Return a valid safetensors file with unexpected tensors."""
    header, end = {}, 0
    for name, (dtype, shape) in drawn.items():
        size = _BYTES[dtype]
        for side in shape:
            size *= side
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + bytes(end)
