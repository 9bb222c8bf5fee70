"""`expert-pager fit-router`: maps from a prompt's tokens to the experts of its document, fitted in closed form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from glob import glob
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import typer

from pager.cli.options import AsJson, Device, Dtype, ExpertMemory, ModelPath
from pager.cli.output import busy, out, print_json, steps_progress
from pager.errors import InvalidRequest
from pager.memory.machine import resolve_device
from pager.memory.units import format_bytes
from pager.reading import read_documents

if TYPE_CHECKING:
    from pager.engine.paged_model import PagedModel
    from pager.lab.fit import DocumentReading, Fit
    from pager.lab.fitting import StandIns
    from pager.predict.trunk import TrunkPredictor

STAND_IN_DOCUMENTS = 320  # of those to be read: some 100,000 tokens for a vector an expert


def fit_router(
    model: ModelPath,
    documents: Annotated[
        list[str],
        typer.Option(
            help='JSON lines with a "text" each, .gz or not; a file or a pattern, repeatable. As many documents are '
            "taken from each file.",
            metavar="FILE",
        ),
    ],
    output: Annotated[
        Path | None, typer.Option(help="Where to write. Default: router.safetensors in the model's folder.")
    ] = None,
    max_documents: Annotated[int, typer.Option(help="Documents to read at most, all files together.", min=8)] = 2560,
    max_tokens: Annotated[int, typer.Option(help="A document's tokens that are read at most.", min=32)] = 512,
    seed: Annotated[int, typer.Option(help="Which documents are taken, and pool sizes drawn.")] = 0,
    expert_memory: ExpertMemory = None,
    device: Device = "auto",
    dtype: Dtype = None,
    as_json: AsJson = False,
) -> None:
    """Fit the routing-only passes `lexical` and `fitted` to documents of the kinds that will be asked for.

    A few hundred to a few thousand documents, minutes; no gradients. Writes a small file beside the checkpoint, which
    `--router lexical` and `--router fitted` use.

    Example: `expert-pager fit-router ./model --documents 'corpus/*.train.jsonl.gz'`
    """
    from pager.lab.fit import fit_router as fit
    from pager.predict.fitted import PREDICTOR_NAME
    from pager.predict.trunk import TrunkPredictor

    texts = sample_texts(files_of(documents), max_documents, seed)
    paged, encode = _open(model, resolve_device(device), dtype, expert_memory)
    try:
        documents_read = [encode(text)[:max_tokens] for text in texts]
        stand_ins = _fit_stand_ins(paged, documents_read, seed)
        trunk = TrunkPredictor.load(model, device=str(paged.device), dtype=paged.dtype, stand_ins=stand_ins)
        readings = _read(paged, trunk, documents_read, seed)
    finally:
        paged.close()
    vocabulary = paged.config.vocab_size
    fitted = fit(readings, vocabulary, paged.facts.routed_per_layer, paged.fingerprint, stand_ins=stand_ins)
    path = output or model / PREDICTOR_NAME
    nbytes = fitted.file.save(path)
    _report(fitted, path, nbytes, len(readings), as_json)


def files_of(patterns: Sequence[str]) -> list[Path]:
    """Sorted, each once. Raises InvalidRequest for a pattern that names no file."""
    found: set[Path] = set()
    for pattern in patterns:
        files = [Path(name) for name in glob(pattern, recursive=True) if Path(name).is_file()]
        if not files:
            raise InvalidRequest(f"no file matches {pattern!r}; give JSON lines with --documents", field="documents")
        found.update(files)
    return sorted(found)


def sample_texts(files: Sequence[Path], max_documents: int, seed: int) -> list[str]:
    """As many texts of each file, or all it has, drawn with `seed` and mixed. Raises InvalidRequest for a bad line."""
    each = max(1, max_documents // len(files))
    random = np.random.default_rng(seed)
    texts: list[str] = []
    for file in files:
        texts += _reservoir(read_texts(file), each, random)
    return [texts[index] for index in random.permutation(len(texts))][:max_documents]


def read_texts(file: Path) -> Iterator[str]:
    """The `text` of every line. Raises InvalidRequest, naming file and line."""
    return (document["text"] for _, document in read_documents(file))


def _reservoir(texts: Iterable[str], count: int, random: np.random.Generator) -> list[str]:
    """`count` of the texts, each as likely as any other, in one pass."""
    kept: list[str] = []
    for number, text in enumerate(texts):
        if number < count:
            kept.append(text)
        elif (place := int(random.integers(number + 1))) < count:
            kept[place] = text
    return kept


def _open(
    model: Path, device: str, dtype: str | None, expert_memory: str | None
) -> tuple[PagedModel, Callable[[str], list[int]]]:
    from pager.engine.paged_model import load_paged_model
    from pager.memory.plan import Budgets
    from pager.tokenizing import encode, read_tokenizer

    tokenizer = read_tokenizer(model)
    if tokenizer is None:
        raise InvalidRequest(f"{model} has no tokenizer.json to read the documents with")
    with busy("loading"):
        paged = load_paged_model(model, device=device, dtype=dtype, budgets=Budgets(expert_memory=expert_memory))
    return paged, lambda text: encode(tokenizer, text, add_special_tokens=False).ids


def _fit_stand_ins(paged: PagedModel, documents: Sequence[Sequence[int]], seed: int) -> StandIns:
    from pager.lab.fitting import StandInFit, sizes_of_pools

    sizes = sizes_of_pools(paged.facts)
    random = np.random.default_rng(seed)
    fit = StandInFit(paged)
    chosen = [ids for ids in documents if ids][:STAND_IN_DOCUMENTS]
    with steps_progress("finding stand-ins", len(chosen)) as advance:
        for ids in chosen:
            fit.add(ids, sizes[int(random.integers(len(sizes)))])
            advance()
    return fit.fit()


def _read(
    paged: PagedModel, trunk: TrunkPredictor, documents: Sequence[Sequence[int]], seed: int
) -> list[DocumentReading]:
    from pager.lab.fitting import DocumentReader

    reader = DocumentReader(paged, trunk, seed=seed)
    readings = []
    with steps_progress("reading documents", len(documents)) as advance:
        for ids in documents:
            reading = reader.read(ids)
            if reading is not None:
                readings.append(reading)
            advance()
    return readings


def _report(fitted: Fit, path: Path, nbytes: int, num_documents: int, as_json: bool) -> None:
    if as_json:
        print_json(
            {
                "path": str(path),
                "bytes": nbytes,
                "documents": num_documents,
                "unseen_recall": fitted.recall,
                "recall_error": fitted.recall_error,
                "unseen_mass": fitted.mass,
            }
        )
        return
    out.print(f"fitted to {num_documents} documents: {path} ({format_bytes(nbytes)})", markup=False)
    out.print("on documents that the maps had not seen:")
    for source, recall in fitted.recall.items():
        out.print(
            f"{source:<8} {fitted.mass[source]:.3f} of what the best eighth of the experts covers; recall of the "
            f"prefill's pool {recall:.2f}, estimated within {fitted.recall_error[source]:.3f}",
            markup=False,
        )
