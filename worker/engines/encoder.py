"""Text encoders: sentence vectors out of models in the sentence-transformers layout.

A text's vector must not depend on the texts that it is computed with, to the last bit. So nothing is padded: texts of equal
length in tokens run together, and a batch never has fewer tokens than the matrix library needs to take the same kernel as
for many. Loading measures whether a text then has the same bits alone and in company; where it has not, each runs alone.
"""

import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers.utils.hub import cached_file

from contentfactory.errors import InputError, ModelUnavailable
from worker.engines.files import ResolvedModel
from worker.engines.language import find_source, first_line, pick_dtype
from worker.engines.options import InferenceOptions, prepare

BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}
"""Most tokens of one forward pass."""

LEAST_TOKENS = 32
"""Fewest: below 16 rows a matrix product takes another kernel, with other bits."""

POOLINGS = ("cls", "mean", "max", "lasttoken", "mean_sqrt_len_tokens")


@dataclass(frozen=True)
class Pooling:
    """How token vectors become one vector.

    Args:
        mode: One of `POOLINGS`.
        limit: Most tokens of a text; None for what the model takes.
    """

    mode: str = "mean"
    limit: int | None = None


class Encoder:
    """A text encoder with its tokenizer.

    Attributes:
        limit: Most tokens of a text, with the tokens that the tokenizer adds.
        dimensions: Length of a vector.
        exact: Whether texts may share a forward pass without changing each other's bits; else they run one by one.
    """

    def __init__(self, net: Any, tokenizer: Any, pooling: Pooling, device: str, name: str) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._net = net
        self._mode = pooling.mode
        self._device = torch.device(device)
        config = net.config.get_text_config()
        self.dimensions = int(config.hidden_size)
        known = [pooling.limit, getattr(config, "max_position_embeddings", None), tokenizer.model_max_length]
        self.limit = min(int(n) for n in known if n and n < 1_000_000)
        self.exact = True
        self.exact = self._is_exact()

    def encode(self, text: str, *, truncate: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: The text.
            truncate: Whether a text that is too long is cut.

        Raises:
            InputError: If it is too long and may not be cut, or is empty.
        """
        if not text.strip():
            raise InputError("an empty text has no meaning to embed", param="input")
        ids: list[int] = self.tokenizer(text, truncation=truncate, max_length=self.limit if truncate else None, verbose=False)["input_ids"]
        if len(ids) > self.limit:
            raise InputError(
                f"the text has {len(ids)} tokens; model {self.name} takes {self.limit}. Shorten it or set truncate", param="input"
            )
        return ids

    @torch.inference_mode()
    def embed(
        self, texts: Sequence[list[int]], wanted: Callable[[int], bool] = lambda index: True
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Vectors of texts, short texts first.

        Args:
            texts: Token ids of each.
            wanted: Asked before each forward pass whether a text is still wanted.

        Yields:
            Index of the text and its vector, ``(dimensions,)``, not normalised.
        """
        most = BATCH_TOKENS.get(self._device.type, 2048)
        lengths: defaultdict[int, list[int]] = defaultdict(list)
        for index, ids in enumerate(texts):
            lengths[len(ids)].append(index)
        for length in sorted(lengths):
            step = max(1, most // length) if self.exact else 1
            indices = lengths[length]
            for start in range(0, len(indices), step):
                batch = [n for n in indices[start : start + step] if wanted(n)]
                if batch:
                    yield from zip(batch, self._forward([texts[n] for n in batch]), strict=True)

    def _forward(self, texts: list[list[int]]) -> NDArray[np.float32]:
        """Vectors of texts of equal length, ``(texts, dimensions)``."""
        least = -(-LEAST_TOKENS // len(texts[0]))
        rows = [*texts, *[texts[0]] * (least - len(texts))]
        ids = torch.tensor(rows, device=self._device)
        states = self._net(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state.float()
        if self._mode == "cls":
            vectors = states[:, 0]
        elif self._mode == "lasttoken":
            vectors = states[:, -1]
        elif self._mode == "max":
            vectors = states.amax(1)
        else:
            # One text at a time: a sum over several in one call may be split up by their number.
            vectors = torch.stack([one.sum(0) for one in states[: len(texts)]])
            vectors = vectors / (ids.shape[1] if self._mode == "mean" else ids.shape[1] ** 0.5)
        array: NDArray[np.float32] = vectors[: len(texts)].cpu().numpy()
        return array

    def _is_exact(self) -> bool:
        high = int(self._net.get_input_embeddings().weight.shape[0])
        for length, count in ((7, 96), (40, 24)):
            texts = [[(31 * row + 7919 * n + 11) % high for n in range(length)] for row in range(count)]
            with torch.inference_mode():
                together = self._forward(texts)
                alone = np.concatenate([self._forward([texts[n]]) for n in (0, count // 2, count - 1)])
            if not np.array_equal(together[[0, count // 2, count - 1]], alone):
                return False
        return True


def normalise(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    """Vectors scaled to length 1, row by row; a vector of zeros stays one."""
    rows = [row / max(float(np.sqrt(np.dot(row, row))), 1e-12) for row in vectors]
    return np.stack(rows).astype(np.float32)


def load_encoder(model: ResolvedModel, device: str = "cpu") -> Encoder:
    """Load a text encoder.

    Args:
        model: ``files['folder']`` or ``options['source']`` (a local folder or a Hugging Face name) holds config, tokenizer and
            safetensors, and where it is one of sentence-transformers, its pooling. ``options``: ``dtype``, ``revision``,
            ``pooling`` (one of `POOLINGS`, over what the folder says).
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ModelUnavailable: If something is missing or is not what it should be; the message says what.
    """
    source = find_source(model)
    options = InferenceOptions.of(model, device)
    revision = model.options.get("revision")
    more = {"revision": str(revision)} if revision else {}
    transformers.utils.logging.disable_progress_bar()
    try:
        pooling = _pooling(source, model, more)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **more)
        net: Any = transformers.AutoModel.from_pretrained(
            source, dtype=pick_dtype(model, device), use_safetensors=True, trust_remote_code=False, **more,
            **({"attn_implementation": options.attention} if options.attention else {}),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelUnavailable(f"model {model.name}: cannot be loaded from {source}: {first_line(error)}") from error
    net = prepare(net.to(device).eval().requires_grad_(False), options)
    return Encoder(net, tokenizer, pooling, device, model.name)


def _pooling(source: str, model: ResolvedModel, more: dict[str, str]) -> Pooling:
    """Read the files that sentence-transformers puts beside a model."""

    def read(name: str) -> Any:
        path = Path(source) / name
        if not Path(source).is_dir():
            found = cached_file(
                source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False, **more
            )
            path = Path(found or "")
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    for module in read("modules.json") or []:
        kind = str(module.get("type", "")).rpartition(".")[2]
        if kind not in ("Transformer", "Pooling", "Normalize"):
            raise ModelUnavailable(f"model {model.name}: its module {kind} is not supported; known: Transformer, Pooling, Normalize")
    limit = (read("sentence_bert_config.json") or {}).get("max_seq_length")
    settings = read("1_Pooling/config.json") or {}
    modes = [mode for mode in POOLINGS if settings.get(f"pooling_mode_{_old_name(mode)}")]
    if settings.get("pooling_mode"):
        modes = [settings["pooling_mode"]]
    if model.options.get("pooling"):
        modes = [str(model.options["pooling"])]
    if len(modes) > 1 or (modes and modes[0] not in POOLINGS):
        raise ModelUnavailable(f"model {model.name}: pooling {', '.join(modes)} is not supported; one of: {', '.join(POOLINGS)}")
    return Pooling(modes[0] if modes else "mean", limit)


def _old_name(mode: str) -> str:
    """Name of a pooling in the older form of the file, one flag for each."""
    return {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens", "mean_sqrt_len_tokens": "mean_sqrt_len_tokens"}.get(mode, mode)
