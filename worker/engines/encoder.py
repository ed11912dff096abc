"""Text encoders: sentence vectors out of models in the sentence-transformers layout.

A text's vector must not depend on the texts that it is computed with, to the last bit. So nothing is padded: the texts of a
pass are laid end to end and share everything but the attention, which each has to itself, those of equal length in one call.
Where a model's attention cannot be taken over so, only texts of equal length run together. A pass never has fewer tokens than
the matrix library needs to take the same kernel as for many. Loading measures whether a text then has the same bits alone and
in company; where it has not, each runs alone.
"""

import inspect
import json
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch.nn import functional as F
from transformers.utils.hub import cached_file

from contentfactory.errors import InputError, ModelUnavailable
from worker.engines.files import ResolvedModel
from worker.engines.language import find_source, first_line, pick_dtype
from worker.engines.options import InferenceOptions, prepare

ATTENTION = "contentfactory_texts"
"""Name under which transformers knows the attention of `_attend`."""

BATCH_TOKENS = {"cpu": 2048, "cuda": 32_768}
"""Most tokens of one forward pass."""

LEAST_TOKENS = 32
"""Fewest: below 16 rows a matrix product takes another kernel, with other bits."""

POOLINGS = ("cls", "mean", "max", "lasttoken", "mean_sqrt_len_tokens")


_now = threading.local()
"""``runs`` of the pass of this thread: texts of equal length that lie side by side, as (first token, texts, length)."""


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each text over itself; called by transformers in each layer.

    Args:
        module: The layer's attention.
        query: ``(1, heads, tokens, width)`` of all texts, end to end.
        key: As ``query``.
        value: As ``query``.
        attention_mask: Unused: a text sees all of itself.
        scaling: Factor of the scores.
        **kwargs: What else the model passes.

    Returns:
        ``(1, tokens, heads, width)``, and no weights.

    Raises:
        NotImplementedError: If the model asks for something else than plain attention in both directions.
    """
    odd = [name for name in ("softcap", "s_aux", "position_bias", "sliding_window") if kwargs.get(name) is not None]
    if odd or kwargs.get("is_causal") or key.shape[1] != query.shape[1]:
        raise NotImplementedError(type(module).__name__)
    runs = getattr(_now, "runs", ())
    if not runs:  # the net is used for something else than a pass of ours
        return F.scaled_dot_product_attention(query, key, value, attn_mask=attention_mask, scale=scaling).transpose(1, 2), None
    heads, width = query.shape[1], query.shape[3]
    outs = []
    for start, count, length in runs:
        q, k, v = (part[0, :, start : start + count * length].view(heads, count, length, width).transpose(0, 1) for part in (query, key, value))
        made = F.scaled_dot_product_attention(q, k, v, scale=scaling)
        outs.append(made.transpose(1, 2).reshape(1, count * length, heads, width))
    return outs[0] if len(outs) == 1 else torch.cat(outs, 1), None


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
        self._takes_positions = {"position_ids", "token_type_ids"} & set(inspect.signature(net.forward).parameters)
        with torch.inference_mode():
            self._packs = self._may_pack()
            if not self._packs:
                self.exact = self._is_exact()

    def encode_all(self, texts: Sequence[str], *, truncate: bool = False) -> list[list[int] | InputError]:
        """Token ids of many texts, or what is wrong with each; much quicker than one by one."""
        filled = [n for n, text in enumerate(texts) if text.strip()]
        found: list[list[int] | InputError] = [InputError("an empty text has no meaning to embed", param="input") for _ in texts]
        if filled:
            coded = self.tokenizer([texts[n] for n in filled], truncation=truncate, max_length=self.limit if truncate else None, verbose=False)
            for n, ids in zip(filled, coded["input_ids"], strict=True):
                found[n] = ids if len(ids) <= self.limit else self._too_long(ids)
        return found

    def _too_long(self, ids: list[int]) -> InputError:
        return InputError(f"the text has {len(ids)} tokens; model {self.name} takes {self.limit}. Shorten it or set truncate", param="input")

    def encode(self, text: str, *, truncate: bool = False) -> list[int]:
        """Token ids of a text.

        Args:
            text: The text.
            truncate: Whether a text that is too long is cut.

        Raises:
            InputError: If it is too long and may not be cut, or is empty.
        """
        (found,) = self.encode_all([text], truncate=truncate)
        if isinstance(found, InputError):
            raise found
        return found

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
        if self._packs:
            yield from self._embed_packed(texts, wanted, most)
            return
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

    def _embed_packed(
        self, texts: Sequence[list[int]], wanted: Callable[[int], bool], most: int
    ) -> Iterator[tuple[int, NDArray[np.float32]]]:
        order = deque(sorted(range(len(texts)), key=lambda n: len(texts[n])))
        while order:
            batch: list[int] = []
            tokens = 0
            while order and (not batch or tokens + len(texts[order[0]]) <= most):
                index = order.popleft()
                if wanted(index):
                    batch.append(index)
                    tokens += len(texts[index])
            if batch:
                yield from zip(batch, self._forward_packed([texts[n] for n in batch]), strict=True)

    def _forward_packed(self, texts: list[list[int]]) -> NDArray[np.float32]:
        """Vectors of texts, shortest first, ``(texts, dimensions)``."""
        # What is missing to the fewest tokens is filled up with the last text again.
        missing = LEAST_TOKENS - sum(map(len, texts))
        rows = [*texts, *[texts[-1]] * (-(-missing // len(texts[-1])) if missing > 0 else 0)]
        runs: list[tuple[int, int, int]] = []
        at = 0
        for row in rows:
            if runs and runs[-1][2] == len(row):
                runs[-1] = (runs[-1][0], runs[-1][1] + 1, len(row))
            else:
                runs.append((at, 1, len(row)))
            at += len(row)
        ids = torch.tensor([[token for row in rows for token in row]], device=self._device)
        more = {}
        if "position_ids" in self._takes_positions:
            more["position_ids"] = torch.tensor([[n for row in rows for n in range(len(row))]], device=self._device)
        if "token_type_ids" in self._takes_positions:
            more["token_type_ids"] = torch.zeros_like(ids)
        _now.runs = runs
        try:
            states = self._net(input_ids=ids, **more).last_hidden_state[0].float()
        finally:
            _now.runs = ()
        vectors = []
        at = 0
        for row in texts:
            vectors.append(self._pool(states[at : at + len(row)]))
            at += len(row)
        array: NDArray[np.float32] = torch.stack(vectors).cpu().numpy()
        return array

    def _pool(self, states: torch.Tensor) -> torch.Tensor:
        """Vector of one text out of its tokens' states, ``(tokens, dimensions)``."""
        if self._mode == "cls":
            return states[0]
        if self._mode == "lasttoken":
            return states[-1]
        if self._mode == "max":
            return states.amax(0)
        return states.sum(0) / (states.shape[0] if self._mode == "mean" else states.shape[0] ** 0.5)

    def _may_pack(self) -> bool:
        """Whether texts laid end to end get what the library gives them one by one, and the same bits in any company."""
        if not (getattr(self._net, "_supports_attention_backend", False) and self._net._can_set_attn_implementation()):
            return False
        high = int(self._net.get_input_embeddings().weight.shape[0])
        lengths = [2, 5, *[7] * 40, 11, 23, *[40] * 12, 90]
        texts = [[(31 * row + 7919 * n + 11) % high for n in range(min(length, self.limit))] for row, length in enumerate(lengths)]
        tested = (0, 1, 20, len(texts) - 14, len(texts) - 5, len(texts) - 1)
        own = self._net.config._attn_implementation
        wanted = np.concatenate([self._forward([texts[n]]) for n in tested])
        transformers.AttentionInterface.register(ATTENTION, _attend)
        try:
            self._net.set_attn_implementation(ATTENTION)
            together = self._forward_packed(texts)[list(tested)]
            alone = np.concatenate([self._forward_packed([texts[n]]) for n in tested])
            if np.array_equal(together, alone) and np.allclose(together, wanted, rtol=1e-3, atol=1e-3 * float(wanted.std())):
                return True
        except (NotImplementedError, RuntimeError, IndexError, TypeError, ValueError) as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
        self._net.set_attn_implementation(own)
        return False

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
