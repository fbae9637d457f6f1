"""Builds the compiled kernels with CMake and ninja, and one wheel for every Python and every torch from 2.10 on.

Environment: MMKERNELS_TORCH_DIR (folder of the torch package to build against, where it is not found by itself),
MMKERNELS_CUDA=0|1 (never / always build the CUDA library; default: where nvcc is found), MMKERNELS_CUDA_ARCHS
("80;90a;100a").
"""

from __future__ import annotations

import json
import os
import re
import shutil
import site
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py
from setuptools.extension import Extension

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)
NO_TORCH = (
    "mmkernels is built against the torch that it will run with, and this environment has none: type "
    "`pip install torch==2.13.0`, then this command again (with uv add --no-build-isolation, or set MMKERNELS_TORCH_DIR to "
    "the folder of an installed torch)."
)

sys.path.insert(0, str(ROOT / "csrc"))
import audit  # noqa: E402  (csrc/audit.py)


def find_torch() -> Path:
    """The torch package of the environment that is being installed into, without importing it.

    Pip's build isolation hides that environment's packages from sys.path, but it runs that environment's own Python, so
    sysconfig still knows where they lie.
    """
    if "MMKERNELS_TORCH_DIR" in os.environ:
        candidates = [Path(os.environ["MMKERNELS_TORCH_DIR"])]
    else:
        folders = [sysconfig.get_path("platlib"), sysconfig.get_path("purelib"), *sys.path]
        if "VIRTUAL_ENV" in os.environ:  # tools that isolate with an environment of their own
            folders += map(str, Path(os.environ["VIRTUAL_ENV"]).glob("lib/python*/site-packages"))
        if _sees_system_packages():
            base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
            folders += [sysconfig.get_path("platlib", vars=base), *site.getsitepackages([sys.base_prefix])]
            folders.append(site.getusersitepackages())
        candidates = [Path(folder) / "torch" for folder in folders if folder]
    for candidate in candidates:
        if (candidate / "version.py").is_file():
            check_torch(candidate)
            return candidate
    raise SystemExit(NO_TORCH)


def _sees_system_packages() -> bool:
    """Whether this is no virtual environment, or one that was made with --system-site-packages."""
    config = Path(sys.prefix) / "pyvenv.cfg"
    return not config.is_file() or "include-system-site-packages = true" in config.read_text()


def torch_version(folder: Path) -> str:
    match = re.search(r"__version__ = '([^']+)'", (folder / "version.py").read_text())
    return match[1] if match else "0"


def check_torch(folder: Path) -> None:
    version = torch_version(folder)
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers < MINIMUM_TORCH:
        raise SystemExit(
            f"mmkernels needs torch 2.10 or newer, and {folder} is {version}: type `pip install torch==2.13.0`."
        )


def find_nvcc() -> str | None:
    """The CUDA compiler, or None for a CPU-only build: MMKERNELS_CUDA=0, or no nvcc to be found."""
    wish = os.environ.get("MMKERNELS_CUDA", "")
    if wish == "0":
        return None
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    places = [os.environ.get("CUDACXX"), shutil.which("nvcc"), *(f"{home}/bin/nvcc" for home in (*homes, "/usr/local/cuda"))]
    nvcc = next((place for place in places if place and Path(place).is_file()), None)
    if nvcc is None:
        if wish == "1":
            raise SystemExit(
                "mmkernels: MMKERNELS_CUDA=1 asks for the CUDA library, and no nvcc is on PATH, CUDACXX or CUDA_HOME"
            )
        print("mmkernels: no nvcc found, so this build is CPU-only")
    return nvcc


def nvcc_version(nvcc: str) -> str:
    said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release (\d+\.\d+)", said)
    if match is None:
        raise SystemExit(f"mmkernels: {nvcc} --version names no release")
    return match[1]


class FreshModules(build_py):
    """Starts from nothing: a module that was deleted must not come back from an earlier build."""

    def run(self) -> None:
        if not self.editable_mode:
            shutil.rmtree(Path(self.build_lib) / "mmkernels", ignore_errors=True)
        super().run()


class CMakeBuild(build_ext):
    """Runs CMake and ninja, audits what they made, and leaves the libraries in mmkernels/lib."""

    def run(self) -> None:
        torch_folder = find_torch()
        build = Path(self.build_temp).resolve() / "cmake"
        build.mkdir(parents=True, exist_ok=True)
        # Configure anew: an earlier build may have had another compiler, torch or environment. Objects stay.
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        for tool in ("cmake", "ninja"):
            if shutil.which(tool) is None:
                raise SystemExit(f"mmkernels is built with {tool}, which is not on PATH: type `pip install {tool}`.")
        package = ROOT if self.inplace else Path(self.build_lib).resolve()
        target = package / "mmkernels" / "lib"
        nvcc = find_nvcc()
        options = [
            f"-DTORCH_DIR={torch_folder}",
            f"-DMMK_CUDA={'OFF' if nvcc is None else 'ON'}",
            f"-DMMK_CUDA_ARCHS={os.environ.get('MMKERNELS_CUDA_ARCHS', '80;90a;100a')}",
            "-DMMK_TEST_EXTENSION=OFF",
            f"-DPython3_EXECUTABLE={sys.executable}",
            "-DPython3_FIND_VIRTUALENV=ONLY",
            f"-DCMAKE_INSTALL_PREFIX={target}",
        ]
        if nvcc is not None:
            options.append(f"-DCMAKE_CUDA_COMPILER={nvcc}")
        self._step(["cmake", "-G", "Ninja", *options, str(ROOT)], build)
        self._step(["ninja"], build)
        if target.exists():
            shutil.rmtree(target)
        self._step(["cmake", "--install", ".", "--strip"], build)
        self._write_record(target, torch_folder, nvcc)

    @staticmethod
    def _step(command: list[str], build: Path) -> None:
        done = subprocess.run(command, cwd=build, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        if done.returncode != 0:
            raise SystemExit(f"mmkernels: the compiled kernels did not build; {command[0]} said:\n{done.stdout[-8000:]}")

    def _write_record(self, target: Path, torch_folder: Path, nvcc: str | None) -> None:
        libraries = sorted(target.glob("libmmkernels_*.so"))
        needs = audit.requirements(libraries)
        compiler = subprocess.run(["c++", "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
        record = {
            "compiler": compiler[0] if compiler else "unknown",
            "torch_headers": torch_version(torch_folder),
            "torch_target": "2.10",
            "libraries": [library.name for library in libraries],
            "cuda": nvcc is not None,
            "cuda_version": None if nvcc is None else nvcc_version(nvcc),
            "needs": ", ".join(f"{name} {'.'.join(map(str, v))}" for name, v in sorted(needs.items())),
            "platform_tag": platform_tag(libraries),
        }
        (target / "build.json").write_text(json.dumps(record, indent=2) + "\n")

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path("mmkernels") / "lib" / "libmmkernels_cpu.so")

    def get_outputs(self) -> list[str]:
        return [str(path) for path in (Path(self.build_lib) / "mmkernels" / "lib").glob("*")]

    def get_source_files(self) -> list[str]:
        return [str(path.relative_to(ROOT)) for path in (ROOT / "csrc").rglob("*") if path.is_file()]

    def copy_extensions_to_source(self) -> None:
        """Nothing to copy: an editable build is made in place."""


def platform_tag(libraries: list[Path]) -> str:
    """manylinux_X_Y_<machine> where the libraries' symbol versions fit a policy, else what Python says of the platform."""
    own = sysconfig.get_platform().replace("-", "_").replace(".", "_")
    kind, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ") if own.startswith("linux_") else ("", "", "")
    policy = audit.manylinux_policy(audit.requirements(libraries)) if kind == "glibc" else None
    # A policy stands for a glibc, and pip takes none that is newer than its own: not even for what was built right here.
    if policy is None or tuple(map(int, policy.split("_"))) > tuple(map(int, version.split(".")[:2])):
        return own
    return own.replace("linux_", f"manylinux_{policy}_", 1)


class StableWheel(bdist_wheel):
    """py3-none-<platform>: no Python C API and only torch's stable ABI inside, so one wheel serves all of them."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = False

    def get_tag(self) -> tuple[str, str, str]:
        libraries = sorted((Path(self.bdist_dir or "") / "mmkernels" / "lib").glob("libmmkernels_*.so"))
        if not libraries:  # asked before the build, for the wheel's name alone
            libraries = sorted((ROOT / "mmkernels" / "lib").glob("libmmkernels_*.so"))
        return "py3", "none", platform_tag(libraries)


class StableDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


setup(
    distclass=StableDistribution,
    ext_modules=[Extension("mmkernels.lib.libmmkernels_cpu", sources=[])],
    cmdclass={"build_py": FreshModules, "build_ext": CMakeBuild, "bdist_wheel": StableWheel},
)
