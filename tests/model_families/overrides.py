# SPDX-License-Identifier: Apache-2.0
"""By model type, what the names of fields do not tell about models beyond text: sizes that depend on each other."""

from typing import Any

from . import written_out

FAMILY_OVERRIDES: dict[str, dict[str, Any]] = {
    "audio-spectrogram-transformer": {"max_length": 64, "patch_size": 8, "frequency_stride": 4, "time_stride": 8},
    "bridgetower": {"num_hidden_layers": 2, "is_decoder": False},
    "bridgetower_text_model": {"is_decoder": False},
    "bridgetower_vision_model": {"hidden_size": 64},
    # Image tokens are spelled in letters; each number of the codebook has one.
    "chameleon": {"vocabulary_map": {"<image>": 50, **{f"IMGIMG{chr(65 + i)}Z": 3 + i for i in range(10)}}},
    "chameleon_vqgan": {
        "embed_dim": 16,
        "num_embeddings": 10,
        "latent_channels": 16,
        "resolution": 32,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
    },
    "diffusion_gemma_text": {"num_experts": 4, "top_k_experts": 2},
    "efficientloftr": {
        "stage_num_blocks": [1, 1, 1],
        "out_features": [16, 16, 32],
        "stage_stride": [2, 1, 2],
        "hidden_size": 32,
        "num_attention_layers": 1,
        "num_attention_heads": 8,
    },
    "emu3": {"vocabulary_map": {"<image>": 50}},
    "eomt": {"image_size": 32, "patch_size": 8, "num_upscale_blocks": 1, "num_queries": 5, "num_blocks": 1},
    "eomt_dinov3": {"image_size": 32, "patch_size": 8, "num_upscale_blocks": 1, "num_queries": 5, "num_blocks": 1},
    "moshi": {"num_codebooks": 4},
    "deepseek_ocr2_text": {"mlp_layer_types": ["dense", "sparse"]},
    "unlimited_ocr_text": {"mlp_layer_types": ["dense", "sparse"]},
    "esmc": {"num_key_value_heads": 4},
    "fun_asr_nano": {"adaptor_config": {"intermediate_size": 8}},
    "nemotron3_diarization_audio": {"num_key_value_heads": 4},
    "nemotron3_5_transcribe_asr_audio": {"num_key_value_heads": 4},
    "pp_doclayout_v3": {"x4_feat_dim": 16},
    "sam3_vision_model": {"backbone_feature_sizes": [[16, 16], [8, 8], [4, 4]]},
    "neucodec": {"quantization_dim": 64, "num_key_value_heads": 4},
    "xcodec2": {"quantization_dim": 64, "num_key_value_heads": 4},
    "mimi": {
        "num_filters": 4,
        "upsampling_ratios": [4, 2],
        "upsample_groups": 32,
        "codebook_size": 16,
        "codebook_dim": 8,
        "vector_quantization_hidden_dimension": 8,
        "num_quantizers": 4,
        "num_semantic_quantizers": 1,
    },
    "granite_speech5_encoder": {"context_size": 8, "num_key_value_heads": 4},
    "granite_speech5": {"context_size": 8, "num_key_value_heads": 4},
    "informer": {"prediction_length": 4, "context_length": 8, "lags_sequence": [1, 2], "num_time_features": 1},
    "time_series_transformer": {
        "prediction_length": 4,
        "context_length": 8,
        "lags_sequence": [1, 2],
        "num_time_features": 1,
    },
    "kyutai_speech_to_text": {"codebook_vocab_size": 40, "audio_pad_token_id": 3, "num_codebooks": 2},
    "lw_detr": {"group_detr": 1, "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4},
    "lw_detr_vit": {"num_windows": 4, "image_size": 32, "pretrain_image_size": 32, "patch_size": 4},
    "rf_detr": {"group_detr": 1, "decoder_self_attention_heads": 4, "decoder_cross_attention_heads": 4},
    "neomme": {"head_dim": 16},
    "patchtsmixer": {"self_attn": True, "d_model": 16, "self_attn_heads": 2},
    "segformer": {"hidden_sizes": [16, 16, 16, 16], "num_attention_heads": [2, 2, 2, 2], "sr_ratios": [2, 2, 1, 1]},
    "timesfm": {"head_dim": 8},
    "vitpose_backbone": {"num_experts": 1, "part_features": 0, "image_size": [32, 32], "patch_size": [8, 8]},
    "xlm-roberta": {},
}

_SAM = {"": "my_triton", "vision_config": "eager"}

# Where a part of a model chooses its attention classes from a table, that part is eager and the others are ours.
IMPLEMENTATIONS: dict[str, dict[str, str]] = {
    "SamModel": _SAM,
    "SamHQModel": _SAM,
    "DeepseekOcr2ForConditionalGeneration": {"": "eager", "text_config": "my_triton", "vision_config": "eager"},
    "UnlimitedOcrForConditionalGeneration": {"": "eager", "text_config": "my_triton", "vision_config": "eager"},
    "GitForCausalLM": {"": "eager", "vision_config": "my_triton"},
}

# Compared with attention over boolean masks, from which their own eager attention differs.
REFERENCES = {
    # Eager attention adds the boolean mask of the speech encoder to the scores.
    "SeamlessM4Tv2ForSpeechToText": written_out.NAME,
    # Eager attention's additive mask means its opposite to these: they negate it as if it were boolean.
    **dict.fromkeys(("ParakeetForRNNT", "ParakeetForTDT", "ParakeetForCTC"), written_out.NAME),
    "CanaryForConditionalGeneration": written_out.NAME,
    "CohereAsrForConditionalGeneration": written_out.NAME,
    "NemotronAsrStreamingForRNNT": written_out.NAME,
}

# Factors of the weights in a part of a model, where tokens are otherwise so alike that attention does not matter.
SHARPENED = {
    "PPOCRV5ServerRecForTextRecognition": ("head", 15.0),
    "PPOCRV5MobileRecForTextRecognition": ("head", 15.0),
    "MarkupLMForTokenClassification": ("word_embeddings", 20.0),
}

# How many times as large as 1 / sqrt(inputs) the weights of all layers are, where those that the model draws are so
# small that its scores are all alike, or that nothing but the residual stream reaches its outputs.
ENLIVENED = {
    "BridgeTowerForImageAndTextRetrieval": 1.0,
    "ConditionalDetrForObjectDetection": 1.0,
    "DetrForObjectDetection": 1.0,
    "FunAsrNanoEncoder": 1.0,
    "Kimi_K25VisionModel": 1.0,
    "MaskFormerForInstanceSegmentation": 1.0,
    "MimiModel": 1.0,
    "MiniCPMV4_6VisionModel": 1.0,
    "MiniCPMV4_7VisionModel": 1.0,
    "MoonshineStreamingEncoder": 1.0,
    "MuseGlimmerAssistantModel": 1.0,
    "Qwen3ASREncoder": 3.0,
    "VideoPrismForVideoClassification": 2.0,
}

# The class that is compared where the others hide what attention does: no random weights find points that match.
CHOSEN = {"efficientloftr": ["EfficientLoFTRModel"]}
