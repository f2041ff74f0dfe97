"""Alibaba's Qwen-Image in its full size; it has no replica yet."""

from __future__ import annotations

from pytest_diffopt.replicas.description import Architecture, Published

HUB_ID = "Qwen/Qwen-Image"

ARCHITECTURE = Architecture(
    pipeline_class="QwenImagePipeline",
    classes={
        "transformer": "diffusers.QwenImageTransformer2DModel",
        "vae": "diffusers.AutoencoderKLQwenImage",
        "scheduler": "diffusers.FlowMatchEulerDiscreteScheduler",
        "text_encoder": "transformers.Qwen2_5_VLForConditionalGeneration",
        "tokenizer": "transformers.Qwen2Tokenizer",
    },
    shared={
        "transformer": {
            "patch_size": 2,
            "attention_head_dim": 128,
            "axes_dims_rope": (16, 56, 56),
            "guidance_embeds": False,
        },
        "vae": {"z_dim": 16},
        "scheduler": {
            "base_image_seq_len": 256,
            "max_image_seq_len": 8192,
            "base_shift": 0.5,
            "max_shift": 0.9,
            "num_train_timesteps": 1000,
            "shift": 1.0,
            "shift_terminal": 0.02,
            "time_shift_type": "exponential",
            "use_dynamic_shifting": True,
        },
        "tokenizer": {"max_length": 131072},
    },
)

_TRANSFORMER = {
    "in_channels": 64,
    "out_channels": 16,
    "joint_attention_dim": 3584,
    "num_attention_heads": 24,
    "num_layers": 60,
}

_VAE = {
    "base_dim": 96,
    "dim_mult": [1, 2, 4, 4],  # a list, which the class adds to
    "num_res_blocks": 2,
    "attn_scales": [],
    "temperal_downsample": [False, True, True],
    "dropout": 0.0,
}

_TEXT_ENCODER = {
    "image_token_id": 151655,
    "video_token_id": 151656,
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "tie_word_embeddings": False,
    "text_config": {
        "attention_dropout": 0.0,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "hidden_act": "silu",
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "max_position_embeddings": 128000,
        "max_window_layers": 28,
        "model_type": "qwen2_5_vl_text",
        "num_attention_heads": 28,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"},
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "tie_word_embeddings": False,
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": 152064,
    },
    "vision_config": {
        "depth": 32,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "hidden_act": "silu",
        "hidden_size": 1280,
        "in_channels": 3,
        "intermediate_size": 3420,
        "model_type": "qwen2_5_vl",
        "num_heads": 16,
        "out_hidden_size": 3584,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "tokens_per_second": 2,
        "window_size": 112,
    },
}

FULL_SIZES = (
    ARCHITECTURE.sized(
        "qwen-image",
        {
            "transformer": Published(
                _TRANSFORMER, "kohya-ss/musubi-tuner: src/musubi_tuner/qwen_image/qwen_image_model.py", "bfloat16"
            ),
            "vae": Published(
                _VAE,
                "huggingface/diffusers: src/diffusers/models/autoencoders/autoencoder_kl_qwenimage.py",
                "bfloat16",
            ),
            "scheduler": Published(
                {},
                "Haoming02/sd-webui-forge-classic: backend/huggingface/Qwen/Qwen-Image/scheduler/scheduler_config.json",
            ),
            "text_encoder": Published(
                _TEXT_ENCODER, "modelscope/DiffSynth-Studio: diffsynth/models/qwen_image_text_encoder.py", "bfloat16"
            ),
        },
        hub_id=HUB_ID,
        default_size=(1024, 1024),
    ),
)
