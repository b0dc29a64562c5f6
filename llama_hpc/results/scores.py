"""The file of scores: log-probabilities of the tokens of documents, and their perplexities (version 1).

Root attributes: ``format``, ``version``, ``status``, ``digest``; ``window`` and ``stride`` in tokens; over all documents
``scored``, ``log_likelihood`` and ``perplexity``.

=============================  =====================================================================================
``documents/id``               string [D]: one row a document, in input order
``documents/scored``           int64 [D]: tokens that have a log-probability
``documents/log_likelihood``   float64 [D]: the sum of these, as if added exactly and rounded once
``documents/perplexity``       float64 [D]: exp(-log_likelihood / scored), correctly rounded from 40 decimal digits
``documents/offsets``          int64 [D+1]: document i has tokens ``offsets[i]:offsets[i+1]``
``documents/tokens``           int32, flat: all tokens, also those of the tokenizer's own
``documents/logprobs``         float32, flat: natural logarithm of each token's probability, given those of its window before
                               it; never -0; NaN (0x7fc00000) for a token that starts the window which scores it
``provenance``                 attributes for scalars, datasets for lists, groups for dictionaries (provenance.py)
=============================  =====================================================================================

The digest is that of answers (digest.py): each document counts as output 0 of the request with its id.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from decimal import Context, Decimal
from pathlib import Path
from typing import Any

import numpy as np

from llama_hpc.errors import ResultsError
from llama_hpc.results import provenance as provenance_group
from llama_hpc.results.digest import digest
from llama_hpc.results.reader import Results, damage, opened, results_in
from llama_hpc.results.schema import FORMAT as RESULTS_FORMAT
from llama_hpc.results.schema import VERSION as RESULTS_VERSION
from llama_hpc.results.schema import Output, canonical_logprobs, canonical_tokens
from llama_hpc.results.storage import flat, new_file, numbers, ragged, strings

FORMAT = "llama_hpc scores"
VERSION = 1


@dataclass(frozen=True)
class Totals:
    """Of one or more documents: how many tokens have a log-probability, and the correctly rounded sum of these."""

    scored: int
    log_likelihood: float

    @classmethod
    def of(cls, logprobs: np.ndarray) -> "Totals":
        """From float32 [n] with NaN where there is none."""
        known = logprobs[~np.isnan(logprobs)]
        return cls(len(known), math.fsum(known.tolist()))

    @property
    def perplexity(self) -> float:
        """exp(-log_likelihood / scored): in decimals, as an exp of the C library differs from machine to machine."""
        if not self.scored:
            return math.nan
        context = Context(prec=40, traps=[])        # what is too large becomes infinite
        return float(context.exp(context.divide(Decimal(-self.log_likelihood), Decimal(self.scored))))


@dataclass(frozen=True)
class Score:
    """One document: ``tokens`` int32 [n] and their ``logprobs`` float32 [n], NaN where a token has none."""

    id: str
    tokens: np.ndarray
    logprobs: np.ndarray

    @property
    def totals(self) -> Totals:
        return Totals.of(self.logprobs)

    @property
    def perplexity(self) -> float:
        """See ``Totals``; NaN where no token has a log-probability."""
        return self.totals.perplexity


@dataclass
class Scores:
    """An open file of scores; use it in a ``with`` block or call ``close``.

    Every property and method raises ResultsError where the file turns out to be damaged.
    """

    path: Path
    status: str
    digest: str
    window: int
    stride: int
    totals: Totals
    file: Any

    def __enter__(self) -> "Scores":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self.file.close()

    @property
    def ids(self) -> list[str]:
        """The id of every document, in input order."""
        with damage(self.path):
            return self.file["documents/id"].asstr()[:].tolist()

    @property
    def provenance(self) -> dict[str, Any]:
        """How the scores came about."""
        with damage(self.path):
            return provenance_group.load(self.file["provenance"])

    def documents(self, rows: range | None = None) -> Iterator[Score]:
        """The documents, or those of some rows."""
        ids = self.ids
        with damage(self.path):
            group = self.file["documents"]
            offsets = group["offsets"][:].tolist()
            for row in range(len(ids)) if rows is None else rows:
                piece = slice(offsets[row], offsets[row + 1])
                yield Score(ids[row], group["tokens"][piece], group["logprobs"][piece])

    def verify(self) -> str:
        """Compute digest and sums again and return the digest. Raises ResultsError where the file says others."""
        documents = list(self.documents())
        found, totals = _digest(documents), _totals(documents)
        if (found, totals) != (self.digest, self.totals):
            raise ResultsError(f"{self.path}: the digest is {found}, with {totals}, but the file says {self.digest}, with "
                               f"{self.totals}: it was altered")
        return found


def read_scores(path: str | Path) -> Scores:
    """Open a file of scores. Raises ResultsError as ``read_results`` does."""
    with opened(path, {FORMAT: VERSION}) as (file, attributes):
        return _scores(Path(path), file, attributes)


def read_output(path: str | Path) -> Results | Scores:
    """Open a result file or a file of scores. Raises ResultsError as ``read_results`` does."""
    with opened(path, {RESULTS_FORMAT: RESULTS_VERSION, FORMAT: VERSION}) as (file, attributes):
        scores = attributes["format"] == FORMAT
        return (_scores if scores else results_in)(Path(path), file, attributes)


def _scores(path: Path, file: Any, attributes: Mapping[str, Any]) -> Scores:
    with damage(path):
        totals = Totals(int(attributes["scored"]), float(attributes["log_likelihood"]))
        scores = Scores(path, attributes["status"], attributes["digest"], int(attributes["window"]),
                        int(attributes["stride"]), totals, file)
        group = file["documents"]
        sizes = {len(group["id"]), len(group["offsets"]) - 1, len(group["scored"])}
        flat_sizes = {len(group["tokens"]), len(group["logprobs"]), int(group["offsets"][-1])}
        offsets = group["offsets"][:]
    if len(sizes) > 1 or len(flat_sizes) > 1 or offsets[0] != 0 or np.any(offsets[1:] < offsets[:-1]):
        raise ResultsError(f"{path}: the file of scores is damaged: sizes of its datasets contradict each other")
    return scores


def write_scores(path: str | Path, documents: Sequence[Score], window: int, stride: int, provenance: Mapping[str, Any], *,
                 overwrite: bool = False, rescue: Path | None = None) -> tuple[str, float]:
    """Write one file of scores; returns its digest and its perplexity. Raises as ``storage.new_file`` does."""
    totals, total_digest = _totals(documents), _digest(documents)
    attributes = {"status": "complete", "digest": total_digest, "window": window, "stride": stride, "scored": totals.scored,
                  "log_likelihood": totals.log_likelihood, "perplexity": totals.perplexity}
    each = [document.totals for document in documents]
    with new_file(path, FORMAT, VERSION, attributes, provenance, overwrite, rescue) as file:
        group = file.create_group("documents")
        strings(group, "id", [document.id for document in documents])
        numbers(group, "scored", np.array([own.scored for own in each], "<i8"))
        numbers(group, "log_likelihood", np.array([own.log_likelihood for own in each], "<f8"))
        numbers(group, "perplexity", np.array([own.perplexity for own in each], "<f8"))
        ragged(group, "tokens", [canonical_tokens(document.tokens) for document in documents], "<i4")
        numbers(group, "logprobs", flat([canonical_logprobs(document.logprobs) for document in documents], "<f4"))
    return total_digest, totals.perplexity


def _totals(documents: Sequence[Score]) -> Totals:
    return Totals.of(flat([document.logprobs for document in documents], "<f4"))


def _digest(documents: Sequence[Score]) -> str:
    outputs = (Output(row, 0, document.tokens, document.logprobs, "", "") for row, document in enumerate(documents))
    return digest([document.id for document in documents], outputs)
