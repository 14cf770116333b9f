"""The small configurations of the transformers models."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Entry:
    """One configuration: its class, the class that builds the model, and the kind of batch."""

    name: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    batch: str = "text"
    fix: bool = False
    """Whether batch normalisation is to be replaced."""


_TOKENS = {"vocab_size": 53, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_BASE = {
    **_TOKENS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "max_position_embeddings": 32,
}  # fmt: skip
_LLAMA = {**_BASE, "num_key_value_heads": 2, "head_dim": 6}
_MOE = {**_LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2}
_CLASSIFY = "AutoModelForSequenceClassification"
_MASKED = "AutoModelForMaskedLM"
_MODEL = "AutoModel"
_SEQ2SEQ = "AutoModelForSeq2SeqLM"
_BART = {
    **_TOKENS, "d_model": 24, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 32, "decoder_ffn_dim": 32, "max_position_embeddings": 32, "decoder_start_token_id": 1,
    "forced_eos_token_id": 2,
}  # fmt: skip
_T5 = {
    "vocab_size": 53, "d_model": 24, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_decoder_layers": 2, "num_heads": 4,
    "decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 1,
}  # fmt: skip

TEXT_MODELS = (
    Entry("GPT-2", "GPT2Config", {**_TOKENS, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    Entry("GPT-Neo", "GPTNeoConfig", {**_TOKENS, "hidden_size": 24, "num_layers": 2, "num_heads": 4,
        "attention_types": [[["global", "local"], 1]], "window_size": 4, "max_position_embeddings": 32}),
    Entry("GPT-NeoX", "GPTNeoXConfig", _BASE),
    Entry("GPT-J", "GPTJConfig", {**_TOKENS, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32,
        "rotary_dim": 4}),
    Entry("GPT-BigCode", "GPTBigCodeConfig", {**_TOKENS, "n_embd": 24, "n_layer": 2, "n_head": 4, "n_positions": 32}),
    Entry("CodeGen", "CodeGenConfig", {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32,
        "rotary_dim": 4}),
    Entry("OPT", "OPTConfig", {**_TOKENS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
        "ffn_dim": 32, "max_position_embeddings": 32, "word_embed_proj_dim": 16}),
    Entry("BLOOM", "BloomConfig", {**_TOKENS, "hidden_size": 24, "n_layer": 2, "n_head": 4}),
    Entry("MPT", "MptConfig", {**_TOKENS, "d_model": 24, "n_layers": 2, "n_heads": 4, "max_seq_len": 32}),
    Entry("Falcon", "FalconConfig", {**_TOKENS, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}),
    Entry("Llama", "LlamaConfig", _LLAMA),
    Entry("Mistral", "MistralConfig", {**_LLAMA, "sliding_window": 4}),
    Entry("Mixtral", "MixtralConfig", _MOE),
    Entry("Qwen2", "Qwen2Config", _LLAMA),
    Entry("Qwen3", "Qwen3Config", {**_LLAMA, "tie_word_embeddings": True}),
    Entry("Qwen3-MoE", "Qwen3MoeConfig", {**_LLAMA, "num_experts": 3, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16}),
    Entry("Gemma", "GemmaConfig", _LLAMA),
    Entry("Gemma 2", "Gemma2Config", {**_LLAMA, "sliding_window": 4}),
    Entry("Gemma 3", "Gemma3TextConfig", {**_LLAMA, "sliding_window": 4}),
    Entry("Phi", "PhiConfig", {**_BASE, "hidden_size": 32}),
    Entry("Phi-3", "Phi3Config", {**_BASE, "num_key_value_heads": 2}),
    Entry("StableLM", "StableLmConfig", {**_BASE, "num_key_value_heads": 2}),
    Entry("StarCoder2", "Starcoder2Config", {**_BASE, "num_key_value_heads": 2}),
    Entry("OLMo", "OlmoConfig", _BASE),
    Entry("OLMo 2", "Olmo2Config", _BASE),
    Entry("Cohere", "CohereConfig", {**_BASE, "num_key_value_heads": 2}),
    Entry("Granite", "GraniteConfig", {**_BASE, "num_key_value_heads": 2}),
    Entry("SmolLM3", "SmolLM3Config", {**_BASE, "num_key_value_heads": 2}),
    Entry("DeepSeek-V3", "DeepseekV3Config", {**_BASE, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2,
        "topk_group": 1, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1,
        "kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 6}),
    Entry("gpt-oss", "GptOssConfig", {**_MOE, "sliding_window": 4}),
    Entry("Mamba", "MambaConfig", {**_TOKENS, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4}),
    Entry("Mamba-2", "Mamba2Config", {**_TOKENS, "hidden_size": 24, "num_hidden_layers": 2, "state_size": 4,
        "num_heads": 6, "head_dim": 8, "expand": 2, "n_groups": 2, "chunk_size": 4}),
    Entry("RWKV", "RwkvConfig", {**_TOKENS, "hidden_size": 24, "num_hidden_layers": 2, "attention_hidden_size": 24,
        "context_length": 32}),
    Entry("BERT", "BertConfig", _BASE, _CLASSIFY),
    Entry("BERT, masked language model", "BertConfig", _BASE, _MASKED),
    Entry("RoBERTa", "RobertaConfig", _BASE, _CLASSIFY),
    Entry("XLM-RoBERTa", "XLMRobertaConfig", _BASE, _CLASSIFY),
    Entry("DistilBERT", "DistilBertConfig", {**_TOKENS, "dim": 24, "n_layers": 2, "n_heads": 4, "hidden_dim": 32,
        "max_position_embeddings": 32}, _CLASSIFY),
    Entry("ALBERT", "AlbertConfig", {**_BASE, "embedding_size": 16}, _CLASSIFY),
    Entry("ELECTRA", "ElectraConfig", {**_BASE, "embedding_size": 16}, _CLASSIFY),
    Entry("DeBERTa", "DebertaConfig", {**_BASE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"]}, _CLASSIFY),
    Entry("DeBERTa-v2", "DebertaV2Config", {**_BASE, "relative_attention": True, "pos_att_type": ["c2p", "p2c"],
        "position_buckets": 8}, _CLASSIFY),
    Entry("MPNet", "MPNetConfig", _BASE, _CLASSIFY),
    Entry("ModernBERT", "ModernBertConfig", {**_BASE, "local_attention": 4, "global_attn_every_n_layers": 2,
        "cls_token_id": 1, "sep_token_id": 2}, _CLASSIFY),
    Entry("XLNet", "XLNetConfig", {**_TOKENS, "d_model": 24, "n_layer": 2, "n_head": 4, "d_inner": 32}, _CLASSIFY),
    Entry("Funnel", "FunnelConfig", {**_TOKENS, "d_model": 24, "n_head": 4, "d_head": 6, "d_inner": 32,
        "block_sizes": [1, 1]}, _CLASSIFY),
    Entry("ConvBERT", "ConvBertConfig", {**_BASE, "embedding_size": 24, "conv_kernel_size": 3}, _CLASSIFY),
    Entry("RoFormer", "RoFormerConfig", {**_BASE, "embedding_size": 16}, _CLASSIFY),
    Entry("FNet", "FNetConfig", {**_BASE}, _MASKED, "text without mask"),
    Entry("T5", "T5Config", _T5, _SEQ2SEQ, "text to text"),
    Entry("Flan-T5 (gated)", "T5Config", {**_T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
        _SEQ2SEQ, "text to text"),
    Entry("BART", "BartConfig", _BART, _SEQ2SEQ, "text to text"),
    Entry("mBART", "MBartConfig", _BART, _SEQ2SEQ, "text to text"),
    Entry("Marian", "MarianConfig", _BART, _SEQ2SEQ, "text to text"),
    Entry("Pegasus", "PegasusConfig", _BART, _SEQ2SEQ, "text to text"),
)  # fmt: skip

_IMAGE = "AutoModelForImageClassification"
_VIT = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32, "image_size": 32,
    "patch_size": 8,
    "num_labels": 4,
}  # fmt: skip
_SWIN = {
    "image_size": 32,
    "patch_size": 2,
    "embed_dim": 12,
    "depths": [2, 1],
    "num_heads": [3, 6],
    "window_size": 4,
    "num_labels": 4,
}
_STAGES = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 12, 16, 20], "num_labels": 4}
_CLIP = {
    "text_config": {**_BASE, "projection_dim": 16}, "vision_config": {**_VIT, "projection_dim": 16},
    "projection_dim": 16,
}  # fmt: skip

IMAGE_MODELS = (
    Entry("ViT", "ViTConfig", _VIT, _IMAGE, "images"),
    Entry("DeiT", "DeiTConfig", _VIT, "DeiTForImageClassificationWithTeacher", "images"),
    Entry("BEiT", "BeitConfig", {**_VIT, "use_relative_position_bias": True, "layer_scale_init_value": 0.1}, _IMAGE,
        "images"),
    Entry("BEiT, shared relative positions", "BeitConfig", {**_VIT, "use_shared_relative_position_bias": True,
        "use_mask_token": True}, _IMAGE, "images"),
    Entry("DINOv2", "Dinov2Config", _VIT, _IMAGE, "images"),
    Entry("DINOv2 with registers", "Dinov2WithRegistersConfig", {**_VIT, "num_register_tokens": 2}, _IMAGE, "images"),
    Entry("DINOv3", "DINOv3ViTConfig", {**_VIT, "hidden_size": 32, "pos_embed_rescale": None,
        "num_register_tokens": 2}, _MODEL, "images"),
    Entry("ViT-MSN", "ViTMSNConfig", _VIT, _IMAGE, "images"),
    Entry("CLIP vision", "CLIPVisionConfig", _VIT, "CLIPVisionModel", "images"),
    Entry("SigLIP vision", "SiglipVisionConfig", _VIT, "SiglipVisionModel", "images"),
    Entry("Swin", "SwinConfig", _SWIN, _IMAGE, "images"),
    Entry("Swin V2", "Swinv2Config", _SWIN, _IMAGE, "images"),
    Entry("ConvNeXt", "ConvNextConfig", _STAGES, _IMAGE, "images"),
    Entry("ConvNeXt V2", "ConvNextV2Config", _STAGES, _IMAGE, "images"),
    Entry("PoolFormer", "PoolFormerConfig", {**_STAGES, "depths": [1, 1, 1, 1]}, _IMAGE, "images"),
    Entry("PVT", "PvtConfig", {**_STAGES, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2, 2],
        "image_size": 32}, _IMAGE, "images"),
    Entry("SegFormer", "SegformerConfig", {**_STAGES, "hidden_sizes": [8, 8, 16, 16], "num_attention_heads": [1, 1, 2,
        2], "decoder_hidden_size": 16}, "AutoModelForSemanticSegmentation", "images", True),
    Entry("MobileViT", "MobileViTConfig", {"image_size": 32, "hidden_sizes": [16, 16, 16], "neck_hidden_sizes": [8, 8,
        16, 16, 16, 16, 32], "num_attention_heads": 4, "num_labels": 4}, _IMAGE, "images", True),
    Entry("CvT", "CvtConfig", {"embed_dim": [8, 12, 16], "num_heads": [1, 2, 2], "depth": [1, 2, 3],
        "drop_path_rate": [0.0, 0.0, 0.0], "drop_rate": [0.0, 0.0, 0.0], "attention_drop_rate": [0.0, 0.0, 0.0],
        "num_labels": 4}, _IMAGE, "images", True),
    Entry("ResNet", "ResNetConfig", {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
        "layer_type": "basic", "num_labels": 4}, _IMAGE, "images", True),
    Entry("BiT (weight-standardised)", "BitConfig", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1],
        "num_groups": 4, "num_labels": 4}, _IMAGE, "images"),
    Entry("FocalNet", "FocalNetConfig", {"image_size": 32, "embed_dim": 8, "hidden_sizes": [8, 16], "depths": [1, 1],
        "focal_levels": [2, 2], "focal_windows": [3, 3], "num_labels": 4}, _IMAGE, "images"),
    Entry("Hiera", "HieraConfig", {"image_size": [32, 32], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1,
        2, 2], "num_labels": 4}, _IMAGE, "images"),
    Entry("ViLT", "ViltConfig", {**_BASE, **_VIT}, _MODEL, "image and text"),
)  # fmt: skip

_WAVE = {
    "vocab_size": 53, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32,
    "conv_dim": (8, 8), "conv_kernel": (8, 4), "conv_stride": (8, 4), "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2, "classifier_proj_size": 16, "num_labels": 4,
}  # fmt: skip
_AUDIO = "AutoModelForAudioClassification"

SPEECH_MODELS = (
    Entry("wav2vec 2.0", "Wav2Vec2Config", _WAVE, _AUDIO, "waves"),
    Entry("wav2vec 2.0, stable layer norm, CTC", "Wav2Vec2Config", {**_WAVE, "do_stable_layer_norm": True,
        "feat_extract_norm": "layer"}, "AutoModelForCTC", "waves"),
    Entry("HuBERT", "HubertConfig", _WAVE, _AUDIO, "waves"),
    Entry("WavLM", "WavLMConfig", _WAVE, _AUDIO, "waves"),
    Entry("Data2Vec audio", "Data2VecAudioConfig", _WAVE, _AUDIO, "waves"),
    Entry("Whisper", "WhisperConfig", {**_BART, "num_mel_bins": 8, "max_source_positions": 12,
        "max_target_positions": 12}, "AutoModelForSpeechSeq2Seq", "spectrograms"),
    Entry("Audio spectrogram transformer", "ASTConfig", {**_VIT, "max_length": 32, "num_mel_bins": 16,
        "frequency_stride": 8, "time_stride": 8}, _AUDIO, "spectrogram frames"),
)  # fmt: skip
