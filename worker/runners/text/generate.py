"""Runners of ``text.generate`` and ``text.chat``."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TypeVar

import torch

from contentfactory.errors import FactoryError, InputError, JobCancelled
from contentfactory.jobs.text import Sampling, TextChat, TextGenerate
from worker.context import Failure, JobContext, Output, Yield
from worker.engines.files import ResolvedModel
from worker.engines.language import Completion, LanguageModel, Request, load_language
from worker.runners import runs
from worker.runners.text.candidates import best, ground
from worker.runners.text.sentences import cut_sentences, sentence_ends

P = TypeVar("P", bound=Sampling)


@runs(TextGenerate)
def generate(params: list[TextGenerate], context: JobContext) -> Iterator[Yield]:
    """Continue prompts or follow instructions, a micro-batch at once."""
    yield from _write(params, context, _generate_prompt)


@runs(TextChat)
def chat(params: list[TextChat], context: JobContext) -> Iterator[Yield]:
    """Answer conversations, a micro-batch at once."""
    yield from _write(params, context, _chat_prompt)


def load(context: JobContext) -> LanguageModel:
    """The micro-batch's language model out of the cache."""
    device = context.device

    def language(model: ResolvedModel) -> LanguageModel:
        return load_language(model, device)

    return context.load(language)


def _generate_prompt(model: LanguageModel, params: TextGenerate) -> list[int]:
    prompt, prefix = str(params.prompt), str(params.answer_prefix)
    if params.template == "none" or (params.template == "auto" and not model.has_template):
        if params.system is not None:
            raise InputError(f"model {model.name} has no chat template, so it takes no system prompt", param="system")
        if not prompt + prefix:
            raise InputError("the prompt is empty; without a chat template there is nothing to continue", param="prompt")
        return model.encode(prompt + prefix, special=True)
    messages = [{"role": "user", "content": prompt}]
    if params.system is not None:
        messages.insert(0, {"role": "system", "content": str(params.system)})
    return model.encode(model.render(messages, prefix), special=False)


def _chat_prompt(model: LanguageModel, params: TextChat) -> list[int]:
    messages = [{"role": m.role, "content": str(m.content)} for m in params.messages]
    return model.encode(model.render(messages, str(params.answer_prefix)), special=False)


def _write(params: Sequence[P], context: JobContext, prompt: Callable[[LanguageModel, P], list[int]]) -> Iterator[Yield]:
    model = load(context)
    requests: list[Request] = []
    owners: list[int] = []
    for job, one in enumerate(params):
        try:
            tokens = prompt(model, one)
            model.check_length(len(tokens), one.max_tokens)
        except FactoryError as error:
            yield Failure(job, error)
            continue
        for attempt in range(one.best_of):
            requests.append(_request(one, tokens, _generator(context, job, attempt)))
            owners.append(job)

    written = [0] * len(requests)
    tries: defaultdict[int, dict[int, Completion]] = defaultdict(dict)

    def wrote(index: int, tokens: int) -> None:
        written[index] = tokens
        job = owners[index]
        total = sum(count for count, owner in zip(written, owners, strict=True) if owner == job)
        context.progress(job, min(1.0, total / (params[job].max_tokens * params[job].best_of)))

    for index, completion in model.generate(requests, lambda index: not context.cancelled(owners[index]), wrote):
        job = owners[index]
        tries[job][index] = completion
        if len(tries[job]) == params[job].best_of:
            # In the order of the attempts, not of their ends: the choice must not depend on company.
            ordered = [tries[job][n] for n in sorted(tries[job])]
            yield _output(job, params[job], ordered, len(requests[index].prompt))
    for job in sorted(set(owners)):
        if len(tries[job]) < params[job].best_of:
            yield Failure(job, JobCancelled("the job was cancelled while it ran"))


def _generator(context: JobContext, job: int, attempt: int) -> torch.Generator:
    generator = context.generator(job)
    if attempt:
        # Each attempt draws from its own stream; the first is the stream that a job without best_of has.
        generator.manual_seed((context.seeds[job] + attempt * 0x9E3779B97F4A7C15) % 2**63)
    return generator


def _request(params: Sampling, tokens: list[int], generator: torch.Generator) -> Request:
    limit, begun = params.max_sentences, str(params.answer_prefix)

    def enough(text: str) -> bool:
        return limit is not None and len(sentence_ends((begun + text).lstrip(), whole=False)) >= limit

    return Request(
        prompt=tokens,
        max_tokens=params.max_tokens,
        temperature=params.temperature,
        top_p=params.top_p,
        top_k=params.top_k,
        repetition_penalty=params.repetition_penalty,
        no_repeat_ngram=params.no_repeat_ngram,
        stop=tuple(params.stop),
        generator=generator,
        done=enough if limit is not None else None,
    )


def _output(job: int, params: Sampling, tries: list[Completion], prompt_tokens: int) -> Output:
    begun = str(params.answer_prefix)
    texts = []
    for one in tries:
        text = begun + one.text
        if params.max_sentences is not None:
            text = cut_sentences(text.lstrip(), params.max_sentences, finished=one.finish == "stop")
        texts.append(text.strip() if params.strip else text)
    facts = None if params.facts is None else str(params.facts)
    chosen = best(texts, [one.likelihood for one in tries], facts, begun)
    text, kept = texts[chosen], tries[chosen]
    meta: dict[str, object] = {
        "finish_reason": kept.finish,
        "prompt_tokens": prompt_tokens,
        "completion_tokens": len(kept.tokens),
        "characters": len(text),
        "likelihood": round(kept.likelihood, 4),
    }
    if params.best_of > 1:
        meta["tries"] = params.best_of
        meta["tries_tokens"] = sum(len(one.tokens) for one in tries)
    if facts is not None:
        grounding = ground(text, facts, begun)
        meta |= {"facts_told": grounding.told, "facts_kept": grounding.kept, "facts_slips": grounding.slips}
    return Output(job, "text.txt", "text/plain", text.encode(), meta)
