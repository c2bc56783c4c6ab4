"""``get_model``: zoo models with declared layouts, and models of others whose layout is traced and proved."""

from __future__ import annotations

import copy
import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

from compat.convolution import protect_convolutions
from pruning.gates import GateError, attach
from pruning.groups import Layout
from pruning.prove import prove
from pruning.trace import traced_layout
from zoo.cnn import cnn, lenet
from zoo.mlp import mlp
from zoo.mobilenet import mobilenet_v2
from zoo.resnet import cifar_resnet, resnet18, resnet50
from zoo.vgg import vgg
from zoo.vit import vit


class ModelError(ValueError):
    """A model that is unknown, cannot be built as asked, or takes no such option."""


Builder = Callable[..., tuple[nn.Module, Layout]]

ZOO: Mapping[str, Builder] = {
    "mlp": mlp,
    "cnn": cnn,
    "lenet": lenet,
    "resnet8": partial(cifar_resnet, num_layers=8),
    "resnet20": partial(cifar_resnet, num_layers=20),
    "resnet32": partial(cifar_resnet, num_layers=32),
    "resnet56": partial(cifar_resnet, num_layers=56),
    "resnet18": resnet18,
    "resnet50": resnet50,
    "vgg11": partial(vgg, num_layers=11),
    "vgg16": partial(vgg, num_layers=16),
    "mobilenet_v2": mobilenet_v2,
    "vit_micro": partial(vit, dim=64, num_heads=4, num_blocks=8, grid=4),
    "vit_tiny": partial(vit, dim=192, num_heads=3, num_blocks=8),
    "vit_86m": partial(vit, dim=768, num_heads=12, num_blocks=12),
    "vit_115m": partial(vit, dim=768, num_heads=12, num_blocks=16),
}
"""Zoo name -> builder ``(num_classes, in_channels, image_size, **options) -> (model, layout)``."""


def model_names() -> tuple[str, ...]:
    """Names of the models with a declared layout."""
    return tuple(ZOO)


def get_model(
    name: str, num_classes: int = 10, in_channels: int = 3, image_size: int = 32, **options: Any
) -> tuple[nn.Module, Layout]:
    """Build a model and its layout.

    Zoo models declare their layout (every declaration is proved by the tests) and can be built on the ``meta`` device.
    For all others the layout is traced and proved here, which needs real tensors and takes seconds; a group that fails
    is kept whole with a warning. No pretrained weights are ever fetched.

    Parameters
    ----------
    name : a name of ``model_names()``, ``torchvision:NAME``, ``timm:NAME``, or ``package.module:function``, which gets
        those of ``num_classes``, ``in_channels``, ``image_size`` and the options that its signature names and returns a
        module or a (module, Layout) pair; a layout of its own is proved as well and must hold.
    num_classes : number of logits.
    in_channels : channels of an image.
    image_size : height and width of an image, pixels.
    options : of the model, such as ``width=0.5`` or ``exits=True``; ``gates=True`` puts a gate on every layer that can
        have one (``pruning.gates``), on any model.

    Returns
    -------
    model, layout
        The module maps images [B, in_channels, image_size, image_size] to logits [B, num_classes], or with exits to a
        list of them, deepest last.

    Raises
    ------
    ModelError
        Unknown name or option, a size that is not a positive integer, or a model that cannot be built.
    LayoutError
        A declared layout that does not hold.
    """
    for what, value in (("num-classes", num_classes), ("in-channels", in_channels), ("image-size", image_size)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"model {name!r}: {what} must be a positive integer, got {value!r}")
    sizes = {"num_classes": num_classes, "in_channels": in_channels, "image_size": image_size}
    if options.pop("gates", False):
        model, layout = get_model(name, num_classes, in_channels, image_size, **options)
        try:
            return attach(model, layout, (in_channels, image_size, image_size))
        except GateError as error:
            raise ModelError(f"model {name!r}: {error}") from error
    model, layout = _with_layout(name, sizes, options)
    return protect_convolutions(model), layout


def check_model(name: str, **options: Any) -> None:
    """Refuse what :func:`get_model` would, as far as that shows without building anything.

    Raises
    ------
    ModelError
        Unknown name or option; models of others are not looked at.
    """
    options.pop("gates", None)
    if name in ZOO:
        _check_options(name, ZOO[name], options)
    elif ":" not in name:
        known = ", ".join(ZOO)
        raise ModelError(
            f"unknown model {name!r}{_nearest(name, ZOO)}; known are {known}, torchvision:NAME, timm:NAME and "
            "package.module:function"
        )


def _with_layout(name: str, sizes: Mapping[str, int], options: Mapping[str, Any]) -> tuple[nn.Module, Layout]:
    check_model(name, **options)
    if name in ZOO:
        try:
            return ZOO[name](**sizes, **options)
        except ValueError as error:
            raise ModelError(f"model {name!r}: {error}") from error
    source, _, rest = name.partition(":")
    build = {"torchvision": _torchvision, "timm": _timm}.get(source)
    if build is None:
        return _proved(name, lambda: _custom(source, rest, {**sizes, **options}), sizes)
    key = (name, tuple(sizes.items()), repr(sorted(options.items())))
    if key in _layouts:
        return build(rest, options, **sizes), _layouts[key]
    model, _layouts[key] = _proved(name, lambda: build(rest, options, **sizes), sizes)
    return model, _layouts[key]


_layouts: dict[tuple[object, ...], Layout] = {}
"""Layouts proved in this process: a client that builds the same model for every message traces it once."""


def _proved(
    name: str, build: Callable[[], nn.Module | tuple[nn.Module, Layout]], sizes: Mapping[str, int]
) -> tuple[nn.Module, Layout]:
    """Build a model and prove its layout, its own or a traced one; a model on ``meta`` gets it from a real twin."""
    built = twin = build()
    with torch.device("cpu"):
        example = torch.randn(
            2,
            sizes["in_channels"],
            sizes["image_size"],
            sizes["image_size"],
            generator=torch.Generator().manual_seed(0),
        )
        if any(parameter.is_meta for parameter in (built[0] if isinstance(built, tuple) else built).parameters()):
            twin = build()
        if isinstance(twin, tuple):
            layout = prove(*twin, example, declared=True)
        else:
            layout = prove(twin, traced_layout(twin, example), example, declared=False)
        _check_logits(name, twin[0] if isinstance(twin, tuple) else twin, example, sizes["num_classes"])
    return (built[0] if isinstance(built, tuple) else built), layout


def _check_logits(name: str, model: nn.Module, example: torch.Tensor, num_classes: int) -> None:
    """Refuse a model with fewer logits than classes, whose first step would fail on some client's label."""
    with torch.no_grad():
        output = copy.deepcopy(model).eval()(example)
    logits = output[-1] if isinstance(output, tuple | list) else output
    if isinstance(logits, torch.Tensor) and logits.ndim == 2 and logits.shape[1] < num_classes:
        raise ModelError(
            f"model {name!r}: expected {num_classes} logits, one for each class of the data, got {logits.shape[1]}; "
            "let the function take num_classes"
        )


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f", did you mean {close[0]!r}?" if close else ""


def _check_options(name: str, builder: Builder, options: Mapping[str, Any]) -> None:
    fixed = builder.keywords if isinstance(builder, partial) else {}
    parameters = inspect.signature(builder).parameters.values()
    allowed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in fixed]
    for option in options:
        if option not in allowed:
            raise ModelError(
                f"model {name!r} has no option {option!r}{_nearest(option, allowed)}; it takes {', '.join(allowed)}"
            )
    width = options.get("width", 1.0)
    if isinstance(width, bool) or not isinstance(width, int | float) or not width > 0:
        raise ModelError(f"model {name!r}: width must be a positive number, got {width!r}")


def _torchvision(
    name: str, options: Mapping[str, Any], num_classes: int, in_channels: int, image_size: int
) -> nn.Module:
    from compat.torchvision import import_torchvision

    models = import_torchvision().models
    known = models.list_models(module=models)
    if name not in known:
        raise ModelError(f"torchvision has no classification model {name!r}{_nearest(name, known)}")
    if "weights" in options:
        raise ModelError(f"model 'torchvision:{name}': pretrained weights are not fetched, remove the option 'weights'")
    sized = {"image_size": image_size} if name.startswith("vit_") else {}
    auxiliary = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    model = _built(
        f"torchvision:{name}",
        partial(models.get_model, name, weights=None, num_classes=num_classes),
        {**sized, **auxiliary, **options},
    )
    return _with_input_channels(model, in_channels)


def _timm(name: str, options: Mapping[str, Any], num_classes: int, in_channels: int, image_size: int) -> nn.Module:
    from compat.torchvision import import_torchvision

    if importlib.util.find_spec("timm") is None:
        raise ModelError(f"model 'timm:{name}' needs timm, which is not installed: install the project's extra 'timm'")
    import_torchvision()  # timm imports it, and only this way of importing works for every pair of builds
    timm = importlib.import_module("timm")
    known = timm.list_models()
    if name not in known:
        raise ModelError(f"timm has no model {name!r}{_nearest(name, known)}")
    if options.get("pretrained"):
        raise ModelError(f"model 'timm:{name}': pretrained weights are not fetched, remove the option 'pretrained'")
    create = partial(timm.create_model, name, num_classes=num_classes, in_chans=in_channels)
    options = {**options, "pretrained": False}
    if "img_size" in options:
        return _built(f"timm:{name}", create, options)
    try:
        # Transformers have positions for one image size and must be told; convolutional networks refuse the argument.
        return create(**options, img_size=image_size)
    except TypeError:
        return _built(f"timm:{name}", create, options)


def _built(name: str, create: Callable[..., nn.Module], options: Mapping[str, Any]) -> nn.Module:
    try:
        return create(**options)
    except (TypeError, ValueError) as error:
        raise ModelError(f"model {name!r} cannot be built with options {dict(options)}: {error}") from error


def _with_input_channels(model: nn.Module, in_channels: int) -> nn.Module:
    """Replace the first convolution of a model made for three channels by one for ``in_channels``."""
    if in_channels == 3:
        return model
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            if module.in_channels != 3 or module.groups != 1:
                break
            first = nn.Conv2d(
                in_channels,
                module.out_channels,
                module.kernel_size,  # type: ignore[arg-type]
                module.stride,  # type: ignore[arg-type]
                module.padding,  # type: ignore[arg-type]
                module.dilation,  # type: ignore[arg-type]
                bias=module.bias is not None,
                padding_mode=module.padding_mode,
            )
            parent, _, leaf = path.rpartition(".")
            setattr(model.get_submodule(parent), leaf, first)
            return model
    raise ModelError(
        f"model {type(model).__name__}: found no first convolution with three input channels to replace by one with "
        f"{in_channels}; use images with three channels"
    )


def _custom(module_name: str, function_name: str, arguments: Mapping[str, Any]) -> nn.Module | tuple[nn.Module, Layout]:
    name = f"{module_name}:{function_name}"
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        sources = ("torchvision", "timm")
        raise ModelError(
            f"model {name!r}: cannot import {module_name!r}: {error}{_nearest(module_name, sources)}; expected "
            "torchvision:NAME, timm:NAME or package.module:function"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        functions = [key for key, value in vars(module).items() if callable(value)]
        raise ModelError(
            f"model {name!r}: {module_name} has no function {function_name!r}{_nearest(function_name, functions)}"
        )
    parameters = inspect.signature(function).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    sizes = ("num_classes", "in_channels", "image_size")
    unknown = [key for key in arguments if key not in parameters and key not in sizes]
    if unknown and not takes_any:
        raise ModelError(
            f"model {name!r}: the function has no argument {unknown[0]!r}{_nearest(unknown[0], parameters)}"
        )
    try:
        result = function(**{key: value for key, value in arguments.items() if takes_any or key in parameters})
    except Exception as error:  # whatever code of others raises: what it was asked for is not in its message
        raise ModelError(f"model {name!r}: the function raised {type(error).__name__}: {error}") from error
    pair = isinstance(result, tuple) and len(result) == 2
    if isinstance(result, nn.Module) or (pair and isinstance(result[0], nn.Module) and isinstance(result[1], Layout)):
        return result
    raise ModelError(
        f"model {name!r}: expected an nn.Module or an (nn.Module, Layout) pair, got {type(result).__name__}"
    )
