"""Small shapes of torchaudio's speech models, as their functions take them."""

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
