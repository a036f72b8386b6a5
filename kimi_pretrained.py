"""from_pretrained and save_pretrained, on both major versions of transformers.

    KimiPretrainedMixin     before PreTrainedModel among the bases; asks only `self` and its modules
      from_pretrained         checks keywords, `expert_cache=`; damaged files are one clear OSError
      _load_pretrained_model  where both versions read weights: replaced by `kimi_checkpoint.load_checkpoint`
      save_pretrained         published names and bytes, by `kimi_checkpoint.save_checkpoint`
      num_parameters          logical weights

state_dict() of stacked experts gives the checkpoint's names. Hooks that move weights (accelerate's) ask by parameter
name instead, so modules with an attribute `stacked_names` have it set while they are being attached.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import signature
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from torch import nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.utils import logging

from .kimi_checkpoint import load_checkpoint, save_checkpoint
from .kimi_gpu import prepare
from .kimi_pool import requested

logger = logging.get_logger(__name__)
if TYPE_CHECKING:  # what comes after it among the bases
    Base = PreTrainedModel
else:
    Base = object
Model = TypeVar("Model", bound="KimiPretrainedMixin")


class KimiPretrainedMixin(Base):
    """Reads and writes a model whose experts are stacked; see the top of this file."""

    language_model: Any
    plain_code: Mapping[str, Callable] = MappingProxyType({})  # what kernels are compared with, by operation

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.lm_head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.lm_head = new_embeddings

    def get_decoder(self) -> nn.Module:
        return self.language_model.model

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Logical weights: an int4 expert counts its codes, not its words, scales and shapes."""
        total = 0
        for module in self.modules():
            # Stacked experts. The class is asked, since a wrapper (torch.compile's, PEFT's) forwards what its module has.
            if (count := getattr(type(module), "num_weights", None)) is not None:
                trainable = not module.packed and any(p.requires_grad for p in module.parameters())
                total += count(module) if trainable or not only_trainable else 0
            elif not (exclude_embeddings and isinstance(module, nn.Embedding)):
                parameters = module.parameters(recurse=False)
                total += sum(p.numel() for p in parameters if p.requires_grad or not only_trainable)
        return total

    @classmethod
    def from_pretrained(
        cls: type[Model],
        pretrained_model_name_or_path: str | os.PathLike | None,
        *args: Any,
        expert_cache: int | str | None = None,
        **kwargs: Any,
    ) -> Model:
        """PreTrainedModel.from_pretrained, which loads in the checkpoint's dtype (bf16) unless told otherwise.

        `expert_cache`: bytes (or "20GB") of memory for routed experts, which otherwise stay in the checkpoint's files and
        are read when a token needs them; "auto" takes what is free, and all of them if they fit. None: all are loaded.

        Raises ValueError for weights that contradict the config or the model (missing, unknown, wrong shape or dtype),
        OSError for missing or damaged files. Never returns a model with a tensor that was not read.
        """
        if kwargs.get("quantization_config") is not None:
            raise ValueError(
                "quantization_config cannot be given: the experts are int4 in the checkpoint and stay so; leave it out."
            )
        dtype = kwargs.pop("torch_dtype", None) or kwargs.pop("dtype", None) or "auto"
        if dtype in (torch.float16, "float16"):
            logger.warning(
                "dtype=torch.float16: the scales of the int4 experts are bfloat16 and the model was trained in bfloat16;"
                " float16 overflows above 65504. Prefer dtype=torch.bfloat16."
            )
        try:
            with requested(expert_cache, kwargs.get("device_map")):
                loaded = super().from_pretrained(pretrained_model_name_or_path, *args, dtype=dtype, **kwargs)
        except SafetensorError as error:
            raise OSError(
                f"a weight file of {pretrained_model_name_or_path} is damaged or truncated ({error}); download it again."
            ) from error
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        set_stacked_names(model, False)
        model._prepare_devices()
        return loaded

    def _apply(self, fn: Callable, recurse: bool = True) -> Any:
        """Behind .to(), .cuda() and the like: what runs on a new device is tried there before the first forward."""
        result = super()._apply(fn, recurse)
        self._prepare_devices()
        return result

    def _prepare_devices(self) -> None:
        # Not every parameter: the routers' biases are fp32, scales keep their dtype.
        matrices = [
            getattr(module, "weight", None) for module in self.modules() if isinstance(module, nn.Linear)
        ]
        for device, dtype in {(matrix.device, matrix.dtype) for matrix in matrices if matrix is not None}:
            prepare(device, dtype, self.plain_code)

    @classmethod
    def _load_pretrained_model(cls, model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        """Where both major versions read weights, replaced by `load_checkpoint`; arguments and result differ between them."""
        set_stacked_names(model, True)
        request, finish = loading_result(model, PreTrainedModel._load_pretrained_model, args, kwargs)
        return finish(load_checkpoint(model, **request))

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "10GB",
        variant: str | None = None,
        **kwargs: Any,
    ) -> None:
        """PreTrainedModel.save_pretrained with the checkpoint's own names and bytes, one shard in memory at a time.

        A `state_dict` is saved instead of the model's own tensors. Adapters (PEFT) are saved as transformers does.
        """
        if getattr(self, "_hf_peft_config_loaded", False):
            return super().save_pretrained(
                save_directory,
                is_main_process,
                state_dict,
                push_to_hub=push_to_hub,
                variant=variant,
                **kwargs,
            )
        if not kwargs.pop("safe_serialization", True):
            raise ValueError("safe_serialization=False would write pickle; only safetensors are written.")
        with _no_progress_bar():  # of zero shards: the weights follow
            super().save_pretrained(save_directory, is_main_process, state_dict={}, **kwargs)
        if is_main_process:
            save_checkpoint(self, save_directory, state_dict, max_shard_size, variant)
        if push_to_hub:
            _upload(save_directory, **kwargs)


def loading_result(
    model: nn.Module, hook: Callable, args: tuple, kwargs: dict[str, Any]
) -> tuple[dict[str, Any], Callable[[Any], Any]]:
    """Translates `PreTrainedModel._load_pretrained_model` of either major version.

    Returns the arguments for `load_checkpoint`, and a function that gives its result the form that the caller expects.
    """
    given = signature(hook).bind(model, *args, **kwargs).arguments
    if "load_config" in given:  # 5.x
        from transformers.utils.loading_report import LoadStateDictInfo

        config = given["load_config"]
        renamings = dict(_user_renamings(config.weight_mapping))
        request: tuple[Any, ...] = (config.dtype, config.device_map, config.disk_offload_folder, renamings)
        unsupported = config.device_mesh
        names = tuple(signature(LoadStateDictInfo).parameters)

        def finish(index: Any) -> Any:
            empty: dict[str, Any] = {name: {} if name == "conversion_errors" else set() for name in names}
            return LoadStateDictInfo(**{**empty, "error_msgs": []}), index
    else:  # 4.57
        get = given.get
        request = (get("dtype"), get("device_map"), get("disk_offload_folder"), get("key_mapping"))
        unsupported = get("device_mesh")

        def finish(index: Any) -> Any:
            return model, [], [], [], index, []

    if unsupported is not None:
        raise ValueError("tensor parallel loading (tp_plan) is not supported; use device_map.")
    fields = ("dtype", "device_map", "offload_folder", "key_mapping")
    wanted = {"files": given.get("checkpoint_files"), "state_dict": given.get("state_dict")}
    return {**wanted, **dict(zip(fields, request, strict=True))}, finish


def _user_renamings(weight_mapping: list[Any] | None) -> Iterator[tuple[str, str]]:
    """The renamings that a caller of 5.x gave as key_mapping; the library's own legacy ones concern other models."""
    for transform in weight_mapping or []:
        sources, targets = transform.source_patterns, transform.target_patterns
        if len(sources) == len(targets) == 1 and type(transform).__name__ == "WeightRenaming":
            yield sources[0], targets[0]


def set_stacked_names(model: nn.Module, stacked: bool) -> None:
    for module in model.modules():
        if hasattr(type(module), "stacked_names"):
            module.stacked_names = stacked


@contextmanager
def _no_progress_bar() -> Iterator[None]:
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _upload(
    folder: str | os.PathLike,
    repo_id: str | None = None,
    commit_message: str | None = None,
    token: str | bool | None = None,
    private: bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
    **unused: Any,
) -> None:
    """Uploads a saved folder to the hub, as PreTrainedModel.save_pretrained(push_to_hub=True) would."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    name = repo_id or os.path.basename(os.path.normpath(folder))
    repo = api.create_repo(name, private=private, exist_ok=True).repo_id
    message = commit_message or "Upload KimiK25ForConditionalGeneration"
    api.upload_folder(
        repo_id=repo,
        folder_path=os.fspath(folder),
        commit_message=message,
        create_pr=create_pr,
        revision=revision,
    )


# ---------------------------------------------------------------------------------------------------------- device maps


class OnEachDevice:
    """Tensors that all layers share, or tuples of them, copied once to each device. accelerate's hooks, which a device map
    puts before every layer, would copy them for every layer."""

    def __init__(self, **shared: Any):
        self.shared = shared
        self.copies: dict[torch.device, dict[str, Any]] = {}

    def for_layer(self, layer: nn.Module) -> dict[str, Any]:
        device = getattr(getattr(layer, "_hf_hook", None), "execution_device", None)
        if device is None:
            return self.shared
        device = torch.device(accelerator_type(), device) if isinstance(device, int) else torch.device(device)
        if device not in self.copies:
            self.copies[device] = tree_map_only(torch.Tensor, lambda x: x.to(device), self.shared)
        return self.copies[device]


def accelerator_type() -> str:
    """What a number in a device map is a number of."""
    if not hasattr(torch, "accelerator"):  # before torch 2.6
        return "cuda"
    found = torch.accelerator.current_accelerator()
    return "cuda" if found is None else found.type


def only_moves_inputs(module: nn.Module) -> bool:
    """Whether accelerate put no hook on the module, or one that leaves its weight where it is; one that offloads brings the
    weight only while the module runs."""
    hook = getattr(module, "_hf_hook", None)
    hooks = [] if hook is None else getattr(hook, "hooks", [hook])  # of a SequentialHook
    return all(getattr(one, "offload", None) is False for one in hooks)
