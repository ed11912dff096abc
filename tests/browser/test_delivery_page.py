"""The delivery page in a real browser: everything shows and plays, and nothing that a job made becomes markup."""

import csv
import hashlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw
from playwright.sync_api import BrowserContext, Page, expect

from contentfactory.jobs.spec import get_kind
from producer.delivery import DeliveryItem, deliver
from worker.context import JobContext, Output
from worker.media import audio
from worker.runners import get_runner

TITLE = 'Füchse & <script>alert(1)</script> <img src=x onerror="alert(2)"> ثعلب 狐'
NASTY = '</script><script>document.title = "broken"</script><img src=x onerror="document.title = \'broken\'">\n"Ünïcode" 狐'
ARABIC = "الثعلب حيوان ذكي يعيش في الغابة."
SOUNDS = {"wav": "audio/wav", "flac": "audio/flac", "mp3": "audio/mpeg", "opus": "audio/ogg", "aac": "audio/aac"}
RATE = 48_000
WIDTHS = (1280, 390)


def tone(seconds: float) -> audio.AudioBuffer:
    t = np.arange(round(seconds * RATE)) / RATE
    return audio.AudioBuffer((0.2 * np.sin(2 * np.pi * 440 * t)).astype(np.float32)[None], RATE)


def picture(width: int, height: int, colour: str) -> bytes:
    image = Image.new("RGB", (width, height), colour)
    ImageDraw.Draw(image).ellipse((width // 4, height // 4, width // 2, height // 2), fill="white")
    out = io.BytesIO()
    image.save(out, "png")
    return out.getvalue()


def clip(folder: Path) -> list[Output]:
    """What ``video.compose`` itself makes: H.264 and AAC in MP4, a still, subtitles."""
    for name, colour in (("a.png", "orange"), ("b.png", "teal")):
        (folder / name).write_bytes(picture(320, 180, colour))
    (folder / "voice.wav").write_bytes(audio.encode(tone(2.0), "wav"))
    spec = {
        "scenes": [{"image": f"file:{folder / name}"} for name in ("a.png", "b.png")], "narration": f"file:{folder / 'voice.wav'}",
        "width": 256, "height": 144, "fps": 12,
    }  # fmt: skip
    made = list(get_runner("video.compose")([get_kind("video.compose").validate(spec)], JobContext(folder, seeds=[0])))
    assert all(isinstance(one, Output) for one in made), made
    return made


@pytest.fixture(scope="module")
def delivery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small delivery with everything in it that a page may have to show."""
    folder = tmp_path_factory.mktemp("made")
    held: dict[tuple[str, str], bytes] = {}

    def item(custom_id: str, kind: str, name: str, media_type: str, data: bytes, **more: object) -> DeliveryItem:
        held[custom_id, name] = data
        return DeliveryItem(custom_id, kind, "succeeded", name, media_type, len(data), hashlib.sha256(data).hexdigest(), **more)

    items = [
        item("fox/text", "text.generate", "text.txt", "text/plain", b"The fox is a small animal with a bushy tail.", model="m@1", seed=7),
        item("fox/picture", "image.generate", "image.png", "image/png", picture(96, 96, "orange"), meta={"width": 96, "height": 96}, params_summary=NASTY),
        item("fox/card", "image.compose", "card.png", "image/png", picture(120, 160, "teal"), meta={"width": 120, "height": 160}),
    ]
    for output in clip(folder):
        data = output.data() if callable(output.data) else output.data
        data = data.read_bytes() if isinstance(data, Path) else data
        items.append(item("fox/clip", "video.compose", output.name, output.media_type, data, meta=output.meta))
    for form, media_type in SOUNDS.items():
        items.append(item(f"sounds/{form}", "audio.speech", f"speech.{form}", media_type, audio.encode(tone(1.5), form), meta={"duration_s": 1.5}))
    items += [
        item("sounds/transcript", "audio.transcribe", "words.json", "application/json", json.dumps({"text": "a word"}).encode()),
        item('<b>ثعلب "狐" #1?%20/نص', "text.generate", "text.txt", "text/plain", ARABIC.encode()),
        item("nasty/text", "text.generate", "<i>text.txt", "text/plain", NASTY.encode()),
        item("nasty/notes", "train.flow", "weights.safetensors", "application/octet-stream", b"0" * 64),
        DeliveryItem("bee/clip", "video.compose", "failed", error={"message": f"needs bee/text, which failed: {NASTY}"}),
        *(item(f"many/{n:02}", "image.generate", "image.png", "image/png", picture(64, 64, f"hsl({n * 15}, 70%, 50%)"), meta={"width": 64, "height": 64}) for n in range(8)),
    ]  # fmt: skip
    target = folder / "de livery #1 ü"
    report = deliver(items, target, lambda one, path: path.write_bytes(held[one.custom_id, one.name]), title=TITLE)
    assert report.ok
    return target


@pytest.fixture
def page(context: BrowserContext, delivery: Path) -> Iterator[Page]:
    """The page, opened from disk as a person opens it; what the browser complains about fails the test."""
    opened = context.new_page()
    complaints: list[str] = []
    opened.on("console", lambda message: complaints.append(message.text) if message.type in ("error", "warning") else None)
    opened.on("pageerror", lambda error: complaints.append(str(error)))
    opened.on("dialog", lambda dialog: complaints.append(f"dialog {dialog.message}"))
    opened.on("requestfailed", lambda request: complaints.append(f"{request.url}: {request.failure}") if "ERR_ABORTED" not in str(request.failure) else None)
    opened.goto((delivery / "index.html").as_uri())
    yield opened
    assert complaints == []


def manifest(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "manifest.csv", encoding="utf-8-sig", newline="") as text:
        return {row["file"]: row for row in csv.DictReader(text) if row["file"]}


def scroll_through(page: Page) -> None:
    """As a reader does: what is below the fold loads only when it comes into sight."""
    page.evaluate(
        """async () => {
            for (let y = 0; y < document.body.scrollHeight; y += 400) { scrollTo(0, y); await new Promise((r) => setTimeout(r, 50)); }
            scrollTo(0, 0);
        }"""
    )


def test_every_picture_shows(page: Page, delivery: Path) -> None:
    scroll_through(page)
    shown = page.evaluate(
        """async () => {
            const found = [...document.querySelectorAll("main img")];
            await Promise.all(found.map((image) => image.decode()));
            return found.map((image) => [decodeURIComponent(image.src), image.naturalWidth, image.naturalHeight]);
        }"""
    )
    rows = manifest(delivery)
    wanted = {path: row for path, row in rows.items() if row["media_type"].startswith("image/") and row["custom_id"] != "fox/clip"}
    assert len(shown) == len(wanted) == 10
    for address, width, height in shown:
        row = wanted[address.partition(f"{delivery.name}/")[2]]
        assert (str(width), str(height)) == (row["width"], row["height"])


def test_clips_and_sounds_play(page: Page, delivery: Path) -> None:
    played = page.evaluate(
        """async () => {
            const out = [];
            for (const player of document.querySelectorAll("video, audio")) {
                const failed = new Promise((_, no) => player.addEventListener("error", () => no(new Error(player.src + ": " + player.error.message))));
                await Promise.race([player.play(), failed]);
                const start = player.currentTime;
                const moved = new Promise((yes) => player.addEventListener("timeupdate", () => { if (player.currentTime > start + 0.2) yes(); }));
                await Promise.race([moved, failed]);
                const others = [...document.querySelectorAll("video, audio")].filter((one) => one !== player && !one.paused).length;
                const frames = player.getVideoPlaybackQuality?.().totalVideoFrames;
                out.push({
                    file: decodeURIComponent(player.src), tag: player.tagName, ready: player.readyState, duration: player.duration, others,
                    width: player.videoWidth, height: player.videoHeight, frames, poster: player.poster,
                    sound: player.webkitAudioDecodedByteCount,
                });
                const ended = new Promise((yes) => player.addEventListener("ended", yes));
                if (player.duration - player.currentTime < 3) await Promise.race([ended, failed]);
            }
            return out;
        }"""
    )
    rows = manifest(delivery)
    assert [one["tag"] for one in played].count("VIDEO") == 1
    assert [one["tag"] for one in played].count("AUDIO") == len(SOUNDS)
    for one in played:
        row = rows[one["file"].partition(f"{delivery.name}/")[2]]
        assert one["ready"] >= 2
        assert one["sound"] > 0
        assert one["others"] == 0  # one thing plays at a time
        # Lossy packets have a fixed length, and a stream of bare AAC packets bears no length: it is guessed from its size.
        assert one["duration"] == pytest.approx(float(row["duration_s"]), abs=0.15), row
        if one["tag"] == "VIDEO":
            assert (one["width"], one["height"]) == (256, 144)
            assert one["frames"] > 1
            assert one["poster"].endswith(".jpg") or one["poster"].endswith(".png")


def test_nothing_becomes_markup(page: Page) -> None:
    expect(page.locator("h1")).to_have_text(TITLE)
    expect(page).to_have_title(TITLE)
    scroll_through(page)
    assert page.locator("main script, main b b, main i, img[src=x]").count() == 0
    expect(page.locator("h2", has_text="<b>ثعلب")).to_have_count(1)
    article = page.locator("article", has=page.locator("h2", has_text="nasty"))
    expect(article.locator(".words")).to_have_text(NASTY)
    expect(page.locator(".failed p")).to_contain_text('<script>document.title = "broken"</script>')
    arabic = page.locator(".words", has_text="الثعلب")
    assert arabic.evaluate("(node) => getComputedStyle(node).direction") == "rtl"


def test_search_and_filters(page: Page) -> None:
    headings = page.locator("article h2")
    expect(headings).to_have_count(6)
    counts = {name.strip(): int(n) for name, n in (text.rsplit(" ", 1) for text in page.locator("#filters button").evaluate_all("(all) => all.map((b) => b.firstChild.textContent + ' ' + b.lastChild.textContent)"))}
    assert counts["Video"] == 1
    assert counts["Sound"] == len(SOUNDS)
    assert counts["Failed"] == 1
    page.get_by_role("button", name="Sound").click()
    expect(headings).to_have_text(["sounds"])
    expect(page.locator("article audio")).to_have_count(len(SOUNDS))
    page.get_by_role("button", name="Failed").click()
    expect(headings).to_have_text(["bee"])
    page.get_by_role("button", name="All").click()
    page.keyboard.press("/")
    page.keyboard.type("الثعلب")
    expect(headings).to_have_count(1)
    page.locator("#search").fill("bushy TAIL")
    expect(headings).to_have_text(["fox"])
    page.locator("#search").fill("nothing like it")
    expect(page.locator("#none")).to_be_visible()
    page.locator("#reset").click()
    expect(headings).to_have_count(6)


def test_pictures_enlarge_and_turn(page: Page) -> None:
    page.get_by_role("button", name="Enlarge fox/picture").click()
    box = page.locator("#box")
    expect(box).to_be_visible()
    expect(page.locator("#what")).to_contain_text("fox/picture")
    assert page.locator("#big").evaluate("async (image) => { await image.decode(); return image.naturalWidth; }") == 96
    page.keyboard.press("ArrowRight")
    expect(page.locator("#what")).to_contain_text("fox/card")
    # From disk a browser shows the file instead of saving it; the page must not be lost for it.
    with page.context.expect_page() as opened:
        page.locator("#save").click()
    opened.value.wait_for_url("**/fox/card/card.png")
    opened.value.close()
    page.keyboard.press("Escape")
    expect(box).to_be_hidden()


def test_what_a_row_was_made_of_unfolds(page: Page) -> None:
    article = page.locator("article", has=page.locator("h2", has_text="fox"))
    article.locator("details.made summary").click()
    expect(article.locator("details.made")).to_contain_text("m@1")
    expect(article.locator("details.made a", has_text="text/text.txt")).to_have_attribute("href", "fox/text/text.txt")


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", WIDTHS)
def test_it_fits_in_both_schemes(page: Page, width: int, scheme: str, tmp_path: Path) -> None:
    page.set_viewport_size({"width": width, "height": 844})
    page.emulate_media(color_scheme=scheme)
    scroll_through(page)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(ground) < 200) == (scheme == "dark")
    page.locator("#theme").click()
    other = page.evaluate("getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)")
    assert (sum(other) < 200) != (scheme == "dark")
    page.locator("#theme").click()
    # A picture of the whole page, also of what a reader would have to scroll to.
    page.add_style_tag(content=".group { content-visibility: visible !important; }")
    folder = Path(os.environ.get("SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"delivery-{width}-{scheme}.png", full_page=True)
