"""Inference options: what is measured, what is chosen, how it becomes part of a version; on the small real models."""

import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from silent import Silent

from contentfactory.catalogue import load_catalogue
from contentfactory.errors import InputError, ModelUnavailable, TransientError
from db import projects, tunings
from producer.models import find
from worker.engines.files import ResolvedModel, locate
from worker.engines.language import Request
from worker.engines.options import InferenceOptions, missing
from worker.engines.vllm import VllmModel
from worker.resolve import tuned
from worker.tuning import plan, probes
from worker.tuning.plan import Result, candidates, choose, combined, smallest_batch, within

BASE = Result("defaults", speed={"1": 10.0, "4": 20.0})


def result(name, speed, same=True, lossy="", skipped="", **options):
    return Result(name, options, {"1": speed}, same=same, lossy=lossy, skipped=skipped)


# --- choosing ---


def test_the_fastest_with_the_same_results_wins():
    fast, wrong = result("bf16", 30.0, dtype="bfloat16"), result("int8", 90.0, same=False, quantize="int8-dynamic")
    assert choose([BASE, fast, wrong]) is fast
    assert choose([BASE, fast, wrong], allow_lossy=True) is wrong


def test_a_small_gain_changes_nothing():
    assert choose([BASE, result("bf16", 20.5, dtype="bfloat16")]) is BASE


def test_what_gives_a_promise_up_is_never_chosen_unasked():
    engine = result("vllm", 500.0, lossy="results may depend on neighbours", engine="vllm")
    assert choose([BASE, engine]) is BASE
    assert choose([BASE, engine], allow_lossy=True) is engine


def test_what_did_not_run_is_not_chosen():
    assert choose([BASE, Result("x", {"dtype": "float16"}, skipped="crashed")]) is BASE


def test_defaults_that_were_measured_twice_count_at_their_best():
    again = plan.better(BASE, Result("defaults", speed={"1": 50.0, "2": 4.0}))
    assert again.speed == {"1": 50.0, "4": 20.0, "2": 4.0}
    assert choose([again, result("bf16", 30.0, dtype="bfloat16")]) is again
    assert plan.better(BASE, Result("defaults", skipped="crashed")) == BASE


def test_options_that_gain_are_tried_together():
    found = combined([BASE, result("a", 22.0, dtype="bfloat16"), result("b", 30.0, compile="default"), result("c", 10.0, channels_last=True)])
    assert found.options == InferenceOptions(dtype="bfloat16", compile="default")
    assert combined([BASE, result("a", 22.0, dtype="bfloat16")]) is None
    two = combined([BASE, result("a", 22.0, dtype="bfloat16"), result("b", 23.0, dtype="float16"), result("c", 21.0, quantize="int8-dynamic")])
    assert two.options == InferenceOptions(dtype="float16", quantize="int8-dynamic")


def test_the_smallest_batch_near_the_best_speed():
    assert smallest_batch({"1": 5.0, "2": 9.6, "4": 10.0}) == 2
    assert smallest_batch({}) == 1


@pytest.mark.parametrize(
    ("kind", "quality", "expected"),
    [
        ("language", {"agreement": 1.0, "perplexity": 0.001}, True),
        ("language", {"agreement": 0.9, "perplexity": 0.001}, False),
        ("language", {"agreement": 1.0, "perplexity": 0.2}, False),
        ("language", {"agreement": 1.0, "perplexity": float("nan")}, False),
        ("vectors", {"cosine": 0.99999}, True),
        ("vectors", {"cosine": 0.99}, False),
        ("pictures", {"psnr_db": 45.0}, True),
        ("pictures", {"psnr_db": float("nan")}, False),
        ("sound", {}, False),
    ],
)
def test_tolerance(kind, quality, expected):
    assert within(kind, quality) is expected


def test_distances_of_equal_and_of_other_results():
    x = {"vectors": np.eye(3, dtype=np.float32)}
    assert probes.distances("vectors", x, x) == {"cosine": 1.0, "max_error": 0.0}
    words = {"words": np.array(["a", "b", "c", "d"])}
    assert probes.distances("words", words, {"words": np.array(["a", "x", "c"])}) == {"agreement": 0.5}
    tokens = {"tokens": np.array([1, 2]), "likelihoods": np.array([-1.0, -1.0])}
    other = {"tokens": np.array([1, 3]), "likelihoods": np.array([-1.1, -1.1])}
    found = probes.distances("language", tokens, other)
    assert found["agreement"] == 0.5 and found["perplexity"] == pytest.approx(np.exp(0.1) - 1)
    black, white = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 255, np.uint8)
    assert probes.distances("pictures", {"pictures": black}, {"pictures": white})["psnr_db"] == 0
    assert probes.distances("pictures", {"pictures": black}, {"pictures": black})["psnr_db"] == 200
    assert probes.distances("sound", {"sound": np.ones(4)}, {"sound": np.ones(5)}) == {"snr_db": 0.0}


@pytest.mark.parametrize("engine", sorted(plan.QUALITY))
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_engine_has_candidates_with_different_options(engine, device):
    found = candidates(engine, device, {})
    assert found[0].options == InferenceOptions() and not found[0].why_not
    stored = [json.dumps(c.options.stored(), sort_keys=True) for c in found]
    assert len(set(stored)) == len(stored)
    assert plan.QUALITY[engine] in plan.TOLERANCE


def test_what_cannot_run_says_why():
    assert missing(InferenceOptions(engine="vllm"), "cuda") == "vllm is not installed"
    assert missing(InferenceOptions(compile="reduce-overhead"), "cpu") == "CUDA graphs need a GPU"
    assert missing(InferenceOptions(attention="flash_attention_2"), "cpu") == "needs a GPU"
    assert missing(InferenceOptions(dtype="bfloat16"), "cpu") is None


# --- options ---


def model(**inference):
    return ResolvedModel("m", "1", "encoder", {}, None, tuned({"steps": 3}, inference) if inference else {"steps": 3})


def test_only_what_differs_is_stored_and_read_again():
    options = InferenceOptions(dtype="bfloat16", channels_last=True)
    assert options.stored() == {"dtype": "bfloat16", "channels_last": True}
    assert InferenceOptions.of(model(**options.stored())) == options
    assert InferenceOptions.of(model()) == InferenceOptions()
    assert model(dtype="bfloat16").options == {"steps": 3, "dtype": "bfloat16", "inference": {"dtype": "bfloat16"}}


def test_unknown_options_are_refused():
    with pytest.raises(ModelUnavailable, match="float8"):
        InferenceOptions(dtype="float8")
    with pytest.raises(ModelUnavailable, match="speed"):
        InferenceOptions.of(model(speed="high"))


def test_options_of_another_device_are_for_another_worker():
    assert InferenceOptions.of(model(device="cuda"), "cuda:1").device == "cuda"
    with pytest.raises(TransientError, match="tuned for cuda"):
        InferenceOptions.of(model(device="cuda"), "cpu")


def test_the_tag_depends_on_the_options_alone():
    assert tunings.tag_of({"a": 1, "b": 2}) == tunings.tag_of({"b": 2, "a": 1}) != tunings.tag_of({"a": 2, "b": 2})


# --- versions ---


def test_chosen_options_are_part_of_the_version(sqlite_database):
    db = sqlite_database
    project, other = (db.run(lambda conn, n=n: projects.ensure(conn, n)) for n in ("default", "other"))

    def key(name, project_id=project):
        with db.read() as conn:
            return find(conn, project_id, name).key

    plain = key("all-minilm-l6-v2")
    assert plain == "all-minilm-l6-v2@1"
    options = {"dtype": "bfloat16", "device": "cpu"}
    tag = db.run(lambda conn: tunings.store(conn, project, plain, device="cpu 8 GB", options=options, report={"gain": 1.4}))
    assert key("all-minilm-l6-v2") == f"{plain}+{tag}"
    assert key(plain) == plain
    assert key(f"{plain}+{tag}") == f"{plain}+{tag}"
    assert key("all-minilm-l6-v2", other) == plain
    with db.read() as conn:
        assert find(conn, project, "all-minilm-l6-v2").tuning == options
    with pytest.raises(InputError, match="tnone"):
        key(f"{plain}+tnone")
    # Another choice takes over, the old one stays to be named by jobs that were pinned to it.
    newer = db.run(lambda conn: tunings.store(conn, project, plain, device="cpu 8 GB", options={"compile": "default"}, report={}))
    assert key("all-minilm-l6-v2") == f"{plain}+{newer}"
    assert key(f"{plain}+{tag}") == f"{plain}+{tag}"
    assert db.run(lambda conn: tunings.clear(conn, project, plain)) == 1
    assert key("all-minilm-l6-v2") == plain
    assert db.run(lambda conn: tunings.store(conn, project, plain, device="cpu 8 GB", options=options, report={})) == tag
    assert key("all-minilm-l6-v2") == f"{plain}+{tag}"
    with db.read() as conn:
        assert [t["active"] for t in tunings.of_model(conn, project, plain)].count(True) == 1


# --- engines, on the small real models ---


@pytest.fixture
def real(tmp_path):
    def get(name, **inference):
        found = locate(load_catalogue()[name], tmp_path)
        return ResolvedModel(
            found.name, found.version, found.engine, found.files, found.folder, tuned(found.options, inference), found.memory_mb
        )

    return get


@pytest.mark.parametrize("options", [{"dtype": "bfloat16"}, {"quantize": "int8-dynamic"}, {"attention": "eager"}])
def test_the_encoder_heeds_its_options_and_stays_independent_of_neighbours(real, options):
    reference = probes.open_probe(real("all-minilm-l6-v2"), "cpu", 4, real).result()
    from worker.engines.encoder import load_encoder

    encoder = load_encoder(real("all-minilm-l6-v2", **options), "cpu")
    texts = [encoder.encode(text) for text in probes.TEXTS]
    together = dict(encoder.embed(texts))
    quality = probes.distances("vectors", reference, {"vectors": np.stack([together[n] for n in range(len(texts))])})
    assert quality["cosine"] > 0.9
    if "attention" not in options:
        assert quality["max_error"] > 1e-5  # it did something
    for n in (0, 5):
        assert np.array_equal(dict(encoder.embed([texts[n]]))[0], together[n])


def test_the_upscaler_heeds_its_options(real):
    reference = probes.open_probe(real("span"), "cpu", 1, real).result()
    for options in ({"dtype": "bfloat16"}, {"channels_last": True}):
        found = probes.open_probe(real("span", **options), "cpu", 1, real).result()
        assert probes.distances("pictures", reference, found)["psnr_db"] > 30


def test_a_probe_measures_and_stops(real):
    probe = probes.open_probe(real("all-minilm-l6-v2"), "cpu", 4, real)
    speed = probes.measure(probe, 0.0)
    assert list(speed)[:2] == ["1", "2"] and all(rate > 0 for rate in speed.values())


# --- vLLM's adapter, against a stand-in of its interface ---


class _Llm:
    def __init__(self):
        self.asked = []

    def get_tokenizer(self):
        return SimpleNamespace(eos_token_id=0)

    def generate(self, prompts, params, use_tqdm):
        self.asked.append((prompts, params))
        return [
            SimpleNamespace(outputs=[SimpleNamespace(text="hi", token_ids=[5, 6, 0], finish_reason="stop", cumulative_logprob=-3.0)])
            for _ in prompts
        ]


def test_vllm_is_asked_with_ids_and_answers_as_the_usual_engine():
    llm = _Llm()
    engine = VllmModel(llm, lambda **values: values, "m", 100)
    made = dict(engine.generate([Request([1, 2], 4, stop=("x",)), Request([3], 4), Request([4], 4)], lambda index: index != 1))
    assert set(made) == {0, 2}
    assert (made[0].text, made[0].tokens, made[0].finish, made[0].likelihood) == ("hi", [5, 6], "stop", -1.0)
    [(prompts, params)] = llm.asked
    assert prompts == [{"prompt_token_ids": [1, 2]}, {"prompt_token_ids": [4]}]
    assert params[0] | {"stop": ["x"]} == params[0] and params[0]["top_k"] == -1
    with pytest.raises(InputError, match="no_repeat_ngram"):
        list(engine.generate([Request([1], 4, no_repeat_ngram=2)]))
    with pytest.raises(InputError):
        list(engine.generate([Request([1] * 100, 4)]))


def test_vllm_says_what_it_lacks(real):
    from worker.engines.language import load_language

    with pytest.raises(ModelUnavailable, match="needs a GPU"):
        load_language(real("smollm2-135m-instruct", engine="vllm"), "cpu")
    assert "vllm" not in sys.modules


# --- the command ---


@pytest.fixture
def command(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    from producer.cli import app

    monkeypatch.setenv("FACTORY_STATE_DIR", str(tmp_path / "state"))

    def run(*words):
        done = CliRunner().invoke(app, [*words, "--json"])
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    return run


def test_the_command_stores_what_was_chosen_and_shows_and_clears_it(command, monkeypatch):
    module = sys.modules["producer.cli.tune"]  # the package's attribute of that name is the command
    chosen = {"dtype": "bfloat16", "device": "cpu"}
    results = [{**vars(BASE), "unit": "texts"}, {**vars(result("bfloat16", 40.0, dtype="bfloat16")), "unit": "texts"}]
    report = {
        "model": "all-minilm-l6-v2@1", "engine": "encoder", "device": "cpu 8 GB", "threads": 1, "tolerance": {"cosine": 0.9999},
        "results": results, "chosen": "bfloat16", "options": chosen, "gain": 2.0, "batch": 4,
    }  # fmt: skip
    asked = []
    monkeypatch.setattr(module, "_measure", lambda words, *a, **k: asked.append(words) or dict(report))
    assert "tag" not in command("tune", "all-minilm-l6-v2", "--dry-run")
    tag = command("tune", "all-minilm-l6-v2", "--quick")["tag"]
    assert tag == tunings.tag_of(chosen)
    command("tune", "all-minilm-l6-v2")
    assert {words[3] for words in asked} == {"all-minilm-l6-v2@1"}  # the version itself, not what was chosen last
    [shown] = command("models", "show", "all-minilm-l6-v2")["inference"]
    assert (shown["key"], shown["in_use"], shown["options"], shown["gain"]) == (f"all-minilm-l6-v2@1+{tag}", True, chosen, 2.0)
    assert command("tune", "all-minilm-l6-v2", "--clear") == {"model": "all-minilm-l6-v2@1", "cleared": 1}
    assert [i["in_use"] for i in command("models", "show", "all-minilm-l6-v2")["inference"]] == [False]
    module._show({**report, "results": [*results, {**vars(Result("vllm", skipped="not installed")), "unit": ""}]})


def test_each_set_of_options_is_measured_in_a_process_that_may_fail(tmp_path, monkeypatch):
    import argparse

    from contentfactory.settings import load_settings
    from db import migrate
    from db.session import Database
    from worker.tuning.__main__ import _in_child
    from worker.tuning.plan import Candidate

    monkeypatch.setenv("FACTORY_STATE_DIR", str(tmp_path / "state"))
    database = Database(load_settings().database())
    migrate.upgrade(database)
    project = database.run(lambda conn: projects.ensure(conn, "default"))
    database.close()
    args = argparse.Namespace(model="all-minilm-l6-v2@1", project=project, seconds=0.0, most=1)
    found = _in_child(args, Candidate("defaults", InferenceOptions()), "cpu", tmp_path / "out.npz")
    assert found.skipped == "" and found.unit == "texts" and found.speed["1"] > 0 and found.memory_mb > 50
    with np.load(tmp_path / "out.npz") as made:
        assert made["vectors"].shape == (len(probes.TEXTS), 384)
    refused = _in_child(args, Candidate("other", InferenceOptions(device="cuda")), "cpu", tmp_path / "other.npz")
    assert "tuned for cuda" in refused.skipped
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "ended with code 1" in _in_child(args, Candidate("x", InferenceOptions()), "cpu", tmp_path / "x.npz").skipped


def test_results_of_chosen_options_are_never_mixed_with_the_others(sqlite_database, tmp_path):
    from sqlalchemy import select

    from contentfactory.ids import new_id
    from contentfactory.jobs.spec import get_kind
    from contentfactory.settings import load_settings
    from db import jobs, lifecycle
    from db.models import Job
    from storage.memory import MemoryStore
    from worker.execution import Executor

    database = sqlite_database
    project = database.run(lambda conn: projects.ensure(conn, "default"))
    base = "all-minilm-l6-v2@1"
    options = {"dtype": "bfloat16", "device": "cpu"}
    tag = database.run(lambda conn: tunings.store(conn, project, base, device="cpu", options=options, report={}))
    executor = Executor(load_settings(state_dir=tmp_path / "state", device="cpu"), database, MemoryStore(), Silent(), keeper=False)
    kind = get_kind("text.embed")
    params = kind.validate({"input": ["A lamp of glass."], "encoding": "float32"})
    made = {}
    try:
        for name in (base, f"{base}+{tag}", base, f"{base}+{tag}"):
            row = lifecycle.NewJob(
                id=new_id("job"), project_id=project, kind=kind.name, queue=kind.queue, params=params.model_dump(mode="json"),
                share_key=kind.share_key(params, name), seconds=1.0, seed=0, model=name,
            )  # fmt: skip
            database.run(lambda conn, row=row: lifecycle.insert_jobs(conn, [row]))
            executor.run(kind.name, [row.id])
            executor.finishers.submit(lambda: None).result()
            with database.read() as conn:
                [found] = jobs.artifacts(conn, [row.id])[row.id]
                source = conn.execute(select(Job.reused_from).where(Job.id == row.id)).scalar()
            made.setdefault(name, []).append((found["sha256"], found["model"], source is not None))
    finally:
        executor.finishers.shutdown()
        executor.uploads.shutdown()
    (plain, again), (other, other_again) = made.values()
    assert plain[0] != other[0]
    assert (plain[1], other[1]) == (base, f"{base}+{tag}")
    assert (again[0], again[2], other_again[0], other_again[2]) == (plain[0], True, other[0], True)
    assert executor.cache.loads == 2
