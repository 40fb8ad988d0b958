"""Models that others wrote, as plain functions: the Flax classes of Transformers and Diffusers, and Haiku's networks.

None of this code knows of mpjax, so that what mpjax does with a function is tried on code that was not written for it. Every
model is small, with random weights of its own initialization, and is called as for inference: without dropout, without keys.
A normalization's running statistics are constants of the function. Nothing is downloaded.

    function, params, inputs = ZOO["bert"].make()
    outputs = jax.jit(function)(params, *inputs)

The packages (pip install 'mpjax[zoo]') are imported when a case is made, not before.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

BATCH, WORDS, TOKENS = 2, 100, 16
Function = Callable[..., dict[str, jax.Array]]
Made = tuple[Function, Any, tuple[jax.Array, ...]]
Draw = Callable[[jax.Array], jax.Array]


@dataclass(frozen=True, kw_only=True)
class Case:
    """A model of another package."""

    name: str
    source: str
    """Package and class."""
    make: Callable[[], Made]
    """A new `function(params, *inputs)`, its float32 parameters, and inputs whose leading axis is the batch.

    The function returns a dict of arrays. Making raises ImportError where the package is not installed.
    """


def _words(tokens: int = TOKENS) -> Draw:
    """Token numbers; the first few, which configurations reserve for padding and the like, are left out."""
    return lambda key: jax.random.randint(key, (BATCH, tokens), 4, WORDS)


def _mask(tokens: int = TOKENS) -> Draw:
    """Which tokens count: all of the first sequence, three quarters of the others."""
    return lambda key: jnp.ones((BATCH, tokens), jnp.int32).at[1:, tokens - tokens // 4 :].set(0)


def _normal(*shape: int) -> Draw:
    return lambda key: jax.random.normal(key, (BATCH, *shape), jnp.float32)


def _times(key: jax.Array) -> jax.Array:
    """Steps of a diffusion."""
    return jax.random.randint(key, (BATCH,), 0, 1000)


def _imported(package: str, name: str = "") -> Any:
    """A package, or what it has by that name.

    Raises:
        ImportError: it is not installed, or has no such class: later versions have no Flax classes.
    """
    try:
        module = importlib.import_module(package)
        return getattr(module, name) if name else module
    except (ImportError, AttributeError, RuntimeError) as error:  # whichever a package that imports lazily raises
        what = f"{package}.{name}" if name else package
        raise ImportError(f"{what} cannot be imported ({error}): pip install 'mpjax[zoo]'") from error


def _drawn(inputs: Mapping[str, Draw]) -> tuple[jax.Array, ...]:
    keys = jax.random.split(jax.random.key(1), len(inputs))
    return tuple(draw(key) for draw, key in zip(inputs.values(), keys, strict=True))


# --- Transformers -----------------------------------------------------------------------------------------------------


def _transformer(
    name: str,
    kind: str,
    config: Mapping[str, Any],
    inputs: Mapping[str, Draw],
    *,
    outputs: tuple[str, ...] = ("logits",),
    inference: Mapping[str, bool] | None = None,
    composite: bool = False,
    old_clip: str = "",
) -> Case:
    """A Flax class of Transformers.

    Args:
        name: of the case.
        kind: the class's name without "Flax".
        config: of the class.
        inputs: by keyword.
        outputs: names of the outputs.
        inference: how a call says that this is no training.
        composite: a pair of other classes' models, which must be initialized at once.
        old_clip: the module, below transformers.models, that calls jnp.clip as JAX before 0.10 had it.
    """

    def make() -> Made:
        transformers, model_class = _imported("transformers"), _imported("transformers", f"Flax{kind}")
        patched: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext
        if old_clip:
            module = _imported(f"transformers.models.{old_clip}")
            patched = functools.partial(mock.patch.object, module, "jnp", _OldNumpy("jax.numpy"))
        with _quiet(transformers), patched():
            model = model_class(model_class.config_class(**copy.deepcopy(dict(config))), _do_init=composite)
            variables = jax.jit(functools.partial(model.init_weights, input_shape=model.input_shape))(jax.random.key(0))
        statistics = {"batch_stats": variables["batch_stats"]} if "batch_stats" in variables else None

        def function(params: Any, *arrays: jax.Array) -> dict[str, jax.Array]:
            whole = {"params": params, **statistics} if statistics else params
            with patched():
                values = model(
                    **dict(zip(inputs, arrays, strict=True)), params=whole, **(inference or {"train": False})
                )
            return {name: values[name] for name in outputs}

        return function, variables["params"] if statistics else variables, _drawn(inputs)

    return Case(name=name, source=f"Transformers, transformers.Flax{kind}", make=make)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without the warning of Transformers, at every model that is made, that its Flax classes end with version 4."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


class _OldNumpy(types.ModuleType):
    """jax.numpy, whose clip takes a_min and a_max, too; one module sees it in place of jax.numpy."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def clip(array: jax.Array, a_min: Any = None, a_max: Any = None) -> jax.Array:
        return jnp.clip(array, a_min, a_max)


# Names that most of the classes share. Their default range, 0.02, is for hidden sizes of hundreds.
_SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1)
_TEXT = dict(**_SPECIAL, vocab_size=WORDS, max_position_embeddings=32, initializer_range=0.15)
_SHARED = dict(**_TEXT, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64)
_ROTARY = dict(**_SHARED, num_key_value_heads=2, head_dim=8)
_GPT2 = dict(**_SPECIAL, vocab_size=WORDS, n_positions=32, n_embd=32, n_layer=2, n_head=4, initializer_range=0.15)
_VISION = dict(**_SHARED, image_size=32, patch_size=8, num_labels=10)
_SCALED = {**_VISION, "initializer_range": 1.0}  # these classes divide it by the root of a layer's inputs
_STAGES = dict(embedding_size=16, hidden_sizes=[16, 32, 48], depths=[1, 2, 1], num_labels=10)
_PAIR_OF_STACKS = dict(
    **dict(d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4),
    **dict(encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=32, init_std=0.15),
)
_BART = dict(**_SPECIAL, vocab_size=WORDS, **_PAIR_OF_STACKS, forced_eos_token_id=2)
_T5 = dict(**_SPECIAL, vocab_size=WORDS, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
_SPEECH = dict(
    **dict(**_SHARED, conv_dim=(16, 24, 32), conv_kernel=(10, 3, 2), conv_stride=(5, 2, 2), num_feat_extract_layers=3),
    **dict(num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4),
    **dict(feat_extract_norm="layer", do_stable_layer_norm=True),
)
_DISTILBERT = dict(**_TEXT, dim=32, n_layers=2, n_heads=4, hidden_dim=64)
_BIG_BIRD = {**_SHARED, "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64}
_GPT_NEO = dict(
    **dict(**_TEXT, hidden_size=32, num_layers=2, num_heads=4, intermediate_size=64),
    **dict(attention_types=[[["global", "local"], 1]], window_size=8),
)
_OPT = dict(**_SHARED, ffn_dim=64, word_embed_proj_dim=16, init_std=0.15)
_BLOOM = dict(**_SPECIAL, vocab_size=WORDS, hidden_size=32, n_layer=2, n_head=4, initializer_range=0.15)
_XGLM = dict(
    **dict(**_SPECIAL, vocab_size=WORDS, max_position_embeddings=32),
    **dict(d_model=32, num_layers=2, attention_heads=4, ffn_dim=64, init_std=0.15),
)
_CLIP = dict(text_config={**_SHARED, "eos_token_id": 2}, vision_config=_VISION, projection_dim=16)
_VIT_BERT = dict(
    text_config=dict(model_type="bert", **_SHARED),
    vision_config=dict(model_type="vit", **_SCALED),
    projection_dim=16,
)
_VIT_GPT2 = dict(
    encoder=dict(model_type="vit", **_SCALED),
    decoder=dict(model_type="gpt2", **_GPT2, is_decoder=True, add_cross_attention=True),
)
_WHISPER = dict(**_BART, num_mel_bins=16, max_source_positions=32, max_target_positions=32)

_READ = {"input_ids": _words()}
_READ_MASKED = {"input_ids": _words(), "attention_mask": _mask()}
_READ_LONG = {"input_ids": _words(64), "attention_mask": _mask(64)}
_TRANSLATE = {"input_ids": _words(), "attention_mask": _mask(), "decoder_input_ids": _words(12)}
_LOOK = {"pixel_values": _normal(3, 32, 32)}
_DESCRIBE = {**_LOOK, "decoder_input_ids": _words(12)}
_PAIR = {"input_ids": _words(), "pixel_values": _normal(3, 32, 32), "attention_mask": _mask()}
_HEAR = {"input_features": _normal(16, 64), "decoder_input_ids": _words(12)}
_PAIRED = ("logits_per_image", "text_embeds", "image_embeds")
_OLD_T5, _OLD_LONGT5 = "t5.modeling_flax_t5", "longt5.modeling_flax_longt5"

# The head of a language model is the embedding again, except where a comment says so.
_TRANSFORMERS = (
    _transformer("bert", "BertForMaskedLM", _SHARED, _READ_MASKED),
    _transformer("bert_classifier", "BertForSequenceClassification", dict(**_SHARED, num_labels=5), _READ_MASKED),
    _transformer("roberta", "RobertaForMaskedLM", _SHARED, _READ_MASKED),
    _transformer("roberta_prelayernorm", "RobertaPreLayerNormForMaskedLM", _SHARED, _READ_MASKED),
    _transformer("xlm_roberta", "XLMRobertaForMaskedLM", _SHARED, _READ_MASKED),
    _transformer("distilbert", "DistilBertForMaskedLM", _DISTILBERT, _READ_MASKED),
    _transformer(  # one layer's weights, three times
        "albert", "AlbertForMaskedLM", {**_SHARED, "embedding_size": 16, "num_hidden_layers": 3}, _READ_MASKED
    ),
    _transformer("electra", "ElectraForMaskedLM", dict(**_SHARED, embedding_size=16), _READ_MASKED),
    _transformer("roformer", "RoFormerForMaskedLM", _SHARED, _READ_MASKED),
    _transformer("big_bird", "BigBirdForMaskedLM", _BIG_BIRD, _READ_LONG),  # block-sparse attention
    _transformer("gpt2", "GPT2LMHeadModel", _GPT2, _READ),
    _transformer("gpt_neo", "GPTNeoForCausalLM", _GPT_NEO, _READ),  # global and local attention in turns
    _transformer("gptj", "GPTJForCausalLM", dict(**_GPT2, rotary_dim=4), _READ),  # a head apart
    _transformer("llama", "LlamaForCausalLM", _ROTARY, _READ),  # a head apart
    _transformer("mistral", "MistralForCausalLM", dict(**_ROTARY, sliding_window=8), _READ),  # a head apart
    _transformer("gemma", "GemmaForCausalLM", _ROTARY, _READ),
    _transformer("opt", "OPTForCausalLM", _OPT, _READ, inference={"deterministic": True}),
    _transformer("bloom", "BloomForCausalLM", _BLOOM, _READ),
    _transformer("xglm", "XGLMForCausalLM", _XGLM, _READ),
    _transformer("t5", "T5ForConditionalGeneration", _T5, _TRANSLATE, old_clip=_OLD_T5),
    _transformer("mt5", "MT5ForConditionalGeneration", _T5, _TRANSLATE, old_clip=_OLD_T5),  # gated, a head apart
    _transformer(
        "longt5", "LongT5ForConditionalGeneration", dict(**_T5, local_radius=7), _TRANSLATE, old_clip=_OLD_LONGT5
    ),
    _transformer("bart", "BartForConditionalGeneration", _BART, _TRANSLATE),
    _transformer("mbart", "MBartForConditionalGeneration", _BART, _TRANSLATE),
    _transformer("marian", "MarianMTModel", _BART, _TRANSLATE),
    _transformer("pegasus", "PegasusForConditionalGeneration", _BART, _TRANSLATE),
    _transformer("blenderbot", "BlenderbotForConditionalGeneration", _BART, _TRANSLATE),
    _transformer("vit", "ViTForImageClassification", _SCALED, _LOOK),
    _transformer("beit", "BeitForImageClassification", _VISION, _LOOK),
    _transformer("dinov2", "Dinov2ForImageClassification", _SCALED, _LOOK),
    _transformer("resnet", "ResNetForImageClassification", dict(**_STAGES, layer_type="bottleneck"), _LOOK),
    _transformer("regnet", "RegNetForImageClassification", dict(**_STAGES, groups_width=8), _LOOK),
    _transformer("clip", "CLIPModel", _CLIP, _PAIR, outputs=_PAIRED),
    _transformer("vit_bert", "VisionTextDualEncoderModel", _VIT_BERT, _PAIR, outputs=_PAIRED, composite=True),
    _transformer("vit_gpt2", "VisionEncoderDecoderModel", _VIT_GPT2, _DESCRIBE, composite=True),
    _transformer("wav2vec2", "Wav2Vec2ForCTC", _SPEECH, {"input_values": _normal(800)}),  # weight normalization
    _transformer("whisper", "WhisperForConditionalGeneration", _WHISPER, _HEAR),
)


# --- Diffusers and Haiku ----------------------------------------------------------------------------------------------


def _diffuser(
    name: str, kind: str, config: Mapping[str, Any], inputs: Mapping[str, Draw], inference: Mapping[str, bool]
) -> Case:
    """A Flax class of Diffusers, which is a Linen module; `inference` is how a call says that this is no training."""

    def make() -> Made:
        module = _imported("diffusers", kind)(**config)
        params = jax.jit(module.init_weights)(jax.random.key(0))

        def function(params: Any, *arrays: jax.Array) -> dict[str, jax.Array]:
            return {"sample": module.apply({"params": params}, *arrays, **inference).sample}

        return function, params, _drawn(inputs)

    return Case(name=name, source=f"Diffusers, diffusers.{kind}", make=make)


def _haiku(name: str, kind: str, config: Mapping[str, Any]) -> Case:
    """A network of haiku.nets, for images with their channels last."""

    def make() -> Made:
        haiku, network = _imported("haiku"), _imported("haiku.nets", kind)
        net = haiku.transform_with_state(lambda images, training: network(**config)(images, is_training=training))
        inputs = _drawn({"images": _normal(32, 32, 3)})
        params, state = jax.jit(functools.partial(net.init, training=True))(jax.random.key(0), *inputs)

        def function(params: Any, images: jax.Array) -> dict[str, jax.Array]:
            logits, _ = net.apply(params, state, None, images, training=False)
            return {"logits": logits}

        return function, params, inputs

    return Case(name=name, source=f"Haiku, haiku.nets.{kind}", make=make)


_UNET = dict(
    **dict(sample_size=16, block_out_channels=(32, 64), layers_per_block=1, attention_head_dim=4),
    **dict(down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), cross_attention_dim=32),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
)
_AUTOENCODER = dict(
    **dict(down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2),
    **dict(block_out_channels=(16, 32), norm_num_groups=8, sample_size=32),
)
_RESNET = dict(
    **dict(blocks_per_group=(1, 1, 1, 1), num_classes=10, channels_per_group=(32, 32, 64, 64), resnet_v2=True),
    logits_config={"w_init": None},  # not the zeros that it would have
)
_MOBILENET = dict(strides=(1, 2, 1, 2), channels=(16, 32, 32, 64), num_classes=10)
_DENOISE = {"sample": _normal(4, 16, 16), "timesteps": _times, "encoder_hidden_states": _normal(TOKENS, 32)}

ZOO: dict[str, Case] = {
    case.name: case
    for case in (
        *_TRANSFORMERS,
        _diffuser("diffusion_unet", "FlaxUNet2DConditionModel", _UNET, _DENOISE, {"train": False}),
        _diffuser(
            "autoencoder_kl", "FlaxAutoencoderKL", _AUTOENCODER, {"sample": _normal(3, 32, 32)}, {"deterministic": True}
        ),
        _haiku("haiku_resnet", "ResNet", _RESNET),
        _haiku("haiku_mobilenet", "MobileNetV1", _MOBILENET),
    )
}
