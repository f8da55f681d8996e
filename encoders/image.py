"""Image towers of timm and open_clip: a state a patch, or a place of the feature map, with the model's own preprocessing."""

from __future__ import annotations

import copy
import sys
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from metalm.data.images import decode_image
from metalm.encoders.base import Collated, Encoder, EncoderConfig, Processor
from metalm.errors import ConfigError
from metalm.registry import did_you_mean


@dataclass
class ImageProcessor(Processor):
    """Decodes to the tower's input size; a picture is one row of states."""

    image_size: int
    num_patches: int
    interpolation: str
    reads = frozenset({"image"})

    def num_states(self, inputs: dict) -> int:
        return self.num_patches

    def load(self, inputs: dict) -> dict:
        return {"image": decode_image(inputs["image"], self.image_size, self.interpolation, inputs.get("view"))}

    def collate(self, loaded: list[dict]) -> Collated:
        pixels = torch.stack([inputs["image"] for inputs in loaded])
        return Collated({"pixels_N3HW": pixels}, torch.arange(len(loaded) * self.num_patches))

    def blank(self) -> dict:
        return {"image": one_pixel_png()}


class ImageTower(Encoder):
    """What the towers of both libraries share: uint8 in, normalised on the device, patch states out."""

    name: str
    processor: ImageProcessor

    def set_pixel_statistics(self, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        self.register_buffer("pixel_mean", 255 * torch.tensor(mean)[:, None, None], persistent=False)
        self.register_buffer("pixel_std", 255 * torch.tensor(std)[:, None, None], persistent=False)

    def normalize(self, pixels_N3HW: Tensor) -> Tensor:
        """In float32, then as the weights are: buffers need not share their precision (under DeepSpeed they do not)."""
        pixels = (pixels_N3HW - self.pixel_mean) / self.pixel_std
        return pixels.to(next(self.model.parameters()).dtype)

    def checked(self, states_NPD: Tensor) -> Tensor:
        """The states, if they are one a patch: a tower that pools them would be read at the wrong places."""
        expected = (self.processor.num_patches, self.width)
        if states_NPD.shape[1:] != expected:
            raise ConfigError(
                f"{self.name!r} gives states of shape {tuple(states_NPD.shape[1:])} a picture, not one for each of its "
                f"patches {expected}: take a plain ViT, DeiT, BEiT or EVA, or a convolutional network"
            )
        return states_NPD


@dataclass(kw_only=True)
class TimmConfig(EncoderConfig):
    """`name` as in timm, e.g. `vit_small_patch16_224.augreg_in21k`; `image_size` 0 is the model's own.

    A convolutional network's states are the places of its last map of features: 7 x 7 of 224 x 224 pixels, or 14 x 14 with
    `arguments: {output_stride: 16}`. `arguments` go to `timm.create_model` as they are (depth, embed_dim, drop_path_rate, …),
    but for `checkpoint_path`: a file of weights, which may have a classifier, be of another image size, or of another layout
    that timm knows.
    """

    name: str
    pretrained: bool = False
    image_size: int = 0
    arguments: dict[str, int | float | bool | str] | None = None


class TimmEncoder(ImageTower):
    """Any timm model that gives patch states (ViT, DeiT, BEiT, EVA, …), without its class and register tokens, or a map of
    features (ResNet, RegNet, ConvNeXt, EfficientNet, …)."""

    Config = TimmConfig

    def __init__(self, config: TimmConfig):
        super().__init__()
        import timm

        self.name = config.name
        architecture = config.name.split(".")[0]
        if not set(":/") & set(config.name) and not timm.is_model(architecture):  # hf-hub:… and local-dir:… are others
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
            self.model.head = nn.Identity()
            with torch.no_grad():
                pixels = torch.zeros(1, 3, size, size, device="meta")
                num_states = copy.deepcopy(self.model).to("meta").eval().forward_features(pixels)[0, 0].numel()
        elif hasattr(self.model.patch_embed, "num_patches") and hasattr(self.model, "blocks"):
            self.model.fc_norm = nn.Identity()
            num_states = self.model.patch_embed.num_patches
        else:
            raise ConfigError(
                f"timm model {config.name!r} gives no patch states; take a ViT, DeiT, BEiT or EVA, or a convolutional network"
            )
        self.width = self.model.num_features
        self.skip = getattr(self.model, "num_prefix_tokens", 0)
        self.set_pixel_statistics(data["mean"], data["std"])
        self.processor = ImageProcessor(size, num_states, data["interpolation"])

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        x_N3HW = self.normalize(pixels_N3HW)
        if not self.convolutional:
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
        """As any module's; but frozen batch norms go on normalising by what they have learned."""
        super().train(mode)
        for norm in self.batch_norms():
            if not norm.weight.requires_grad:
                norm.eval()
        return self

    def layers(self) -> list[nn.Module]:
        if self.convolutional:
            return [self.model.get_submodule(stage["module"]) for stage in self.model.feature_info]
        blocks = self.model.blocks
        return [*blocks[:-1], nn.ModuleList([blocks[-1], self.model.norm])]


def make_timm_model(config: TimmConfig, arguments: dict) -> nn.Module:
    """Raises `ConfigError` where timm cannot make it so."""
    import timm

    sized = arguments | ({"img_size": config.image_size} if config.image_size else {})
    try:
        try:
            return timm.create_model(config.name, pretrained=config.pretrained, num_classes=0, **sized)
        except TypeError as error:
            if sized == arguments or "img_size" not in str(error):
                raise
        # Only a model of patches is made for a size.
        return timm.create_model(config.name, pretrained=config.pretrained, num_classes=0, **arguments)
    except TypeError as error:
        raise ConfigError(f"timm model {config.name!r} does not take these arguments: {error}") from error
    except (RuntimeError, OSError, ValueError, AssertionError) as error:
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


@dataclass(kw_only=True)
class OpenClipConfig(EncoderConfig):
    """`name` as in open_clip, e.g. `ViT-B-32`; `pretrained` a tag (`laion2b_s34b_b79k`), a checkpoint file, or empty."""

    name: str
    pretrained: str = ""
    image_size: int = 0


class OpenClipEncoder(ImageTower):
    """The visual tower of an open_clip model: its patch states before pooling and projection."""

    Config = OpenClipConfig

    def __init__(self, config: OpenClipConfig):
        super().__init__()
        import open_clip

        names = open_clip.list_models()
        if config.name not in names:
            raise ConfigError(f"open_clip has no model {config.name!r}{did_you_mean(config.name, names)}")
        self.name = config.name
        size = {"force_image_size": config.image_size} if config.image_size else {}
        try:
            visual = open_clip.create_model(
                config.name, pretrained=config.pretrained or None, device=torch.get_default_device(), **size
            ).visual
        except (RuntimeError, OSError, ValueError) as error:
            raise ConfigError(f"open_clip model {config.name!r} cannot be made: {error}") from error
        if not isinstance(visual, open_clip.transformer.VisionTransformer):
            raise ConfigError(f"open_clip tower {config.name!r} is no plain ViT; for timm towers use type: timm")
        visual.output_tokens = True
        visual.proj = None  # projects the pooled vector only, which is not used
        self.model = visual
        self.width = visual.conv1.out_channels
        self.set_pixel_statistics(visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"])
        num_patches = visual.grid_size[0] * visual.grid_size[1]
        self.processor = ImageProcessor(visual.image_size[0], num_patches, visual.preprocess_cfg["interpolation"])

    def forward(self, pixels_N3HW: Tensor) -> Tensor:
        return self.checked(self.model(self.normalize(pixels_N3HW))[1])

    def layers(self) -> list[nn.Module]:
        blocks = self.model.transformer.resblocks
        return [*blocks[:-1], nn.ModuleList([blocks[-1], self.model.ln_post])]


def one_pixel_png() -> bytes:
    import io

    from PIL import Image

    out = io.BytesIO()
    Image.new("RGB", (1, 1)).save(out, "PNG")
    return out.getvalue()
