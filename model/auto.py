"""This library's YOSO in the place of transformers': behind the Auto classes, in a model that is
loaded already, and in a folder that others load.
"""

import json
from collections.abc import Callable, Iterator
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.yoso import modeling_yoso

from yoso_core.files import written_folder
from yoso_core.model import heads, layers
from yoso_core.model.configuration import YosoConfig
from yoso_core.model.heads import YosoPreTrainedModel
from yoso_core.model.tokenizer import YosoTokenizer

_AUTO: dict[str, type[YosoPreTrainedModel]] = {
    "AutoModel": heads.YosoModel,
    "AutoModelForPreTraining": heads.YosoForPreTraining,
    "AutoModelForMaskedLM": heads.YosoForMaskedLM,
    "AutoModelForSequenceClassification": heads.YosoForSequenceClassification,
    "AutoModelForMultipleChoice": heads.YosoForMultipleChoice,
    "AutoModelForTokenClassification": heads.YosoForTokenClassification,
    "AutoModelForQuestionAnswering": heads.YosoForQuestionAnswering,
}

# Attributes that the modules of transformers' YOSO have and ours do not: settings copied from the
# configuration (ours read the configuration), a dropout without effect, and tables of numbers.
_STALE: dict[type[nn.Module], tuple[str, ...]] = {
    layers.YosoEmbeddings: ("position_ids", "token_type_ids"),
    layers.YosoLayer: ("add_cross_attention", "chunk_size_feed_forward", "seq_len_dim"),
    layers.YosoSelfAttention: (
        "dropout",
        "hash_code_len",
        "lsh_backward",
        "lsh_config",
        "num_hash",
        "use_conv",
        "use_expectation",
        "use_fast_hash",
    ),
    heads.YosoClassificationHead: ("config",),
}

_REMOTE_FILE = "modeling_yoso_core"


def register_auto_classes() -> None:
    """Make the Auto classes and `pipeline` of this process take this library's YOSO for
    ``model_type: yoso``.

    ``pipeline("fill-mask", model="uw-madison/yoso-4096")`` then runs this model, with the tokenizer
    of `load_tokenizer`. A tokenizer class that the tokenizer_config.json of a checkpoint names is
    taken as it is. A second call changes nothing. `transformers.YosoModel` and its heads stay what
    they are.

    >>> from transformers import AutoModel
    >>> register_auto_classes()
    >>> config = YosoConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    >>> isinstance(AutoModel.from_config(config), YosoPreTrainedModel)
    True
    """
    AutoConfig.register("yoso", YosoConfig, exist_ok=True)
    AutoTokenizer.register(YosoConfig, tokenizer_class=YosoTokenizer, exist_ok=True)
    for auto, ours in _AUTO.items():
        getattr(transformers, auto).register(YosoConfig, ours, exist_ok=True)


def adopt(model: nn.Module) -> YosoPreTrainedModel:
    """Turn a YOSO model of transformers, with any head, into this library's, in place.

    The model stays the same object with the same parameter tensors. So an optimizer keeps working,
    and so do hooks and added layers. Modules that were wrapped are converted inside their wrappers,
    every copy of them, as peft makes for ``modules_to_save`` and for the classifier of a
    ``task_type``. Its ``config`` becomes a `YosoConfig` of this library with the same settings.
    What changes is the computation: padding has an effect, and sampling runs everywhere. A model of
    this library is returned as it is.

    Parameters
    ----------
    model : the model, or a module that holds it and no other, such as a model of peft, which is
        returned. Give this one where there is one, since it has the ``config`` as well.

    Raises
    ------
    TypeError : any other model.
    ValueError : the ``forward`` of a module was replaced, as accelerate's offloading does; adopt
        the model before that. Or something else stands in the place of a module. Nothing was
        changed then.

    >>> sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1}
    >>> model = transformers.YosoModel(transformers.YosoConfig(**sizes)).eval()
    >>> adopt(model) is model
    True
    >>> isinstance(model, heads.YosoModel)
    True
    """
    whole = _outermost(model, lambda module: isinstance(module, PreTrainedModel))
    if len(whole) == 1 and isinstance(whole[0], YosoPreTrainedModel):
        return cast(YosoPreTrainedModel, model)
    stock = {getattr(transformers, ours.__name__, None): ours for ours in _AUTO.values()}
    kind = stock.get(type(whole[0])) if len(whole) == 1 else None
    if kind is None:
        raise TypeError(f"model: need a YOSO model of transformers, got {type(model).__module__}.{type(model).__qualname__}")
    (yoso,) = whole
    old: Any = yoso.config
    config = YosoConfig.from_dict(old.to_dict())
    with torch.device("meta"):
        pattern = kind(config)
    pairs = list(_pairs(yoso, pattern, ""))
    for theirs, _ in pairs:
        if "forward" in vars(theirs):
            raise ValueError(f"model: forward of {type(theirs).__name__} was replaced (by accelerate?); adopt the model before that")
    for theirs, ours in pairs:
        _become(theirs, ours)
    for module in model.modules():  # wrappers keep the config too
        if vars(module).get("config") is old:
            cast(Any, module).config = config
    return cast(YosoPreTrainedModel, model)


def _outermost(module: nn.Module, wanted: Callable[[nn.Module], bool]) -> list[nn.Module]:
    """``module`` if it is wanted, else the wanted modules in it that are in no other wanted one."""
    if wanted(module):
        return [module]
    return [found for child in module.children() for found in _outermost(child, wanted)]


def _pairs(theirs: nn.Module, ours: nn.Module, name: str) -> Iterator[tuple[nn.Module, nn.Module]]:
    """Every module of transformers' YOSO with the one of ours that stands at the same name: inside
    a wrapper, where there is one, and then each copy in it.
    """
    own = type(ours).__module__ in (heads.__name__, layers.__name__)
    if not own and not any(True for _ in ours.children()):  # a layer of torch: it stays, and so does what stands in its place
        return
    kind = getattr(modeling_yoso, type(ours).__name__) if own else type(ours)
    found = _outermost(theirs, lambda module: type(module) is kind)
    if not found:
        raise ValueError(
            f"model: need a {kind.__name__} at {name}, got {type(theirs).__module__}.{type(theirs).__name__} without one; adopt the model "
            "before modules are replaced"
        )
    for module in found:
        if own:
            yield module, ours
        for child_name, child in ours.named_children():
            if child_name in module._modules:
                yield from _pairs(module.get_submodule(child_name), child, f"{name}.{child_name}" if name else child_name)


def _become(theirs: nn.Module, ours: nn.Module) -> None:
    """Give ``theirs`` the class of ``ours`` and the attributes that it lacks. Its parameters and
    its state stay.
    """
    for name in _STALE.get(type(ours), ()):
        if hasattr(theirs, name):
            delattr(theirs, name)
    theirs.__class__ = type(ours)
    for name, value in vars(ours).items():
        if name == "config" or name not in vars(theirs):
            vars(theirs)[name] = value
    for name, child in ours.named_children():
        if name not in theirs._modules:
            theirs.add_module(name, child)


def export_for_hub(model: YosoPreTrainedModel, folder: str | PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None) -> Path:
    """Write a folder that others load with ``trust_remote_code=True``, ready for
    `huggingface_hub.upload_folder`. Returns its path.

    The folder holds the weights, the configuration with an ``auto_map``, the tokenizer where one is
    given, and one small file of code. That file imports the classes from `yoso_core`, which must be
    installed where the folder is loaded. Without ``trust_remote_code`` the same folder loads as
    transformers' own YOSO.

    Raises
    ------
    TypeError : ``model`` is no YOSO model of this library.
    ValueError : ``folder`` is a file.

    >>> from tempfile import TemporaryDirectory
    >>> config = YosoConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1)
    >>> with TemporaryDirectory() as folder:
    ...     path = export_for_hub(heads.YosoModel(config), folder)
    ...     sorted(file.name for file in path.iterdir())
    ['config.json', 'model.safetensors', 'modeling_yoso_core.py']
    """
    if not isinstance(model, YosoPreTrainedModel):
        raise TypeError(f"model: need a YOSO model of yoso_core, got {type(model).__name__}; adopt() turns one of transformers into it")
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"folder: need a folder or a new name, {folder} is a file")
    with written_folder(folder) as part:
        model.save_pretrained(part)
        if tokenizer is not None:
            tokenizer.save_pretrained(part)
        (part / f"{_REMOTE_FILE}.py").write_text(_remote_code(), "utf-8")
        config = json.loads((part / "config.json").read_text("utf-8"))
        config["auto_map"] = {"AutoConfig": f"{_REMOTE_FILE}.YosoConfig"}
        config["auto_map"] |= {auto: f"{_REMOTE_FILE}.{ours.__name__}" for auto, ours in _AUTO.items()}
        (part / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", "utf-8")
    return folder


def _remote_code() -> str:
    """The text of the file of code. It defines subclasses, since transformers marks a class that it
    loads from a folder, and from then on saves the file of that class with every model.
    """
    config = "class YosoConfig(model.YosoConfig):\n    pass\n"
    names = sorted(ours.__name__ for ours in _AUTO.values())
    kinds = [f"class {name}(model.{name}):\n    config_class = YosoConfig\n" for name in names]
    top = '"""YOSO from yoso_core: pip install \'yoso-core[model]\'."""\n\nfrom yoso_core import model\n'
    return "\n\n".join([top, config, *kinds])
