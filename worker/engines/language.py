"""Causal language models: loading them, and writing with many texts at once.

Weights come from a GGUF file (turned into safetensors once, in the model's folder), from a local folder in the Hugging
Face layout, or from a Hugging Face name. Only safetensors are read and no code of a model is ever run.

A job's tokens must not depend on its neighbours. Padding a batch would break that: every matrix product and every attention
sum would then be cut up differently in company than alone, which moves logits by 1e-5 and, at a near tie, changes a word.
So nothing is padded here:

* A prompt is read alone, in blocks of fixed length. A block's keys and values depend on the tokens up to its end and on
  nothing else, hence they are kept and shared bit for bit by prompts that begin alike (instructions, examples).
* While writing, the rows of a round share the linear layers, but each attends over its own keys and values.
* A linear layer gives a row the same bits in any company only while the number of rows stays within one kernel of the
  machine's matrix library. Loading a model measures that; where it does not hold, rounds are filled up with idle rows to
  one fixed width.

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

WIDTHS = {"cpu": (15, 8, 4), "cuda": (32, 16, 8)}
"""Most rows of a round; the first for which a row's bits do not depend on how many there are."""

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


@dataclass
class _Row:
    """Keys and values of one text, layer by layer, ``(1, heads, capacity, width)``, filled up to ``length``."""

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


_now = threading.local()
"""``rows`` of the forward pass that this thread runs: `_attend` gets no other word of them."""


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
    outs = []
    for index, row in enumerate(_now.rows):
        q = query[index : index + 1]
        if row is None:
            outs.append(torch.zeros_like(q))
            continue
        keys, values = row.write(layer, key[index : index + 1], value[index : index + 1])
        new, seen = q.shape[2], keys.shape[2]
        if sliding_window is not None and new == 1 and seen > sliding_window:
            keys, values = keys[:, :, -sliding_window:], values[:, :, -sliding_window:]
        if new == 1:
            # One token sees everything, so the heads that share keys can stand in the place of tokens.
            packed = q.reshape(1, keys.shape[1], -1, q.shape[3])
            out = F.scaled_dot_product_attention(packed, keys, values, scale=scaling)
            outs.append(out.reshape(1, q.shape[1], 1, out.shape[3]))
            continue
        mask = torch.ones(new, seen, dtype=torch.bool, device=q.device).tril(seen - new)
        if sliding_window is not None:
            mask &= ~torch.ones_like(mask).tril(seen - new - sliding_window)
        groups = q.shape[1] // keys.shape[1]
        if groups > 1:
            keys, values = keys.repeat_interleave(groups, 1), values.repeat_interleave(groups, 1)
        outs.append(F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, scale=scaling))
    return torch.cat(outs).transpose(1, 2).contiguous(), None


class _Shared:
    """Runs the model with own keys and values a row, shared linear layers and shared beginnings of prompts."""

    def __init__(self, model: Any, device: torch.device, last_only: bool) -> None:
        self.model, self.device, self.last_only = model, device, last_only
        self.block = BLOCK.get(device.type, 64)
        self.width, self.least = 1, 1
        self.own = model.config._attn_implementation
        self._blocks: OrderedDict[tuple[int, ...], _Block] = OrderedDict()
        self._bytes = 0

    def forward(self, rows: Sequence[_Row | None], tokens: list[list[int]]) -> torch.Tensor:
        """Logits after the last token of each row, ``(rows, vocabulary)``."""
        starts = [0 if row is None else row.length for row in rows]
        ids = torch.tensor(tokens, device=self.device)
        positions = torch.tensor([[s + n for n in range(len(t))] for s, t in zip(starts, tokens, strict=True)], device=self.device)
        _now.rows = rows
        try:
            more = {"logits_to_keep": 1} if self.last_only else {}
            logits: torch.Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=False, **more).logits[:, -1]
        finally:
            _now.rows = ()
        for row in rows:
            if row is not None:
                row.length += len(tokens[0])
        return logits

    def read(self, prompt: list[int], capacity: int) -> tuple[_Row, torch.Tensor]:
        """Read a prompt: its keys and values, and the logits after it."""
        row = _Row(capacity)
        # The last token is always read anew, for its logits.
        for end in range(self.block, len(prompt), self.block):
            key = tuple(prompt[:end])
            kept = self._blocks.get(key)
            if kept is not None:
                self._blocks.move_to_end(key)
                row.paste(kept)
                continue
            self.forward([row], [prompt[end - self.block : end]])
            self._keep(key, row.cut(end - self.block, end))
        return row, self.forward([row], [prompt[row.length :]])[0]

    def _keep(self, key: tuple[int, ...], block: _Block) -> None:
        self._blocks[key] = block
        self._bytes += block.nbytes
        while self._bytes > PREFIX_MB * 2**20 and self._blocks:
            self._bytes -= self._blocks.popitem(last=False)[1].nbytes

    def write(self, rows: list[_Row], tokens: list[int]) -> torch.Tensor:
        """Add one token to each row; the logits after it."""
        idle = max(0, self.least - len(rows))
        return self.forward([*rows, *[None] * idle], [[t] for t in [*tokens, *[0] * idle]])[: len(rows)]

    def agrees(self) -> bool:
        """Compare with the library's own way, and find the width within which a row's bits stay the same."""
        self.model.set_attn_implementation(ATTENTION)
        limit = int(self.model.get_input_embeddings().weight.shape[0])
        probe = [(7919 * n + 13) % limit for n in range(1, 10)]
        try:
            row, logits = self.read(probe[:5], len(probe))
            for token in probe[5:]:
                logits = self.forward([row], [[token]])[0]
        except _UnsupportedError:
            self.model.set_attn_implementation(self.own)
            return False
        self.model.set_attn_implementation(self.own)
        wanted = self.model(input_ids=torch.tensor([probe], device=self.device), use_cache=False).logits[0, -1]
        loose = 1e-3 if wanted.dtype == torch.float32 else 0.06
        if not torch.allclose(logits.float(), wanted.float(), rtol=loose, atol=loose * float(wanted.float().std())):
            return False
        self.model.set_attn_implementation(ATTENTION)
        widths = WIDTHS.get(self.device.type, (8,))

        def last(count: int, place: int) -> torch.Tensor:
            company: list[_Row | None] = [None] * count
            company[place] = self.read(probe, len(probe) + 1)[0]
            return self.forward(company, [[13]] * count)[place]

        alone = last(2, 0)
        for width in widths:
            if all(torch.equal(alone, last(width, place)) for place in (0, width - 1)):
                self.width, self.least = width, 2
                return True
        self.width = self.least = widths[-1] if self.device.type == "cpu" else widths[0]
        return True


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

    def read(self, prompt: list[int], capacity: int) -> tuple[Any, torch.Tensor]:
        cache, logits = self._forward(None, prompt)
        return [cache], logits

    def write(self, rows: list[Any], tokens: list[int]) -> torch.Tensor:
        logits = []
        for row, token in zip(rows, tokens, strict=True):
            row[0], one = self._forward(row[0], [token])
            logits.append(one)
        return torch.stack(logits)


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
        while waiting or running:
            while waiting and len(running) < self._run.width:
                index = waiting[0]
                request = requests[index]
                need = len(request.prompt) + request.max_tokens
                if running and sum(held.values()) + need > KV_TOKENS:
                    break
                waiting.popleft()
                key = tuple(request.prompt)
                alike[key] -= 1
                if not wanted(index):
                    if not alike[key]:
                        read.pop(key, None)
                    continue
                row, logits = self._read(request, key, alike[key], read)
                wrote(index, 0)
                writer = _Writer(request, _Words(self.tokenizer, request.prompt), self._ends)
                writer.take(logits)
                if writer.finish:
                    yield index, writer.completion()
                    continue
                running[index], held[index] = (row, writer), need
            for index in [n for n in running if not wanted(n)]:
                del running[index], held[index]
            if not running:
                continue
            logits = self._run.write([row for row, _ in running.values()], [w.tokens[-1] for _, w in running.values()])
            ended = []
            for place, (index, (_, writer)) in enumerate(running.items()):
                writer.take(logits[place])
                wrote(index, len(writer.tokens))
                if writer.finish:
                    ended.append((index, writer.completion()))
            for index, completion in ended:
                del running[index], held[index]
                yield index, completion

    def _read(
        self, request: Request, key: tuple[int, ...], more: int, read: dict[tuple[int, ...], tuple[Any, torch.Tensor]]
    ) -> tuple[Any, torch.Tensor]:
        """Read a prompt, or fork it where an equal one was read; ``more`` requests with it are still to come."""
        run = self._run
        need = len(request.prompt) + request.max_tokens
        if not isinstance(run, _Shared) or (not more and key not in read):
            return run.read(request.prompt, need)
        if key not in read:
            read[key] = run.read(request.prompt, len(request.prompt))
        kept, logits = read[key] if more else read.pop(key)
        row = _Row(need)
        row.paste(kept.cut(0, kept.length))
        return row, logits


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
