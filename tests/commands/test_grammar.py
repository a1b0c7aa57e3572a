"""Every form of Hydra's grammar of overrides works, or is refused in one line: for groups and values, one run or many."""

from __future__ import annotations

import pytest

from genzoo.config.compose import preflight
from genzoo.config.overrides import expand_shorthands
from genzoo.errors import UsageError
from genzoo.jobs import sweep
from tests.commands import genzoo

# Of a group and of a value: what a sweep begins with, or None where it is refused.
FORMS = {
    "model=vae": "vae",
    "model='vae'": "vae",
    "model=vae,gan": "vae",
    "model='gan','vae'": "GAN",
    "model=choice(gan,vae)": "GAN",
    "model=glob(v*)": "vae",
    "model=glob([w*,g*])": "GAN",
    "model=glob(*,exclude=[a*,c*,d*,e*])": "FlowMatching",
    "model=sort(vae,gan)": "GAN",
    "model=sort(vae,gan,reverse=true)": "vae",
    "model=shuffle(vae,vae)": "vae",
    "model=shuffle(vae)": None,  # by Hydra
    "model=tag(mine,choice(vae,gan))": "vae",
    "model=str(vae)": "vae",
    "model=glob(zz*)": None,
    "model=range(3)": None,
    "model=range(0,1e9)": None,
    "model=interval(0,1)": None,
    "model=int(3)": None,
    "model=[vae,gan]": None,
    "model={a:1}": None,
    "model=null": None,
    "model=": None,
    "model=???": None,
    "model=choice()": None,
    "+model=vae": None,
    "++model=vae": None,
    "~model": None,
    "~model=gan": None,
    "model@foo=vae": None,
    "seed=1": 1,
    "seed='1'": 1,
    "seed=2,1": 2,
    "seed=choice(2,1)": 2,
    "seed=range(3,9,3)": 3,
    "seed=range(9,3,-3)": 9,
    "seed=sort(3,1,2)": 1,
    "seed=shuffle(4,4)": 4,
    "seed=int(3.7)": 3,
    "seed=str(3)": 3,
    "seed=float(3)": 3,
    "seed=tag(mine,choice(5,6))": 5,
    "seed=${metrics.num_samples}": 20,
    "++seed=7": 7,
    "seed=glob(*)": None,
    "seed=range(5,1)": None,
    "seed=range(1,5,0)": None,
    "seed=range(0,1e30)": None,
    "seed=range(0,1,1e-12)": None,
    "seed=interval(0,5)": None,
    "seed=int(interval(0,5))": None,
    "seed=int(a)": None,
    "seed=bool(1)": None,
    "seed=json_str([1])": None,
    "seed=choice(1,": None,
    "seed=choice(choice(1,2),3)": None,
    "seed=[choice(1,2)]": None,
    "seed={a:{b:[1,{c:2}]}}": None,
    "seed={null:1}": None,
    "seed=[]": None,
    "seed=${nope}": None,
    "seed=${": None,
    "seed=é": None,
    "+seed=1": None,
    "~seed": None,
    "~seed=5": None,
    "=1": None,
    "~": None,
    "hydra.sweeper=x": None,
    "hydra.sweeper.params={seed:'1,2'}": None,
    "+hydra.sweeper.params.seed='1,2'": None,
    "hydra/sweeper=nope": None,
}
SEVERAL = ("choice(", "range(", "glob(", "sort(", "shuffle(", "tag(", "interval(")


@pytest.mark.parametrize("form", FORMS)
def test_every_form_works_or_is_refused_in_one_line(form):
    expected = FORMS[form]
    if expected is None:
        with pytest.raises(UsageError) as refused:
            preflight("train", [form], sweep=True)
        assert "\n" not in str(refused.value) and len(str(refused.value)) > 10
        if form != "hydra.sweeper=x":  # of which one run takes no notice
            with pytest.raises(UsageError):
                preflight("train", [form])
        return
    job = preflight("train", [form], sweep=True)
    assert job is not None
    found = job.config["seed"] if "seed" in form else job.config["model"]["_target_"].rpartition(".")[2]
    assert found == expected
    if any(function in form for function in SEVERAL) or "," in form:
        with pytest.raises(UsageError, match="several values need -m"):
            preflight("train", [form])
    else:
        assert preflight("train", [form]) is not None


@pytest.mark.parametrize(
    ("form", "said"),
    [
        ("model=glob(zz*)", "matches none of autoregressive, cascade"),
        ("seed=glob(*)", "needs a config group"),
        ("seed=range(0,1e30)", "at most 10,000"),
        ("seed=interval(0,1)", "an interval needs a search, hydra/sweeper=optuna"),
        ("logger=[csv]", "one choice, not a list; with -m several: logger=a,b"),
    ],
)
def test_the_line_says_what_would_be_accepted(form, said):
    with pytest.raises(UsageError) as refused:
        preflight("train", [form], sweep=True)
    assert str(refused.value).startswith(form.partition("=")[0]) or "jobs" in str(refused.value)
    assert said in str(refused.value)


@pytest.fixture
def jobs(monkeypatch, tmp_path) -> list[str]:
    monkeypatch.chdir(tmp_path)
    started: list[str] = []

    def run_process(words, seconds, **environment):
        started.append(" ".join(words[1:]))
        return sweep.Outcome(0, "")

    monkeypatch.setattr(sweep, "run_process", run_process)
    return started


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["model=glob(v*)"], ["model=vae", "model=vqvae", "model=vqvae2"]),
        (["model=vae", "seed=range(1,3)"], ["model=vae seed=1", "model=vae seed=2"]),
        (["~logger", "seed=sort(2,1)"], ["~logger=null seed=1", "~logger=null seed=2"]),
        (["outputs='a,b'"], ["outputs='a,b'"]),
    ],
)
def test_a_sweep_starts_the_jobs_of_its_forms_and_each_is_read_again(jobs, words, expected):
    assert genzoo("-m", *words) == (0, "", "")
    assert jobs == expected
    for line in jobs:
        preflight("train", line.split(" "))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["hydra/launcher=glob(*)"], "Sweeping over Hydra's configuration is not supported"),
        (["hydra.sweep.dir=a,b"], "Sweeping over Hydra's configuration is not supported"),
        (["hydra.sweeper.max_batch_size=0", "seed=1,2"], "hydra: "),
    ],
)
def test_what_hydra_refuses_later_is_one_line_too(jobs, words, said):
    code, out, err = genzoo("-m", *words)
    assert (code, out, jobs) == (2, "", []) and err.startswith("genzoo: ") and said in err and err.count("\n") == 1


def test_choices_of_a_directory_of_ones_own_are_found_by_a_glob(jobs, tmp_path):
    (tmp_path / "conf/experiment").mkdir(parents=True)
    for name in ("mine_a", "mine_b"):
        (tmp_path / f"conf/experiment/{name}.yaml").write_text("# @package _global_\nseed: 3\n")
    assert genzoo("-m", "--config-dir", "conf", "experiment=glob(mine_*)").code == 0
    assert [line.rpartition(" ")[2] for line in jobs] == ["experiment=mine_a", "experiment=mine_b"]


@pytest.mark.parametrize("storage", ["sqlite:///search.db", "postgresql://me:hunter2-and-more@host/db"])
def test_a_search_that_would_be_kept_in_a_data_base_is_refused(jobs, storage):
    pytest.importorskip("hydra_plugins.hydra_optuna_sweeper")
    code, _, err = genzoo("-m", "hydra/sweeper=optuna", f"hydra.sweeper.storage={storage}", "seed=1,2")
    assert code == 2 and err.startswith("genzoo: hydra.sweeper.storage=") and err.count("\n") == 1
    assert "omit it" in err and "hunter2" not in err and not jobs


def test_shorthands_are_written_in_full():
    assert expand_shorthands("sample", ["guidance=2", "n=3"]) == ["guidance=classifier_free", "guidance.scale=2", "n=3"]
    assert expand_shorthands("evaluate", ["guidance=1,2.5"]) == ["guidance=classifier_free", "guidance.scale=1,2.5"]
    for word in ("guidance=auto", "guidance=null", "guidance.scale=3"):
        assert expand_shorthands("sample", [word]) == [word]
    assert expand_shorthands("encode", ["data=test", "run=data=x"]) == ["examples=test", "run=data=x"]
    assert expand_shorthands("train", ["data=digits"]) == ["data=digits"]
