"""The published shapes of models that recipes name.

{model: (config.json, as far as sizes depend on it; billions of parameters, as its page or report counts them, with the vision
tower where there is one; public files that have the shape)}.
"""

_QWEN3 = {"model_type": "qwen3", "vocab_size": 151936, "head_dim": 128, "num_key_value_heads": 8,
          "max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "rope_theta": 1000000, "eos_token_id": 151645}  # fmt: skip
_LLAMA3 = {"model_type": "llama", "vocab_size": 128256, "num_key_value_heads": 8, "max_position_embeddings": 131072,
           "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "bos_token_id": 128000,
           "eos_token_id": [128001, 128008, 128009]}  # fmt: skip
_SCALED = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}


def _shape(hidden_size, intermediate_size, num_hidden_layers, num_attention_heads):
    return {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "num_hidden_layers": num_hidden_layers,
            "num_attention_heads": num_attention_heads}  # fmt: skip


_TORCHTUNE = "pytorch/torchtune: torchtune/models"
_CONFIGS = "citsjtu2020/LLM-Prof: sglang/Model_Config.md"

SHAPES = {
    "Qwen/Qwen3-0.6B": (
        {**_QWEN3, **_shape(1024, 3072, 28, 16), "tie_word_embeddings": True},
        0.596,
        f"{_TORCHTUNE}/qwen3/_model_builders.py",
    ),
    "Qwen/Qwen3-4B": (
        {**_QWEN3, **_shape(2560, 9728, 36, 32), "tie_word_embeddings": True},
        4.02,
        f"{_TORCHTUNE}/qwen3/_model_builders.py; {_CONFIGS}",
    ),
    "Qwen/Qwen3-8B": (
        {**_QWEN3, **_shape(4096, 12288, 36, 32), "tie_word_embeddings": False},
        8.19,
        f"{_TORCHTUNE}/qwen3/_model_builders.py; {_CONFIGS}",
    ),
    "Qwen/Qwen3-14B": (
        {**_QWEN3, **_shape(5120, 17408, 40, 40), "tie_word_embeddings": False},
        14.77,
        f"{_TORCHTUNE}/qwen3/_model_builders.py; {_CONFIGS}",
    ),
    "Qwen/Qwen3-32B": (
        {**_QWEN3, **_shape(5120, 25600, 64, 64), "tie_word_embeddings": False},
        32.8,
        f"{_TORCHTUNE}/qwen3/_model_builders.py",
    ),
    "meta-llama/Llama-3.3-70B-Instruct": (
        {**_LLAMA3, **_shape(8192, 28672, 80, 64), "head_dim": 128, "rope_scaling": {**_SCALED, "factor": 8.0},
         "tie_word_embeddings": False},
        70.6,
        f"{_TORCHTUNE}/llama3_3/_model_builders.py",
    ),
    "meta-llama/Llama-3.2-1B-Instruct": (
        {**_LLAMA3, **_shape(2048, 8192, 16, 32), "head_dim": 64, "rope_scaling": {**_SCALED, "factor": 32.0},
         "tie_word_embeddings": True},
        1.24,
        f"{_TORCHTUNE}/llama3_2/_model_builders.py",
    ),
    "meta-llama/Llama-3.2-3B-Instruct": (
        {**_LLAMA3, **_shape(3072, 8192, 28, 24), "head_dim": 128, "rope_scaling": {**_SCALED, "factor": 32.0},
         "tie_word_embeddings": True},
        3.21,
        f"{_TORCHTUNE}/llama3_2/_model_builders.py; {_CONFIGS}",
    ),
    "meta-llama/Llama-3.1-8B-Instruct": (
        {**_LLAMA3, **_shape(4096, 14336, 32, 32), "rope_scaling": {**_SCALED, "factor": 8.0}, "tie_word_embeddings": False},
        8.03,
        f"{_TORCHTUNE}/llama3_1/_model_builders.py; {_CONFIGS}",
    ),
    "meta-llama/Llama-2-7b-hf": (
        {"model_type": "llama", **_shape(4096, 11008, 32, 32), "vocab_size": 32000, "max_position_embeddings": 4096,
         "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
        6.738,
        f"{_TORCHTUNE}/llama2/_model_builders.py",
    ),
    "Qwen/Qwen2.5-7B-Instruct": (
        {"model_type": "qwen2", **_shape(3584, 18944, 28, 28), "num_key_value_heads": 4, "vocab_size": 152064,
         "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "tie_word_embeddings": False},
        7.616,
        _CONFIGS,
    ),
    "google/gemma-3-4b-it": (
        {
            "model_type": "gemma3",
            "architectures": ["Gemma3ForConditionalGeneration"],
            "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
                            "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024},
            "vision_config": {"model_type": "siglip_vision_model", "hidden_size": 1152, "intermediate_size": 4304,
                              "num_hidden_layers": 27, "num_attention_heads": 16, "image_size": 896, "patch_size": 14,
                              "vision_use_head": False},
            "mm_tokens_per_image": 256,
        },
        4.30,
        "AI-Hypercomputer/maxtext: MaxText/configs/models/gemma3-4b.yml; what is not here is the default of Gemma3TextConfig",
    ),
    "mistralai/Mistral-7B-Instruct-v0.3": (
        {"model_type": "mistral", **_shape(4096, 14336, 32, 32), "num_key_value_heads": 8, "vocab_size": 32768,
         "max_position_embeddings": 32768, "rms_norm_eps": 1e-5, "rope_theta": 1000000.0, "sliding_window": None,
         "tie_word_embeddings": False},
        7.248,  # 7.242 with the 32,000 tokens of v0.1
        f"{_TORCHTUNE}/mistral/_model_builders.py, of v0.1; the vocabulary is the page's",
    ),
    "microsoft/Phi-4-mini-instruct": (
        {"model_type": "phi3", **_shape(3072, 8192, 32, 24), "num_key_value_heads": 8, "vocab_size": 200064,
         "max_position_embeddings": 131072, "original_max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
         "partial_rotary_factor": 0.75, "pad_token_id": 199999, "bos_token_id": 199999, "eos_token_id": 199999,
         "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [1.0] * 48},
         "sliding_window": 262144, "tie_word_embeddings": True},
        3.84,
        "pytorch/executorch: examples/models/phi_4_mini/config/config.json",
    ),
    "HuggingFaceTB/SmolLM3-3B": (
        {"model_type": "smollm3", **_shape(2048, 11008, 36, 16), "num_key_value_heads": 4, "vocab_size": 128256,
         "max_position_embeddings": 65536, "rope_theta": 5000000.0, "no_rope_layer_interval": 4, "pad_token_id": 128004,
         "eos_token_id": 128012, "tie_word_embeddings": True},
        3.08,
        "pytorch/executorch: examples/models/smollm3/3b_config.json",
    ),
}  # fmt: skip
