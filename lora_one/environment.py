"""Which versions of which packages are installed."""

import importlib.metadata
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
