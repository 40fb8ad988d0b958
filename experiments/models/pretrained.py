"""What pretrained NNX models share: their weights, another dtype of their layers, and Flax's own jitted call."""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from safetensors import SafetensorError, deserialize


class TextError(ValueError):
    """A model, tokenizer or text that cannot be used; the message says what it is, what was expected, what to do."""


def filled(
    make: Callable[[], Any], tensors: Mapping[str, np.ndarray], source: Callable[[str], str]
) -> tuple[Any, list[str]]:
    """The module that `make` makes, with weights of a file; nothing random is computed.

    Args:
        make: the module, its parameters float32.
        tensors: by the file's names; kernels are (outputs, inputs) there and (inputs, outputs) in Flax.
        source: slash path of a parameter -> its name in the file.

    Returns:
        The module, and what is wrong with the weights: those that are missing, those of another shape or dtype, then those that
        the module has no place for. Where something is, the module is not to be used.
    """
    graphdef, state = nnx.split(nnx.eval_shape(make))
    pure: dict[Any, Any] = {}
    missing, wrong, left = [], [], dict(tensors)
    for path, leaf in nnx.to_flat_state(state):
        name = source("/".join(map(str, path)))
        tensor = left.pop(name, None)
        if tensor is None:
            missing.append(f"{name} is missing")
            continue
        value = np.ascontiguousarray(tensor.T) if path[-1] == "kernel" else tensor
        if value.shape != leaf.shape or value.dtype != np.float32:
            wrong.append(f"{name} has shape {value.shape} and dtype {value.dtype}, expected {leaf.shape} float32")
            continue
        inside = pure
        for step in path[:-1]:
            inside = inside.setdefault(step, {})
        inside[path[-1]] = jnp.asarray(value)
    problems = [*missing, *wrong, *(f"{name} has no place in this model" for name in sorted(left))]
    if not problems:
        nnx.replace_by_pure_dict(state, pure)
    return nnx.merge(graphdef, state), problems


_FLOATS = {"F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(jnp.bfloat16)}


def read_safetensors(path: Path | str, *, ignored: Collection[str] = ()) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, or of all files of an index (``model.safetensors.index.json``), as float32.

    Args:
        path: the file or, where it ends in ``.json``, the index; its files lie beside it.
        ignored: names to leave out, of whatever dtype.

    Raises:
        TextError: a truncated or damaged file, a dtype other than float32, float16 and bfloat16, or an index whose files are
            not there or hold other tensors.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    if path.is_dir():
        raise TextError(
            f"{path}: a folder. Give the path of the .safetensors file in it or, of several, of their index.json."
        )
    if path.suffix != ".json":
        return _tensors(path, ignored)
    try:
        places = dict(json.loads(path.read_bytes())["weight_map"])
        if not all(isinstance(file, str) for file in places.values()):
            raise TypeError("weight_map has values that are no names of files")
    except (ValueError, KeyError, TypeError) as error:
        raise TextError(
            f'{path}: not an index of safetensors files ({type(error).__name__}: {error}). Expected {{"weight_map": {{tensor: '
            "file}}. Fetch it again, or give the path of the one file."
        ) from error
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(set(places.values())):
        file = path.parent / name
        if Path(name).name != name or not file.is_file():
            raise TextError(
                f"{path}: the index names the file {name!r}, which is not beside it. Fetch all files of it."
            )
        tensors |= _tensors(file, ignored)
    wanted = set(places) - set(ignored)
    if wanted != set(tensors):
        raise TextError(
            f"{path}: the index and its files differ in {', '.join(sorted(wanted ^ set(tensors))[:4])}. Take all of them from "
            "one version of the model."
        )
    return tensors


def _tensors(path: Path, ignored: Collection[str]) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    try:
        stored = dict(deserialize(data))
    except SafetensorError as error:
        raise TextError(
            f"{path}: not a whole safetensors file of {len(data)} bytes ({error}). Compare its checksum with the source and "
            "fetch it again."
        ) from error
    tensors, wrong = {}, []
    for name, tensor in sorted(stored.items()):
        if name in ignored:
            continue
        if tensor["dtype"] not in _FLOATS:
            wrong.append(f"{name} ({tensor['dtype']})")
            continue
        values = np.frombuffer(tensor["data"], _FLOATS[tensor["dtype"]]).reshape(tensor["shape"])
        tensors[name] = np.asarray(values, np.float32)
    if wrong:
        raise TextError(
            f"{path}: {len(wrong)} tensors are not of {', '.join(_FLOATS)}: {', '.join(wrong[:4])}. Take a file of the weights "
            "in floating point."
        )
    return tensors


def in_dtype(module: Any, dtype: Any) -> Any:
    """The same weights, `dtype` handed to every layer; of a module made of its `shape`."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: type(module)(module.shape, dtype=dtype, rngs=nnx.Rngs(0))))
    return nnx.merge(graphdef, nnx.state(module))


def jitted(module: nnx.Module) -> Callable[..., Any]:
    """The module as a Flax user runs it: jitted, its params as arguments."""
    graphdef, state = nnx.split(module)
    placed = jax.device_put(state)
    run = jax.jit(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs))
    return lambda *inputs: run(placed, *inputs)
