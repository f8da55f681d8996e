"""Bidirectional encoders, by name; installed packages add theirs under the entry-point group `metalm.encoders`."""

from metalm.registry import Registry

ENCODERS = Registry(
    "encoder",
    group="metalm.encoders",
    builtin={
        "text": "metalm.encoders.text:TextEncoder",
        "causal": "metalm.encoders.causal:CausalEncoder",
        "fused": "metalm.encoders.fused:FusedEncoder",
        "two_tower": "metalm.encoders.two_tower:TwoTowerEncoder",
        "vit": "metalm.encoders.vit:ViT",
        "log_mel": "metalm.encoders.log_mel:LogMelEncoder",
        "speech": "metalm.encoders.speech:SpeechEncoder",
        "video": "metalm.encoders.video:VideoEncoder",
        "transformers": "metalm.encoders.transformers_text:TransformersEncoder",
        "timm": "metalm.encoders.timm_tower:TimmEncoder",
        "naflex": "metalm.encoders.naflex:NaFlexEncoder",
        "open_clip": "metalm.encoders.open_clip_tower:OpenClipEncoder",
    },
)
