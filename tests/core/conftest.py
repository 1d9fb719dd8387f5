"""The fixture that runs a test of `core` on every array backend."""

import pytest

from tests.arrays import ARRAYS, Arrays


@pytest.fixture(params=ARRAYS)
def arrays(request):
    return Arrays(*request.param)
