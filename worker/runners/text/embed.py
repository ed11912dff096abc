"""Runner of ``text.embed``."""

import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from contentfactory.errors import InputError, JobCancelled
from contentfactory.jobs.text import TextEmbed
from worker.context import Failure, JobContext, Output, Yield
from worker.engines.encoder import Encoder, load_encoder, normalise
from worker.engines.files import ResolvedModel
from worker.runners import runs


@runs(TextEmbed)
def embed(params: list[TextEmbed], context: JobContext) -> Iterator[Yield]:
    """Vectors of all texts of a micro-batch, texts of equal length together."""
    encoder = load(context)
    tokens: list[list[int]] = []
    owners: list[int] = []
    coded = iter(_encode(encoder, params))
    for job, one in enumerate(params):
        found = [next(coded) for _ in one.input]
        wrong = next(((n, error) for n, error in enumerate(found) if isinstance(error, InputError)), None)
        if wrong is not None:
            yield Failure(job, InputError(wrong[1].message, param=f"input.{wrong[0]}"))
            continue
        tokens += [ids for ids in found if not isinstance(ids, InputError)]
        owners += [job] * len(found)
    first = {job: owners.index(job) for job in set(owners)}
    vectors: dict[int, dict[int, NDArray[np.float32]]] = {job: {} for job in first}
    for index, vector in encoder.embed(tokens, lambda index: not context.cancelled(owners[index])):
        job = owners[index]
        done = vectors[job]
        done[index - first[job]] = vector
        total = len(params[job].input)
        context.progress(job, len(done) / total)
        if len(done) == total:
            matrix = np.stack([done[n] for n in range(total)])
            yield _output(job, params[job], matrix, sum(len(tokens[first[job] + n]) for n in range(total)), encoder)
            del vectors[job]
    for job in sorted(vectors):
        yield Failure(job, JobCancelled("the job was cancelled while it ran"))


def load(context: JobContext, model: ResolvedModel | None = None) -> Encoder:
    """A text encoder out of the cache.

    Args:
        context: The micro-batch's context.
        model: Which; the params' one where left out.
    """
    device = context.device

    def encoder(model: ResolvedModel) -> Encoder:
        return load_encoder(model, device)

    return context.load(encoder, model)


def _encode(encoder: Encoder, params: list[TextEmbed]) -> list[list[int] | InputError]:
    """Token ids of all texts of all jobs, in their order."""
    texts = [[str(text) for text in one.input] for one in params]
    if len({one.truncate for one in params}) == 1:
        return encoder.encode_all([text for own in texts for text in own], truncate=params[0].truncate)
    return [ids for own, one in zip(texts, params, strict=True) for ids in encoder.encode_all(own, truncate=one.truncate)]


def _output(job: int, params: TextEmbed, matrix: NDArray[np.float32], tokens: int, encoder: Encoder) -> Output:
    if params.normalise:
        matrix = normalise(matrix)
    meta = {"count": len(matrix), "dimensions": encoder.dimensions, "tokens": tokens}
    if params.encoding == "float32":
        return Output(job, "embedding.f32", "application/octet-stream", matrix.astype("<f4").tobytes(), meta)

    def encode() -> bytes:
        # Nine digits bring every float32 back exactly; one format for a whole vector takes a quarter of the time that a number after the other takes.
        numbers = ",".join(["%.9g"] * matrix.shape[1])
        rows = ",".join(f"[{numbers % tuple(row)}]" for row in matrix.tolist())
        head = json.dumps({"model": encoder.name, "dimensions": encoder.dimensions}, separators=(",", ":"))
        return f'{head[:-1]},"embeddings":[{rows}]}}'.encode()

    return Output(job, "embedding.json", "application/json", encode, meta)
