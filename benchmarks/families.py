"""The families whose published weights METALM loads, each as a small checkpoint in its real format.

A family makes its public implementation with random weights, has it saved as published ones are, and opens it again: as METALM
would build it, as METALM loads it. Then both are asked the same. A family is an entry of `FAMILIES`; a kind of family is a
class.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.text_checkpoints import TEXTS, make_model, save_checkpoint

SHAPE = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 48}
SHAPE |= {"vocab_size": 61, "max_position_embeddings": 128, "bos_token_id": 0, "eos_token_id": 60, "pad_token_id": None}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 128, "vocab_size": 61, "bos_token_id": 0, "eos_token_id": 60}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
# Rows of the bench are longer than these windows; the caps are low enough to bend the scores of a model so small.
GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 24, "sliding_window": 16}
GEMMA2 |= {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0}
GEMMA3 = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 16}
GEMMA3 |= {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
GEMMA3["rope_parameters"] = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 4.0},
}
# As torchaudio's functions take them.
WAV2VEC2 = {
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [[16, 10, 5], [16, 3, 2], [16, 3, 2]],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 16,
    "encoder_projection_dropout": 0.0,
    "encoder_pos_conv_kernel": 8,
    "encoder_pos_conv_groups": 2,
    "encoder_num_layers": 3,
    "encoder_num_heads": 2,
    "encoder_attention_dropout": 0.0,
    "encoder_ff_interm_features": 32,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.0,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,
    "aux_num_out": None,
}
WAV2VEC2_LARGE = WAV2VEC2 | {"extractor_mode": "layer_norm", "encoder_layer_norm_first": True}
WAVLM = WAV2VEC2 | {"encoder_max_distance": 800, "encoder_num_buckets": 32}
WAVLM_LARGE = WAV2VEC2_LARGE | {"encoder_max_distance": 800, "encoder_num_buckets": 32}
NEW_TOKENS = 64


@dataclass
class Family(ABC):
    """One row of the table.

    Attributes:
        kind: what METALM makes of it.
        format: how its checkpoints are written.
    """

    name: str
    kind: ClassVar[str]
    format: ClassVar[str]

    @abstractmethod
    def make(self) -> nn.Module:
        """The public implementation."""

    @abstractmethod
    def save(self, theirs: nn.Module, folder: Path) -> None:
        """Writes its checkpoint."""

    @abstractmethod
    def build(self, folder: Path) -> nn.Module:
        """METALM's, without the weights."""

    @abstractmethod
    def load(self, folder: Path) -> nn.Module:
        """METALM's, with the checkpoint's weights."""

    @abstractmethod
    def answers(self, theirs: nn.Module, ours: nn.Module) -> tuple[Tensor, Tensor]:
        """The states, or logits, of both for the same input."""

    def same_text(self, theirs: nn.Module, ours: nn.Module) -> bool | None:
        """Whether both write the same; None where they write nothing."""
        return None


def draw(model: nn.Module) -> nn.Module:
    """New weights around the model's own: biases, norms and statistics that do nothing would prove nothing."""
    torch.manual_seed(0)
    for name, tensor in model.state_dict().items():
        if "running_var" in name:
            tensor += torch.rand(tensor.shape)
        elif tensor.is_floating_point():
            tensor += 0.05 * torch.randn(tensor.shape)
    return model.eval()


@dataclass
class Decoder(Family):
    """A decoder of transformers; `family` as in the names of its classes."""

    family: str
    shape: dict[str, Any] = field(repr=False)
    kind: ClassVar[str] = "decoder"
    format: ClassVar[str] = "transformers, safetensors"

    def make(self) -> nn.Module:
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, {"Gemma3": "Gemma3TextConfig"}.get(self.family, f"{self.family}Config"))(**self.shape)
        model = getattr(transformers, "GPT2LMHeadModel" if self.family == "GPT2" else f"{self.family}ForCausalLM")(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.3)
        return model.eval()

    def save(self, theirs: nn.Module, folder: Path) -> None:
        theirs.save_pretrained(folder)

    def build(self, folder: Path) -> nn.Module:
        from metalm.config import build
        from metalm.interop.decoders import read_config
        from metalm.model import MetaLM, MetaLMConfig

        return MetaLM(build(MetaLMConfig, {"decoder": read_config(folder)[1]}, str(folder))).eval()

    def load(self, folder: Path) -> nn.Module:
        from metalm.pretrained import load_foreign

        model = self.build(folder)
        load_foreign(model.decoder, folder)
        return model

    def answers(self, theirs: nn.Module, ours: nn.Module) -> tuple[Tensor, Tensor]:
        tokens_BT = torch.randint(1, 60, (2, 90), generator=torch.Generator().manual_seed(1))
        return theirs(tokens_BT).logits, logits_of(ours.decoder, tokens_BT)

    def same_text(self, theirs: nn.Module, ours: nn.Module) -> bool:
        from metalm.inference.generate import GenerationConfig, generate
        from metalm.segments import Document, Text

        prompts_BT = torch.randint(1, 60, (8, 7), generator=torch.Generator().manual_seed(2))  # some repeat themselves soon
        options = {"max_new_tokens": NEW_TOKENS, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        written = theirs.generate(prompts_BT, **options)[:, prompts_BT.shape[1] :].tolist()
        documents = [Document([Text(prompt)]) for prompt in prompts_BT.tolist()]
        own = generate(ours, documents, end=-1, config=GenerationConfig(NEW_TOKENS))
        return own == written and {len(text) for text in own} == {NEW_TOKENS}


def logits_of(decoder: nn.Module, tokens_BT: Tensor) -> Tensor:
    position_BT = torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)
    return decoder.logits(decoder(decoder.embed(tokens_BT), position_BT))


class Encoder(Family):
    """What is METALM's by a configuration without weights, `plain`, and one with them."""

    def build(self, folder: Path) -> nn.Module:
        return make_encoder(self.plain())

    def load(self, folder: Path) -> nn.Module:
        return make_encoder(self.pretrained(folder))

    @abstractmethod
    def plain(self) -> dict:
        """The encoder's configuration."""

    @abstractmethod
    def pretrained(self, folder: Path) -> dict:
        """The same, that starts from the checkpoint."""


def make_encoder(values: dict) -> nn.Module:
    from metalm.config import build
    from metalm.encoders import ENCODERS

    cls = ENCODERS[values["type"]]
    return cls(build(cls.Config, values, "parity")).eval()


def picture(size: int) -> Tensor:
    return torch.randint(256, (2, 3, size, size), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def normalised(pixels_N3HW: Tensor, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """As both libraries do it."""
    return (pixels_N3HW / 255 - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]


@dataclass
class TimmTower(Encoder):
    """An image tower of timm, for pictures of `size`; `shape` goes to `timm.create_model`."""

    model: str
    size: int
    shape: dict[str, Any] = field(default_factory=dict, repr=False)
    kind: ClassVar[str] = "image encoder"
    format: ClassVar[str] = "timm, safetensors"

    def make(self) -> nn.Module:
        import timm

        return draw(timm.create_model(self.model, **self.shape))

    def save(self, theirs: nn.Module, folder: Path) -> None:
        from timm.models import save_for_hf

        save_for_hf(theirs, str(folder), safe_serialization=True, model_args=self.shape)

    def plain(self) -> dict:
        return {"type": "timm", "name": self.model, "image_size": self.size, "arguments": self.shape}

    def pretrained(self, folder: Path) -> dict:
        return {"type": "timm", "name": f"local-dir:{folder}", "image_size": self.size, "pretrained": True}

    def answers(self, theirs: nn.Module, ours: nn.Module) -> tuple[Tensor, Tensor]:
        pixels = picture(self.size)
        states = theirs.forward_features(normalised(pixels, theirs.pretrained_cfg["mean"], theirs.pretrained_cfg["std"]))
        if states.ndim == 4:
            return states.flatten(2).transpose(1, 2), ours(pixels)
        return states[:, theirs.num_prefix_tokens :], ours(pixels)


@dataclass
class OpenClipTower(Encoder):
    """The image tower of an open_clip model, for pictures of `size`."""

    model: str
    size: int
    kind: ClassVar[str] = "image encoder"
    format: ClassVar[str] = "open_clip, safetensors"

    def make(self) -> nn.Module:
        import open_clip

        return draw(open_clip.create_model(self.model, force_image_size=self.size))

    def save(self, theirs: nn.Module, folder: Path) -> None:
        import open_clip
        from open_clip.push_to_hf_hub import save_for_hf
        from transformers import PreTrainedTokenizerFast

        from metalm.data.tokenizer import Tokenizer

        tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.train(["a picture"], 300).backend)  # which is not read
        save_for_hf(theirs, tokenizer, open_clip.get_model_config(self.model), str(folder), safe_serialization=True)

    def plain(self) -> dict:
        return {"type": "open_clip", "name": self.model, "image_size": self.size}

    def pretrained(self, folder: Path) -> dict:
        return self.plain() | {"pretrained": str(folder / "open_clip_model.safetensors")}

    def answers(self, theirs: nn.Module, ours: nn.Module) -> tuple[Tensor, Tensor]:
        pixels, visual = picture(self.size), theirs.visual
        visual.output_tokens = True
        return visual(normalised(pixels, visual.preprocess_cfg["mean"], visual.preprocess_cfg["std"]))[1], ours(pixels)


@dataclass
class Speech(Encoder):
    """A speech model of torchaudio: a function of `torchaudio.models`, and what goes to it."""

    model: str
    shape: dict[str, Any] = field(default_factory=dict, repr=False)
    kind: ClassVar[str] = "sound encoder"
    format: ClassVar[str] = "torchaudio, .pth"

    def make(self) -> nn.Module:
        import torchaudio

        return draw(getattr(torchaudio.models, self.model)(**self.shape))

    def save(self, theirs: nn.Module, folder: Path) -> None:
        torch.save(theirs.state_dict(), folder / "model.pth")

    def plain(self) -> dict:
        return {"type": "speech", "name": self.model, "arguments": self.shape}

    def pretrained(self, folder: Path) -> dict:
        return self.plain() | {"pretrained": str(folder / "model.pth")}

    def answers(self, theirs: nn.Module, ours: nn.Module) -> tuple[Tensor, Tensor]:
        wave_T = 0.1 * torch.randn(8000, generator=torch.Generator().manual_seed(1))
        loaded = ours.processor.load({"audio": encode(wave_T)})
        collated = ours.processor.collate([loaded])
        return theirs(loaded["audio"][None])[0].flatten(0, 1), ours(**collated.inputs).flatten(0, 1)[collated.source]


@dataclass
class TextEncoder(Encoder):
    """An encoder of text of transformers; `family` as in `text_checkpoints.FAMILIES`."""

    family: str
    kind: ClassVar[str] = "text encoder"
    format: ClassVar[str] = "transformers, safetensors"

    def make(self) -> nn.Module:
        return make_model(self.family)

    def save(self, theirs: nn.Module, folder: Path) -> None:
        save_checkpoint(theirs, self.family, folder)

    def build(self, folder: Path) -> nn.Module:
        return make_encoder({"type": "transformers", "name": str(folder)})

    def plain(self) -> dict:
        return {"type": "transformers"}

    def pretrained(self, folder: Path) -> dict:
        return self.plain() | {"name": str(folder), "pretrained": True}

    def answers(self, theirs: nn.Module, ours: nn.Module) -> tuple[Tensor, Tensor]:
        loaded = [ours.processor.load({"text": text}) for text in TEXTS[:3]]
        collated = ours.processor.collate(loaded)
        states = [theirs(torch.tensor([one["tokens"]])).last_hidden_state[0] for one in loaded]
        return torch.cat(states), ours(**collated.inputs).flatten(0, 1)[collated.source]


def encode(wave_T: Tensor) -> bytes:
    from metalm.data.audio import encode_wav

    return encode_wav(wave_T, 16000)


FAMILIES: list[Family] = [
    Decoder("GPT-2", "GPT2", GPT2),
    Decoder("Llama", "Llama", SHAPE),
    Decoder("Llama 3", "Llama", SHAPE | {"rope_parameters": LLAMA3}),
    Decoder("Mistral", "Mistral", SHAPE | {"head_dim": 16, "sliding_window": None}),
    Decoder("Qwen2", "Qwen2", SHAPE | {"rms_norm_eps": 1e-5}),
    Decoder("Qwen3", "Qwen3", SHAPE | {"head_dim": 16, "tie_word_embeddings": True}),
    Decoder("Gemma", "Gemma", SHAPE | {"head_dim": 16}),
    Decoder("Gemma 2", "Gemma2", SHAPE | GEMMA2),
    Decoder("Gemma 3", "Gemma3", SHAPE | GEMMA3),
    TimmTower("ViT", "vit_tiny_patch16_224", 224, {"depth": 3, "embed_dim": 24}),
    TimmTower("DeiT", "deit_tiny_distilled_patch16_224", 224, {"depth": 3, "embed_dim": 24}),
    TimmTower("BEiT", "beit_base_patch16_224", 224, {"depth": 3, "embed_dim": 24, "num_heads": 2}),
    TimmTower("EVA", "eva02_tiny_patch14_224", 224, {"depth": 3}),
    TimmTower("ResNet", "resnet18", 64),
    TimmTower("ConvNeXt", "convnext_atto", 64),
    OpenClipTower("CLIP's ViT", "ViT-S-32-alt", 64),
    TextEncoder("BERT, MiniLM", "bert"),
    TextEncoder("RoBERTa", "roberta"),
    TextEncoder("XLM-R", "xlm-roberta"),
    TextEncoder("ELECTRA", "electra"),
    TextEncoder("DeBERTa-v3", "deberta-v2"),
    TextEncoder("MPNet", "mpnet"),
    Speech("wav2vec 2.0", "wav2vec2_model", WAV2VEC2),
    Speech("HuBERT", "hubert_base"),
    Speech("WavLM", "wavlm_model", WAVLM),
]
