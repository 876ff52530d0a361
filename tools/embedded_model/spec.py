"""What the embedded model is: its config.json in the released layout, and its token ids."""

from typing import Any

SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", *(f"<SPECIAL_{index}>" for index in range(3, 20))]
"""The first twenty ids, as in the released tokenizer: 10 and 11 open turns, 12 ends one."""

IMAGE_TOKENS = ["<image>", "<img>", "</img>", "<video>"]
"""The last ids of the vocabulary."""

VOCAB_SIZE = 768

TILE = 288
"""Side of a tile in pixels. Pictures of generated documents have 256, so that their small print is
enlarged, and the position table is interpolated to any grid of patches."""


def make_config(tile: int = TILE) -> dict[str, Any]:
    """Return the embedded model's config.json.

    The geometry is the full-size one in small: tiles of 288 px give 81 tokens, and the language
    model has five Mamba2, five MLP and two attention layers. Vision sizes stand as override keys in
    ``vision_config.args``, where vLLM reads them too.

    Args:
        tile: Side of a tile in pixels; a multiple of 32.
    """
    first_image_token = VOCAB_SIZE - len(IMAGE_TOKENS)
    return {
        "architectures": ["NemotronH_Nano_VL_V2"],
        "model_type": "NemotronH_Nano_VL_V2",
        "torch_dtype": "bfloat16",
        "force_image_size": tile,
        "patch_size": 16,
        "downsample_ratio": 0.5,
        "ps_version": "v2",
        "image_tag_type": "internvl",
        "use_thumbnail": True,
        "max_num_tiles": 12,
        "template": "nemotron-h-5p5-reasoning",
        "vit_hidden_size": 256,
        "projector_hidden_size": 640,
        "img_context_token": "<image>",
        "img_context_token_id": first_image_token,
        "img_start_token": "<img>",
        "img_end_token": "</img>",
        "video_context_token": "<video>",
        "video_context_token_id": first_image_token + 3,
        "norm_mean": [0.48145466, 0.4578275, 0.40821073],
        "norm_std": [0.26862954, 0.26130258, 0.27577711],
        "llm_config": {
            "architectures": ["NemotronHForCausalLM"],
            "model_type": "nemotron_h",
            "torch_dtype": "bfloat16",
            "vocab_size": VOCAB_SIZE,
            "hidden_size": 256,
            "num_hidden_layers": 12,
            "hybrid_override_pattern": "M-M*-M-M*-M-",
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "intermediate_size": 1024,
            "mlp_hidden_act": "relu2",
            "mamba_num_heads": 8,
            "mamba_head_dim": 64,
            "ssm_state_size": 64,
            "n_groups": 2,
            "conv_kernel": 4,
            "chunk_size": 64,
            "mamba_hidden_act": "silu",
            "use_conv_bias": True,
            "attention_bias": False,
            "mlp_bias": False,
            "use_bias": False,
            "layer_norm_epsilon": 1e-05,
            "tie_word_embeddings": False,
            "max_position_embeddings": 4096,
            "time_step_min": 0.001,
            "time_step_max": 0.1,
            "time_step_limit": [0.0, "Infinity"],
            "bos_token_id": 1,
            "eos_token_id": 12,
            "pad_token_id": 0,
        },
        "vision_config": {
            "model_type": "radio",
            "patch_size": 16,
            "preferred_resolution": [tile, tile],
            "args": {
                "model": "vit_small_patch16_224",
                "hidden_size": 256,
                "num_hidden_layers": 6,
                "num_attention_heads": 4,
                "intermediate_size": 1024,
                "cpe_max_size": 512,
                "cls_token_per_teacher": True,
                "teachers": [{"name": "glyphs"}],
                "register_multiple": 4,
            },
        },
    }
