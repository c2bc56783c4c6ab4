"""The two pairs of builds that must work, and the others, which must say what is wrong."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from compat import TorchvisionError, import_torchvision
from compat import torchvision as shim

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package called torchvision, found before the installed one; the installed one is back after the test."""
    package = tmp_path / "torchvision"
    package.mkdir()
    (package / "__init__.py").write_text("__version__ = 'stand-in'\n")
    (package / "_C.so").write_bytes(b"not a library")
    before = {name: module for name, module in sys.modules.items() if name.split(".")[0] == "torchvision"}
    for name in before:
        del sys.modules[name]
    monkeypatch.syspath_prepend(str(tmp_path))
    yield package
    sys.modules.pop("torchvision", None)
    sys.modules.update(before)


def test_installed_pair_imports_and_its_models_run():
    torchvision = import_torchvision()
    model = torchvision.models.resnet18(num_classes=3).eval()
    assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)


def test_second_call_returns_the_same_module():
    assert import_torchvision() is import_torchvision()


@pytest.mark.slow
def test_installed_pair_imports_in_a_fresh_process_even_after_a_plain_import_failed():
    code = (
        "try:\n    import torchvision\nexcept RuntimeError:\n    pass\n"
        "from compat import import_torchvision\nprint(import_torchvision().__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "torchvision", done.stderr


def test_a_matching_pair_is_left_untouched(stand_in, monkeypatch):
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    monkeypatch.setattr(shim, "_declare_operators", lambda: pytest.fail("nothing may be declared for a matching pair"))
    assert import_torchvision().__version__ == "stand-in"


def test_a_cuda_build_beside_a_cpu_torch_gets_its_operators_declared(stand_in, monkeypatch):
    declared = []

    def missing(path: str) -> None:
        cause = OSError("libc10_cuda.so: cannot open shared object file: No such file or directory")
        raise OSError(f"Could not load this library: {path}") from cause

    monkeypatch.setattr(torch.ops, "load_library", missing)
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(shim, "_declare_operators", lambda: declared.append(True))
    assert import_torchvision().__version__ == "stand-in"
    assert declared == [True]


def test_a_cuda_build_beside_a_cuda_torch_whose_libraries_are_missing_is_an_error(stand_in, monkeypatch):
    def missing(path: str) -> None:
        raise OSError("libcudart.so.13: cannot open shared object file")

    monkeypatch.setattr(torch.ops, "load_library", missing)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(TorchvisionError, match="libcudart"):
        import_torchvision()


def test_an_extension_built_for_another_torch_is_an_error_with_versions_and_remedy(stand_in):
    with pytest.raises(TorchvisionError) as caught:
        import_torchvision()
    text = str(caught.value)
    assert torch.__version__ in text
    assert "does not load" in text
    assert "Remedy: pip install" in text


def test_a_package_without_its_extension_is_an_error(stand_in):
    (stand_in / "_C.so").unlink()
    with pytest.raises(TorchvisionError, match="no compiled extension"):
        import_torchvision()


def test_an_import_that_fails_for_another_reason_is_an_error_that_carries_the_reason(stand_in, monkeypatch):
    (stand_in / "__init__.py").write_text("raise RuntimeError('operator torchvision::roi_align does not exist')\n")
    monkeypatch.setattr(torch.ops, "load_library", lambda path: None)
    with pytest.raises(TorchvisionError, match="roi_align"):
        import_torchvision()


def test_a_missing_torchvision_is_an_error_with_a_remedy(stand_in, monkeypatch):
    monkeypatch.setattr(shim.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(TorchvisionError, match="not installed"):
        import_torchvision()


def test_the_error_is_an_import_error_and_a_value_error():
    assert issubclass(TorchvisionError, ImportError)
    assert issubclass(TorchvisionError, ValueError)


def test_declared_operators_are_declared_once(monkeypatch):
    monkeypatch.setattr(shim, "_libraries", list(shim._libraries))
    import_torchvision()
    shim._declare_operators()
    assert hasattr(torch.ops.torchvision, "nms")
