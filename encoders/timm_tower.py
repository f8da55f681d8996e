"""Image towers of timm: a state a patch, or a place of the feature map, with the model's own preprocessing."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from metalm.encoders.base import BESIDE, layers_up_to
from metalm.encoders.image import ImageProcessor, ImageTower, TowerConfig
from metalm.errors import ConfigError
from metalm.nn.attention import trains_faster_plain
from metalm.nn.merging import MergingBlocks, mean_keys, tokens_left
from metalm.registry import did_you_mean

LOCAL = "local-dir"  # timm's word for a folder, before the colon


@dataclass(kw_only=True)
class TimmConfig(TowerConfig):
    """`name` as in timm, e.g. `vit_small_patch16_224.augreg_in21k`, also `hf-hub:ID` and `local-dir:FOLDER`; as a type,
    `timm:NAME` is that with its weights.

    A convolutional network's states are the places of its last map of features: 7 x 7 of 224 x 224 pixels, or 14 x 14 with
    `arguments: {output_stride: 16}`. `arguments` go to `timm.create_model` as they are (depth, embed_dim, drop_path_rate, …),
    but for `checkpoint_path`: a file of weights, which may have a classifier, be of another image size, or of another layout
    that timm knows.
    """

    pretrained: bool = False
    arguments: dict[str, int | float | bool | str] | None = None

    @staticmethod
    def from_spec(spec: str) -> dict:
        return {"name": spec, "pretrained": True}


class TimmEncoder(ImageTower):
    """Any timm model that gives patch states (ViT, DeiT, BEiT, EVA, …), without its class and register tokens, or a map of
    features (ResNet, RegNet, ConvNeXt, EfficientNet, …)."""

    Config = TimmConfig

    def __init__(self, config: TimmConfig):
        super().__init__()
        import timm

        self.name = config.name
        self.source = read_source(config.name)
        architecture = config.name.split(".")[0]
        if self.source is None and not timm.is_model(architecture):
            raise ConfigError(f"timm has no model {architecture!r}{did_you_mean(architecture, timm.list_models())}")
        arguments = dict(config.arguments or {})
        checkpoint = arguments.pop("checkpoint_path", "")
        self.model = make_timm_model(config, arguments)
        if checkpoint:
            load_timm_checkpoint(self.model, checkpoint)
        # What pools the states has no part in this, and would count as trained.
        self.model.reset_classifier(0, "")
        data = timm.data.resolve_model_data_config(self.model)
        size = config.image_size or data["input_size"][-1]
        self.convolutional = not hasattr(self.model, "patch_embed")
        if self.convolutional:
            if config.layer:
                raise ConfigError(f"layer {config.layer}: of a convolutional network, {config.name!r}, the last map is read")
            if config.merge:
                raise ConfigError(
                    f"merge {config.merge}: {config.name!r} is a convolutional network and has no tokens to merge"
                )
            self.model.head = nn.Identity()
            with torch.no_grad():
                pixels = torch.zeros(1, 3, size, size, device="meta")
                num_states = copy.deepcopy(self.model).to("meta").eval().forward_features(pixels)[0, 0].numel()
        elif hasattr(self.model.patch_embed, "num_patches") and hasattr(self.model, "blocks"):
            self.model.fc_norm = nn.Identity()
            if config.layer:
                self.model.blocks = layers_up_to(self.model.blocks, config.layer, config.name)
                self.model.norm = nn.Identity()
            num_states = tokens_left(self.model.patch_embed.num_patches, config.merge, len(self.model.blocks))
        else:
            raise ConfigError(
                f"timm model {config.name!r} gives no patch states; take a ViT, DeiT, BEiT or EVA, or a convolutional network"
            )
        if config.activation_checkpointing and self.batch_norms() and config.trainable not in ("none", "biases"):
            raise ConfigError(
                f"timm model {config.name!r} has batch norms: run again by activation_checkpointing, they would take each "
                "batch into their statistics twice; go without, or take a model with other norms, a ViT or a ConvNeXt"
            )
        self.width = self.model.num_features
        self.skip = getattr(self.model, "num_prefix_tokens", 0)
        self.fused_attentions = [module for module in self.model.modules() if getattr(module, "fused_attn", False)]
        if config.merge:
            self.model.blocks = merging_blocks(self.model, config, self.skip)
        elif config.activation_checkpointing:
            recompute(self.model, config.name)
        self.set_pixel_statistics(data["mean"], data["std"])
        self.processor = ImageProcessor(size, num_states, data["interpolation"], config.tiles)

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        x_N3HW = self.normalize(pixels_N3HW)
        if not self.convolutional:
            trained = next((weight for weight in self.model.parameters() if weight.requires_grad), None)
            tokens = self.skip + self.model.patch_embed.num_patches
            plain = trained is not None and trains_faster_plain(trained, tokens)
            for attention in self.fused_attentions:
                attention.fused_attn = not plain
            return self.checked(self.model.forward_features(x_N3HW)[:, self.skip :])
        for norm in self.batch_norms():  # statistics must be in the weights' precision (under DeepSpeed they are not)
            if norm.running_mean.dtype != x_N3HW.dtype:
                norm.running_mean = norm.running_mean.to(x_N3HW.dtype)
                norm.running_var = norm.running_var.to(x_N3HW.dtype)
        # With the channels last, convolutions of few channels a group run half as fast again on a CPU.
        features_NDHW = self.model.forward_features(x_N3HW.contiguous(memory_format=torch.channels_last))
        return self.checked(features_NDHW.flatten(2).transpose(1, 2))

    def batch_norms(self) -> list[nn.Module]:
        return [module for module in self.model.modules() if isinstance(module, nn.BatchNorm2d)]

    def train(self, mode: bool = True) -> TimmEncoder:
        """As any encoder's; where some layers train, frozen batch norms go on normalising by what they have learned."""
        super().train(mode)
        for norm in self.batch_norms():
            if not norm.weight.requires_grad:
                norm.eval()
        return self

    def save_files(self, folder: Path, plain: dict) -> None:
        """The `config.json` of a model that is not timm's own: its architecture, arguments and preprocessing."""
        if self.source is not None:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.json").write_text(json.dumps(self.source, indent=1))
            plain["name"] = BESIDE + folder.name

    def layers(self) -> list[nn.Module]:
        if self.convolutional:
            return [self.model.get_submodule(stage["module"]) for stage in self.model.feature_info]
        *blocks, last = self.model.blocks
        return [*blocks, nn.ModuleList([last, self.model.norm])]


class MergingTimmBlocks(MergingBlocks):
    """timm's plain ViT blocks, matched by their keys."""

    def attention(self, block: nn.Module, x_NSD: Tensor, bias_NS: Tensor | None) -> tuple[Tensor, Tensor]:
        bias_N11S = None if bias_NS is None else bias_NS[:, None, None]
        with mean_keys(block.attn.k_norm) as keys:
            attended = block.attn(block.norm1(x_NSD), attn_mask=bias_N11S)
        return x_NSD + block.drop_path1(block.ls1(attended)), keys[0]

    def mlp(self, block: nn.Module, x_NSD: Tensor) -> Tensor:
        return x_NSD + block.drop_path2(block.ls2(block.mlp(block.norm2(x_NSD))))


def merging_blocks(model: nn.Module, config: TimmConfig, kept: int) -> MergingTimmBlocks:
    """Raises `ConfigError` for models whose blocks do more than a plain ViT's: those with rotary or relative positions (EVA,
    BEiT) tell them to every attention, and a token that stands for several patches has none."""
    from timm.layers import Attention
    from timm.models.vision_transformer import Block, VisionTransformer

    plain = getattr(type(model), "forward_features", None) is VisionTransformer.forward_features
    if not plain or any(type(block) is not Block or type(block.attn) is not Attention for block in model.blocks):
        raise ConfigError(
            f"merge {config.merge}: timm model {config.name!r} has other blocks than a plain ViT's, such as with positions in "
            "their attention; take a ViT or DeiT, or merge: 0"
        )
    return MergingTimmBlocks(model.blocks, config.merge, kept, config.activation_checkpointing)


def recompute(model: nn.Module, name: str) -> None:
    """Raises `ConfigError` where the model has no way to run its layers again."""
    try:
        model.set_grad_checkpointing()
    except (AssertionError, AttributeError) as error:
        raise ConfigError(f"timm model {name!r} cannot recompute its activations") from error


def read_source(name: str) -> dict | None:
    """What the `config.json` of `local-dir:FOLDER`, `hf-hub:ID` or an export's folder says; None of timm's own models.

    Raises:
        ConfigError: there is none, or it describes no model of timm.
    """
    kind, colon, place = name.partition(":")
    if Path(name).is_absolute():
        kind, colon, place = LOCAL, ":", name
    if not colon:
        return None
    try:
        if kind == LOCAL:
            path = Path(place) / "config.json"
        elif kind in ("hf-hub", "hf_hub"):
            from huggingface_hub import hf_hub_download

            own, _, revision = place.partition("@")
            path = hf_hub_download(own, "config.json", revision=revision or None)
        else:
            raise ConfigError(f"timm model {name!r}: before the colon goes hf-hub (an id of the Hub) or {LOCAL} (a folder)")
        described = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:  # the Hub's errors are of these
        reason = str(error).splitlines()[0]
        raise ConfigError(f"timm model {name!r}: there is no config.json that can be read ({reason})") from error
    if "architecture" not in described:
        raise ConfigError(f"timm model {name!r}: its config.json names no architecture of timm")
    return described


def make_timm_model(config: TimmConfig, arguments: dict) -> nn.Module:
    """Raises `ConfigError` where timm cannot make it so."""
    import timm

    name = f"{LOCAL}:{config.name}" if Path(config.name).is_absolute() else config.name
    sized = arguments | ({"img_size": config.image_size} if config.image_size else {})
    try:
        return timm.create_model(name, pretrained=config.pretrained, num_classes=0, **sized)
    except TypeError as error:
        if sized != arguments and "img_size" in str(error):  # only a model of patches is made for a size
            return make_timm_model(replace(config, image_size=0), arguments)
        raise ConfigError(f"timm model {config.name!r} does not take these arguments: {error}") from error
    except (RuntimeError, OSError, ValueError, AssertionError, SafetensorError) as error:
        reason = str(error) or f"{type(error).__name__}, {sized}"
        raise ConfigError(f"timm model {config.name!r} cannot be made: {reason}") from error


def load_timm_checkpoint(model: nn.Module, path: str) -> None:
    """Fills a timm model from a file; a classifier in it is left out.

    Raises:
        ConfigError: the file cannot be read, or its weights are not those of this model.
    """
    from timm.models import load_state_dict

    try:
        weights = load_state_dict(path)
        module = sys.modules[type(model).__module__]
        if hasattr(module, "checkpoint_filter_fn"):
            weights = module.checkpoint_filter_fn(weights, model)
        missing, left = model.load_state_dict(weights, strict=False)
    except Exception as error:  # of torch, safetensors, pickle or timm
        raise ConfigError(f"checkpoint {path!r} cannot be loaded ({type(error).__name__}: {error})") from error
    left = [name for name in left if not name.startswith("head")]
    if missing or left:
        problems = [f"lacks {name}" for name in missing] + [f"has {name}, which the model has not" for name in left]
        more = f", and {len(problems) - 3} more such" if len(problems) > 3 else ""
        raise ConfigError(f"checkpoint {path!r} is of another model: it {'; it '.join(problems[:3])}{more}")
