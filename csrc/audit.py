"""Audits of the compiled code, run by every build (CMakeLists.txt, setup.py) and again by the tests.

* `weak_symbols`: a tier's object must define no weak symbol. The linker keeps one copy of a weak symbol; were it the copy
  compiled for AVX-512, the generic path would crash on an older processor.
* `requirements`: which versions of glibc and libstdc++ a library needs, and the manylinux tag that follows.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from pathlib import Path

# Newest symbol versions that a distribution of each manylinux policy is sure to have (PEP 600; the same tables that
# auditwheel uses), oldest policy first. Torch's own wheels are manylinux_2_28, so nothing older is worth stating.
MANYLINUX = (
    ("2_28", {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}),
    ("2_31", {"GLIBC": (2, 31), "GLIBCXX": (3, 4, 28), "CXXABI": (1, 3, 12), "GCC": (10, 0, 0)}),
    ("2_34", {"GLIBC": (2, 34), "GLIBCXX": (3, 4, 29), "CXXABI": (1, 3, 13), "GCC": (11, 0, 0)}),
    ("2_35", {"GLIBC": (2, 35), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}),
    ("2_36", {"GLIBC": (2, 36), "GLIBCXX": (3, 4, 30), "CXXABI": (1, 3, 13), "GCC": (12, 0, 0)}),
    ("2_39", {"GLIBC": (2, 39), "GLIBCXX": (3, 4, 33), "CXXABI": (1, 3, 15), "GCC": (14, 0, 0)}),
)

Version = tuple[int, ...]


def weak_symbols(objects: list[Path], nm: str = "nm") -> list[str]:
    """`object: symbol` for every weak or unique definition in the object files."""
    found = []
    for path in objects:
        listing = subprocess.run([nm, "--defined-only", "-C", str(path)], check=True, capture_output=True, text=True)
        for line in listing.stdout.splitlines():
            match = re.match(r"[0-9a-f]+ ([A-Za-z]) (.+)$", line)
            if match and match[1] in "wWvVu":
                found.append(f"{path}: {match[2]}")
    return found


def undefined_symbols(library: Path, nm: str = "nm") -> list[str]:
    """The dynamic symbols that `library` takes from others, with their versions (`memcpy@GLIBC_2.14`)."""
    listing = subprocess.run([nm, "-D", "--undefined-only", str(library)], check=True, capture_output=True, text=True)
    return [line.split()[-1] for line in listing.stdout.splitlines()]


def requirements(libraries: list[Path], nm: str = "nm") -> dict[str, Version]:
    """The newest GLIBC, GLIBCXX, CXXABI and GCC symbol versions that the libraries need."""
    newest: dict[str, Version] = {}
    for library in libraries:
        for symbol in undefined_symbols(library, nm):
            match = re.search(r"@@?([A-Z]+)_([0-9.]+)$", symbol)
            if match:
                version = tuple(int(part) for part in match[2].split("."))
                newest[match[1]] = max(newest.get(match[1], (0,)), version)
    return newest


def manylinux_policy(needed: dict[str, Version]) -> str | None:
    """The oldest manylinux policy (`2_28`) that satisfies `needed`, or None where none listed does."""
    for policy, offered in MANYLINUX:
        if all(version <= offered.get(name, (0,)) for name, version in needed.items()):
            return policy
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description="fails where a tier's object defines a weak symbol")
    parser.add_argument("objects", nargs="+", type=Path)
    parser.add_argument("--nm", default="nm")
    arguments = parser.parse_args()
    found = weak_symbols(arguments.objects, arguments.nm)
    for line in found:
        print(f"weak symbol in a tier: {line}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
