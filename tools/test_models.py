"""Runs tests/models: converted models of Hugging Face transformers and of timm. Arguments are passed on to pytest.

Where a library is not installed it gets an environment of its own, build/models-NAME, that sees the packages of the running
interpreter. Of its own, because timm brings torchvision, whose wheels are built for CUDA, and transformers does not import beside
such a torchvision where torch is built for the CPU.
"""

import importlib.util
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
# torchvision's minor version is torch's and 15; its own idea of torch must not replace the one that is here
TORCHVISION = f"torchvision==0.{int(torch.__version__.split('.')[1]) + 15}.*"
PACKAGES = {
    "transformers": [["transformers"]],
    "timm": [["--no-deps", TORCHVISION, "timm"], ["huggingface_hub", "safetensors", "pyyaml", "pillow"]],
}


def interpreter(name: str) -> str:
    """The Python that has the library; made where there is none."""
    if importlib.util.find_spec(name) is not None:
        return sys.executable
    place = ROOT / "build" / f"models-{name}"
    python, ready = place / "bin" / "python", place / ".ready"
    if not ready.exists():
        print(f"test-models: fetching {name} into {place.relative_to(ROOT)}", flush=True)
        venv.create(place, with_pip=True, clear=True)
        ask = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        packages = subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip()
        # last on the path: what the environment fetches comes first
        Path(packages, "host.pth").write_text(f"import sys; sys.path.append({sysconfig.get_path('purelib')!r})\n")
        for arguments in PACKAGES[name]:
            subprocess.run([python, "-m", "pip", "install", "--quiet", *arguments], check=True)
        ready.touch()
    return str(python)


def main() -> int:
    failed = 0
    for name in PACKAGES:
        command = [interpreter(name), "-m", "pytest", f"tests/models/test_{name}.py", *sys.argv[1:]]
        failed |= subprocess.run(command, cwd=ROOT).returncode
    return failed


if __name__ == "__main__":
    sys.exit(main())
