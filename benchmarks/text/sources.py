"""What text is installed here that may be used: sources and documentation of the packages with permissive licences."""

import importlib.metadata
import platform
import re
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

# Licences under which anybody may train on the text and pass it on. By SPDX, and as older metadata spell them.
PERMISSIVE = {
    *("0BSD", "APACHE-2.0", "APACHE-2.0 WITH LLVM-EXCEPTION", "BSD-2-CLAUSE", "BSD-3-CLAUSE", "BSL-1.0", "CC0-1.0"),
    *("CNRI-PYTHON", "ISC", "MIT", "MIT-CMU", "PSF-2.0", "ZLIB"),
    *("APACHE", "APACHE 2.0", "APACHE LICENSE 2.0", "APACHE 2.0 LICENSE", "APACHE SOFTWARE LICENSE", "BSD"),
    *("APACHE LICENSE, VERSION 2.0", "APACHE SOFTWARE LICENSE 2.0", "BSD LICENSE", "MIT LICENSE", "ISC LICENSE"),
    *("ISC LICENSE (ISCL)", "PYTHON SOFTWARE FOUNDATION LICENSE", "3-CLAUSE BSD LICENSE", "PSFL"),
}
LEFT_OUT = re.compile(
    r"(^|/)(_?tests?|testing|test_[^/]*\.py|[^/]*_test\.py|conftest\.py|_?vendor(ed)?|_vendored|third_party|thirdparty|"
    r"externals?|extern|site-packages|dist-packages|idlelib|lib2to3|__pycache__|[^/]*\.dist-info)(/|$)"
)
LARGEST = 200_000  # bytes of a file: what is longer are tables


@dataclass(frozen=True)
class Source:
    """A package and its files."""

    package: str
    version: str
    licence: str
    files: dict[str, Path] = field(repr=False)  # by path in the package

    def texts(self, suffixes: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        """(path, text) of the files with these suffixes, in an order that scatters what lies together."""
        names = [name for name in self.files if name.endswith(suffixes) and not LEFT_OUT.search(name)]
        for name in sorted(names, key=lambda name: (scattered(f"{self.package}/{name}"), name)):
            try:
                if self.files[name].stat().st_size <= LARGEST:
                    yield name, self.files[name].read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue


def scattered(text: str) -> int:
    """A number that looks random and is the same everywhere."""
    return zlib.crc32(text.encode())


def sources() -> list[Source]:
    """The standard library, then the packages by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
    found = [Source("python", platform.python_version(), "PSF-2.0", files)]
    distributions = {_name(d): d for d in importlib.metadata.distributions()}
    for name, distribution in sorted(distributions.items()):
        licence = permissive_licence(distribution)
        if licence is not None:
            paths = {str(file): Path(str(file.locate())) for file in distribution.files or ()}
            found.append(Source(name, distribution.version, licence, paths))
    return found


def permissive_licence(distribution: importlib.metadata.Distribution) -> str | None:
    """The licence that a package's metadata name; None if they name none, or one that is not permissive."""
    expression, classifiers, free = (
        distribution.metadata.get_all(name) or [] for name in ("License-Expression", "Classifier", "License")
    )
    classified = [line.rsplit("::", 1)[1] for line in classifiers if line.startswith("License ::")]
    named = [" ".join(name.split()) for name in (*expression, *classified, *free)]
    # The first statement that there is; a whole licence in the last field is no name of it.
    licence = next((name for name in named if name and name != "OSI Approved" and len(name) <= 200), "")
    parts = re.split(r"\s+AND\s+|\s+OR\s+", licence.upper().replace("(", "").replace(")", ""))
    names = {part.strip() for part in ([licence.upper()] if licence.upper() in PERMISSIVE else parts)}
    return licence if names <= PERMISSIVE else None


def _name(distribution: importlib.metadata.Distribution) -> str:
    return re.sub(r"[-_.]+", "-", distribution.metadata["Name"]).lower()
