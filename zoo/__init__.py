"""Models by name, each with the layout that says what of it can be pruned."""

from zoo.registry import ModelError, check_model, get_model, model_names

__all__ = ["ModelError", "check_model", "get_model", "model_names"]
