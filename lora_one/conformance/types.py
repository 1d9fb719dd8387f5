"""What a computation of the suite is given and what it gives."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Params = Mapping[str, Any]
Host = Sequence[np.ndarray]  # float64
View = dict[str, np.ndarray]
