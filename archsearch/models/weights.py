"""Published trained weights, for networks of torchvision and timm."""

from __future__ import annotations

from http.client import HTTPException
from typing import Any

from torch import Tensor, nn

from archsearch.errors import IntegrityError, ResourceError, UnknownNameError, UsageError
from archsearch.models.libraries import timm_model
from archsearch.models.source import ModelSource, one_line


def pretrained(source: ModelSource, weights: str, **arguments: Any) -> nn.Module:
    """Build ``source`` and fill it with the published weights called ``weights``.

    Where ``arguments`` ask for another number of classes, the classifier stays freshly drawn.

    Args:
        source: A network of torchvision or timm.
        weights: ``"DEFAULT"`` or a name of torchvision's such as ``"IMAGENET1K_V2"``; for timm
            ``"pretrained"`` (which ones is in the model's name: ``timm/resnet50.a1_in1k``).
        **arguments: As for ``ModelSource.build``.

    Raises:
        UsageError: If there are no such weights, or they do not fit these arguments.
        ResourceError: If they cannot be fetched.
        IntegrityError: If what was fetched is not what was published.
    """
    if source.origin == "torchvision":
        return _torchvision(source, weights, arguments)
    if source.origin == "timm":
        return _timm(source, weights, arguments)
    raise UsageError(f"there are no published weights for {source.name}: give yours with --weights FILE")


def _torchvision(source: ModelSource, weights: str, arguments: dict[str, Any]) -> nn.Module:
    from torchvision import models

    known = models.get_model_weights(source.name.removeprefix("torchvision/"))
    if weights not in known.__members__:
        raise UnknownNameError(f"weights of {source.name}", weights, known.__members__)
    entry = known[weights]
    model = source.build(**arguments)
    if getattr(model, "transform_input", True) is False:
        # Trained on inputs in another range: without this the network would run and answer wrongly.
        raise UsageError(f"the weights of {source.name} need the model argument transform_input=True")
    try:
        trained = entry.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, HTTPException) as error:
        raise _not_fetched(source, entry.url, error) from error
    except RuntimeError as error:  # the hash in its name is another
        raise IntegrityError(f"{entry.url} gave what was never published: {one_line(error)}") from error
    _load(source, model, trained)
    return model


def _load(source: ModelSource, model: nn.Module, trained: dict[str, Tensor]) -> None:
    """Load ``trained`` into ``model``, except a classifier for another number of classes."""
    own = model.state_dict()
    other = [name for name, value in trained.items() if name in own and value.shape != own[name].shape]
    for name in other:
        if len(trained[name]) != source.num_classes or trained[name].shape[1:] != own[name].shape[1:]:
            raise UsageError(
                f"the weights of {source.name} do not fit these arguments: {name} is "
                f"{tuple(own[name].shape)} here and {tuple(trained[name].shape)} in the weights"
            )
    try:
        model.load_state_dict({**trained, **{name: own[name] for name in other}})
    except RuntimeError as error:  # a layer that only one of the two has
        reason = one_line(error)
        raise UsageError(f"the weights of {source.name} do not fit these arguments: {reason}") from error


def _timm(source: ModelSource, weights: str, arguments: dict[str, Any]) -> nn.Module:
    import timm

    name = source.name.removeprefix("timm/")
    if weights != "pretrained":
        raise UnknownNameError(f"weights of {source.name}", weights, ["pretrained"])
    if not timm.is_model_pretrained(name):
        raise UsageError(f"timm publishes no weights for {source.name}: give yours with --weights FILE")
    source.build(**arguments)  # what is wrong with the arguments shows here, before anything is fetched
    try:
        return timm_model(name, {**source.arguments, **arguments}, pretrained=True)
    except Exception as error:  # the hub's client has an error tree of its own
        config = timm.get_pretrained_cfg(name)
        raise _not_fetched(source, config.hf_hub_id or config.url, error) from error


def _not_fetched(source: ModelSource, place: str, error: Exception) -> ResourceError:
    return ResourceError(
        f"the weights of {source.name} cannot be fetched from {place} ({one_line(error)}): "
        "download them elsewhere and give --weights FILE"
    )
