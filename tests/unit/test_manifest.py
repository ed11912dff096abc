"""Manifests: every mistake by its line, templates, recipes, sources of every format, flat memory."""

import gzip
import json
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contentfactory.errors import InputError
from producer.manifest import MAX_SEED, check, lines, open_manifest, parse_job, read
from producer.manifest.template import (
    FILTERS,
    MISSING,
    TemplateError,
    compile_template,
    compile_tree,
    escape,
    render_tree,
    slug,
)

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def write(folder, name, text):
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def jsonl(folder, *rows, name="m.jsonl"):
    return write(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def echo(custom_id, **more):
    return {"custom_id": custom_id, "kind": "text.echo", **more}


def recipe(folder, **body):
    return write(folder, "r.yaml", json.dumps({"version": 1, **body}))  # JSON is YAML


def found(path, **options):
    """(line, field, code) of each mistake."""
    report = check(open_manifest(path, **options))
    assert report.error_count == len(report.errors)
    return [(error.line, error.field, error.code) for error in report.errors]


def made(path, **options):
    manifest = open_manifest(path, **options)
    check(manifest).raise_for_errors()
    return list(lines(manifest))


# --- mistakes ----------------------------------------------------------------------------------------------------------


def test_every_kind_of_mistake_is_named_with_its_line():
    report = check(open_manifest(EXAMPLES / "mistakes.jsonl"))
    assert [(error.line, error.custom_id, error.field, error.code) for error in report.errors] == [
        (2, None, None, "invalid_json"),
        (3, None, None, "not_an_object"),
        (4, "typo", "parms", "unknown_field"),
        (5, "no-such-kind", "kind", "unknown_kind"),
        (6, "too-many-steps", "params.steps", "invalid_params"),
        (7, "unknown-param", "params.pitch", "unknown_field"),
        (8, "no-prompt", "params.prompt", "invalid_params"),
        (9, "good", "custom_id", "duplicate_custom_id"),
        (10, "orphan", "depends_on", "missing_dependency"),
        (11, "self", "params.text", "self_reference"),
        (12, "hen", "depends_on", "dependency_cycle"),
        (15, "wrong-input", "params.image", "wrong_modality"),
        (16, "hurry", "priority", "invalid_params"),
        (17, "dice", "seed", "invalid_params"),
        (18, "no-file", "params.image", "file_not_found"),
        (19, None, "custom_id", "invalid_custom_id"),
        (20, "notes", "metadata", "invalid_params"),
    ]
    text = "\n".join(map(str, report.errors))
    for words in (
        "image.generate",
        "(received 900)",
        "line 1",
        "hen → egg → hen",
        "did you mean 'good'",
        "'urgent'",
    ):
        assert words in text
    with pytest.raises(InputError, match="17 mistakes; nothing was accepted"):
        report.raise_for_errors()
    assert json.loads(json.dumps(report.to_dict()))["errors"][0]["line"] == 2


def test_the_page_on_manifests_shows_what_is_really_said():
    page = (EXAMPLES.parent / "docs" / "manifest.md").read_text("utf-8")
    for error in check(open_manifest(EXAMPLES / "mistakes.jsonl")).errors:
        assert str(error) in page


def test_a_manifest_without_mistakes(tmp_path):
    path = jsonl(
        tmp_path,
        echo(
            "b",
            depends_on=["a"],
            priority="bulk",
            params={"text": {"job": "a", "output": "text.txt"}},
            seed=5,
        ),
        echo("a", priority=100, metadata={"k": "v"}, params={"text": "x", "seconds": 2}),
        echo("c", params={"text": {"job": "job_" + "0" * 32}}),
    )
    report = check(open_manifest(path))
    assert report.ok
    assert report.jobs == 3
    assert report.dependencies == 3
    assert report.kinds["text.echo"].jobs == 3
    assert report.seconds == pytest.approx(2, abs=0.01)
    b, a, c = lines(open_manifest(path))
    assert (b.line, b.custom_id, b.kind, b.priority, b.seed, b.parents) == (1, "b", "text.echo", 0, 5, ("a",))
    assert b.refs[0].field == "text"
    assert b.refs[0].output == "text.txt"
    assert b.refs[0].modality == "text"
    assert (a.priority, a.metadata, a.params) == (100, {"k": "v"}, {"text": "x", "seconds": 2.0})
    assert c.parents == ("job_" + "0" * 32,)
    assert c.priority == 50
    assert c.seed is None


def test_errors_are_capped_but_counted(tmp_path):
    path = jsonl(
        tmp_path,
        *[echo(f"j{n}", priority=-1) for n in range(50)],
        echo("x", depends_on=["y"]),
        echo("y", depends_on=["x"]),
    )
    report = check(open_manifest(path), max_errors=10)
    assert len(report.errors) == 10
    assert report.error_count == 51


def test_a_wrong_line_does_not_make_those_that_need_it_wrong(tmp_path):
    assert found(jsonl(tmp_path, echo("a", priority=-1), echo("b", depends_on=["a"]))) == [
        (1, "priority", "invalid_params")
    ]


def test_cycles_are_found_wherever_they_hide(tmp_path):
    rows = [echo(f"n{n}", depends_on=[f"n{n + 1}"]) for n in range(30)] + [echo("n30", depends_on=["n28"])]
    rows += [echo("p", depends_on=["q", "n0"]), echo("q", params={"text": {"job": "p"}}), echo("free")]
    report = check(open_manifest(jsonl(tmp_path, *rows)))
    assert [error.message for error in report.errors] == [
        "jobs wait for each other: n28 → n29 → n30 → n28", "jobs wait for each other: p → q → p",
    ]  # fmt: skip


def test_outputs_must_suit_the_field(tmp_path):
    def mistakes(kind, output, field, reader):
        ref = {"job": "a"} | ({"output": output} if output else {})
        source = {
            "custom_id": "a",
            "kind": kind,
            "params": {"prompt": "x"} if kind == "image.generate" else {"text": "x"},
        }
        return found(jsonl(tmp_path, source, {"custom_id": "b", "kind": reader, "params": {field: ref}}))

    wrong = [(2, "params.image", "wrong_modality")]
    assert mistakes("image.generate", None, "image", "image.upscale") == []
    assert mistakes("text.echo", None, "image", "image.upscale") == wrong
    assert mistakes("audio.speech", "timings.json", "image", "image.upscale") == wrong
    assert mistakes("audio.speech", None, "text", "text.echo") == [(2, "params.text", "wrong_modality")]
    assert mistakes("audio.speech", "timings.json", "text", "text.echo") == []
    assert mistakes("audio.speech", "speech.wav", "text", "text.echo") == [
        (2, "params.text", "wrong_modality")
    ]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", [(None, None, "empty")]),
        (b"\n  \n\r\n", [(None, None, "empty")]),
        (b'\xef\xbb\xbf{"custom_id":"a","kind":"text.echo"}\r\n\r\n{"custom_id":"b","kind":"text.echo"}', []),
        (b'{"custom_id":"a","kind":"text.echo"}\n{"custom_id":"\xff"}\n{}\n', [
            (2, None, "not_utf8"), (3, "custom_id", "invalid_custom_id"), (3, "kind", "unknown_kind")]),
        ('{"custom_id":"a","kind":"text.echo"}'.encode("utf-16"), [(1, None, "not_utf8")]),
        (b'{"custom_id":"a","kind":"text.echo","params":{"seconds":NaN}}', [(1, None, "invalid_json")]),
        (b'{"custom_id":"a","custom_id":"b","kind":"text.echo"}', [(1, None, "invalid_json")]),
        (b"[" * 100_000, [(1, None, "invalid_json")]),
        (b'{"custom_id":"a\\ud800","kind":"text.echo"}', [(1, "custom_id", "invalid_custom_id")]),
        (b'{"custom_id":"a","kind":"text.echo","params":{"text":"\\ud800"}}', [(1, "params.text", "invalid_params")]),
        (b'{"custom_id":" a","kind":"text.echo","params":[]}', [
            (1, "custom_id", "invalid_custom_id"), (1, "params", "invalid_params")]),
        (b'{"custom_id":7,"kind":null,"seed":true,"depends_on":[1]}', [
            (1, "custom_id", "invalid_custom_id"), (1, "depends_on", "invalid_params"), (1, "seed", "invalid_params"),
            (1, "kind", "unknown_kind")]),
        (json.dumps(echo("x" * 201, seed=MAX_SEED + 1)).encode(), [
            (1, "custom_id", "invalid_custom_id"), (1, "seed", "invalid_params")]),
        (json.dumps(echo("job_" + "0" * 32)).encode(), [(1, "custom_id", "invalid_custom_id")]),
    ],
)  # fmt: skip
def test_broken_files(tmp_path, content, expected):
    assert found(write(tmp_path, "m.jsonl", content)) == expected


def test_lines_that_are_too_long(tmp_path, monkeypatch):
    monkeypatch.setattr(read, "MAX_LINE_BYTES", 1000)
    path = jsonl(tmp_path, echo("a"), echo("b", params={"text": "x" * 2_000_000}), echo("c", priority=-1))
    assert found(path) == [(2, None, "line_too_long"), (3, "priority", "invalid_params")]


def test_gzip_and_its_bombs(tmp_path, monkeypatch):
    good = json.dumps(echo("a")).encode()
    assert [job.custom_id for job in made(write(tmp_path, "m.jsonl.gz", gzip.compress(good)))] == ["a"]
    assert found(write(tmp_path, "cut.jsonl.gz", gzip.compress(good)[:-12])) == [(None, None, "bad_gzip")]
    assert found(write(tmp_path, "no.jsonl.gz", good)) == [(None, None, "bad_gzip")]
    monkeypatch.setattr(read, "MAX_SOURCE_BYTES", 100_000)
    assert (None, None, "too_large") in found(
        write(tmp_path, "bomb.jsonl.gz", gzip.compress(b"\n" * 200_000))
    )


def test_what_cannot_be_opened(tmp_path):
    assert found(tmp_path / "none.jsonl") == [(None, None, "file_not_found")]
    assert found(write(tmp_path, "x.docx", b"")) == [(None, None, "unknown_format")]
    assert found(write(tmp_path, "x.csv", b"a\n1\n")) == [(None, "kind", "usage")]
    assert found(write(tmp_path, "x.parquet", b"nope"), kind="text.echo") == [(None, None, "invalid_parquet")]
    assert found(write(tmp_path, "e.csv", b""), kind="text.echo") == [(None, None, "empty")]
    assert found(write(tmp_path, "h.csv", b"a,a\n1,2\n"), kind="text.echo") == [(1, None, "bad_header")]
    with pytest.raises(InputError, match="cannot be read"):
        list(lines(open_manifest(tmp_path / "none.jsonl")))


def test_too_many_jobs(tmp_path):
    path = jsonl(tmp_path, *[echo(f"j{n}") for n in range(5)])
    assert found(path, max_jobs=4) == [(5, None, "too_many_jobs")]
    assert [job.custom_id for job in made(path, limit=2)] == ["j0", "j1"]


def test_a_line_that_changed_since_the_check_is_refused(tmp_path):
    path = jsonl(tmp_path, echo("a"))
    manifest = open_manifest(path)
    assert check(manifest).ok
    jsonl(tmp_path, echo("a", priority=-1))
    with pytest.raises(InputError, match="line 1"):
        list(lines(manifest))


def test_vet_refuses_what_only_the_caller_can_know(tmp_path):
    path = jsonl(tmp_path, echo("a"), echo("b"))
    report = check(
        open_manifest(path), vet=lambda job: ["model 'x' is not registered"] if job.custom_id == "b" else []
    )
    assert [str(error) for error in report.errors] == ["line 2 (b): model 'x' is not registered"]


def test_one_job_alone():
    job = parse_job(echo("a", params={"text": "x"}))
    assert (job.custom_id, job.params, job.line) == ("a", {"text": "x"}, None)
    with pytest.raises(InputError, match=r"priority: .*; params.seconds"):
        parse_job(echo("a", priority=200, params={"seconds": -1}))


# --- files -------------------------------------------------------------------------------------------------------------


def test_local_files(tmp_path):
    (tmp_path / "in").mkdir()
    write(tmp_path, "in/a.png", b"picture")
    write(tmp_path, "in/a.wav", b"sound")
    write(tmp_path.parent, "secret.png", b"not yours")
    (tmp_path / "link.png").symlink_to(tmp_path.parent / "secret.png")

    def upscale(custom_id, address):
        return {"custom_id": custom_id, "kind": "image.upscale", "params": {"image": address}}

    path = jsonl(tmp_path, upscale("a", "file:in/a.png"), upscale("b", "file:in/../in/a.png"))
    first, second = made(path)
    assert first.files[0].path == (tmp_path / "in/a.png").resolve() == second.files[0].path
    assert first.with_files({"file:in/a.png": "art_1"}) == {"image": "art_1"}
    assert first.params["image"].startswith("file:")
    report = check(open_manifest(path))
    assert (report.files, report.file_bytes) == (1, 7)
    wrong = [
        upscale("none", "file:in/none.png"), upscale("up", "file:../secret.png"), upscale("link", "file:link.png"),
        upscale("root", "file:/etc/passwd"), upscale("folder", "file:in"), upscale("sound", "file:in/a.wav"),
    ]  # fmt: skip
    path = jsonl(tmp_path, *wrong)
    codes = [code for _, _, code in found(path)]
    assert codes == ["file_not_found"] * 5 + ["wrong_modality"]
    assert len(found(path, local=False)) == 6


def test_files_inside_lists(tmp_path):
    write(tmp_path, "a.png", b"x")
    scenes = [{"text": "hello"}, {"image": "file:a.png"}, {"image": {"job": "pic"}}]
    pic = {"custom_id": "pic", "kind": "image.generate", "params": {"prompt": "fox"}}
    clip, _ = made(
        jsonl(tmp_path, {"custom_id": "c", "kind": "video.compose", "params": {"scenes": scenes}}, pic)
    )
    assert clip.files[0].field == "scenes.1.image"
    assert clip.refs[0].field == "scenes.2.image"
    assert clip.refs[0].modality == "image"
    assert clip.parents == ("pic",)
    assert clip.with_files({"file:a.png": "art_1"})["scenes"][1] == {"image": "art_1"}


# --- tables ------------------------------------------------------------------------------------------------------------


def test_csv_rows_become_jobs(tmp_path):
    text = '\ufeffname;note;n\r\nfox;"two\r\nlines; ""quoted""";3\r\n\r\nbee;;\r\n'
    sets = {
        "id": "{name|upper}",
        "text": "{name}: {note}",
        "seconds": "{n}",
        "seed": "{n}",
        "metadata.row": "{line}",
    }
    fox, bee = made(write(tmp_path, "t.csv", text), kind="text.echo", sets=sets)
    assert (fox.line, fox.custom_id, fox.seed, fox.metadata) == (2, "FOX", 3, {"row": "2"})
    assert fox.params == {"text": 'fox: two\r\nlines; "quoted"', "seconds": 3.0}
    assert (bee.line, bee.seed, bee.params) == (5, None, {"text": "bee: "})


def test_columns_named_like_params_need_no_mapping(tmp_path):
    (job,) = made(write(tmp_path, "t.csv", "id,text,other\nx,hello,1\n"), kind="text.echo")
    assert (job.custom_id, job.params) == ("x", {"text": "hello"})
    (job,) = made(write(tmp_path, "u.tsv", "text\tseconds\nhello\t2\n"), kind="text.echo")
    assert (job.custom_id, job.params) == ("row-2", {"text": "hello", "seconds": 2.0})
    assert found(write(tmp_path, "v.csv", "a\n1\n"), kind="text.echo") == [(None, None, "usage")]


def test_csv_mistakes_by_line(tmp_path):
    rows = b'name,n\nfox,1\nbee\nant,1,2\n"a\nb",x\n\xff,1\nowl,-1\n'
    path = write(tmp_path, "t.csv", rows)
    assert found(path, kind="text.echo", sets={"id": "{line}", "text": "{name}", "seconds": "{n}"}) == [
        (3, None, "ragged_row"), (4, None, "ragged_row"), (5, "params.seconds", "invalid_params"), (7, None, "not_utf8"),
        (8, "params.seconds", "invalid_params"),
    ]  # fmt: skip
    unclosed = write(tmp_path, "q.csv", 'name\nfox\n"never closed\nbee\n')
    assert found(unclosed, kind="text.echo", sets={"text": "{name}"}) == [(3, None, "invalid_csv")]
    assert found(path, kind="text.echo", sets={"text": "{nmae}"}) == [
        (None, "jobs.0.params.text", "unknown_column")
    ]


def test_parquet_keeps_types(tmp_path):
    table = pa.table(
        {"i": [3, None], "s": ["fox", "bee"], "f": [0.5, 1.0], "tags": [["a"], []], "unused": ["x", "y"]}
    )
    pq.write_table(table, tmp_path / "t.parquet", row_group_size=1)
    sets = {"text": "{s} {i} {f} {tags}", "seconds": "{f}", "seed": "{i}", "id": "{s}"}
    manifest = open_manifest(tmp_path / "t.parquet", kind="text.echo", sets=sets)
    assert check(manifest).warnings == ("columns that nothing uses: unused",)
    fox, bee = lines(manifest)
    assert (fox.line, fox.seed, fox.params) == (1, 3, {"text": 'fox 3 0.5 ["a"]', "seconds": 0.5})
    assert (bee.seed, bee.params["text"]) == (None, "bee  1.0 []")
    assert [job.custom_id for job in lines(manifest, start_after=1)] == ["bee"]


def test_jsonl_rows(tmp_path):
    path = jsonl(tmp_path, {"a": "x", "n": 2}, {"a": "y"}, {"b": 1})
    assert found(path, kind="text.echo", sets={"text": "{a}"}) == [(3, "params.text", "unknown_column")]
    sets = {"text": "{a}", "id": "{a}", "seconds": "{a}"}
    first, second = made(jsonl(tmp_path, {"a": 1.5}, {"a": 2}), kind="text.echo", sets=sets)
    assert (first.custom_id, first.params, second.params["text"]) == (
        "1.5",
        {"text": "1.5", "seconds": 1.5},
        "2",
    )
    nested = {"input": '["{a}", "x"]', "id": "{line}"}
    assert made(jsonl(tmp_path, {"a": 7}), kind="text.embed", sets=nested)[0].params == {"input": ["7", "x"]}


# --- recipes -----------------------------------------------------------------------------------------------------------


def test_the_example_is_right():
    manifest = open_manifest(EXAMPLES / "facts.yaml")
    report = check(manifest)
    report.raise_for_errors()
    assert report.lines == 20
    assert manifest.name == "Facts about real things"
    assert not report.warnings
    jobs = {job.custom_id: job for job in lines(manifest)}
    moods = {job.params["mood"] for job in jobs.values() if job.kind == "audio.music"}
    assert {f"music/{mood}" for mood in moods} <= set(jobs)
    assert 2 <= len(moods) <= 6
    clip = jobs["fox/clip"]
    assert {"fox/speech", "fox/picture"} <= set(clip.parents)
    assert any(name.startswith("music/") for name in clip.parents)
    assert {ref.output for ref in clip.refs if ref.field == "narration_timings"} == {"timings.json"}


def test_sweeps_conditions_defaults_and_once(tmp_path):
    write(tmp_path, "t.csv", "slug,lang,extra\nfox,en,\nbee,de,more\n")
    path = recipe(
        tmp_path, source="t.csv", vars={"brand": "Acme"},
        defaults={"priority": "bulk", "metadata": {"brand": "{brand}"}, "params": {"text.echo": {"transform": "upper"}}},
        once=[{"id": "shared/{lang}", "kind": "text.echo", "params": {"text": "{lang}"}},
              {"id": "intro", "kind": "text.echo"}],
        jobs=[
            {"id": "{slug}/a", "kind": "text.echo", "params": {"text": "{tone} {slug}", "transform": "none"},
             "sweep": {"params.seconds": [0.5, 1], "tone": ["warm", "very cool"]}, "depends_on": "shared/{lang}"},
            {"id": "{slug}/{n}", "kind": "text.echo", "sweep": {"n": [1, 2]}, "when": {"lang": "de"}, "seed": "{n}"},
            {"id": "{slug}/x", "kind": "text.echo", "params": {"text": "{extra}"}, "when": "extra"},
            {"id": "{slug}/y", "kind": "text.echo", "when": {"lang": {"not": ["de", "fr"]}}},
        ],
    )  # fmt: skip
    jobs = made(path)
    assert [(job.line, job.job, job.custom_id) for job in jobs] == [
        (2, 0, "shared/en"), (2, 1, "intro"), (2, 2, "fox/a-seconds0p5-tone-warm"), (2, 3, "fox/a-seconds0p5-tone-very-cool"),
        (2, 4, "fox/a-seconds1-tone-warm"), (2, 5, "fox/a-seconds1-tone-very-cool"), (2, 9, "fox/y"),
        (3, 0, "shared/de"), (3, 2, "bee/a-seconds0p5-tone-warm"), (3, 3, "bee/a-seconds0p5-tone-very-cool"),
        (3, 4, "bee/a-seconds1-tone-warm"), (3, 5, "bee/a-seconds1-tone-very-cool"), (3, 6, "bee/1"), (3, 7, "bee/2"),
        (3, 8, "bee/x"),
    ]  # fmt: skip
    swept = jobs[3]
    assert swept.params == {"text": "very cool fox", "seconds": 0.5, "transform": "none"}
    assert (swept.priority, swept.metadata, swept.parents) == (0, {"brand": "Acme"}, ("shared/en",))
    assert jobs[0].params == {"text": "en", "transform": "upper"}
    assert jobs[13].seed == 2
    assert [job.last for job in jobs] == [
        name in ("fox/y", "bee/x") for name in (job.custom_id for job in jobs)
    ]
    # A reading that stopped anywhere goes on right behind it.
    manifest = open_manifest(path)
    for n, job in enumerate(jobs):
        assert list(lines(manifest, start_after=(job.line, job.job))) == jobs[n + 1 :]
    assert list(lines(manifest, start_after=2)) == jobs[7:]


def test_once_jobs_must_agree(tmp_path):
    jobs = [{"id": "s", "kind": "text.echo", "params": {"text": "{a}"}}]
    assert found(recipe(tmp_path, rows=[{"a": 1}, {"a": 1}, {"a": 2}], once=jobs)) == [
        (3, None, "once_differs")
    ]


def test_same_mistake_in_every_row_is_told_a_few_times(tmp_path):
    rows = [{"n": n} for n in range(100)]
    report = check(
        open_manifest(
            recipe(tmp_path, rows=rows, jobs=[{"id": "{n}", "kind": "text.echo", "params": {"seconds": -1}}])
        )
    )
    assert report.error_count == 100
    assert len(report.errors) == 5


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("version: 2\njobs: [{id: a, kind: text.echo}]", None, "version"),
        ("version: 1\nversion: 1\n", 2, "stands twice"),
        ("version: 1\njobs: [", 2, "not YAML"),
        ("version: 1\njobs: []", None, "makes no jobs"),
        ("version: 1\njobs: [{id: a, kind: text.ech}]", None, "did you mean text.echo"),
        ("version: 1\njobs: [{id: {slug}, kind: text.echo}]", None, "jobs.0.id"),
        ('version: 1\njobs: [{id: "{slug", kind: text.echo}]', None, "a lone '{' at character 1"),
        ('version: 1\njobs: [{id: "{x|shout}", kind: text.echo}]', None, "filter 'shout' is unknown"),
        ('version: 1\njobs: [{id: "{x}", kind: text.echo}]', None, "column 'x' does not exist; columns: line"),
        ("version: 1\nsource: none.csv\njobs: [{id: a, kind: text.echo}]", None, "does not exist"),
        ("version: 1\njobs: [{id: a, kind: text.echo, sweep: {v: []}}]", None, "has no values"),
        ("version: 1\njobs: [{id: a, kind: text.echo, sweep: {params.text.x: [1]}, params: {text: y}}]", None, "does not lead to"),
        ("version: 1\njob: []", None, "unknown field"),
        ("- 1", None, "must be a mapping"),
        (("a: &a [x,x,x,x,x,x,x,x,x,x]\nb: &b [*a,*a,*a,*a,*a,*a,*a,*a,*a,*a]\nc: &c [*b,*b,*b,*b,*b,*b,*b,*b,*b,*b]\n"
         "d: &d [*c,*c,*c,*c,*c,*c,*c,*c,*c,*c]\ne: [*d,*d,*d,*d,*d]"), None, "more than 20,000 values"),
        ("version: 1\njobs: !!python/object/apply:os.system [id]", 2, "not YAML"),
    ],
)  # fmt: skip
def test_recipe_mistakes(tmp_path, text, line, words):
    report = check(open_manifest(write(tmp_path, "r.yaml", text)))
    assert report.errors
    assert report.errors[0].line == line
    assert any(words in str(error) for error in report.errors), report.errors


def test_recipes_in_toml_and_without_local_files(tmp_path):
    toml = 'version = 1\n[[jobs]]\nid = "a"\nkind = "text.echo"\nparams = {text = "hi {{}}"}\n'
    (job,) = made(write(tmp_path, "r.toml", toml))
    assert job.params == {"text": "hi {}"}
    assert job.line == 1
    write(tmp_path, "t.csv", "a\n1\n")
    path = recipe(tmp_path, source="t.csv", jobs=[{"id": "{a}", "kind": "text.echo"}])
    assert found(path, local=False) == [(None, "source", "not_allowed")]


# --- templates ---------------------------------------------------------------------------------------------------------

names = st.text(st.characters(exclude_characters="{}|", exclude_categories=("Cs",)), min_size=1).filter(
    lambda name: name == name.strip()
)


@given(st.text())
def test_an_escaped_text_renders_to_itself(text):
    assert compile_template(escape(text)).render({}) == text


@given(names, st.text(), st.text(), st.text())
def test_what_is_put_in_is_never_read_as_a_template(name, value, before, after):
    template = compile_template(f"{escape(before)}>{{{name}}}{escape(after)}")
    assert template.render({name: value}) == f"{before}>{value}{after}"


@given(
    names,
    st.one_of(
        st.integers(), st.floats(allow_nan=False), st.booleans(), st.text(min_size=1), st.lists(st.integers())
    ),
)
def test_a_bare_column_keeps_its_type(name, value):
    got = compile_template(f"{{ {name} }}").render({name: value})
    assert got == value
    assert type(got) is type(value)


@given(st.text())
def test_any_text_compiles_or_is_refused(text):
    try:
        template = compile_template(text)
    except TemplateError:
        return
    row = dict.fromkeys(template.columns, "v")
    assert isinstance(template.render(row), str)
    for column in template.columns:
        with pytest.raises(TemplateError, match="does not exist"):
            template.render({key: value for key, value in row.items() if key != column})


@given(st.text())
def test_slugs_are_safe_and_stable(text):
    once = slug(text)
    assert slug(once) == once
    assert not set(once) & set("/\\ .{}|'\"\n")
    assert once == once.strip("-")
    assert "--" not in once


def test_filters():
    row = {"n": "Café au Lait!", "jp": "日本 語"}
    texts = {name: compile_template(f"{{n|{name}}}").render(row) for name in FILTERS}
    assert texts["slug"] == "cafe-au-lait"
    assert texts["upper"] == "CAFÉ AU LAIT!"
    assert texts["title"] == "Café Au Lait!"
    assert compile_template("{jp|slug}").render(row) == "日本-語"
    assert compile_template("{n|lower|slug}-{n | upper}").render(row) == "cafe-au-lait-CAFÉ AU LAIT!"


def test_empty_cells_drop_out_where_they_stand_alone():
    tree = compile_tree({"a": "{x}", "list": ["{x}", "{y}", "t {x}"], "deep": {"job": "{y}/text"}})
    assert render_tree(tree, {"x": "", "y": 1}) == {"list": [1, "t "], "deep": {"job": "1/text"}}
    assert compile_template("{x}").render({"x": None}) is MISSING


# --- size --------------------------------------------------------------------------------------------------------------

_BIG = """
import json, resource, sys
from producer.manifest import check, lines, open_manifest
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 if sys.platform == "darwin" else 1024) / (1024 if sys.platform == "darwin" else 1)
small, big = sys.argv[1:]
assert check(open_manifest(small)).ok
before = peak()
start = resource.getrusage(resource.RUSAGE_SELF).ru_utime
report = check(open_manifest(big))
print(json.dumps({"jobs": report.jobs, "ok": report.ok, "dependencies": report.dependencies, "mb": peak() - before,
    "cpu_s": resource.getrusage(resource.RUSAGE_SELF).ru_utime - start}))
"""


@pytest.mark.timeout(120)
def test_memory_stays_flat_over_200000_lines(tmp_path):
    def fill(name, count):
        path = tmp_path / name
        with open(path, "w") as out:
            for n in range(count):
                # Every fourth line points somewhere else, mostly forwards.
                other = (n * 7919 + 3) % count
                text = {"job": f"job-{other:07d}"} if n % 4 == 1 else f"text number {n}"
                out.write(json.dumps(echo(f"job-{n:07d}", params={"text": text})) + "\n")
        return path

    command = [sys.executable, "-c", _BIG, fill("small.jsonl", 20_000), fill("big.jsonl", 200_000)]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root, check=True)
    figures = json.loads(done.stdout)
    assert figures["ok"]
    assert figures["jobs"] == 200_000
    assert figures["dependencies"] > 10_000
    # Ten times the lines: 180,000 names kept as Python strings would take about 60 MB more.
    assert figures["mb"] < 25, figures
    assert figures["cpu_s"] < 20, figures


def test_equal_manifests_are_equal_bytes_in_the_store():
    # Found by simulation: the temporary file's name went into the compressed file.
    from producer.manifest.parse import parse_job
    from producer.spool import Spool

    made = []
    for _ in range(2):
        spool = Spool()
        spool.add(parse_job({"custom_id": "a", "kind": "text.echo", "params": {"text": "é"}}), None)
        path, digest, count = spool.close(0, True)
        made.append((path.read_bytes(), digest, count))
        spool.discard()
    assert made[0] == made[1] and made[0][2] == 1
