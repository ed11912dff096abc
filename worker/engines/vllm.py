"""Language models through vLLM's offline engine, where it is installed and a GPU is there.

Written from vLLM's documentation and not run here. It is faster with many texts, and gives two promises of the usual engine
up: what a text becomes may depend on its neighbours to the last bits of a sum (a near tie may fall the other way), and
``done`` is looked at only when a text has ended. That is why it is never chosen without ``--allow-lossy``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from contentfactory.errors import InputError, ModelUnavailable
from worker.engines.files import ResolvedModel
from worker.engines.language import Completion, LanguageModel, Request, pick_dtype
from worker.memory import is_out_of_memory

ROUND = 256
"""Texts that are handed to vLLM at once; between two rounds cancelled ones are left out."""


class VllmModel(LanguageModel):
    """The same face as `LanguageModel`; tokenizer, templates and limits are shared with it.

    Args:
        llm: A ``vllm.LLM``.
        make_params: ``vllm.SamplingParams``.
        name: Name of the model.
        context: Most tokens of prompt and text together.
    """

    def __init__(self, llm: Any, make_params: Callable[..., Any], name: str, context: int) -> None:
        self.name = name
        self.context = context
        self.tokenizer = llm.get_tokenizer()
        self._llm = llm
        self._make_params = make_params
        self._ends = frozenset({self.tokenizer.eos_token_id} - {None})

    @property
    def width(self) -> int:
        """Most texts of a round."""
        return ROUND

    @property
    def shared(self) -> bool:
        """Whether texts share forward passes: always."""
        return True

    @property
    def fixed_width(self) -> bool:
        """Whether rounds are filled up: never."""
        return False

    def sampling(self, request: Request) -> Any:
        """A request as vLLM's parameters.

        Raises:
            InputError: If it asks for something that vLLM has not.
        """
        if request.no_repeat_ngram:
            raise InputError("no_repeat_ngram is not known to the engine vllm; leave it out", param="no_repeat_ngram")
        values: dict[str, Any] = {
            "n": 1, "max_tokens": request.max_tokens, "temperature": max(0.0, request.temperature), "top_p": request.top_p,
            # -1 is 'all' in every version; 0 only in later ones.
            "top_k": request.top_k or -1,
            "repetition_penalty": request.repetition_penalty, "stop": list(request.stop), "logprobs": 0,
        }  # fmt: skip
        if request.generator is not None:
            values["seed"] = int(request.generator.initial_seed()) % 2**63
        return self._make_params(**values)

    def generate(
        self,
        requests: Sequence[Request],
        wanted: Callable[[int], bool] = lambda index: True,
        wrote: Callable[[int, int], None] = lambda index, tokens: None,
    ) -> Iterator[tuple[int, Completion]]:
        """See `LanguageModel.generate`."""
        for request in requests:
            self.check_length(len(request.prompt), request.max_tokens)
        for start in range(0, len(requests), ROUND):
            chosen = [n for n in range(start, min(start + ROUND, len(requests))) if wanted(n)]
            if not chosen:
                continue
            prompts: list[Mapping[str, Any]] = [{"prompt_token_ids": list(requests[n].prompt)} for n in chosen]
            made = self._llm.generate(prompts, [self.sampling(requests[n]) for n in chosen], use_tqdm=False)
            for index, answer in zip(chosen, made, strict=True):
                one = answer.outputs[0]
                tokens = [t for t in one.token_ids if t not in self._ends]
                wrote(index, len(tokens))
                finish = "length" if one.finish_reason == "length" else "stop"
                mean = float(one.cumulative_logprob or 0.0) / max(1, len(one.token_ids))
                yield index, Completion(one.text, tokens, finish, mean)


def load_vllm(model: ResolvedModel, source: str, device: str) -> VllmModel:
    """Load a model into vLLM.

    Args:
        model: ``options``: ``dtype``, ``revision``, ``context`` (tokens; the model's own where left out), ``gpu_share`` (share of
            the GPU's memory that vLLM takes; 0.8 where left out).
        source: A folder in the Hugging Face layout, or a Hugging Face name.
        device: ``cuda`` or ``cuda:N``.

    Raises:
        ModelUnavailable: If vLLM is not installed, there is no GPU, or it does not take the model.
    """
    if not device.startswith("cuda"):
        raise ModelUnavailable(f"model {model.name}: the engine vllm needs a GPU, this worker computes on {device}")
    if source.endswith(".gguf"):
        raise ModelUnavailable(f"model {model.name}: the engine vllm takes folders with safetensors, not GGUF files")
    try:
        import vllm
    except ImportError:
        raise ModelUnavailable(f"model {model.name}: vllm is not installed on this worker") from None
    more = {"revision": str(model.options["revision"])} if model.options.get("revision") else {}
    context = model.options.get("context")
    try:
        llm = vllm.LLM(
            model=source, dtype=str(pick_dtype(model, device)).removeprefix("torch."), trust_remote_code=False, seed=0,
            gpu_memory_utilization=float(model.options.get("gpu_share", 0.8)), enable_prefix_caching=True,
            max_model_len=int(context) if context else None, **more,
        )  # fmt: skip
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        if is_out_of_memory(error):
            raise
        raise ModelUnavailable(f"model {model.name}: vllm does not take it: {str(error)[:300]}") from error
    return VllmModel(llm, vllm.SamplingParams, model.name, int(llm.llm_engine.model_config.max_model_len))
