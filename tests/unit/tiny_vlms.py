"""Tiny models of transformers, with the layouts of the published ones."""

import json

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 300,
}
QWEN_IDS = {"image_token_id": 299, "video_token_id": 298, "vision_start_token_id": 297, "vision_end_token_id": 296}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
SIGLIP = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
LISTED = {
    "text_config": TEXT | {"model_type": "llama", "pad_token_id": 0},
    "vision_config": SIGLIP | {"image_size": 56, "patch_size": 14},
    "scale_factor": 2,
    "image_token_id": 299,
    "pad_token_id": 0,
}
VLMS = {
    "paligemma": {
        "text_config": TEXT | {"model_type": "gemma", "num_key_value_heads": 1},
        "vision_config": SIGLIP
        | {"model_type": "siglip_vision_model", "image_size": 56, "patch_size": 14, "vision_use_head": False},
        "projection_dim": 64,
        "image_token_index": 299,
    },
    "smolvlm": LISTED,
    "idefics3": LISTED,
    "qwen2_5_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE},
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "window_size": 56,
            "fullatt_block_indexes": [1],
        },
        **QWEN_IDS,
    },
    "qwen3_vl": {
        "text_config": TEXT | {"rope_parameters": ROPE | {"mrope_interleaved": True}},
        "vision_config": {
            "depth": 2,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "out_hidden_size": 64,
            "patch_size": 14,
            "deepstack_visual_indexes": [0, 1],
            "num_position_embeddings": 64,
        },
        **QWEN_IDS,
    },
}


def vlm_json(name: str) -> str:
    return json.dumps({"model_type": name} | VLMS[name])
