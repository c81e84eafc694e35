"""Architectures of `transformers` in small: how to make each from a random configuration, and its batches.

A configuration gets all the sizes of its kind, and takes no notice of those that it does not know. Activations are
large enough that a session does not keep them for being small (`min_nbytes`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from helpers import seeded
from zoo import VOCABULARY, Batch, images, tokens

TEXT = {
    "vocab_size": 96,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    # encoder-decoders
    "decoder_start_token_id": 1,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "ffn_dim": 64,
    "num_layers": 2,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_layerdrop": 0.0,
    "decoder_layerdrop": 0.0,
    # experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32,
    # low ranks
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
HYBRID = {
    **TEXT,
    "chunk_size": 8,
    "mamba_chunk_size": 8,
    "mamba_n_heads": 4,
    "mamba_d_head": 16,
    "mamba_d_state": 16,
    "n_mamba_heads": 2,
    "mamba_dt_rank": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
}
STAGES = {"image_size": 32, "num_channels": 3, "num_labels": 10}
IMAGE = {
    **STAGES,
    "patch_size": 8,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}
SOUND = {
    **TEXT,
    "layerdrop": 0.0,
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
    "mask_time_length": 2,
    "num_mel_bins": 16,
    "num_labels": 10,
}
CLIP_TEXT = {**TEXT, "max_position_embeddings": 16, "projection_dim": 16}
CLIP_IMAGE = {**IMAGE, "projection_dim": 16}
IMAGE_TOKEN = 95  # stands for a part of the image


@dataclass(frozen=True)
class Architecture:
    """One architecture.

    Attributes:
        name: its `model_type` in transformers.
        kind: what it is for, or what sets it apart.
        make: builds the model from the global random state.
        batch: the batch of a seed, made without touching the global random state.
        warns: transformers itself warns of what it does.
    """

    name: str
    kind: str
    make: Callable[[], nn.Module]
    batch: Callable[[int], Batch]
    warns: bool = False

    def __str__(self) -> str:
        return self.name


def loss_of(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a model returns, or the mean square of all that it computes."""
    result = model(**batch)
    if getattr(result, "loss", None) is not None:
        return result.loss.mean()
    found = [value for value in result.values() if isinstance(value, Tensor) and value.requires_grad]
    return torch.stack([value.square().mean() for value in found]).sum()


def _make(auto: str, name: str, settings: dict[str, Any]) -> nn.Module:
    """A model by the name of an auto class, or of its own class."""
    config = transformers.AutoConfig.for_model(name, **settings)
    model = getattr(transformers, auto)
    return model.from_config(config) if auto.startswith("AutoModel") else model(config)


def _of(kind: str, auto: str, batch: Callable[[int], Batch], sizes: dict[str, Any]) -> Callable[..., Architecture]:
    """Makes the entries of a kind: `auto`, `batch` and `sizes` are those of the kind, unless an entry has its own."""

    def entry(
        name: str,
        auto: str = auto,
        batch: Callable[[int], Batch] = batch,
        sizes: dict[str, Any] = sizes,
        without: Iterable[str] = (),
        warns: bool = False,
        **settings: Any,
    ) -> Architecture:
        known = {key: value for key, value in sizes.items() if key not in without}
        return Architecture(name, kind, partial(_make, auto, name, known | settings), batch, warns)

    return entry


# -- batches -----------------------------------------------------------------------------------------------------------


def floats(seed: int, *shape: int) -> Tensor:
    """Random numbers."""
    return torch.randn(shape, generator=seeded(seed))


def classes(seed: int, batch: int) -> Tensor:
    """One label for each."""
    return tokens(seed, batch, 1, 10).flatten()


def language(seed: int, length: int = 32, words: int = VOCABULARY) -> Batch:
    """Text that predicts itself."""
    text = tokens(seed, 2, length, words)
    return {"input_ids": text, "labels": text, "use_cache": False}


def masked(seed: int, length: int = 32) -> Batch:
    """Text, one of it shorter than the others."""
    text = tokens(seed, length=length)
    padding = torch.ones_like(text)
    padding[0, -5:] = 0
    return {"input_ids": text, "labels": text.masked_fill(padding == 0, -100), "attention_mask": padding}


def tagged(seed: int) -> Batch:
    """Text with a class for each token."""
    return {"input_ids": tokens(seed), "labels": tokens(seed, vocabulary=10)}


def located(seed: int) -> Batch:
    """Text with a class and a place on the page for each token."""
    corners = tokens(seed, 2, 32 * 2, 32).view(2, 32, 2)
    return {**tagged(seed), "bbox": torch.cat([corners, corners + 8], dim=-1)}


def translation(seed: int, length: int = 32, into: int = 24) -> Batch:
    """Two texts."""
    return {"input_ids": tokens(seed, length=length), "labels": tokens(seed + 1000, length=into), "use_cache": False}


def pictures(seed: int, size: int = 32, rows: int = 4) -> Batch:
    """Images and their classes."""
    return {"pixel_values": images(seed, rows, size), "labels": classes(seed, rows)}


def bare(seed: int, size: int = 32, rows: int = 4) -> Batch:
    """Images."""
    return {"pixel_values": images(seed, rows, size)}


def video(seed: int) -> Batch:
    """Clips of 4 frames and their classes."""
    return {"pixel_values": floats(seed, 2, 4, 3, 32, 32), "labels": classes(seed, 2)}


def speech(seed: int, samples: int = 1200) -> Batch:
    """Sound and a text that is shorter than what is left of it."""
    return {"input_values": floats(seed, 2, samples), "labels": tokens(seed, length=4, vocabulary=20) + 1}


def spectrogram(seed: int, *shape: int) -> Batch:
    """Sound by frequencies, and a text."""
    return {"input_features": floats(seed, 2, *shape), "labels": tokens(seed, length=12)}


def heard(seed: int) -> Batch:
    """Sound by frequencies, and its class."""
    return {"input_values": floats(seed, 2, 64, 16), "labels": classes(seed, 2)}


def wave(seed: int, samples: int = 640) -> Batch:
    """Sound."""
    return {"input_values": floats(seed, 2, 1, samples)}


def captioned(seed: int) -> Batch:
    """Images and texts."""
    text = tokens(seed, length=16)
    text[:, -1] = VOCABULARY - 1  # CLIP looks for the last token by its number
    return {"input_ids": text, "pixel_values": images(seed, 2, 32), "return_loss": True}


def described(seed: int) -> Batch:
    """Images and texts to learn."""
    text = tokens(seed, length=16)
    return {"input_ids": text, "pixel_values": images(seed, 2, 32), "labels": text}


def past(seed: int, length: int = 32, future: int = 8) -> Batch:
    """Three series and how they go on."""
    return {"past_values": floats(seed, 2, length, 3), "future_values": floats(seed + 1, 2, future, 3)}


def dated(seed: int) -> Batch:
    """A series with features of its dates, and how it goes on."""
    values = {"past_values": floats(seed, 4, 40), "future_values": floats(seed + 1, 4, 16)}
    times = {"past_time_features": floats(seed, 4, 40, 2), "future_time_features": floats(seed + 1, 4, 16, 2)}
    return {**values, **times, "past_observed_mask": torch.ones(4, 40)}


def played(seed: int) -> Batch:
    """Games: what was seen, done and won."""
    return {
        "states": floats(seed, 2, 16, 6),
        "actions": floats(seed + 1, 2, 16, 3),
        "rewards": floats(seed + 2, 2, 16, 1),
        "returns_to_go": floats(seed + 3, 2, 16, 1),
        "timesteps": torch.arange(16).repeat(2, 1),
        "attention_mask": torch.ones(2, 16),
    }


def canvas(seed: int) -> Batch:
    """Texts, and noise in the place of what follows."""
    return {
        "input_ids": tokens(seed, length=16, vocabulary=90),
        "decoder_input_ids": tokens(seed + 1, length=16, vocabulary=90),
    }


def steered(seed: int) -> Batch:
    """What a robot sees, is told and does."""
    text = torch.cat([torch.full((2, 16), IMAGE_TOKEN), tokens(seed, length=8, vocabulary=90)], dim=1)
    seen = {
        "input_ids": text,
        "pixel_values": images(seed, 2, 32)[:, None],
        "pixel_attention_mask": torch.ones(2, 1, dtype=torch.bool),
    }
    return {**seen, "state": floats(seed, 2, 8), "actions": floats(seed, 2, 16, 8)}


# -- the architectures -------------------------------------------------------------------------------------------------

decoder = _of("text decoder", "AutoModelForCausalLM", language, TEXT)
moe = _of("mixture of experts", "AutoModelForCausalLM", language, TEXT)
recurrent = _of("state space, recurrent", "AutoModelForCausalLM", language, HYBRID)
encoder = _of("text encoder", "AutoModelForMaskedLM", masked, TEXT)
pair = _of("encoder-decoder", "AutoModelForSeq2SeqLM", translation, TEXT)
long = _of("long context", "AutoModelForMaskedLM", partial(masked, length=64), TEXT)
vision = _of("vision", "AutoModelForImageClassification", pictures, IMAGE)
staged = _of("vision in stages", "AutoModelForImageClassification", pictures, STAGES)
detection = _of("detection", "AutoModelForObjectDetection", partial(bare, size=64, rows=2), STAGES)
audio = _of("audio", "AutoModelForCTC", speech, SOUND)
both = _of(
    "multimodal", "AutoModel", captioned, {"projection_dim": 16, "text_config": CLIP_TEXT, "vision_config": CLIP_IMAGE}
)
series = _of("time series", "AutoModelForTimeSeriesPrediction", past, TEXT)
generative = _of("diffusion and generation", "AutoModel", language, TEXT)

many = partial(translation, length=64)
DECODERS = (
    *map(decoder, ("gpt2", "gpt_bigcode", "gpt_neox", "opt", "bloom", "llama", "qwen3", "gemma2", "gemma3_text")),
    *map(decoder, ("phi", "phi3", "mpt", "olmo2", "stablelm", "starcoder2", "cohere2", "nemotron")),
    decoder("falcon", without=["head_dim"]),
    decoder("codegen", rotary_dim=8),
    decoder("gpt_neo", attention_types=[[["global", "local"], 1]], window_size=8),
    decoder("xlnet", without=["max_position_embeddings"], auto="XLNetLMHeadModel", d_inner=64, d_head=8),
)
EXPERTS = (
    *map(moe, ("mixtral", "qwen3_moe", "granitemoe", "jetmoe", "gpt_oss")),
    moe("deepseek_v3", num_key_value_heads=4, n_group=1, topk_group=1, first_k_dense_replace=1),
    moe("minimax", block_size=8),
    moe(
        "dbrx",
        attn_config={"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        ffn_config={"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
    ),
    moe("switch_transformers", "AutoModelForSeq2SeqLM", translation),
)
short = partial(language, length=12)
RECURRENT = (
    *map(recurrent, ("recurrent_gemma",)),
    recurrent("mamba", batch=short),
    recurrent("jamba", batch=short, attn_layer_period=2, attn_layer_offset=1),
    recurrent(
        "zamba",
        batch=partial(language, length=6),
        num_hidden_layers=6,
        attn_layer_period=2,
        attn_layer_offset=1,
        without=["head_dim"],
    ),
    recurrent("zamba2", layers_block_type=["linear_attention", "hybrid"], without=["head_dim"]),
    recurrent("mamba2", num_heads=8, n_groups=1, state_size=16),
    recurrent("bamba", attn_layer_indices=[1]),
    recurrent(
        "nemotron_h",
        layers_block_type=["linear_attention", "moe", "full_attention", "mlp"],
        mamba_num_heads=4,
        mamba_head_dim=16,
        ssm_state_size=16,
        n_groups=1,
        moe_shared_expert_intermediate_size=32,
        without=["num_hidden_layers"],
    ),
    recurrent("lfm2", layer_types=["conv", "full_attention"], block_multiple_of=32),
    recurrent("rwkv", batch=partial(language, length=8)),
    recurrent("xlstm", batch=partial(language, length=8), without=["v_head_dim"]),
)
ENCODERS = (
    *map(encoder, ("bert", "albert", "deberta-v2", "mpnet", "xlm", "modernbert", "roformer", "ibert", "fnet", "mra")),
    *map(encoder, ("yoso", "nystromformer")),
    encoder("distilbert", dim=32, hidden_dim=64),
    encoder("funnel", block_sizes=(1, 1), without=["num_hidden_layers"], d_head=8, d_inner=64),
    encoder("squeezebert", embedding_size=32),
    encoder("convbert", embedding_size=32),
    encoder("mobilebert", warns=True, embedding_size=32, intra_bottleneck_size=16, true_hidden_size=16),
    encoder(
        "perceiver",
        batch=partial(masked, length=64),
        d_latents=32,
        num_latents=32,
        num_self_attends_per_block=2,
        num_self_attention_heads=4,
        num_cross_attention_heads=4,
        qk_channels=32,
        v_channels=32,
    ),
)
PAIRS = (
    *map(pair, ("t5", "bart", "marian", "m2m_100")),
    pair(
        "prophetnet",
        without=["num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"],
        num_encoder_layers=2,
        num_encoder_attention_heads=4,
        num_decoder_attention_heads=4,
    ),
    pair("fsmt", batch=partial(translation, into=32), src_vocab_size=96, tgt_vocab_size=96),
)
LONG = (
    long("longformer", attention_window=16, max_position_embeddings=80),
    long("big_bird", block_size=4, num_random_blocks=1),
    long(
        "led",
        "AutoModelForSeq2SeqLM",
        many,
        attention_window=16,
        max_encoder_position_embeddings=64,
        max_decoder_position_embeddings=64,
    ),
    long("longt5", "AutoModelForSeq2SeqLM", many, local_radius=7),
)
VISION = (
    *map(vision, ("vit", "beit", "dinov2")),
    vision("dinov3_vit", "AutoModel", bare),
    vision(
        "vit_mae",
        "AutoModelForPreTraining",
        bare,
        decoder_hidden_size=32,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=4,
        decoder_intermediate_size=64,
    ),
    vision("timesformer", "AutoModelForVideoClassification", video, num_frames=4),
)
TWO = {"depths": (1, 1), "hidden_sizes": (16, 32)}
PYRAMID = {
    **TWO,
    "num_encoder_blocks": 2,
    "num_attention_heads": (1, 2),
    "mlp_ratios": (2, 2),
    "sr_ratios": (2, 1),
    "strides": (4, 2),
}
STAGED = (
    staged("swin", embed_dim=16, depths=(1, 1), num_heads=(2, 4), window_size=4),
    staged("convnextv2", num_stages=2, **TWO),
    staged("resnet", embedding_size=16, **TWO),
    staged("bit", embedding_size=16, num_groups=4, **TWO),
    staged("segformer", patch_sizes=(7, 3), decoder_hidden_size=16, **PYRAMID),
    staged("pvt_v2", patch_sizes=(7, 3), **PYRAMID),
    staged("poolformer", patch_sizes=(7, 3), strides=(4, 2), padding=(2, 1), num_encoder_blocks=2, **TWO),
    staged("mobilenet_v1", depth_multiplier=0.25),
    staged(
        "mobilevitv2",
        batch=partial(pictures, size=64, rows=2),
        base_attn_unit_dims=(16, 24, 32),
        n_attn_blocks=(1, 1, 1),
        width_multiplier=0.25,
    ),
    staged("cvt", embed_dim=(16, 24, 32), num_heads=(1, 2, 2), depth=(1, 2, 3)),
    staged("focalnet", embed_dim=16, focal_levels=(2, 2), focal_windows=(3, 3), **TWO),
    staged(
        "efficientnet",
        width_coefficient=0.25,
        depth_coefficient=0.25,
        hidden_dim=320,
        kernel_sizes=(3, 5),
        in_channels=(32, 16),
        out_channels=(16, 24),
        strides=(1, 2),
        num_block_repeats=(1, 1),
        expand_ratios=(1, 6),
    ),
    staged(
        "hiera",
        image_size=(64, 64),
        batch=partial(pictures, size=64, rows=2),
        embed_dim=16,
        depths=(1, 1),
        num_heads=(1, 2),
        num_query_pool=1,
        masked_unit_attention=(True, False),
    ),
    staged(
        "swin2sr",
        "AutoModelForImageToImage",
        partial(bare, size=16, rows=2),
        image_size=16,
        embed_dim=16,
        depths=(1, 1),
        num_heads=(2, 2),
        window_size=4,
    ),
)
BACKBONE = {"model_type": "resnet", "embedding_size": 16, "out_features": ["stage2"], **TWO}
DETR = {
    "backbone_config": BACKBONE,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "num_queries": 8,
}
DETECTION = (
    detection("detr", **DETR),
    detection("deformable_detr", **DETR | {"num_feature_levels": 1, "decoder_layers": 2}),
)
AUDIO = (
    *map(audio, ("wav2vec2", "wavlm", "sew", "wav2vec2-conformer")),
    audio(
        "whisper",
        "AutoModelForSpeechSeq2Seq",
        lambda seed: spectrogram(seed, 16, 64),
        max_source_positions=32,
        max_target_positions=32,
    ),
    audio(
        "speech_to_text",
        "AutoModelForSpeechSeq2Seq",
        lambda seed: spectrogram(seed, 64, 16),
        input_feat_per_channel=16,
        conv_channels=32,
        max_source_positions=64,
        max_target_positions=32,
    ),
    audio(
        "audio-spectrogram-transformer",
        "AutoModelForAudioClassification",
        heard,
        max_length=64,
        patch_size=8,
        frequency_stride=8,
        time_stride=8,
    ),
    audio(
        "parakeet_ctc",
        batch=lambda seed: {
            **spectrogram(seed, 64, 16),
            "labels": tokens(seed, length=4, vocabulary=20) + 1,
            "attention_mask": torch.ones(2, 64, dtype=torch.long),
        },
        encoder_config={**SOUND, "subsampling_conv_channels": 8},
    ),
    audio("speecht5", "AutoModelForSpeechSeq2Seq", speech),
)
MULTIMODAL = (
    both("clip"),
    both("siglip"),
    both("blip", "BlipForConditionalGeneration", described),
    both(
        "vilt",
        "AutoModelForVisualQuestionAnswering",
        lambda seed: {**described(seed), "labels": floats(seed, 2, 10).sigmoid()},
        sizes={**TEXT, **IMAGE},
    ),
    both("git", "AutoModelForCausalLM", described, sizes={**TEXT, "vision_config": CLIP_IMAGE}),
    both(
        "layoutlmv3",
        "AutoModelForTokenClassification",
        lambda seed: {**located(seed), **bare(seed, rows=2)},
        sizes={**TEXT, **IMAGE},
        input_size=32,
        max_2d_position_embeddings=64,
        coordinate_size=4,
        shape_size=8,
    ),
    both(
        "llava",
        "AutoModelForImageTextToText",
        lambda seed: {
            **described(seed),
            "input_ids": torch.cat([torch.full((2, 16), IMAGE_TOKEN), tokens(seed, length=16, vocabulary=90)], 1),
            "labels": tokens(seed),
        },
        sizes={},
        text_config={**TEXT, "model_type": "llama"},
        vision_config={**CLIP_IMAGE, "model_type": "clip_vision_model"},
        image_token_index=IMAGE_TOKEN,
    ),
)
PATCHES = {"num_input_channels": 3, "context_length": 32, "patch_length": 4, "patch_stride": 4, "prediction_length": 8}
SERIES = (
    series(
        "patchtst",
        "PatchTSTForPrediction",
        past,
        **PATCHES,
    ),
    series(
        "patchtsmixer",
        "PatchTSMixerForPrediction",
        past,
        **PATCHES,
    ),
    series(
        "informer",
        "InformerForPrediction",
        batch=dated,
        context_length=32,
        prediction_length=16,
        lags_sequence=[1, 2, 4, 8],
        num_time_features=2,
    ),
    series("decision_transformer", "AutoModel", played, state_dim=6, act_dim=3, max_ep_len=32),
    series(
        "timesfm",
        "TimesFmModelForPrediction",
        lambda seed: {
            "past_values": floats(seed, 2, 64),
            "freq": torch.zeros(2, dtype=torch.long),
            "future_values": floats(seed, 2, 16),
        },
        warns=True,
        patch_length=8,
        context_length=64,
        horizon_length=16,
    ),
)
GENERATIVE = (
    generative(
        "diffusion_gemma",
        "DiffusionGemmaForBlockDiffusion",
        canvas,
        sizes={},
        text_config={**TEXT, "global_head_dim": 8, "top_k_experts": 2},
        vision_config=IMAGE,
        canvas_length=16,
    ),
    generative(
        "pi0",
        "PI0ForConditionalGeneration",
        steered,
        sizes={},
        vlm_config={
            "model_type": "paligemma",
            "text_config": {**TEXT, "model_type": "gemma"},
            "vision_config": {**IMAGE, "model_type": "siglip_vision_model", "vision_use_head": False},
            "projection_dim": 32,
            "image_token_id": IMAGE_TOKEN,
        },
        dit_config={**TEXT, "model_type": "gemma"},
        chunk_size=16,
        max_state_dim=8,
        max_action_dim=8,
    ),
    generative(
        "vits",
        "AutoModel",
        lambda seed: {"input_ids": tokens(seed, length=16, vocabulary=38)},
        layerdrop=0.0,
        flow_size=32,
        spectrogram_bins=17,
        upsample_initial_channel=16,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1,),),
        duration_predictor_filter_channels=16,
        posterior_encoder_num_wavenet_layers=2,
        prior_encoder_num_flows=2,
        prior_encoder_num_wavenet_layers=2,
    ),
    generative(
        "univnet",
        "UnivNetModel",
        lambda seed: {"input_features": floats(seed, 2, 16, 10)},
        sizes={"num_mel_bins": 10},
        model_in_channels=8,
        model_hidden_channels=8,
        kernel_predictor_hidden_channels=8,
        resblock_stride_sizes=(4, 4, 2),
    ),
    generative(
        "dac",
        batch=wave,
        sizes={},
        encoder_hidden_size=8,
        downsampling_ratios=(2, 4),
        decoder_hidden_size=32,
        codebook_size=32,
        n_codebooks=2,
        upsampling_ratios=(4, 2),
    ),
    generative(
        "mimi",
        batch=wave,
        sizes={},
        hidden_size=32,
        num_filters=16,
        upsampling_ratios=[4, 2],
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=64,
        codebook_size=32,
        codebook_dim=16,
        vector_quantization_hidden_dimension=16,
        num_quantizers=4,
        upsample_groups=32,
    ),
    generative("imagegpt", "ImageGPTForCausalImageModeling", partial(language, words=95), n_positions=32),
)
ARCHITECTURES = (
    *DECODERS,
    *EXPERTS,
    *RECURRENT,
    *ENCODERS,
    *PAIRS,
    *LONG,
    *VISION,
    *STAGED,
    *DETECTION,
    *AUDIO,
    *MULTIMODAL,
    *SERIES,
    *GENERATIVE,
)

DEPART = {
    "jetmoe": "each expert is given as many tokens as the router sends it, one kernel an expert",
    "dbrx": "each expert is given as many tokens as the router sends it",
    "vits": "the length of the sound follows from durations that it draws",
    "mimi": "it computes its codebooks in its first step and keeps them",
}
LEFT_OUT = {
    "reformer": "it seeds itself anew in each step (`torch.seed()`), so that no two plain runs are equal",
    "kimi_linear": "its loop over positions makes 3,500 small ops of two layers, which take long to plan",
}
