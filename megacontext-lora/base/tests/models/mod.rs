//! The small models that tests of every family read.

/// Every family, and each kind of block among them.
pub const FOLDERS: [&str; 11] = [
    "llama/tied_f32",
    "llama/untied_f32_linear",
    "families/llama_bias_f16",
    "families/mistral_window_bf16",
    "families/qwen2_f16",
    "families/qwen3_bf16_sharded",
    "families/smollm3_bf16",
    "families/gpt_neox_f32",
    "families/gpt_neox_sequential_f16",
    "families/gemma3_bf16",
    "families/nanochat_bf16",
];
