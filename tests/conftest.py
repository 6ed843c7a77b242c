"""Fixtures that every test shares: where it runs, on which backend, and memory that is never zero by chance."""

import os

import hypothesis
import pytest
import torch

import iwsgd_ext as iw
from iwsgd_ext.layers.context import current

ONLY = os.environ.get("IWSGD_TEST_DEVICE")  # tools/gpu.py asks for the cases of one device
DEVICES = [d for d in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])) if ONLY in (None, d)]
BUILT = iw.backend_info()["built"]
# Triton's kernels run on GPUs, or, in a process that was started with TRITON_INTERPRET=1, on the CPU.
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = {"cpu": ("reference", "cpu", *(["triton"] if INTERPRETING else [])), "cuda": ("reference", "cuda", "triton")}

# A function-scoped fixture (device, backend, the seed below) holds for all examples of a fuzz test: that is what is wanted here.
hypothesis.settings.register_profile(
    "iwsgd", deadline=None, derandomize=True, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "iwsgd"))


def pytest_generate_tests(metafunc):
    """Every test that asks for ``device`` runs on each; one that asks for ``backend`` runs on each backend of each device."""
    if "backend" in metafunc.fixturenames:
        pairs = [(device, backend) for device in DEVICES for backend in BACKENDS[device] if BUILT[backend]]
        metafunc.parametrize(("device", "backend"), pairs, indirect=True, ids=[f"{d}-{b}" if d != b else f"{d}-native" for d, b in pairs])
    elif "device" in metafunc.fixturenames:
        metafunc.parametrize("device", DEVICES, indirect=True)


def pytest_collection_modifyitems(items):
    """Cases that share what is slow to make stay in one process of pytest-xdist."""
    for item in items:
        if together(item):
            item.add_marker(pytest.mark.xdist_group(together(item)))


_context_is_lost = False


@pytest.fixture(autouse=True)
def _errors_of_the_device():
    """An error of a kernel is its own case's, and not that of the next one that waits for the device."""
    global _context_is_lost
    yield
    if torch.cuda.is_initialized():
        try:
            torch.cuda.synchronize()
        except RuntimeError:
            _context_is_lost = True
            raise


def pytest_runtest_logfinish():
    """No case can pass in a process whose CUDA context is lost: it ends, and pytest-xdist starts another one."""
    if _context_is_lost:
        if "PYTEST_XDIST_WORKER" in os.environ:
            os._exit(1)
        pytest.exit("the CUDA context is lost", returncode=3)


def together(item) -> str | None:
    """What the case shares with others, which run in its process: the name in its mark one_process, or its file."""
    mark = item.get_closest_marker("one_process")
    return mark and (mark.args[0] if mark.args else item.path.name)


@pytest.fixture
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def backend(device, request) -> str:
    """The name of the backend that every op of the test runs on."""
    before = iw.backend_info()["forced"]
    iw.set_backend(request.param)
    yield request.param
    iw.set_backend(before)


@pytest.fixture(autouse=True)
def _poisoned_memory():
    """Fills memory fresh from ``torch.empty`` with NaN (integers: the largest), so that what nobody wrote is seen."""
    algorithms, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(algorithms, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = fill


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(20171204)


@pytest.fixture(autouse=True)
def _no_context_left():
    """No test may leave a sampling context behind, whatever it raised."""
    yield
    left = current()
    while current() is not None:
        current().__exit__(None, None, None)
    assert left is None
