"""A warning names the user's line, however deep in the library it arises."""

import contextlib
import sys
import types
import warnings

from lora_one.errors import AdapterWarning, warn_user


def test_a_warning_names_the_line_that_called_into_the_library():
    """Through generators, context managers and callbacks of the user's own."""
    module = types.ModuleType("lora_one.made_for_a_test")
    module.warn_user, module.contextmanager, module.AdapterWarning = (
        warn_user,
        contextlib.contextmanager,
        AdapterWarning,
    )
    source = """
@contextmanager
def opened(message):
    warn_user(message, AdapterWarning)
    yield

def enter(callback):
    with opened("deep"):
        callback(lambda: warn_user("below a callback", AdapterWarning))
"""
    exec(compile(source, "library", "exec"), vars(module))
    with warnings.catch_warnings(record=True) as records:
        warnings.simplefilter("always")
        line = sys._getframe().f_lineno + 1
        module.enter(lambda inner: inner())
    assert [(str(r.message), r.filename, r.lineno) for r in records] == [
        ("deep", __file__, line),
        ("below a callback", __file__, line),
    ]
