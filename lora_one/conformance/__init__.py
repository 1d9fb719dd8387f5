"""Do all backends produce the same numbers? The suite that says so, for anybody to run on their own machine.

    lora-one conformance                       # every framework that is installed, in every dtype

or from Python, also for a backend of your own:

    print(conformance.check_backend(MyOps(), like=my_array))

Each primitive of `lora_one.core.ops.Ops`, each step of the spec, and each backend's own optimizer runs on committed
inputs, eagerly and compiled, and is compared with committed float64 answers. The answers were checked against an
independent oracle when they were made (`generate`, `oracle`); how far a result may be off is derived from how much the
computation magnifies rounding (`noise`).
"""

from .check import check_backend, check_installed
from .report import Conformance
from .suite import Check, Result, applies, checks, run
from .target import Target

__all__ = ["Check", "Conformance", "Result", "Target", "applies", "check_backend", "check_installed", "checks", "run"]
