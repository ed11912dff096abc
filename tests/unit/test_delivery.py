"""Delivery folders: names that never meet, checksums, a table, a page, and second runs that fetch only what is new."""

import base64
import csv
import hashlib
import json
import re
import shutil
import subprocess
import unicodedata
import zipfile
from urllib.parse import unquote

import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfactory.errors import InputError, ObjectNotFound
from producer.delivery import COLUMNS, DeliveryItem, _Names, deliver, safe_part


class Shelf:
    """A store of results that counts what is taken out of it."""

    def __init__(self):
        self.bytes, self.taken = {}, []

    def item(self, custom_id, name, data, media_type="text/plain", kind="text.echo", **more):
        self.bytes[custom_id, name] = data
        digest = hashlib.sha256(data).hexdigest()
        return DeliveryItem(custom_id, kind, "succeeded", name, media_type, len(data), digest, **more)

    def fetch(self, item, path):
        self.taken.append(f"{item.custom_id}/{item.name}")
        if (item.custom_id, item.name) not in self.bytes:
            raise ObjectNotFound("no such object")
        path.write_bytes(self.bytes[item.custom_id, item.name])


@pytest.fixture
def shelf():
    return Shelf()


def failed(custom_id, message="the prompt is empty", **more):
    return DeliveryItem(custom_id, "text.echo", "failed", error={"type": "input", "message": message}, **more)


def table(folder):
    with open(folder / "manifest.csv", encoding="utf-8-sig", newline="") as text:
        return list(csv.DictReader(text))


def page_data(folder):
    page = (folder / "index.html").read_text("utf-8")
    return json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_delivery_is_complete_and_can_be_checked(tmp_path, shelf):
    meta = {"width": 8, "height": 6, "words": ["not", "shown"]}
    items = [
        shelf.item("fox/text", "text.txt", b"hello"),
        shelf.item(
            "fox/pic", "image.png", b"png", "image/png", "image.generate", meta=meta, seed=4, model="m@1"
        ),
        failed("fox/clip"),
    ]
    seen = []
    report = deliver(
        items,
        tmp_path / "out",
        shelf.fetch,
        title="Foxes",
        progress=lambda done, total: seen.append((done, total)),
    )
    out = tmp_path / "out"
    assert files(out) == [
        "SHA256SUMS",
        "fox/pic/image.png",
        "fox/text/text.txt",
        "index.html",
        "manifest.csv",
    ]
    assert (report.files, report.bytes, report.fetched, report.failed_jobs, report.ok) == (2, 8, 2, 1, True)
    assert seen == [(1, 2), (2, 2)]
    assert report.page.is_file()
    text, picture, clip = table(out)
    assert tuple(text) == COLUMNS
    assert text["file"] == "fox/text/text.txt"
    assert (picture["width"], picture["height"], picture["seed"], picture["model"]) == ("8", "6", "4", "m@1")
    assert (clip["state"], clip["file"], clip["error"]) == ("failed", "", "the prompt is empty")
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", "SHA256SUMS"], cwd=out, check=True)
    assert len((out / "SHA256SUMS").read_text().splitlines()) == 4
    (group,) = page_data(out)["groups"]
    assert group["name"] == "fox"
    assert [item.get("text") for item in group["items"]] == ["hello", None, None]
    assert group["items"][1]["meta"] == {"width": 8, "height": 6}
    assert group["items"][2]["error"] == "the prompt is empty"


def test_a_second_run_fetches_only_what_is_new(tmp_path, shelf):
    first = [shelf.item("a", "x.txt", b"1"), shelf.item("b", "x.txt", b"2"), shelf.item("c/d", "x.txt", b"3")]
    deliver(first, tmp_path, shelf.fetch, title="t")
    before = {name: (tmp_path / name).read_bytes() for name in ("manifest.csv", "index.html", "SHA256SUMS")}
    shelf.taken.clear()
    again = deliver(first, tmp_path, shelf.fetch, title="t")
    assert shelf.taken == []
    assert (again.kept, again.fetched) == (3, 0)
    assert before == {name: (tmp_path / name).read_bytes() for name in before}

    (tmp_path / "mine.txt").write_text("a note of the user's")
    (tmp_path / "a" / "x.txt").write_text("9")  # damaged on disk, same size
    third = deliver([first[0], shelf.item("b", "x.txt", b"new")], tmp_path, shelf.fetch, title="t")
    assert shelf.taken == ["a/x.txt", "b/x.txt"]
    assert third.removed == 1
    assert files(tmp_path) == ["SHA256SUMS", "a/x.txt", "b/x.txt", "index.html", "manifest.csv", "mine.txt"]
    assert (tmp_path / "a/x.txt").read_text() == "1"
    assert not (tmp_path / "c").exists()


def test_what_somebody_changed_is_not_removed(tmp_path, shelf):
    deliver(
        [shelf.item("a", "x.txt", b"1"), shelf.item("b", "x.txt", b"2")], tmp_path, shelf.fetch, title="t"
    )
    (tmp_path / "b/x.txt").write_text("my own words")
    report = deliver([shelf.item("a", "x.txt", b"1")], tmp_path, shelf.fetch, title="t")
    assert report.removed == 0
    assert "b/x.txt" in report.warnings[0]
    assert (tmp_path / "b/x.txt").exists()


@pytest.mark.parametrize("name", ["index.html", "manifest.csv", "a/x.txt"])
def test_a_folder_with_somebody_elses_files_is_refused(tmp_path, shelf, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(InputError, match="another folder"):
        deliver([shelf.item("a", "x.txt", b"1")], tmp_path, shelf.fetch, title="t")
    assert (tmp_path / name).read_text() == "mine"


def test_links_do_not_lead_out_of_the_folder(tmp_path, shelf):
    outside, out = tmp_path / "outside", tmp_path / "out"
    outside.mkdir()
    out.mkdir()
    (out / "a").symlink_to(outside)
    with pytest.raises(InputError, match="through a link"):
        deliver([shelf.item("a", "x.txt", b"1")], out, shelf.fetch, title="t")
    assert list(outside.iterdir()) == []


def test_a_forged_table_removes_nothing_outside(tmp_path, shelf):
    out, victim = tmp_path / "out", tmp_path / "victim.txt"
    deliver([shelf.item("a", "x.txt", b"1")], out, shelf.fetch, title="t")
    victim.write_text("keep me")
    digest = hashlib.sha256(b"keep me").hexdigest()
    with open(out / "manifest.csv", "a", newline="") as text:
        csv.writer(text).writerow(
            ["z", "text.echo", "succeeded", "../victim.txt", "", "7", digest, "", "", "", "", "", ""]
        )
        csv.writer(text).writerow(
            ["z", "text.echo", "succeeded", str(victim), "", "7", digest, "", "", "", "", "", ""]
        )
    deliver([shelf.item("a", "x.txt", b"1")], out, shelf.fetch, title="t")
    assert victim.exists()


def test_lost_and_broken_artifacts_are_said_and_the_rest_delivered(tmp_path, shelf):
    lost, broken, good = (shelf.item(name, "x.txt", name.encode()) for name in ("lost", "broken", "good"))
    del shelf.bytes["lost", "x.txt"]
    shelf.bytes["broken", "x.txt"] = b"other bytes"
    report = deliver([lost, broken, good], tmp_path, shelf.fetch, title="t")
    assert [name for name, _ in report.missing] == ["lost/x.txt", "broken/x.txt"]
    assert not report.ok
    assert [row["error"].startswith("not delivered") for row in table(tmp_path)] == [True, True, False]
    assert "good/x.txt" in files(tmp_path)
    assert "broken/x.txt" not in files(tmp_path)


def test_cells_are_no_formulas_and_text_is_no_markup(tmp_path, shelf):
    nasty = '</script><script>alert(1)</script><img src=x onerror="alert(2)">\u2028'
    items = [
        shelf.item("=cmd|x", "+a.txt", nasty.encode(), params_summary=nasty),
        failed("@x", "=1+1"),
        failed("-y", nasty),
    ]
    deliver(items, tmp_path, shelf.fetch, title="<b>%%data%%</b>")
    for row in table(tmp_path):
        assert not any(cell.startswith(("=", "+", "-", "@")) for cell in row.values())
    page = (tmp_path / "index.html").read_text("utf-8")
    assert "<script>alert" not in page
    assert "<img src=x" not in page
    assert "<b>" not in page
    assert page.count("</script>") == 2
    assert page_data(tmp_path)["groups"][0]["items"][0]["text"] == nasty


def test_the_page_works_offline(tmp_path, shelf):
    deliver([shelf.item("ü b/ä#1?", "x%20.png", b"1", "image/png")], tmp_path, shelf.fetch, title="t")
    page = (tmp_path / "index.html").read_text("utf-8")
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", page)
    script = re.findall(r"<script>(.*?)</script>", page, re.S)[0].encode()
    digest = base64.b64encode(hashlib.sha256(script).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in page
    assert (tmp_path / unquote(page_data(tmp_path)["groups"][0]["items"][0]["file"])).is_file()


def test_thousands_of_items_keep_the_page_small(tmp_path, shelf):
    items = [shelf.item(f"row-{n:05d}", "text.txt", b"word " * 4000) for n in range(1500)]
    deliver(items, tmp_path, shelf.fetch, title="t")
    assert (tmp_path / "index.html").stat().st_size < 12_000_000
    shown = [group["items"][0] for group in page_data(tmp_path)["groups"]]
    assert len(shown) == 1500
    assert len(shown[0]["text"]) > 10_000
    assert len(shown[-1]["text"]) == 400
    assert shown[-1]["cut"]


def test_archive(tmp_path, shelf):
    items = [shelf.item("a/b", "x.txt", b"1" * 1000), failed("c")]
    report = deliver(items, tmp_path / "out", shelf.fetch, title="t", archive=tmp_path / "out.zip")
    with zipfile.ZipFile(report.archive) as archive:
        assert archive.testzip() is None
        assert sorted(archive.namelist()) == [f"out/{name}" for name in files(tmp_path / "out")]
    first = report.archive.read_bytes()
    deliver(items, tmp_path / "out", shelf.fetch, title="t", archive=tmp_path / "out.zip")
    assert report.archive.read_bytes() == first


# --- names -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("fox", "fox"), ("Fox & Bee: 1/2?", "Fox-Bee-1-2"), ("日本語 テキスト.png", "日本語-テキスト.png"), ("..", "_"),
        ("CON", "_CON"), ("nul.txt", "_nul.txt"), ("console", "console"), ("a. ", "a"), (".hidden", "hidden"), ("", "_"),
        ("a\u202egnp.exe", "a-gnp.exe"), ("Cafe\u0301", "Café"), ("हिन्दी", "हिन्दी"),
    ],
)  # fmt: skip
def test_safe_parts(text, expected):
    assert safe_part(text) == expected


def test_names_that_would_meet_are_kept_apart(tmp_path, shelf):
    pairs = [("Fox", "a.txt"), ("fox", "A.txt"), ("fox!", "a.txt"), ("x", "b"), ("x/b", "c.txt"), ("y/b", "c.txt"), ("y", "b"),
             ("index.html", "z.txt"), ("a//b", "c"), ("../../etc", "passwd"), ("/root", "d")]  # fmt: skip
    items = [shelf.item(custom_id, name, f"{custom_id} {name}".encode()) for custom_id, name in pairs]
    # A folder of the page's own name would stand in the page's way.
    report = deliver(items, tmp_path, shelf.fetch, title="t")
    rows = table(tmp_path)
    assert report.files == len(pairs)
    for row, (custom_id, name) in zip(rows, pairs, strict=True):
        assert (tmp_path / row["file"]).read_text() == f"{custom_id} {name}"
        assert (tmp_path / row["file"]).resolve().is_relative_to(tmp_path.resolve())
    assert len({row["file"].casefold() for row in rows}) == len(pairs)
    shelf.taken.clear()
    assert deliver(items, tmp_path, shelf.fetch, title="t").kept == len(pairs)
    assert shelf.taken == []


@given(st.lists(st.tuples(st.text(), st.text(min_size=1)), unique=True, max_size=30))
def test_any_names_give_safe_paths_that_never_meet(pairs):
    names = _Names()
    paths = [names.path(DeliveryItem(custom_id, "text.echo", "succeeded", name)) for custom_id, name in pairs]
    folded = [unicodedata.normalize("NFKC", path).casefold() for path in paths]
    assert len(set(folded)) == len(paths)
    for path, key in zip(paths, folded, strict=True):
        assert not any(other.startswith(key + "/") for other in folded)
        for part in path.split("/"):
            assert part
            assert part not in (".", "..")
            assert not set(part) & set('<>:"|?*\\\0\n')
            assert len(part.encode()) <= 255
            assert part == part.strip(" .")
            assert not re.match(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\.|$)", part)
        assert len(path) < 600
        assert path.split("/")[0].casefold() not in (
            "index.html",
            "manifest.csv",
            "sha256sums",
        )
