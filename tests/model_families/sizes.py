# SPDX-License-Identifier: Apache-2.0
"""Sizes of tiny models, by the names of config fields; and, by model type, what the names do not tell."""

VOCAB_SIZE = 61
SLIDING_WINDOW = 5  # shorter than every test sequence, so that the window hides keys

# Field name -> value, set wherever the config class has a field of that name.
SIZES = {
    # widths
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "intermediate_size": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "head_dim": 8,
    "embedding_size": 32,
    # layers and heads
    "num_hidden_layers": 2,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "num_layers": 2,
    "n_layer": 2,
    "num_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "attention_heads": 4,
    "n_head": 4,
    "num_key_value_heads": 2,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "swa_head_dim": 8,
    # vocabulary and positions
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
    "n_positions": 64,
    "pronunciation_vocab_size": VOCAB_SIZE,
    "shape_vocab_size": VOCAB_SIZE,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # windows
    "sliding_window": SLIDING_WINDOW,
    "sliding_window_size": SLIDING_WINDOW,
    "attention_window_size": SLIDING_WINDOW,
    "use_sliding_window": True,
    "max_window_layers": 1,
    "attention_chunk_size": 6,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "moe_num_experts": 4,
    "moe_num_shared_experts": 1,
    "num_shared_experts": 1,
    "n_shared_experts": 1,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "expert_ffn_hidden_size": 16,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "zero_expert_num": 2,
    "ffn_hidden_size": 48,
    # multi-head latent attention: query/key dim 16, value dim 12
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    # linear-attention and state-space layers between the attention layers of hybrids
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_heads": 4,
    "linear_head_dim": 8,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "n_mamba_heads": 2,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 8,
    "ssm_state_size": 8,
    "chunk_size": 8,
    "n_groups": 2,
    # per-layer embeddings of gemma
    "vocab_size_per_layer_input": VOCAB_SIZE,
    "hidden_size_per_layer_input": 8,
    "global_head_dim": 8,
    "laurel_rank": 8,
    # weights large enough that attention is far from uniform, and a wrong mask shows
    "initializer_range": 0.2,
    "query_pre_attn_scalar": 8,
    "init_std": 0.2,
    # runs must repeat
    "attention_dropout": 0.0,
    "attention_probs_dropout_prob": 0.0,
    "attn_pdrop": 0.0,
    "resid_pdrop": 0.0,
    "embd_pdrop": 0.0,
    "hidden_dropout_prob": 0.0,
    "hidden_dropout": 0.0,
    "dropout": 0.0,
    "activation_dropout": 0.0,
    "decoder_layerdrop": 0.0,
    "layerdrop": 0.0,
    "is_decoder": True,
    # sparse attention: fewer keys than the sequences have
    "index_topk": 4,
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_block_size": 4,
    "index_topk_blocks": 2,
}

# What the field names do not tell.
OVERRIDES = {
    # The published cap of 50 is linear over tiny scores; this one bends them.
    "gemma2": {"attn_logit_softcapping": 1.5},
    "vaultgemma": {"attn_logit_softcapping": 1.5},
    # By default no layer is an attention layer, or the period of attention layers is longer than two layers.
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    # Attention layers share their weights, and loading asks for at least two of them.
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    # The first layer types must differ from those that share keys with them.
    "gemma3n_text": {
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_kv_shared_layers": 2,
    },
    # The class asks for exactly one expert per token.
    "zaya": {"num_experts_per_tok": 1, "layer_types": ["hybrid_sliding", "hybrid"], "router_hidden_size": 16},
    # Sizes live in sub-configs, and the default attention config lacks `rope_theta` and a clip value.
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
        "n_heads": 4,
        "n_layers": 2,
    },
    # Rotary parameters are stated per layer type, and there is no default.
    "cohere_compass_text": {
        "rope_parameters": {
            layer_type: {"rope_type": "default", "rope_theta": 10000.0}
            for layer_type in ("sliding_attention", "full_attention")
        }
    },
    # Layers that run once, layers that run twice with a cache for each time, layers that run once.
    "dory": {
        "num_hidden_layers": 4,
        "n_input_layers": 1,
        "n_output_layers": 1,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    # The sides of a box are embedded in parts of the hidden size.
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8, "input_size": 32, "patch_size": 16},
    # Part of a head turns, and the default is more than these heads have.
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    # The window is half of `local_attention`.
    "modernbert-decoder": {"local_attention": 2 * SLIDING_WINDOW},
    # The adapter of a language is chosen in the config when the input does not name one.
    "xmod": {"default_language": "en_XX"},
}

# ---------------------------------------------------------------------- beyond text: used by `configs.py`

# Token ids with a meaning, above those that tests draw.
SPECIAL_TOKENS = {
    "image_token_id": 50,
    "image_token_index": 50,
    "video_token_id": 51,
    "video_token_index": 51,
    "audio_token_id": 52,
    "audio_token_index": 52,
    "vision_start_token_id": 53,
    "image_start_token_id": 53,
    "boi_token_id": 53,
    "boi_token_index": 53,
    "vision_end_token_id": 54,
    "image_end_token_id": 54,
    "eoi_token_id": 54,
    "eoi_token_index": 54,
    "audio_start_token_id": 55,
    "boa_token_id": 55,
    "audio_bos_token_id": 55,
    "audio_end_token_id": 56,
    "eoa_token_id": 56,
    "eoa_token_index": 56,
    "audio_eos_token_id": 56,
    "video_start_token_id": 57,
    "video_end_token_id": 58,
    "mask_token_id": 59,
    "sep_token_id": 2,
    "decoder_start_token_id": 1,
    "cls_token_id": 1,
    "blank_token_id": 0,
}

# Config fields that hold one value for each stage or layer.
LISTS = {
    "depths": lambda stages: [1] * stages,
    "num_heads": lambda stages: [2] * stages,
    "hidden_sizes": lambda stages: [16] * stages,
    "conv_dim": lambda layers: [16] * layers,
    "num_attention_heads": lambda stages: [2] * stages,
    "patch_sizes": lambda stages: [3] * stages,
    "stage_numb_of_layers": lambda stages: [1] * stages,
    "stage_num_blocks": lambda stages: [1] * stages,
    "stem_channels": lambda stages: [3] + [8] * (stages - 1),
    "stage_in_channels": lambda stages: [8] + [16] * (stages - 1),
    "stage_mid_channels": lambda stages: [8] * stages,
    "stage_out_channels": lambda stages: [16] * stages,
    "decoder_in_channels": lambda stages: [32] * stages,
    "encoder_in_channels": lambda stages: [16] * stages,
    "tdnn_dim": lambda layers: [16] * layers,
}

# How rotary frequencies are shared between time, height and width: half a head of 8.
MROPE_SECTION = [2, 1, 1]
WITH_MROPE = """
    qwen2_vl_text qwen2_5_vl_text glm4v_text glm_ocr_text qwen2_5_omni_text qwen2_5_omni_talker paddleocr_vl_text
    hunyuan_vl_text
""".split()

FAMILY_SIZES = {
    # images
    "image_size": 32,
    "patch_size": 8,
    "depth": 2,
    "num_heads": 4,
    "embed_dim": 32,
    "projection_dim": 32,
    "out_hidden_size": 32,
    "mlp_dim": 48,
    "num_queries": 5,
    "num_position_embeddings": 16,
    "encoder_hidden_dim": 32,
    "decoder_hidden_size": 32,
    "decoder_intermediate_size": 48,
    "decoder_num_attention_heads": 4,
    "decoder_num_hidden_layers": 2,
    "encoder_num_hidden_layers": 2,
    "encoder_num_attention_heads": 4,
    "encoder_num_key_value_heads": 4,
    "decoder_num_key_value_heads": 4,
    "num_decoder_layers": 2,
    "projector_hidden_size": 32,
    "output_hidden_size": 32,
    "hidden_dim": 48,
    # audio
    "num_mel_bins": 16,
    "max_source_positions": 32,
    "text_hidden_size": 32,
    "audio_hidden_size": 32,
    "condition_dim": 32,
    "mm_tokens_per_image": 4,
    "output_channels": 32,
    "num_pos_feats": 16,
    "frames_per_clip": 4,
    "num_frames": 4,
    "crop_size": 32,
    "pred_hidden_size": 32,
    "pred_num_attention_heads": 4,
    "pred_num_hidden_layers": 1,
    "num_pooler_layers": 1,
    "memory_attention_hidden_size": 32,
    "fpn_hidden_size": 32,
    "iou_head_hidden_dim": 32,
    "num_input_channels": 2,
    "context_length": 32,
    "patch_length": 8,
    "horizon_length": 8,
    "prediction_length": 4,
    "classifier_dropout": 0.0,
    "patch_embed_hidden_size": 48,
    "image_seq_length": 16,
    "adapter_input_size": 32,
    "speech_encoder_layers": 1,
    "speech_encoder_attention_heads": 4,
    "speech_encoder_intermediate_size": 48,
    "t2u_encoder_layers": 1,
    "t2u_encoder_ffn_dim": 48,
    "t2u_encoder_attention_heads": 4,
    "t2u_decoder_layers": 1,
    "t2u_decoder_ffn_dim": 48,
    "t2u_decoder_attention_heads": 4,
    "feature_projection_input_dim": 16,
    "max_target_positions": 64,
    "classifier_proj_size": 16,
    "num_conv_pos_embedding_groups": 2,
    "num_conv_pos_embeddings": 8,
    # relative positions
    "d_kv": 8,
    "d_ff": 48,
}
