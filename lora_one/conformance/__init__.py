"""Do all backends produce the same numbers? A suite that answers this on your own machine.

    lora-one conformance                       # every framework that is installed, in every dtype

or from Python, also for a backend of your own:

    print(conformance.check_backend(MyOps(), like=my_array))

Each primitive of `lora_one.core.ops.Ops`, each step of the spec, and each backend's own optimizer runs on committed
inputs, eagerly and compiled. The results are compared with committed float64 answers, which were checked against an
independent oracle when they were made (`making.generate`, `making.oracle`). The tolerance of each answer is derived
from how much its computation magnifies rounding (`making.noise`).
"""

from .check import check_backend, check_installed
from .report import Conformance
from .suite import Check, Result, applies, checks, run
from .target import Target

__all__ = ["Check", "Conformance", "Result", "Target", "applies", "check_backend", "check_installed", "checks", "run"]
