"""Creating timm models with weights from the hub, a file or a folder, and errors that say what to do."""

from __future__ import annotations

import difflib
import json
import logging
import math
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_input_data_config
from timm.models import _hub, adapt_input_conv
from timm.models._input import get_model_args, get_model_input_config
from torch import Tensor, nn

from .classifier import classifier_names
from .damage import damaged_value
from .errors import CbnWarning, ModelError, first_line
from .weight_files import find_weights, read_checkpoint, refuse_other_files

_SOURCES = ("hf-hub:", "local-dir:")
RGB = 3  # channels of the images that weights are for unless they say otherwise
_DATA_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


@dataclass(frozen=True)
class ModelSpec:
    """Which model, and where its weights come from.

    model: a timm name, "hf-hub:OWNER/NAME", "local-dir:DIR" or DIR (what `export` writes), or a file of weights.
    arch: the timm name for such a file; by default the "architecture" in the metadata of a .safetensors file.
    checkpoint: a .safetensors file, or one of torch.save that loads with weights_only=True, as in `load_weights`.
    model_kwargs: passed to timm.create_model. mean, std, img_size: override the model's data config; mean and std have
    one value for each channel of the images, or one for all.
    """

    model: str
    arch: str | None = None
    checkpoint: str | None = None
    pretrained: bool = True
    model_kwargs: dict[str, Any] = field(default_factory=dict)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    img_size: int | None = None


def create_model(spec: ModelSpec, num_classes: int | None = None) -> Any:
    """Builds the model with its weights, for `num_classes` classes (None: as many as the weights have).

    Raises ModelError for an unknown name, missing or damaged weights (not finite, or a running variance below zero),
    weights of another architecture, arguments that the architecture does not take, or a hub that cannot be reached.
    """
    name, checkpoint = _resolve(spec)
    kwargs = dict(spec.model_kwargs)
    if num_classes is not None:
        if "num_classes" in kwargs:
            raise ModelError("num_classes is the number of class folders; leave it out of --model-kwargs")
        kwargs["num_classes"] = num_classes
    from_source = name.startswith(_SOURCES)
    if checkpoint is None and (spec.pretrained or from_source):
        model = _create(name, {**kwargs, "pretrained": True}, spec)
        folder = name.removeprefix("local-dir:")
        _check_weights(model, name if folder == name else f"{folder}/model.safetensors")
        if folder != name:
            _check_loaded(model, Path(folder) / "model.safetensors")
    else:
        model = _create(name, {**kwargs, "pretrained": False}, spec)
        if checkpoint is not None:
            load_weights(model, checkpoint, new_head=num_classes is not None)
    model.pretrained_cfg = _data_config(model, spec, name)
    return model


def _data_config(model: Any, spec: ModelSpec, name: str) -> dict[str, Any]:
    """The model's pretrained_cfg, with the images that it takes in this form and as `spec` has them."""
    cfg = dict(model.pretrained_cfg)
    _check_data_config(cfg, name)
    channels = input_channels(model)
    given = {key: tuple(value) for key, value in (("mean", spec.mean), ("std", spec.std)) if value is not None}
    wanted: dict[str, Any] = {}
    for key, default in (("mean", IMAGENET_DEFAULT_MEAN), ("std", IMAGENET_DEFAULT_STD)):
        values = given.get(key) or cfg.get(key) or default
        if len(values) not in (1, channels):
            if key in given:
                raise ModelError(
                    f"{key} has {len(values)} values, but {name} takes images with {channels} "
                    f"channel{'s' * (channels > 1)}; give one for each, or one for all"
                )
            values = [sum(values) / len(values)]  # what timm does
        wanted[key] = tuple(values) * (channels if len(values) == 1 else 1)
    before = tuple(cfg.get("input_size", (RGB, 224, 224)))
    size = before[1:] if spec.img_size is None else (spec.img_size,) * 2
    if (built := get_model_input_config(model))["fixed_input_size"]:
        size = tuple(built["input_size"][1:])
        if spec.img_size is not None and size != (spec.img_size,) * 2:
            raise ModelError(
                f"{name} is built for images of {size[0]} x {size[1]} and not of {spec.img_size}; "
                "leave img_size out of --model-kwargs, or --img-size"
            )
    if spec.img_size is not None or (channels, *size) != before:
        wanted["input_size"] = (channels, *size)
    cfg = with_data_config(cfg, wanted)
    _check_data_config(cfg, name)
    return cfg


def model_args(model: Any) -> dict[str, Any]:
    """The keyword arguments with which timm builds this model again, without num_classes.

    Beside those that it was created with, they are those in its source's config.json, and what timm took from its
    pretrained_cfg (channels, pooling, a fixed size).
    """
    # timm's own answer leaves out the rates of dropout and stochastic depth
    args = {**getattr(model, "_model_args", {}), **get_model_args(model)}
    return {name: value for name, value in args.items() if name != "num_classes"}


def with_data_config(cfg: dict[str, Any], data_config: dict[str, Any]) -> dict[str, Any]:
    """A pretrained_cfg like `cfg` for images as in `data_config`, some of the keys of timm's resolve_data_config.

    As in timm's own exports, what `cfg` recommends for evaluation in the place of a given size or crop goes, and so
    does what is known of another size.
    """
    given = {key: data_config[key] for key in _DATA_KEYS if data_config.get(key) is not None}
    obsolete = {"test_crop_pct"} if "crop_pct" in given else set()
    if "input_size" in given:
        obsolete |= {"test_input_size", "test_pool_size", "test_crop_pct"}
        size = tuple(given["input_size"])[1:]
        if size != tuple(cfg.get("input_size") or ())[1:]:
            given["pool_size"] = None
        smallest = tuple(cfg.get("min_input_size") or ())[1:]
        if any(side < least for side, least in zip(size, smallest, strict=False)):
            obsolete.add("min_input_size")
    return {**{key: value for key, value in cfg.items() if key not in obsolete}, **given}


def _check_data_config(cfg: dict[str, Any], name: str) -> None:
    """Raises ModelError if the images that a model takes are not described by numbers, as in a damaged config.json."""
    sizes = ("input_size", "min_input_size")
    for key in (*sizes, "mean", "std"):
        kinds = (int,) if key in sizes else (int, float)
        if (values := cfg.get(key)) is None:
            continue
        lengths = (3,) if key in sizes else (1, 3, cfg.get("input_size", (3,))[0])
        good = isinstance(values, (tuple, list)) and len(values) in lengths
        if not good or not all(
            not isinstance(v, bool) and isinstance(v, kinds) and math.isfinite(v) and (key == "mean" or v > 0)
            for v in values
        ):
            raise ModelError(f"{name} has {key} {values!r}, which no image has; its settings are damaged")


def load_weights(model: Any, checkpoint: str | Path, new_head: bool = False) -> None:
    """Loads a file into the model. All must fit, but with `new_head` a classifier of another size is left out.

    The weights may be an entry of the file, beside others, with a prefix before their names: the part is taken under
    which the most of the model's tensors are, and a CbnWarning says which. A stem for 3 channels is adapted to the
    model's number of them as timm does it. Without `new_head` the model's classifier is first made of the size in the
    file. Raises ModelError if the file is missing, damaged, no checkpoint, would need unpickling, or is of another
    architecture.
    """
    found = find_weights(read_checkpoint(Path(checkpoint)), model.state_dict())
    if found is None:
        raise ModelError(f"cannot load weights from {checkpoint}: it holds no state_dict of tensors; check the file")
    state = found.state
    heads = tuple(f"{head}." for head in classifier_names(model))
    weight = state.get(f"{heads[0]}weight") if heads else None
    if not new_head and heads and (weight is None or len(weight) != model.num_classes):
        model.reset_classifier(0 if weight is None else len(weight))
    adapted = _adapt_stem(model, state)
    own = model.state_dict()
    for key in [k for k in state if new_head and heads and k.startswith(heads)]:
        if key not in own or own[key].shape != state[key].shape:
            del state[key]
    missing = [
        k
        for k in own
        if k not in state and not (new_head and heads and k.startswith(heads)) and "num_batches_tracked" not in k
    ]
    unexpected = [k for k in state if k not in own]
    shapes = [k for k in state if k in own and own[k].shape != state[k].shape]
    # integers stand for weights in quantized files, with scales beside them
    kinds = [k for k in state if k in own and own[k].is_floating_point() and not state[k].is_floating_point()]
    if missing or unexpected or shapes or kinds:
        problems = [
            f"{len(keys)} {what} (such as {keys[0]})"
            for what, keys in (
                ("missing", missing), ("unexpected", unexpected), ("of another shape", shapes), ("of integers", kinds),
            )
            if keys
        ]  # fmt: skip
        where = f" ({report})" if (report := found.report()) else ""
        remedy = "check the model name and --model-kwargs"
        if shapes and not (missing or unexpected or kinds) and set(shapes) <= set(_stems(model)):
            channels = state[shapes[0]].shape[1] * input_channels(model) // own[shapes[0]].shape[1]
            remedy = f"they are for images with another number of channels: pass --in-chans {channels}"
        raise ModelError(
            f"{checkpoint} does not hold the weights of this architecture{where}: {', '.join(problems)}; {remedy}"
        )
    model.load_state_dict(state, strict=False)
    _check_weights(model, str(checkpoint))
    if report := ", ".join(filter(None, (found.report(), adapted))):
        warnings.warn(f"the weights of {checkpoint} are {report}", CbnWarning, stacklevel=2)


def _adapt_stem(model: Any, state: dict[str, Tensor]) -> str:
    """Makes a stem for 3 channels one for as many as the model takes, in place, as timm does; says so."""
    said = ""
    for key, stem in _stems(model).items():
        weight, channels = state.get(key), input_channels(model)
        if weight is None:
            continue
        expected = list(stem.weight.shape)
        expected[1] = expected[1] * RGB // channels  # some see pixels in groups: so many times the channels
        if channels != RGB and list(weight.shape) == expected:
            state[key] = adapt_input_conv(channels, weight, base_chans=RGB)
            said = f"with {key} adapted from {RGB} channels to {channels}"
    return said


def _stems(model: Any) -> dict[str, nn.Conv2d]:
    """The convs that see the images, by the names of their weights."""
    names = (getattr(model, "pretrained_cfg", None) or {}).get("first_conv") or ()
    modules = dict(model.named_modules())
    stems = {f"{name}.weight": modules.get(name) for name in ([names] if isinstance(names, str) else names)}
    return {key: stem for key, stem in stems.items() if isinstance(stem, nn.Conv2d)}


def input_channels(model: Any) -> int:
    """How many channels the images have that a timm model takes."""
    # about mean and std, of no interest here, timm would warn
    known = {**model.pretrained_cfg, "mean": 0.5, "std": 0.5}
    return int(resolve_input_data_config(model, pretrained_cfg=known)["input_size"][0])


def _check_weights(model: nn.Module, source: str) -> None:
    if (fault := damaged_value(model)) is not None:
        raise ModelError(f"{source} is damaged: {fault}; fetch or export the weights again")


def _check_loaded(model: nn.Module, path: Path) -> None:
    """Raises ModelError if most weights are not what the file says: timm trusts an architecture to load them."""
    if not path.is_file():  # timm takes others, too
        return
    own, loaded = dict(model.named_parameters()), []
    try:
        with safe_open(path, "pt") as file:
            for name in own.keys() & set(file.keys()):
                stored = file.get_tensor(name)
                # ones and zeros are what a new layer has, too
                if stored.shape == own[name].shape and stored.dim() and bool((stored != stored.flatten()[:1]).any()):
                    loaded.append(torch.equal(own[name], stored.to(own[name].dtype)))
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is damaged ({error}); fetch or export the weights again") from error
    if 2 * sum(loaded) < len(loaded):
        raise ModelError(
            f"{path} was not loaded: {type(model).__name__}, as it is registered with timm, ignores pretrained=True; "
            "let its function build it by timm.models.build_model_with_cfg"
        )


def _resolve(spec: ModelSpec) -> tuple[str, str | None]:
    """The name for timm.create_model, and the checkpoint file."""
    name, checkpoint = spec.model, spec.checkpoint
    if name.endswith(".safetensors") or (not timm.is_model(name) and Path(name).is_file()):
        if checkpoint is not None:
            raise ModelError(f"give either the file {name} as model or --checkpoint {checkpoint}, not both")
        checkpoint, name = name, spec.arch or _architecture_in(Path(name))
    elif not name.startswith(_SOURCES) and (os.sep in name or Path(name, "config.json").is_file()):
        name = f"local-dir:{name}"
    if name.startswith("local-dir:"):
        folder = Path(name.removeprefix("local-dir:"))
        if not folder.exists():
            raise ModelError(f"{folder} does not exist; give a timm name, an exported folder or a file of weights")
        # timm would fall back to a pickle where there is no safetensors file
        for file in ("config.json", "model.safetensors"):
            if not (folder / file).is_file():
                raise ModelError(
                    f"{folder} is not an exported model: it has no {file}; give a timm name or such a folder"
                )
        refuse_other_files(folder / "model.safetensors")
    elif not name.startswith("hf-hub:") and not timm.is_model(name):
        close = difflib.get_close_matches(name.partition(".")[0], timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() names all"
        raise ModelError(f"timm knows no model {name!r}; {hint}")
    return name, checkpoint


def _architecture_in(path: Path) -> str:
    refuse_other_files(path)
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        if path.suffix == ".safetensors":
            raise ModelError(f"cannot load weights from {path}: {error}; give a .safetensors file") from error
        metadata = {}
    try:
        about = json.loads(metadata["cbn_convert"]) if "cbn_convert" in metadata else metadata
    except ValueError:
        about = {}
    if not isinstance(about, dict) or not about.get("architecture"):
        raise ModelError(f"{path} does not say its architecture; pass the timm name with --arch")
    return str(about["architecture"])


def _create(name: str, kwargs: dict[str, Any], spec: ModelSpec) -> Any:
    try:
        with _quiet(), offline_if_unreachable():
            model = timm.create_model(name, **kwargs)
            fixed = get_model_input_config(model)["fixed_input_size"]
            if spec.img_size is not None and fixed and "img_size" not in spec.model_kwargs:
                model = timm.create_model(name, **{**kwargs, "img_size": spec.img_size})
            return model
    except MemoryError as error:
        raise ModelError(
            f"the memory of this machine is not enough for {name}; free some, or take a smaller one"
        ) from error
    except Exception as error:
        first = first_line(error)
        if name.startswith("local-dir:") and isinstance(error, LocalEntryNotFoundError):
            raise ModelError(
                f"cannot load {name}: timm wants weights of its backbone from {hub_constants.ENDPOINT} first, which "
                "cannot be reached; give the architecture's name, and model.safetensors with --checkpoint"
            ) from error
        if name.startswith("local-dir:"):
            raise ModelError(f"cannot load {name}: {first}; the folder is damaged or not a timm export") from error
        if isinstance(error, (TypeError, AssertionError)) and not isinstance(error, OSError):
            raise ModelError(
                f"{name} cannot be created with {spec.model_kwargs}: {first}; check --model-kwargs"
            ) from error
        if kwargs["pretrained"]:
            if isinstance(error, LocalEntryNotFoundError):
                first = f"{hub_constants.ENDPOINT} cannot be reached and they are not in the local cache"
            raise ModelError(
                f"the pretrained weights of {name} cannot be had ({first}); "
                "pass a local file with --checkpoint FILE, or start from random weights with --no-pretrained"
            ) from error
        raise ModelError(f"{name} cannot be created with {spec.model_kwargs}: {first}; check --model-kwargs") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Silences the loaders' own log lines; what matters of them is in the error."""
    loggers = [logging.getLogger(name) for name in ("timm", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def offline_if_unreachable() -> Iterator[None]:
    """Keeps the hub client from retrying for a minute where there is no network; cached files still load.

    Whether there is one is tried when timm asks the hub for the first file, so that what is here needs none.
    """
    before, download = hub_constants.HF_HUB_OFFLINE, _hub.hf_hub_download
    proxied = any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"))
    tried = before or proxied

    def try_first(*args: Any, **kwargs: Any) -> Any:
        nonlocal tried
        if not tried:
            tried = True
            hub_constants.HF_HUB_OFFLINE = not _hub_answers()
        return download(*args, **kwargs)

    try:
        _hub.hf_hub_download = try_first
        yield
    finally:
        hub_constants.HF_HUB_OFFLINE, _hub.hf_hub_download = before, download


def _hub_answers() -> bool:
    endpoint = urlparse(hub_constants.ENDPOINT)
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        socket.create_connection((endpoint.hostname or "", port), timeout=5).close()
    except OSError:
        return False
    return True
