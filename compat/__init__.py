"""Small, documented bridges over differences between versions and builds of our dependencies."""

from compat.torchvision import TorchvisionError, import_torchvision

__all__ = ["TorchvisionError", "import_torchvision"]
