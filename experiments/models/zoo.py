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
from dataclasses import dataclass, field
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


def _times() -> Draw:
    """Steps of a diffusion."""
    return lambda key: jax.random.randint(key, (BATCH,), 0, 1000)


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


# ---------------------------------------------------------------------------------------------------------------------------
# Transformers


@dataclass(frozen=True, kw_only=True)
class _Transformer:
    """A Flax class of Transformers, and how it is called."""

    model: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Draw]
    """By keyword."""
    outputs: tuple[str, ...] = ("logits",)
    inference: Mapping[str, bool] = field(default_factory=lambda: {"train": False})
    """How a call says that this is no training."""
    composite: bool = False
    """A pair of other classes' models, which must be initialized at once."""
    old_clip: str = ""
    """The module, below transformers.models, that calls jnp.clip as JAX before 0.10 had it."""

    def __call__(self) -> Made:
        transformers, kind = _imported("transformers"), _imported("transformers", self.model)
        patched: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext
        if self.old_clip:
            patched = functools.partial(_with_old_clip, _imported(f"transformers.models.{self.old_clip}"))
        with _quiet(transformers), patched():
            model = kind(kind.config_class(**copy.deepcopy(dict(self.config))), _do_init=self.composite)
            variables = jax.jit(functools.partial(model.init_weights, input_shape=model.input_shape))(jax.random.key(0))
        statistics = {"batch_stats": variables["batch_stats"]} if "batch_stats" in variables else None
        params = variables["params"] if statistics else variables

        def function(params: Any, *inputs: jax.Array) -> dict[str, jax.Array]:
            whole = {"params": params, **statistics} if statistics else params
            with patched():
                outputs = model(**dict(zip(self.inputs, inputs, strict=True)), params=whole, **self.inference)
            return {name: outputs[name] for name in self.outputs}

        return function, params, _drawn(self.inputs)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without Transformers' word, at every model that is made, that its Flax classes end with version 4."""
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)


@contextlib.contextmanager
def _with_old_clip(module: types.ModuleType) -> Iterator[None]:
    """`module` sees a jax.numpy whose clip takes a_min and a_max, too; nobody else does."""
    with mock.patch.object(module, "jnp", _OldNumpy("jax.numpy")):
        yield


class _OldNumpy(types.ModuleType):
    """jax.numpy, but for clip."""

    def __getattr__(self, name: str) -> Any:
        return getattr(jnp, name)

    @staticmethod
    def clip(array: jax.Array, a_min: Any = None, a_max: Any = None) -> jax.Array:
        return jnp.clip(array, a_min, a_max)


_SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
# Names that most of the classes share. Their default range, 0.02, is for hidden sizes of hundreds.
_SHARED = {
    **_SPECIAL,
    "vocab_size": WORDS,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 32,
    "initializer_range": 0.15,
}
_ROTARY = {**_SHARED, "num_key_value_heads": 2, "head_dim": 8}
_GPT2 = {
    **_SPECIAL,
    "vocab_size": WORDS,
    "n_positions": 32,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "initializer_range": 0.15,
}
_VISION = {**_SHARED, "image_size": 32, "patch_size": 8, "num_labels": 10}
_SCALED = {**_VISION, "initializer_range": 1.0}  # these two classes divide it by the root of a layer's inputs
_STAGES = {"embedding_size": 16, "hidden_sizes": [16, 32, 48], "depths": [1, 2, 1], "num_labels": 10}
_BART = {
    **_SPECIAL,
    "vocab_size": WORDS,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 64,
    "decoder_ffn_dim": 64,
    "max_position_embeddings": 32,
    "init_std": 0.15,
    "forced_eos_token_id": 2,
}
_T5 = {**_SPECIAL, "vocab_size": WORDS, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4}
_SPEECH = {
    **_SHARED,
    "conv_dim": (16, 24, 32),
    "conv_kernel": (10, 3, 2),
    "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 4,
}
_READ = {"input_ids": _words()}
_READ_MASKED = {"input_ids": _words(), "attention_mask": _mask()}
_TRANSLATE = {"input_ids": _words(), "attention_mask": _mask(), "decoder_input_ids": _words(12)}
_LOOK = {"pixel_values": _normal(3, 32, 32)}
_PAIR = {"input_ids": _words(), "pixel_values": _normal(3, 32, 32), "attention_mask": _mask()}
_PAIRED = ("logits_per_image", "text_embeds", "image_embeds")

_TRANSFORMERS = {
    # Encoders of text. The head of a language model is the embedding again, except where a comment says so.
    "bert": _Transformer(model="FlaxBertForMaskedLM", config=_SHARED, inputs=_READ_MASKED),
    "bert_classifier": _Transformer(
        model="FlaxBertForSequenceClassification", config={**_SHARED, "num_labels": 5}, inputs=_READ_MASKED
    ),
    "roberta": _Transformer(model="FlaxRobertaForMaskedLM", config=_SHARED, inputs=_READ_MASKED),
    "roberta_prelayernorm": _Transformer(
        model="FlaxRobertaPreLayerNormForMaskedLM", config=_SHARED, inputs=_READ_MASKED
    ),
    "xlm_roberta": _Transformer(model="FlaxXLMRobertaForMaskedLM", config=_SHARED, inputs=_READ_MASKED),
    "distilbert": _Transformer(
        model="FlaxDistilBertForMaskedLM",
        config={
            **_SPECIAL,
            "vocab_size": WORDS,
            "dim": 32,
            "n_layers": 2,
            "n_heads": 4,
            "hidden_dim": 64,
            "max_position_embeddings": 32,
            "initializer_range": 0.15,
        },
        inputs=_READ_MASKED,
    ),
    "albert": _Transformer(  # one layer's weights, three times
        model="FlaxAlbertForMaskedLM",
        config={**_SHARED, "embedding_size": 16, "num_hidden_layers": 3},
        inputs=_READ_MASKED,
    ),
    "electra": _Transformer(
        model="FlaxElectraForMaskedLM", config={**_SHARED, "embedding_size": 16}, inputs=_READ_MASKED
    ),
    "roformer": _Transformer(model="FlaxRoFormerForMaskedLM", config=_SHARED, inputs=_READ_MASKED),
    "big_bird": _Transformer(  # block-sparse attention
        model="FlaxBigBirdForMaskedLM",
        config={**_SHARED, "block_size": 4, "num_random_blocks": 1, "max_position_embeddings": 64},
        inputs={"input_ids": _words(64), "attention_mask": _mask(64)},
    ),
    # Decoders of text.
    "gpt2": _Transformer(model="FlaxGPT2LMHeadModel", config=_GPT2, inputs=_READ),
    "gpt_neo": _Transformer(  # global and local attention in turns
        model="FlaxGPTNeoForCausalLM",
        config={
            **_SPECIAL,
            "vocab_size": WORDS,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "intermediate_size": 64,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
            "max_position_embeddings": 32,
            "initializer_range": 0.15,
        },
        inputs=_READ,
    ),
    "gptj": _Transformer(model="FlaxGPTJForCausalLM", config={**_GPT2, "rotary_dim": 4}, inputs=_READ),  # own head
    "llama": _Transformer(model="FlaxLlamaForCausalLM", config=_ROTARY, inputs=_READ),  # own head
    "mistral": _Transformer(  # own head
        model="FlaxMistralForCausalLM", config={**_ROTARY, "sliding_window": 8}, inputs=_READ
    ),
    "gemma": _Transformer(model="FlaxGemmaForCausalLM", config=_ROTARY, inputs=_READ),
    "opt": _Transformer(
        model="FlaxOPTForCausalLM",
        config={**_SHARED, "ffn_dim": 64, "word_embed_proj_dim": 16, "init_std": 0.15},
        inputs=_READ,
        inference={"deterministic": True},
    ),
    "bloom": _Transformer(
        model="FlaxBloomForCausalLM",
        config={
            **_SPECIAL,
            "vocab_size": WORDS,
            "hidden_size": 32,
            "n_layer": 2,
            "n_head": 4,
            "initializer_range": 0.15,
        },
        inputs=_READ,
    ),
    "xglm": _Transformer(
        model="FlaxXGLMForCausalLM",
        config={
            **_SPECIAL,
            "vocab_size": WORDS,
            "d_model": 32,
            "num_layers": 2,
            "attention_heads": 4,
            "ffn_dim": 64,
            "max_position_embeddings": 32,
            "init_std": 0.15,
        },
        inputs=_READ,
    ),
    # Both.
    "t5": _Transformer(
        model="FlaxT5ForConditionalGeneration", config=_T5, inputs=_TRANSLATE, old_clip="t5.modeling_flax_t5"
    ),
    "mt5": _Transformer(  # gated, own head
        model="FlaxMT5ForConditionalGeneration", config=_T5, inputs=_TRANSLATE, old_clip="t5.modeling_flax_t5"
    ),
    "longt5": _Transformer(
        model="FlaxLongT5ForConditionalGeneration",
        config={**_T5, "local_radius": 7},
        inputs=_TRANSLATE,
        old_clip="longt5.modeling_flax_longt5",
    ),
    "bart": _Transformer(model="FlaxBartForConditionalGeneration", config=_BART, inputs=_TRANSLATE),
    "mbart": _Transformer(model="FlaxMBartForConditionalGeneration", config=_BART, inputs=_TRANSLATE),
    "marian": _Transformer(model="FlaxMarianMTModel", config=_BART, inputs=_TRANSLATE),
    "pegasus": _Transformer(model="FlaxPegasusForConditionalGeneration", config=_BART, inputs=_TRANSLATE),
    "blenderbot": _Transformer(model="FlaxBlenderbotForConditionalGeneration", config=_BART, inputs=_TRANSLATE),
    # Images.
    "vit": _Transformer(model="FlaxViTForImageClassification", config=_SCALED, inputs=_LOOK),
    "beit": _Transformer(model="FlaxBeitForImageClassification", config=_VISION, inputs=_LOOK),
    "dinov2": _Transformer(model="FlaxDinov2ForImageClassification", config=_SCALED, inputs=_LOOK),
    "resnet": _Transformer(
        model="FlaxResNetForImageClassification", config={**_STAGES, "layer_type": "bottleneck"}, inputs=_LOOK
    ),
    "regnet": _Transformer(
        model="FlaxRegNetForImageClassification", config={**_STAGES, "groups_width": 8}, inputs=_LOOK
    ),
    "clip": _Transformer(
        model="FlaxCLIPModel",
        config={"text_config": {**_SHARED, "eos_token_id": 2}, "vision_config": _VISION, "projection_dim": 16},
        inputs=_PAIR,
        outputs=_PAIRED,
    ),
    "vit_bert": _Transformer(
        model="FlaxVisionTextDualEncoderModel",
        config={
            "text_config": {"model_type": "bert", **_SHARED},
            "vision_config": {"model_type": "vit", **_SCALED},
            "projection_dim": 16,
        },
        inputs=_PAIR,
        outputs=_PAIRED,
        composite=True,
    ),
    "vit_gpt2": _Transformer(
        model="FlaxVisionEncoderDecoderModel",
        config={
            "encoder": {"model_type": "vit", **_SCALED},
            "decoder": {"model_type": "gpt2", **_GPT2, "is_decoder": True, "add_cross_attention": True},
        },
        inputs={**_LOOK, "decoder_input_ids": _words(12)},
        composite=True,
    ),
    # Sound.
    "wav2vec2": _Transformer(  # a convolution with weight normalization
        model="FlaxWav2Vec2ForCTC",
        config={**_SPEECH, "feat_extract_norm": "layer", "do_stable_layer_norm": True},
        inputs={"input_values": _normal(800)},
    ),
    "whisper": _Transformer(
        model="FlaxWhisperForConditionalGeneration",
        config={**_BART, "num_mel_bins": 16, "max_source_positions": 32, "max_target_positions": 32},
        inputs={"input_features": _normal(16, 64), "decoder_input_ids": _words(12)},
    ),
}


# ---------------------------------------------------------------------------------------------------------------------------
# Diffusers


@dataclass(frozen=True, kw_only=True)
class _Diffuser:
    """A Flax class of Diffusers, which is a Linen module."""

    model: str
    config: Mapping[str, Any]
    inputs: Mapping[str, Draw]
    """In the order of the class's arguments."""
    inference: Mapping[str, bool]
    """How a call says that this is no training."""

    def __call__(self) -> Made:
        module = _imported("diffusers", self.model)(**self.config)
        params = jax.jit(module.init_weights)(jax.random.key(0))

        def function(params: Any, *inputs: jax.Array) -> dict[str, jax.Array]:
            return {"sample": module.apply({"params": params}, *inputs, **self.inference).sample}

        return function, params, _drawn(self.inputs)


_DIFFUSERS = {
    "diffusion_unet": _Diffuser(
        model="FlaxUNet2DConditionModel",
        config={
            "sample_size": 16,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "attention_head_dim": 4,
            "cross_attention_dim": 32,
        },
        inputs={"sample": _normal(4, 16, 16), "timesteps": _times(), "encoder_hidden_states": _normal(TOKENS, 32)},
        inference={"train": False},
    ),
    "autoencoder_kl": _Diffuser(
        model="FlaxAutoencoderKL",
        config={
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "sample_size": 32,
        },
        inputs={"sample": _normal(3, 32, 32)},
        inference={"deterministic": True},
    ),
}


# ---------------------------------------------------------------------------------------------------------------------------
# Haiku


@dataclass(frozen=True, kw_only=True)
class _Haiku:
    """A network of haiku.nets, for images with their channels last."""

    model: str
    config: Mapping[str, Any]
    size: int = 32

    def __call__(self) -> Made:
        haiku, kind = _imported("haiku"), _imported("haiku.nets", self.model)
        net = haiku.transform_with_state(lambda images, training: kind(**self.config)(images, is_training=training))
        inputs = _drawn({"images": _normal(self.size, self.size, 3)})
        params, state = jax.jit(functools.partial(net.init, training=True))(jax.random.key(0), *inputs)

        def function(params: Any, images: jax.Array) -> dict[str, jax.Array]:
            logits, _ = net.apply(params, state, None, images, training=False)
            return {"logits": logits}

        return function, params, inputs


_HAIKU = {
    "haiku_resnet": _Haiku(
        model="ResNet",
        config={
            "blocks_per_group": (1, 1, 1, 1),
            "num_classes": 10,
            "channels_per_group": (32, 32, 64, 64),
            "resnet_v2": True,
            "logits_config": {"w_init": None},  # not the zeros that it would have
        },
    ),
    "haiku_mobilenet": _Haiku(
        model="MobileNetV1", config={"strides": (1, 2, 1, 2), "channels": (16, 32, 32, 64), "num_classes": 10}
    ),
}


def _cases() -> Iterator[Case]:
    for package, module, table in (
        ("Transformers", "transformers", _TRANSFORMERS),
        ("Diffusers", "diffusers", _DIFFUSERS),
        ("Haiku", "haiku.nets", _HAIKU),
    ):
        for name, spec in table.items():
            yield Case(name=name, source=f"{package}, {module}.{spec.model}", make=spec)


ZOO: dict[str, Case] = {case.name: case for case in _cases()}
