"""Makes .venv with what iwsgd_ext is built, tested and shown with; fetches only what is not on the machine already.

    python3 tools/setup_env.py [--torch REQUIREMENT] [EXTRA ...]

Standard library only. A .venv that is there already is completed, not made anew. torch is looked for in .venv, then in the
Python that runs this script, and only then fetched. The packages are those that pyproject.toml lists: what the build requires and the
extra "test". Of these setuptools, numpy and pytest must be had; without the others there is less to run. A further EXTRA (such as lint)
must be had whole.
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 (this file runs before anything has checked)
    sys.exit(
        "iwsgd_ext needs Python 3.10 or later, and {} is {}.{}; name another one: make PYTHON=python3.12".format(
            sys.executable, *sys.version_info[:2]
        )
    )

import argparse
import json
import re
import shutil
import subprocess
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
TORCH, OLDEST_TORCH = "torch==2.13.0", (2, 11)
NEEDED = ("numpy", "setuptools", "pytest")
VERSIONS = """
import importlib.metadata, json, sys
versions = {}
for name in sys.argv[1:]:
    try:
        versions[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(versions))
"""


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def run(*command: object) -> subprocess.CompletedProcess:
    words = [str(part) for part in command]
    return subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def name_of(requirement: str) -> str:
    return re.match(r"[A-Za-z0-9._-]+", requirement)[0]


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.match(r"\d+(\.\d+)*", version)[0].split("."))


def listed(key: str) -> list[str]:
    """The requirements of a list in pyproject.toml. (Python 3.10 has no tomllib.)"""
    found = re.search(rf"^{key} = \[(.*?)\]$", (ROOT / "pyproject.toml").read_text().split("[tool.", 1)[0], re.MULTILINE | re.DOTALL)
    return re.findall(r'"([^"]+)"', found[1])


def versions(python: Path | str, names: list[str]) -> dict[str, str]:
    found = run(python, "-c", VERSIONS, *names)
    return json.loads(found.stdout.splitlines()[-1]) if found.returncode == 0 else {}


def missing(requirements: list[str]) -> list[str]:
    have = versions(PYTHON, [name_of(r) for r in requirements])

    def found(requirement: str) -> bool:
        name = name_of(requirement)
        if name == "ninja" and shutil.which("ninja"):
            return True
        bound = re.match(r"[A-Za-z0-9._-]+(>=|==)([\d.]+)", requirement)
        if name not in have or bound is None:
            return name in have
        has, wanted = numbers(have[name]), numbers(bound[2])
        return has == wanted if bound[1] == "==" else has >= wanted

    return [r for r in requirements if not found(r)]


def make_venv() -> None:
    if PYTHON.exists() and run(PYTHON, "-c", "").returncode == 0:
        return
    say(f"making .venv with {sys.executable} (Python {sys.version.split()[0]})")
    venv.EnvBuilder(symlinks=True, with_pip=False, clear=VENV.exists()).create(VENV)


def check_torch(version: str, where: object, remedy: str) -> None:
    if numbers(version)[:2] < OLDEST_TORCH:
        sys.exit(f"iwsgd_ext needs torch {'.'.join(map(str, OLDEST_TORCH))} or later, and {where} has {version}: {remedy}")


def find_torch() -> str | None:
    """The torch that .venv sees, or the one of the Python that runs this script, made visible in .venv."""
    have = versions(PYTHON, ["torch"]).get("torch")
    if have:
        check_torch(have, PYTHON, "upgrade it, or remove .venv (make distclean) and start again with another PYTHON=")
        return have
    have = versions(sys.executable, ["torch"]).get("torch")
    if not have or run(PYTHON, "-c", "import sys; print(sys.version_info[:2])").stdout.strip() != str(sys.version_info[:2]):
        return None
    check_torch(have, sys.executable, "upgrade it there, or choose another interpreter (make PYTHON=...)")
    # --system-site-packages would show the packages of the base Python, not those of a virtual environment that this one may be.
    standard = {sysconfig.get_path("stdlib"), sysconfig.get_path("platstdlib"), str(Path(__file__).parent), str(ROOT)}
    folders = [p for p in sys.path if Path(p).is_absolute() and Path(p).is_dir() and p not in standard and not p.endswith("lib-dynload")]
    site_packages = run(PYTHON, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").stdout.strip()
    Path(site_packages, "packages_of_outer_python.pth").write_text("\n".join(folders) + "\n")
    programs = Path(sysconfig.get_path("scripts"))
    if (programs / "ninja").exists() and not (PYTHON.parent / "ninja").exists():
        (PYTHON.parent / "ninja").symlink_to(programs / "ninja")  # torch's build looks for the program, not the package
    return have


def ensure_pip() -> None:
    if run(PYTHON, "-m", "pip", "--version").returncode == 0:
        return
    made = run(PYTHON, "-m", "ensurepip")
    if made.returncode != 0:
        print(made.stdout)
        sys.exit(f"setup: {sys.executable} cannot put pip into .venv; install its venv package (python3-venv), or choose another PYTHON=")
    # Before Python 3.12 ensurepip brings a setuptools too, which is too old here and would hide a newer one of the outer Python.
    run(PYTHON, "-m", "pip", "uninstall", "-y", "setuptools")


def install(requirements: list[str]) -> bool:
    ensure_pip()
    done = run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input", "--retries", 2, *requirements)
    if done.returncode != 0:
        print("\n".join(done.stdout.strip().splitlines()[-6:]), flush=True)
    return done.returncode == 0


def install_missing(requirements: list[str], needed: bool) -> None:
    wanted = missing(requirements)
    if not wanted:
        return
    say(f"fetching {', '.join(wanted)}")
    if install(wanted):
        return
    if needed:
        sys.exit(f"setup: could not be fetched, and must be had: {', '.join(wanted)}")
    for requirement in wanted:
        if len(wanted) == 1 or not install([requirement]):
            say(f"going on without {requirement}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch", default=TORCH, metavar="REQUIREMENT", help=f"what pip fetches where no torch is found (default {TORCH})")
    parser.add_argument("extras", nargs="*", metavar="EXTRA", help="further extras of pyproject.toml to have")
    args = parser.parse_args()

    make_venv()
    if find_torch() is None:
        say(f"no torch on this Python: fetching {args.torch} (some minutes)")
        if not install([args.torch]):
            sys.exit(f"setup: {args.torch} could not be fetched; choose a Python that has torch (make PYTHON=...)")
    packages = ["numpy", *listed("requires"), *listed("test")]
    install_missing([p for p in packages if name_of(p) in NEEDED] + [p for extra in args.extras for p in listed(extra)], needed=True)
    install_missing([p for p in packages if name_of(p) not in NEEDED], needed=False)

    check = run(PYTHON, "-c", "import numpy, torch; print('torch', torch.__version__, 'in', torch.__path__[0])")
    if check.returncode != 0:
        sys.exit(f"{check.stdout}setup: torch is installed but cannot be imported in .venv; the lines above say why")
    say(f"ready: {check.stdout.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
