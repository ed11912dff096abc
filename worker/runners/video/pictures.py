"""Pictures under a moving camera.

The camera is an affine map with fractional positions over a copy of the picture that is larger than the frame: whole
pixels never snap, so slow movements do not tremble.
"""

from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image

from contentfactory.jobs.video import Motion
from worker.media.image import flatten, parse_colour
from worker.media.video import Frame
from worker.runners.video.plan import ease

# The job has one core; OpenCV's pool would only contend for it.
cv2.setNumThreads(1)

MAX_CROP = 1.4
"""``auto`` crops a picture to the frame while its shape differs by less than this; beyond, all of it is shown."""

_MAX_WORK_PIXELS = 24_000_000


@dataclass(frozen=True)
class View:
    """What the camera sees: centre and width, in pixels of the work picture."""

    x: float
    y: float
    width: float


@dataclass(frozen=True)
class Shot:
    """A picture and the camera's way over it.

    Args:
        work: RGB, shape ``(rows, columns, 3)``, some two and a half times as fine as the frame.
        first: View at the beginning.
        last: View at the end.
    """

    work: Frame
    first: View
    last: View

    def render(self, x: float, width: int, height: int) -> Frame:
        """The frame at a moment.

        Args:
            x: Moment in ``[0, 1]``.
            width: Of the frame, pixels.
            height: Of the frame, pixels.
        """
        e = ease(x)
        # Zoom by equal ratios in equal times: a straight line in width would seem to speed up.
        view_width = self.first.width * (self.last.width / self.first.width) ** e
        change = self.last.width - self.first.width
        way = e if abs(change) < 1e-9 else (view_width - self.first.width) / change
        cx = self.first.x + (self.last.x - self.first.x) * way
        cy = self.first.y + (self.last.y - self.first.y) * way
        step = view_width / width
        # Centres of pixels lie at halves.
        matrix = np.array(
            [[step, 0, cx - step * (width - 1) / 2 - 0.5], [0, step, cy - step * (height - 1) / 2 - 0.5]]
        )
        return cv2.warpAffine(  # type: ignore[return-value]
            self.work,
            matrix,
            (width, height),
            flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
            borderMode=cv2.BORDER_REPLICATE,
        )


def choose_motion(motion: Motion, index: int, contained: bool, aspect: float) -> Motion:
    """What ``auto`` means for a scene: it varies from one to the next, and pans along the picture's longer side.

    Args:
        motion: As the params say.
        index: Number of the scene.
        contained: Whether the picture is shown whole.
        aspect: Its width over its height, relative to the frame's.
    """
    if motion != "auto":
        return motion
    if contained:
        return "zoom_in" if index % 2 == 0 else "zoom_out"
    tall: tuple[Motion, ...] = ("zoom_in", "pan_down", "zoom_out", "pan_up")
    wide: tuple[Motion, ...] = ("zoom_in", "pan_right", "zoom_out", "pan_left")
    return (tall if aspect < 0.9 else wide)[index % 4]


def make_shot(
    picture: Image.Image,
    width: int,
    height: int,
    *,
    motion: Motion,
    fit: str,
    zoom: float,
    seconds: float,
    index: int,
    background: str,
) -> Shot:
    """Prepare a picture for its scene.

    Args:
        picture: ``RGB`` or ``RGBA``.
        width: Of the frame, pixels.
        height: Of the frame, pixels.
        motion: Camera movement.
        fit: ``auto``, ``cover`` or ``contain``.
        zoom: How far the camera zooms; 0.12 is 12 %.
        seconds: How long the scene is seen.
        index: Number of the scene.
        background: Colour behind transparent pictures, ``#rrggbb``.

    Returns:
        The shot.
    """
    aspect = picture.width / picture.height / (width / height)
    contained = (
        fit == "contain"
        or (fit == "auto" and max(aspect, 1 / aspect) > MAX_CROP)
        or (fit == "auto" and picture.mode == "RGBA")
    )
    motion = choose_motion(motion, index, contained, aspect)
    if motion == "none":
        zoom = 0.0
    closest = 1 + zoom
    # Linear sampling from two and a half times the frame's resolution neither blurs nor tears. At a whole ratio all pixels
    # of a frame would fall between those of the picture by the same part, and a slow pan would pulse in sharpness.
    fine = min(2.5, max(1.0, (_MAX_WORK_PIXELS / (width * height * closest**2)) ** 0.5))
    if contained:
        work = _contain(picture, width, height, closest, fine, background)
        first, last = _way(motion, work.shape[1], work.shape[0], width / height, closest, seconds)
        return Shot(work, first, last)
    flat = flatten(picture, background)
    first, last = _way(motion, flat.width, flat.height, width / height, closest, seconds)
    # Only what the camera ever sees is kept.
    tall = height / width
    left = min(v.x - v.width / 2 for v in (first, last))
    right = max(v.x + v.width / 2 for v in (first, last))
    top = min(v.y - v.width * tall / 2 for v in (first, last))
    bottom = max(v.y + v.width * tall / 2 for v in (first, last))
    box = (max(0.0, left), max(0.0, top), min(float(flat.width), right), min(float(flat.height), bottom))
    scale = width / min(first.width, last.width)
    # A long pan over a panorama would not fit at full resolution.
    seen = (box[2] - box[0]) * (box[3] - box[1]) * scale**2
    fine = min(fine, max(1.0, (_MAX_WORK_PIXELS / seen) ** 0.5))
    work = _resize(flat, box, scale, fine)
    sx, sy = work.shape[1] / (box[2] - box[0]), work.shape[0] / (box[3] - box[1])

    def moved(v: View) -> View:
        return View((v.x - box[0]) * sx, (v.y - box[1]) * sy, v.width * sx)

    return Shot(work, moved(first), moved(last))


def _way(
    motion: Motion, width: float, height: float, frame_aspect: float, closest: float, seconds: float
) -> tuple[View, View]:
    """First and last view over a picture of that size."""
    widest = min(width, height * frame_aspect)
    cx, cy = width / 2, height / 2
    if motion in ("zoom_in", "zoom_out"):
        far, near = View(cx, cy, widest), View(cx, cy, widest / closest)
        return (far, near) if motion == "zoom_in" else (near, far)
    if motion == "none":
        return View(cx, cy, widest), View(cx, cy, widest)
    view = widest / closest
    view_height = view / frame_aspect
    # A pan goes as far as the picture allows, but not faster than the eye follows.
    reach = 0.04 + 0.04 * seconds
    if motion in ("pan_left", "pan_right"):
        way = min(width - view, view * reach) / 2
        one, two = View(cx - way, cy, view), View(cx + way, cy, view)
        return (one, two) if motion == "pan_right" else (two, one)
    way = min(height - view_height, view_height * reach) / 2
    one, two = View(cx, cy - way, view), View(cx, cy + way, view)
    return (one, two) if motion == "pan_down" else (two, one)


def _resize(picture: Image.Image, box: tuple[float, float, float, float], scale: float, fine: float) -> Frame:
    """Part of a picture at ``scale`` × ``fine``, without detail that a frame at ``scale`` could not show."""
    wide, tall = box[2] - box[0], box[3] - box[1]
    size = (max(1, round(wide * scale * fine)), max(1, round(tall * scale * fine)))
    if scale < 1 and fine > 1:
        # Taking away what is too fine before enlarging keeps far views from shimmering.
        small = (max(1, round(wide * scale)), max(1, round(tall * scale)))
        picture = picture.resize(small, Image.Resampling.LANCZOS, box=box)
        return np.ascontiguousarray(picture.resize(size, Image.Resampling.BICUBIC))
    return np.ascontiguousarray(picture.resize(size, Image.Resampling.LANCZOS, box=box))


def _contain(
    picture: Image.Image, width: int, height: int, closest: float, fine: float, background: str
) -> Frame:
    """The whole picture in a frame's shape, over a blurred copy of itself, or over the background where it is transparent."""
    canvas_width, canvas_height = round(width * closest * fine), round(height * closest * fine)
    # At the closest view the picture still fits.
    scale = min(width / picture.width, height / picture.height)
    box = (0.0, 0.0, float(picture.width), float(picture.height))
    if picture.mode == "RGBA":
        canvas = card(canvas_width, canvas_height, background)
        front = _resize(flatten_over(picture, canvas), box, scale * 0.84, fine)
    else:
        rgb = picture.convert("RGB")
        canvas = _backdrop(rgb, canvas_width, canvas_height)
        front = _resize(rgb, box, scale, fine)
    if picture.mode == "RGBA":
        alpha = (
            _resize(picture.getchannel("A").convert("RGB"), box, scale * 0.84, fine)[..., :1].astype(
                np.float32
            )
            / 255
        )
    else:
        alpha = None
    y, x = (canvas_height - front.shape[0]) // 2, (canvas_width - front.shape[1]) // 2
    area = canvas[y : y + front.shape[0], x : x + front.shape[1]]
    front = front[: area.shape[0], : area.shape[1]]
    area[:] = front if alpha is None else np.rint(front * alpha + area * (1 - alpha)).astype(np.uint8)
    return canvas


def flatten_over(picture: Image.Image, canvas: Frame) -> Image.Image:
    """A transparent picture on the colour in the middle of a canvas: its edges then blend without a rim."""
    red, green, blue = (int(v) for v in canvas[canvas.shape[0] // 2, canvas.shape[1] // 2])
    return flatten(picture, (red, green, blue))


def _backdrop(picture: Image.Image, width: int, height: int) -> Frame:
    small = (max(8, width // 12), max(8, height // 12))
    aspect = small[0] / small[1]
    wide = min(picture.width, picture.height * aspect)
    left, top = (picture.width - wide) / 2, (picture.height - wide / aspect) / 2
    part = picture.resize(small, Image.Resampling.BOX, box=(left, top, left + wide, top + wide / aspect))
    soft = cv2.GaussianBlur(np.asarray(part), (0, 0), small[1] * 0.07, borderType=cv2.BORDER_REPLICATE)
    large = cv2.resize(soft.astype(np.float32), (width, height), interpolation=cv2.INTER_CUBIC)
    return np.clip(large * 0.5, 0, 255).astype(np.uint8)


def card(width: int, height: int, colour: str) -> Frame:
    """A calm ground of one colour, a little lighter above than below."""
    base = np.array(parse_colour(colour), np.float32)
    light = np.linspace(1.07, 0.94, height, dtype=np.float32)[:, None, None]
    ground = base * light + np.linspace(5, 0, height, dtype=np.float32)[:, None, None]
    # A grain of half a level hides the bands that a slow gradient shows in 8 bits; it is the same in every run.
    grain = np.random.default_rng(0).random((height, width, 1), dtype=np.float32) - 0.5
    return np.clip(np.rint(ground + grain), 0, 255).astype(np.uint8)
