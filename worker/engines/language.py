"""Causal language models: loading them, and writing with many texts at once.

Weights come from a GGUF file (turned into safetensors once, in the model's folder), from a local folder in the Hugging
Face layout, or from a Hugging Face name. Only safetensors are read and no code of a model is ever run.

A job's tokens must not depend on its neighbours. Padding a batch would break that: every matrix product and every attention
sum would then be cut up differently in company than alone, which moves logits by 1e-5 and, at a near tie, changes a word.
So each text is computed as if it were alone:

* A prompt is read in blocks of fixed length. A block's keys and values depend on the tokens up to its end and on nothing
  else, hence they are kept and shared bit for bit by prompts that begin alike (instructions, examples). The blocks of several
  prompts are laid end to end, not side by side, so that they share the linear layers without any padding.
* While writing, the rows of a round share the linear layers, but each attends over its own keys and values. Those lie in one
  table, cut at the next multiple of `BUCKET` tokens: how far a row is filled up depends on its own length only, and rows of
  the same bucket attend in one call.
* A linear layer gives a row the same bits in any company only while the number of rows stays within one kernel of the
  machine's matrix library. Loading a model measures from how few to how many that holds, and whether it holds for prompts
  that share a pass; where it does not, rounds are filled up with idle rows to one fixed width and prompts are read singly.

Loading also compares this way of running the model with the library's own. A model for which the two disagree (recurrent
layers, unusual attention) is run by the library, one row after the other: slower, and just as independent.
"""

import inspect
import threading
import warnings
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.nn import functional as F

from contentfactory.errors import InputError, ModelUnavailable
from worker.engines.files import ResolvedModel
from worker.engines.options import InferenceOptions, prepare

ATTENTION = "contentfactory_rows"
"""Name under which transformers knows the attention of `_attend`."""

BLOCK = {"cpu": 64, "cuda": 256}
"""Tokens of a prompt that are read at once."""

WIDTHS = {
    "cpu": ((2, 32), (4, 32), (8, 32), (16, 32), (2, 16), (4, 16), (8, 16), (2, 15), (4, 15), (2, 8), (4, 8)),
    "cuda": ((2, 32), (4, 32), (8, 32), (16, 32), (2, 16), (2, 8)),
}
"""Fewest and most rows of a round; the first pair is taken between which a row's bits do not depend on how many there are. Those that hold a
whole micro-batch come first: a pass of two rows costs most of what one of 32 does."""

FIXED_WIDTH = {"cpu": 16, "cuda": 32}
"""Rows of every round where there is no such pair."""

PACK = {"cpu": (192, 384), "cuda": (2048,)}
"""Most tokens of several prompts that are read in one pass: the last size up to which a prompt's bits do not depend on its company. With 384
reading takes a fifth less time on one core than with 192, and with more than that hardly less."""

BUCKET = 64
"""Rows attend over their own tokens filled up to a multiple of this."""

TABLE_TOKENS = 512
"""Longest row of the table, tokens: a longer one keeps its own keys and values, and attends by itself."""

KV_TOKENS = 65_536
"""Most tokens that the rows of a round may hold keys and values for, all together."""

PREFIX_MB = 192
"""Memory for the blocks of prompts that are kept."""

_TOP = 1024


@dataclass
class Request:
    """One text to write.

    Args:
        prompt: Token ids; at least one.
        max_tokens: Most tokens to write, 1 or more.
        temperature: 0 takes the likeliest token each time.
        top_p: Share of the probability that is drawn from, in ``(0, 1]``.
        top_k: Number of tokens that are drawn from; 0 for all.
        repetition_penalty: Divides the logits of tokens already written (not those of the prompt); 1 for none.
        no_repeat_ngram: Length of the token sequences that must not be written twice; 0 for none.
        stop: Texts at which writing ends; they are not part of the result.
        generator: Source of the draws; needed where ``temperature`` is above 0.
        done: Looks at the text so far after each token and says whether that is enough.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    no_repeat_ngram: int = 0
    stop: tuple[str, ...] = ()
    generator: torch.Generator | None = None
    done: Callable[[str], bool] | None = None


@dataclass(frozen=True)
class Completion:
    """A written text.

    Args:
        text: The text, without the stop text.
        tokens: Ids that were written, without the end token.
        finish: ``stop`` (the model ended, a stop text came, or it was enough) or ``length``.
        likelihood: Mean log probability of the tokens under the model as it is, in nats.
    """

    text: str
    tokens: list[int]
    finish: str
    likelihood: float


class _UnsupportedError(Exception):
    """The model does something in its attention that `_attend` does not know."""


@dataclass(eq=False)
class _Row:
    """Keys and values of one text, layer by layer, ``(1, heads, capacity, width)``, filled up to ``length``.

    While the row is in a `_Table` they lie there, and the two dictionaries are empty.
    """

    capacity: int
    length: int = 0
    keys: dict[int, torch.Tensor] = field(default_factory=dict)
    values: dict[int, torch.Tensor] = field(default_factory=dict)

    def write(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer not in self.keys:
            self.keys[layer] = key.new_empty(1, key.shape[1], self.capacity, key.shape[3])
            self.values[layer] = value.new_empty(1, value.shape[1], self.capacity, value.shape[3])
        end = self.length + key.shape[2]
        self.keys[layer][:, :, self.length : end] = key
        self.values[layer][:, :, self.length : end] = value
        return self.keys[layer][:, :, :end], self.values[layer][:, :, :end]

    def cut(self, start: int, end: int) -> "_Block":
        return _Block(
            {n: t[:, :, start:end].clone() for n, t in self.keys.items()},
            {n: t[:, :, start:end].clone() for n, t in self.values.items()},
        )

    def paste(self, block: "_Block") -> None:
        for layer in block.keys:
            end = self.write(layer, block.keys[layer], block.values[layer])[0].shape[2]
        self.length = end


@dataclass
class _Block:
    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for part in (self.keys, self.values) for t in part.values())


class _Table:
    """Keys and values of all rows that are being written, layer by layer ``(rows, heads, capacity, width)``.

    Args:
        slots: Most rows.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.rows: list[_Row] = []
        self.capacity = 0
        self.keys: dict[int, torch.Tensor] = {}
        self.values: dict[int, torch.Tensor] = {}

    def settle(self, rows: Sequence[_Row]) -> list[_Row]:
        """Make room for a round: what ended leaves, what is new joins, what grew too long goes.

        Returns:
            The rows in the order in which the round computes them: first those of the table in the order of their places.
        """
        wanted = {id(row) for row in rows}
        for row in [r for r in self.rows if id(r) not in wanted]:
            self._drop(row)
        for row in [r for r in self.rows if r.length >= TABLE_TOKENS]:
            self._release(row)
            self._drop(row)
        inside = {id(row) for row in self.rows}
        for row in rows:
            if id(row) not in inside and row.length < TABLE_TOKENS and len(self.rows) < self.slots:
                self._join(row)
        self._grow(max((r.length for r in self.rows), default=0) + 1)
        self._arrange()
        inside = {id(row) for row in self.rows}
        return [*self.rows, *(row for row in rows if id(row) not in inside)]

    def _grow(self, tokens: int) -> None:
        if tokens <= self.capacity:
            return
        longest = max([tokens, *(row.capacity for row in self.rows)])
        self.capacity = _bucket(min(TABLE_TOKENS, longest, 2 * tokens))
        for part in (self.keys, self.values):
            for layer, old in part.items():
                # Zeros: what lies behind a row's end is masked, but must be a number.
                new = old.new_zeros(self.slots, old.shape[1], self.capacity, old.shape[3])
                new[:, :, : old.shape[2]] = old
                part[layer] = new

    def _join(self, row: _Row) -> None:
        place = len(self.rows)
        self.rows.append(row)
        self._grow(row.length + 1)
        for mine, its in ((self.keys, row.keys), (self.values, row.values)):
            for layer, tensor in its.items():
                if layer not in mine:
                    mine[layer] = tensor.new_zeros(self.slots, tensor.shape[1], self.capacity, tensor.shape[3])
                mine[layer][place, :, : row.length] = tensor[0, :, : row.length]
            its.clear()

    def _release(self, row: _Row) -> None:
        place = self.rows.index(row)
        for mine, its in ((self.keys, row.keys), (self.values, row.values)):
            for layer, tensor in mine.items():
                own = tensor.new_empty(1, tensor.shape[1], row.capacity, tensor.shape[3])
                own[0, :, : row.length] = tensor[place, :, : row.length]
                its[layer] = own

    def _drop(self, row: _Row) -> None:
        place, last = self.rows.index(row), self.rows.pop()
        if last is row:
            return
        self.rows[place] = last
        for part in (self.keys, self.values):
            for tensor in part.values():
                tensor[place, :, : last.length] = tensor[len(self.rows), :, : last.length]

    def _arrange(self) -> None:
        """Bring rows of equal buckets together where they have come apart: each run of them is one call."""
        buckets = [_bucket(row.length + 1) for row in self.rows]
        runs = sum(1 for n, b in enumerate(buckets) if not n or buckets[n - 1] != b)
        if runs <= len(set(buckets)) + 2:
            return
        order = sorted(range(len(buckets)), key=buckets.__getitem__)
        self.rows = [self.rows[n] for n in order]
        longest = max(buckets)
        for part in (self.keys, self.values):
            for tensor in part.values():
                tensor[: len(order), :, :longest] = tensor[order, :, :longest]


def _bucket(tokens: int) -> int:
    return -(-tokens // BUCKET) * BUCKET


class _Round:
    """What the layers of one forward pass must know of its rows.

    Args:
        table: Table of the rows that come first, one token each; None for none.
        alone: Row, place in the first dimension, first and last token of those that attend by themselves.
    """

    def __init__(self, table: _Table | None, alone: Sequence[tuple[_Row, int, int, int]], device: torch.device) -> None:
        self.table, self.alone = table, alone
        self.count = len(table.rows) if table else 0
        self.runs: list[tuple[int, int, int]] = []
        self._masks: dict[tuple[int, int | None], torch.Tensor] = {}
        if table is None or not self.count:
            return
        self._lengths = [row.length for row in table.rows]
        self._device = device
        self.places = torch.arange(self.count, device=device)
        self.ends = torch.tensor(self._lengths, device=device)
        start = 0
        for n in range(1, self.count + 1):
            if n == self.count or _bucket(self._lengths[n] + 1) != _bucket(self._lengths[start] + 1):
                self.runs.append((start, n, _bucket(self._lengths[start] + 1)))
                start = n

    def mask(self, start: int, stop: int, width: int, window: int | None) -> torch.Tensor:
        """What each row of a run sees, ``(rows, 1, 1, width)``."""
        if window is not None and max(self._lengths[start:stop]) < window:
            window = None
        found = self._masks.get((start, window))
        if found is None:
            at = torch.arange(width, device=self._device)
            ends = self.ends[start:stop, None]
            seen = at <= ends
            if window is not None:
                seen &= at > ends - window
            found = self._masks[(start, window)] = seen[:, None, None, :]
        return found

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float | None, window: int | None) -> torch.Tensor:
        """Attention of the table's rows: ``(rows, heads, 1, width)``."""
        table: Any = self.table
        n = self.count
        keys, values = table.keys[layer], table.values[layer]
        keys[self.places, :, self.ends] = key[:n, :, 0]
        values[self.places, :, self.ends] = value[:n, :, 0]
        # One token sees everything before it, so the heads that share keys can stand in the place of tokens.
        packed = query[:n].reshape(n, keys.shape[1], -1, query.shape[3])
        outs = [
            F.scaled_dot_product_attention(
                packed[start:stop], keys[start:stop, :, :width], values[start:stop, :, :width],
                attn_mask=self.mask(start, stop, width, window), scale=scaling,
            )
            for start, stop, width in self.runs
        ]  # fmt: skip
        out = outs[0] if len(outs) == 1 else torch.cat(outs)
        return out.reshape(n, query.shape[1], 1, out.shape[3])


_now = threading.local()
"""``round`` of the forward pass that this thread runs: `_attend` gets no other word of it."""


def _attend(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention of each row over its own keys and values; called by transformers in each layer.

    Args:
        module: The layer's attention, which knows its number.
        query: ``(rows, heads, tokens, width)``.
        key: ``(rows, key heads, tokens, width)``, the new tokens' only.
        value: As ``key``.
        attention_mask: Unused: a row sees all that came before it.
        scaling: Factor of the scores.
        sliding_window: How far back the layer sees, tokens; None for all.
        **kwargs: What else the model passes.

    Returns:
        ``(rows, tokens, heads, width)``, and no weights.

    Raises:
        _UnsupportedError: If the model asks for something else than plain causal attention.
    """
    if any(kwargs.get(name) is not None for name in ("softcap", "s_aux", "position_bias")):
        raise _UnsupportedError(type(module).__name__)
    layer: Any = module.layer_idx
    this: _Round = _now.round
    if this.count == query.shape[0]:
        return this.attend(layer, query, key, value, scaling, sliding_window).transpose(1, 2), None
    # Idle rows and tokens keep their zeros.
    out = query.new_zeros(*query.shape[:3], value.shape[3])
    if this.count:
        out[: this.count] = this.attend(layer, query, key, value, scaling, sliding_window)
    for row, at, start, stop in this.alone:
        new = (slice(at, at + 1), slice(None), slice(start, stop))
        keys, values = row.write(layer, key[new], value[new])
        out[new] = _by_itself(query[new], keys, values, scaling, sliding_window)
    return out.transpose(1, 2).contiguous(), None


def _by_itself(q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scaling: float | None, window: int | None) -> torch.Tensor:
    """Attention of the last tokens of one row, ``(1, heads, tokens, width)``."""
    new, seen = q.shape[2], keys.shape[2]
    if window is not None and new == 1 and seen > window:
        keys, values = keys[:, :, -window:], values[:, :, -window:]
    if new == 1:
        packed = q.reshape(1, keys.shape[1], -1, q.shape[3])
        out = F.scaled_dot_product_attention(packed, keys, values, scale=scaling)
        return out.reshape(1, q.shape[1], 1, out.shape[3])
    mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
    if window is not None:
        mask &= ~torch.ones_like(mask).tril(seen - new - window)
    groups = q.shape[1] // keys.shape[1]
    if groups > 1:
        keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
    return F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scaling)


class _Shared:
    """Runs the model with own keys and values a row, shared linear layers and shared beginnings of prompts."""

    def __init__(self, model: Any, device: torch.device, last_only: bool) -> None:
        self.model, self.device, self.last_only = model, device, last_only
        self.block = BLOCK.get(device.type, 64)
        self.width, self.least = 1, 1
        self.grouped = True
        self.pack = 0
        self.own = model.config._attn_implementation
        self._blocks: OrderedDict[tuple[int, ...], _Block] = OrderedDict()
        self._bytes = 0

    def table(self, rows: int) -> _Table:
        """Where the rows of one call of `LanguageModel.generate` lie, so many at most."""
        return _Table(min(self.width, rows) if self.grouped else 0)

    def _forward(self, this: _Round, ids: list[list[int]], positions: list[list[int]], keep: list[int] | None) -> torch.Tensor:
        """Logits: of each row's last token, or of the tokens ``keep`` of a single row; ``(rows or kept, vocabulary)``."""
        _now.round = this
        more: dict[str, Any] = {}
        if self.last_only:
            more["logits_to_keep"] = 1 if keep is None else torch.tensor(keep, device=self.device)
        try:
            logits: torch.Tensor = self.model(
                input_ids=torch.tensor(ids, device=self.device), position_ids=torch.tensor(positions, device=self.device),
                use_cache=False, **more,
            ).logits  # fmt: skip
        finally:
            _now.round = None
        if keep is None:
            return logits[:, -1]
        return logits[0] if self.last_only else logits[0, keep]

    def read(
        self, prompts: Sequence[list[int]], capacities: Sequence[int], step: Callable[[], None] = lambda: None
    ) -> list[tuple[_Row, torch.Tensor]]:
        """Read prompts: the keys and values of each, and the logits after it. Calls ``step`` after each pass."""
        rows = [_Row(capacity) for capacity in capacities]
        found: dict[int, torch.Tensor] = {}
        while len(found) < len(rows):
            parts: list[tuple[int, int]] = []  # index of the prompt, end of the part
            begun: set[tuple[int, ...]] = set()
            total = 0
            for index, (row, prompt) in enumerate(zip(rows, prompts, strict=True)):
                if index in found:
                    continue
                self._take_kept(row, prompt)
                # The last token is always read anew, for its logits.
                end = row.length + self.block if row.length + self.block < len(prompt) else len(prompt)
                key = tuple(prompt[:end])
                if end < len(prompt) and key in begun:
                    continue  # another prompt begins alike: this one takes what that one leaves
                if parts and (total + end - row.length > self.pack or len(parts) >= self.width):
                    break
                begun.add(key)
                parts.append((index, end))
                total += end - row.length
            found.update(self._read_parts(rows, prompts, parts))
            step()
        return [(row, found[index]) for index, row in enumerate(rows)]

    def _take_kept(self, row: _Row, prompt: list[int]) -> None:
        while row.length + self.block < len(prompt):
            kept = self._blocks.get(tuple(prompt[: row.length + self.block]))
            if kept is None:
                return
            self._blocks.move_to_end(tuple(prompt[: row.length + self.block]))
            row.paste(kept)

    def _read_parts(self, rows: Sequence[_Row], prompts: Sequence[list[int]], parts: Sequence[tuple[int, int]]) -> dict[int, torch.Tensor]:
        """Read one part of each of several prompts in one pass; the logits of those that end with it."""
        ids: list[int] = []
        positions: list[int] = []
        alone: list[tuple[_Row, int, int, int]] = []
        for index, end in parts:
            row = rows[index]
            alone.append((row, 0, len(ids), len(ids) + end - row.length))
            ids += prompts[index][row.length : end]
            positions += range(row.length, end)
        idle = max(0, self.least - len(ids))
        ended = [n for n, (index, end) in enumerate(parts) if end == len(prompts[index])]
        # The last layer too must never see fewer rows than it takes for the same bits.
        keep = [alone[n][3] - 1 for n in ended] or [0]
        keep += [keep[-1]] * (self.least - len(keep))
        logits = self._forward(_Round(None, alone, self.device), [ids + [0] * idle], [positions + [0] * idle], keep)
        for index, end in parts:
            row, start = rows[index], rows[index].length
            row.length = end
            if end < len(prompts[index]):
                self._keep(tuple(prompts[index][:end]), row.cut(start, end))
        return {parts[n][0]: logits[place] for place, n in enumerate(ended)}

    def _keep(self, key: tuple[int, ...], block: _Block) -> None:
        if key in self._blocks:
            return
        self._blocks[key] = block
        self._bytes += block.nbytes
        while self._bytes > PREFIX_MB * 2**20 and self._blocks:
            self._bytes -= self._blocks.popitem(last=False)[1].nbytes

    def write(self, table: _Table, rows: Sequence[_Row], tokens: Sequence[int]) -> list[torch.Tensor]:
        """Add one token to each row; the logits after it."""
        token = {id(row): t for row, t in zip(rows, tokens, strict=True)}
        order = table.settle(rows)
        inside = len(table.rows)
        idle = max(0, self.least - len(order))
        this = _Round(table, [(row, at, 0, 1) for at, row in enumerate(order) if at >= inside], self.device)
        logits = self._forward(
            this, [*([token[id(row)]] for row in order), *[[0]] * idle], [*([row.length] for row in order), *[[0]] * idle], None
        )
        for row in order:
            row.length += 1
        place = {id(row): at for at, row in enumerate(order)}
        return [logits[place[id(row)]] for row in rows]

    def agrees(self) -> bool:
        """Compare with the library's own way, and find the widths between which a row's bits stay the same."""
        self.model.set_attn_implementation(ATTENTION)
        limit = int(self.model.get_input_embeddings().weight.shape[0])
        probe = [(7919 * n + 13) % limit for n in range(1, 10)]
        try:
            table = _Table(1)
            ((row, logits),) = self.read([probe[:5]], [len(probe)])
            for token in probe[5:]:
                logits = self.write(table, [row], [token])[0]
        except _UnsupportedError:
            self.model.set_attn_implementation(self.own)
            return False
        self.model.set_attn_implementation(self.own)
        wanted = self.model(input_ids=torch.tensor([probe], device=self.device), use_cache=False).logits[0, -1]
        loose = 1e-3 if wanted.dtype == torch.float32 else 0.06
        if not torch.allclose(logits.float(), wanted.float(), rtol=loose, atol=loose * float(wanted.float().std())):
            return False
        self.model.set_attn_implementation(ATTENTION)
        for self.grouped in (True, False):
            found = self._find_width(probe, [(104_729 * n + 7) % limit for n in range(1, 8)])
            if found:
                self.least, self.width = found
                break
        else:
            self.grouped = False
            self.least = self.width = FIXED_WIDTH.get(self.device.type, 8)
        found, self.pack = 0, 0  # prompts are read singly where no size will do
        for most in PACK.get(self.device.type, (192,)):
            if not self._may_pack(limit, most):
                break
            found = most
        self.pack = found
        self._blocks.clear()
        self._bytes = 0
        return True

    def _find_width(self, probe: list[int], other: list[int]) -> tuple[int, int] | None:
        """The first pair of `WIDTHS` between which the probe's logits stay the same, wherever it stands."""
        self.least = 1
        ((read, _),) = self.read([probe], [len(probe) + 1])
        ((company, _),) = self.read([other], [len(other) + 1])
        seen: dict[tuple[int, int], torch.Tensor] = {}

        def logits(count: int, place: int) -> torch.Tensor:
            if (count, place) not in seen:
                rows = [_Row(len(other) + 1) for _ in range(count)]
                rows[place] = _Row(len(probe) + 1)
                for at, row in enumerate(rows):
                    source = read if at == place else company
                    row.paste(source.cut(0, source.length))
                seen[(count, place)] = self.write(_Table(count if self.grouped else 0), rows, [13] * count)[place]
            return seen[(count, place)]

        for least, width in WIDTHS.get(self.device.type, ((2, 8),)):
            places = [(width, width - 1), (width, 0), (least + 1, least)]
            places += [(count, count // 2) for count in (8, 15, 16, 17, 24) if least < count < width]
            if all(torch.equal(logits(least, 0), logits(*at)) for at in places):
                return least, width
        return None

    def _may_pack(self, limit: int, most: int) -> bool:
        """Whether a prompt that shares a pass of so many tokens with others gets the same bits as one that is read alone."""
        lengths = [3, 40, 17]
        while sum(lengths) < most:
            lengths.append(min(self.block, most - sum(lengths)))
        prompts = [[(7919 * n + 31 * row + 5) % limit for n in range(length)] for row, length in enumerate(lengths)]
        tested = (0, 1, len(prompts) - 1)
        self.pack = 0
        alone = {n: self.read([prompts[n]], [lengths[n]])[0] for n in tested}
        self.pack = most
        together = self.read(prompts, lengths)
        return all(
            torch.equal(alone[n][1], together[n][1])
            and all(torch.equal(alone[n][0].keys[i], together[n][0].keys[i]) for i in alone[n][0].keys)
            and all(torch.equal(alone[n][0].values[i], together[n][0].values[i]) for i in alone[n][0].values)
            for n in tested
        )


class _Single:
    """Runs the model as the library does, one row after the other."""

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device
        self.width = 8
        # Recurrent models name their state so, and lack the other.
        self.state = "cache_params" if "cache_params" in inspect.signature(model.forward).parameters else "past_key_values"

    def _forward(self, cache: Any, tokens: list[int]) -> tuple[Any, torch.Tensor]:
        out = self.model(input_ids=torch.tensor([tokens], device=self.device), use_cache=True, **{self.state: cache})
        return out[self.state], out.logits[0, -1]

    def table(self, rows: int) -> None:
        return None

    def read(
        self, prompts: Sequence[list[int]], capacities: Sequence[int], step: Callable[[], None] = lambda: None
    ) -> list[tuple[Any, torch.Tensor]]:
        found = []
        for prompt in prompts:
            cache, logits = self._forward(None, prompt)
            found.append(([cache], logits))
            step()
        return found

    def write(self, table: None, rows: Sequence[Any], tokens: Sequence[int]) -> list[torch.Tensor]:
        logits = []
        for row, token in zip(rows, tokens, strict=True):
            row[0], one = self._forward(row[0], [token])
            logits.append(one)
        return logits


class _Words:
    """Turns tokens into text as they come, holding back halves of characters."""

    def __init__(self, tokenizer: Any, before: list[int]) -> None:
        self.tokenizer = tokenizer
        self.ids = list(before[-4:])
        self.start, self.read = 0, len(self.ids)
        self.text = ""

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def push(self, token: int) -> None:
        self.ids.append(token)
        old, new = self._decode(self.ids[self.start : self.read]), self._decode(self.ids[self.start :])
        if len(new) > len(old) and not new.endswith("\ufffd"):
            self.text += new[len(old) :]
            self.start, self.read = self.read, len(self.ids)


class _Writer:
    """One request on its way."""

    def __init__(self, request: Request, words: _Words, ends: frozenset[int]) -> None:
        self.request, self.words, self.ends = request, words, ends
        self.tokens: list[int] = []
        self.likelihood = 0.0
        self.finish = ""

    def take(self, logits: torch.Tensor) -> None:
        """Choose the next token from the logits, ``(vocabulary,)``, and note whether it was the last."""
        request = self.request
        plain = logits.float().cpu()
        token = choose(plain, request, self.tokens)
        self.likelihood += float(plain[token] - plain.logsumexp(0))
        if token in self.ends:
            self.finish = "stop"
            return
        self.tokens.append(token)
        before = len(self.words.text)
        self.words.push(token)
        text = self.words.text
        found = [at for stop in request.stop if (at := text.find(stop, max(0, before - len(stop)))) >= 0]
        if found:
            self.words.text = text[: min(found)]
            self.finish = "stop"
        elif request.done is not None and len(text) > before and request.done(text):
            self.finish = "stop"
        elif len(self.tokens) >= request.max_tokens:
            self.finish = "length"

    def completion(self) -> Completion:
        count = len(self.tokens) + (self.finish == "stop" and len(self.tokens) < self.request.max_tokens)
        return Completion(self.words.text, self.tokens, self.finish, self.likelihood / max(count, 1))


def choose(logits: torch.Tensor, request: Request, written: list[int]) -> int:
    """Choose the next token.

    Args:
        logits: ``(vocabulary,)``, float32 on the CPU; not changed.
        request: How to choose.
        written: Tokens written so far.

    Returns:
        Its id.
    """
    logits = logits.clone()
    if request.repetition_penalty != 1.0 and written:
        seen = torch.tensor(sorted(set(written)))
        values = logits[seen]
        logits[seen] = torch.where(values > 0, values / request.repetition_penalty, values * request.repetition_penalty)
    size = request.no_repeat_ngram
    if size and len(written) >= size - 1:
        tail = tuple(written[len(written) - size + 1 :])
        for at in range(len(written) - size + 1):
            if tuple(written[at : at + size - 1]) == tail:
                logits[written[at + size - 1]] = -torch.inf
    if request.temperature <= 0:
        return int(logits.argmax())
    logits /= request.temperature
    total = logits.logsumexp(0)
    # Sorting a whole vocabulary costs more than a small model's forward pass, and the top thousand nearly always holds enough.
    count = min(len(logits), request.top_k or _TOP)
    top = torch.topk(logits, count)
    shares = (top.values - total).exp().double()
    if request.top_p < 1.0 or not request.top_k:
        if float(shares.sum()) < request.top_p and not request.top_k and count < len(logits):
            top = torch.topk(logits, len(logits))
            shares = (top.values - total).exp().double()
        if request.top_k:
            shares = shares / shares.sum()
        # A token belongs to the nucleus while what lies above it does not fill it.
        keep = (shares.cumsum(0) - shares) < request.top_p
        shares = shares * keep
    steps = shares.cumsum(0)
    draw = torch.rand((), generator=request.generator, dtype=torch.float64) * steps[-1]
    return int(top.indices[min(int(torch.searchsorted(steps, draw, right=True)), int(shares.count_nonzero()) - 1)])


class LanguageModel:
    """A causal language model with its tokenizer.

    Attributes:
        context: Most tokens of prompt and text together.
        width: Most rows of a round.
        shared: Whether rows share the linear layers; else they run one after the other.
        fixed_width: Whether rounds are filled up with idle rows, because this machine gives a row other bits in other company.
    """

    def __init__(self, model: Any, tokenizer: Any, device: str, name: str, alone: bool = False) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self._device = torch.device(device)
        config = model.config.get_text_config()
        self.context = int(getattr(config, "max_position_embeddings", 0) or getattr(config, "n_positions", 0) or 2048)
        ends = {tokenizer.eos_token_id}
        for source in (model.generation_config, config):
            value = getattr(source, "eos_token_id", None)
            ends |= set(value) if isinstance(value, list | tuple) else {value}
        self._ends = frozenset(n for n in ends if n is not None)
        last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        shared = _Shared(model, self._device, last_only)
        with torch.inference_mode():
            fits = not alone and self._supports(model) and shared.agrees()
        self._run: _Shared | _Single = shared if fits else _Single(model, self._device)

    @staticmethod
    def _supports(model: Any) -> bool:
        kinds = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
        return bool(
            model._supports_attention_backend
            and model._can_set_attn_implementation()
            and kinds <= {"full_attention", "sliding_attention"}
        )

    @property
    def width(self) -> int:
        """Most rows of a round."""
        return self._run.width

    @property
    def shared(self) -> bool:
        """Whether rows share the linear layers."""
        return isinstance(self._run, _Shared)

    @property
    def fixed_width(self) -> bool:
        """Whether rounds are filled up with idle rows."""
        return isinstance(self._run, _Shared) and self._run.least > 2

    @property
    def has_template(self) -> bool:
        """Whether the model knows a chat template."""
        return bool(self.tokenizer.chat_template)

    def encode(self, text: str, *, special: bool) -> list[int]:
        """Token ids of a text.

        Args:
            text: The text.
            special: Whether the tokenizer adds its begin token; not for text out of a chat template, which has it.
        """
        ids: list[int] = self.tokenizer(text, add_special_tokens=special)["input_ids"]
        if not ids:
            begin = self.tokenizer.bos_token_id
            ids = [begin if begin is not None else min(self._ends, default=0)]
        return ids

    def render(self, messages: Sequence[Mapping[str, str]], prefix: str = "") -> str:
        """A conversation as one prompt, by the model's chat template.

        Args:
            messages: ``role`` and ``content`` of each. Names of special tokens inside a content are broken up, so that
                no data can pass for a turn of the conversation.
            prefix: How the answer begins.

        Raises:
            InputError: If the model has no template or its template refuses the conversation.
        """
        from jinja2 import TemplateError

        if not self.has_template:
            raise InputError(f"model {self.name} has no chat template; use text.generate with template 'none'", param="model")
        clean = [{"role": m["role"], "content": self._defused(m["content"])} for m in messages]
        try:
            text: str = self.tokenizer.apply_chat_template(clean, tokenize=False, add_generation_prompt=True)
        except (TemplateError, ValueError, TypeError) as error:
            raise InputError(f"the chat template of model {self.name} refuses these messages: {error}", param="messages") from None
        return text + prefix

    def _defused(self, text: str) -> str:
        for token in self.tokenizer.all_special_tokens:
            if len(token) > 1:
                text = text.replace(token, f"{token[0]} {token[1:]}")
        return text

    def check_length(self, prompt_tokens: int, max_tokens: int) -> None:
        """Refuse what does not fit into the context.

        Raises:
            InputError: With the numbers of tokens.
        """
        if prompt_tokens >= self.context:
            raise InputError(
                f"the prompt has {prompt_tokens} tokens; model {self.name} holds {self.context} with what it writes", param="prompt"
            )
        if prompt_tokens + max_tokens > self.context:
            raise InputError(
                f"max_tokens is {max_tokens}, but after a prompt of {prompt_tokens} tokens model {self.name} has room for "
                f"{self.context - prompt_tokens} of its {self.context}",
                param="max_tokens",
            )

    @torch.inference_mode()
    def generate(
        self,
        requests: Sequence[Request],
        wanted: Callable[[int], bool] = lambda index: True,
        wrote: Callable[[int, int], None] = lambda index, tokens: None,
    ) -> Iterator[tuple[int, Completion]]:
        """Write many texts; what one becomes does not depend on the others.

        A row that ends makes room for a waiting one at once.

        Args:
            requests: What to write.
            wanted: Asked in each round whether a text is still wanted; an unwanted one is dropped.
            wrote: Told in each round how many tokens a text has.

        Yields:
            Index of the request and its text, as soon as it is finished.

        Raises:
            InputError: If a prompt and its ``max_tokens`` do not fit into the context.
        """
        for request in requests:
            self.check_length(len(request.prompt), request.max_tokens)
        waiting = deque(range(len(requests)))
        alike = Counter(tuple(request.prompt) for request in requests)
        read: dict[tuple[int, ...], tuple[Any, torch.Tensor]] = {}
        running: dict[int, tuple[Any, _Writer]] = {}
        held: dict[int, int] = {}
        table = self._run.table(len(requests))
        while waiting or running:
            joining: list[int] = []
            while waiting and len(running) + len(joining) < self._run.width:
                index = waiting[0]
                request = requests[index]
                need = len(request.prompt) + request.max_tokens
                if held and sum(held.values()) + need > KV_TOKENS:
                    break
                waiting.popleft()
                alike[tuple(request.prompt)] -= 1
                if wanted(index):
                    joining.append(index)
                    held[index] = need

            def step(joining: list[int] = joining) -> None:
                # Long prompts take their time: whoever watches must see that it goes on.
                for index in (*joining, *running):
                    wrote(index, len(running[index][1].tokens) if index in running else 0)

            for index, row, logits in self._read([(index, requests[index]) for index in joining], alike, read, step):
                wrote(index, 0)
                writer = _Writer(requests[index], _Words(self.tokenizer, requests[index].prompt), self._ends)
                writer.take(logits)
                if writer.finish:
                    del held[index]
                    yield index, writer.completion()
                    continue
                running[index] = (row, writer)
            for index in [n for n in running if not wanted(n)]:
                del running[index], held[index]
            if not running:
                continue
            logits_of = self._run.write(table, [row for row, _ in running.values()], [w.tokens[-1] for _, w in running.values()])  # type: ignore[arg-type]
            ended = []
            for (index, (_, writer)), logits in zip(running.items(), logits_of, strict=True):
                writer.take(logits)
                wrote(index, len(writer.tokens))
                if writer.finish:
                    ended.append((index, writer.completion()))
            for index, completion in ended:
                del running[index], held[index]
                yield index, completion

    def _read(
        self, joining: Sequence[tuple[int, Request]], alike: Counter[tuple[int, ...]], read: dict[tuple[int, ...], tuple[Any, torch.Tensor]],
        step: Callable[[], None],
    ) -> Iterator[tuple[int, Any, torch.Tensor]]:
        """Read the prompts of requests that join the round; equal ones are read once and forked.

        Args:
            joining: Index and request of each.
            alike: By prompt, how many more requests with it are still to come.
            read: Prompts that were read and are needed again.
            step: Called after each pass over prompts.

        Yields:
            Index, row and the logits after the prompt.
        """
        run = self._run
        keys = [tuple(request.prompt) for _, request in joining]
        here = Counter(keys)
        fork = isinstance(run, _Shared)
        new = [n for n, key in enumerate(keys) if not fork or (key not in read and keys.index(key) == n)]
        room = [len(keys[n]) if fork and here[keys[n]] + alike[keys[n]] > 1 else len(keys[n]) + joining[n][1].max_tokens for n in new]
        fresh = dict(zip(new, run.read([list(keys[n]) for n in new], room, step), strict=True)) if new else {}
        if fork:
            read.update({keys[n]: fresh[n] for n in new if here[keys[n]] + alike[keys[n]] > 1})
        for n, (index, request) in enumerate(joining):
            if not fork or keys[n] not in read:
                row, logits = fresh[n]
            else:
                kept, logits = read[keys[n]]
                row = _Row(len(keys[n]) + request.max_tokens)
                row.paste(kept.cut(0, kept.length))
            yield index, row, logits
        for key in [k for k in read if not alike[k]]:
            del read[key]


def load_language(model: ResolvedModel, device: str = "cpu") -> LanguageModel:
    """Load a causal language model.

    Args:
        model: ``files['weights']`` may be a GGUF file; else ``files['folder']`` or ``options['source']`` (a local folder or
            a Hugging Face name) holds config, tokenizer and safetensors. ``options``: ``dtype`` (``float32``,
            ``bfloat16``, ``float16``; float32 on the CPU and bfloat16 on a GPU where left out), ``adapter`` (a local folder
            with a LoRA adapter in safetensors, merged into the weights), ``revision`` of a Hugging Face name.
        device: ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        ModelUnavailable: If something is missing or is not what it should be; the message says what.
    """
    source = find_source(model)
    options = InferenceOptions.of(model, device)
    if source.endswith(".gguf"):
        gguf = Path(source)
        source = str(model.converted("safetensors", lambda folder: _dequantise(gguf, folder)))
    if options.engine == "vllm":
        from worker.engines.vllm import load_vllm

        return load_vllm(model, source, device)
    transformers.utils.logging.disable_progress_bar()
    dtype = pick_dtype(model, device)
    revision = model.options.get("revision")
    more = {"revision": str(revision)} if revision else {}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, trust_remote_code=False, **more)
        net: Any = transformers.AutoModelForCausalLM.from_pretrained(
            source, dtype=dtype, use_safetensors=True, trust_remote_code=False, **more,
            **({"attn_implementation": options.attention} if options.attention else {}),
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelUnavailable(f"model {model.name}: cannot be loaded from {source}: {first_line(error)}") from error
    adapter = model.files.get("adapter") or model.options.get("adapter")
    if adapter:
        net = _with_adapter(net, Path(str(adapter)), model.name)
    transformers.AttentionInterface.register(ATTENTION, _attend)
    net = prepare(net.to(device).eval().requires_grad_(False), options)
    # Inputs in eight bits are scaled by the largest of all rows: rows of other jobs must not be among them.
    return LanguageModel(net, tokenizer, device, model.name, alone=bool(options.quantize))


def find_source(model: ResolvedModel) -> str:
    """Where a model in the Hugging Face layout lies: a GGUF file, a folder, or a Hugging Face name."""
    weights = model.files.get("weights")
    if weights is not None and weights.suffix == ".gguf":
        return str(weights)
    folder = model.files.get("folder") or model.options.get("source") or (weights.parent if weights is not None else None)
    if not folder:
        raise ModelUnavailable(f"model {model.name}: neither a folder nor a source is registered for it")
    return str(folder)


def pick_dtype(model: ResolvedModel, device: str) -> torch.dtype:
    """The type that a model's weights are loaded in."""
    name = str(model.options.get("dtype") or ("bfloat16" if device.startswith("cuda") else "float32"))
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name not in known:
        raise ModelUnavailable(f"model {model.name}: dtype is {name!r}; allowed: {', '.join(known)}")
    return known[name]


def _dequantise(gguf: Path, folder: Path) -> None:
    quiet = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        net = transformers.AutoModelForCausalLM.from_pretrained(
            gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=transformers.GgufConfig(dequantize=True)
        )
        net.save_pretrained(folder)
        transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
    except (OSError, ValueError, KeyError, ImportError, NotImplementedError) as error:
        raise ModelUnavailable(f"GGUF file {gguf.name} cannot be read: {first_line(error)}") from error
    finally:
        if quiet:
            transformers.utils.logging.enable_progress_bar()


def _with_adapter(net: Any, folder: Path, name: str) -> Any:
    from peft import PeftModel

    for file in ("adapter_config.json", "adapter_model.safetensors"):
        if not (folder / file).is_file():
            raise ModelUnavailable(f"model {name}: adapter folder {folder} holds no {file}")
    try:
        with warnings.catch_warnings():
            # peft asks the model for an attribute that transformers has renamed.
            warnings.simplefilter("ignore", FutureWarning)
            return PeftModel.from_pretrained(net, str(folder)).merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise ModelUnavailable(f"model {name}: adapter {folder} does not fit: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """First line of an exception's message, shortened."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
