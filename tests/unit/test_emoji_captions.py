"""The guard that keeps the judge's prompts out of the captions of the default text-to-image model."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "examples" / "train" / "prepare_emoji.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("prepare_emoji", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def guard(script, tmp_path: Path):
    path = tmp_path / "judge_x.jsonl"
    prompts = [("a doggy", True), ("a wrapped gift with a ribbon", True), ("a tool for hitting nails", True), ("a rocket", False)]
    path.write_text("".join(json.dumps({"prompt": p, "subjects": [], "paraphrase": other}) + "\n" for p, other in prompts))
    return script.Guard([path])


@pytest.mark.parametrize(
    ("caption", "allowed"),
    [
        ("doggy", False),
        ("the doggies", True),  # only a plain plural counts as the same word
        ("some doggys", False),
        ("a gift that is wrapped, with ribbons and bows", False),
        ("a tool for nails", False),
        ("a tool for hitting things", True),
        ("a rocket", True),
        ("hammer", True),
    ],
)
def test_near_copies_are_left_out(guard, caption: str, allowed: bool) -> None:
    assert guard.allows(caption, "name") is allowed
    assert (caption in guard.dropped) is not allowed


def test_a_name_may_come_near_but_not_be_the_prompt(guard) -> None:
    assert not guard.allows("wrapped gift", "present")
    assert guard.allows("a wrapped gift", "wrapped gift")
    assert not guard.allows("doggy", "doggy")


def test_no_description_repeats_a_prompt_word_for_word(script) -> None:
    """The descriptions may come near, the script drops them then; none is a copy of a longer prompt."""
    folder = SCRIPT.parent
    prompts = [json.loads(line) for path in folder.glob("judge_*.jsonl") for line in path.read_text().splitlines()]
    asked = {script.content_words(p["prompt"]) for p in prompts if p["paraphrase"]}
    texts = [
        text.strip() for line in (folder / "descriptions.txt").read_text().splitlines() if not line.startswith("#")
        for text in line.split(": ", 1)[1].split(";")
    ]  # fmt: skip
    assert len(texts) > 6000
    assert [t for t in texts if len(script.content_words(t)) > 3 and script.content_words(t) in asked] == []
