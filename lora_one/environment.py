"""What this process runs in: versions of installed packages, and the memory that it has taken."""

import importlib.metadata
import sys
from collections.abc import Iterable


def installed_version(package: str) -> str | None:
    """The installed version of a package, by the name it is installed by; None if it is not."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Of those of the packages that are installed."""
    found = {package: installed_version(package) for package in packages}
    return {package: version for package, version in found.items() if version is not None}


def process_peak() -> int | None:
    """The most memory this process has had resident so far, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
