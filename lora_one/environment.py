"""What this process runs in: the versions of installed packages, and the memory that the process has used."""

import importlib.metadata
import sys
from collections.abc import Iterable


def installed_version(package: str) -> str | None:
    """Return the version of a package, by its name in the package index; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def installed_versions(packages: Iterable[str]) -> dict[str, str]:
    """Return package -> version for the packages that are installed."""
    versions = {package: installed_version(package) for package in packages}
    return {package: version for package, version in versions.items() if version is not None}


def process_peak() -> int | None:
    """Return the most resident memory of this process so far, in bytes; None where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, KiB on Linux
