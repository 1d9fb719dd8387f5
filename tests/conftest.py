"""Fixtures that many tests share."""

import os
import shutil
import sys
import tempfile

import pytest

from tests import features

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed prints what it has found, when a Trainer imports it
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # matrices of tests are small: threads only wait for each other
# On JAX tests compile hundreds of small programs and run each of them once: optimising them takes longer than they run.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")


def pytest_addoption(parser):
    parser.addoption("--write-features", action="store_true", help="write docs/features.md from the tests that passed")


def pytest_configure(config):
    """What the process that sees all reports has to do, and no worker of xdist: the table of features, JAX's cache."""
    if not hasattr(config, "workerinput"):
        _share_compiled_programs(config)
        selected = config.option.keyword or config.option.markexpr or config.option.deselect
        whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not selected
        everywhere = len(os.environ.get("LORA_ONE_BACKENDS", "").split(",")) == 4
        config.pluginmanager.register(features.FeaturePage(config.option.write_features, whole and everywhere))


def _share_compiled_programs(config):
    """Let JAX keep what it compiles for all processes of this run, those that tests start included."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="lora-one-jax-")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


def pytest_collection_modifyitems(items):
    features.name_features(items)


@pytest.fixture(autouse=True)
def _seeded():
    """The same random tensors in each run, whichever tests ran before in the process."""
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _x64(request):
    """x64 for the tests that run on JAX in float64, and only while they run.

    JAX has one switch for a process, off by default. Left on, it would hide what users without it get: silent float32.
    """
    callspec = getattr(request.node, "callspec", None)
    if callspec is None or ("jax", "float64") not in callspec.params.values():
        yield
        return
    import jax

    with jax.enable_x64(True):
        yield
